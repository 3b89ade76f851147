"""What a corpus may come as, cut into parts that any worker can read by itself.

NeMo manifest, folder of audio, Lhotse cuts or Shar, Parquet or a saved Hugging Face dataset. Planning reads no audio;
a part is a few numbers, from which a worker finds its clips again. A clip's audio is opened only when it is asked for,
so that one that cannot be read is that clip's failure alone.
"""

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from nemo_lfr.corpus.columns import (
    AUDIO,
    CONTEXT,
    OTHER_TOKENS,
    RATES,
    audio_cell,
    audio_column,
    chosen_columns,
    class_names,
    label_value,
    parquet_features,
    standard_labels,
)
from nemo_lfr.corpus.ids import UniqueIds, clean_id, numbered_id, path_inside
from nemo_lfr.corpus.inventory import digest, list_digest, sampled_digest
from nemo_lfr.errors import AudioError, ConfigError, NemoLfrError, install_command, shorten
from nemo_lfr.io.cut_audio import read_cut
from nemo_lfr.io.cut_files import (
    CutItem,
    check_fields,
    explain,
    kind_of,
    read_cuts,
    read_shar,
    supervisions_beside,
)
from nemo_lfr.io.folders import AUDIO_SUFFIXES, find_files
from nemo_lfr.io.layouts import folder
from nemo_lfr.io.manifests import NOT_A_LINE, describe, line_id, resolve_audio_path, seconds
from nemo_lfr.io.reading import read_bytes, read_file, read_samples
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.shortage import missing_extra
from nemo_lfr.io.text import UTF16_MARKS, is_missing

logger = logging.getLogger(__name__)

# (sample rate in Hz, longest seconds) -> samples [T_audio], float32.
Source = Callable[[int, float], np.ndarray]
# Which clips of the corpus make one shard; plain JSON.
Part = dict[str, Any]

# Rows of a table whose audio is held at a time.
ROWS = 16
# Lines among which a manifest must have one that is whole.
FIRST_LINES = 100
# Words for the splits of a dataset in the names of its files.
SPLIT_WORDS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing|eval"}


@dataclass(frozen=True)
class Clip:
    """One utterance of a corpus.

    Attributes:
        id: unique in the corpus, and usable as a relative path without suffix.
        origin: where it is, for a person.
        audio: reads it; raises AudioError.
        context: reads the audio that a TTS model is conditioned on; None if there is none.
        labels: what the input says of it ("text", "speaker", "lang", "audio_filepath" ...).
        cut: the Lhotse cut it was, as a dict.
        path: the audio file it was, or was a part of.
    """

    id: str
    origin: str
    audio: Source
    context: Source | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    cut: dict[str, Any] | None = None
    path: Path | None = None


class Corpus(ABC):
    """Clips in a fixed order."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Changes when the list of clips does: a run is not resumed with another one."""

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """The files that list the clips, by place in which a part finds them again."""

    def files_of(self, part: Part) -> list[Path]:
        """Those of `files` from which a part is read."""
        return self.files

    @abstractmethod
    def parts(self, size: int) -> list[Part]:
        """Cut the corpus into parts of `size` clips, the last one smaller."""

    @abstractmethod
    def read(self, part: Part) -> Iterator[Clip]:
        """The clips of a part, in order. A line that is none is a clip whose audio raises."""


