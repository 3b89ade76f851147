"""Tests of the scripts in `examples/` that tokenize a corpus on a cluster; commands of the cluster are replaced."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.run import tokenize
from tests.corpora import write_codec
from tests.crash import ROOT
from tests.models import RATE, synthesize

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")]

SCRIPTS = ("tokenize_slurm.sh", "tokenize_ray.sh")
# Starts the tasks of a step one after the other, as if on several machines
SRUN = """
[ "$1" = --kill-on-bad-exit=0 ] && shift
worst=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
  code=0
  SLURM_PROCID=$task "$@" || code=$?
  [ $code -gt $worst ] && worst=$code
done
exit $worst
"""
# Runs until it is stopped
RAY, SSH = (
    f'trap "echo stopped >>$LOG; exit" TERM; echo "{name} $*" >>"$LOG"; while :; do sleep 0.1; done'
    for name in ("ray", "ssh")
)


def commands(folder: Path, **scripts: str) -> dict[str, str]:
    """Write commands, and return an environment that finds them first."""
    folder.mkdir()
    for name, text in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "LOG": str(folder.parent / "log")}


def run(script: str, *arguments: object, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    command = ["bash", ROOT / "examples" / script, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_syntax_is_valid_and_a_call_without_arguments_prints_the_usage(script, tmp_path):
    subprocess.run(["bash", "-n", ROOT / "examples" / script], check=True)
    assert os.access(ROOT / "examples" / script, os.X_OK)
    done = run(script, "corpus", environment=dict(os.environ), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_the_slurm_script_writes_the_tokens_of_one_run(tmp_path):
    """Start only three processes: two tasks, and the command that completes the output."""
    (tmp_path / "two words").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / "two words" / f"{number}.wav", synthesize(0.2, seed=number), RATE)
    model = write_codec(tmp_path / "tiny.nemo")
    nemo_lfr = f'echo "$SLURM_PROCID $*" >>"$LOG"; exec {sys.executable} -m nemo_lfr "$@"'
    environment = commands(tmp_path / "bin", srun=SRUN, nemo_lfr=nemo_lfr) | {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    options = ["--format", "lfr", "--shard-size", 1, "--device", "cpu", "--workers", 1, "--model", model]
    done = run("tokenize_slurm.sh", "two words", "out", *options, environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "log").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["0", "1", "0"]
    assert ["--shard-of auto" in call for call in calls] == [True, True, False]
    assert "out is not complete yet: it lacks 1 shard of other processes" in done.stderr
    config = TokenizeConfig(str(tmp_path / "two words"), str(tmp_path / "alone"), "lfr", str(model), shard_size=1)
    tokenize(config, device="cpu", workers=1)
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).rglob("*.lfr")}
        for name in ("out", "alone")
    ]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 3


@pytest.mark.parametrize(("task", "code"), [("exit 2", 2), ("exit 1", 1), ("exit 137", 137)])
def test_the_slurm_script_reports_tasks_that_failed(task, code, tmp_path):
    """Exit code 1 means failed clips: the final command still runs, and its exit code is that of the job."""
    environment = commands(tmp_path / "bin", srun=SRUN, nemo_lfr=f'echo "$*" >>"$LOG"; {task}') | {"SLURM_NTASKS": "1"}
    done = run("tokenize_slurm.sh", "corpus", "out", environment=environment, cwd=tmp_path)
    assert done.returncode == code
    assert (tmp_path / "log").read_text().count("\n") == (2 if code == 1 else 1)


@pytest.mark.parametrize("code", [0, 1])
def test_the_ray_script_starts_and_stops_the_machines_that_it_names(code, tmp_path):
    """Commands only record their calls; Ray itself is tested with the executors."""
    python = 'echo "python $*" >>"$LOG"; cat >/dev/null; until [ "$(grep -c start "$LOG")" = 3 ]; do sleep 0.1; done'
    environment = commands(
        tmp_path / "bin", ray=RAY, ssh=SSH, python=python, nemo_lfr=f'echo "nemo-lfr $*" >>"$LOG"; exit {code}'
    )
    environment |= {"NODES": "node1 node2", "HEAD": "10.0.0.1", "PORT": "7000", "SETUP": "source env"}
    done = run("tokenize_ray.sh", "a corpus", "out", "--format", "lfr", environment=environment, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    calls = sorted((tmp_path / "log").read_text().splitlines())
    assert calls == [
        "nemo-lfr tokenize a corpus --out out --ray 10.0.0.1:7000 --format lfr",
        "python - 10.0.0.1:7000 3",
        "ray start --head --node-ip-address=10.0.0.1 --port=7000 --include-dashboard=false --block",
        "ssh -tt node1 source env && ray start --address=10.0.0.1:7000 --block",
        "ssh -tt node2 source env && ray start --address=10.0.0.1:7000 --block",
        "stopped",
        "stopped",
        "stopped",
    ]
