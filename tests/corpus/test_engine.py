"""Workers that die, cannot start or start slowly: each death is counted once, whatever the engine."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_lfr.corpus import engine
from nemo_lfr.corpus.shard import Job
from nemo_lfr.errors import NemoLfrError

TASKS = [(index, {"index": index}) for index in range(4)]


class Worker:
    """Stands for a worker, without a codec: what it does is told by the job's dataset, as KIND or KIND:TIMES.

    "dies" kills itself in the first so many runs of shard 1; "slow" needs longer for each start after a death;
    "cannot start" raises.
    """

    def __init__(self, job: Job, device: str | None = None) -> None:
        self.out = Path(job.out)
        self.kind, _, times = job.dataset.partition(":")
        self.times = int(times or 0)
        if self.kind == "cannot start":
            raise RuntimeError("first line\nno memory for it")
        if self.kind == "slow" and list(self.out.glob("death.*")):
            time.sleep(2)  # refuses, or holds up, what is asked of it meanwhile

    def ready(self) -> None:
        """Answers once the worker is there."""

    def run(self, index: int, part: dict[str, Any]) -> dict[str, Any]:
        deaths = len(list(self.out.glob("death.*")))
        if index == 1 and deaths < self.times:
            (self.out / f"death.{deaths}").touch()
            staging = self.out / ".tokenize" / "staging" / "000001.0123abcd"
            staging.mkdir(parents=True, exist_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"index": index}


def start(job: Job, devices: Any, driver: int) -> None:
    """What a process does first, with the worker above."""
    engine.Worker = Worker
    START(job, devices, driver)


START = engine._start


@pytest.fixture
def marks(tmp_path, monkeypatch):
    """(engine, kind) -> indices of the shards that were done."""

    def compute(name: str, kind: str) -> list[int]:
        job = Job("in", str(tmp_path), "lfr", dataset=kind)
        if name == "ray":
            pytest.importorskip("ray", reason="pip install '.[ray]'")
            monkeypatch.setattr(engine, "Worker", Worker)
            found = engine.run_ray(job, TASKS, "local", 2, "cpu")
        else:
            monkeypatch.setattr(engine, "_start", start)
            found = engine.run_processes(job, TASKS, 2, ["cpu"])
        return sorted(mark.index for mark in found)

    return compute


ENGINES = ["processes", pytest.param("ray", marks=pytest.mark.slow)]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills with a signal")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", ["dies:2", "slow:2"])
def test_a_death_is_counted_once_however_long_the_next_start_takes(name, kind, marks, monkeypatch):
    """With a limit of as many deaths as there are: one that was counted twice would end the run."""
    monkeypatch.setattr(engine, "MAX_DEATHS", 2)
    assert marks(name, kind) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ENGINES)
def test_a_shard_that_always_kills_its_worker_ends_the_run(name, marks, monkeypatch):
    monkeypatch.setattr(engine, "MAX_DEATHS", 1)
    with pytest.raises(NemoLfrError, match=r"shard 1: its worker died 2 times|workers died 2 times"):
        marks(name, "dies:9")


@pytest.mark.parametrize("name", ENGINES)
def test_a_worker_that_cannot_start_says_why_at_once(name, marks, capfd):
    with pytest.raises(NemoLfrError, match=r"^a worker cannot start: .*no memory for it$"):
        marks(name, "cannot start")
    if name == "processes":
        assert "Traceback" not in capfd.readouterr().err
