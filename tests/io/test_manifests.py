"""Tests of NeMo manifests with byte order marks, `~` in paths, and invalid lines."""

import json
import logging
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.cli.main import main
from nemo_lfr.corpus.sources.manifest import Manifest
from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.io.manifests import MAX_SECONDS, read_manifest, resolve_audio_path
from nemo_lfr.training.data import CodecDataset
from tests.models import RATE, synthesize


def test_all_readers_resolve_paths_alike(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for name, expected in {
        "a.wav": "audio/a.wav",
        "../a.wav": "audio/../a.wav",
        "~/a.wav": "home/a.wav",
        "~nobody-has-this-name.wav": "audio/~nobody-has-this-name.wav",
        str(tmp_path / "b.wav"): "b.wav",
    }.items():
        assert resolve_audio_path(tmp_path / "audio", name) == tmp_path / expected
    assert resolve_audio_path("~/corpus", "a.wav") == tmp_path / "home" / "corpus" / "a.wav"


@pytest.mark.parametrize("name", [7, None, ["a"], "", "a\0b", "x" * 300, "\u8a9e" * 90 + ".wav", "\ud83d"])
def test_impossible_file_name_fails_only_its_line(name):
    with pytest.raises((TypeError, ValueError)):
        resolve_audio_path("audio", name)


BAD_LINES = {
    "infinite duration": '{"audio_filepath": "a.wav", "duration": Infinity}',
    "NaN duration": '{"audio_filepath": "a.wav", "duration": NaN}',
    "negative duration": '{"audio_filepath": "a.wav", "duration": -1}',
    "absurd duration": '{"audio_filepath": "a.wav", "duration": 1e300}',
    "a digit too many": '{"audio_filepath": "a.wav", "duration": 1' + "0" * 5000 + "}",
    "infinite offset": '{"audio_filepath": "a.wav", "duration": 1, "offset": Infinity}',
    "a word": '{"audio_filepath": "a.wav", "duration": "long"}',
    "a long name": json.dumps({"audio_filepath": "x" * 300, "duration": 1}),
    "a long name in UTF-8": json.dumps({"audio_filepath": "\u8a9e" * 90, "duration": 1}),
    "NUL": '{"audio_filepath": "a\\u0000.wav", "duration": 1}',
    "half a character": '{"audio_filepath": "\\ud83d.wav", "duration": 1}',
    "no path": '{"duration": 1}',
    "a list": "[1, 2]",
    "half a line": '{"audio_filepath": "a.wav", "dura',
    "nested": '{"audio_filepath": ' + "[" * 5000,
    "Latin-1": b'{"audio_filepath": "a.wav", "duration": 1, "text": "caf\xe9"}',
    "missing, without duration": '{"audio_filepath": "gone.wav"}',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_invalid_line_skips_only_its_recording(kind, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    soundfile.write(tmp_path / "a.wav", synthesize(1), RATE)
    bad = BAD_LINES[kind]
    good = b'{"audio_filepath": "a.wav", "duration": 1, "text": NaN}'
    (tmp_path / "m.json").write_bytes(b"\n".join([good, bad.encode() if isinstance(bad, str) else bad, good, b""]))
    dataset = CodecDataset({"mine": {"manifest_path": str(tmp_path / "m.json")}}, RATE)
    assert len(dataset) == 2 and dataset[1]["audio_len"] == RATE
    assert caplog.text.count("line 2: skipped") == 1
    assert dataset.recordings[0].labels["text"] is None
    (tmp_path / "bad.json").write_bytes(bad.encode() if isinstance(bad, str) else bad)
    with pytest.raises(ConfigError, match="line 1") as error:
        read_manifest(tmp_path / "bad.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("hello", "not JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[" * 5000, "not JSON (nested too deeply)"),
        ("[1]", "[1] is not a JSON object"),
        ("5", "5 is not a JSON object"),
        ('{"a": 1}', "the entry has no key 'audio_filepath'"),
        ('{"audio_filepath": 5}', "the path of the audio file is 5, not text"),
        ('{"audio_filepath": ""}', "'' is not a valid file name"),
        ('{"audio_filepath": "a", "duration": "x"}', "duration is 'x'; expected a number of seconds from 0 to 1e+07"),
        (
            '{"audio_filepath": "a", "duration": "1,25"}',
            "duration is '1,25'; expected a number of seconds from 0 to 1e+07, with a decimal point",
        ),
        (
            '{"audio_filepath": "a", "duration": "1.234,5"}',
            "duration is '1.234,5'; expected a number of seconds from 0 to "
            "1e+07, with a decimal point and without thousands separators",
        ),
        (
            '{"audio_filepath": "a", "duration": "1 234.5"}',
            "duration is '1 234.5'; expected a number of seconds from 0 to "
            "1e+07, with a decimal point and without thousands separators",
        ),
        (
            '{"audio_filepath": "a", "duration": "1.2 s"}',
            "duration is '1.2 s'; expected a number of seconds from 0 to 1e+07; "
            "convert the value to seconds if necessary, and leave out the unit",
        ),
        (
            '{"audio_filepath": "a", "duration": "00:01.5"}',
            "duration is '00:01.5'; expected a number of seconds from 0 to "
            "1e+07; convert hours and minutes to seconds",
        ),
        ('{"audio_filepath": "a", "duration": "1_5"}', "duration is '1_5'; expected a number of seconds"),
        ('{"audio_filepath": "a", "duration": true}', "duration is True; expected a number of seconds"),
        (
            '{"audio_filepath": "a", "duration": "99999999.5"}',
            "duration is '99999999.5'; expected a number of seconds from 0 to 1e+07",
        ),
        ('{"audio_filepath": "a", "duration": [1]}', "duration is [1]; expected a number of seconds"),
        ('{"audio_filepath": "a", "duration": -1}', "duration is -1; expected a number of seconds"),
        ('{"audio_filepath": "a", "duration": 1, "offset": 1e30}', "offset is 1e+30; expected a number of seconds"),
    ],
)
def test_both_readers_of_manifests_give_the_same_reason(line, reason, tmp_path):
    good = '{"audio_filepath": "a.wav", "duration": 1}'
    (tmp_path / "m.json").write_text(f"{good}\n{line}\n")
    problems: list[str] = []
    read_manifest(tmp_path / "m.json", on_bad_line=problems.append)
    assert len(problems) == 1 and f"line 2: skipped: {reason}" in problems[0]
    manifest = Manifest(tmp_path / "m.json")
    _, clip = manifest.read(manifest.shards(9)[0])
    with pytest.raises(AudioError) as caught:
        clip.audio(RATE, 100)
    assert f": this line cannot be used: {reason}" in str(caught.value)
    (tmp_path / "bad.json").write_text(f"{line}\n" * 2)
    with pytest.raises(ConfigError) as refused:
        read_manifest(tmp_path / "bad.json")
    assert f"line 1: this line cannot be used: {reason}" in str(refused.value)
    assert str(refused.value).endswith(" (1 more line cannot be used); expected a NeMo manifest.")


def test_byte_order_marks_and_other_line_ends_are_read(tmp_path):
    line = json.dumps({"audio_filepath": "a.wav", "duration": 1.0, "text": "a\u2028b"}, ensure_ascii=False).encode()
    for name, data in {"bom": b"\xef\xbb\xbf" + line, "crlf": line + b"\r\n\r\n" + line}.items():
        (tmp_path / name).write_bytes(data)
        assert {recording.labels["text"] for recording in read_manifest(tmp_path / name)} == {"a\u2028b"}
    (tmp_path / "utf16").write_bytes(line.decode().encode("utf-16"))
    with pytest.raises(ConfigError, match="UTF-16 text; save it as UTF-8"):
        read_manifest(tmp_path / "utf16")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"not a regular file but a folder|No such file"):
            read_manifest(path)


def test_home_folders_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "audio").mkdir()
    (tmp_path / "m.json").write_text('{"audio_filepath": "a.wav", "duration": 1}')
    (recording,) = read_manifest("~/m.json", "~/audio")
    assert recording.path == tmp_path / "audio" / "a.wav" and recording.name == Path("a.wav")
    assert read_manifest("~/m.json")[0].path == tmp_path / "a.wav"
    with pytest.raises(ConfigError, match=r"~nobody-has-this-name.m\.json: the manifest cannot be read"):
        read_manifest("~nobody-has-this-name/m.json")


@pytest.mark.slow
def test_evaluate_reports_skipped_lines_with_exit_code_1(tmp_path, capsys):
    pytest.importorskip("jinja2", reason="pip install '.[eval]'")
    soundfile.write(tmp_path / "a.wav", synthesize(0.5), RATE)
    lines = ['{"audio_filepath": "a.wav", "duration": 0.5}', '{"audio_filepath": "a.wav", "duration": Infinity}']
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    with pytest.raises(SystemExit) as exit_:
        main(
            ["evaluate", str(tmp_path / "m.json"), "--out", str(tmp_path / "out"), "--workers", "1", "--device", "cpu"]
        )
    assert exit_.value.code == 1
    assert "line 2: skipped: duration is inf; expected a number" in capsys.readouterr().err
    assert float(MAX_SECONDS) < float("inf")
