"""PyTorch dataset that reads a folder of tokens, for training language models."""

import contextlib
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import torch
from torch.utils.data import IterableDataset, get_worker_info

from nemo_lfr.arguments import check_flag, check_whole_number
from nemo_lfr.corpus.order import EpochOrder
from nemo_lfr.corpus.token_folder import TokenFolder, TokenizedUtterance
from nemo_lfr.errors import NemoLfrError, TokensError, quoted, shorten

__all__ = ["TokenDataset", "TokenizedUtterance", "Utterance", "collate"]

Utterance = TokenizedUtterance  # name of the class in earlier versions


class TokenDataset(IterableDataset[TokenizedUtterance]):
    """Iterable dataset of the utterances in a folder that `nemo-lfr tokenize` wrote, in any of its formats.

    In distributed training, each rank reads its own share of the utterances, so do not add a sampler. All ranks read
    the same number of utterances in every epoch, for any number of data loader workers. With several ranks or data
    loader workers, call `set_epoch` before each epoch, as for `DistributedSampler`.

    Use `state_dict` and `load_state_dict` to resume within an epoch. torchdata's `StatefulDataLoader` calls these
    methods itself, with or without workers.

    Args:
        folder: the folder of tokens.
        shuffle: read the shards in random order, and shuffle their utterances in a buffer.
        seed: random seed of the order.
        buffer_size: size of the shuffle buffer in utterances.
        bucket_size: number of utterances of similar length that are yielded one after another; pass the batch size of
            the data loader. None does not group utterances.
        rank: rank of this process; by default the rank in `torch.distributed`, or 0. Accelerate and the Hugging Face
            Trainer split batches among processes themselves: with them, pass `rank=0` and `world_size=1`, and
            configure them with `dispatch_batches=False`.
        world_size: number of processes; by default the world size of `torch.distributed`, or 1.
        drop_last: drop the last utterances if the number of utterances is not a multiple of the number of ranks. By
            default, some utterances are repeated instead, as in `DistributedSampler`.
        verify: before a file is read, compare its hash, and not only its size, with the record of the run.

    Raises:
        NemoLfrError: if an argument is invalid, or the folder does not contain the tokens of a complete run. While
            reading, also if data loader workers have no shared memory, or if `rank` and `world_size` do not fit
            Accelerate.
        TokenFileError: while reading, if a file is damaged or truncated.
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
        buffer_size = check_whole_number(buffer_size, "buffer_size", 1)
        if bucket_size is not None:
            bucket_size = check_whole_number(bucket_size, "bucket_size", 1, buffer_size)
        if (rank is None) != (world_size is None):
            raise NemoLfrError(f"rank is {rank} and world_size is {world_size}; pass both or neither.")
        if rank is not None and world_size is not None:
            world_size = check_whole_number(world_size, "world_size", 1)
            rank = check_whole_number(rank, "rank", 0, world_size - 1)
        seed = check_whole_number(seed, "seed", -(2**63), 2**63 - 1)
        shuffle, drop_last = check_flag(shuffle, "shuffle"), check_flag(drop_last, "drop_last")
        self.tokens = TokenFolder(folder, verify=check_flag(verify, "verify"))
        self.folder, self.metadata = self.tokens.path, self.tokens.metadata
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.buffer_size, self.bucket_size = buffer_size, bucket_size
        self._given = None if rank is None or world_size is None else (rank, world_size)
        self._inherited: tuple[int, int, bool] | None = None
        self._shared_epoch, self._owner = _shared(torch.zeros((), dtype=torch.int64)), os.getpid()
        self._progress: dict[str, int] | None = None
        self._resumed: dict[str, Any] | None = None
        _DATASETS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling, which includes the rank and the world size.

        A spawned data loader worker has no process group from which it could read these values.
        """
        self._own_epoch()
        inherited = (*self._place(), _is_accelerated()) if _is_distributed() else self._inherited
        return self.__dict__ | {"_inherited": inherited}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied dataset, with its epoch in shared memory.

        A spawned data loader worker shares the epoch of its parent. A copy from `copy.deepcopy` gets a separate epoch.
        """
        self.__dict__.update(state)
        self._shared_epoch = _shared(self._shared_epoch)  # does nothing if it is in shared memory
        _DATASETS.add(self)

    @property
    def _epoch(self) -> torch.Tensor:
        """The current epoch, in memory that this process shares with its data loader workers, if possible."""
        self._own_epoch()
        return self._shared_epoch

    def _own_epoch(self) -> None:
        """Copy the tensor with the epoch if another process, such as the parent of this rank, created it.

        Without the copy, passes over the dataset in this process would change the order in the other process. Data
        loader workers share the epoch of the process that started them.
        """
        if get_worker_info() is None:
            epoch = self._shared_epoch if self._owner == os.getpid() else self._shared_epoch.clone()
            self._shared_epoch, self._owner = _shared(epoch), os.getpid()

    @property
    def num_codebooks(self) -> int:
        """Return the number of codebooks C, which equals the number of tokens per frame."""
        return self.tokens.codec.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Return the number of entries in each codebook."""
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

        These values are read on every call, since the process group may be initialized after the dataset is created.
        """
        if self._given is not None:
            return self._given
        if self._inherited is not None:
            return self._inherited[:2]
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _is_distributed() else (0, 1)

    def _share(self, splitter: Any) -> tuple[int, int]:
        """Return the rank and the world size by which the utterances are split in one pass over the dataset.

        Args:
            splitter: object that iterates over the dataset. If it is a wrapper from Accelerate or the Trainer, the
                wrapper splits the utterances itself, and the result is (0, 1).

        Raises:
            NemoLfrError: if the utterances would be split twice, or if this cannot be excluded because Accelerate is
                in use and the rank was not passed to the constructor.
        """
        place = self._place()
        if _is_splitter(splitter):
            if self._given is not None and place[1] > 1 and splitter.num_processes > 1:
                raise NemoLfrError(
                    f"Accelerate would split the utterances of rank {place[0]} of {place[1]} again, among "
                    f"{splitter.num_processes} processes, and some utterances would never be read; pass rank=0 and "
                    "world_size=1 to TokenDataset."
                )
            return 0, 1
        is_accelerated = self._inherited[2] if self._inherited is not None else _is_accelerated()
        if self._given is None and place[1] > 1 and is_accelerated:
            raise NemoLfrError(
                f"Accelerate is in use with {place[1]} processes, so pass rank and world_size to TokenDataset. If "
                "Accelerator.prepare or the Trainer distributes the utterances, pass rank=0 and world_size=1, and set "
                "dispatch_batches=False in Accelerate. Otherwise, pass rank=accelerator.process_index and "
                "world_size=accelerator.num_processes."
            )
        return place

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the utterances.

        In one process without data loader workers, each pass over the dataset is a new epoch by default. With several
        processes or with workers, the epoch stays the same until you call this method.

        Args:
            epoch: number of the epoch.

        Raises:
            NemoLfrError: if `epoch` is not an integer from 0 to 2^63 - 1.
        """
        epoch = check_whole_number(epoch, "epoch", 0, 2**63 - 1)
        self._epoch.fill_(epoch)
        self._progress, self._resumed = (
            state if state is not None and state["epoch"] == epoch else None
            for state in (self._progress, self._resumed)
        )

    def __len__(self) -> int:
        """Return the number of utterances that this rank reads in an epoch.

        The number includes the utterances of all data loader workers, and is the same on every rank.
        """
        is_split = _is_splitter(sys._getframe(1).f_locals.get("self"))
        return self._length(1 if is_split else self.world_size)

    def _length(self, ranks: int) -> int:
        clips = sum(self.tokens.counts)
        return clips // ranks if self.drop_last else -(-clips // ranks)

    def __iter__(self) -> Iterator[TokenizedUtterance]:
        # Accelerate wraps a dataset without notifying it. Only the calling frame shows that Accelerate will split the
        # utterances.
        rank, ranks = self._share(sys._getframe(1).f_locals.get("self"))
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        if worker and not cast(Callable[[], bool], self._shared_epoch.is_shared)():
            raise NemoLfrError("data loader workers need shared memory; free /dev/shm, or pass num_workers=0.")
        state, self._resumed = self._resumed or {"epoch": int(self._epoch), "position": 0}, None
        if state.get("workers", workers) != workers:
            saved = state["workers"]
            raise NemoLfrError(
                f"the state was saved with {saved} data loader workers, but there are {workers}; use {saved} workers."
            )
        epoch, position = state["epoch"], state["position"]
        # Count passes only with one rank: several ranks must agree on the epoch, but one may have made more passes
        # than another.
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
        """Return the position of this process or data loader worker in the current epoch.

        Returns:
            A dictionary whose values are integers, strings, booleans or None. Each worker of a `DataLoader` has its
            own position; use torchdata's `StatefulDataLoader` to save the positions of all workers.
        """
        worker = get_worker_info()
        progress = self._resumed or self._progress or {"epoch": int(self._epoch), "position": 0}
        return self._settings() | {"workers": worker.num_workers if worker else 1} | progress

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next pass at a saved position. Later passes begin at the start of an epoch.

        Calling `set_epoch` with another epoch discards the position.

        Args:
            state_dict: return value of `state_dict`.

        Raises:
            NemoLfrError: if the state is invalid, or was saved for another folder of tokens, other arguments or
                another number of processes.
        """
        if not isinstance(state_dict, Mapping):
            raise NemoLfrError(f"the state is {shorten(repr(state_dict))}; pass the return value of state_dict.")
        for name, value in self._settings().items():
            if name not in state_dict:
                raise NemoLfrError(f"the state has no {name!r}; pass the return value of state_dict.")
            if state_dict[name] != value and name == "tokens":
                raise NemoLfrError(
                    f"the state was saved for other tokens than those in {self.folder}; open the folder for which it "
                    "was saved, or start without the state."
                )
            if state_dict[name] != value:
                raise NemoLfrError(
                    f"the state was saved with {name}={shorten(repr(state_dict[name]))}, but this dataset has "
                    f"{name}={value!r}; create the dataset with the saved value, or start without the state."
                )
        for name, least in (("epoch", 0), ("position", 0), ("workers", 1)):
            if type(state_dict.get(name)) is not int or state_dict[name] < least:
                value = shorten(repr(state_dict.get(name)))
                raise NemoLfrError(f"the state's {name} is {value}; expected an integer of at least {least}.")
        if state_dict["position"] > sum(self.tokens.counts):
            raise NemoLfrError(
                f"the state's position is {state_dict['position']}, but there are only {sum(self.tokens.counts)} "
                "utterances; start without the state."
            )
        self._resumed = {name: state_dict[name] for name in ("epoch", "position", "workers")}

    def _settings(self) -> dict[str, Any]:
        """Return the settings that determine the order of the utterances."""
        names = ("shuffle", "seed", "buffer_size", "bucket_size", "drop_last", "world_size")
        return {"tokens": self.tokens.identity} | {name: getattr(self, name) for name in names}

    @staticmethod
    def collate(utterances: Iterable[TokenizedUtterance], pad: int = 0) -> dict[str, Any]:
        """Collate utterances into a batch; see the function `collate` of this module."""
        return collate(utterances, pad)


_DATASETS: WeakSet[TokenDataset] = WeakSet()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=lambda: deque(map(TokenDataset._own_epoch, list(_DATASETS)), 0))


def collate(utterances: Iterable[TokenizedUtterance], pad: int = 0) -> dict[str, Any]:
    """Collate utterances of different lengths into a padded batch.

    Args:
        utterances: one utterance or more.
        pad: token with which shorter utterances are padded.

    Returns:
        A dictionary with the keys `id` and `labels` (lists), `tokens` [B, C, T], `tokens_len` [B], `mask` [B, T] (true
        for valid frames) and `num_samples` [B]. If any utterance has context audio, also `context` (tokens [B, C, T]),
        `context_len` [B] (0 for an utterance without context audio) and `context_mask` [B, T].

    Raises:
        TokensError: if `utterances` is empty, or contains anything but tokenized utterances.
        NemoLfrError: if `pad` is not an integer.
    """
    if isinstance(utterances, TokenizedUtterance):
        raise TokensError("utterances is one utterance; pass a list of utterances.")
    utterances, pad = list(utterances), check_whole_number(pad, "pad", -(2**63), 2**63 - 1)
    if not utterances:
        raise TokensError("no utterances to collate; pass one or more.")
    for index, utterance in enumerate(utterances):
        if not isinstance(utterance, TokenizedUtterance):
            raise TokensError(f"utterance {index} is {quoted(utterance)}; pass items of a TokenDataset.")
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


def _shared(epoch: torch.Tensor) -> torch.Tensor:
    """Move the epoch into shared memory, if possible, so that data loader workers see updates."""
    with contextlib.suppress(OSError, RuntimeError):  # only workers need it, so `__iter__` raises an error in them
        cast(Callable[[], torch.Tensor], epoch.share_memory_)()  # torch declares no types for it
    return epoch


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_accelerated() -> bool:
    """Return whether an `Accelerator` exists in this process; the Hugging Face Trainer creates one."""
    state = sys.modules.get("accelerate.state")
    return state is not None and bool(state.is_initialized())


def _is_splitter(caller: Any) -> bool:
    """Return whether the caller is the wrapper with which Accelerate or the Trainer splits an iterable dataset."""
    return any(base.__name__ == "IterableDatasetShard" for base in type(caller).__mro__)


def _counted(utterances: Iterator[TokenizedUtterance], progress: dict[str, int]) -> Iterator[TokenizedUtterance]:
    for utterance in utterances:
        progress["position"] += 1
        yield utterance


# A data loader without `collate_fn` selects its collate function by the type of the samples.
with contextlib.suppress(ImportError):
    from torch.utils.data._utils.collate import default_collate_fn_map

    default_collate_fn_map[TokenizedUtterance] = lambda batch, *, collate_fn_map=None: collate(batch)
