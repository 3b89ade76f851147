"""Tests of lines of text files."""

import pytest

from nemo_lfr.corpus.sources.manifest import Manifest
from nemo_lfr.errors import ConfigError
from nemo_lfr.io import bounded
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.io.text import read_lines

CONTENT = {
    "empty": (b"", [b""]),
    "no line end": (b"a", [b"a"]),
    "line ends": (b"a\r\n\nb\n", [b"a", b"", b"b", b""]),
    "byte order mark": (b"\xef\xbb\xbfa\nb", [b"a", b"b"]),
    "only a byte order mark": (b"\xef\xbb\xbf", [b""]),
}


@pytest.mark.parametrize(("content", "lines"), CONTENT.values(), ids=CONTENT)
def test_lines_have_no_line_ends(tmp_path, content, lines):
    (tmp_path / "x.txt").write_bytes(content)
    assert read_lines(tmp_path / "x.txt") == lines


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_a_file_without_lines_is_not_read_into_memory(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(bounded, "MAX_LINE", 1 << 20)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(bytes((1 << 20) + 1))
    for read in (Manifest, read_manifest) if suffix == "json" else (read_manifest,):
        with pytest.raises(ConfigError, match="line 1 has more than 1 MiB"):
            read(path)
