"""Write a codec as `config.json` and `model.safetensors`, which `nemo_lfr.load` and Hugging Face's libraries read.

The tensors are those of the checkpoint with NeMo's names, including weight norm, so that the codec computes the same
tokens and has the same fingerprint. Discriminators and other tensors that inference does not use are left out.
"""

import json
import os
from pathlib import Path

import torch
from omegaconf import OmegaConf

from nemo_lfr.checkpoint.reader import Checkpoint
from nemo_lfr.checkpoint.safetensors import DTYPES, LENGTH_BYTES
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import replacing, sweep, write_bytes
from nemo_lfr.io.locate import SAFETENSORS, SAFETENSORS_CONFIG, expand_home

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def export_safetensors(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], *, overwrite: bool = False
) -> list[Path]:
    """Write the codec of a checkpoint to `config.json` and `model.safetensors`.

    Args:
        source: local path of a checkpoint.
        folder: created if it does not exist.
        overwrite: replace existing files.

    Returns:
        Paths of both files.

    Raises:
        CheckpointError: if `source` is damaged.
        NemoLfrError: if a file exists and `overwrite` is not set.
    """
    checkpoint = Checkpoint(source)
    for name in checkpoint.parts.named():
        checkpoint.load_module(name)  # validates all values
    tensors = dict(checkpoint.iter_stored())
    folder = expand_home(folder)
    config, weights = targets = [folder / SAFETENSORS_CONFIG, folder / SAFETENSORS]
    for target in targets:
        if target.exists() and not overwrite:
            raise NemoLfrError(f"{target} exists; pass --overwrite (overwrite=True) to replace it.")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, [target.name for target in targets])
    values = OmegaConf.to_container(checkpoint.config, resolve=False)
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(weights) as file:
        file.write(_header(tensors))
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    write_bytes(config, text.encode())
    return targets


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    # "format" is what transformers requires. Spaces align the values to 8 bytes.
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header