class Manifest(Corpus):
    """A NeMo manifest: JSON lines with `audio_filepath`, and `offset` and `duration` in seconds.

    Args:
        path: the file.
        audio_dir: folder of relative paths; the manifest's own if not given. See `resolve_audio_path`.

    Raises:
        ConfigError: if it cannot be read, or none of its first lines is one of a manifest.
    """

    def __init__(self, path: Path, audio_dir: Path | None = None) -> None:
        self.path = path
        self.audio_dir = audio_dir or path.parent
        try:
            with open(path, "rb") as file:
                lines = list(islice((line for line in file if line.strip()), FIRST_LINES))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
        is_utf16 = bool(lines) and lines[0].startswith(UTF16_MARKS)  # which JSON would take, line by line
        if is_utf16 or not any(_is_entry(line) for line in lines):
            raise ConfigError(f"{path}: not a NeMo manifest: {_what_instead(lines)}.")

    @property
    def identity(self) -> str:
        return digest(self.path)[:16]

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def parts(self, size: int) -> list[Part]:
        """Byte ranges; names that occur again get a number, counted over the whole manifest."""
        parts: list[Part] = []
        ids = UniqueIds()
        count = size
        repeats: dict[str, int] = {}
        with open(self.path, "rb") as file:
            while line := file.readline():
                if not line.strip():
                    continue
                if count == size:
                    repeats, count = {}, 0
                    parts.append({"start": file.tell() - len(line), "count": 0, "repeats": repeats})
                if (again := ids.number(_name(line))) > 1:
                    repeats[str(count)] = again
                count += 1
                parts[-1]["count"] = count
        return parts

    def read(self, part: Part) -> Iterator[Clip]:
        with open(self.path, "rb") as file:
            file.seek(part["start"])
            lines = islice((line for line in file if line.strip()), part["count"])
            for number, line in enumerate(lines):
                name = numbered_id(_name(line), _repeat(part, number))
                try:
                    yield self._clip(name, json.loads(line))
                except NOT_A_LINE as error:
                    origin = f"{self.path}: {shorten(line.decode(errors='replace').strip())}"
                    reason = f"{origin}: not a line of a manifest: {describe(error)}."
                    yield Clip(name, origin, partial(_raise, reason))

    def _clip(self, name: str, labels: dict[str, Any]) -> Clip:
        path = resolve_audio_path(self.audio_dir, labels["audio_filepath"])
        context = None
        if labels.get("context_audio_filepath"):
            other = seconds(labels, "context_audio_duration")
            context_path = resolve_audio_path(self.audio_dir, labels["context_audio_filepath"])
            context = partial(read_file, context_path, None, other or None)
        audio = partial(read_file, path, seconds(labels, "offset"), seconds(labels, "duration"))
        return Clip(name, str(path), audio, context, standard_labels(labels), path=path)


class Folder(Manifest):
    """A folder of audio, listed in a manifest of our own."""

    def _clip(self, name: str, labels: dict[str, Any]) -> Clip:
        problem = labels.pop("problem", None)
        found = super()._clip(name, labels)
        return found if problem is None else replace(found, audio=partial(_raise, f"{found.origin}: {problem}."))

    @property
    def identity(self) -> str:
        folder_and_files = f"{self.audio_dir} {digest(self.path)}".encode(errors="surrogateescape")
        return hashlib.sha256(folder_and_files).hexdigest()[:16]


def list_folder(root: Path, manifest: Path) -> Folder:
    """A folder of audio as a manifest, which is written.

    Raises:
        NemoLfrError: if there is no audio in it.
    """
    from nemo_lfr.io.journal import write_text

    lines = []
    for found in folder(root):
        entry = {"audio_filepath": str(found.path), **found.labels}
        entry |= {"speaker": found.speaker} if found.speaker else {}
        entry |= {"problem": found.problem} if found.problem else {}
        lines.append(json.dumps(entry, ensure_ascii=False))
    if not lines:
        raise NemoLfrError(f"{root}: no audio file in this folder.")
    write_text(manifest, "\n".join(lines) + "\n")
    return Folder(manifest, root)


