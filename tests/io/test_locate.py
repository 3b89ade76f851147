"""Tests of paths that users pass: links that form a loop, and links to missing files."""

import os
import shlex

import numpy as np
import pytest
import soundfile

from nemo_lfr.io.locate import resolve, resolve_folder
from tests.cli.test_cli import run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")

# Command line by kind of path. `loop` is a link to itself, and `cut` a link to a missing file.
COMMANDS = {
    "tokenize, corpus": "tokenize loop --out out",
    "tokenize, out": "tokenize audio --out loop",
    "tokenize, below out": "tokenize audio --out loop/below",
    "tokenize, model": "tokenize audio --out out --model loop",
    "encode, input": "encode loop",
    "encode, out": "encode audio --out loop",
    "encode, linked out": "encode audio/a.wav --out cut.lfr",
    "decode, input": "decode loop",
    "decode, linked out": "decode a.lfr --out cut.wav",
    "prepare, corpus": "prepare folder loop --out out",
    "prepare, out": "prepare folder audio --out loop",
    "evaluate, manifest": "evaluate loop --out out",
    "evaluate, out": "evaluate audio/m.json --out loop",
    "info": "info loop",
    "detokenize, tokens": "detokenize loop --out out",
    "export, out": "export safetensors --out loop",
    "entropy, out": "entropy fit audio --out cut.lfrm",
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_broken_link_is_a_one_line_error_and_is_kept(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audio").mkdir()
    for name in ("audio/a.wav", "a.lfr", "audio/m.json"):
        (tmp_path / name).write_text('{"audio_filepath": "a.wav", "duration": 1}\n')
    soundfile.write(tmp_path / "audio/a.wav", np.zeros(1000), 22050)
    (tmp_path / "a.lfr").write_bytes(b"LFRT")
    for name, target in {"loop": "loop", "cut.lfr": "gone", "cut.wav": "gone", "cut.lfrm": "gone"}.items():
        (tmp_path / name).symlink_to(target)
    before = {path: os.readlink(path) for path in tmp_path.iterdir() if path.is_symlink()}
    code, _, err = run(capsys, *shlex.split(COMMANDS[kind]))
    errors = [line for line in err.splitlines() if "using the bundled codec" not in line]
    assert code in (1, 2) and "unexpected" not in err and "Traceback" not in err
    assert any(name in errors[-1] for name in ("loop", "cut.")), err
    assert {path: os.readlink(path) for path in tmp_path.iterdir() if path.is_symlink()} == before
    assert not (tmp_path / "gone").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("function", [resolve, resolve_folder])
@pytest.mark.parametrize("name", ["loop", "loop/below", "to_loop", "sub/../loop"])
def test_resolve_names_the_path_of_a_loop(name, function, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to_loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links") as raised:
        function(tmp_path / name)
    assert raised.value.filename == str(tmp_path / name)


def test_resolve_follows_links_and_accepts_missing_files(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path)
    assert resolve("link/missing") == tmp_path.resolve() / "folder" / "missing"
    (tmp_path / "folder" / "a.csv").symlink_to("blob")  # at first a link to nothing
    for _ in range(2):
        assert resolve("link/a.csv") == tmp_path.resolve() / "folder" / "blob"
        assert resolve_folder("link/a.csv") == tmp_path.resolve() / "folder" / "a.csv"
        (tmp_path / "folder" / "blob").write_text("")
    assert resolve_folder("link") == resolve_folder("folder/../link/.") == tmp_path.resolve() / "folder"
