"""Counting of workers that die, per shard and per run."""

import shutil
from collections import Counter
from collections.abc import Iterable

from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.errors import NemoLfrError, shorten

# Limit of workers that die over one shard, and of workers that die before any shard is complete.
MAX_DEATHS = 20


class WorkerFailures:
    """Counter of dead workers that raises once the run cannot succeed.

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
            indices: shards that were assigned to the worker.
            error: the error that showed its death.
            is_death: False if another shard has shown the same death before.

        Raises:
            NemoLfrError: if workers die repeatedly.
        """
        self.since_record += is_death
        for index in indices:
            for folder in self.config.state.glob(f"staging/{index:06d}.*"):
                shutil.rmtree(folder, ignore_errors=True)
                self._of_shard[index] += 1
            if self._of_shard[index] > MAX_DEATHS:
                raise NemoLfrError(
                    f"shard {index}: its worker died {MAX_DEATHS + 1} times; a file in it may crash the audio "
                    "library. Use a smaller --shard-size to find it."
                ) from error
        if self.since_record > MAX_DEATHS:
            raise NemoLfrError(
                f"workers died {self.since_record} times and finished no shard ({first_line(error)}); the machine may "
                "lack memory: try fewer --workers."
            ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class for an empty message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def last_line(error: Exception) -> str:
    """Return the last line of an error's message, or its class for an empty message.

    This is the relevant line of a traceback.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    return shorten(lines[-1].strip(), 500) if lines else type(error).__name__