class Cuts(Corpus):
    """Lhotse cuts in a `.jsonl` or `.jsonl.gz` file, or recordings, of which each is a cut.

    Relative paths in it are relative to the current folder, as in Lhotse.

    Args:
        path: the file.
        allow_url: read audio that is at an http(s) URL.
    """

    def __init__(self, path: Path, allow_url: bool = False) -> None:
        require("lhotse")
        self.path, self.allow_url = path, allow_url

    @property
    def identity(self) -> str:
        return list_digest((path.name, digest(path)) for path in self.files)

    @property
    def files(self) -> list[Path]:
        beside = supervisions_beside(self.path) if kind_of(self.path) == "recordings" else None
        return [self.path] if beside is None else [self.path, beside]

    def parts(self, size: int) -> list[Part]:
        total, repeats = _number_cuts([self.path])[0]
        return [
            {
                "start": start,
                "count": min(size, total - start),
                "repeats": {
                    str(index - start): repeats[index] for index in range(start, start + size) if index in repeats
                },
            }
            for start in range(0, total, size)
        ]

    def read(self, part: Part) -> Iterator[Clip]:
        start = part["start"]
        for number, item in enumerate(read_cuts(self.path, self.allow_url, start, start + part["count"])):
            yield _item_to_clip(item, str(self.path), _repeat(part, number), self.allow_url)


class Shar(Corpus):
    """Lhotse Shar: a folder with `cuts.*.jsonl.gz` and the other fields beside, or one folder for each field.

    An input shard is an output shard, whatever size is asked for, so that the two can be read side by side.
    """

    def __init__(self, path: Path, allow_url: bool = False) -> None:
        require("lhotse")
        self.path, self.allow_url = path, allow_url
        self.fields: dict[str, list[Path]] = {}
        for file in sorted([*path.glob("*.*.*"), *path.glob("*/*.*.*")]):
            flat = file.parent == path
            name = file.name.partition(".")[0] if flat or file.name.startswith("cuts.") else file.parent.name
            if re.search(r"\.\d+\.(jsonl(\.gz)?|tar(\.gz)?)$", file.name):
                self.fields.setdefault(name, []).append(file)
        for files in self.fields.values():
            for file in files:
                open_regular(file, ConfigError).close()  # a pipe would be waited for
        check_fields(path, self.fields)
        counts = {name: len(files) for name, files in self.fields.items()}
        if len(set(counts.values())) != 1:
            raise ConfigError(f"{path}: not a whole Lhotse Shar: its fields have {counts} shards.")

    @property
    def identity(self) -> str:
        return list_digest((str(file), sampled_digest(file)) for file in self.files)

    @property
    def files(self) -> list[Path]:
        return [file for name in sorted(self.fields) for file in self.fields[name]]

    def files_of(self, part: Part) -> list[Path]:
        return [files[part["shard"]] for files in self.fields.values()]

    def parts(self, size: int) -> list[Part]:
        return [
            {"shard": shard, "repeats": {str(index): number for index, number in again.items()}}
            for shard, (_, again) in enumerate(_number_cuts(self.fields["cuts"]))
        ]

    def read(self, part: Part) -> Iterator[Clip]:
        fields = {name: files[part["shard"]] for name, files in self.fields.items()}
        cuts = fields.pop("cuts")
        for number, item in enumerate(read_shar(cuts, fields, self.allow_url)):
            yield _item_to_clip(item, str(cuts), _repeat(part, number), self.allow_url)


