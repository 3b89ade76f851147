"""Checkpoints of a killed training: put in place whole, and tidied before the next run."""

import os
import subprocess
import sys

import pytest
import torch

from nemo_lfr.training.resume import WholeCheckpoints, tidy_checkpoints


def make(folder, *names):
    folder.mkdir(parents=True)
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
def test_the_last_whole_checkpoint_is_what_the_next_run_finds(tmp_path, files, expected):
    make(tmp_path / "run" / "checkpoints", *files)
    tidy_checkpoints(tmp_path / "run")
    assert {path.name: path.read_text() for path in (tmp_path / "run" / "checkpoints").iterdir()} == expected


def test_a_checkpoint_is_replaced_whole(tmp_path):
    for value in (1, 2):
        WholeCheckpoints().save_checkpoint({"value": value}, str(tmp_path / "new" / "a.ckpt"))
    assert torch.load(tmp_path / "new" / "a.ckpt") == {"value": 2}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


@pytest.mark.skipif(os.name == "nt", reason="no such limit")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    script = """
import resource, signal, sys, torch
from nemo_lfr.training.resume import WholeCheckpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
WholeCheckpoints().save_checkpoint({"value": torch.zeros(100_000)}, sys.argv[1])
"""
    (tmp_path / "a.ckpt").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a.ckpt"], capture_output=True)
    assert done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"] and (tmp_path / "a.ckpt").read_bytes() == b"old"
