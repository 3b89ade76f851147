"""Reader for Parquet files with a column of audio."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_lfr.corpus.columns import parquet_features
from nemo_lfr.corpus.ids import clean_id
from nemo_lfr.corpus.sources.base import Clip, OpenOptions, ShardSpec, unreadable
from nemo_lfr.corpus.sources.table import ROWS, Table
from nemo_lfr.errors import ConfigError, MissingExtraError, NemoLfrError, shorten
from nemo_lfr.io.columns import known_names, repeated_column
from nemo_lfr.io.folders import find_files
from nemo_lfr.io.layouts import unread_folder
from nemo_lfr.io.numbered import check_numbered
from nemo_lfr.io.parquet import PARQUET_SUFFIXES, READ_ERRORS, ParquetFooter, open_parquet
from nemo_lfr.io.partitions import partition_of
from nemo_lfr.io.segment_columns import SegmentCheck
from nemo_lfr.io.shortage import require
from nemo_lfr.io.splits import check_one_split, split_of_parts

logger = logging.getLogger(__name__)

CHECKED_ROWS = 1024  # maximum number of rows whose paths are checked at a time
NAMED = 5  # maximum number of columns that a message names


class Parquet(Table):
    """Reader for a Parquet file or a folder of Parquet files. A shard consists of row groups of one file.

    A folder with a name such as `lang=de` adds a column to the files in it; see `partition_of`.

    Args:
        path: the file or folder.
        audio_dir: folder that relative paths are resolved against. By default, this is `path` itself if it is a
            folder, and the folder of the file otherwise.

    Raises:
        ConfigError: if no file can be read, no column contains audio, or the files are not one complete split of a
            dataset.
    """

    def __init__(self, path: Path, audio_dir: Path | None = None) -> None:
        require("pyarrow.parquet")
        self.unread: list[OSError] = []
        files = [path] if path.is_file() else parquet_files(path, self.unread)
        if path.is_dir():
            splits = [split_of(file.relative_to(path)) for file in files]
            check_one_split(path, splits, "one file, or a folder with the files of one split")
            check_numbered(path, files)
        problems = []
        for file in files:
            try:
                schema = self._open(file)[0].schema_arrow
                break
            except ConfigError as error:
                problems.append(error)
        else:
            raise problems[0]
        partitions = [partition_of(file, path) for file in files]
        self.partitions = [{known_names(keys).get(key, key): keys[key] for key in keys} for keys in partitions]
        super().__init__(path, files, schema, parquet_features(schema.metadata), audio_dir)
        self.columns += [name for name in dict.fromkeys(key for keys in self.partitions for key in keys)]

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path is a Parquet file, or a folder that contains Parquet files."""
        return path.suffix.lower() in PARQUET_SUFFIXES if path.is_file() else bool(parquet_files(path))

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "Parquet":
        """Open the file or folder. With `options.relist`, log which columns are used."""
        table = cls(path, options.audio_dir)
        if options.relist:  # log in the process that plans the run, not in each worker
            table.log_choices()
        return table

    def _hash(self, names: Sequence[str]) -> str:
        """Return a hash of the files, and of the columns in the names of their folders, such as `lang=en`."""
        if any(self.partitions):
            pairs = zip(names, self.partitions, strict=True)
            names = [f"{name} {sorted(keys.items())}" for name, keys in pairs]
        return super()._hash(names)

    def _open(self, file: Path) -> tuple[Any, ParquetFooter]:
        try:
            table, footer = open_parquet(file, is_input=True)
        except (OSError, NemoLfrError) as error:
            if isinstance(error, MissingExtraError):
                raise
            text = f"{file}: cannot be read ({error.strerror})." if isinstance(error, OSError) else str(error)
            raise ConfigError(text) from error
        if name := repeated_column(table.schema_arrow.names):
            raise ConfigError(f"{file}: two columns are named {shorten(repr(name))}; rename or remove one of them.")
        try:
            known_names(table.schema_arrow.names)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}.") from error
        return table, footer

    def files_of(self, shard: ShardSpec) -> list[Path]:
        """Return the file from which a shard is read, as a list; empty for the shard of an unreadable folder."""
        return [self.files[shard["file"]]] if "file" in shard else []

    def shards(self, size: int) -> list[ShardSpec]:
        """Split the row groups into shards of about `size` clips.

        If a file or subfolder cannot be used, its only shard has the key "problem", and yields a clip that raises
        AudioError.

        Raises:
            SegmentsNotReadError: if several rows with a column such as `start` list the same file.
        """
        shards: list[ShardSpec] = []
        number = 0
        first_columns: list[str] = []
        check = SegmentCheck()
        for file in range(len(self.files)):
            try:
                table, footer = self._open(self.files[file])
                names = known_names(table.schema_arrow.names)
                columns = [names.get(name, name) for name in table.schema_arrow.names]
                if self.column not in columns:
                    raise ConfigError(
                        f"{self.files[file]}: no column {self.column!r}, which contains the audio in the other files; "
                        f"found {shorten(columns, 300)}. Rename the column, or tokenize this file by itself."
                    )
                if difference := _difference(columns, first_columns or columns):
                    logger.warning(
                        "%s: the columns differ from those of the first file: %s.", self.files[file], difference
                    )
                first_columns = first_columns or columns
                first = number
            except ConfigError as error:
                shards.append({"file": file, "groups": [], "start": number, "problem": str(error)})
                continue
            self._check_file(check, self.files[file], table, footer)
            count = size
            for index, group in enumerate(footer.groups):
                if count >= size:
                    shards.append({"file": file, "groups": [], "start": number, "first": first})
                    count = 0
                shards[-1]["groups"].append(index)
                count += group.num_rows
                number += group.num_rows
        check.finish()
        for unread in self.unread:
            problem = f"{unread.filename}: {unread_folder(unread)}."
            shards.append({"folder": unread.filename, "groups": [], "start": number, "problem": problem})
        return shards

    def _check_file(self, check: SegmentCheck, path: Path, table: Any, footer: ParquetFooter) -> None:
        """Add the rows of a file to `check` if the file has a column with starts of segments."""
        chosen = self._checked_columns(table.schema_arrow.names)
        if not chosen:
            return
        size = footer.rows_at_a_time(range(len(footer.groups)), CHECKED_ROWS)
        batches = table.iter_batches(size, columns=chosen)
        while True:
            try:
                rows = next(batches, None)
            except READ_ERRORS:  # these rows are failures of the run
                return
            if rows is None:
                return
            self._check_segments(check, str(path), rows)

    def read(self, shard: ShardSpec) -> Iterator[Clip]:
        """Yield the clips of a shard in order."""
        path = Path(shard["folder"]) if "folder" in shard else self.files[shard["file"]]
        if "problem" in shard:
            yield Clip(clean_id(path.stem), str(path), unreadable(shard["problem"]))
            return
        table, footer = self._open(path)
        number, first = shard["start"], shard["first"]
        stop = number + sum(footer.groups[group].num_rows for group in shard["groups"])
        try:
            size = footer.rows_at_a_time(shard["groups"], ROWS)
            for rows in table.iter_batches(size, row_groups=shard["groups"]):
                yield from self._clips(rows, number, path, first, self.partitions[shard["file"]])
                number += rows.num_rows
            reason = "the file has fewer rows than it declares"  # if a page has fewer rows than its header states
        except READ_ERRORS as error:
            reason = shorten(error, 200)
        for row in range(number, stop):
            origin = f"{path}, row {row - first}"
            yield Clip(f"{row:08d}", origin, unreadable(f"{origin}: damaged Parquet ({reason})."))


