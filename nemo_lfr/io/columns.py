"""Usual names of the table columns that contain audio, text, speakers and languages."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_lfr.errors import AudioError, ConfigError, shorten
from nemo_lfr.io.text import is_missing

# For each label, the columns that may contain it. The first column with a value is used. Empty text is used only if no
# other column has a value.
LABELS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_transcription"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "lang": ("lang", "language", "locale"),
}
LABEL_COLUMNS = frozenset(column for columns in LABELS.values() for column in columns)
# Columns whose values are decoded as text if they are bytes.
TEXT_COLUMNS = LABEL_COLUMNS | {"id"}
# Columns that may contain audio or the path of an audio file. The first of them that exists in a table is used.
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
CONTEXT = "context_audio"  # column with the audio on which a TTS model is conditioned
# Columns of tables, and keys of manifests and cuts, that contain tokens of another codec. They are dropped, since
# readers would mistake them for tokens of this codec.
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
# All column names that have a meaning. They are recognized in any combination of upper and lower case.
KNOWN = (
    LABEL_COLUMNS
    | OTHER_TOKENS
    | {*AUDIO, CONTEXT, "context_audio_filepath", "context_audio_duration"}
    | {"id", "offset", "duration", "split", "sampling_rate", "sample_rate"}
)


def known_names(columns: Iterable[str]) -> dict[str, str]:
    """Return the known name of each column that is spelled in another case, such as {"Path": "path"}.

    If a column has exactly the known name, columns with other spellings of this name are left out.

    Raises:
        ConfigError: if two columns are spellings of the same known name, and no column has exactly this name.
    """
    columns = list(columns)
    found: dict[str, str] = {}
    for column in columns:
        name = column.lower()
        if name == column or name not in KNOWN or name in columns or column in found:
            continue
        if other := next((key for key, value in found.items() if value == name), None):
            raise ConfigError(
                f"the columns {other!r} and {column!r} differ only in case; rename or remove one of them"
            )
        found[column] = name
    return found


def standard_labels(labels: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
    """Add the standard labels "text", "speaker" and "lang" to the labels of a row.

    `LABELS` lists the columns for each standard label, in order of preference. Empty text is used only if no other
    column has a value. See `label_text` for the accepted values.

    Missing values (None, NaN and infinity) are dropped, and so are columns with tokens of another codec.

    Args:
        labels: values of the row by column.
        strict: whether to raise an error for a value that is not accepted; otherwise, the next column is used.

    Returns:
        The remaining labels and the standard labels.

    Raises:
        AudioError: if `strict` is set, and the value of a label is not accepted.
    """
    kept = {key: value for key, value in labels.items() if not is_missing(value) and key not in OTHER_TOKENS}
    for label, columns in LABELS.items():
        present = [column for column in columns if column in kept]
        for column in sorted(present, key=lambda name: _is_blank(kept[name])):  # a stable sort
            try:
                kept[label] = label_text(kept[column], column, label)
                break
            except AudioError:
                if strict and column == present[0]:  # otherwise, the empty text before this column is valid
                    raise
    return kept


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def label_text(value: Any, column: str, label: str) -> str:
    """Return the value of a label as text.

    A number is not accepted as the language, since it is most likely an index into an unknown list of names.

    Args:
        value: the value.
        column: column that contains the value, for messages.
        label: which label it is: "text", "speaker" or "lang".

    Raises:
        AudioError: if the value is neither text nor a number, or if it is a number and the label is "lang".
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas converts integer columns with missing values to float
    if isinstance(value, str) or (label != "lang" and isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    expected = "the name of a language, such as 'en'" if label == "lang" else "text or a number"
    raise AudioError(
        f"the label {column!r} is {shorten(repr(value))}, of the type {type(value).__name__}; expected {expected}. "
        "Convert the values, or rename this column or key"
    )


def repeated_column(columns: Iterable[str]) -> str | None:
    """Return the first name that several columns have; None if all names differ. Empty names are ignored."""
    counts = Counter(columns)
    return next((name for name, count in counts.items() if name and count > 1), None)


def chosen_columns(columns: Iterable[str]) -> dict[str, str]:
    """Return the column that supplies each label, for example {"text": "sentence"}.

    A label is omitted if its column has the same name as the label, or if no column supplies it.
    """
    names = set(columns)
    found = {label: next((name for name in names_ if name in names), None) for label, names_ in LABELS.items()}
    return {label: name for label, name in found.items() if name is not None and name != label}
