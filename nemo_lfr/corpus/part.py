"""Parts of a run: N processes without a common driver, each of which computes its own shards of one plan.

Part I of N computes the shards whose number is I modulo N. The parts share the output folder and nothing else. Each
one plans the run, and the first plan that is stored is the plan of all: see `nemo_lfr.corpus.plan`. The part that
finds all shards complete writes the summary, and so does the same command without a part.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.io.atomic import write_new
from nemo_lfr.io.exclusive import exclusive, exclusive_file
from nemo_lfr.io.regular import open_regular

AUTO = "auto"
FOLDER = "parts"  # folder in the state folder of an output
COUNT_FILE = "count"
HELP = "I counts from 0 to N - 1, for example 0/4, 1/4, 2/4 and 3/4"


@dataclass(frozen=True)
class Part:
    """One of several processes that tokenize a corpus together.

    Attributes:
        index: number of the process, from 0.
        count: number of processes.
        local_index: number of the process among those that share this machine's cores and GPUs.
        local_count: number of those processes; 1 if the machine is not shared, or if a scheduler divides it.
    """

    index: int
    count: int
    local_index: int = 0
    local_count: int = 1

    def __post_init__(self) -> None:
        pairs = ((self.index, self.count), (self.local_index, self.local_count))
        if any(type(number) is not int for pair in pairs for number in pair):
            raise NemoLfrError(f"part {self.index!r}/{self.count!r}: pass integers; {HELP}.")
        if any(not 0 <= index < count for index, count in pairs):
            raise NemoLfrError(f"part {self}: {HELP}.")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """Return the name of the part's files."""
        return f"{self.index}-of-{self.count}"

    def owns(self, shard: int) -> bool:
        """Return whether the part computes a shard."""
        return shard % self.count == self.index


def parse_part(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """Parse the value of `--shard-of`.

    Args:
        text: "I/N", or "auto" for the variables of torchrun or Slurm.
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
    """Return the part of a process that torchrun or Slurm started.

    The variables are RANK and WORLD_SIZE of torchrun, else those of a Slurm job array, a Slurm step, or both: each
    task of an array with M tasks per job is one of M parts of that job.

    Args:
        environment: environment variables.

    Raises:
        NemoLfrError: if none of the variables is set, one is missing or invalid, or the array has gaps.
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
            "--shard-of auto: found neither RANK and WORLD_SIZE (torchrun) nor SLURM_PROCID and SLURM_NTASKS or a "
            f"job array (Slurm); pass I/N, where {HELP}."
        )
    array = _array(environment) if has_array else Part(0, 1)
    # A job array without srun may lack the variables of a step
    step = _pair(environment, "SLURM_PROCID", "SLURM_NTASKS") if _has_step(environment, has_array) else Part(0, 1)
    return Part(array.index * step.count + step.index, array.count * step.count)


def _has_step(environment: Mapping[str, str], has_array: bool) -> bool:
    return not has_array or {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys()


def _array(environment: Mapping[str, str]) -> Part:
    """Return the position of a task in its job array."""
    index = _integer(environment, "SLURM_ARRAY_TASK_ID")
    low, high = _integer(environment, "SLURM_ARRAY_TASK_MIN"), _integer(environment, "SLURM_ARRAY_TASK_MAX")
    count = _integer(environment, "SLURM_ARRAY_TASK_COUNT")
    step = _integer({"SLURM_ARRAY_TASK_STEP": "1"} | dict(environment), "SLURM_ARRAY_TASK_STEP")
    if not step or low + step * (count - 1) != high or (index - low) % step or not low <= index <= high:
        raise NemoLfrError(
            f"--shard-of auto: the Slurm job array has {count} tasks from {low} to {high} in unequal steps; submit it "
            "as --array=0-N, or pass I/N."
        )
    return Part((index - low) // step, count)


def _pair(environment: Mapping[str, str], index: str, count: str) -> Part:
    pair = _integer(environment, index), _integer(environment, count)
    if not 0 <= pair[0] < pair[1]:
        raise NemoLfrError(f"--shard-of auto: {index} is {pair[0]} and {count} is {pair[1]}; {HELP}.")
    return Part(*pair)


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        problem = "is not set" if text is None else f"is {shorten(text)!r}, not a number"
        raise NemoLfrError(f"--shard-of auto: the environment variable {name} {problem}; pass I/N instead.")
    return int(text)


@contextmanager
def reserve(out: Path, state: Path, part: Part | None) -> Iterator[None]:
    """Lock an output for a run, or for one part of a run.

    Parts share the folder with each other and not with a run without parts. On file systems without shared locks, the
    number of parts is still checked.

    Args:
        out: the output folder.
        state: its state folder.
        part: the part; None for all shards.

    Raises:
        NemoLfrError: if another run, or the same part, is writing to the folder, or the number of parts is another.
    """
    if part is None:
        with exclusive(out):
            _check_free(state, out)
            yield
        return
    folder = state / FOLDER
    if folder.is_symlink():
        raise NemoLfrError(f"{folder}: is a link, and links are not followed; remove it, or choose another --out.")
    folder.mkdir(exist_ok=True)
    count_file = folder / COUNT_FILE
    write_new(count_file, str(part.count).encode())
    with open_regular(count_file) as file:
        stored = file.read(10).decode(errors="replace")
    if stored != str(part.count):
        stored = shorten(stored)
        raise NemoLfrError(
            f"{out}: is being written in {stored} parts, not {part.count}; pass --shard-of I/{stored}, "
            "or run the same command without --shard-of to compute what is missing."
        )
    with exclusive(out, shared=True):
        twice = f"{out}: part {part} is being computed by another process; each process needs its own I of I/N."
        with exclusive_file(folder / f"{part.name}.lock", twice):
            yield


def _check_free(state: Path, out: Path) -> None:
    """Raise NemoLfrError if a part is being computed on another machine, whose lock of the folder is not visible."""
    for path in sorted((state / FOLDER).glob("*.lock")):
        message = f"{out}: part {path.stem.replace('-of-', '/')} is being computed; wait for it, or stop it."
        with exclusive_file(path, message):
            pass
