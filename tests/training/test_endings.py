"""Tests that training scripts report user errors and full disks in one line."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf.errors import MissingMandatoryValue

from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.io.tensor_file import save_tensors
from nemo_lfr.training.endings import ending_in_one_line
from tests.crash import ROOT


def nested(outer: Exception, inner: Exception) -> Exception:
    outer.__context__ = inner
    return outer


class MisconfigurationException(Exception):
    """Exception with the name of Lightning's, so that this test does not need Lightning."""


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
    "a file as a folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "runs/c"), "Not a directory; choose"),
    "a folder as a file": (IsADirectoryError(errno.EISDIR, "Is a directory", "runs/c"), "Is a directory; choose"),
    "an existing file": (FileExistsError(errno.EEXIST, "File exists", "runs/c"), "runs/c: File exists; choose"),
    "a loop of links": (OSError(errno.ELOOP, "Too many levels of symbolic links", "runs/c"), "links; choose"),
    "a long name": (OSError(errno.ENAMETOOLONG, "File name too long", "runs/c"), "File name too long; choose"),
    "over a quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "runs/c"), "Disk quota exceeded; free some space"),
    "a missing value": (MissingMandatoryValue("Missing mandatory value: n\n    full_key: n"), "Missing.* value: n$"),
    "an option of Lightning": (MisconfigurationException("No supported gpu backend\nfound!"), "gpu backend found!$"),
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


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
@pytest.mark.parametrize("folder", ["/proc/x", "/proc/x/y", "/proc/x/../x/y"])
def test_a_folder_that_cannot_be_created_is_reported_in_one_line(folder):
    message = r"error: /proc/x.*: this folder cannot be created \(No such file"
    with pytest.raises(SystemExit, match=message) as caught, ending_in_one_line("runs", None, folder):
        Path(folder, "name").mkdir(parents=True, exist_ok=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        KeyError("x"),
        FileNotFoundError(2, "No such file", "x"),
        FileNotFoundError(2, "No such file", "runs/x"),
        FileNotFoundError(2, "No such file"),
        nested(RuntimeError("a bug"), FileExistsError(errno.EEXIST, "File exists", "x")),
    ],
)
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
