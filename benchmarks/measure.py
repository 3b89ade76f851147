"""Shared benchmark tools: timing, medians with ranges, and machine description."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def in_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time several functions in alternating rounds.

    Args:
        ways: dict from each name to the function to time.
        rounds: number of timed rounds, after one warm-up round.

    Returns:
        A dict from each name to the function's times in seconds, one per round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Return the speedup of `fast` over `slow` in each round."""
    return [theirs / own for theirs, own in zip(slow, fast, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format the median, minimum and maximum."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# Peak resident memory in MiB, for scripts run by `alone`. The value of getrusage is not used, because it starts at the
# size of the parent process.
PEAK = """
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

"""


def alone(script: str, *arguments: object) -> list[str]:
    """Run a Python script in a new process.

    Args:
        script: source code, which may call `peak()` for the peak memory in MiB.
        *arguments: command-line arguments of the script.

    Returns:
        Words of the last line that the script prints.

    Raises:
        SystemExit: if the script fails. The message is what the script printed on stderr.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK + script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip().splitlines()[-1].split()


def machine() -> str:
    """Return the date, processor, core count and torch version for a table."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{datetime.now(UTC):%Y-%m-%d}, {cores} cores of {model}, torch {torch.__version__}"
