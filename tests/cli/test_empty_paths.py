"""Tests of paths that are refused: empty ones (`Path("")` is the current folder), URLs and links to nothing."""

import shlex

import numpy as np
import pytest
import soundfile

from nemo_lfr.codec.onnx.export import export_onnx
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.dataset import TokenDataset
from nemo_lfr.corpus.run import tokenize
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.pretrained import load
from tests.cli.test_cli import run
from tests.models import cached_codec

COMMANDS = [
    "encode ''",
    "encode a.wav ''",
    "encode a.wav --out ''",
    "encode a.wav --overwrite --model ''",
    "encode '' -",
    "decode ''",
    "decode a.lfr --out=",
    "decode '' -",
    "info ''",
    "demo --out ''",
    "prepare folder '' --out out",
    "prepare folder audio --out ''",
    "tokenize '' --out out",
    "tokenize audio --out ''",
    "tokenize audio --out out --audio-dir ''",
    "tokenize audio --out out --model ''",
    "detokenize '' --out out",
    "detokenize tokens --out ''",
    "evaluate '' --out out",
    "evaluate audio/m.json --out ''",
    "evaluate audio/m.json --out out --audio-dir ''",
    "export onnx --out ''",
]


@pytest.mark.parametrize("line", COMMANDS)
def test_an_empty_path_is_a_one_line_error_in_every_command(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audio").mkdir()
    for name in ("a.wav", "a.lfr", "audio/m.json"):
        (tmp_path / name).write_bytes(b"mine")
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), 22050)
    code, printed, err = run(capsys, *shlex.split(line))
    errors = [text for text in err.splitlines() if not text.startswith("using the bundled codec")]
    assert (code, printed, len(errors)) == (2, "", 1) and "''" in errors[0], err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.lfr", "a.wav", "audio"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("tokenize s3://bucket/m.json --out out", "s3://bucket/m.json: only local files and folders are read"),
        ("tokenize audio --out hf://datasets/x", "hf://datasets/x: only local files and folders are read"),
        ("encode https://host/a.wav", "https://host/a.wav: only local files and folders are read"),
        ("prepare folder audio --out link", "link is a link to a missing folder; create that folder"),
        ("tokenize audio --out link", "link is a link to a missing folder; create that folder"),
        ("tokenize audio --out link/tokens", "link is a link to a missing folder; create that folder"),
    ],
)
def test_a_url_or_a_link_to_a_missing_folder_is_a_one_line_error(line, reason, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", np.zeros(1000), 22050)
    (tmp_path / "link").symlink_to("gone")
    code, printed, err = run(capsys, *shlex.split(line))
    errors = [text for text in err.splitlines() if not text.startswith("using the bundled codec")]
    assert (code, printed, len(errors)) == (2, "", 1) and reason in errors[0], err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "link"]


CALLS = {
    "load": lambda: load(""),
    "TokenDataset": lambda: TokenDataset(""),
    "read_manifest": lambda: read_manifest(""),
    "audio_dir": lambda: read_manifest("m.json", ""),
    "encode_file": lambda: cached_codec("symmetric").encode_file("", "a.lfr"),
    "encode_file to": lambda: cached_codec("symmetric").encode_file("a.wav", ""),
    "decode_file": lambda: cached_codec("symmetric").decode_file("", "a.wav"),
    "tokenize": lambda: tokenize(TokenizeConfig("", "out", "lfr")),
    "a URL": lambda: tokenize(TokenizeConfig("s3://bucket/''", "out", "lfr")),
    "tokenize to": lambda: tokenize(TokenizeConfig("audio", "", "lfr")),
    "tokenize, audio_dir": lambda: tokenize(TokenizeConfig("audio", "out", "lfr", audio_dir="")),
    "export_onnx": lambda: export_onnx(cached_codec("symmetric"), ""),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_empty_path_is_an_error_in_python(name, tmp_path, monkeypatch):
    if name == "export_onnx":
        pytest.importorskip("onnxscript", reason="pip install '.[onnx]'")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NemoLfrError, match="''"):
        CALLS[name]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [".", " ", "~", "a"])
def test_other_short_paths_are_accepted(path):
    assert str(expand_home(path))
