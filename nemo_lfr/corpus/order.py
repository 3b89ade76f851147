"""Order in which a data loader worker reads the utterances of an epoch.

Utterances are read shard by shard. Optionally, they are shuffled in a buffer and grouped by length.

An epoch can be resumed at any utterance without saving the buffer. The shuffling is repeated, which takes little time,
because only positions are shuffled.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from nemo_lfr.corpus.token_folder import TokenFolder, TokenizedUtterance


@dataclass(frozen=True)
class EpochOrder:
    """Sequence of the utterances that one data loader worker of one rank reads in one epoch.

    Attributes:
        tokens: folder of tokens.
        shards: indices of the shards, in the order of the epoch.
        positions: positions of this worker's utterances in the sequence of all utterances of `shards`. Positions past
            the end of the sequence wrap around.
        shuffle: whether to shuffle the utterances in a buffer.
        buffer_size: size of the buffer in utterances.
        bucket_size: number of utterances in a group of similar length; None for no grouping.
        buffer_seed: random seed for shuffling utterances in the buffer.
        group_seed: random seed for shuffling groups.
    """

    tokens: TokenFolder
    shards: Sequence[int]
    positions: range
    shuffle: bool
    buffer_size: int
    bucket_size: int | None
    buffer_seed: str
    group_seed: str

    def read(self, skip: int = 0) -> Iterator[TokenizedUtterance]:
        """Yield the utterances.

        Args:
            skip: number of utterances to skip at the beginning.

        Raises:
            TokenFileError: if a file is damaged.
        """
        if self.bucket_size is not None:
            return self._grouped(skip, self.bucket_size)
        return self._shuffled(skip) if self.shuffle else self._sequential(skip)

    def _sequential(self, skip: int) -> Iterator[TokenizedUtterance]:
        for shard, first, stop in self._spans(self.positions[skip:]):
            yield from self._read(shard, first, stop)

    def _shuffled(self, skip: int) -> Iterator[TokenizedUtterance]:
        total = len(self.positions)
        size = min(self.buffer_size, total)
        order = random.Random(self.buffer_seed)
        held, following = list(range(size)), size
        while skip and following < total:
            held[order.randrange(size)] = following
            following, skip = following + 1, skip - 1
        buffer = self._at(held)
        for utterance in self._sequential(following):
            place = order.randrange(size)
            yield buffer[place]
            buffer[place] = utterance
        order.shuffle(buffer)
        yield from buffer[skip:]

    def _grouped(self, skip: int, size: int) -> Iterator[TokenizedUtterance]:
        """Fill the buffer repeatedly, sort it by length, and yield its utterances.

        With `shuffle`, groups of `size` utterances are shuffled, in the same order on every rank, so that all ranks
        have batches of similar length in a training step. The first `skip` utterances are not yielded.
        """
        pool_size = max(1, self.buffer_size // size) * size
        number, skip = divmod(skip, pool_size)
        before = number * pool_size
        utterances = self._shuffled(before) if self.shuffle else self._sequential(before)
        while pool := list(islice(utterances, pool_size)):
            pool.sort(key=lambda utterance: utterance.tokens.shape[1])
            groups = [pool[first : first + size] for first in range(0, len(pool), size)]
            incomplete = groups.pop() if len(groups[-1]) < size else []
            if self.shuffle:
                random.Random(f"{self.group_seed} groups {number}").shuffle(groups)
            yield from [utterance for group in (*groups, incomplete) for utterance in group][skip:]
            number, skip = number + 1, 0

    def _at(self, positions: Sequence[int]) -> list[TokenizedUtterance]:
        """Return the utterances at the given indices of `self.positions`. Each shard is read in one pass."""
        found: dict[int, TokenizedUtterance] = {}
        wanted = sorted(positions)
        while wanted:
            first = wanted[0]
            shard, begin, end = next(self._spans(self.positions[first : wanted[-1] + 1]))
            count = next((n for n, position in enumerate(wanted) if position >= first + end - begin), len(wanted))
            inside = set(wanted[:count])
            last = wanted[count - 1]
            read = enumerate(self._read(shard, begin, begin + last - first + 1), first)
            found |= {position: utterance for position, utterance in read if position in inside}
            wanted = wanted[count:]
        return [found[position] for position in positions]

    def _spans(self, positions: range) -> Iterator[tuple[int, int, int]]:
        """Split a range of positions at the ends of shards, and yield (shard, start, stop) for each piece.

        Unlike `positions`, `start` and `stop` are counted from the start of the shard.
        """
        start, stop = positions.start, positions.stop
        ends = np.cumsum([self.tokens.counts[shard] for shard in self.shards])
        while start < stop:
            offset = start % int(ends[-1])
            place = int(np.searchsorted(ends, offset, side="right"))
            count = self.tokens.counts[self.shards[place]]
            begin = offset - (int(ends[place]) - count)
            end = min(count, begin + stop - start)
            yield self.shards[place], begin, end
            start += end - begin

    def _read(self, shard: int, first: int, stop: int) -> Iterator[TokenizedUtterance]:
        for utterance in self.tokens.read(shard, first, stop):
            if not isinstance(utterance, TokenizedUtterance):
                raise utterance
            yield utterance
