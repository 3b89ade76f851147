"""Tests that training scripts report user errors and full disks in one line."""

import errno
import logging
import subprocess
import sys

import pytest
import torch

from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.io.tensor_file import save_tensors
from nemo_lfr.training.endings import ending_in_one_line
from tests.crash import ROOT


def nested(outer: Exception, inner: Exception) -> Exception:
    outer.__context__ = inner
    return outer


FULL = OSError(errno.ENOSPC, "No space left on device")
LINES = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "runs/a.ckpt"), r"runs/a\.ckpt: No space left"),
    "a full disk, unnamed": (OSError(errno.ENOSPC, "No space left on device"), "runs: No space left on device"),
    "torch's on top": (
        nested(RuntimeError("unexpected pos 704 vs 598"), FULL),
        "runs: No space left on device; .*free some space",
    ),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "runs/b"), "runs/b: Permission denied"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "runs/b"), "runs/b: Read-only file system"),
    "a mistake": (ConfigError("batch_size must be set."), r"error: batch_size must be set\.$"),
    "of a worker": (
        AudioError("Caught AudioError in DataLoader worker process 0.\nTraceback:\nAudioError: a.wav: cut.\n"),
        r"error: .*a\.wav: cut\.$",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_user_errors_are_reported_in_one_line(name):
    error, text = LINES[name]
    with pytest.raises(SystemExit, match=text) as caught, ending_in_one_line("runs"):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("x"), FileNotFoundError(2, "No such file", "x")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), ending_in_one_line("runs"):
        raise error


def test_logging_is_as_it_was_afterwards():
    before = logging.raiseExceptions
    with ending_in_one_line():
        assert not logging.raiseExceptions
    assert logging.raiseExceptions is before


SAVE = """
import resource, signal, sys, torch
from pathlib import Path
from nemo_lfr.io.tensor_file import save_tensors
from nemo_lfr.training.endings import ending_in_one_line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
with ending_in_one_line("runs"):
    save_tensors(Path(sys.argv[1]), {"value": torch.zeros(100_000)})
"""


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 10, 10_000, 399_999, 400_500])
def test_a_full_disk_names_the_file_of_tensors_and_keeps_the_old_one(free, tmp_path):
    path = tmp_path / "a.pt"
    save_tensors(path, {"value": torch.ones(3)})
    arguments = [sys.executable, "-c", SAVE, path, str(free)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {path}: File too large; ") and done.stderr.count("\n") == 1
    assert torch.load(path)["value"].tolist() == [1, 1, 1] and [found.name for found in tmp_path.iterdir()] == ["a.pt"]
