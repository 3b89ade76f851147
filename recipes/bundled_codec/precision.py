"""Choose the precision in which the network and Muon compute."""

import torch

from nemo_lfr.codec.cpu.packed import has_bf16

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype in which the network and Muon compute. The weights are always kept in fp32.

    Args:
        precision: "bf16", "fp32" or "auto". "auto" selects bf16 on a GPU and on a CPU with bf16 instructions. On other
            CPUs it selects fp32, because an update in bf16 takes about three times as long there.
        device: device of the network.

    Raises:
        ValueError: if `precision` has another value.
    """
    if precision == "auto":
        return torch.float32 if device.type == "cpu" and not has_bf16() else torch.bfloat16
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; pass auto, {' or '.join(PRECISIONS)}.")
    return PRECISIONS[precision]