def parquet_files(folder: Path, unread: list[OSError] | None = None) -> list[Path]:
    """Return the Parquet files in a folder and its subfolders. Names that begin with `_` or `.` are skipped.

    Args:
        folder: the folder.
        unread: list to which the errors of subfolders that cannot be read are added; None to ignore them.

    Raises:
        ConfigError: if the folder is a Delta Lake or Hudi table.
    """
    for name in ("_delta_log", ".hoodie"):
        if (folder / name).is_dir():
            raise ConfigError(
                f"{folder}: this is a Delta Lake or Hudi table, whose folder also contains files of earlier versions; "
                "write the table to a folder of plain Parquet files."
            )
    found = find_files(folder, PARQUET_SUFFIXES, report=lambda _: None, unread=[] if unread is None else unread)
    return [file for file in found if not any(part.startswith("_") for part in file.relative_to(folder).parts)]


def _difference(columns: Sequence[str], expected: Sequence[str]) -> str:
    """Describe how the names of a file's columns differ from the expected ones; return "" if they do not."""
    parts = [
        f"{word} {', '.join(shorten(repr(name)) for name in names[:NAMED])}"
        for word, names in (
            ("missing", [name for name in expected if name not in columns]),
            ("additional", [name for name in columns if name not in expected]),
        )
        if names
    ]
    return ", ".join(parts)


def split_of(path: Path) -> str | None:
    """Return the split in a file's path, "train", "valid" or "test"; None if there is none.

    The path is searched for words such as "validation" or "dev"; see `nemo_lfr.io.splits`.
    """
    return split_of_parts([*path.parts[:-1], path.stem])
