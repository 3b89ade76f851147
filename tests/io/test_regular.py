"""Tests that every reader refuses a pipe, device, socket, folder or Git LFS pointer in place of a file."""

import io
import os
import socket
from pathlib import Path

import pytest

import nemo_lfr
from nemo_lfr.cli.info import describe
from nemo_lfr.codec.onnx.manifest import read_verified
from nemo_lfr.corpus.formats.base import regular_file
from nemo_lfr.corpus.records import ShardRecord
from nemo_lfr.corpus.token_folder import TokenFolder
from nemo_lfr.corpus.token_tensor import read_token_tensor
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.journal import Journal
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.io.regular import _NamedFile, open_regular
from nemo_lfr.io.text import read_lines
from nemo_lfr.io.token_file import TokenReader
from nemo_lfr.io.transcripts import text_of

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def bind(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


KINDS = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a socket": bind,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
READERS = {
    "open_regular": open_regular,
    "read_lines": read_lines,
    "read_manifest": read_manifest,
    "regular_file": regular_file,
    "read_token_tensor": read_token_tensor,
    "journal": lambda path: Journal(path).__enter__(),
    "tokens.json": lambda path: TokenFolder(path.parent),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_non_regular_path_is_refused_without_blocking(kind, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    path = Path("tokens.json")
    KINDS[kind](path)
    link = reader == "journal" and kind == "a device"
    with pytest.raises(NemoLfrError, match="is a link" if link else rf"tokens\.json: not a regular file but {kind}"):
        READERS[reader](path)


@pytest.mark.parametrize("read", [lambda file: file.read(), lambda file: file.read(8), list])
def test_an_error_while_a_file_is_read_names_the_file(read, tmp_path):
    path = tmp_path / "a"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)  # reading from it fails, as from a damaged disk
    with (
        io.BufferedReader(_NamedFile(descriptor, path)) as file,
        pytest.raises(OSError, match="Bad file descriptor") as caught,
    ):
        read(file)
    assert caught.value.filename == str(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="this system has no such file")
def test_an_error_while_a_file_is_opened_names_the_file():
    with pytest.raises(OSError, match="Input/output error") as caught:
        open_regular("/proc/self/mem")
    assert caught.value.filename == "/proc/self/mem"


@pytest.mark.parametrize("kind", KINDS)
def test_non_regular_transcript_fails_only_its_clip(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    KINDS[kind](Path("a.txt"))
    assert text_of(Path("a.txt"), corpus=Path("/"), audio=Path("a.wav")) == (
        {},
        f"the transcript a.txt: not a regular file but {kind}; pass the path of a regular file",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_non_regular_record_is_ignored(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ShardRecord.folder(Path()).mkdir(parents=True)
    KINDS[kind](ShardRecord.path(Path(), 0))
    assert ShardRecord.read(Path(), 0) is None


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"


def load_folder(path: Path) -> None:
    nemo_lfr.load(path.parent)


# name -> (other files of its folder, the pointer, reader of the pointer)
POINTERS = {
    "a .nemo": ([], "a.nemo", nemo_lfr.load),
    "a .ckpt": ([], "a.ckpt", nemo_lfr.load),
    "the config of an unpacked .nemo": (["model_weights.ckpt"], "model_config.yaml", load_folder),
    "the weights of an unpacked .nemo": (["model_config.yaml"], "model_weights.ckpt", load_folder),
    "the config of a safetensors folder": (["model.safetensors"], "config.json", load_folder),
    "the weights of a safetensors folder": (["config.json"], "model.safetensors", load_folder),
    "the manifest of ONNX files": (["encoder.onnx"], "codec.json", load_folder),
    "an ONNX file": ([], "encoder.onnx", lambda path: read_verified(path.parent, path.name, None)),
    "a token file": ([], "a.lfr", TokenReader),
    "an entropy model": ([], "a.lfrm", EntropyModel.read),
    "audio": ([], "a.wav", lambda path: AudioReader(path, None)),
    "audio that FFmpeg reads": ([], "a.m4a", lambda path: AudioReader(path, None)),
    "a manifest": ([], "a.jsonl", read_manifest),
    "info": ([], "b.nemo", lambda path: describe(str(path))),
}


@pytest.mark.parametrize("kind", POINTERS)
def test_a_git_lfs_pointer_is_named_by_every_reader(kind, tmp_path):
    others, name, reader = POINTERS[kind]
    for other in others:
        (tmp_path / other).write_bytes(b"a: 1")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(NemoLfrError, match=rf"{name}: this is a Git LFS pointer, not the file itself; run `git lfs"):
        reader(tmp_path / name)
