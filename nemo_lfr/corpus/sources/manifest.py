"""Reader for NeMo manifests, which list audio files as JSON lines."""

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_lfr.corpus.ids import UniqueIds, clean_id, numbered_id
from nemo_lfr.corpus.inventory import digest
from nemo_lfr.corpus.sources.base import Clip, CorpusReader, OpenOptions, ShardSpec, repeat_number, unreadable
from nemo_lfr.errors import ConfigError, counted, shorten
from nemo_lfr.io import bounded
from nemo_lfr.io.columns import AUDIO, standard_labels
from nemo_lfr.io.manifests import (
    NOT_A_LINE,
    UNUSABLE,
    audio_name,
    describe,
    line_id,
    parse_entry,
    resolve_audio_path,
    seconds,
)
from nemo_lfr.io.reading import read_file
from nemo_lfr.io.segment_columns import SegmentCheck
from nemo_lfr.io.tables import refuse_spreadsheet
from nemo_lfr.io.text import UTF16_MARKS

logger = logging.getLogger(__name__)

# At least one of the first FIRST_LINES lines of a manifest must be a valid entry.
FIRST_LINES = 100
# Matches lines that may have a key that `start_column` returns. Parsing all lines again would take long.
_MAY_HAVE_START = re.compile(rb'"[^"]{0,11}(start|begin|onset|offset_)[^"]{0,24}"\s*:', re.IGNORECASE)
ARROW_MAGIC = b"ARROW1"  # first bytes of a file that pyarrow or polars writes as Arrow IPC or Feather


