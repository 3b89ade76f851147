"""What fuzzing has found stays found, and a minute of it runs with every suite; see `tests/fuzz.py`."""

import re
import subprocess
import sys

import pytest

from tests.crash import ROOT
from tests.fuzz import FINDINGS, TARGETS


@pytest.mark.parametrize("path", sorted(FINDINGS.glob("*-*")), ids=lambda path: path.name)
def test_a_finding_raises_its_documented_exception(path):
    TARGETS[path.name.partition("-")[0]](path.read_bytes())


# A minute or so of each reader. Work is asked for, not time, which says nothing on a busy machine.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "runs"), [("lfr", 5000), ("lfrm", 3000), ("nemo", 500), ("pickle", 500), ("config", 500)]
)
def test_fuzzing_finds_nothing(name, runs):
    pytest.importorskip("atheris", reason="the fuzzer: pip install atheris")
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, f"-runs={runs}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    done = re.search(r"Done (\d+) runs", run.stderr)
    assert done and int(done.group(1)) >= runs
