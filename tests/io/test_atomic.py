"""Tests of atomic writing: a file is complete or absent, leftovers are removed, and links are not followed."""

import errno
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import nemo_lfr
from nemo_lfr.checkpoint import write_checkpoint
from nemo_lfr.checkpoint.folder import export_safetensors, write_folder
from nemo_lfr.codec.golden import export_golden
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io import atomic
from nemo_lfr.io.atomic import (
    NO_SYNC,
    check_overwrite,
    make_folder,
    open_temporary,
    replacing,
    sweep,
    write_bytes,
    write_new,
    writing_folder,
)
from nemo_lfr.io.audio import AudioWriter
from nemo_lfr.io.entropy.find import bundled_model
from nemo_lfr.io.entropy.model import write_model
from nemo_lfr.io.journal import Journal
from nemo_lfr.io.tensor_file import save_tensors
from nemo_lfr.training.prepare import prepare
from tests.corpora import write_tokens
from tests.models import cached_codec, codec_config, write_nemo

HOLD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from nemo_lfr.io.atomic import open_temporary, writing_folder
with writing_folder(Path(sys.argv[1])), open_temporary(Path(sys.argv[1], "a.lfr")):
    print("ready", flush=True)
    sys.stdin.read()
"""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="locks and links of POSIX")


@pytest.mark.slow
def test_temporary_files_are_kept_until_their_writer_dies(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    sweep(tmp_path, ["a.lfr"])
    assert len(list(tmp_path.iterdir())) == 2
    process.kill()
    process.communicate()
    sweep(tmp_path, ["b.lfr"])
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]  # temporary file of another output
    sweep(tmp_path, ["a.lfr"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["a.lfr", "a.lfr.part", "a.lfr.0123456.part", "b.lfr.01234567.part", ".writing-x", "x.writing-01234567"]
)
def test_foreign_files_are_kept(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    sweep(tmp_path, ["a.lfr"])
    assert (tmp_path / name).exists()


def test_nothing_is_opened_or_removed_through_a_link(tmp_path):
    (tmp_path / "outside").mkdir()
    victim = tmp_path / "outside" / "victim"
    victim.write_bytes(b"precious")
    folder = tmp_path / "out"
    folder.mkdir()
    os.symlink(victim, folder / "a.json.part")
    os.symlink(victim, folder / "a.json.01234567.part")
    os.symlink(tmp_path / "outside", folder / ".writing-01234567")
    write_bytes(folder / "a.json", b"new")
    sweep(folder, ["a.json"])
    with writing_folder(folder), open_temporary(folder / "b.lfr") as file:
        file.write(b"x")
    assert victim.read_bytes() == b"precious" and (folder / "a.json").read_bytes() == b"new"
    assert not (folder / "a.json.01234567.part").is_symlink()


@pytest.mark.parametrize("name", ["a" * 255, "a" * 240 + ".json", "\u97f3" * 85, "\U0001f3a4" * 63, "a\n b"])
def test_a_name_of_any_length_that_the_system_takes_is_written(tmp_path, name):
    assert write_bytes(tmp_path / name, [b"new", b"er"]).read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_signal_right_after_a_folder_is_created_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(folder: str) -> None:
        assert os.path.isdir(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_open_folder", interrupt)
    with pytest.raises(KeyboardInterrupt), writing_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_interfere(tmp_path):
    """The last one to finish wins, and neither reads the data of the other."""
    path = tmp_path / "a.json"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        sweep(tmp_path, ["a.json"])  # a third run that is starting
    assert path.read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_writers_and_sweepers_at_the_same_time_lose_nothing(tmp_path):
    """If a file could be swept before it is locked, renaming it would fail."""
    path = tmp_path / "a.json"
    with ThreadPoolExecutor(6) as pool:
        for written in [pool.submit(write_bytes, path, bytes([number])) for number in range(200)]:
            sweep(tmp_path, None)
            written.result()
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_in_the_place_of_a_file_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "a.json" / "mine").mkdir(parents=True)
    with pytest.raises((IsADirectoryError, PermissionError)) as caught:
        write_bytes(tmp_path / "a.json", b"new")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_file_and_names_it(tmp_path):
    """A limit on the file size simulates a full disk: `write` fails in the same way."""
    script = """
