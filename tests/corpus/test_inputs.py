"""Tests of invalid corpora: only the clip of an invalid entry fails, and an invalid file is a one-line error."""

import io
import json
import sys

import numpy as np
import pytest
import soundfile

from nemo_lfr.corpus.clip_checks import check_clip
from nemo_lfr.corpus.sources import open_corpus
from nemo_lfr.corpus.sources.base import Clip
from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.io import layouts
from nemo_lfr.io.tables import METADATA_NAMES
from tests.models import RATE, synthesize
from tests.permissions import closed

WAVE = synthesize(0.2)


def clips_of(path, audio_dir=None) -> dict:
    corpus = open_corpus(path, audio_dir, path.parent / "unused.json")
    return {clip.id: clip for part in corpus.shards(100) for clip in corpus.read(part)}


TRANSCRIPTS = {
    "Latin-1": "caf\u00e9".encode("latin-1"),
    "UTF-16": "\ufeffhello".encode("utf-16-le"),
    "of NUL bytes": b"hel\0lo",
    "a folder": None,
    "a link to nothing": "gone.txt",
}


@pytest.mark.parametrize("kind", TRANSCRIPTS)
def test_invalid_transcript_fails_only_its_clip(kind, tmp_path):
    root = tmp_path / "audio"
    root.mkdir()
    for name in "abc":
        soundfile.write(root / f"{name}.wav", WAVE, RATE)
    data = TRANSCRIPTS[kind]
    if data is None:
        (root / "b.txt").mkdir()
    elif isinstance(data, str):
        (root / "b.txt").symlink_to(data)
    else:
        (root / "b.txt").write_bytes(data)
    (root / "c.txt").write_bytes(b"\xef\xbb\xbfhello\r\nthere\r\n")
    clips = clips_of(root)
    assert (
        clips.keys() == set("abc") and clips["c"].labels["text"] == "hello there" and "text" not in clips["a"].labels
    )
    for name in "ac":
        assert len(clips[name].audio(RATE, 100)) == len(WAVE)
    with pytest.raises(AudioError, match=r"b\.wav: the transcript b\.txt: "):
        clips["b"].audio(RATE, 100)


def test_only_transcripts_that_exist_are_looked_for(tmp_path, monkeypatch):
    """Asking a network drive for the transcripts of a million recordings would take long."""
    for name in ("a.wav", "b.wav", "b.TXT", "c.wav", "c.txt", "other.txt"):
        (tmp_path / name).write_text("x")
    asked = []
    monkeypatch.setattr("nemo_lfr.io.layouts.text_of", lambda *paths, **_: asked.append(paths) or ({}, None))
    assert len(list(layouts.folder(tmp_path))) == 3
    assert asked == [(), (tmp_path / "b.TXT",), (tmp_path / "c.txt",)]


METADATA = {
    "Latin-1": "file_name,caf\u00e9\n".encode("latin-1"),
    "UTF-16": "file_name,text\na.wav,x\n".encode("utf-16"),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "a link to nothing": "gone.csv",
    "not readable": b'{"file_name": "a.wav", "text": "x"}',
    "empty": b"",
    "a list": b"[1]",
    "of another kind": b'{"title": "x"}',
    "of LJSpeech": b"LJ001-0001|text|text",
}


@pytest.mark.parametrize("name", METADATA_NAMES)
@pytest.mark.parametrize("kind", METADATA)
def test_invalid_table_of_a_folder_is_one_failure(kind, name, tmp_path):
    root = tmp_path / "audio"
    root.mkdir()
    soundfile.write(root / "a.wav", WAVE, RATE)
    data = METADATA[kind]
    if isinstance(data, str):
        (root / name).symlink_to(data)
    else:
        (root / name).write_bytes(data)
    with closed(*[root / name] if kind == "not readable" else [], root=tmp_path):
        clip, bad = clips_of(root).values()
    assert len(clip.audio(RATE, 100)) == len(WAVE) and "text" not in clip.labels
    with pytest.raises(AudioError, match=rf"{name}: .*; the labels in this table are not used\.$") as error:
        bad.audio(RATE, 100)
    assert str(error.value).count(name) == 1


def test_a_manifest_with_the_name_of_a_table_is_used(tmp_path):
    root = tmp_path / "audio"
    root.mkdir()
    soundfile.write(root / "a.wav", WAVE, RATE)
    (root / "metadata.jsonl").write_text('{"audio_filepath": "a.wav", "text": "x"}')
    (clip,) = clips_of(root).values()
    assert len(clip.audio(RATE, 100)) == len(WAVE) and clip.labels["text"] == "x"


