"""Tokens of a corpus as a PyTorch dataset, for a language model that is trained on them."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from nemo_lfr.corpus.token_folder import TokenFolder, TokenizedUtterance
from nemo_lfr.errors import NemoLfrError, TokensError
from nemo_lfr.io.shortage import sharing

__all__ = ["TokenDataset", "TokenizedUtterance", "Utterance", "collate"]

Utterance = TokenizedUtterance  # the name of earlier versions


class TokenDataset(IterableDataset):
    """The utterances of a folder that `nemo-lfr tokenize` wrote, in any of its formats.

    In a distributed training each rank reads its own share, and all shares are equally long in every epoch, for any
    number of loader workers; do not add a sampler. Where there are several ranks or loader workers, call `set_epoch`
    before each epoch, as with a `DistributedSampler`.

    Args:
        folder: the tokens.
        shuffle: read shards in random order, and utterances through a buffer.
        seed: of the order.
        buffer_size: utterances of the buffer.
        rank: number of this process; that of `torch.distributed` by default, or 0. Pass 0 if something else splits
            the batches, as Accelerate and Hugging Face's Trainer do.
        world_size: number of processes; that of `torch.distributed` by default, or 1, which goes with a rank of 0.
        drop_last: leave out the last utterances where they do not suffice for every rank; otherwise some are
            repeated, as `DistributedSampler` does it.
        verify: compare the hash of every file before it is read, not only its size.

    Raises:
        NemoLfrError: if the folder holds no finished tokens, or the machine has no shared memory to give.
        TokenFileError: while reading, for a file that is damaged or was cut short.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer_size: int = 1000,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        verify: bool = False,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise NemoLfrError(f"rank is {rank} and world_size {world_size}; pass both or none.")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise NemoLfrError(f"rank {rank} is not below world_size {world_size}, or negative.")
        if buffer_size < 1:
            raise NemoLfrError(f"buffer_size is {buffer_size}; at least 1 utterance must fit.")
        self.tokens = TokenFolder(folder, verify=verify)
        self.folder, self.metadata = self.tokens.path, self.tokens.metadata
        self.shuffle, self.seed, self.buffer_size, self.drop_last = shuffle, seed, buffer_size, drop_last
        self._given = None if rank is None or world_size is None else (rank, world_size)
        self._epoch = _shared_zero()  # a loader's workers see it too

    def __getstate__(self) -> dict[str, Any]:
        """A loader's worker that is spawned knows no process group; what this process knows goes with the dataset."""
        return self.__dict__ | ({"_given": self._place()} if _is_distributed() else {})

    @property
    def num_codebooks(self) -> int:
        """C: tokens of one frame."""
        return self.tokens.codec.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Entries of one codebook."""
        return self.tokens.codec.codebook_size

    @property
    def rank(self) -> int:
        return self._place()[0]

    @property
    def world_size(self) -> int:
        return self._place()[1]

    def _place(self) -> tuple[int, int]:
        """Rank and world size, looked up when they are needed: the process group may come after the dataset."""
        if self._given is not None:
            return self._given
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _is_distributed() else (0, 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; without it, each pass of a single process without workers has another."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Utterances that this rank reads in an epoch, over all loader workers; the same on every rank."""
        clips, ranks = sum(self.tokens.counts), self.world_size
        return clips // ranks if self.drop_last else -(-clips // ranks)

    def __iter__(self) -> Iterator[TokenizedUtterance]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        epoch = int(self._epoch)
        # Ranks must agree on the order, and one of them may have looked at the data once more than the others.
        if worker is None and self.world_size == 1:
            self._epoch += 1
        shards = list(range(len(self.tokens.counts)))
        if self.shuffle:
            random.Random(f"{self.seed} {epoch}").shuffle(shards)
        share = len(self)
        first = self.rank * share
        spans = self._spans(shards, first + share * number // workers, first + share * (number + 1) // workers)
        utterances = self._read(spans)
        if not self.shuffle:
            return utterances
        return _buffered(utterances, random.Random(f"{self.seed} {epoch} {first} {number}"), self.buffer_size)

    def _spans(self, shards: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Parts (shard, first, end) of shards that hold positions [start, stop) of an epoch, which begins anew."""
        ends = np.cumsum([self.tokens.counts[shard] for shard in shards])
        while start < stop:
            offset = start % int(ends[-1])
            place = int(np.searchsorted(ends, offset, side="right"))
            count = self.tokens.counts[shards[place]]
            begin = offset - (int(ends[place]) - count)
            end = min(count, begin + stop - start)
            yield shards[place], begin, end
            start += end - begin

    def _read(self, spans: Iterator[tuple[int, int, int]]) -> Iterator[TokenizedUtterance]:
        for span in spans:
            for utterance in self.tokens.read(*span):
                if not isinstance(utterance, TokenizedUtterance):
                    raise utterance
                yield utterance

    @staticmethod
    def collate(utterances: Sequence[TokenizedUtterance], pad: int = 0) -> dict[str, Any]:
        """See `collate`."""
        return collate(utterances, pad)


def collate(utterances: Sequence[TokenizedUtterance], pad: int = 0) -> dict[str, Any]:
    """Make a batch of utterances of different lengths.

    Args:
        utterances: at least one.
        pad: token behind the end of shorter ones.

    Returns:
        `id` and `labels`, lists; `tokens` [B, C, T], `tokens_len` [B], `mask` [B, T], true where there is a frame,
        `num_samples` [B]; where an utterance has a context also `context` [B, C, T], `context_len` [B], 0 where there
        is none, and `context_mask` [B, T].

    Raises:
        TokensError: without utterances.
    """
    if not utterances:
        raise TokensError("no utterances to make a batch of; pass at least one.")
    batch: dict[str, Any] = {
        "id": [utterance.id for utterance in utterances],
        "labels": [utterance.labels for utterance in utterances],
        "num_samples": torch.tensor([utterance.num_samples for utterance in utterances]),
    }
    batch["tokens"], batch["tokens_len"], batch["mask"] = _pad([utterance.tokens for utterance in utterances], pad)
    if any(utterance.context is not None for utterance in utterances):
        none = utterances[0].tokens[:, :0]
        contexts = [none if utterance.context is None else utterance.context for utterance in utterances]
        batch["context"], batch["context_len"], batch["context_mask"] = _pad(contexts, pad)
    return batch


def _pad(rows: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([row.shape[1] for row in rows])
    padded = torch.full((len(rows), rows[0].shape[0], int(lengths.max())), pad, dtype=torch.int64)
    for place, row in zip(padded, rows, strict=True):
        place[:, : row.shape[1]] = row
    return padded, lengths, torch.arange(padded.shape[2]) < lengths[:, None]


def _shared_zero() -> torch.Tensor:
    with sharing("a loader's workers"):
        return torch.zeros((), dtype=torch.int64).share_memory_()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _buffered(
    utterances: Iterator[TokenizedUtterance], order: random.Random, size: int
) -> Iterator[TokenizedUtterance]:
    held: list[TokenizedUtterance] = []
    for utterance in utterances:
        if len(held) < size:
            held.append(utterance)
        else:
            place = order.randrange(size)
            yield held[place]
            held[place] = utterance
    order.shuffle(held)
    yield from held


# A loader without `collate_fn` makes batches by type.
with contextlib.suppress(ImportError):
    from torch.utils.data._utils.collate import default_collate_fn_map

    default_collate_fn_map[TokenizedUtterance] = lambda batch, *, collate_fn_map=None: collate(batch)
