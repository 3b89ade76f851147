"""Reader for datasets that Hugging Face `datasets` saved with `save_to_disk`."""

import json
from collections.abc import Iterator
from pathlib import Path

from nemo_lfr.corpus.ids import path_inside
from nemo_lfr.corpus.sources.base import Clip, OpenOptions, ShardSpec
from nemo_lfr.corpus.sources.table import ROWS, Table
from nemo_lfr.errors import ConfigError, NemoLfrError, shorten
from nemo_lfr.io.arrow_streams import check_stream
from nemo_lfr.io.manifests import NOT_A_LINE, describe
from nemo_lfr.io.numbered import check_numbered
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.segment_columns import SegmentCheck
from nemo_lfr.io.shortage import require


class SavedDataset(Table):
    """Reader for a dataset that Hugging Face `datasets` saved with `save_to_disk`.

    `datasets` reads the rows, but this package decodes the audio.

    Args:
        path: folder of the dataset, or of a `DatasetDict` with one split.
        audio_dir: folder that relative paths are resolved against; None for the folder of the dataset.

    Raises:
        ConfigError: if the folder is not a valid dataset, contains several splits, or has no column of audio.
    """

    def __init__(self, path: Path, audio_dir: Path | None = None) -> None:
        datasets = require("datasets")
        path = _only_split(path)
        _check_files(path)
        try:
            self.rows = datasets.load_from_disk(str(path))
            columns = self.rows.column_names
        except Exception as error:  # `datasets` has many readers, each with its own errors
            raise ConfigError(
                f"{path}: datasets.load_from_disk cannot read this folder ({shorten(error, 200)}); save it again."
            ) from error
        if isinstance(columns, dict):
            raise ConfigError(
                f"{path}: the folder contains the splits {', '.join(sorted(columns))}; pass the folder of one split."
            )
        features = self.rows.features.to_dict()
        self.rows = self.rows.with_format("arrow")
        names = ("state.json", "dataset_info.json")
        files = [*(path / name for name in names if (path / name).is_file()), *sorted(path.glob("*.arrow"))]
        super().__init__(path, files, self.rows.features.arrow_schema, features, audio_dir)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path is a saved dataset."""
        if not path.is_dir():
            return False
        names = ("state.json", "dataset_dict.json", "*/state.json")
        return any(list(path.glob(name)) for name in names) or _lacks_state(path)

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "SavedDataset":
        """Open the dataset."""
        if _lacks_state(path):
            raise ConfigError(
                f"{path}: a saved dataset without its state.json; copy this file too, or save the dataset with "
                "save_to_disk and pass the new folder."
            )
        if not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
            splits = sorted(state.parent.name for state in path.glob("*/state.json"))
            raise ConfigError(
                f"{path}: the folder contains the saved datasets {', '.join(splits)}; pass the folder of one of them."
            )
        table = cls(path, options.audio_dir)
        if options.relist:  # log in the process that plans the run, not in each worker
            table.log_choices()
        return table

    def shards(self, size: int) -> list[ShardSpec]:
        """Split the rows into shards of `size` rows.

        Raises:
            SegmentsNotReadError: if several rows with a column such as `start` list the same file.
        """
        total = len(self.rows)
        if chosen := self._checked_columns(self.rows.column_names):
            check = SegmentCheck()
            self._check_segments(check, str(self.path), self.rows.select_columns(chosen)[:total])
            check.finish()
        return [{"start": start, "count": min(size, total - start)} for start in range(0, total, size)]

    def read(self, shard: ShardSpec) -> Iterator[Clip]:
        """Yield the clips of a shard in order."""
        stop = shard["start"] + shard["count"]
        for start in range(shard["start"], stop, ROWS):
            yield from self._clips(self.rows[start : min(start + ROWS, stop)], start)


def _lacks_state(path: Path) -> bool:
    """Return whether a folder has the files of a saved dataset except state.json, like the cache of `datasets`."""
    return (
        (path / "dataset_info.json").is_file()
        and not (path / "state.json").exists()
        and next(path.glob("*.arrow"), None) is not None
    )


def _only_split(path: Path) -> Path:
    """Return the folder of the split if `path` is a saved `DatasetDict` with one split; otherwise `path`."""
    listing = path / "dataset_dict.json"
    if (path / "state.json").exists() or not listing.exists():
        return path
    try:
        with open_regular(listing, ConfigError) as file:
            splits = json.loads(file.read())["splits"]
        names = [name for name in splits if isinstance(name, str)]
    except NOT_A_LINE as error:
        raise ConfigError(f"{listing}: file is damaged ({describe(error)}); save the dataset again.") from error
    if len(names) != 1 or len(splits) != 1:
        return path
    if path_inside(path, names[0]) is None or Path(names[0]).name != names[0]:
        raise ConfigError(
            f"{listing}: the split {shorten(names[0])!r} is not the name of a folder beside this file; save the "
            "dataset again."
        )
    return path / names[0]


def _check_files(path: Path) -> None:
    """Check the files of a saved dataset before `datasets` opens them.

    Raises:
        ConfigError: if the dataset has no rows, or if a file is missing, damaged or unsafe to open.
    """
    state = path / "state.json"
    for file in [match for name in ("*.json", "*.arrow") for match in sorted(path.glob(name))]:
        open_regular(file, ConfigError).close()
    if not state.is_file():
        return
    try:
        named = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        bad = next((name for name in named if not isinstance(name, str) or Path(name).name != name), None)
    except NOT_A_LINE as error:
        raise ConfigError(f"{state}: file is damaged ({describe(error)}); save the dataset again.") from error
    if bad is not None:
        raise ConfigError(f"{state}: {shorten(bad)!r} is not a file in this folder; save the dataset again.")
    if not named:
        raise ConfigError(f"{path}: the saved dataset has no rows; save one that has rows.")
    check_numbered(path, [path / name for name in named])
    for name in named:
        if path_inside(path, name) is None:
            raise ConfigError(
                f"{path / name}: the file is a link that leads out of its folder and is not followed; copy the file "
                "into the folder."
            )
        if (path / name).is_file():
            try:
                check_stream(path / name)
            except NemoLfrError as error:
                raise ConfigError(str(error)) from error
