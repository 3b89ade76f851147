"""Base class for readers of tables with a column of audio: Parquet files and saved datasets."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_lfr.corpus.columns import (
    RATES,
    audio_cell,
    audio_column,
    class_names,
    contains_lists_of_files,
    contains_text,
    is_label,
    label_value,
    may_contain_paths,
)
from nemo_lfr.corpus.ids import clean_id
from nemo_lfr.corpus.inventory import list_digest, sampled_digest
from nemo_lfr.corpus.sources.base import AudioLoader, Clip, CorpusReader, ShardSpec, unreadable
from nemo_lfr.errors import AudioError, ConfigError, counted, shorten
from nemo_lfr.io.columns import AUDIO, CONTEXT, OTHER_TOKENS, chosen_columns, known_names, standard_labels
from nemo_lfr.io.folders import AUDIO_SUFFIXES, find_files
from nemo_lfr.io.manifests import NOT_A_LINE, describe, resolve_audio_path, seconds
from nemo_lfr.io.reading import read_bytes, read_file, read_samples, rounding
from nemo_lfr.io.segment_columns import SegmentCheck, start_column
from nemo_lfr.io.text import is_missing

logger = logging.getLogger(__name__)

# Maximum number of rows to read at a time, since their audio is held in memory.
ROWS = 16


class Table(CorpusReader):
    """Base class for readers of tables with a column of audio.

    A cell of this column contains the bytes of an audio file, its path, or decoded samples; see `audio_cell`. Other
    columns become labels; see `standard_labels`.

    Args:
        path: file or folder of the table.
        files: files from which the rows are read.
        schema: Arrow schema of the rows.
        features: descriptions of the columns, in the form that Hugging Face `datasets` stores ("features").
        audio_dir: folder that relative paths are resolved against; None for the table's folder.

    Raises:
        ConfigError: if no column contains audio, or the names of two columns differ only in case (see `known_names`).
    """

    def __init__(
        self, path: Path, files: list[Path], schema: Any, features: dict[str, Any], audio_dir: Path | None
    ) -> None:
        self.path, self._files = path, files
        self.audio_dir = audio_dir or (path if path.is_dir() else path.parent)
        try:
            names = known_names(schema.names)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}.") from error
        self.columns: list[str] = [names.get(name, name) for name in schema.names]
        types = dict(zip(self.columns, schema.types, strict=True))
        column = audio_column(self.columns, types)
        if column is None:
            raise ConfigError(
                f"{path}: no audio column; expected one of {', '.join(AUDIO)}, found {shorten(self.columns, 300)}. "
                "Rename the column that contains the audio."
            )
        if contains_lists_of_files(types[column]):
            raise ConfigError(
                f"{path}: each cell of the column {shorten(repr(column))} is a list of audio files; write a table "
                "with one file per row."
            )
        self.column = column
        # Column with starts of segments, which are not read; "" if there is none, or the table may contain the audio.
        reads_segments = column == "audio_filepath" and "offset" in self.columns
        self._start = "" if reads_segments or not contains_text(types[column]) else start_column(schema.names) or ""
        self._has_paths = any(may_contain_paths(types[name]) for name in (column, CONTEXT) if name in types)
        self.left_out = {
            name: kind
            for name, kind in types.items()
            if name not in OTHER_TOKENS | {column, CONTEXT} and not is_label(name, kind)
        }
        self.class_names = {names.get(name, name): values for name, values in class_names(features).items()}

    @property
    def identity(self) -> str:
        """Return a hash of the files, and of their names if the table is a folder."""
        is_file = self.files == [self.path]
        return self._hash(["" if is_file else file.name for file in self.files])

    def older_shards(self, identity: str, shards: list[ShardSpec], size: int) -> list[ShardSpec] | None:
        """Return `shards` if `identity` is the hash that an older version computed for this corpus; otherwise None."""
        return shards if identity == self._hash([file.name for file in self.files]) else None

    def _hash(self, names: Sequence[str]) -> str:
        """Return a hash of the contents of all files, and of `names`, which has a name for each file."""
        return list_digest(zip(names, self._digests, strict=True))

    @cached_property
    def _digests(self) -> list[str]:
        return [_digest(file) for file in self.files]

    @property
    def base(self) -> Path | None:
        """The folder that relative paths are resolved against; None if no column of audio can contain paths."""
        return self.audio_dir if self._has_paths else None

    @property
    def files(self) -> list[Path]:
        """Return the files from which the rows are read."""
        return self._files

    def log_choices(self) -> None:
        """Log which columns with nonstandard names contain the audio or labels, and which columns are left out.

        If the table is a folder that contains audio files, also log that only files listed in a table are used.
        """
        if self.column not in AUDIO:
            logger.warning("%s: the audio is read from column %r.", self.path, self.column)
        if chosen := chosen_columns(self.columns):
            text = ", ".join(f"{label} from column {column!r}" for label, column in chosen.items())
            logger.warning("%s: labels are read from columns with other names: %s.", self.path, text)
        if self.left_out:
            text = ", ".join(f"{shorten(repr(name))} ({shorten(kind)})" for name, kind in self.left_out.items())
            logger.warning(
                "%s: columns of these types are not read: %s. To keep labels, convert them to text or numbers.",
                self.path,
                shorten(text, 500),
            )
        if self.path.is_dir() and (
            audio_files := find_files(self.path, AUDIO_SUFFIXES, report=lambda _: None, unread=[])
        ):
            text = "%s: of the %s in this folder of tables, only those that a table lists are used."
            logger.warning(text, self.path, counted(len(audio_files), "audio file"))

    def _checked_columns(self, columns: Sequence[str]) -> list[str]:
        """Return the names of the audio column and the segment-start column, in table order; [] unless both exist."""
        names = known_names(columns)
        found = [name for name in columns if name == self._start or names.get(name, name) == self.column]
        return found if len(found) == 2 else []

    def _check_segments(self, check: SegmentCheck, place: str, rows: Any) -> None:
        """Pass each row to `check`.

        `rows` is an Arrow table or batch with the two columns that `_checked_columns` returned.
        """
        column = rows.schema.names.index(self._start)
        for path, cell in zip(rows.column(1 - column), rows.column(column), strict=True):
            if path.is_valid and cell.is_valid:
                start = label_value(cell, None, self._start)
                # Values of types that labels do not have, such as bytes, are starts too.
                check.add(place, path.as_py(), {self._start: True if start is None else start})

    def _clips(
        self,
        rows: Any,
        number: int,
        file: Path | None = None,
        first: int = 0,
        constants: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[Clip]:
        """Yield the clips in an Arrow table or batch.

        Args:
            rows: the table or batch.
            number: index of the first row of `rows`, counted over the whole corpus.
            file: file that messages name; None to name the corpus.
            first: index of the first row of `file`, counted over the whole corpus.
            constants: values that are the same for all rows, such as {"lang": "de"} for a file in a folder `lang=de`.
        """
        names = known_names(rows.schema.names)
        columns = {names.get(name, name): rows.column(index) for index, name in enumerate(rows.schema.names)}
        audio = {name: columns.pop(name) for name in (self.column, CONTEXT) if name in columns}
        for index in range(rows.num_rows):
            yield self._clip(
                number + index,
                f"{file or self.path}, row {number + index - first}",
                {name: cells[index] for name, cells in audio.items()},
                {name: cells[index] for name, cells in columns.items()},
                constants,
            )

    def _clip(
        self, number: int, origin: str, audio: dict[str, Any], cells: dict[str, Any], constants: Mapping[str, str]
    ) -> Clip:
        name = f"{number:08d}"
        try:
            values: dict[str, Any] = dict(constants)
            values |= {key: label_value(cell, self.class_names.get(key), key) for key, cell in cells.items()}
            if (row_id := values.get("id")) is not None and not is_missing(row_id):
                name = clean_id(f"{row_id}-{number:08d}")
            labels = standard_labels(values)
        except (AudioError, *NOT_A_LINE) as error:
            return Clip(name, origin, unreadable(f"{origin}: {describe(error)}."))
        try:
            rate = next((values[key] for key in RATES if key in values), None)
            rate = int(rate) if isinstance(rate, str) and rate.isdecimal() else rate  # from the name of a folder
            # As in text tables, offset and duration select a part of the file only together with `audio_filepath`.
            keys = ("offset", "duration") if self.column == "audio_filepath" else ()
            for key in keys:
                if key in cells and cells[key].is_valid and values[key] is None:
                    raise ValueError(f"{key} has the type {shorten(cells[key].type)}; expected a number of seconds")
            audio_loader, path = self._loader(
                audio.get(self.column),
                rate,
                f"{origin}, column {self.column!r}",
                {key: seconds(labels, key) for key in keys},
            )
            context = None
            if CONTEXT in audio and audio[CONTEXT].is_valid and self.column != CONTEXT:
                context, _ = self._loader(audio[CONTEXT], rate, f"{origin}, column {CONTEXT!r}")
        except (AudioError, *NOT_A_LINE) as error:
            return Clip(name, origin, unreadable(f"{origin}, column {self.column!r}: {describe(error)}."))
        return Clip(name, origin, audio_loader, context, labels, path=path)

    def _loader(
        self, cell: Any, rate: Any, origin: str, section: Mapping[str, float | None] = MappingProxyType({})
    ) -> tuple[AudioLoader, Path | None]:
        """Return the function that loads the audio of a cell, and the audio file (None for audio in the table)."""
        audio = audio_cell(cell, rate)
        offset, duration = section.get("offset"), section.get("duration")
        if isinstance(audio, bytes):
            return partial(read_bytes, audio, origin, offset=offset, duration=duration), None
        if isinstance(audio, str):
            path = resolve_audio_path(self.audio_dir, audio)
            return partial(read_file, path, offset, duration), path
        try:
            length = max(audio.array.shape, default=0) / float(audio.rate)
        except (TypeError, ValueError, ZeroDivisionError):
            length = 0.0  # `read_samples` reports the error
        if offset or (duration is not None and abs(length - duration) > rounding(duration)):
            problem = unreadable(
                f"{origin}: offset and duration cannot select a part of decoded samples; store only the part and "
                "remove these columns, or store audio files."
            )
            return problem, None
        return partial(read_samples, audio.array, audio.rate, origin), None


def _digest(file: Path) -> str:
    """Return a hash of a file, or "unreadable"."""
    try:
        return sampled_digest(file)
    except OSError:
        return "unreadable"
