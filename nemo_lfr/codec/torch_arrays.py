"""Implementation of the codec's array operations (`nemo_lfr.codec.arrays.Arrays`) with PyTorch tensors."""

import contextlib
import logging
import os
from collections.abc import Sequence

import numpy as np
import torch

from nemo_lfr.codec.arrays import Kind
from nemo_lfr.codec.tracing import check_plain_tensor
from nemo_lfr.errors import NemoLfrError, shorten

logger = logging.getLogger(__name__)

DTYPES: dict[type[np.generic], torch.dtype] = {
    np.float32: torch.float32,
    np.int32: torch.int32,
    np.int64: torch.int64,
}


class TorchArrays:
    """Implementation of `Arrays` with tensors on one device.

    Args:
        device: device of the tensors that `zeros` and `cast` return.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def convert(self, value: object, name: str, error: type[NemoLfrError]) -> torch.Tensor:
        """Convert an argument to a plain tensor without moving it to another device.

        Raises:
            NemoLfrError: of the type `error`, if `value` is not an array of numbers.
        """
        guard_after_fork()
        return _tensor(value, name, error)

    def kind(self, array: torch.Tensor) -> Kind:
        """Return the type of the elements: FLOAT, INT16, INTEGER (other integers) or OTHER."""
        if array.dtype.is_floating_point:
            return Kind.FLOAT
        if array.dtype.is_complex or array.dtype is torch.bool:
            return Kind.OTHER
        return Kind.INT16 if array.dtype is torch.int16 else Kind.INTEGER

    def zeros(self, shape: Sequence[int], dtype: type[np.generic]) -> torch.Tensor:
        """Return zeros on the device."""
        return torch.zeros(*shape, dtype=DTYPES[dtype], device=self.device)

    def cast(self, array: torch.Tensor, dtype: type[np.generic]) -> torch.Tensor:
        """Convert a tensor to `dtype`, move it to the device, and detach it from the autograd graph."""
        return array.detach().to(self.device, DTYPES[dtype])

    def peaks(self, audio: torch.Tensor, lengths: Sequence[int]) -> list[float]:
        """Return the largest magnitude in each clip; see `Arrays.peaks`."""
        # One transfer for all rows, because each transfer to the CPU synchronizes a GPU.
        peaks = [row[:length].abs().max() for row, length in zip(audio, lengths, strict=True) if length]
        values = iter(torch.stack(peaks).tolist() if peaks else [])
        return [next(values) if length else 0.0 for length in lengths]


def _tensor(value: object, name: str, error: type[NemoLfrError]) -> torch.Tensor:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise error(f"{name} is a masked array with {int(np.sum(value.mask))} masked values; fill them first.")
    if hasattr(value, "__array__") and not isinstance(value, torch.Tensor | np.ndarray | np.generic):
        with contextlib.suppress(Exception):  # the `__array__` method of any class may raise any exception
            value = np.asarray(value)  # PyTorch would read a pandas Series by its index
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and value.dtype.itemsize > 8:
            value = value.astype(np.float64)  # PyTorch has no longdouble
        if not np.issubdtype(value.dtype, np.number) and value.dtype != bool:
            raise error(f"{name} is an array of dtype {value.dtype}; pass an array of numbers.")
        native = value.dtype.newbyteorder("=")
        if not value.flags.writeable or value.dtype != native or min(value.strides, default=0) < 0:
            value = value.astype(native, order="C")  # a copy: torch rejects such arrays, or warns about them
    try:
        tensor = torch.as_tensor(value)
        if not isinstance(value, np.ndarray | torch.Tensor) and tensor.is_floating_point():
            tensor = torch.as_tensor(value, dtype=torch.float32)  # whatever the caller's default dtype is
    except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
        what = " ".join(str(reason).split())
        got = type(value).__name__
        raise error(f"{name} has type {got}; pass a numpy array or a tensor ({shorten(what)}).") from None
    check_plain_tensor(tensor, name, error)
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise error(f"{name} is a sparse, quantized or meta tensor; pass a plain dense tensor.")
    return tensor.resolve_neg()  # numpy cannot read a view such as z.conj().imag


_computed_in: int | None = None  # id of the process that used a network last


def guard_after_fork() -> None:
    """Limit PyTorch to one thread in forked children.

    PyTorch's thread pool does not survive `fork`, so a child with more than one thread would hang. Call this function
    before each use of a network.
    """
    global _computed_in
    if _computed_in not in (None, os.getpid()) and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.warning(
            "this process was forked from a process that had used the codec, so PyTorch is limited to one thread; "
            "start processes with 'spawn' to use all threads."
        )
    _computed_in = os.getpid()
