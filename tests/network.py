"""Watch what a process, its children and the native libraries in them ask of the network; see network.c."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash import ROOT

# What keeps libraries from the network in the test suite or in CI would hide what they do at a user's.
HIDING = {"CI", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE", "DO_NOT_TRACK"}
TELEMETRY = {"ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED"}


def build_watcher(folder: Path) -> Path:
    """Compile network.c; skips the test where that is not possible."""
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("the watcher is a preloaded library: it needs Linux and a C compiler, cc")
    library = folder / "network.so"
    source = ROOT / "tests" / "network.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def run_watched(watcher: Path, log: Path, command: list[object], **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end; what it asks of the network is appended to `log`.

    A command may set NETWORK_LOG in its own environment to write elsewhere from there on.
    """
    kept = {name: value for name, value in os.environ.items() if name not in HIDING | TELEMETRY}
    watched = {"LD_PRELOAD": str(watcher), "NETWORK_LOG": str(log), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), env=kept | watched | environment, capture_output=True, text=True, cwd=log.parent
    )