# Corpora by their files, of which the first one, a file or folder, cannot be read.
UNREADABLE = {
    "a subfolder of audio": ("sub", "sub/b.wav", "a.wav", "c.wav"),
    "a subfolder without audio": ("sub", "a.wav", "c.wav"),
    "an audio file": ("b.wav", "a.wav", "c.wav"),
    "a transcript": ("b.txt", "b.wav", "a.wav", "c.wav"),
    "a subfolder of Parquet": ("sub", "sub/b.parquet", "a.parquet", "c.parquet"),
    "a partition": ("lang=de", "lang=de/b.parquet", "lang=en/a.parquet", "lang=fr/c.parquet"),
    "the first Parquet file": ("0.parquet", "a.parquet", "c.parquet"),
    "the last Parquet file": ("z.parquet", "a.parquet", "c.parquet"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_file_or_subfolder_is_one_failure(kind, tmp_path):
    bad, *others = UNREADABLE[kind]
    root = tmp_path / "corpus"
    for name in (bad, *others):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".wav":
            soundfile.write(path, WAVE, RATE)
        elif path.suffix == ".parquet":
            pytest.importorskip("pyarrow.parquet", reason="pip install '.[corpus]'")
            write_parquet(path)
        elif path.suffix:
            path.write_text("text")
        else:
            path.mkdir(exist_ok=True)
    with closed(root / bad, root=tmp_path):
        corpus = open_corpus(root, None, tmp_path / "unused.json")
        shards = json.loads(json.dumps(corpus.shards(1)))
        clips = [clip for shard in shards for clip in corpus.read(shard)]
        assert all(corpus.files_of(shard) is not None for shard in shards) and len(corpus.identity) == 16
        failures = []
        for clip in clips:
            try:
                assert len(clip.audio(RATE, 100)) == len(WAVE)
            except AudioError as error:
                failures.append(str(error))
    assert len(clips) == 3 and len({clip.id for clip in clips}) == 3
    assert len(failures) == 1 and bad in failures[0] and "Permission denied" in failures[0]


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    soundfile.write(data := io.BytesIO(), WAVE, RATE, format="WAV")
    pyarrow.parquet.write_table(pyarrow.table({"audio": [data.getvalue()]}), path)


def test_manifest_may_begin_with_a_byte_order_mark_or_an_invalid_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("a", "home"):
        soundfile.write(tmp_path / f"{name}.wav", WAVE, RATE)
    lines = [
        '{"audio_filepath": "a.wav", "text": NaN, "speaker": null, "sentence": "hello", "client_id": 3}',
        '{"audio_filepath": "~/home.wav", "duration": 0.2}',
        '{"audio_filepath": "a.wav", "duration": 1e300, "offset": 1}',
        json.dumps({"audio_filepath": "\u8a9e" * 90 + ".wav"}),
    ]
    for first in ("\ufeff", "not json\n"):
        (tmp_path / "m.json").write_text(first + "\n".join(lines), encoding="utf-8")
        *broken, clip, home, absurd, long = clips_of(tmp_path / "m.json").values()
        assert len(clip.audio(RATE, 100)) == len(home.audio(RATE, 100)) == len(WAVE)
        assert (clip.labels["text"], clip.labels["speaker"]) == ("hello", "3")
        for bad in (*broken, absurd, long):
            with pytest.raises(AudioError, match=r"m\.json: .*: this line cannot be used: ") as error:
                bad.audio(RATE, 100)
            assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"[\n{}\n]", r"a JSON list; .* Save Lhotse cuts as \.jsonl"),
        (b"- channel: 0\n  duration: 1.0\n", r"YAML; .* Save Lhotse cuts as \.jsonl"),
        ('{"audio_filepath": "a.wav"}'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (b"hello\n", "its first line is 'hello'"),
        (b"", "it has no lines"),
        (
            b'{"text": "a", "audio": "a.wav"}',
            r"the key 'audio'; expected \{\"audio_filepath\": ...\}. Rename the key\.$",
        ),
        (b'{"text": "a", "audio": 5}', "its first line is"),
        (b"ARROW1\0\0\n", r"an Arrow \(Feather\) file; save the table as Parquet"),
        (b"\n".join([b"1"] * 3000), "its first line is '1'"),
    ],
)
def test_invalid_manifest_is_refused_in_one_line(data, match, tmp_path):
    (tmp_path / "m.json").write_bytes(data)
    with pytest.raises(ConfigError, match=f"not a NeMo manifest: .*{match}") as error:
        open_corpus(tmp_path / "m.json", None, tmp_path / "unused")
    assert "\n" not in str(error.value)


def test_entries_that_nemo_skips_are_passed_over(tmp_path, caplog):
    soundfile.write(tmp_path / "a.wav", WAVE, RATE)
    entry = '{"audio_filepath": "a.wav", "text": "%s", "_skipme": %s}'
    values = ["true", "false", "1", "null", "0"]
    lines = [entry % (number, value) for number, value in enumerate(values)] + ['{"audio_filepath": "a.wav"}']
    (tmp_path / "m.json").write_text("\n".join(lines))
    corpus = open_corpus(tmp_path / "m.json", None, tmp_path / "unused")
    shards = corpus.shards(2)
    assert len(shards) == 3
    clips = [clip for shard in shards for clip in corpus.read(shard)]
    assert [(clip.id, clip.labels.get("text")) for clip in clips] == [
        ("a", "1"),
        ("a~2", "3"),
        ("a~3", "4"),
        ("a~4", None),
    ]
    assert "2 entries are skipped, because _skipme is true" in caplog.text


