"""Divide a run among N independent processes, each of which tokenizes a part of the shards.

Part I of N consists of the shards whose index modulo N is I. The processes share only the output folder, and use the
first plan that was stored in it; see `nemo_lfr.corpus.plan`. A process that finds all shards complete writes the
summary.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nemo_lfr.errors import NemoLfrError, counted, shorten
from nemo_lfr.io.atomic import write_new
from nemo_lfr.io.exclusive import exclusive, exclusive_file
from nemo_lfr.io.regular import open_regular

AUTO = "auto"
FOLDER = "parts"  # folder in the state folder of an output
COUNT_FILE = "count"
HELP = "pass I/N with I from 0 to N - 1, for example 0/4, 1/4, 2/4 and 3/4"


@dataclass(frozen=True)
class Part:
    """One of several processes that tokenize a corpus together.

    It tokenizes every `count`-th shard, starting with shard `index`.

    Attributes:
        index: index of the process, from 0 to `count` - 1.
        count: number of processes.
        local_index: index of the process among the processes that share this machine's cores and GPUs.
        local_count: number of processes that share this machine's cores and GPUs. It is 1 if there are no others, or
            if a scheduler assigns cores and GPUs to each process.
    """

    index: int
    count: int
    local_index: int = 0
    local_count: int = 1

    def __post_init__(self) -> None:
        pairs = ((self.index, self.count), (self.local_index, self.local_count))
        if any(type(number) is not int for pair in pairs for number in pair):
            raise NemoLfrError(f"part {self.index!r}/{self.count!r}: both values must be integers; {HELP}.")
        if any(not 0 <= index < count for index, count in pairs):
            raise NemoLfrError(f"part {self}: {HELP}.")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """Return the base name of the part's lock file, for example "0-of-4"."""
        return f"{self.index}-of-{self.count}"

    def owns(self, shard: int) -> bool:
        """Return whether the shard with this index belongs to the part."""
        return shard % self.count == self.index


