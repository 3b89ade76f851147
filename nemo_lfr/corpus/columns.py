"""Columns of other people's tables: which one is the text, the speaker, the language, and what an audio cell holds."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_lfr.errors import AudioError, shorten
from nemo_lfr.io.text import is_missing

# Label -> the columns that may hold it; of several, the first that has a value.
LABELS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_transcription"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "lang": ("lang", "language", "locale"),
}
# Columns whose bytes are text.
TEXT_COLUMNS = frozenset({"id", *(column for columns in LABELS.values() for column in columns)})
AUDIO = (
    "audio",
    "target_audio",
    "audio_filepath",
    "audio_path",
    "audio_file",
    "speech",
    "wav",
    "wav_path",
    "wav_filepath",
    "path",
    "file",
    "file_name",
    "filename",
    "file_path",
    "filepath",
)
CONTEXT = "context_audio"
# Columns, and keys of manifests and cuts, that hold another codec's tokens; beside ours they would be taken for ours.
OTHER_TOKENS = frozenset(
    {
        "target_audio_codes_path",
        "context_audio_codes_path",
        "target_codes",
        "context_codes",
        "target_audio_codes",
        "context_audio_codes",
        "tokens_filepath",
    }
)
# Fields and columns that hold the rate of samples.
RATES = ("sampling_rate", "sample_rate")


@dataclass(frozen=True)
class Samples:
    """Decoded audio of a cell: an array of any shape and type, and its rate in Hz."""

    array: np.ndarray
    rate: Any


def standard_labels(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Add the labels "text", "speaker" and "lang" from the columns of `LABELS`, and drop None and NaN.

    Columns that hold another codec's tokens are dropped too.

    A number is a speaker's name, but no language: it is an index into names that are not there.
    """
    kept = {key: value for key, value in labels.items() if not is_missing(value) and key not in OTHER_TOKENS}
    for label, columns in LABELS.items():
        for column in columns:
            value = kept.get(column)
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # pandas makes numbers with gaps into floats
            if isinstance(value, str) or (label != "lang" and isinstance(value, int) and column != label):
                kept[label] = str(value)
                break
            if value is not None and column == label:  # as it is
                break
    return kept


def chosen_columns(columns: Iterable[str]) -> dict[str, str]:
    """Return the labels that are taken from a column of another name, for a note: label -> column."""
    names = set(columns)
    found = {label: next((name for name in names_ if name in names), None) for label, names_ in LABELS.items()}
    return {label: name for label, name in found.items() if name is not None and name != label}


def audio_column(names: Sequence[str], types: Mapping[str, Any]) -> str | None:
    """Choose the column that holds audio: by its name, else the first that holds bytes or decoded samples.

    Args:
        names: of all columns.
        types: their Arrow types.
    """
    by_name = next((name for name in AUDIO if name in names), None)
    return by_name or next((name for name in names if _holds_audio(types.get(name))), None)


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names that numbers of a column stand for, of the features that `datasets` writes as JSON."""
    found = {}
    for column, feature in features.items():
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            if isinstance(names, list):
                found[column] = [str(name) for name in names]
    return found


def parquet_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return the features in the metadata of a Parquet file, if `datasets` wrote it."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def label_value(cell: Any, names: Sequence[str] | None, column: str) -> Any:
    """Return the value of a label's Arrow cell, or None if it is no text or number.

    Text may be stored as bytes, as TensorFlow and some databases export it; in other columns bytes are data.

    Raises:
        AudioError: if its text is not UTF-8.
    """
    import pyarrow.types as is_

    if is_.is_nested(cell.type):
        return None
    try:
        value = cell.as_py()
        if isinstance(value, bytes) and column in TEXT_COLUMNS:
            value = value.decode()
    except UnicodeDecodeError as error:
        raise AudioError(f"a label of it is not UTF-8 text ({error.reason})") from error
    except (ValueError, OverflowError, ArithmeticError):  # a date that Python does not have
        return None
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value if isinstance(value, str | int | float | bool) else None


def audio_cell(cell: Any, rate: Any = None) -> bytes | str | Samples:
    """Return what an Arrow cell of audio holds: a file's bytes, its path, or decoded samples.

    Args:
        cell: bytes, text, a list of samples [T] or [C, T], or a struct of `bytes`, `path`, or `array` and
            `sampling_rate`, as `datasets` writes it.
        rate: Hz of samples that are not in a struct.

    Raises:
        AudioError: if it holds none of these.
    """
    import pyarrow.types as is_

    if cell is None or not cell.is_valid:
        raise AudioError("it holds no audio: the cell is null")
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
        raise AudioError(f"it holds no audio: of the fields {sorted(fields)}, none has bytes, samples or a path")
    if _is_list(cell.type):
        return Samples(_array(cell), rate)
    value = cell.as_py()
    if isinstance(value, bytes | str) and value:
        return value
    raise AudioError(f"it holds neither bytes nor samples nor a path, but {shorten(repr(value))}")


def _array(cell: Any) -> np.ndarray:
    """Samples of an Arrow list, or of a list of lists of equal lengths."""
    if not _is_list(cell.type):
        raise AudioError(f"its samples are of type {cell.type}, expected a list of numbers")
    values = cell.values
    if not _is_list(values.type):
        return _numbers(values)
    rows = [_numbers(row.values) for row in values if row.is_valid]
    if len({len(row) for row in rows}) > 1 or len(rows) < len(values):
        raise AudioError("its channels have different lengths")
    return np.stack(rows) if rows else np.zeros(0, np.float32)


def _numbers(values: Any) -> np.ndarray:
    array = values.to_numpy(zero_copy_only=False)  # null becomes NaN
    if array.dtype == object:
        raise AudioError(f"its samples are of type {values.type}, expected numbers")
    return np.asarray(array)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as is_

    return is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind)


def _holds_audio(kind: Any) -> bool:
    import pyarrow.types as is_

    if kind is None:
        return False
    if is_.is_struct(kind):
        names = {kind.field(number).name for number in range(kind.num_fields)}
        return bool(names & {"bytes", "array"})
    return is_.is_binary(kind) or is_.is_large_binary(kind)
