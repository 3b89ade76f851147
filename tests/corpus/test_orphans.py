"""Tests that processes end with the run that started them, and that a run removes the files of killed runs."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.formats import BUILT_IN
from nemo_lfr.corpus.orphans import VARIABLE, _Kin, die_with
from nemo_lfr.corpus.run import tokenize
from nemo_lfr.errors import NemoLfrError
from tests.corpora import write_codec
from tests.crash import ROOT, on_a_full_disk
from tests.models import RATE, synthesize
from tests.tiers import slow_except

pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
in_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
PATIENCE = 300  # seconds to wait on a busy machine; a leftover process would never end


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_codec(tmp_path_factory.mktemp("model") / "tiny.nemo")


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("audio")
    for number in range(4):
        soundfile.write(root / f"{number}.wav", synthesize(0.2, seed=number), RATE)
    return root


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def carriers(variable: str) -> list[int]:
    """Return the processes that inherited an environment variable."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0") and is_running(int(folder.name)):
                found.append(int(folder.name))
    return found


def descendants(pid: int) -> set[int]:
    """Return the descendants of a process by parent ids, since processes may overwrite their environment."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent in {pid, *found}} - found:
        found |= new
    return found


def start(command: list[object], run: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a driver with shards of one clip. Return it and the environment variable that marks its processes."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "nemo_lfr", *map(str, [*command, "--shard-size", 1])],
        cwd=ROOT,
        env=os.environ | {"TEST_RUN": str(run)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return driver, f"TEST_RUN={run}"


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
def test_worker_ends_if_its_driver_is_already_dead():
    process = multiprocessing.get_context("spawn").Process(target=die_with, args=(os.getpid() + 1,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 1


@pytest.mark.slow
@in_proc
@pytest.mark.parametrize(
    "moment",
    [
        "one process",
        pytest.param("three processes", marks=pytest.mark.slow),
        pytest.param("computing", marks=pytest.mark.slow),
    ],
)
def test_a_killed_driver_leaves_no_process_behind(moment, model, audio, tmp_path):
    out = tmp_path / "out"
    command = ["tokenize", audio, "--out", out, "--model", model, "--device", "cpu", "--workers", 2]
    driver, variable = start(command, tmp_path)
    reached = {
        "one process": lambda: len(carriers(variable)) > 1,
        "three processes": lambda: len(carriers(variable)) > 3,
        "computing": lambda: any((out / ".tokenize").glob("staging/*")),
    }[moment]
    wait_until(lambda: driver.poll() is not None or reached(), moment)
    assert driver.poll() is None
    driver.kill()
    driver.wait()
    wait_until(lambda: not carriers(variable), f"left: {carriers(variable)}")


@in_proc
@pytest.mark.slow
@pytest.mark.parametrize("process", ["gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"])
def test_a_killed_driver_leaves_nothing_of_ray_behind(process, model, audio, tmp_path):
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    command = ["tokenize", audio, "--out", tmp_path / "out", "--model", model, "--ray", "local", "--workers", 1]
    driver, variable = start(command, tmp_path)

    seen: set[int] = set()

    def is_there() -> bool:
        seen.update(descendants(driver.pid))
        for pid in seen:
            with contextlib.suppress(OSError):
                if process.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
        return False

    wait_until(lambda: driver.poll() is not None or is_there(), process)
    assert driver.poll() is None
    driver.kill()
    driver.wait()
    wait_until(
        lambda: not carriers(variable) and not any(map(is_running, seen)), f"left: {carriers(variable)} or {seen}"
    )


@pytest.mark.slow
@in_proc
def test_orphan_with_an_overwritten_environment_is_still_tracked():
    """Ray's agents behave like this: their title overwrites the environment, and they outlive their parent."""
    program = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(999)']\n"
        "print(subprocess.Popen(command, env={}, stdout=subprocess.DEVNULL).pid, flush=True)\n"
        "time.sleep(999)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {VARIABLE: "abc"}, stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
    try:
        kin = _Kin("abc", os.getpid())
        kin.look()
        parent.kill()
        parent.communicate()
        assert is_running(child)
        kin.look()
        assert kin.kill()
        wait_until(lambda: not is_running(child), "the child is still there")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.slow
