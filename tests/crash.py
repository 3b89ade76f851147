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
KILLS = int(os.environ.get("NEMO_LFR_KILLS", "8"))


# Importing PyTorch takes longer than writing a file, so one process imports it and forks a child for each run.
LAUNCHER = """
import ast, os, sys
import torch

torch.set_num_threads(1)
script = ast.parse(sys.argv[1])
sys.argv = ["-c", *sys.argv[2:]]
imports = [node for node in script.body if isinstance(node, (ast.Import, ast.ImportFrom))]
exec(compile(ast.Module(imports, []), "imports", "exec"))
for _ in sys.stdin:
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
        os._exit(1)
    os.waitpid(child, 0)
    print("\\nended", flush=True)
"""


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
    command = [sys.executable, "-c", LAUNCHER, script, *map(str, arguments)]
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert launcher.stdin is not None and launcher.stdout is not None
    with launcher:
        for number in range(KILLS):
            launcher.stdin.write("run\n")
            launcher.stdin.flush()
            writer = int(launcher.stdout.readline())
            assert launcher.stdout.read(1)
            time.sleep(rng.uniform(0, within))
            os.kill(writer, signal.SIGKILL)
            while launcher.stdout.readline() != "ended\n":
                assert launcher.poll() is None
            yield number


def on_a_full_disk(script: str, free: int) -> str:
    """Run a script that must fail because its files are limited to `free` bytes; return its stderr."""
    limit = f"""
import resource, signal, sys
sys.dont_write_bytecode = True  # a cut .pyc file would break later imports
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({free}, {free}))
"""
    run = subprocess.run([sys.executable, "-c", limit + script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    return run.stderr