class Manifest(CorpusReader):
    """Reader for a NeMo manifest: JSON lines with `audio_filepath` and, optionally, `offset` and `duration`.

    As in NeMo, entries whose `_skipme` is true are skipped.

    Args:
        path: the file.
        audio_dir: folder that relative paths are resolved against; None for the manifest's folder. See
            `resolve_audio_path`.

    Raises:
        ConfigError: if the file cannot be read, has no manifest entry in its first 100 lines, or describes audio in
            tar files.
    """

    def __init__(self, path: Path, audio_dir: Path | None = None) -> None:
        self.path = path
        self.audio_dir = audio_dir or path.parent
        if path.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".zip")):
            raise ConfigError(
                f"{path}: archives, such as WebDataset shards, cannot be read; unpack this one, and pass the folder."
            )
        refuse_spreadsheet(path)
        try:
            with open(path, "rb") as file:
                lines = list(islice((line for line in bounded.lines(file) if line.strip()), FIRST_LINES))
        except OSError as error:
            raise ConfigError(f"{path}: the manifest cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(f"{path}: not a NeMo manifest: {error}.") from error
        is_utf16 = bool(lines) and lines[0].startswith(UTF16_MARKS)  # json.loads accepts UTF-16
        if is_utf16 or not any(_is_entry(line) for line in lines):
            raise ConfigError(f"{path}: not a NeMo manifest: {_describe_content(lines)}.")
        if all(map(_is_in_tar, lines)) and not any(map(self._exists, lines)):
            raise ConfigError(
                f"{path}: none of the first {counted(len(lines), 'audio file')} exists. The entries have the key "
                "shard_id, so the audio is probably in .tar files, which cannot be read; unpack them, and pass their "
                "folder as --audio-dir (audio_dir)."
            )

    def _exists(self, line: bytes) -> bool:
        """Return whether the audio file of a manifest line exists."""
        try:
            return os.path.lexists(resolve_audio_path(self.audio_dir, parse_entry(line)["audio_filepath"]))
        except NOT_A_LINE:
            return False

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path is a file."""
        return path.is_file()

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "Manifest":
        """Open the manifest."""
        return cls(path, options.audio_dir)

    @property
    def identity(self) -> str:
        """Return a hash of the manifest."""
        return digest(self.path)[:16]

    @property
    def base(self) -> Path | None:
        """The folder that relative paths are resolved against; None if no line depends on it."""
        may_depend = _dependence_pattern(self.audio_dir).search
        with open(self.path, "rb") as file:
            lines = filter(may_depend, bounded.lines(file))
            return self.audio_dir if any(_depends_on(self.audio_dir, line) for line in lines) else None

    @property
    def files(self) -> list[Path]:
        """Return a list with the path of the manifest."""
        return [self.path]

    def shards(self, size: int) -> list[ShardSpec]:
        """Split the manifest into shards of `size` lines.

        Returns:
            For each shard, a dictionary with the byte offset of its first line ("start"), the number of its lines
            ("count"), and numbers for the clips whose name has occurred before ("repeats", see `repeat_number`).
        """
        shards: list[ShardSpec] = []
        ids = UniqueIds()
        count = size
        check = SegmentCheck()
        repeats: dict[str, int] = {}
        num_skipped = 0
        with open(self.path, "rb") as file:
            while line := file.readline():
                if not line.strip():
                    continue
                if count == size:
                    repeats, count = {}, 0
                    shards.append({"start": file.tell() - len(line), "count": 0, "repeats": repeats})
                if is_skipped := _is_skipped(line):
                    num_skipped += 1
                if not is_skipped and (number := ids.number(_name(line, self.audio_dir))) > 1:
                    repeats[str(count)] = number
                if not is_skipped and _MAY_HAVE_START.search(line):
                    self._check_segment(line, check)
                count += 1
                shards[-1]["count"] = count
        check.finish()
        if num_skipped:
            entries = counted(num_skipped, "entry is", "entries are")
            logger.warning("%s: %s skipped, because _skipme is true.", self.path, entries)
        return shards

    def _check_segment(self, line: bytes, check: SegmentCheck) -> None:
        """Pass an entry without `offset` to `check`, which detects segments that are described by other keys."""
        try:
            entry = parse_entry(line)
            file = entry["audio_filepath"]
        except NOT_A_LINE:
            return
        if isinstance(file, str) and entry.get("offset") is None:
            check.add(str(self.path), file, entry)

    def read(self, shard: ShardSpec) -> Iterator[Clip]:
        """Yield the clips of a shard in order."""
        with open(self.path, "rb") as file:
            file.seek(shard["start"])
            lines = islice((line for line in file if line.strip()), shard["count"])
            for number, line in enumerate(lines):
                if _is_skipped(line):
                    continue
                name = numbered_id(_name(line, self.audio_dir), repeat_number(shard, number))
                try:
                    yield self._clip(name, parse_entry(line))
                except NOT_A_LINE as error:
                    origin = f"{self.path}: {shorten(line.decode(errors='replace').strip())}"
                    reason = f"{origin}: {UNUSABLE}: {describe(error)}."
                    yield Clip(name, origin, unreadable(reason))

    def _clip(self, name: str, labels: dict[str, Any]) -> Clip:
        return entry_clip(name, labels, self.audio_dir)


def entry_clip(name: str, labels: dict[str, Any], audio_dir: Path) -> Clip:
    """Return the clip that an entry of a manifest describes. No audio is read.

    Args:
        name: id of the clip.
        labels: the entry, as a dict.
        audio_dir: folder that relative paths are resolved against.

    Raises:
        Exception: one of the exceptions in `NOT_A_LINE`, if a value is missing or invalid. `describe` returns the text
            for an error message.
    """
    path = resolve_audio_path(audio_dir, labels["audio_filepath"])
    context = None
    if labels.get("context_audio_filepath"):
        context_duration = seconds(labels, "context_audio_duration")
        context_path = resolve_audio_path(audio_dir, labels["context_audio_filepath"])
        context = partial(read_file, context_path, None, context_duration or None)
    times = {key: seconds(labels, key) for key in ("offset", "duration")}
    audio = partial(read_file, path, times["offset"], times["duration"])
    # Trainers expect numbers, but all cells of a text table are text.
    numbers = {key: value for key, value in times.items() if isinstance(labels.get(key), str)}
    return Clip(name, str(path), audio, context, standard_labels(labels | numbers), path=path)


def _is_entry(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict) and "audio_filepath" in json.loads(line)
    except NOT_A_LINE:
        return False


def _dependence_pattern(folder: Path) -> re.Pattern[bytes]:
    """Return a pattern that matches manifest lines for which `_depends_on` may be true.

    Only these lines are parsed, to save time.
    """
    prefix = re.escape(os.fsencode(os.path.join(os.path.abspath(os.path.expanduser(folder)), "")))
    part = rb'/(?!/|\.\.?[/"])[^"\\/]*'  # one component of a path that `os.path.normpath` would not change
    outside = rb'\s*:\s*"(?!' + prefix + rb")(?:" + part + rb')+"'
    escaped_letter = rb"\\u00[5-7]"  # JSON may escape the letters of a key
    return re.compile(rb'audio_filepath"(?!' + outside + rb")|" + escaped_letter)


def _depends_on(folder: Path, line: bytes) -> bool:
    """Return whether the audio or the id of a manifest line depends on `folder`.

    This is the case for a relative path. It is also the case for an absolute path inside `folder`, because the id is
    then relative to `folder`.
    """
    try:
        entry = parse_entry(line)
    except NOT_A_LINE:
        return False
    paths = [entry.get(key) for key in ("audio_filepath", "context_audio_filepath")]
    names = [audio_name(folder, os.path.expanduser(path)) for path in paths if isinstance(path, str)]
    return not all(map(os.path.isabs, names))


def _is_in_tar(line: bytes) -> bool:
    """Return whether a line has an integer `shard_id`: the number of a tar file, in NeMo's tarred datasets."""
    try:
        return type(parse_entry(line).get("shard_id")) is int
    except NOT_A_LINE:
        return False


def _is_skipped(line: bytes) -> bool:
    """Return whether `_skipme` is true in a line, which NeMo's readers then skip."""
    if b"_skipme" not in line:
        return False
    try:
        return bool(parse_entry(line).get("_skipme"))
    except NOT_A_LINE:
        return False


def _describe_content(lines: Sequence[bytes]) -> str:
    """Return the part of an error message that says what a file contains instead of manifest lines."""
    if not lines:
        return 'it has no lines; expected {"audio_filepath": ...}'
    first = lines[0]
    if first.startswith(UTF16_MARKS):
        return "it is UTF-16 text; save it as UTF-8"
    if first.startswith(ARROW_MAGIC):
        return "it is an Arrow (Feather) file; save the table as Parquet, and pass the .parquet file"
    if b"\0" in b"".join(lines):
        return "it is not text; if it is an archive, unpack it, and pass a manifest, a folder, cuts or a Parquet table"
    expected = 'expected {"audio_filepath": ...}'
    if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        return f"it is a JSON list; {expected}, with one object per line. Save Lhotse cuts as .jsonl or .jsonl.gz"
    if first.startswith((b"- ", b"---")):
        return f"it is YAML; {expected}. Save Lhotse cuts as .jsonl or .jsonl.gz"
    if (key := _audio_key(first)) is not None:
        return f"its first entry has the key {key!r}; {expected}. Rename the key"
    return f"its first line is {shorten(first.decode(errors='replace').strip())!r}; {expected}"


def _audio_key(line: bytes) -> str | None:
    """Return the key under which a JSON object probably stores the path of the audio; None if there is none."""
    try:
        entry = parse_entry(line)
    except NOT_A_LINE:
        return None
    return next((key for key in entry if key.lower() in AUDIO and isinstance(entry[key], str)), None)


def _name(line: bytes, audio_dir: Path) -> str:
    """Return the name of a clip: the path without suffix, followed by the offset in milliseconds if it is not 0.

    An absolute path inside `audio_dir` is made relative to it, so that ids do not depend on where a corpus is stored.
    """
    try:
        labels = json.loads(line)
        name = _without_suffix(audio_name(audio_dir, str(labels["audio_filepath"])))
        offset = float(labels.get("offset") or 0)
        return clean_id(f"{name}-{round(offset * 1000):08d}" if offset else name)
    except NOT_A_LINE:
        return line_id(line)


def _without_suffix(path: str) -> str:
    """Return `str(PurePosixPath(path).with_suffix(""))`, but in less time for most paths."""
    if "//" in path or "/." in path or path.startswith(".") or path.endswith(("/", ".")) or not path:
        return str(PurePosixPath(path).with_suffix(""))
    stem, dot, suffix = path.rpartition(".")
    return stem if dot and "/" not in suffix else path
