"""Read tables that list audio files: CSV, TSV, and the `metadata.jsonl` of Hugging Face's AudioFolder.

Each row is converted to the form of an entry in a NeMo manifest: `audio_filepath`, the standard labels (see
`nemo_lfr.io.columns`), and the other columns. A malformed row does not affect other rows.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lfr.errors import ConfigError, NemoLfrError, counted, quoted, shorten
from nemo_lfr.io.columns import AUDIO, known_names, repeated_column, standard_labels
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.segment_columns import SegmentCheck
from nemo_lfr.io.text import GZIP, decode, is_missing, read_lines

TABLE_SUFFIXES = frozenset((".csv", ".tsv"))
# Columns with paths in the rows of `read_table`
PATHS = frozenset(("audio_filepath", "context_audio_filepath"))
# Characters that may separate the columns of a CSV file. The first one that gives an audio column is used.
DELIMITERS = ",;\t|"
# A first line like this declares the delimiter of a CSV file for Excel.
DECLARATION = re.compile(r'"?sep=(?P<delimiter>\\t|.*?)"?', re.IGNORECASE)
SPREADSHEETS = frozenset((".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers"))
SAVE_AS_CSV = "save it as CSV (UTF-8), and pass the CSV file"
# Columns with a time in seconds. In a table whose delimiter is not a comma, a comma in a time is a decimal comma.
TIMES = ("offset", "duration", "context_audio_duration")
DECIMAL_COMMA = re.compile(r"\d+,\d+", re.ASCII)
# Names of AudioFolder's tables, which are in the same folder as the audio.
METADATA_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
# Maximum number of lines that a row with quoted fields may span.
MAX_LINES = 64


class UnreadableTableError(ConfigError):
    """Error for a table that cannot be read, for instance because its file is damaged."""


class RepeatedColumnError(ConfigError):
    """Error for a table with two columns of the same name, one of which would be lost."""


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        line: number of the row's first line in the file, counted from 1.
        values: values by column; empty if there is a problem. In the rows of `read_table`, the audio column is named
            `audio_filepath`, the standard labels are added, and empty cells are left out.
        problem: reason why the row cannot be used; None if it can be used.
    """

    line: int
    values: dict[str, Any]
    problem: str | None = None


def table_suffix(path: Path) -> str | None:
    """Return ".csv" or ".tsv" if a file has this suffix, possibly followed by ".gz"; None for other files."""
    suffix = Path(path.name.lower().removesuffix(GZIP)).suffix
    return suffix if suffix in TABLE_SUFFIXES else None


def refuse_spreadsheet(path: Path) -> None:
    """Raise ConfigError if a file is a spreadsheet, according to its suffix."""
    if path.suffix.lower() in SPREADSHEETS and path.is_file():
        raise ConfigError(f"{path}: spreadsheets are not read; {SAVE_AS_CSV}.")


def is_table(path: Path) -> bool:
    """Return whether a path is a table of recordings.

    A table is a CSV or TSV file (by its suffix), or a JSON lines file whose first entry has the key `file_name` but
    not `audio_filepath`. NeMo manifests, folders and missing files are not tables.
    """
    suffix = path.suffix.lower()
    if table_suffix(path) is not None:
        return path.is_file()
    if suffix not in (".jsonl", ".json") or not path.is_file():
        return False
    try:
        return lists_file_names(path)
    except (ConfigError, OSError):
        return False


def lists_file_names(path: Path) -> bool:
    """Return whether the first entry of a JSON lines file has the key `file_name` but not `audio_filepath`.

    Raises:
        UnreadableTableError: if the first line is not JSON, or the path is not a regular file.
        OSError: if the file cannot be read.
    """
    keys = _first_keys(path)
    return "audio_filepath" not in keys and "file_name" in keys


def check_audio_key(path: Path) -> None:
    """Check that the first entry of a JSON lines file has a key for audio.

    Raises:
        ConfigError: if none of the keys is a known name for audio.
        UnreadableTableError: if the first line is not JSON, or the path is not a regular file.
        OSError: if the file cannot be read.
    """
    if not _has_audio(sorted(_first_keys(path))):
        raise ConfigError(f"{path}: no key contains the audio; expected one of {', '.join(AUDIO)} in the first line.")


def _first_keys(path: Path) -> set[str]:
    """Return the keys of the first entry of a JSON lines file in lower case."""
    with open_regular(path, UnreadableTableError) as file:
        line = file.readline(1 << 20)
    try:
        first = json.loads(decode(line)) if line else None
    except (ValueError, RecursionError) as error:
        raise UnreadableTableError(f"{path}: the first line is not JSON ({shorten(error)}).") from error
    return {str(key).lower() for key in first} if isinstance(first, dict) else set()


