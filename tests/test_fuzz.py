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


# A minute for each reader.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "seconds"), [("lfr", 60), ("nemo", 30), ("pickle", 15), ("config", 15)])
def test_a_minute_of_fuzzing_finds_nothing(name, seconds):
    pytest.importorskip("atheris", reason="the fuzzer: pip install atheris")
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, f"-max_total_time={seconds}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    done = re.search(r"Done (\d+) runs", run.stderr)
    assert done and int(done.group(1)) > 100