class Table(Corpus):
    """Rows with an audio column: Parquet, or what Hugging Face `datasets` saved.

    A cell holds a file's bytes, its path, or decoded samples: see `audio_cell`. Labels are those of `standard_labels`.

    Args:
        path: file or folder.
        files: that hold the rows.
        schema: of the rows, an Arrow schema.
        features: of the columns, as `datasets` writes them.
        audio_dir: folder of relative paths; that of the table if not given.

    Raises:
        ConfigError: if there is no audio column.
    """

    def __init__(
        self, path: Path, files: list[Path], schema: Any, features: dict[str, Any], audio_dir: Path | None
    ) -> None:
        self.path, self._files = path, files
        self.audio_dir = audio_dir or (path if path.is_dir() else path.parent)
        self.columns: list[str] = schema.names
        # Of two columns of one name, the first.
        types = dict(reversed(list(zip(self.columns, schema.types, strict=True))))
        column = audio_column(self.columns, types)
        if column is None:
            raise ConfigError(
                f"{path}: no audio column; expected one of {', '.join(AUDIO)}, found {shorten(self.columns, 300)}."
            )
        self.column = column
        self.class_names = class_names(features)

    @property
    def identity(self) -> str:
        return list_digest((file.name, sampled_digest(file)) for file in self.files)

    @property
    def files(self) -> list[Path]:
        return self._files

    def note_columns(self) -> None:
        """Log which columns are taken for the labels, where they have other names."""
        if chosen := chosen_columns(self.columns):
            text = ", ".join(f"{label} from column {column!r}" for label, column in chosen.items())
            logger.warning("%s: %s.", self.path, text)

    def _clips(self, rows: Any, number: int) -> Iterator[Clip]:
        """The clips of a few rows, an Arrow table or batch, of which the first has this number."""
        columns: dict[str, Any] = {}
        for index, name in enumerate(rows.schema.names):  # of two columns of one name, the first
            columns.setdefault(name, rows.column(index))
        audio = {name: columns.pop(name) for name in (self.column, CONTEXT) if name in columns}
        for index in range(rows.num_rows):
            yield self._clip(
                number + index,
                {name: cells[index] for name, cells in audio.items()},
                {name: cells[index] for name, cells in columns.items()},
            )

    def _clip(self, number: int, audio: dict[str, Any], cells: dict[str, Any]) -> Clip:
        origin = f"{self.path}, row {number}"
        name = f"{number:08d}"
        try:
            values = {key: label_value(cell, self.class_names.get(key), key) for key, cell in cells.items()}
            if (given := values.get("id")) is not None and not is_missing(given):
                name = clean_id(f"{given}-{number:08d}")
            labels = standard_labels(values)
            rate = next((values[key] for key in RATES if key in values), None)
            source = self._source(audio.get(self.column), rate, origin)
            context = None
            if CONTEXT in audio and audio[CONTEXT].is_valid and self.column != CONTEXT:
                context = self._source(audio[CONTEXT], rate, f"{origin}, {CONTEXT}")
        except (AudioError, *NOT_A_LINE) as error:
            return Clip(name, origin, partial(_raise, f"{origin}, column {self.column!r}: {describe(error)}."))
        return Clip(name, origin, source, context, labels)

    def _source(self, cell: Any, rate: Any, origin: str) -> Source:
        audio = audio_cell(cell, rate)
        if isinstance(audio, bytes):
            return partial(read_bytes, audio, origin)
        if isinstance(audio, str):
            return partial(read_file, resolve_audio_path(self.audio_dir, audio), None, None)
        return partial(read_samples, audio.array, audio.rate, origin)


class Parquet(Table):
    """A Parquet file, or a folder of them; a part is whole row groups of one file.

    Raises:
        ConfigError: if no file can be read, or a folder holds several splits of a dataset.
    """

    def __init__(self, path: Path, audio_dir: Path | None = None) -> None:
        self.parquet = require("pyarrow.parquet")
        files = [path] if path.is_file() else parquet_files(path)
        splits = {split_of(file.relative_to(path)) or "" for file in files} if path.is_dir() else set()
        if len(splits) > 1:
            names = ", ".join(sorted(splits - {""})) + (" and files of no split" if "" in splits else "")
            raise ConfigError(
                f"{path}: holds the splits {names}, which are not mixed; give one file, or a "
                "folder with the files of one split."
            )
        problems = []
        for file in files:
            try:
                schema = self._open(file).schema_arrow
                break
            except ConfigError as error:
                problems.append(error)
        else:
            raise problems[0]
        super().__init__(path, files, schema, parquet_features(schema.metadata), audio_dir)

    def _open(self, file: Path) -> Any:
        try:
            return self.parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: not a Parquet file ({shorten(error, 200)}).") from error

    def files_of(self, part: Part) -> list[Path]:
        return [self.files[part["file"]]]

    def parts(self, size: int) -> list[Part]:
        parts: list[Part] = []
        number = 0
        for file in range(len(self.files)):
            try:
                metadata = self._open(self.files[file]).metadata
            except ConfigError as error:
                parts.append({"file": file, "groups": [], "start": number, "problem": str(error)})
                continue
            count = size
            for group in range(metadata.num_row_groups):
                if count >= size:
                    parts.append({"file": file, "groups": [], "start": number})
                    count = 0
                parts[-1]["groups"].append(group)
                count += metadata.row_group(group).num_rows
                number += metadata.row_group(group).num_rows
        return parts

    def read(self, part: Part) -> Iterator[Clip]:
        path = self.files[part["file"]]
        if "problem" in part:
            yield Clip(clean_id(path.stem), str(path), partial(_raise, part["problem"]))
            return
        table = self._open(path)
        number = part["start"]
        stop = number + sum(table.metadata.row_group(group).num_rows for group in part["groups"])
        try:
            for rows in table.iter_batches(ROWS, row_groups=part["groups"]):
                yield from self._clips(rows, number)
                number += rows.num_rows
        except (OSError, ValueError) as error:
            reason = shorten(error, 200)
            for row in range(number, stop):
                origin = f"{self.path}, row {row}"
                yield Clip(f"{row:08d}", origin, partial(_raise, f"{origin}: damaged Parquet ({reason})."))


