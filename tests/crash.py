"""Processes that die: killed at random moments, or on a full disk."""

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
    """Run a script that prints a character once it writes, and kill it up to `within` seconds later, many times."""
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
    """Run a script whose files may not grow beyond `free` bytes, as on a full disk; returns its stderr."""
    limit = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({free}, {free}))
"""
    run = subprocess.run([sys.executable, "-c", limit + script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    return run.stderr
