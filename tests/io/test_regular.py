"""Tests that every reader refuses a pipe, device, socket or folder in place of a file without blocking."""

import os
import socket
from pathlib import Path

import pytest

from nemo_lfr.corpus.formats.base import regular_file
from nemo_lfr.corpus.records import ShardRecord
from nemo_lfr.corpus.token_folder import TokenFolder
from nemo_lfr.corpus.token_tensor import read_token_tensor
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.journal import Journal
from nemo_lfr.io.layouts import text_of
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.text import read_lines

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


@pytest.mark.parametrize("kind", KINDS)
def test_non_regular_transcript_fails_only_its_clip(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    KINDS[kind](Path("a.txt"))
    assert text_of(Path("a.txt")) == ({}, f"the transcript a.txt: not a regular file but {kind}; give the file itself")


@pytest.mark.parametrize("kind", KINDS)
def test_non_regular_record_is_ignored(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ShardRecord.folder(Path()).mkdir(parents=True)
    KINDS[kind](ShardRecord.path(Path(), 0))
    assert ShardRecord.read(Path(), 0) is None
