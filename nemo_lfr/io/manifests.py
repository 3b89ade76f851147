"""Read NeMo manifests, which list one recording per line as a JSON object."""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_lfr.errors import ConfigError, counted, quoted, shorten
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.columns import LABELS, standard_labels
from nemo_lfr.io.folders import MAX_NAME
from nemo_lfr.io.locate import URL, expand_home
from nemo_lfr.io.segment_columns import SegmentCheck, SegmentsNotReadError
from nemo_lfr.io.tables import is_table, read_table, refuse_spreadsheet
from nemo_lfr.io.text import decode, is_missing, read_lines

logger = logging.getLogger(__name__)

MAX_SECONDS = 1e7  # maximum offset and duration; a larger value in a manifest is an error
ID_DIGITS = 12  # number of hex digits in the hash that identifies a line
UNUSABLE = "this line cannot be used"  # beginning of the message about a malformed manifest line
# Exceptions that reading a malformed manifest line may raise.
NOT_A_LINE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def line_id(line: bytes) -> str:
    """Return an id for a malformed manifest line: "line-", followed by a hash of the line."""
    return "line-" + hashlib.sha256(line).hexdigest()[:ID_DIGITS]


@dataclass(frozen=True)
class Recording:
    """A recording that a manifest lists.

    Attributes:
        dataset: name of the dataset.
        path: path of the audio file.
        name: path in `audio_filepath`, made relative to the folder of audio files if possible; see `audio_name`.
        offset: start of the recording in the file, in seconds.
        duration: duration in seconds.
        labels: values of the manifest entry, and the standard labels; see `nemo_lfr.io.columns`.
    """

    dataset: str
    path: Path
    name: Path
    offset: float
    duration: float
    labels: dict[str, Any] = field(default_factory=dict, compare=False)


def read_manifest(
    path: str | os.PathLike[str],
    audio_dir: str | os.PathLike[str] | None = None,
    dataset: str = "",
    on_bad_line: Callable[[str], None] | None = None,
) -> list[Recording]:
    """Read a NeMo manifest (JSON lines), or a table that `nemo_lfr.io.tables` reads.

    Each entry has the key `audio_filepath`. The optional keys are `offset` (default 0) and `duration` (default: the
    duration of the whole audio file), both in seconds. An invalid entry, such as malformed JSON or an infinite
    duration, is skipped and reported.

    Args:
        path: path of the manifest or table; `~` is expanded.
        audio_dir: folder that relative paths of audio files start from (default: the folder of the manifest). See
            `resolve_audio_path`.
        dataset: name of the dataset, stored in each recording.
        on_bad_line: function that is called with a message for each skipped line (default: log a warning).

    Returns:
        The recordings, in the order of the manifest.

    Raises:
        ConfigError: if the manifest cannot be read, or if none of its entries is valid. An empty manifest is accepted.
            Also if several entries select segments of one file, but with another key than `offset`, such as `start`.
    """
    path = expand_home(path)
    folder = path.parent if audio_dir is None else expand_home(audio_dir)
    on_bad_line = on_bad_line or _warn
    recordings = []
    problems = []
    if is_table(path):
        for row in read_table(path, folder):
            try:
                if row.problem:
                    raise ValueError(row.problem)
                recordings.append(_recording(row.values, folder, dataset))
            except (OSError, *NOT_A_LINE) as error:
                problems.append(f"{path}, line {row.line}: skipped: {describe(error)}")
        return _usable(recordings, problems, "a table of recordings", on_bad_line)
    refuse_spreadsheet(path)
    try:
        lines = read_lines(path, ConfigError)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: the manifest cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not a NeMo manifest: {error}.") from error
    check = SegmentCheck()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_entry(line)
            recordings.append(_recording(entry, folder, dataset))
            if entry.get("offset") is None:
                check.add(f"{path}, line {number}", entry["audio_filepath"], entry)
        except SegmentsNotReadError:
            raise
        except (OSError, *NOT_A_LINE) as error:
            problems.append(f"{path}, line {number}: skipped: {describe(error)}")
    check.finish()
    return _usable(recordings, problems, "a NeMo manifest", on_bad_line)


def _usable(
    recordings: list[Recording], problems: list[str], kind: str, on_bad_line: Callable[[str], None]
) -> list[Recording]:
    """Call `on_bad_line` with each problem, and return the recordings.

    Raises:
        ConfigError: if there are problems but no recordings. `kind` says what was expected.
    """
    if problems and not recordings:
        first = problems[0].replace("skipped: ", f"{UNUSABLE}: ", 1)
        more = f" ({counted(len(problems) - 1, 'more line')} cannot be used)" if len(problems) > 1 else ""
        raise ConfigError(f"{first}{more}; expected {kind}.")
    for problem in problems:
        on_bad_line(problem)
    return recordings


