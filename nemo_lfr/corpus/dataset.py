"""Tokens of a corpus, read again: for a language model that is trained on them, or to hear them."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from nemo_lfr.corpus.inputs import require
from nemo_lfr.corpus.run import METADATA
from nemo_lfr.corpus.token_tensor import read_token_tensor
from nemo_lfr.errors import NemoLfrError


@dataclass(frozen=True)
class Utterance:
    """One clip's tokens.

    Attributes:
        id: as `tokenize` named it.
        tokens: int64 [C, T].
        num_samples: the samples they stand for.
        context: tokens of its context, int64 [C, T]; None if there is none.
        labels: "text", "speaker" and what else the corpus said.
    """

    id: str
    tokens: torch.Tensor
    num_samples: int
    context: torch.Tensor | None = None
    labels: dict[str, Any] = field(default_factory=dict)


class TokenDataset(IterableDataset):
    """The utterances of a folder that `nemo-lfr tokenize` wrote, in any of its formats.

    Loader workers and the processes of a distributed training take different shards. Where there are workers, call
    `set_epoch` before each epoch, as with a `DistributedSampler`.

    Args:
        folder: the tokens.
        shuffle: read shards in random order, and utterances through a buffer.
        seed: of the order.
        buffer_size: utterances of the buffer.
        rank, world_size: which process this is, and how many there are.

    Raises:
        NemoLfrError: if the folder holds no finished tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer_size: int = 1000,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.folder = Path(folder)
        try:
            self.metadata: dict[str, Any] = json.loads((self.folder / METADATA).read_text(encoding="utf-8"))
            self._read = READERS[self.metadata["format"]]
        except FileNotFoundError:
            raise NemoLfrError(
                f"{folder}: no {METADATA}; give a folder that `nemo-lfr tokenize` wrote, and has finished."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NemoLfrError(f"{folder}/{METADATA}: cannot be read: {error!r}.") from error
        self.shuffle, self.seed, self.buffer_size = shuffle, seed, buffer_size
        self.rank, self.world_size = rank, world_size
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # a loader's workers see it too

    @property
    def num_codebooks(self) -> int:
        """C: tokens of one frame."""
        return self.metadata["codec"]["num_codebooks"]

    @property
    def codebook_size(self) -> int:
        """Entries of one codebook."""
        return int(np.prod(self.metadata["codec"]["levels"]))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; without it, each pass outside of loader workers has another."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Utterances; of one of several processes, about its share."""
        return -(-self.metadata["clips"] // self.world_size)

    def __iter__(self) -> Iterator[Utterance]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shards = list(range(self.metadata["shards"]))
        order = random.Random(f"{self.seed} {int(self._epoch)}")
        if worker is None:
            self._epoch += 1
        if self.shuffle:
            order.shuffle(shards)
        mine = shards[self.rank * workers + number :: self.world_size * workers]
        utterances = (utterance for shard in mine for utterance in self._read(self.folder, shard, self.metadata))
        yield from _buffered(utterances, order, self.buffer_size) if self.shuffle else utterances


def _buffered(utterances: Iterator[Utterance], order: random.Random, size: int) -> Iterator[Utterance]:
    held: list[Utterance] = []
    for utterance in utterances:
        if len(held) < size:
            held.append(utterance)
        else:
            place = order.randrange(size)
            yield held[place]
            held[place] = utterance
    order.shuffle(held)
    yield from held


def _read_shar(folder: Path, shard: int, metadata: dict[str, Any]) -> Iterator[Utterance]:
    lhotse = require("lhotse", "corpus")
    fields = {"cuts": [str(folder / f"cuts/cuts.{shard:06d}.jsonl.gz")]}
    for name in ("target_codes", *(["context_codes"] if metadata["context"] else [])):
        fields[name] = [str(folder / name / f"codes.{shard:06d}.tar")]
    for cut in lhotse.CutSet.from_shar(fields=fields):
        said = cut.supervisions[0]
        labels = {"text": said.text, "speaker": said.speaker, "lang": said.language, **(said.custom or {})}
        context = _tensor(cut.context_codes.load()) if cut.has_custom("context_codes") else None
        yield Utterance(cut.id, _tensor(cut.target_codes.load()), cut.custom["num_samples"], context, labels)


def _read_parquet(folder: Path, shard: int, metadata: dict[str, Any]) -> Iterator[Utterance]:
    parquet = require("pyarrow.parquet", "corpus")
    layers = range(1, metadata["codec"]["num_codebooks"] + 1)
    for row in parquet.read_table(folder / f"data/{shard:06d}.parquet").to_pylist():
        labels = json.loads(row["labels"]) | {key: row[key] for key in ("text", "speaker") if row[key] is not None}
        tokens = _tensor([row[f"nano_layer_{number}"] for number in layers])
        context = None
        if row.get("context_layer_1") is not None:
            context = _tensor([row[f"context_layer_{number}"] for number in layers])
        yield Utterance(row["id"], tokens, row["num_samples"], context, labels)


def _read_manifest(folder: Path, shard: int, metadata: dict[str, Any]) -> Iterator[Utterance]:
    for line in _lines(folder, shard, metadata):
        target, context = (
            read_token_tensor(folder / f"{name}_codes/{line['id']}.pt") if f"{name}_audio_codes_path" in line else None
            for name in ("target", "context")
        )
        assert target is not None
        yield Utterance(line["id"], target, line["num_samples"], context, line)


def _read_lfr(folder: Path, shard: int, metadata: dict[str, Any]) -> Iterator[Utterance]:
    from nemo_lfr.tokens.format import TokenReader

    for line in _lines(folder, shard, metadata):
        with TokenReader(folder / line["tokens_filepath"]) as reader:
            tokens = np.concatenate([np.zeros((reader.metadata.num_codebooks, 0)), *reader.blocks()], axis=1)
            yield Utterance(line["id"], _tensor(tokens), reader.num_samples, None, line)


def _lines(folder: Path, shard: int, metadata: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The shard's share of the manifest."""
    with open(folder / "manifest.json", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % metadata["shards"] == shard:
                yield json.loads(line)


def _tensor(tokens: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tokens, dtype=np.int64))


READERS: dict[str, Callable[[Path, int, dict[str, Any]], Iterator[Utterance]]] = {
    "shar": _read_shar,
    "manifest": _read_manifest,
    "parquet": _read_parquet,
    "lfr": _read_lfr,
}
