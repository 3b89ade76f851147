"""Values of a quantizer's buffers, and detection of buffers that a caller has changed."""

import math
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from nemo_lfr.modules.token_checks import has_values


class _Buffers(NamedTuple):
    """Result of comparing the buffers of a quantizer with its levels.

    Attributes:
        tensors: the buffers.
        places: address and version of each buffer when it was compared. PyTorch increases the version at each write.
        arrays: numpy views of the buffers, through which later writes are visible; None on a GPU.
        are_own: whether the values matched the levels.
    """

    tensors: list[torch.Tensor]
    places: list[tuple[int, int]]
    arrays: list[np.ndarray] | None
    are_own: bool


_COMPARED: WeakKeyDictionary[nn.Module, _Buffers] = WeakKeyDictionary()


@cache
def level_tables(levels: tuple[int, ...]) -> dict[str, list[int]]:
    """Return the correct content of a quantizer's buffers: a dict from buffer name to one value per FSQ dimension."""
    bases = [math.prod(levels[:dim]) for dim in range(len(levels))]
    return {"dim_base_index": bases, "num_levels": list(levels)}


@cache
def _as_bytes(levels: tuple[int, ...]) -> list[bytes]:
    return [np.array(values, np.int32).tobytes() for values in level_tables(levels).values()]


def has_level_tables(quantizer: nn.Module, levels: tuple[int, ...]) -> bool:
    """Return whether the buffers of a quantizer have the values for its levels.

    On a CPU, each call compares the values. On a GPU, the values are compared again only after changes that PyTorch
    counts, so a write through `.data` is not noticed. Inside `torch.compile`, the result is always True. It is also
    True if the values were never compared and cannot be read now, for example on the meta device.
    """
    if torch.compiler.is_compiling():
        return True
    buffers = [quantizer._buffers.get(name) for name in level_tables(levels)]
    tensors = [buffer for buffer in buffers if buffer is not None]
    known = _COMPARED.get(quantizer)
    if known is None or not _is_for(known, tensors):
        if not all(map(has_values, tensors)):
            return True
        arrays = [tensor.detach().cpu().numpy() for tensor in tensors]
        are_own = [array.tobytes() for array in arrays] == _as_bytes(levels)
        is_on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
        known = _Buffers(tensors, list(map(_place, tensors)), arrays if is_on_cpu else None, are_own)
        _COMPARED[quantizer] = known
    elif known.arrays is not None:
        return [array.tobytes() for array in known.arrays] == _as_bytes(levels)
    return known.are_own


def _is_for(known: _Buffers, tensors: list[torch.Tensor]) -> bool:
    if len(known.tensors) != len(tensors):
        return False
    return all(
        tensor is other and _place(tensor) == place
        for tensor, other, place in zip(tensors, known.tensors, known.places, strict=True)
    )


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