def read_table(path: Path, audio_dir: Path | None = None) -> Iterator[TableRow]:
    """Yield the rows of a table.

    Args:
        path: CSV, TSV or JSON lines in UTF-8, with or without a byte order mark. CSV and TSV may be compressed (.gz).
            The delimiter of CSV is a comma, semicolon, tab or vertical bar, whichever gives the header an audio
            column. A first line such as `sep=;` declares another delimiter. In TSV, quotes have no special meaning, as
            in Common Voice. Times may have a decimal comma if the delimiter is not a comma. Known names of columns are
            recognized in upper and lower case.
        audio_dir: folder that relative paths of audio files start from; default: the folder of the table. If there is
            no file with the path in a CSV or TSV cell, spaces around this path are removed.

    Raises:
        UnreadableTableError: if the file or the header cannot be read.
        SegmentsNotReadError: if several rows with a column such as `start` list the same file.
        ConfigError: if a CSV or TSV file has no audio column, or if two columns have the same name; see also
            `known_names`.
    """
    try:
        lines = read_lines(path, UnreadableTableError)
    except NemoLfrError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnreadableTableError(f"{path}: the table cannot be read: {reason}.") from error
    is_delimited = table_suffix(path) is not None
    rows = _delimited(path, lines) if is_delimited else _json_lines(lines)
    check = SegmentCheck()
    for row in rows:
        entry = row if row.problem else _entry(row)
        for key in entry.values.keys() & PATHS if is_delimited else ():
            entry.values[key] = _existing(entry.values[key], path.parent if audio_dir is None else audio_dir)
        if entry.problem is None and "offset" not in entry.values:
            check.add(f"{path}, line {row.line}", entry.values["audio_filepath"], row.values)
        yield entry
    check.finish()


def _existing(name: str, folder: Path) -> str:
    """Return the path in a cell, stripped of spaces if only the stripped path exists."""
    stripped = name.strip()
    if name == stripped:
        return name
    paths = (os.path.join(os.path.expanduser(folder), os.path.expanduser(path)) for path in (name, stripped))
    has_file = [os.path.lexists(path) for path in paths]
    return stripped if stripped and has_file == [False, True] else name


def _entry(row: TableRow) -> TableRow:
    """Rename the audio column to `audio_filepath`, add the standard labels, and remove empty cells.

    Columns without a name are removed, too, such as the index that pandas writes.

    If the audio column is not already named `audio_filepath`, the table is not a NeMo manifest, so its `offset` and
    `duration` may have another meaning and are removed. A row without the path of an audio file gets a `problem`.
    """
    values = {key: value for key, value in row.values.items() if key and not is_missing(value) and value != ""}
    column = next((name for name in AUDIO if name in row.values), None)
    if column is None:
        return TableRow(row.line, {}, f"the entry has no key {'file_name'!r}")
    name = values.pop(column, None)
    if not isinstance(name, str):
        value = "empty" if name is None else shorten(name)
        return TableRow(row.line, {}, f"the column {column!r} is {value}; expected the path of an audio file")
    if column != "audio_filepath":
        values = {key: value for key, value in values.items() if key not in ("offset", "duration")}
    return TableRow(row.line, {"audio_filepath": name, **standard_labels(values, strict=False)})


