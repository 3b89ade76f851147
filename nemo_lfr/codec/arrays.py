"""Protocol of the array operations that the codec needs, and its implementation in numpy.

`Codec` calls only these operations, so the same code works with numpy arrays and with tensors. Arguments named `dtype`
are numpy types, even for tensors.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol, TypeVar

import numpy as np

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.arrays import numeric_array

Array = TypeVar("Array")


class Kind(Enum):
    """Type of the elements of an array."""

    FLOAT = "floating point of any width"
    INT16 = "signed 16-bit integers"
    INTEGER = "other integers"
    OTHER = "anything else"

    @property
    def is_integer(self) -> bool:
        """Whether elements are integers of any width."""
        return self in (Kind.INT16, Kind.INTEGER)


class Arrays(Protocol[Array]):
    """Array operations of a backend, on the backend's device."""

    def convert(self, value: object, name: str, error: type[NemoLfrError]) -> Array:
        """Convert an argument to an array without moving it to another device.

        Raises:
            NemoLfrError: of the type `error`, if `value` is not numeric; the message contains `name`.
        """

    def kind(self, array: Array) -> Kind:
        """Return the type of the elements: FLOAT, INT16, INTEGER (other integers) or OTHER."""

    def zeros(self, shape: Sequence[int], dtype: type[np.generic]) -> Array:
        """Return zeros on the backend's device."""

    def cast(self, array: Array, dtype: type[np.generic]) -> Array:
        """Convert an array to `dtype` and to the backend's device."""

    def peaks(self, audio: Array, lengths: Sequence[int]) -> list[float]:
        """Return the largest magnitude among the valid samples of each clip; 0 for an empty clip.

        Args:
            audio: clips, [B, T_audio].
            lengths: valid samples in each clip.
        """


class NumpyArrays:
    """Implementation of `Arrays` in numpy."""

    def convert(self, value: object, name: str, error: type[NemoLfrError]) -> np.ndarray:
        """Return a numpy array; see `numeric_array`."""
        return numeric_array(value, name, error)

    def kind(self, array: np.ndarray) -> Kind:
        """Return the type of the elements: FLOAT, INT16, INTEGER (other integers) or OTHER."""
        if array.dtype.kind == "f":
            return Kind.FLOAT
        if array.dtype.kind not in "iu":
            return Kind.OTHER
        return Kind.INT16 if array.dtype == np.int16 else Kind.INTEGER

    def zeros(self, shape: Sequence[int], dtype: type[np.generic]) -> np.ndarray:
        """Return an array of zeros."""
        return np.zeros(shape, dtype)

    def cast(self, array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        """Convert an array to `dtype`; an array that has this dtype is not copied."""
        return array.astype(dtype, copy=False)

    def peaks(self, audio: np.ndarray, lengths: Sequence[int]) -> list[float]:
        """Return the largest magnitude in each clip."""
        return [
            float(np.abs(row[:length]).max()) if length else 0.0 for row, length in zip(audio, lengths, strict=True)
        ]


def to_numpy(array: Any) -> np.ndarray:
    """Convert an array of any backend to a numpy array. A tensor is copied to the CPU if needed."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()
