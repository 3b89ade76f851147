"""Tests of checkpoints of killed runs: they appear complete, and leftovers are removed before the next run."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from nemo_lfr.errors import ConfigError, NemoLfrError
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.nemo.resume import WholeCheckpoints, tidy_checkpoints, tidy_experiment
from nemo_lfr.nemo.run_lock import unlock_runs


@pytest.fixture(autouse=True)
def unlocked():
    yield
    unlock_runs()


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for age, name in enumerate(names):
        (folder / name).write_bytes(name.encode())
        os.utime(folder / name, (age, age))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["e=0-last.ckpt", "e=1-last.ckpt", "e=1-last-unfinished"], {"e=0-last.ckpt": "e=0-last.ckpt"}),
        (["e=0.ckpt", "e=1-last.ckpt", "e=1-last-unfinished"], {"e=0.ckpt": "e=0.ckpt", "e=0-last.ckpt": "e=0.ckpt"}),
        (["e=0-last.ckpt", "e=1-last.ckpt", "e=2-unfinished", "e=2.ckpt"], {"e=1-last.ckpt": "e=1-last.ckpt"}),
        (["e=0-last.ckpt", "e=0-last-unfinished"], {}),
        (["e=0-last.ckpt", "e=1-last-unfinished"], {"e=0-last.ckpt": "e=0-last.ckpt"}),
        (["e=0-last.ckpt", "e=1.ckpt"], {"e=0-last.ckpt": "e=0-last.ckpt", "e=1.ckpt": "e=1.ckpt"}),
        (["e=0-last.ckpt", "e=1.ckpt.01234567.part"], {"e=0-last.ckpt": "e=0-last.ckpt"}),
    ],
)
def test_next_run_finds_the_last_complete_checkpoint(tmp_path, files, expected):
    make(tmp_path / "run" / "checkpoints", *files)
    tidy_checkpoints(tmp_path / "run")
    assert {path.name: path.read_text() for path in (tmp_path / "run" / "checkpoints").iterdir()} == expected


@pytest.mark.parametrize(
    ("files", "cut", "expected"),
    [  # files, oldest first; truncated files; remaining files, each with the file that it came from
        (["e=0.ckpt", "e=0-last.ckpt"], [], {"e=0.ckpt": "e=0.ckpt", "e=0-last.ckpt": "e=0-last.ckpt"}),
        (["e=0.ckpt", "e=0-last.ckpt"], ["e=0-last.ckpt"], {"e=0.ckpt": "e=0.ckpt", "e=0-last.ckpt": "e=0.ckpt"}),
        (["e=0-last.ckpt", "e=1-last.ckpt"], [], {"e=1-last.ckpt": "e=1-last.ckpt"}),
        (["e=1-last.ckpt", "e=0-last.ckpt"], [], {"e=0-last.ckpt": "e=0-last.ckpt"}),
        (["e=0.ckpt"], [], {"e=0-last.ckpt": "e=0.ckpt"}),
        (["e=0.ckpt"], ["e=0.ckpt"], {}),
        (["e=0-last.ckpt", "e=0.ckpt"], ["e=0.ckpt"], {"e=0-last.ckpt": "e=0-last.ckpt"}),
        (  # averaged weights: two files are one checkpoint
            ["e=0.ckpt", "e=0-EMA.ckpt", "e=0-last.ckpt"],
            [],
            {
                "e=0.ckpt": "e=0.ckpt",
                "e=0-EMA.ckpt": "e=0-EMA.ckpt",
                "e=0-last.ckpt": "e=0.ckpt",
                "e=0-last-EMA.ckpt": "e=0-EMA.ckpt",
            },
        ),
        (
            ["e=0-last.ckpt", "e=0-last-EMA.ckpt", "e=1-last.ckpt", "e=1-last-EMA.ckpt"],
            ["e=1-last-EMA.ckpt"],
            {"e=0-last.ckpt": "e=0-last.ckpt", "e=0-last-EMA.ckpt": "e=0-last-EMA.ckpt"},
        ),
    ],
)
def test_complete_checkpoint_with_a_marker_is_kept(tmp_path, files, cut, expected):
    """The newest one is marked, because the run was killed just before or after renaming it."""
    for age, name in enumerate(files):
        torch.save({"value": name}, tmp_path / name)
        if name in cut:
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
        os.utime(tmp_path / name, (age, age))
    (tmp_path / (files[-1].removesuffix(".ckpt").removesuffix("-EMA") + "-unfinished")).touch()
    tidy_experiment({"resume_if_exists": True, "checkpoint_callback_params": {"dirpath": str(tmp_path)}})
    assert {path.name: torch.load(path)["value"] for path in tmp_path.iterdir()} == expected


@pytest.mark.parametrize("dirpath", ["{folder}", "/elsewhere", None])
def test_training_removes_the_copied_checkpoint_after_the_next_one(dirpath, tmp_path):
    dirpath = dirpath and dirpath.format(folder=tmp_path)
    states = {"ModelCheckpoint": {"dirpath": dirpath, "last_model_path": ""}, "EarlyStopping": {"wait_count": 0}}
    torch.save({"callbacks": states, "state_dict": {"a": torch.arange(3)}}, tmp_path / "e=0.ckpt")
    (tmp_path / "e=0-last-unfinished").touch()
    tidy_experiment({"resume_if_exists": True, "checkpoint_callback_params": {"dirpath": str(tmp_path)}})
    last = torch.load(tmp_path / "e=0-last.ckpt")
    states["ModelCheckpoint"]["last_model_path"] = f"{dirpath}/e=0-last.ckpt" if dirpath else ""
    assert last["callbacks"] == states and torch.equal(last["state_dict"]["a"], torch.arange(3))


def test_an_unfinished_folder_stays_marked(tmp_path):
    make(tmp_path / "checkpoints", "e=0-last-unfinished")
    (tmp_path / "checkpoints" / "e=0-last").mkdir()
    tidy_checkpoints(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ("E/N/checkpoints", {"exp_dir": "E", "name": "N"}),
        ("E/default/checkpoints", {"exp_dir": "E", "name": None}),
        ("nemo_experiments/N/checkpoints", {"name": "N"}),
        ("E/N/v1/checkpoints", {"exp_dir": "E", "name": "N", "version": "v1"}),
        ("L/checkpoints", {"explicit_log_dir": "L", "exp_dir": "E"}),
        ("D", {"exp_dir": "E", "checkpoint_callback_params": {"dirpath": "D"}}),
    ],
)
@pytest.mark.parametrize("resumes", [True, False])
def test_experiment_folder_is_tidied_only_for_resuming(folder, settings, resumes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / folder, "e=0.ckpt", "e=1-last.ckpt", "e=1-last-unfinished")
    torch.save({}, tmp_path / folder / "e=0.ckpt")
    tidy_experiment({**settings, "resume_if_exists": resumes})
    left = {path.name for path in (tmp_path / folder).iterdir()}
    assert left == ({"e=0.ckpt", "e=0-last.ckpt"} if resumes else {"e=0.ckpt", "e=1-last.ckpt", "e=1-last-unfinished"})


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def point_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


# What was done to e=1-last.ckpt, and the error.
NOT_RESUMABLE = {
    "truncated": (cut, r"e=1-last\.ckpt: .* damaged, .*; remove it, and rename e=0\.ckpt to e=0-last\.ckpt"),
    "empty": (lambda path: path.write_bytes(b""), r"e=1-last\.ckpt: .* damaged"),
    "no checkpoint": (lambda path: path.write_bytes(bytes(1000)), r"e=1-last\.ckpt: .* damaged"),
    "a broken link": (point_nowhere, r"e=1-last\.ckpt: .* a link to a missing file"),
    "copied": (
        lambda path: shutil.copy(path, path.with_name("e=2-last.ckpt")),
        "names of 2 checkpoints end in",
    ),
}


@pytest.mark.parametrize("kind", NOT_RESUMABLE)
def test_a_last_checkpoint_that_cannot_be_resumed_is_refused_in_one_line(kind, tmp_path):
    change, message = NOT_RESUMABLE[kind]
    for name in ("e=0.ckpt", "e=1-last.ckpt"):
        torch.save({}, tmp_path / name)
    settings = {"resume_if_exists": True, "checkpoint_callback_params": {"dirpath": str(tmp_path)}}
    tidy_experiment(settings)
    change(tmp_path / "e=1-last.ckpt")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        tidy_experiment(settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.skipif(os.name == "nt", reason="folders have no locks")
def test_a_folder_in_use_is_refused_and_not_changed(tmp_path):
    make(tmp_path, "e=0-last.ckpt", "e=1-last.ckpt", "e=1-last-unfinished")
    settings = {"resume_if_exists": True, "checkpoint_callback_params": {"dirpath": str(tmp_path)}}
    with exclusive(tmp_path), pytest.raises(NemoLfrError, match=f"{tmp_path}: another run is writing to this folder"):
        tidy_experiment(settings)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_folder_stays_locked_until_training_ends(tmp_path):
    settings = {"resume_if_exists": True, "explicit_log_dir": str(tmp_path)}
    for _ in range(2):
        tidy_experiment(settings)
    with pytest.raises(NemoLfrError, match="another run"), exclusive(tmp_path / "checkpoints"):
        pass
    unlock_runs()
    with exclusive(tmp_path / "checkpoints"):
        pass


@pytest.mark.parametrize("settings", [None, {}, {"resume_if_exists": False, "exp_dir": "E"}])
def test_nothing_happens_without_a_run_to_resume(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tidy_experiment(settings)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_replaced_whole(tmp_path):
    for value in (1, 2):
        WholeCheckpoints().save_checkpoint({"value": value}, str(tmp_path / "new" / "a.ckpt"))
    assert torch.load(tmp_path / "new" / "a.ckpt") == {"value": 2}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


@pytest.mark.skipif(os.name == "nt", reason="no such limit")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    script = """
import resource, signal, sys, torch
from nemo_lfr.nemo.resume import WholeCheckpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
WholeCheckpoints().save_checkpoint({"value": torch.zeros(100_000)}, sys.argv[1])
"""
    (tmp_path / "a.ckpt").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a.ckpt"], capture_output=True)
    assert done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"] and (tmp_path / "a.ckpt").read_bytes() == b"old"