def _json_lines(lines: Sequence[bytes]) -> Iterator[TableRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(decode(line))
        except (ValueError, RecursionError) as error:
            yield TableRow(number, {}, f"not JSON ({shorten(error)})")
            continue
        if not isinstance(values, dict):
            yield TableRow(number, {}, f"{quoted(values)} is not a JSON object")
            continue
        try:
            names = known_names(values)
        except ConfigError as error:
            yield TableRow(number, {}, str(error))
            continue
        yield TableRow(number, {names.get(key) or key: value for key, value in values.items()})


def _delimited(path: Path, lines: Sequence[bytes]) -> Iterator[TableRow]:
    """Yield the rows of a CSV or TSV file."""
    if len(lines) == 1:
        lines = lines[0].splitlines()  # a file with the line ends of old Macs
    filled = [index for index, line in enumerate(lines) if line.strip()]
    declared = _declared_delimiter(path, lines[filled[0]]) if filled else None
    if declared:
        filled = filled[1:]
    if not filled:
        raise ConfigError(f"{path}: the table is empty; its first line must name the columns.")
    delimiter, columns = _header(path, lines[filled[0]], declared)
    index = filled[0] + 1
    while index < len(lines):
        number = index + 1
        if not lines[index].strip():
            index += 1
            continue
        try:
            fields, count = _fields(lines[index : index + MAX_LINES], delimiter, len(columns))
        except (ValueError, csv.Error) as error:
            yield TableRow(number, {}, shorten(error, 200))
            index += 1
            continue
        index += count
        if any(fields):
            values = dict(zip(columns, fields, strict=True))
            if delimiter != ",":
                values |= {key: values[key].replace(",", ".") for key in TIMES if _has_decimal_comma(values.get(key))}
            yield TableRow(number, values)


def _has_decimal_comma(cell: str | None) -> bool:
    return cell is not None and DECIMAL_COMMA.fullmatch(cell.strip()) is not None


def _declared_delimiter(path: Path, line: bytes) -> str | None:
    """Return the delimiter that the first line of a table declares, as in `sep=;`; None if it declares none.

    Raises:
        ConfigError: if the declared delimiter is invalid.
    """
    match = DECLARATION.fullmatch(line.decode(errors="replace").strip(" "))
    if match is None:
        return None
    delimiter = "\t" if match["delimiter"] == "\\t" else match["delimiter"]
    if len(delimiter) != 1 or delimiter.isalnum() or delimiter in "\"' \ufffd":
        raise ConfigError(
            f"{path}: the first line declares the delimiter {shorten(repr(delimiter))}; expected one character, as "
            "in sep=;"
        )
    return delimiter


def _header(path: Path, line: bytes, declared: str | None) -> tuple[str, list[str]]:
    """Return the delimiter of a table and the names of its columns.

    Known names are returned in lower case, such as "path" for a column "Path"; see `known_names`.

    Args:
        path: path of the table.
        line: the header.
        declared: delimiter that the table declares; None if it declares none.

    Raises:
        ConfigError: if the header cannot be read, has no column for the audio, or has a column twice.
    """
    delimiters = declared or (DELIMITERS if table_suffix(path) == ".csv" else "\t")
    try:
        text = decode(line)
        splits = {mark: [name.strip() for name in _split([text], mark)] for mark in delimiters}
    except (ValueError, csv.Error) as error:
        raise UnreadableTableError(f"{path}: the header cannot be read: {shorten(error, 200)}.") from error
    # If no delimiter gives an audio column, the first one that gives several columns is used for the message.
    delimiter = max(splits, key=lambda mark: (_has_audio(splits[mark]), len(splits[mark]) > 1))
    columns = splits[delimiter]
    if not _has_audio(columns):
        raise ConfigError(
            f"{path}: no column contains the audio; expected one of {', '.join(AUDIO)} in the first line, found "
            f"{shorten(columns, 300)}."
        )
    if name := repeated_column(columns):
        raise RepeatedColumnError(
            f"{path}: two columns are named {shorten(repr(name))}; rename or remove one of them."
        )
    try:
        names = known_names(columns)
    except ConfigError as error:
        raise RepeatedColumnError(f"{path}: {error}.") from error
    return delimiter, [names.get(name, name) for name in columns]


def _has_audio(columns: Sequence[str]) -> bool:
    return any(name.lower() in AUDIO for name in columns)


def _fields(lines: Sequence[bytes], delimiter: str, expected: int) -> tuple[list[str], int]:
    """Return the fields of the row that begins in `lines[0]`, and the number of lines that the row spans.

    Raises:
        ValueError: if the row is not UTF-8, or its number of fields is not `expected`.
        csv.Error: if a quote is not closed, or a field is too long.
    """
    texts: list[str] = []
    for line in lines:
        texts.append(decode(line) + "\n")
        try:
            fields = _split(texts, delimiter)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                continue
            raise
        if len(fields) != expected:
            raise ValueError(
                f"the row has {counted(len(fields), 'field')} ({shorten(fields)}), but the header has {expected}"
            )
        return fields, len(texts)
    raise csv.Error("a quote is not closed")


def _split(texts: list[str], delimiter: str) -> list[str]:
    """Split one row, which may span several lines, into fields. A field that is not quoted may contain quotes."""
    if delimiter == "\t":
        return texts[0].rstrip("\r\n").split("\t")
    try:
        return next(csv.reader(texts, delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "new-line character" in str(error):
            reason = "it contains a carriage return without quotes; save the table with line feeds as line ends"
            raise csv.Error(reason) from error
        if "expected after" not in str(error):  # text after a closing quote
            raise
        return next(csv.reader(texts, delimiter=delimiter))
