"""Tests of workers that die, cannot start or start slowly. Every executor must count each death once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import soundfile

from nemo_lfr.corpus import executors, ray_executor, worker_failures
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.main_program import safe_imports
from nemo_lfr.errors import NemoLfrError
from tests.corpora import write_codec
from tests.models import RATE, synthesize

TASKS = [(index, {"index": index}) for index in range(4)]


class Worker:
    """Worker without a codec, whose behavior is set by the config's `dataset`: KIND or KIND:TIMES.

    "dies" kills itself in the first TIMES runs of shard 1; "slow" also takes longer for each start after a death;
    "cannot start" raises.
    """

    def __init__(self, config: TokenizeConfig, device: str | None = None, plugins: tuple[type, ...] = ()) -> None:
        self.out = Path(config.out)
        self.kind, _, times = config.dataset.partition(":")
        self.times = int(times or 0)
        if self.kind == "cannot start":
            raise RuntimeError("first line\nno memory for it")
        if self.kind == "slow" and list(self.out.glob("death.*")):
            time.sleep(2)  # calls are rejected or delayed meanwhile

    def ready(self) -> None:
        """Return once the worker is ready."""

    def run(self, index: int, part: dict[str, Any]) -> dict[str, Any]:
        deaths = len(list(self.out.glob("death.*")))
        if index == 1 and deaths < self.times:
            (self.out / f"death.{deaths}").touch()
            staging = self.out / ".tokenize" / "staging" / "000001.0123abcd"
            staging.mkdir(parents=True, exist_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"index": index}


def start(config: TokenizeConfig, devices: Any, driver: int, plugins: tuple[type, ...]) -> None:
    """Initialize a process with the worker of this module."""
    executors.Worker = Worker
    START(config, devices, driver, plugins)


START = executors._start_worker


@pytest.fixture
def computed_shards(tmp_path, monkeypatch):
    """Return a function (executor, kind) -> indices of the computed shards."""

    def compute(name: str, kind: str) -> list[int]:
        config = TokenizeConfig("in", str(tmp_path), "lfr", dataset=kind)
        if name == "ray":
            pytest.importorskip("ray", reason="pip install '.[ray]'")
            monkeypatch.setattr(ray_executor, "Worker", Worker)
            computed = ray_executor.run_ray(config, TASKS, "local", 2, "cpu")
        else:
            monkeypatch.setattr(executors, "_start_worker", start)
            computed = executors.run_processes(config, TASKS, 2, ["cpu"])
        return sorted(record.index for record in computed)

    return compute


EXECUTORS = ["processes", "ray"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="kills with a signal")]


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("kind", ["dies:2", "slow:2"])
def test_deaths_are_counted_once_even_if_the_next_start_is_slow(name, kind, computed_shards, monkeypatch):
    """The limit equals the number of deaths, so that the run would end if a death was counted twice."""
    monkeypatch.setattr(worker_failures, "MAX_DEATHS", 2)
    assert computed_shards(name, kind) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", EXECUTORS)
def test_shard_that_always_kills_its_worker_stops_the_run(name, computed_shards, monkeypatch):
    monkeypatch.setattr(worker_failures, "MAX_DEATHS", 1)
    with pytest.raises(NemoLfrError, match=r"shard 1: its worker died 2 times|workers died 2 times"):
        computed_shards(name, "dies:9")


@pytest.mark.parametrize("name", EXECUTORS)
def test_worker_that_cannot_start_reports_the_reason_at_once(name, computed_shards, capfd):
    with pytest.raises(NemoLfrError, match=r"^a worker cannot start: .*no memory for it$"):
        computed_shards(name, "cannot start")
    if name == "processes":
        assert "Traceback" not in capfd.readouterr().err


RUN = "tokenize(TokenizeConfig(sys.argv[1], sys.argv[2], 'lfr', model=sys.argv[3], shard_size=1), workers=2)"
MAIN_PROGRAMS = {  # the main program, and the error
    "guarded": (f"if __name__ == '__main__':\n    {RUN}", None),
    "unguarded": (RUN, "a worker cannot import the main program"),
    "with an error of its own": (f"{{'__main__': 0}}[__name__]\n{RUN}", "a worker cannot import the main program"),
    "from stdin": (RUN, "is not a file"),
    "removed": (f"os.remove(__file__)\n{RUN}", "is not a file"),
}


@pytest.mark.parametrize("kind", MAIN_PROGRAMS)
def test_main_program_that_workers_cannot_import_is_reported_at_once(kind, tmp_path):
    text, error = MAIN_PROGRAMS[kind]
    text = f"import os, sys\nfrom nemo_lfr.corpus.run import TokenizeConfig, tokenize\n{text}\n"
    (tmp_path / "audio").mkdir()
    for name in "ab":
        soundfile.write(tmp_path / "audio" / f"{name}.wav", synthesize(0.2), RATE)
    model = write_codec(tmp_path / "a.nemo", "two_stages")
    (tmp_path / "main.py").write_text(text)
    script = "-" if kind == "from stdin" else str(tmp_path / "main.py")
    command = [sys.executable, script, str(tmp_path / "audio"), str(tmp_path / "out"), str(model)]
    environment = os.environ | {"PYTHONPATH": str(Path(executors.__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, input=text if script == "-" else "", env=environment, capture_output=True, text=True, timeout=300
    )
    if error is None:
        assert done.returncode == 0, done.stderr
        return
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and error in last and 'if __name__ == "__main__":' in last, done.stderr
    if kind == "unguarded":  # the workers print no traceback
        assert "spawn_main" not in done.stderr


WITH_WORKERS = {
    "tokenize": ["tokenize", "manifest.json", "--out", "out", "--shard-size", 1, "--workers", 2],
    "tokenize with Ray": ["tokenize", "manifest.json", "--out", "out", "--ray", "local", "--workers", 1],
    "evaluate": ["evaluate", "manifest.json", "--out", "out", "--codec", "lfr", "--workers", 2],
}


def test_safe_imports_last_until_all_threads_have_left_them(monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    first, second = safe_imports(), safe_imports()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert os.environ["PYTHONSAFEPATH"]
    second.__exit__(None, None, None)
    assert "PYTHONSAFEPATH" not in os.environ
    monkeypatch.setenv("PYTHONSAFEPATH", "mine")
    with safe_imports():
        assert os.environ["PYTHONSAFEPATH"] == "mine"
    assert os.environ["PYTHONSAFEPATH"] == "mine"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot prevent it")
@pytest.mark.parametrize("name", WITH_WORKERS)
def test_workers_import_nothing_from_the_current_folder(name, tmp_path):
    if "Ray" in name:
        pytest.importorskip("ray", reason="pip install '.[ray]'")
    for stem in "ab":
        soundfile.write(tmp_path / f"{stem}.wav", synthesize(0.5), RATE)
    entries = [{"audio_filepath": f"{stem}.wav", "duration": 0.5} for stem in "ab"]
    (tmp_path / "manifest.json").write_text("\n".join(map(json.dumps, entries)))
    for module in ("pickle", "types", "selectors", "nemo_lfr", "numpy"):
        (tmp_path / f"{module}.py").write_text(
            "import os\nos.close(os.open('imported', os.O_CREAT))\nraise ImportError"
        )
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "main.py"
    program.write_text("from nemo_lfr.cli.main import main\nif __name__ == '__main__':\n    main()\n")
    command = [sys.executable, program, *WITH_WORKERS[name]]
    environment = os.environ | {"PYTHONPATH": str(Path(executors.__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()