def resolve_audio_path(folder: str | os.PathLike[str], name: object) -> Path:
    """Return the path of an audio file that a manifest or table names.

    A leading `~` or `~user` is expanded to the home folder, as in NeMo.

    Args:
        folder: folder that relative paths start from.
        name: path in the manifest or table.

    Raises:
        TypeError: if `name` is not text.
        ValueError: if `name` is a URL, or not a valid file name.
    """
    if not isinstance(name, str):
        raise TypeError(f"the path of the audio file is {shorten(name)}, not text")
    if not name or "\0" in name:
        raise ValueError(f"{shorten(name)!r} is not a valid file name")
    if URL.match(name):
        raise ValueError(f"{shorten(name)!r} is a URL, but only local files are read; download it, and pass its path")
    for part in Path(name).parts if len(os.fsencode(name)) > MAX_NAME else ():
        if (length := len(os.fsencode(part))) > MAX_NAME:
            raise ValueError(
                f"{shorten(part)!r} is not a valid file name: it has {length} bytes; the limit is {MAX_NAME}"
            )
    return Path(os.path.join(os.path.expanduser(folder), os.path.expanduser(name)))


def audio_name(folder: str | os.PathLike[str], name: str) -> str:
    """Return the name of a recording, from which its id and the names of its output files are made.

    As in NeMo, this is the path of the audio file. An absolute path inside `folder` is made relative to it.

    Args:
        folder: folder that relative paths start from.
        name: path in the manifest or table.
    """
    if not os.path.isabs(name):
        return name
    base, path = os.path.abspath(os.path.expanduser(folder)), os.path.normpath(name)
    return os.path.relpath(path, base) if path.startswith(os.path.join(base, "")) else name


def seconds(labels: dict[str, Any], key: str) -> float | None:
    """Return a time in seconds from an entry of a manifest; None if it has no value for the key.

    Args:
        labels: values of the entry.
        key: "offset" or "duration".

    Raises:
        ValueError: if the value is not a number from 0 to MAX_SECONDS.
    """
    if (written := labels.get(key)) is None:
        return None
    value, advice = math.nan, ""
    with suppress(OverflowError, TypeError):
        try:
            if not isinstance(written, bool) and "_" not in str(written):  # Python accepts 1_5 as 15, and True as 1
                value = float(written)
        except ValueError:
            advice = _advice(written)
    if not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"{key} is {quoted(written)}; expected a number of seconds from 0 to {MAX_SECONDS:g}{advice}")
    return value


def _advice(written: Any) -> str:
    """Return advice to append to the error message for an invalid time; it may be empty."""
    text = written.strip() if isinstance(written, str) else ""
    if re.fullmatch(r"[\d.,'\u2019\s]*\d[.,'\u2019\s][\d.,'\u2019\s]*", text):
        return ", with a decimal point and without thousands separators, such as 1234.5"
    if re.fullmatch(r"[\d:.,]*\d:\d[\d:.,]*", text):
        return "; convert hours and minutes to seconds, such as 61.5 for 1:01.5"
    if re.fullmatch(r"[\d.,]*\d\s*[^\W\d_]+", text):
        return "; convert the value to seconds if necessary, and leave out the unit"
    return ""


def describe(error: BaseException) -> str:
    """Return one line that explains why an entry of a manifest is invalid."""
    if isinstance(error, KeyError):
        return f"the entry has no key {error}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error})"
    if isinstance(error, RecursionError):
        return "not JSON (nested too deeply)"
    if isinstance(error, AttributeError):
        return "not a JSON object"
    return shorten(error, 300)


def parse_entry(line: bytes) -> dict[str, Any]:
    """Return the values of one line of a manifest.

    Raises:
        ValueError: if the line is not a JSON object in UTF-8.
        RecursionError: if the JSON is nested too deeply.
    """
    text = decode(line)
    entry = json.loads(text)
    if not isinstance(entry, dict):
        raise ValueError(f"{shorten(text.strip())} is not a JSON object")
    return entry


def _recording(entry: dict[str, Any], folder: Path, dataset: str) -> Recording:
    full = resolve_audio_path(folder, entry["audio_filepath"])
    duration = seconds(entry, "duration")
    if duration is None:
        with AudioReader(full, None) as reader:
            duration = reader.duration
    labels = {key: None if is_missing(value) else value for key, value in entry.items()}
    labels |= standard_labels(entry, strict=False)
    labels |= {key: None for key in LABELS if key in labels and not isinstance(labels[key], str)}
    name = Path(audio_name(folder, entry["audio_filepath"]))
    return Recording(dataset, full, name, seconds(entry, "offset") or 0.0, duration, labels)


def _warn(problem: str) -> None:
    logger.warning("%s", problem)
