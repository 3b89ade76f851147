"""Convert columns and cells of tables (Arrow, pandas, polars, `datasets`) to lists, dicts and numpy arrays.

No table library is imported here.
"""

import os
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nemo_lfr.errors import AudioError


def as_list(audio: Any) -> Any:
    """Convert a table's column to a list, and an `array.array` to a numpy array.

    Any other argument is returned unchanged.

    Columns are sequences (the `Column` of `datasets`), arrays of objects or of paths (a `Series` of pandas or polars),
    and Arrow arrays. An Arrow column of numbers is one clip, and becomes a numpy array of the same type. An Arrow
    table becomes a list with a dict for each row. Arrow values in a list are converted as by `from_arrow`.

    Raises:
        AudioError: for a data frame, unless all of its columns contain numbers. Pass one of its columns instead.
    """
    if isinstance(audio, list | tuple):
        return [from_arrow(clip) for clip in audio] if audio and _is_arrow(audio[0]) else audio
    if _is_arrow(audio):
        return from_arrow(audio)
    if callable(getattr(audio, "to_pylist", None)):  # an Arrow table
        return audio.to_pylist()
    if isinstance(audio, array):
        return np.asarray(audio)  # keeps int16
    if hasattr(audio, "columns") and hasattr(audio, "dtypes") and np.asarray(audio).dtype.kind in "OUST":
        raise AudioError("audio is a data frame; pass its column of audio, such as table['audio'].")
    is_other_sequence = isinstance(audio, Sequence) and not isinstance(audio, str | bytes)
    has_objects = getattr(audio, "dtype", None) == np.dtype(object)
    return list(audio) if is_other_sequence or has_objects or _has_clips(audio) else audio


def from_arrow(value: Any) -> Any:
    """Convert an Arrow array or scalar; return any other value unchanged.

    An array of numbers becomes a numpy array. Any other array becomes a list with one converted item for each element.
    A scalar that is a list is converted like an array, but a list of equally long lists of numbers becomes one numpy
    array. A scalar that is a tensor becomes a numpy array, and a scalar that is a struct becomes a dict.
    """
    if not _is_arrow(value):
        return value
    import pyarrow
    import pyarrow.types as is_

    if isinstance(value, pyarrow.Array | pyarrow.ChunkedArray):
        if is_.is_integer(value.type) or is_.is_floating(value.type):
            return np.asarray(value)
        return [from_arrow(item) for item in value]
    if not value.is_valid:
        return None
    if isinstance(value, pyarrow.FixedShapeTensorScalar):
        return value.to_numpy()  # `value.value` is one list, without the shape
    if isinstance(value, pyarrow.ExtensionScalar):
        return from_arrow(value.value)
    if is_.is_struct(value.type):
        return {value.type.field(index).name: from_arrow(value[index]) for index in range(value.type.num_fields)}
    if not isinstance(getattr(value, "values", None), pyarrow.Array):
        return value.as_py()
    items = from_arrow(value.values)
    is_matrix = isinstance(items, list) and all(isinstance(item, np.ndarray) for item in items)
    return np.stack(items) if is_matrix and len({item.shape for item in items}) == 1 else items


def _is_arrow(value: Any) -> bool:
    """Return whether a value is an Arrow array or scalar."""
    is_convertible = hasattr(value, "type") and (hasattr(value, "to_pylist") or hasattr(value, "as_py"))
    return is_convertible and type(value).__module__.startswith("pyarrow.")


def _has_clips(audio: Any) -> bool:
    """Return whether a 1-D array, or a column of pandas or polars, begins with a path, a dict or a polars list."""
    if not isinstance(audio, np.ndarray) and not callable(getattr(audio, "to_list", None)):
        return False
    if getattr(audio, "ndim", 1) != 1 or not len(audio):
        return False
    first = next(iter(audio))
    return isinstance(first, str | os.PathLike | Mapping) or callable(getattr(first, "to_list", None))