def test_a_file_in_two_tables_of_a_folder_is_one_clip(tmp_path):
    (tmp_path / "d" / "test").mkdir(parents=True)
    soundfile.write(tmp_path / "d" / "test" / "a.wav", WAVE, RATE)
    (tmp_path / "d" / "metadata.csv").write_text("file_name,text\ntest/a.wav,one\n")
    (tmp_path / "d" / "test" / "metadata.csv").write_text("file_name,text\na.wav,two\n")
    first, second = clips_of(tmp_path / "d").values()
    assert len(first.audio(RATE, 100)) == len(WAVE) and first.labels["text"] in ("one", "two")
    with pytest.raises(AudioError, match="listed more than once; the first row is used"):
        second.audio(RATE, 100)


@pytest.mark.parametrize(
    ("encoding", "name", "advice"),
    [
        ("utf-8", b"\xff", "the id or the file name is not valid UTF-8; rename it"),
        ("ascii", b"\xff", "the id or the file name is not valid UTF-8; rename it"),
        ("ascii", b"\xc3\xa4", "the file name is not valid in the locale's encoding, ascii; set PYTHONUTF8=1"),
    ],
)
def test_a_name_that_is_valid_in_another_locale_need_not_be_changed(encoding, name, advice, monkeypatch):
    text = name.decode("ascii", "surrogateescape")
    clip = Clip(text, f"{text}.wav", lambda *_: WAVE)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "getfilesystemencoding", lambda: encoding)
        with pytest.raises(AudioError) as error:
            check_clip(clip)
    assert str(error.value).endswith(f": {advice}.")


def test_a_manifest_of_tar_files_is_refused_until_they_are_unpacked(tmp_path):
    (tmp_path / "m.json").write_text('{"audio_filepath": "a.wav", "duration": 0.2, "shard_id": 0}')
    with pytest.raises(ConfigError, match=r"none of the first 1 audio file exists\. .* in \.tar files"):
        open_corpus(tmp_path / "m.json", None, tmp_path / "unused")
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", WAVE, RATE)
    corpus = open_corpus(tmp_path / "m.json", tmp_path / "audio", tmp_path / "unused")
    assert [len(clip.audio(RATE, 100)) for shard in corpus.shards(2) for clip in corpus.read(shard)] == [len(WAVE)]


def test_samples_are_those_of_the_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", WAVE, RATE)
    (tmp_path / "m.json").write_text('{"audio_filepath": "a.wav"}\n')
    (clip,) = clips_of(tmp_path / "m.json").values()
    assert np.array_equal(clip.audio(RATE, 100), soundfile.read(tmp_path / "a.wav", dtype="float32")[0])


# Line of a manifest in the folder "corpus", and whether it depends on the path of the folder.
LINES = {
    "relative": ('{"audio_filepath": "a.wav"}', True),
    "relative context": ('{"audio_filepath": "/x/a.wav", "context_audio_filepath":"b.wav"}', True),
    "outside": ('{"audio_filepath": "/x/a.wav", "text": "\\u00e9", "context_audio_filepath" : "/x/b.wav"}', False),
    "outside, with a similar name": ('{"audio_filepath": "FOLDER2/a.wav"}', False),
    "inside": ('{"audio_filepath": "FOLDER/a.wav"}', True),
    "inside after ..": ('{"audio_filepath": "/x/..FOLDER/a.wav"}', True),
    "inside after //": ('{"audio_filepath": "FOLDER//../corpus/a.wav"}', True),
    "outside after ..": ('{"audio_filepath": "FOLDER/../a.wav"}', False),
    "inside, with an escape": ('{"audio_filepath": "FOLDER\\/a.wav"}', True),
    "home": ('{"audio_filepath": "~/a.wav"}', False),
    "an escaped key": ('{"\\u0061udio_filepath": "a.wav"}', True),
    "two keys": ('{"audio_filepath": "/x/a.wav", "audio_filepath": "a.wav"}', True),
    "a key in a list": ('{"audio_filepath": "/x/a.wav", "more": [{"audio_filepath": "a.wav"}]}', False),
    "a key in the text": ('{"audio_filepath": "/x/a.wav", "text": "audio_filepath\\": \\"a.wav"}', False),
    "a number": ('{"audio_filepath": 1}', False),
    "no JSON": ('{"audio_filepath": "a.wav"', False),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_depends_on_the_folder_of_its_manifest(kind, tmp_path):
    text, depends = LINES[kind]
    path = tmp_path / "corpus" / "m.json"
    path.parent.mkdir()
    text = text.replace("FOLDER", str(path.parent))
    path.write_text('{"audio_filepath": "/x/z.wav"}\n' + text + "\n")
    assert open_corpus(path, None, tmp_path / "unused.json").base == (path.parent if depends else None)


def test_lines_of_absolute_paths_are_not_parsed_to_find_the_folder(tmp_path, monkeypatch):
    (tmp_path / "m.json").write_text("".join(f'{{"audio_filepath": "/x/.y/{i}.wav"}}\n' for i in range(200)))
    corpus = open_corpus(tmp_path / "m.json", None, tmp_path / "unused.json")
    monkeypatch.setattr("nemo_lfr.corpus.sources.manifest.parse_entry", None)
    assert corpus.base is None