import resource, signal, sys
from pathlib import Path
from nemo_lfr.io.atomic import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try: write_bytes(Path(sys.argv[1]), bytes(2000))
except OSError as error: print(error.filename)
"""
    (tmp_path / "a").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_temporary_folders_of_killed_runs_are_removed(tmp_path):
    (tmp_path / ".writing-01234567").mkdir()
    (tmp_path / ".writing-01234567" / "model.nemo").write_bytes(b"x")
    with writing_folder(tmp_path) as folder:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert list(tmp_path.iterdir()) == []


def refuse_links(*_):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def link_twice(source, target, link=os.link):
    """Create a link as NFS does if the first reply is lost: the repeated request fails."""
    link(source, target)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def fail_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


LACKING = {
    "no hard links": ("link", refuse_links),
    "a link that was requested twice": ("link", link_twice),
    **{f"no fsync ({errno.errorcode[number]})": ("fsync", fail_with(number)) for number in NO_SYNC},
}


@pytest.mark.parametrize("kind", LACKING)
@pytest.mark.parametrize("overwrite", [True, False])
def test_files_are_written_on_file_systems_that_lack_a_function(kind, overwrite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", np.zeros(2000), 22050)
    monkeypatch.setattr(os, *LACKING[kind])
    assert write_new(Path("claim"), b"mine")
    write_bytes(Path("a"), b"x", overwrite)
    cached_codec().encode_file("a.wav", Path("a.lfr"), overwrite=overwrite)
    write_audio(Path("b.wav"))
    write_nemo("t.nemo")
    with Journal(Path("journal")) as journal:
        journal.add(1)
    write_tokens(Path("tokens"), "lfr", [1])
    assert sorted(os.listdir()) == ["a", "a.lfr", "a.wav", "b.wav", "claim", "journal", "t.nemo", "tokens"]


def test_an_error_of_fsync_is_not_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_bytes(tmp_path / "a", b"x")
    assert caught.value.filename == str(tmp_path / "a") and os.listdir(tmp_path) == []


def test_all_modules_call_fsync_through_the_function_that_file_systems_without_it_need():
    package = Path(nemo_lfr.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "fsync(" in path.read_text("utf-8")] == ["atomic.py"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_is_written_once_with_and_without_hard_links(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", refuse_links)
    path = tmp_path / "a"
    assert write_new(path, b"first") and not write_new(path, b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


def write_audio(path):
    with AudioWriter(path, 22050) as writer:
        writer.write(np.zeros(10))


# Functions that write the given file, or several files of which this is one.
NEW_FILES = {
    "a.wav": write_audio,
    "a.lfr": lambda path: cached_codec().encode_file("a.wav", path),
    "a.lfrm": lambda path: write_model(bundled_model(), path),
    "a.safetensors": lambda path: export_golden(cached_codec(), path),
    "model.safetensors": lambda path: export_safetensors("t.nemo", path.parent),
    "config.json": lambda path: export_safetensors("t.nemo", path.parent),
    "train.json": lambda path: prepare("folder", Path("in"), path.parent),
    "failures.jsonl": lambda path: prepare("folder", Path("in"), path.parent),
}


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("name", NEW_FILES)
def test_a_file_that_another_program_writes_in_the_meantime_is_kept(name, has_links, tmp_path, monkeypatch):
    if not has_links:
        monkeypatch.setattr(os, "link", refuse_links)
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", np.zeros(2000), 22050)
    write_nemo("t.nemo")
    (tmp_path / "in").mkdir()
    soundfile.write("in/a.wav", np.zeros(2000), 22050)
    (tmp_path / "in" / "bad.wav").write_bytes(b"not audio")
    (tmp_path / "new").mkdir()
    path = tmp_path / "new" / name
    original = os.fsync

    def fsync(descriptor):
        path.write_bytes(b"precious")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(NemoLfrError, match=f"{name} was written by another program in the meantime, and is kept"):
        NEW_FILES[name](path)
    assert path.read_bytes() == b"precious"
    assert not [file for file in os.listdir("new") if file.endswith(".part") or file.startswith(".writing")]


def bind(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


SPECIAL = {"a pipe": os.mkfifo, "a device": lambda path: path.symlink_to("/dev/null"), "a socket": bind}
WRITERS = {
    "check_overwrite": lambda path: check_overwrite(path, overwrite=True),
    "replacing": lambda path: replacing(path).__enter__(),
    "write_bytes": lambda path: write_bytes(path, b"x"),
    "write_checkpoint": lambda path: write_checkpoint(path, codec_config(), {}),
    "encode_file": lambda path: cached_codec().encode_file("a.wav", path, overwrite=True),
    "save_tensors": lambda path: save_tensors(path, torch.zeros(1)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_pipe_or_device_is_never_replaced_by_a_file(kind, writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    soundfile.write("a.wav", np.zeros(2000), 22050)
    path = Path("out")
    SPECIAL[kind](path)
    before = os.lstat(path)
    with pytest.raises(NemoLfrError, match=rf"out: not a regular file but {kind}; choose another output path"):
        WRITERS[writer](path)
    assert os.lstat(path).st_ino == before.st_ino and sorted(os.listdir()) == ["a.wav", "out"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_place_of_an_output_folder_is_named(tmp_path, name):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NemoLfrError, match="file is a file, not a folder; choose another name"):
        make_folder(tmp_path / name)
    with pytest.raises(NemoLfrError, match="is a file, not a folder"):
        write_folder(tmp_path / name, codec_config(), {})
