"""Tests that the finished work of a long run survives any kind of end."""

import os

import pytest

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.journal import Journal


def test_entries_are_read_back_without_truncated_lines(tmp_path):
    path = tmp_path / "done.jsonl"
    with Journal(path) as journal:
        journal.add(["a", 1])
        journal.add(["b", {"text": "ü\n"}])
    path.write_bytes(path.read_bytes() + b'["c", "half\xc3')
    with Journal(path) as journal:
        assert list(journal) == [["a", 1], ["b", {"text": "ü\n"}]]
        journal.add(["c", 3])
    with Journal(path) as journal:
        assert [key for key, _ in journal] == ["a", "b", "c"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", os.mkdir)])
def test_a_journal_that_is_no_regular_file_is_refused_at_once(make, tmp_path):
    make(tmp_path / "journal.jsonl")
    with (
        pytest.raises(NemoLfrError, match=r"journal\.jsonl: not a regular file but a (folder|pipe); remove it"),
        Journal(tmp_path / "journal.jsonl"),
    ):
        pass
