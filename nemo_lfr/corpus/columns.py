"""Find the audio column of a table, and convert Arrow cells to audio and labels."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

from nemo_lfr.errors import AudioError, shorten
from nemo_lfr.io.columns import AUDIO, LABEL_COLUMNS, TEXT_COLUMNS

# Names of fields and columns that contain the sample rate.
RATES = ("sampling_rate", "sample_rate")
# For each time unit of Arrow, the number of units in a second.
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY = 86400
_YEARS = (-62_135_596_800, 253_402_300_800)  # the start of year 1 and of year 10000, in seconds since 1970


@dataclass(frozen=True)
class Samples:
    """Decoded audio from a cell of a table. Neither the array nor the sample rate in Hz is validated yet."""

    array: np.ndarray
    rate: Any


def audio_column(names: Sequence[str], types: Mapping[str, Any]) -> str | None:
    """Return the name of the audio column of a table.

    A column with a known name is preferred. If there is none, the first column that contains bytes or decoded samples
    is the audio column.

    Args:
        names: names of all columns.
        types: Arrow type of each column.

    Returns:
        The name, or None if no column can contain audio.
    """
    by_name = next((name for name in AUDIO if name in names), None)
    return by_name or next((name for name in names if _holds_audio(types.get(name))), None)


def may_contain_paths(kind: Any) -> bool:
    """Return whether cells of an Arrow type can contain paths of audio files; see `audio_cell`."""
    import pyarrow.types as is_

    if is_.is_dictionary(kind):
        kind = kind.value_type
    if is_.is_struct(kind):
        return any(kind.field(number).name == "path" for number in range(kind.num_fields))
    return contains_text(kind)


def contains_text(kind: Any) -> bool:
    """Return whether an Arrow type is that of text."""
    import pyarrow.types as is_

    if is_.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (is_.is_string, is_.is_large_string, is_.is_string_view))


def contains_lists_of_files(kind: Any) -> bool:
    """Return whether an Arrow type is a list of audio files, such as `Sequence(Audio())` of `datasets`."""
    import pyarrow.types as is_

    if not _is_list(kind) or not is_.is_struct(kind.value_type):
        return False
    return {"bytes", "path"} <= {kind.value_type.field(number).name for number in range(kind.value_type.num_fields)}


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the class names of integer columns in a table that Hugging Face `datasets` wrote.

    Args:
        features: description of each column, in the form that `datasets` stores as JSON.

    Returns:
        A dict from the name of each `ClassLabel` column to a list of class names. The integers in the column are
        indices of this list.
    """
    found = {}
    for column, feature in features.items():
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            if isinstance(names, list):
                found[column] = [str(name) for name in names]
    return found


def parquet_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return the descriptions of columns that `datasets` stored in Parquet metadata; {} if there are none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def label_value(cell: Any, names: Sequence[str] | None, column: str) -> Any:
    """Convert the Arrow cell of a label to a Python value.

    Text, numbers and booleans are kept. A duration becomes a number of seconds; a date, a time or a UUID becomes text.
    Times that are out of range and values of all other types become None; see `is_label`. In the columns of the
    standard labels (`LABEL_COLUMNS`), however, values of any type are returned, so that `standard_labels` can raise an
    error for them.

    Bytes are decoded only in columns that usually contain text (`TEXT_COLUMNS`).

    Args:
        cell: the Arrow scalar.
        names: class names of an integer column, which replace the integers; None for other columns.
        column: name of the column.

    Raises:
        AudioError: if the text is not valid UTF-8.
    """
    import pyarrow.types as is_

    if is_.is_dictionary(cell.type) and cell.is_valid:
        cell = cell.value
    if is_.is_nested(cell.type) and column not in LABEL_COLUMNS:
        return None
    try:
        if cell.is_valid and column not in LABEL_COLUMNS:
            if is_.is_duration(cell.type):  # `as_py` refuses nanoseconds if pandas is missing
                return cell.value / UNITS[cell.type.unit]
            if is_.is_date(cell.type) or is_.is_time(cell.type) or is_.is_timestamp(cell.type):
                return _time_text(cell)
        value = cell.as_py()
        if isinstance(value, bytes) and column in TEXT_COLUMNS:
            value = value.decode()
    except UnicodeDecodeError as error:
        raise AudioError(f"the label in column {column!r} is not UTF-8 text ({error.reason})") from error
    except (ValueError, OverflowError, ArithmeticError):  # a date that Python cannot represent
        return None
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, Decimal) and value.is_finite():
        value = int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, UUID):
        value = str(value)
    return value if column in LABEL_COLUMNS or isinstance(value, str | int | float | bool) else None


