"""Tests of two simultaneous runs in one output folder: the second one is refused, and changes nothing."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import lock
from nemo_lfr.io.exclusive import exclusive
from tests.cli.test_cli import run
from tests.models import synthesize
from tests.tiers import slow_except

soundfile = pytest.importorskip("soundfile")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="folders have no locks")


@pytest.mark.parametrize("command", slow_except(["prepare", "evaluate"], "prepare"))
def test_a_second_run_in_one_folder_is_refused(command, tmp_path, capsys):
    pytest.importorskip("pesq" if command == "evaluate" else "soundfile")
    soundfile.write(tmp_path / "a.wav", synthesize(0.5, 0), 22050)
    (tmp_path / "m.json").write_text('{"audio_filepath": "a.wav", "duration": 0.5}\n')
    source = ["folder", tmp_path] if command == "prepare" else [tmp_path / "m.json"]
    out = tmp_path / "out"
    out.mkdir()
    with exclusive(out):
        code, _, stderr = run(capsys, command, *source, "--out", out)
        assert code == 2 and "another run is writing to this folder" in stderr and not list(out.iterdir())
    code, _, stderr = run(capsys, command, *source, "--out", out, *(["--workers", 1] if command == "evaluate" else []))
    assert code == 0, stderr


def test_a_lock_ends_with_its_process(tmp_path):
    program = "import os, sys; from pathlib import Path; from nemo_lfr.io.exclusive import exclusive\n"
    program += "with exclusive(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == -9
    with exclusive(tmp_path), pytest.raises(NemoLfrError, match="another run"), exclusive(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """The child, such as a worker of a data loader, may live a few seconds longer than a killed run."""
    read, write = os.pipe()
    with exclusive(tmp_path):
        child = os.fork()
        if not child:
            os.write(write, b"x")
            signal.pause()
        os.read(read, 1)
        with pytest.raises(NemoLfrError, match="another run"), exclusive(tmp_path):
            pass
    try:
        with exclusive(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_file_is_locked_where_folders_cannot_be(tmp_path, monkeypatch):
    """Simulate a network drive, which can lock only files that are open for writing."""
    descriptors = []

    def lock_files(descriptor, shared):
        descriptors.append(descriptor)
        return lock(descriptor, shared) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None

    monkeypatch.setattr("nemo_lfr.io.exclusive.lock", lock_files)
    with exclusive(tmp_path), pytest.raises(NemoLfrError, match="another run"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert len(descriptors) == 6
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
