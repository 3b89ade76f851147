"""Reader for Parquet files with a column of audio."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_lfr.corpus.columns import parquet_features
from nemo_lfr.corpus.ids import clean_id
from nemo_lfr.corpus.sources.base import Clip, OpenOptions, ShardSpec, unreadable
from nemo_lfr.corpus.sources.table import ROWS, Table
from nemo_lfr.errors import ConfigError, MissingExtraError, NemoLfrError, shorten
from nemo_lfr.io.columns import repeated_column
from nemo_lfr.io.folders import find_files
from nemo_lfr.io.parquet import READ_ERRORS, ParquetFooter, open_parquet
from nemo_lfr.io.shortage import require
from nemo_lfr.io.splits import check_one_split, split_of_parts


class Parquet(Table):
    """Reader for a Parquet file or a folder of Parquet files. A shard consists of row groups of one file.

    Raises:
        ConfigError: if no file can be read, no column contains audio, or a folder contains several splits of a
            dataset.
    """

    def __init__(self, path: Path, audio_dir: Path | None = None) -> None:
        require("pyarrow.parquet")
        files = [path] if path.is_file() else parquet_files(path)
        if path.is_dir():
            splits = [split_of(file.relative_to(path)) for file in files]
            check_one_split(path, splits, "one file, or a folder with the files of one split")
        problems = []
        for file in files:
            try:
                schema = self._open(file)[0].schema_arrow
                break
            except ConfigError as error:
                problems.append(error)
        else:
            raise problems[0]
        super().__init__(path, files, schema, parquet_features(schema.metadata), audio_dir)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path is a Parquet file, or a folder that contains Parquet files."""
        return path.suffix == ".parquet" if path.is_file() else bool(parquet_files(path))

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "Parquet":
        """Open the file or folder."""
        table = cls(path, options.audio_dir)
        if options.relist:  # log in the process that plans the run, not in each worker
            table.log_choices()
        return table

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
        return table, footer

    def files_of(self, shard: ShardSpec) -> list[Path]:
        """Return the only file from which a shard is read."""
        return [self.files[shard["file"]]]

    def shards(self, size: int) -> list[ShardSpec]:
        """Split the row groups into shards of about `size` clips."""
        shards: list[ShardSpec] = []
        number = 0
        for file in range(len(self.files)):
            try:
                footer = self._open(self.files[file])[1]
            except ConfigError as error:
                shards.append({"file": file, "groups": [], "start": number, "problem": str(error)})
                continue
            count = size
            for index, group in enumerate(footer.groups):
                if count >= size:
                    shards.append({"file": file, "groups": [], "start": number})
                    count = 0
                shards[-1]["groups"].append(index)
                count += group.num_rows
                number += group.num_rows
        return shards

    def read(self, shard: ShardSpec) -> Iterator[Clip]:
        """Yield the clips of a shard in order."""
        path = self.files[shard["file"]]
        if "problem" in shard:
            yield Clip(clean_id(path.stem), str(path), unreadable(shard["problem"]))
            return
        table, footer = self._open(path)
        number = shard["start"]
        stop = number + sum(footer.groups[group].num_rows for group in shard["groups"])
        try:
            size = footer.rows_at_a_time(shard["groups"], ROWS)
            for rows in table.iter_batches(size, row_groups=shard["groups"]):
                yield from self._clips(rows, number)
                number += rows.num_rows
            reason = "the file has fewer rows than it declares"  # if a page has fewer rows than its header states
        except READ_ERRORS as error:
            reason = shorten(error, 200)
        for row in range(number, stop):
            origin = f"{self.path}, row {row}"
            yield Clip(f"{row:08d}", origin, unreadable(f"{origin}: damaged Parquet ({reason})."))


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files in a folder and its subfolders."""
    return find_files(folder, {".parquet"}, report=lambda _: None)


def split_of(path: Path) -> str | None:
    """Return the split that a file's path names: "train", "valid", "test", or None.

    The path is searched for words such as "validation" or "dev"; see `nemo_lfr.io.splits`.
    """
    return split_of_parts([*path.parts[:-1], path.stem])