class SavedDataset(Table):
    """A dataset that Hugging Face `datasets` saved with `save_to_disk`; audio columns are not decoded by it."""

    def __init__(self, path: Path, audio_dir: Path | None = None) -> None:
        datasets = require("datasets")
        _check_saved(path)
        try:
            self.rows = datasets.load_from_disk(str(path))
            columns = self.rows.column_names
        except Exception as error:  # of whichever of its many readers
            raise ConfigError(
                f"{path}: not a dataset that datasets.load_from_disk reads ({shorten(error, 200)})."
            ) from error
        if isinstance(columns, dict):
            raise ConfigError(f"{path}: holds the splits {', '.join(sorted(columns))}; give the folder of one.")
        features = self.rows.features.to_dict()
        self.rows = self.rows.with_format("arrow")
        names = ("state.json", "dataset_info.json")
        files = [*(path / name for name in names if (path / name).is_file()), *sorted(path.glob("*.arrow"))]
        super().__init__(path, files, self.rows.features.arrow_schema, features, audio_dir)

    def parts(self, size: int) -> list[Part]:
        total = len(self.rows)
        return [{"start": start, "count": min(size, total - start)} for start in range(0, total, size)]

    def read(self, part: Part) -> Iterator[Clip]:
        stop = part["start"] + part["count"]
        for start in range(part["start"], stop, ROWS):
            yield from self._clips(self.rows[start : min(start + ROWS, stop)], start)


def open_corpus(
    path: Path, audio_dir: Path | None, listing: Path, anew: bool = True, allow_url: bool = False
) -> Corpus:
    """The corpus at `path`, by what is there.

    Args:
        path: file or folder.
        audio_dir: folder of the relative paths in a manifest or table; its own if not given.
        listing: where a folder's list of files is written.
        anew: list the folder now, not as the list that is there has it.
        allow_url: read audio that Lhotse's manifests place at an http(s) URL.

    Raises:
        NemoLfrError: if it is nothing that can be read.
    """
    if not path.exists():
        raise NemoLfrError(f"{path}: no such file or folder.")
    if path.is_file():
        if path.suffix == ".parquet":
            return _noted(Parquet(path, audio_dir), anew)
        if path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
            kind = kind_of(path)
            if kind in ("cuts", "recordings"):
                return Cuts(path, allow_url)
            if kind is not None:
                raise ConfigError(f"{path}: holds Lhotse {kind}, which name no audio; give cuts or recordings.")
            if path.suffix == ".gz":
                raise ConfigError(
                    f"{path}: holds neither Lhotse cuts nor recordings; if it is a NeMo manifest, decompress it."
                )
        return Manifest(path, audio_dir)
    if not path.is_dir():
        open_regular(path, ConfigError).close()  # refuses it by what it is
    if list(path.glob("cuts.*.jsonl*")) or list(path.glob("cuts/cuts.*.jsonl*")):
        return Shar(path, allow_url)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _noted(SavedDataset(path, audio_dir), anew)
    if splits := sorted(state.parent.name for state in path.glob("*/state.json")):
        raise ConfigError(f"{path}: holds the saved datasets {', '.join(splits)}; give the folder of one.")
    if parquet_files(path):
        return _noted(Parquet(path, audio_dir), anew)
    return list_folder(path, listing) if anew else Folder(listing, path)


