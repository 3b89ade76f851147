"""Processes that are killed at random moments or fail on a full disk."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("NEMO_LFR_KILLS", "20"))


def killed_at_random_moments(script: str, *arguments: object, within: float) -> Iterator[int]:
    """Run a script `KILLS` times and kill it at a random moment each time.

    Args:
        script: Python code that prints a character when it starts to write.
        arguments: command-line arguments of the script.
        within: longest time in seconds from that character to the kill.

    Yields:
        The number of the run, after its process has ended.
    """
    rng = np.random.default_rng(0)
    for number in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert writer.stdout is not None and writer.stdout.read(1)
        time.sleep(rng.uniform(0, within))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        yield number


def on_a_full_disk(script: str, free: int) -> str:
    """Run a script that must fail because its files are limited to `free` bytes; return its stderr."""
    limit = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({free}, {free}))
"""
    run = subprocess.run([sys.executable, "-c", limit + script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    return run.stderr
