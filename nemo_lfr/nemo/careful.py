"""Iterators that skip malformed lines of NeMo and Lhotse manifests.

`make_careful` searches the object that NeMo builds from a data config, and replaces the class of each iterator over
lines by one of the classes below.

NeMo pairs each line of some manifests with a line of another file, or with a file in a tar file. These lines cannot be
skipped, so a malformed one raises an error. See `StrictLines` and `TarredLines`.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.lazy import LazyJsonlIterator, LazyManifestIterator
from lhotse.serialization import deserialize_item, open_best
from lhotse.shar.readers.lazy import LazySharIterator
from nemo.collections.common.data.lhotse import dataloader as nemo_dataloader
from nemo.collections.common.data.lhotse.cutset import resolve_relative_paths
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator, LazyNeMoTarredIterator
from omegaconf import DictConfig

from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.io.cut_files import explain, read_shar
from nemo_lfr.io.manifests import NOT_A_LINE, describe, seconds

logger = logging.getLogger(__name__)

_reported: set[str] = set()


@contextmanager
def careful_iterators() -> Iterator[None]:
    """Inside a `with` block, make NeMo build data loaders that skip malformed lines."""
    stock = nemo_dataloader.read_cutset_from_config
    nemo_dataloader.read_cutset_from_config = partial(_read, stock)
    try:
        yield
    finally:
        nemo_dataloader.read_cutset_from_config = stock


def _read(stock: Callable[[Any], tuple[Any, bool]], config: DictConfig) -> tuple[Any, bool]:
    cuts_path = config.get("cuts_path")
    if config.get("input_cfg") is None and config.get("shar_path") is None and _is_json_lines(cuts_path):
        # The same as NeMo's code, except that Lhotse does not guess the type of the items from the first line.
        cuts = CutSet(CarefulCuts(cuts_path)).map(partial(resolve_relative_paths, manifest_path=cuts_path))
        return cuts, False
    try:
        cuts, is_tarred = stock(config)
    except json.JSONDecodeError as error:
        line = shorten(error.doc)
        raise ConfigError(
            f"a manifest of the data section contains a line that is not JSON ({error}): {line}; lines of this "
            "manifest cannot be skipped, so fix or remove the line."
        ) from error
    make_careful(cuts)
    return cuts, is_tarred


def _is_json_lines(path: Any) -> bool:
    return isinstance(path, str | Path) and ".jsonl" in Path(path).suffixes


def make_careful(root: Any) -> None:
    """Search a Lhotse or NeMo object for iterators over manifest lines, and make them skip malformed lines.

    An iterator that cannot skip lines raises an error that names the malformed line.

    Args:
        root: object to search. The classes of its iterators are changed in place.
    """
    seen: set[int] = set()
    waiting: list[tuple[Any, type]] = [(root, CarefulLines)]  # objects to search, and the class for iterators in them
    while waiting:
        item, lines = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, list | tuple):
            waiting += [(part, lines) for part in item]
        elif isinstance(item, dict):
            waiting += [(part, lines) for part in item.values()]
        elif type(item).__module__.startswith(("lhotse.", "nemo.")):
            if type(item) is LazyNeMoIterator and item.extra_fields:
                lines = StrictLines
            elif type(item) is LazyNeMoTarredIterator and not item.skip_missing_manifest_entries:
                lines = TarredLines
            elif type(item) is LazyJsonlIterator:
                item.__class__ = lines
            elif (careful := CAREFUL.get(type(item))) is not None and careful.can_replace(item):
                item.__class__ = careful
            waiting += [(part, lines) for part in getattr(item, "__dict__", {}).values()]


class CarefulLines(LazyJsonlIterator):
    """JSON-lines iterator that skips and logs lines that are not JSON objects."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (data for _, data in self.numbered())

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number (from 1) and the content of each line that is a JSON object.

        Other lines are skipped with a warning; see `lose`.

        Raises:
            ConfigError: if the file has lines but none of them is a JSON object.
        """
        losses = _Losses(self.path)
        with open_best(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    data = json.loads(line.decode("utf-8-sig"))
                    if not isinstance(data, dict):
                        raise ValueError(f"{shorten(line.decode())} is not a JSON object")
                except NOT_A_LINE as error:
                    self.lose(losses, number, describe(error))
                    continue
                losses.used += 1
                yield number, data
        losses.check()

    def lose(self, losses: "_Losses", number: int, reason: str) -> None:
        """Record and log a skipped line; `number` is counted from 1."""
        losses.add(f"line {number}", reason)


class StrictLines(CarefulLines):
    """JSON-lines iterator that raises an error for a malformed line.

    NeMo combines line N of some manifests with line N of another file, so no line may be skipped.
    """

    cause = "NeMo matches the lines of this manifest to those of other files by their numbers"
    advice = "fix the line, or remove it together with the matching lines of the other files"

    def lose(self, losses: "_Losses", number: int, reason: str) -> None:
        """Raise an error instead of skipping the line.

        Raises:
            ConfigError: always. The message names the file, the line and the reason.
        """
        raise ConfigError(
            f"{self.path}, line {number}: {reason}; the line cannot be skipped, because {self.cause}; {self.advice}."
        )


class TarredLines(StrictLines):
    """JSON-lines iterator for the manifest of a tar file.

    NeMo needs a manifest entry for each file in the tar file, so a malformed line is an error. With
    `skip_missing_manifest_entries`, NeMo skips files without an entry, and `CarefulLines` is used instead.
    """

    cause = "NeMo needs an entry for each file in the tar file"
    advice = (
        "fix the line, or remove it together with its audio in the tar file. If the audio stays in the tar file, set "
        "skip_missing_manifest_entries: true in dataloader_params"
    )


class CarefulCuts(LazyManifestIterator):
    """Iterator over Lhotse cuts that skips malformed lines and logs each of them once."""

    @staticmethod
    def can_replace(item: Any) -> bool:
        """Return True, because this class can replace every Lhotse manifest iterator."""
        return True

    def __iter__(self) -> Iterator[Any]:
        lines = CarefulLines(self.path)
        losses = _Losses(self.path)
        for number, data in lines.numbered():
            try:
                cut = deserialize_item(data)
            except Exception as error:  # Lhotse raises many exception classes
                losses.add(f"line {number}", f"not a Lhotse cut: {explain(error)}")
                continue
            losses.used += 1
            yield cut
        losses.check()


class CarefulManifest(LazyNeMoIterator):
    """Iterator over a NeMo manifest that skips unusable lines and logs each of them once.

    A line is unusable if it is malformed or its audio file cannot be opened.
    """

    @staticmethod
    def can_replace(item: Any) -> bool:
        """Return True, because this class can replace every NeMo manifest iterator."""
        return True

    def __iter__(self) -> Iterator[Any]:
        losses = _Losses(self.path)
        single = copy.copy(self)
        single.__class__ = LazyNeMoIterator
        for data in self.source:
            name = shorten(data.get("audio_filepath", data), 200)
            try:
                for key in ("duration", "offset"):
                    seconds(data, key)
                single.source = [data]
                cuts = list(single)
            except Exception as error:  # each audio library raises its own exception classes
                losses.add(name, describe(error) if isinstance(error, NOT_A_LINE) else shorten(error, 300))
                continue
            losses.used += 1
            yield from cuts
        losses.check()


class CarefulShar(LazySharIterator):
    """Iterator over Lhotse Shar files that skips damaged cuts and logs each of them once.

    A cut is damaged if its manifest line or its data cannot be read.
    """

    @staticmethod
    def can_replace(item: Any) -> bool:
        """Return whether all shard files of a Lhotse iterator are local files.

        If some are not, such as files in cloud storage, Lhotse's iterator is kept.
        """
        return all(Path(path).is_file() for shard in item.shards for path in shard.values())

    def __iter__(self) -> Iterator[Any]:
        shards = list(zip(self.shards, self.cut_map_fns, strict=True))
        generator = self._get_rng()
        shards = self._maybe_split_for_dataloading(self._maybe_shuffle_shards(shards))
        for shard, change in shards:
            cuts = self._cuts(shard)
            if self.slice_length is not None:
                whole = list(cuts)
                start = generator.randint(0, max(len(whole) - self.slice_length, 0))
                cuts = iter(whole[start : start + self.slice_length])
            for cut in cuts:
                cut.shard_origin, cut.shar_epoch = shard["cuts"], self.epoch
                yield cut if change is None else change(cut)
        self.epoch += 1

    @staticmethod
    def _cuts(shard: dict[str, Any]) -> Iterator[Any]:
        paths = {field: Path(path) for field, path in shard.items()}
        cuts = paths.pop("cuts")
        losses = _Losses(cuts)
        # URLs are allowed here. The dataset decides whether it reads audio from a URL.
        for item in read_shar(cuts, paths, allow_url=True):
            if item.problem is None:
                losses.used += 1
                yield item.cut
            else:
                losses.add(f"cut {shorten(item.id)}", item.problem)
        losses.check()


CAREFUL: dict[type, Any] = {
    LazyManifestIterator: CarefulCuts,
    LazyNeMoIterator: CarefulManifest,
    LazySharIterator: CarefulShar,
}


class _Losses:
    """Record of the entries (lines of a manifest, or cuts) that are skipped in one pass over a file.

    Each skipped entry is logged only once per process.

    Args:
        path: the file, for messages.

    Attributes:
        used: number of usable entries so far; the caller counts them.
    """

    def __init__(self, path: Any) -> None:
        self.path = path
        self.used = 0
        self._first = ""
        self._count = 0

    def add(self, place: str, reason: str) -> None:
        text = f"{shorten(self.path, 300)}, {place}: skipped: {reason}"
        self._first = self._first or text
        self._count += 1
        if text not in _reported:
            _reported.add(text)
            logger.warning("%s", text)

    def check(self) -> None:
        """Raise an error if no entry was usable.

        Raises:
            ConfigError: if entries were skipped and none was usable.
        """
        if self._count and not self.used:
            raise ConfigError(f"none of the {self._count} entries can be used; the first error is: {self._first}")