def parse_part(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """Parse the value of `--shard-of`.

    Args:
        text: "I/N", or "auto" to use the variables that torchrun or Slurm sets.
        environment: environment variables.

    Raises:
        NemoLfrError: if the text is malformed or out of range, or the variables are missing or invalid.
    """
    if text == AUTO:
        return part_of_environment(environment)
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if match is None:
        raise NemoLfrError(f"--shard-of {shorten(text)!r}: expected I/N or auto; {HELP}.")
    return Part(int(match[1]), int(match[2]))


def part_of_environment(environment: Mapping[str, str] = os.environ) -> Part:
    """Return the `Part` for this process, which torchrun or Slurm started.

    RANK and WORLD_SIZE of torchrun take precedence. Slurm sets variables for a job array, for a job step, or for both.
    If an array has J jobs with M tasks each, there are J * M parts.

    Args:
        environment: environment variables.

    Raises:
        NemoLfrError: if neither torchrun nor Slurm has set its variables, if a variable is missing or invalid, or if
            the indices of the job array are not evenly spaced.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        part = _pair(environment, "RANK", "WORLD_SIZE")
        local = "LOCAL_RANK" in environment and "LOCAL_WORLD_SIZE" in environment
        local_part = _pair(environment, "LOCAL_RANK", "LOCAL_WORLD_SIZE") if local else Part(0, 1)
        return Part(part.index, part.count, local_part.index, local_part.count)
    has_array = "SLURM_ARRAY_TASK_ID" in environment
    has_step = "SLURM_PROCID" in environment or "SLURM_NTASKS" in environment
    if not has_array and not has_step:
        raise NemoLfrError(
            "--shard-of auto: found neither the variables RANK and WORLD_SIZE (torchrun) nor those of a Slurm step "
            f"(SLURM_PROCID, SLURM_NTASKS) or job array; {HELP}."
        )
    array = _array(environment) if has_array else Part(0, 1)
    # The variables of a step may be missing in a job array that does not use srun.
    step = _pair(environment, "SLURM_PROCID", "SLURM_NTASKS") if _has_step(environment, has_array) else Part(0, 1)
    return Part(array.index * step.count + step.index, array.count * step.count)


def _has_step(environment: Mapping[str, str], has_array: bool) -> bool:
    return not has_array or {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys()


def _array(environment: Mapping[str, str]) -> Part:
    """Return the part for a task of a Slurm job array, according to its index in the array."""
    index = _integer(environment, "SLURM_ARRAY_TASK_ID")
    low, high = _integer(environment, "SLURM_ARRAY_TASK_MIN"), _integer(environment, "SLURM_ARRAY_TASK_MAX")
    count = _integer(environment, "SLURM_ARRAY_TASK_COUNT")
    step = _integer({"SLURM_ARRAY_TASK_STEP": "1"} | dict(environment), "SLURM_ARRAY_TASK_STEP")
    if not step or low + step * (count - 1) != high or (index - low) % step or not low <= index <= high:
        raise NemoLfrError(
            f"--shard-of auto: the Slurm job array has {counted(count, 'task')} from {low} to {high} in unequal "
            "steps; submit it with consecutive indices, such as --array=0-3, or pass I/N."
        )
    return Part((index - low) // step, count)


def _pair(environment: Mapping[str, str], index: str, count: str) -> Part:
    pair = _integer(environment, index), _integer(environment, count)
    if not 0 <= pair[0] < pair[1]:
        raise NemoLfrError(f"--shard-of auto: {index} is {pair[0]}, but {count} is {pair[1]}; {HELP}.")
    return Part(*pair)


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        problem = "is not set" if text is None else f"is {shorten(text)!r}, not a number"
        raise NemoLfrError(f"--shard-of auto: the environment variable {name} {problem}; pass I/N instead.")
    return int(text)


@contextmanager
def reserve(out: Path, state: Path, part: Part | None) -> Iterator[None]:
    """Lock an output folder for a run, or for one part of a run.

    Several parts of a run may write to the folder at the same time. A run without parts needs the folder for itself.

    Args:
        out: the output folder.
        state: the state folder of the output.
        part: the part to tokenize; None for all shards.

    Raises:
        NemoLfrError: if another run, or another process with the same part, is writing to the folder, or if the run
            was started with another number of parts.
    """
    if part is None:
        with exclusive(out):
            _check_free(state, out)
            yield
        return
    folder = state / FOLDER
    if folder.is_symlink():
        raise NemoLfrError(
            f"{folder}: the folder is a link, which is not followed; remove the link, or choose another --out."
        )
    folder.mkdir(exist_ok=True)
    count_file = folder / COUNT_FILE
    write_new(count_file, str(part.count).encode())
    with open_regular(count_file) as file:
        stored = file.read(10).decode(errors="replace")
    if stored != str(part.count):
        stored = shorten(stored)
        raise NemoLfrError(
            f"{out}: this run was started with {stored} parts, not {part.count}; pass --shard-of I/{stored}, "
            "or run the same command without --shard-of to tokenize the missing shards."
        )
    with exclusive(out, shared=True):
        twice = f"{out}: part {part} is being tokenized by another process; pass another I to --shard-of I/N."
        with exclusive_file(folder / f"{part.name}.lock", twice):
            yield


def forget_count(out: Path, state: Path, part: Part) -> None:
    """Remove the record of the number of parts, unless another part is being tokenized.

    Call this function within `reserve` for `part`. Afterwards, a run may have another number of parts.
    """
    with suppress(OSError, NemoLfrError):
        _check_free(state, out, part)
        (state / FOLDER / COUNT_FILE).unlink()


def _check_free(state: Path, out: Path, own: Part | None = None) -> None:
    """Raise NemoLfrError if a part other than `own` is being tokenized, possibly on another machine.

    Unlike a lock on the output folder, the lock files of the parts are visible to all machines.
    """
    for path in sorted((state / FOLDER).glob("*.lock")):
        if own is not None and path.stem == own.name:
            continue
        message = f"{out}: part {path.stem.replace('-of-', '/')} is being tokenized; wait until it ends, or stop it."
        with exclusive_file(path, message):
            pass
