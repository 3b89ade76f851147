"""PyTorch dataset over a folder of tokens, for training language models."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from nemo_lfr.corpus.token_folder import TokenFolder, TokenizedUtterance
from nemo_lfr.errors import NemoLfrError, TokensError
from nemo_lfr.io.shortage import sharing

__all__ = ["TokenDataset", "TokenizedUtterance", "Utterance", "collate"]

Utterance = TokenizedUtterance  # name in earlier versions


class TokenDataset(IterableDataset[TokenizedUtterance]):
    """Utterances of a folder of tokens in any format that `nemo-lfr tokenize` writes.

    In distributed training each rank reads its own share. All shares have the same length in every epoch, for any
    number of data loader workers. Do not add a sampler. With several ranks or data loader workers, call `set_epoch`
    before each epoch, as for `DistributedSampler`.

    Args:
        folder: the folder of tokens.
        shuffle: read the shards in random order, and shuffle utterances in a buffer.
        seed: random seed of the order.
        buffer_size: size of the shuffle buffer in utterances.
        rank: rank of this process; by default that of `torch.distributed`, or 0. Pass 0 if another component splits
            the batches, as Accelerate and the Hugging Face Trainer do.
        world_size: number of processes; by default that of `torch.distributed`, or 1 (valid only with rank 0).
        drop_last: drop the last utterances if they do not suffice for every rank; otherwise some utterances are
            repeated, as in `DistributedSampler`.
        verify: compare the hash of every file before reading, not only its size.

    Raises:
        NemoLfrError: if the folder does not contain complete tokens, or shared memory cannot be allocated.
        TokenFileError: while reading, for a damaged or truncated file.
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
        self._epoch = _shared_zero()  # shared memory, so that data loader workers see updates

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling, with the rank and world size resolved.

        A spawned data loader worker has no process group and could not look them up.
        """
        return self.__dict__ | ({"_given": self._place()} if _is_distributed() else {})

    @property
    def num_codebooks(self) -> int:
        """Return the number of codebooks C, which is the number of tokens per frame."""
        return self.tokens.codec.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Return the number of entries of one codebook."""
        return self.tokens.codec.codebook_size

    @property
    def rank(self) -> int:
        """Return the rank of this process."""
        return self._place()[0]

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self._place()[1]

    def _place(self) -> tuple[int, int]:
        """Return the rank and the world size.

        They are looked up on use because the process group may be initialized after the dataset is created.
        """
        if self._given is not None:
            return self._given
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _is_distributed() else (0, 1)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the utterances.

        Without this call, a single process without data loader workers uses a new order in each pass.

        Args:
            epoch: number of the epoch.
        """
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Return the number of utterances that this rank reads in an epoch.

        It is the total over all data loader workers, and the same on every rank.
        """
        clips, ranks = sum(self.tokens.counts), self.world_size
        return clips // ranks if self.drop_last else -(-clips // ranks)

    def __iter__(self) -> Iterator[TokenizedUtterance]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        epoch = int(self._epoch)
        # Ranks must agree on the order, but one of them may have iterated more often than the others.
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
        """Yield the ranges (shard, first, end) for positions [start, stop) of an epoch.

        Positions beyond the number of utterances start again at the first one.
        """
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
        """Collate utterances into a batch; see `collate`."""
        return collate(utterances, pad)


def collate(utterances: Sequence[TokenizedUtterance], pad: int = 0) -> dict[str, Any]:
    """Collate utterances of different lengths into a padded batch.

    Args:
        utterances: at least one utterance.
        pad: token that fills shorter utterances.

    Returns:
        `id` and `labels` (lists), `tokens` [B, C, T], `tokens_len` [B], `mask` [B, T] (true for valid frames) and
        `num_samples` [B]. If any utterance has a context, also `context` [B, C, T], `context_len` [B] (0 for an
        utterance without context) and `context_mask` [B, T].

    Raises:
        TokensError: if `utterances` is empty.
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
        zero = torch.zeros((), dtype=torch.int64)
        cast(Callable[[], torch.Tensor], zero.share_memory_)()  # torch declares no types for it
        return zero


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


# A data loader without `collate_fn` selects the function by the type of the items.
with contextlib.suppress(ImportError):
    from torch.utils.data._utils.collate import default_collate_fn_map

    default_collate_fn_map[TokenizedUtterance] = lambda batch, *, collate_fn_map=None: collate(batch)
