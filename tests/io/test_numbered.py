"""Tests of file names that announce how many files there are."""

from pathlib import Path

import pytest

from nemo_lfr.errors import ConfigError
from nemo_lfr.io.numbered import check_numbered, missing_files

KINDS = {
    "complete": (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], []),
    "the middle": (["t-00000-of-00003.parquet", "t-00002-of-00003.parquet"], ["t-00001-of-00003.parquet"]),
    "the first": (["t-00001-of-00003.arrow", "t-00002-of-00003.arrow"], ["t-00000-of-00003.arrow"]),
    "the last": (["t-00000-of-00003.jsonl", "t-00001-of-00003.jsonl"], ["t-00002-of-00003.jsonl"]),
    "all but one": (["t-1-of-3.pq"], ["t-0-of-3.pq", "t-2-of-3.pq"]),
    "numbered from 1": (["t-1-of-2.parquet", "t-2-of-2.parquet"], []),
    "numbered from 1, a gap": (["t-1-of-3.parquet", "t-3-of-3.parquet"], ["t-2-of-3.parquet"]),
    "a single file": (["train-00000-of-00001.parquet"], []),
    "hashes": (["t-00000-of-00002-0a1b.parquet", "t-00001-of-00002-9f8e.parquet"], []),
    "hashes, a gap": (["t-00000-of-00002-0a1b.parquet"], ["t-00001-of-00002.parquet"]),
    "underscores": (["t_0_of_2.parquet"], ["t_1_of_2.parquet"]),
    "two sets": (["a-0-of-1.parquet", "b-0-of-2.parquet"], ["b-1-of-2.parquet"]),
    "folders": (["en/t-0-of-2.parquet", "en/t-1-of-2.parquet", "de/t-0-of-2.parquet"], ["t-1-of-2.parquet"]),
    "no total": (["0000.parquet", "0002.parquet", "part-00000-c000.snappy.parquet"], []),
    "another meaning": (["9-of-3.parquet", "profile.parquet", "1-of-0.parquet", "0-of-99999999999.parquet"], []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_missing_files_of_a_numbered_set_are_named(kind, tmp_path):
    names, missing = KINDS[kind]
    paths = [tmp_path / name for name in names]
    assert missing_files(paths) == missing
    if not missing:
        return check_numbered(tmp_path, paths)
    with pytest.raises(ConfigError, match=f"files are missing: {missing[0]}"):
        check_numbered(tmp_path, paths)


def test_many_missing_files_are_counted():
    with pytest.raises(ConfigError, match=r"t-005-of-100 and 94 more;") as error:
        check_numbered(Path("corpus"), [Path("t-000-of-100")])
    assert "\n" not in str(error.value)
