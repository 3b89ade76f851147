"""Replay of the findings of `tests/fuzz.py`, and a short fuzzing run of each reader."""

import os
import re
import subprocess
import sys

import pytest

from tests.crash import ROOT
from tests.fuzz import FINDINGS, TARGETS
from tests.mutate import GUARDS

FUZZ = int(os.environ.get("NEMO_LFR_FUZZ", "1"))


@pytest.mark.parametrize("path", sorted(FINDINGS.glob("*-*")), ids=lambda path: path.name)
def test_a_finding_raises_its_documented_exception(path):
    TARGETS[path.name.partition("-")[0]](path.read_bytes())


# Seconds for each reader, and more runs in the nightly workflow, which sets NEMO_LFR_FUZZ. The number is fixed,
# since the speed depends on the machine's load.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "runs"), [("lfr", 1000), ("lfrm", 600), ("nemo", 40), ("pickle", 50), ("config", 100)]
)
def test_fuzzing_finds_nothing(name, runs):
    runs *= FUZZ
    pytest.importorskip("atheris", reason="the fuzzer: pip install atheris")
    # Run below a shell: a child inherits the peak memory of its parent, which libFuzzer compares with its limit.
    run = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", "tests.fuzz", name, f"-runs={runs}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    done = re.search(r"Done (\d+) runs", run.stderr)
    assert done and int(done.group(1)) >= runs


@pytest.mark.parametrize(("name", "guard"), [guard[:2] for guard in GUARDS])
def test_mutation_test_names_guards_that_exist(name, guard):
    assert (ROOT / "nemo_lfr" / name).read_text(encoding="utf-8").count(guard) == 1