def _noted(table: Table, is_driver: bool) -> Table:
    if is_driver:  # once, and not by each worker
        table.note_columns()
        if table.path.is_dir() and (found := find_files(table.path, AUDIO_SUFFIXES, report=lambda _: None)):
            text = "%s: its tables are read; of its %d audio files, only those that a row names."
            logger.warning(text, table.path, len(found))
    return table


def _check_saved(path: Path) -> None:
    """Refuse a saved dataset that names files outside of its folder, or holds pipes, which `datasets` would open.

    Raises:
        ConfigError: naming the file.
    """
    state = path / "state.json"
    for file in [found for name in ("*.json", "*.arrow") for found in sorted(path.glob(name))]:
        open_regular(file, ConfigError).close()
    if not state.is_file():
        return
    try:
        named = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        bad = next((name for name in named if not isinstance(name, str) or Path(name).name != name), None)
    except NOT_A_LINE as error:
        raise ConfigError(f"{state}: is damaged ({describe(error)}); save the dataset again.") from error
    if bad is not None:
        raise ConfigError(f"{state}: names {shorten(bad)!r}, which is not a file of this folder, and is not read.")
    for name in named:
        if path_inside(path, name) is None:
            raise ConfigError(f"{path / name}: is a link out of this folder, which is not followed.")


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files below a folder, as `find_files` walks it."""
    return find_files(folder, {".parquet"}, report=lambda _: None)


def split_of(path: Path) -> str | None:
    """Return the split that a file's path names, as the Hub understands it: "train", "validation" or "test"."""
    for part in reversed([*path.parts[:-1], path.stem]):
        for split, words in SPLIT_WORDS.items():
            if re.search(rf"(^|[\W_\d])({words})($|[\W_\d])", part, re.IGNORECASE):
                return split
    return None


def cut_to_clip(cut: Any, origin: str, number: int = 1, allow_url: bool = False) -> Clip:
    """A Lhotse cut; its `target_audio` is taken if it has one, as NeMo's loaders do. `number` is `numbered_id`'s.

    Several supervisions become one: their texts in order of start, with the speaker and language of the first.
    """
    supervisions = sorted(cut.supervisions, key=lambda supervision: supervision.start)
    labels: dict[str, Any] = {}
    if supervisions:
        texts = [str(part.text) for part in supervisions if not is_missing(part.text)]
        first = supervisions[0]
        labels = {"text": " ".join(texts) if texts else None, "speaker": first.speaker, "lang": first.language}
    custom = getattr(cut, "custom", None) or {}
    labels |= {key: value for key, value in custom.items() if isinstance(value, str | int | float | bool)}
    labels = {key: value for key, value in labels.items() if not is_missing(value) and key not in OTHER_TOKENS}
    target = cut.target_audio if cut.has_custom("target_audio") else cut
    context = None
    if cut.has_custom("context_audio"):
        context = partial(read_cut, cut.context_audio, allow_url=allow_url)
    manifest = cut.to_dict()
    # Audio that lies in a Shar stays there: a cut without it is what the tokens' own cuts file holds.
    for place in (manifest, manifest.get("custom") or {}):
        for key in [key for key, value in place.items() if key != "supervisions" and _is_data(value)]:
            del place[key]
        for key in OTHER_TOKENS & place.keys():
            del place[key]
    if supervisions and manifest.get("supervisions"):
        manifest["supervisions"] = [_joined(supervisions, labels.get("text"))]
    return Clip(
        numbered_id(clean_id(str(cut.id)), number),
        f"{origin}, cut {cut.id}",
        partial(read_cut, target, allow_url=allow_url),
        context,
        labels,
        manifest if manifest.get("type") in ("MonoCut", "MultiCut") else None,  # others have no supervisions
    )


