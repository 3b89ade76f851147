"""PyTorch dataset over a folder of tokens, for training language models."""

import contextlib
import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import IterableDataset, get_worker_info

from nemo_lfr.corpus.order import EpochOrder
from nemo_lfr.corpus.token_folder import TokenFolder, TokenizedUtterance
from nemo_lfr.errors import NemoLfrError, TokensError, shorten
from nemo_lfr.io.shortage import sharing

__all__ = ["TokenDataset", "TokenizedUtterance", "Utterance", "collate"]

Utterance = TokenizedUtterance  # name in earlier versions


class TokenDataset(IterableDataset[TokenizedUtterance]):
    """Utterances of a folder of tokens in any format that `nemo-lfr tokenize` writes.

    In distributed training each rank reads its own share. All shares have the same length in every epoch, for any
    number of data loader workers. Do not add a sampler. With several ranks or data loader workers, call `set_epoch`
    before each epoch, as for `DistributedSampler`.

    `state_dict` and `load_state_dict` resume within an epoch. torchdata's `StatefulDataLoader` calls them, also with
    workers.

    Args:
        folder: the folder of tokens.
        shuffle: read the shards in random order, and shuffle utterances in a buffer.
        seed: random seed of the order.
        buffer_size: size of the shuffle buffer in utterances.
        bucket_size: yield utterances of similar length one after another, in groups of this size; pass the batch size
            of the data loader. The utterances of a buffer are sorted by length. None keeps the order.
        rank: rank of this process; by default that of `torch.distributed`, or 0. With Accelerate and the Hugging Face
            Trainer, which split batches themselves, pass 0 and a world size of 1, and `dispatch_batches=False` to
            them.
        world_size: number of processes; by default that of `torch.distributed`, or 1.
        drop_last: drop the last utterances if they do not suffice for every rank; otherwise some utterances are
            repeated, as in `DistributedSampler`.
        verify: compare the hash of every file before reading, not only its size.

    Raises:
        NemoLfrError: if the folder does not contain complete tokens, or shared memory cannot be allocated; while
            reading, if Accelerate splits what is split already.
        TokenFileError: while reading, for a damaged or truncated file.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer_size: int = 1000,
        bucket_size: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        verify: bool = False,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise NemoLfrError(f"rank is {rank} and world_size {world_size}; pass both or none.")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise NemoLfrError(f"rank {rank} is not between 0 and world_size - 1 ({world_size - 1}).")
        if buffer_size < 1:
            raise NemoLfrError(f"buffer_size is {buffer_size}; at least 1 utterance must fit.")
        if bucket_size is not None and not 1 <= bucket_size <= buffer_size:
            raise NemoLfrError(
                f"bucket_size is {bucket_size}, but must be between 1 and buffer_size, which is {buffer_size}."
            )
        self.tokens = TokenFolder(folder, verify=verify)
        self.folder, self.metadata = self.tokens.path, self.tokens.metadata
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.buffer_size, self.bucket_size = buffer_size, bucket_size
        self._given = None if rank is None or world_size is None else (rank, world_size)
        self._inherited: tuple[int, int, bool] | None = None
        self._epoch = _shared_zero()  # shared memory, so that data loader workers see updates
        self._progress: dict[str, int] | None = None
        self._resumed: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling, with the rank and world size resolved.

        A spawned data loader worker has no process group and could not look them up.
        """
        inherited = (*self._place(), _is_accelerated()) if _is_distributed() else self._inherited
        return self.__dict__ | {"_inherited": inherited}

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
        if self._inherited is not None:
            return self._inherited[:2]
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _is_distributed() else (0, 1)

    def _share(self, splitter: Any) -> tuple[int, int]:
        """Return the rank and the world size for a pass that `splitter` iterates.

        Raises:
            NemoLfrError: if the utterances would be split twice.
        """
        place = self._place()
        if _is_splitter(splitter):
            if self._given is not None and place[1] > 1 and splitter.num_processes > 1:
                raise NemoLfrError(
                    f"Accelerate would split the utterances of rank {place[0]} of {place[1]} again, among "
                    f"{splitter.num_processes} processes, and some would never be read; pass rank=0 and world_size=1 "
                    "to TokenDataset."
                )
            return 0, 1
        is_accelerated = self._inherited[2] if self._inherited is not None else _is_accelerated()
        if self._given is None and place[1] > 1 and is_accelerated:
            raise NemoLfrError(
                f"Accelerate is in use with {place[1]} processes, so rank and world_size of TokenDataset must be "
                "passed: 0 and 1 for a loader that `prepare` or the Trainer splits (with dispatch_batches=False), or "
                "process_index and num_processes for a loader that is not prepared."
            )
        return place

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the utterances.

        Without this call, a single process without data loader workers uses a new order in each pass.

        Args:
            epoch: number of the epoch.
        """
        self._epoch.fill_(epoch)
        self._progress, self._resumed = (
            state if state is not None and state["epoch"] == epoch else None
            for state in (self._progress, self._resumed)
        )

    def __len__(self) -> int:
        """Return the number of utterances that this rank reads in an epoch.

        It is the total over all data loader workers, and the same on every rank.
        """
        is_split = _is_splitter(sys._getframe(1).f_locals.get("self"))
        return self._length(1 if is_split else self.world_size)

    def _length(self, ranks: int) -> int:
        clips = sum(self.tokens.counts)
        return clips // ranks if self.drop_last else -(-clips // ranks)

    def __iter__(self) -> Iterator[TokenizedUtterance]:
        # Accelerate does not tell a dataset that it wraps it; only the calling frame shows that it splits the
        # utterances.
        rank, ranks = self._share(sys._getframe(1).f_locals.get("self"))
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        state, self._resumed = self._resumed or {"epoch": int(self._epoch), "position": 0}, None
        if state.get("workers", workers) != workers:
            raise NemoLfrError(f"the state was saved with {state['workers']} workers, but the loader has {workers}.")
        epoch, position = state["epoch"], state["position"]
        # Ranks must agree on the order, but one of them may have iterated more often than the others.
        if worker is None and self.world_size == 1:
            self._epoch.fill_(epoch + 1)
        shards = list(range(len(self.tokens.counts)))
        if self.shuffle:
            random.Random(f"{self.seed} {epoch}").shuffle(shards)
        share = self._length(ranks)
        start, stop = (rank * share + share * n // workers for n in (number, number + 1))
        order = EpochOrder(
            self.tokens,
            shards,
            range(start, stop),
            shuffle=self.shuffle,
            buffer_size=self.buffer_size,
            bucket_size=self.bucket_size,
            buffer_seed=f"{self.seed} {epoch} {rank * share} {number}",
            group_seed=f"{self.seed} {epoch}",
        )
        self._progress = {"epoch": epoch, "position": position}
        return _counted(order.read(position), self._progress)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the current epoch of this process or data loader worker.

        Returns:
            A dictionary of integers, texts and None. A `DataLoader` with workers reads in other processes; use
            torchdata's `StatefulDataLoader` to save their positions.
        """
        worker = get_worker_info()
        progress = self._resumed or self._progress or {"epoch": int(self._epoch), "position": 0}
        return self._settings() | {"workers": worker.num_workers if worker else 1} | progress

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the next pass at a saved position; later passes begin at the start of an epoch.

        A later `set_epoch` with another epoch discards the position.

        Args:
            state_dict: return value of `state_dict`.

        Raises:
            NemoLfrError: if the state belongs to other tokens, other arguments or another number of processes.
        """
        for name, value in self._settings().items():
            if name not in state_dict or state_dict[name] != value:
                raise NemoLfrError(
                    f"the state was saved with {name} {shorten(repr(state_dict.get(name)))}, but this dataset has "
                    f"{value!r}; create the dataset with the same value, or start a new epoch without the state."
                )
        for name, least in (("epoch", 0), ("position", 0), ("workers", 1)):
            if type(state_dict.get(name)) is not int or state_dict[name] < least:
                raise NemoLfrError(f"the state's {name} is {shorten(repr(state_dict.get(name)))}, not a count.")
        self._resumed = {name: state_dict[name] for name in ("epoch", "position", "workers")}

    def _settings(self) -> dict[str, Any]:
        """Return the values on which the order depends."""
        names = ("shuffle", "seed", "buffer_size", "bucket_size", "drop_last", "world_size")
        codec = self.tokens.codec.fingerprint
        counts = ",".join(map(str, self.tokens.counts))
        digest = hashlib.sha256(f"{codec} {counts}".encode()).hexdigest()[:16]
        return {"tokens": digest} | {name: getattr(self, name) for name in names}

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
        raise TokensError("no utterances to batch; pass at least one.")
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


def _is_accelerated() -> bool:
    """Return whether an `Accelerator` exists in this process; the Hugging Face Trainer creates one."""
    state = sys.modules.get("accelerate.state")
    return state is not None and bool(state.is_initialized())


def _is_splitter(caller: Any) -> bool:
    """Return whether the caller is the wrapper of Accelerate or the Trainer, which drops what other ranks read."""
    return any(base.__name__ == "IterableDatasetShard" for base in type(caller).__mro__)


def _counted(utterances: Iterator[TokenizedUtterance], progress: dict[str, int]) -> Iterator[TokenizedUtterance]:
    for utterance in utterances:
        progress["position"] += 1
        yield utterance


# A data loader without `collate_fn` selects the function by the type of the items.
with contextlib.suppress(ImportError):
    from torch.utils.data._utils.collate import default_collate_fn_map

    default_collate_fn_map[TokenizedUtterance] = lambda batch, *, collate_fn_map=None: collate(batch)
