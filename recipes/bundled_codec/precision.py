"""Choose the precision in which the network and Muon compute."""

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Entries of `torch.cpu.get_capabilities` (since PyTorch 2.13) for instructions that multiply bf16 numbers.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_1", "arm_bf16", "bf16")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype in which the network and Muon compute. The weights are always kept in fp32.

    Args:
        precision: "bf16", "fp32" or "auto", which is bf16 on a GPU and on a CPU that has instructions for it. On other
            CPUs, an update in bf16 takes about three times as long as in fp32.
        device: device of the network.

    Raises:
        ValueError: if `precision` is none of these.
    """
    if precision == "auto":
        if device.type == "cpu":
            capabilities = getattr(torch.cpu, "get_capabilities", dict)()
            native = any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)
            return torch.bfloat16 if native else torch.float32
        return torch.bfloat16
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; pass auto, {' or '.join(PRECISIONS)}.")
    return PRECISIONS[precision]