@in_proc
@pytest.mark.parametrize("is_killed", [True, False])
def test_child_processes_end_only_if_their_parent_was_killed(is_killed):
    script = (
        "import subprocess, sys\nfrom nemo_lfr.corpus.orphans import family\n"
        "with family():\n"
        "    program = 'import time; time.sleep(999)'\n"
        "    child = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.DEVNULL)\n"
        "    print(child.pid, flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    head = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(head.stdout.readline())
    if is_killed:
        head.kill()
        head.communicate()
        wait_until(lambda: not is_running(child), "the child is still there")
    else:
        head.communicate("\n")
        assert head.returncode == 0 and is_running(child)
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("kind", ["lfr", "shar"])
def test_leftovers_of_killed_runs_are_removed_and_never_written_through(kind, model, audio, tmp_path):
    out, victim, outside = tmp_path / "out", tmp_path / "victim", tmp_path / "outside"
    job = TokenizeConfig(str(audio), str(out), kind, model=str(model))
    tokenize(job, device="cpu", workers=1)
    victim.write_text("precious")
    outside.mkdir()
    (outside / "000000.abc").write_text("precious")
    (out / ".tokenize" / "staging").rmdir()
    (out / ".tokenize" / "staging").symlink_to(outside)
    summary = {"lfr": "manifest.json", "shar": "input_cfg.yaml"}[kind]
    links = ["tokens.json", "failures.jsonl", summary, ".tokenize/job.json"]
    links += [".tokenize/folder.json", ".tokenize/done/000000.json"]
    for name in links:
        (out / f"{name}.0a1b2c3d.part").symlink_to(victim)
    (out / ".tokenize" / "done" / "000000.json").unlink()
    tokenize(job, device="cpu", workers=1)
    assert victim.read_text() == (outside / "000000.abc").read_text() == "precious"
    assert not list(out.rglob("*.part")) and not (out / ".tokenize" / "staging").is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("name", [".tokenize", ".tokenize/done"])
def test_a_linked_state_folder_is_refused(name, model, audio, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NemoLfrError, match="is a link"):
        tokenize(TokenizeConfig(str(audio), str(tmp_path / "out"), "lfr", model=str(model)), device="cpu", workers=1)
    assert not list((tmp_path / "elsewhere").iterdir())


# Shards that are damaged between runs.


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(BUILT_IN, "shar"))
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_shard_is_computed_again_to_the_same_bytes(kind, damage, model, audio, tmp_path):
    job = TokenizeConfig(str(audio), str(tmp_path), kind, model=str(model), shard_size=2)
    tokenize(job, device="cpu", workers=1)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = ("*.lfr", "*.pt", "*.parquet", "*.tar", "*.jsonl.gz")
    for path in [found for name in names for found in tmp_path.rglob(name)][1:2] or [next(tmp_path.rglob("*.gz"))]:
        data = bytearray(files[path])
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flipped" else data[:50])
    tokenize(job, device="cpu", workers=1, verify=damage == "flipped")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="limits of files")
@pytest.mark.parametrize(("kind", "free"), [("shar", 4000), ("manifest", 1500), ("parquet", 4000), ("lfr", 150)])
def test_a_full_disk_is_a_one_line_error_and_the_run_can_be_resumed(kind, free, model, audio, tmp_path):
    out = tmp_path / "out"
    arguments = ["tokenize", str(audio), "--out", str(out), "--model", str(model), "--format", kind]
    arguments += ["--device", "cpu", "--workers", "1"]
    text = on_a_full_disk(f"from nemo_lfr.cli.main import main\nmain({arguments!r})", free)
    lines = text.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("nemo-lfr: error: "), text
    assert not (out / "tokens.json").exists() and not list(out.glob("*.part"))
    assert (
        tokenize(TokenizeConfig(str(audio), str(out), kind, model=str(model), dataset=audio.name), device="cpu")[
            "clips"
        ]
        == 4
    )