def _time_text(cell: Any) -> str | None:
    """Return a date, time or time stamp as text; None for years outside 1 to 9999 and times outside 0 to 24 h.

    For such values, Arrow itself would return a wrong time or the text `<value out of range: ...>`.
    """
    import pyarrow
    import pyarrow.types as is_

    unit = getattr(cell.type, "unit", "ms")  # dates have no `unit`; those of 64 bits are in milliseconds
    seconds = cell.value * _DAY if is_.is_date32(cell.type) else cell.value / UNITS[unit]
    start, stop = (0, _DAY) if is_.is_time(cell.type) else _YEARS
    text: str | None = cell.cast(pyarrow.string()).as_py() if start <= seconds < stop else None
    return text


def is_label(column: str, kind: Any) -> bool:
    """Return whether a column of the Arrow type `kind` can contain labels; see `label_value`."""
    import pyarrow.types as is_

    if is_.is_dictionary(kind):
        kind = kind.value_type
    if column in LABEL_COLUMNS or is_.is_null(kind):
        return True
    is_bytes = any(test(kind) for test in (is_.is_binary, is_.is_large_binary, is_.is_fixed_size_binary))
    if is_bytes or str(kind) == "binary_view":
        return column in TEXT_COLUMNS
    return not is_.is_nested(kind) and not is_.is_interval(kind) and not _is_list(getattr(kind, "storage_type", kind))


def audio_cell(cell: Any, rate: Any = None) -> bytes | str | Samples:
    """Return the audio in an Arrow cell: file bytes, a path, or decoded samples.

    Args:
        cell: Arrow scalar: bytes, a path as text, a list of samples [T], [C, T] or [T, C] (also as `Array2D` of
            `datasets`), or a struct. As in `datasets`, a struct has the fields `bytes` and `path`, or the fields
            `array` and `sampling_rate`.
        rate: sample rate in Hz for samples without a sample rate in the cell.

    Raises:
        AudioError: if the cell contains no audio in one of these forms.
    """
    import pyarrow.types as is_

    if cell is None or not cell.is_valid:
        raise AudioError("no audio: the cell is null")
    if _is_tensor(cell):
        return Samples(_array(cell), rate)
    cell = _stored(cell)
    if is_.is_dictionary(cell.type):
        cell = cell.value
    if is_.is_struct(cell.type):
        fields = {cell.type.field(number).name: number for number in range(cell.type.num_fields)}
        parts = {name: cell[number] for name, number in fields.items() if cell[number].is_valid}
        data = parts["bytes"].as_py() if "bytes" in parts else None
        if isinstance(data, bytes) and data:
            return data
        if "array" in parts:
            own = next((parts[name].as_py() for name in RATES if name in parts), rate)
            return Samples(_array(parts["array"]), own)
        path = parts["path"].as_py() if "path" in parts else None
        if isinstance(path, str):
            return path
        raise AudioError(f"no audio: none of the fields {sorted(fields)} contains bytes, samples or a path")
    if _is_list(cell.type):
        return Samples(_array(cell), rate)
    value = cell.as_py()
    if isinstance(value, bytes | str) and value:
        return value
    raise AudioError(f"no audio: expected bytes, samples or a path, found {shorten(repr(value))}")


def _array(cell: Any) -> np.ndarray:
    """Convert an Arrow tensor, a list, or a list of lists of equal length, to an array."""
    if _is_tensor(cell):
        tensor: np.ndarray = cell.to_numpy()
        return tensor
    cell = _stored(cell)
    if not _is_list(cell.type):
        raise AudioError(f"the samples have the type {cell.type}; expected a list of numbers")
    values = cell.values
    if not _is_list(values.type):
        return _numbers(values)
    rows = [_numbers(row.values) for row in values if row.is_valid]
    if len(rows) < len(values):
        raise AudioError("one of the channels is null")
    if len({len(row) for row in rows}) > 1:
        raise AudioError("the channels have different lengths")
    return np.stack(rows) if rows else np.zeros(0, np.float32)


def _is_tensor(cell: Any) -> bool:
    """Return whether a cell is a tensor of fixed shape. Its `value` is a flat list, without the shape."""
    import pyarrow

    return isinstance(cell, pyarrow.FixedShapeTensorScalar)


def _stored(cell: Any) -> Any:
    """Return a cell as a plain Arrow value, even if it has an extension type such as `Array2D` of `datasets`."""
    import pyarrow

    return cell.value if isinstance(cell.type, pyarrow.BaseExtensionType) else cell


def _numbers(values: Any) -> np.ndarray:
    array = values.to_numpy(zero_copy_only=False)  # null becomes NaN
    if array.dtype == object:
        raise AudioError(f"the samples have the type {values.type}; expected numbers")
    return np.asarray(array)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as is_

    return any(test(kind) for test in (is_.is_list, is_.is_large_list, is_.is_fixed_size_list))


def _holds_audio(kind: Any) -> bool:
    import pyarrow.types as is_

    if kind is None:
        return False
    if is_.is_struct(kind):
        names = {kind.field(number).name for number in range(kind.num_fields)}
        return bool(names & {"bytes", "array"})
    return any(test(kind) for test in (is_.is_binary, is_.is_large_binary))
