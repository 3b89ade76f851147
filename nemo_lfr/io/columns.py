"""Names of columns in third-party tables that contain audio, text, speaker and language."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_lfr.io.text import is_missing

# Label -> columns that may contain it; the first column with a value is used.
LABELS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_transcription"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "lang": ("lang", "language", "locale"),
}
# Columns whose bytes are decoded as text.
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
# Columns, and keys of manifests and cuts, with another codec's tokens; readers would mistake them for ours.
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


def standard_labels(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Add the standard labels "text", "speaker" and "lang" to a row's labels.

    The values come from the columns listed in `LABELS`. None, NaN, infinity and columns that contain the tokens of
    another codec are dropped. A number is accepted as text or speaker, and becomes text. It is not accepted as a
    language: it would be an index into names that are unavailable.

    Args:
        labels: the values of a row by column.

    Returns:
        The remaining labels and the standard labels.
    """
    kept = {key: value for key, value in labels.items() if not is_missing(value) and key not in OTHER_TOKENS}
    for label, columns in LABELS.items():
        for column in columns:
            value = kept.get(column)
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # pandas converts integer columns with missing values to float
            if isinstance(value, str) or (label != "lang" and isinstance(value, int | float)):
                kept[label] = str(value)
                break
            if value is not None and column == label:  # the label keeps its name
                break
    return kept


def repeated_column(columns: Iterable[str]) -> str | None:
    """Return the first name that two columns have; None if there is none. Empty names do not count."""
    counts = Counter(columns)
    return next((name for name, count in counts.items() if name and count > 1), None)


def chosen_columns(columns: Iterable[str]) -> dict[str, str]:
    """Return the labels that come from a column of another name: label -> column."""
    names = set(columns)
    found = {label: next((name for name in names_ if name in names), None) for label, names_ in LABELS.items()}
    return {label: name for label, name in found.items() if name is not None and name != label}
