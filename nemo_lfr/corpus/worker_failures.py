"""Count dead workers, and stop the run if workers die repeatedly."""

import shutil
from collections import Counter
from collections.abc import Iterable

from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.errors import NemoLfrError, first_line, shorten

# Maximum number of workers that may die on the same shard, or between two completed shards.
MAX_DEATHS = 20


class WorkerFailures:
    """Counter of dead workers, which raises an error if too many have died.

    Args:
        config: options of the run.

    Attributes:
        since_record: number of workers that died since the last complete shard.
    """

    def __init__(self, config: TokenizeConfig) -> None:
        self.config = config
        self.since_record = 0
        self._of_shard: Counter[int] = Counter()

    def count(self, indices: Iterable[int], error: Exception, *, is_death: bool = True) -> None:
        """Count a dead worker, and remove the partial files of its shards.

        Args:
            indices: indices of the shards that the worker may have been processing.
            error: the exception that reports its death.
            is_death: False if this worker was counted before, for another of its shards.

        Raises:
            NemoLfrError: if more than `MAX_DEATHS` workers died while they processed the same shard, or if more than
                `MAX_DEATHS` workers died and no shard was finished in between.
        """
        self.since_record += is_death
        for index in indices:
            for folder in self.config.state.glob(f"staging/{index:06d}.*"):
                shutil.rmtree(folder, ignore_errors=True)
                self._of_shard[index] += 1
            if self._of_shard[index] > MAX_DEATHS:
                raise NemoLfrError(
                    f"shard {index}: its worker died {MAX_DEATHS + 1} times; an audio file of the shard may crash the "
                    "audio library. To find the file, use a smaller --shard-size and another --out."
                ) from error
        if self.since_record > MAX_DEATHS:
            raise NemoLfrError(
                f"workers died {self.since_record} times, and no shard was finished in between ({first_line(error)}); "
                "the machine may not have enough memory: use fewer --workers."
            ) from error


def last_line(error: Exception) -> str:
    """Return the last line of an exception's message, or the name of its class if the message is empty."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return shorten(lines[-1].strip(), 500) if lines else type(error).__name__
