"""Log of the network access of a process, its children and their native libraries; see network.c."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash import ROOT

# Variables that keep libraries off the network in tests and CI; a user's environment does not have them.
HIDING = {"CI", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE", "DO_NOT_TRACK"}
TELEMETRY = {"ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED"}


def build_watcher(folder: Path) -> Path:
    """Compile network.c; skip the test if that is not possible."""
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("the watcher is a preloaded library: it needs Linux and a C compiler, cc")
    library = folder / "network.so"
    source = ROOT / "tests" / "network.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def run_watched(watcher: Path, log: Path, command: list[object], **environment: str) -> subprocess.CompletedProcess:
    """Run a command and append its network access to a log.

    Args:
        watcher: library that `build_watcher` compiled.
        log: file to append to. The command can set NETWORK_LOG in the environment of a child to use another file.
        command: program and arguments.
        environment: additional environment variables.
    """
    kept = {name: value for name, value in os.environ.items() if name not in HIDING | TELEMETRY}
    watched = {"LD_PRELOAD": str(watcher), "NETWORK_LOG": str(log), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), env=kept | watched | environment, capture_output=True, text=True, cwd=log.parent
    )