def _joined(supervisions: Sequence[Any], text: str | None) -> dict[str, Any]:
    """The manifest of one supervision for several, in order of start."""
    joined = {key: value for key, value in supervisions[0].to_dict().items() if not is_missing(value)}
    joined |= {} if text is None else {"text": text}
    if isinstance(joined.get("custom"), dict):
        joined["custom"] = {key: value for key, value in joined["custom"].items() if key not in OTHER_TOKENS}
    if len(supervisions) > 1:
        joined["duration"] = max(part.start + part.duration for part in supervisions) - supervisions[0].start
        joined.pop("alignment", None)  # of the first alone
    return joined


def _item_to_clip(item: CutItem, origin: str, number: int, allow_url: bool) -> Clip:
    """A cut of a file, or a clip whose audio raises what is wrong with it."""
    problem = item.problem
    if problem is None:
        try:
            return cut_to_clip(item.cut, origin, number, allow_url)
        except Exception as error:  # of whatever a cut's fields may hold
            problem = f"not a Lhotse cut: {explain(error)}"
    place = f"{origin}, cut {shorten(item.id)}"
    return Clip(numbered_id(clean_id(item.id), number), place, partial(_raise, f"{place}: {problem}"))


def require(module: str) -> Any:
    """Import an optional dependency.

    Raises:
        MissingExtraError: if it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except Exception as error:  # whatever that package does when it is imported
        package = module.partition(".")[0]
        message = f"{package} is not installed: {install_command(package)}"
        raise missing_extra(error, package, message) from error


def _number_cuts(paths: Sequence[Path]) -> list[tuple[int, dict[int, int]]]:
    """Count the cuts of each file, and number those whose id occurred before: index in the file -> number.

    Raises:
        ConfigError: if it is not a file of Lhotse cuts.
    """
    ids = UniqueIds()
    found = []
    several = 0
    for path in paths:
        count, repeats = 0, {}
        for item in read_cuts(path):
            if (number := ids.number(clean_id(item.id))) > 1:
                repeats[count] = number
            count += 1
            several += item.cut is not None and len(item.cut.supervisions) > 1
        found.append((count, repeats))
    if several:
        text = "%s: %d cuts have several supervisions: their texts are joined in order, with the first's speaker."
        logger.warning(text, paths[0], several)
    return found


def _repeat(part: Part, index: int) -> int:
    number: int = part.get("repeats", {}).get(str(index), 1)
    return number


def _is_data(value: Any) -> bool:
    """Whether a manifest's value is a recording or array whose bytes lie in a Shar."""
    if not isinstance(value, dict):
        return False
    sources = value.get("sources") or [value.get("array") or value]
    parts = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    kinds = [str(part.get("storage_type") or part.get("type")) for part in parts]
    return any(kind == "shar" or kind.startswith("memory") for kind in kinds)


def _is_entry(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict) and "audio_filepath" in json.loads(line)
    except NOT_A_LINE:
        return False


def _what_instead(lines: Sequence[bytes]) -> str:
    """Describe a file that is not a manifest."""
    first = lines[0] if lines else b""
    if first.startswith(UTF16_MARKS):
        return "it is UTF-16 text; save it as UTF-8"
    if b"\0" in b"".join(lines):
        return "it is not text; give a manifest, a folder, cuts or a Parquet table, and unpack an archive first"
    expected = 'expected {"audio_filepath": ...}'
    if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        return f"it is one JSON list, {expected}, one object a line"
    return f"its first line is {shorten(first.decode(errors='replace').strip())!r}, {expected}"


def _name(line: bytes) -> str:
    """A clip's name from its line: the path without suffix, and the offset where there is one."""
    try:
        labels = json.loads(line)
        name = PurePosixPath(str(labels["audio_filepath"])).with_suffix("")
        offset = float(labels.get("offset") or 0)
        return clean_id(f"{name}-{round(offset * 1000):08d}" if offset else str(name))
    except NOT_A_LINE:
        return line_id(line)


def _raise(text: str, sample_rate: int, longest: float) -> np.ndarray:
    raise AudioError(text)
