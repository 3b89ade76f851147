"""Array libraries: the array operations of the codec, in terms of numpy's dtypes."""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol, TypeVar

import numpy as np

from nemo_lfr.errors import NemoLfrError, shorten

Array = TypeVar("Array")


class Kind(Enum):
    """Type of the elements of an array."""

    FLOAT = "floating point of any width"
    INT16 = "16-bit integers"
    INTEGER = "integers of another width"
    OTHER = "anything else"

    @property
    def is_integer(self) -> bool:
        """Whether elements are integers of any width."""
        return self in (Kind.INT16, Kind.INTEGER)


class Arrays(Protocol[Array]):
    """Array library of a backend, on the backend's device."""

    def convert(self, value: object, name: str, error: type[NemoLfrError]) -> Array:
        """Convert an argument to an array without moving it to another device.

        Raises:
            NemoLfrError: of the type `error`, with the name of the argument, if `value` is not numeric.
        """

    def kind(self, array: Array) -> Kind:
        """Return the type of the elements."""

    def zeros(self, shape: Sequence[int], dtype: type[np.generic]) -> Array:
        """Return zeros on the backend's device."""

    def cast(self, array: Array, dtype: type[np.generic]) -> Array:
        """Return the same values as `dtype`, on the backend's device."""

    def peaks(self, audio: Array, lengths: Sequence[int]) -> list[float]:
        """Return the largest magnitude of each clip [B, T_audio] up to its length; 0 for an empty one."""


class NumpyArrays:
    """Numpy arrays."""

    def convert(self, value: object, name: str, error: type[NemoLfrError]) -> np.ndarray:
        """Return `numpy.asarray(value)`, in this machine's byte order.

        Raises:
            NemoLfrError: of the type `error`, if the value is not numeric or has masked elements.
        """
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            raise error(f"{name} is a masked array with {int(np.sum(value.mask))} masked values; fill them first.")
        try:
            array = np.asarray(value)
        except Exception as reason:  # `__array__` of any class
            what = " ".join(str(reason).split())
            raise error(f"{name} is {type(value).__name__}; pass a numpy array ({shorten(what)}).") from None
        if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
            raise error(f"{name} is {type(value).__name__} of {array.dtype}; pass an array of numbers.")
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def kind(self, array: np.ndarray) -> Kind:
        """Return the type of the elements."""
        if array.dtype.kind == "f":
            return Kind.FLOAT
        if array.dtype.kind not in "iu":
            return Kind.OTHER
        return Kind.INT16 if array.dtype == np.int16 else Kind.INTEGER

    def zeros(self, shape: Sequence[int], dtype: type[np.generic]) -> np.ndarray:
        """Return `numpy.zeros`."""
        return np.zeros(shape, dtype)

    def cast(self, array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        """Return the array itself if it has this dtype."""
        return array.astype(dtype, copy=False)

    def peaks(self, audio: np.ndarray, lengths: Sequence[int]) -> list[float]:
        """Return the largest magnitude of each clip."""
        return [
            float(np.abs(row[:length]).max()) if length else 0.0 for row, length in zip(audio, lengths, strict=True)
        ]


def to_numpy(array: Any) -> np.ndarray:
    """Return an array of any backend as a numpy array, on the CPU."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()
