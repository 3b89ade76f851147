"""NeMo's and Lhotse's iterators over manifests, made to lose one clip to a bad line instead of ending the training.

NeMo builds its data from configs, whose forms are many: lists, weights, groups, buckets. It does so here too; what it
has built is then searched for the iterators that read lines, and each of them becomes one of the classes below. Shards
of NeMo's tar files are read by NeMo alone, with an error that says which line to mend.
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
    """Have NeMo's loader, which is made inside, read its lines carefully."""
    stock = nemo_dataloader.read_cutset_from_config
    nemo_dataloader.read_cutset_from_config = partial(_read, stock)
    try:
        yield
    finally:
        nemo_dataloader.read_cutset_from_config = stock


def _read(stock: Callable[[Any], tuple[Any, bool]], config: DictConfig) -> tuple[Any, bool]:
    cuts_path = config.get("cuts_path")
    if config.get("input_cfg") is None and config.get("shar_path") is None and _is_json_lines(cuts_path):
        # As NeMo does it, but for the first line, from which Lhotse guesses what the file holds.
        cuts = CutSet(CarefulCuts(cuts_path)).map(partial(resolve_relative_paths, manifest_path=cuts_path))
        return cuts, False
    try:
        cuts, is_tarred = stock(config)
    except json.JSONDecodeError as error:
        line = shorten(error.doc)
        raise ConfigError(
            f"a manifest of the data section holds a line that is not JSON ({error}): {line}; NeMo reads this file as "
            "a whole, so mend or remove that line."
        ) from error
    make_careful(cuts)
    return cuts, is_tarred


def _is_json_lines(path: Any) -> bool:
    return isinstance(path, str | Path) and ".jsonl" in Path(path).suffixes


def make_careful(root: Any) -> None:
    """Turn the iterators of lines below an object of Lhotse's or NeMo's into careful ones."""
    seen: set[int] = set()
    waiting: list[tuple[Any, type]] = [(root, CarefulLines)]  # with the lines of the manifest that holds it
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
    """JSON lines; one that is not an object of JSON is named once and left out."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (data for _, data in self.numbered())

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of each line, from 1, and what it holds."""
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
        """Report a line that cannot be used."""
        losses.add(f"line {number}", reason)


class StrictLines(CarefulLines):
    """JSON lines of a manifest that NeMo reads side by side with other files: a line left out would shift them."""

    advice = "mend or remove it, and what belongs to it in the other files"

    def lose(self, losses: "_Losses", number: int, reason: str) -> None:
        raise ConfigError(
            f"{self.path}, line {number}: {reason}; NeMo reads other files side by side with this manifest, so that "
            f"no line can be left out: {self.advice}."
        )


class TarredLines(StrictLines):
    """JSON lines of a manifest whose entries NeMo looks up for each file of a tar."""

    advice = (
        "mend or remove it, and set skip_missing_manifest_entries: true in dataloader_params if its audio stays in "
        "the tar file"
    )


class CarefulCuts(LazyManifestIterator):
    """Lhotse's cuts; a line that is none is named once and left out."""

    @staticmethod
    def can_replace(item: Any) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        lines = CarefulLines(self.path)
        losses = _Losses(self.path)
        for number, data in lines.numbered():
            try:
                cut = deserialize_item(data)
            except Exception as error:  # of Lhotse's many classes
                losses.add(f"line {number}", f"not a Lhotse cut: {explain(error)}")
                continue
            losses.used += 1
            yield cut
        losses.check()


class CarefulManifest(LazyNeMoIterator):
    """NeMo's manifests; a line that is none, or whose file cannot be opened, is named once and left out."""

    @staticmethod
    def can_replace(item: Any) -> bool:
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
            except Exception as error:  # of whichever of the audio libraries
                losses.add(name, describe(error) if isinstance(error, NOT_A_LINE) else shorten(error, 300))
                continue
            losses.used += 1
            yield from cuts
        losses.check()


class CarefulShar(LazySharIterator):
    """Lhotse's Shar; a cut that is damaged, or whose data is, is named once and left out."""

    @staticmethod
    def can_replace(item: Any) -> bool:
        """Whether all its files are here; others, as of cloud storage, are Lhotse's to open."""
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
        # Audio at a URL is opened, or not, by the dataset.
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
    """What one pass over a file lost; each is reported once in the life of a process."""

    def __init__(self, path: Any) -> None:
        self.path = path
        self.used = 0
        self._first = ""
        self._count = 0

    def add(self, place: str, reason: str) -> None:
        text = f"{shorten(self.path, 300)}, {place}: left out: {reason}"
        self._first = self._first or text
        self._count += 1
        if text not in _reported:
            _reported.add(text)
            logger.warning("%s", text)

    def check(self) -> None:
        """Raise if nothing could be used: a training would wait forever for a batch.

        Raises:
            ConfigError: naming the first line that could not be used.
        """
        if self._count and not self.used:
            raise ConfigError(f"none of {self._count} lines can be used; the first: {self._first}")
