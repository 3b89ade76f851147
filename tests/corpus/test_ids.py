"""Tests of clip ids: any name becomes a portable and unique id, whatever the order of the clips."""

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.corpus.ids import MAX_COMPONENT_BYTES, UniqueIds, clean_id, numbered_id, path_inside
from nemo_lfr.corpus.sources import open_corpus
from tests.models import RATE, synthesize

ORDINARY = [
    "a",
    "s1/clip 7",
    "84/121123/84-121123-0000",
    "00000012",
    "common_voice_en_1.2",
    "Ünïcode 語/هم‌خوانی",  # Persian, with a zero-width non-joiner, which its spelling requires
    unicodedata.normalize("NFD", "é"),
    "it's (1) [x] {y} #3 & 50% + a=b, ~2",
    ".hidden",
    "x" * 180,
]
ODD = {
    "": "_",
    "/": "_",
    "..": "_",
    "../..": "_",
    "../../x": "x",
    "/etc/passwd": "etc/passwd",
    "//host/share": "host/share",
    "a/../b": "a/b",
    "./a": "a",
    "a//b/": "a/b",
    "a\0b": "a_b",
    "C:\\Windows\\x": "C__Windows_x",
    "..\\..\\x": ".._.._x",
    "a\nb\x1b[2J": "a_b_[2J",
    "a\u202egpj": "a_gpj",
    "half \ud83d": "half _",
    "CON": "_CON",
    "aux.txt": "_aux.txt",
    "x/nul/y": "x/_nul/y",
    "com1": "_com1",
    "lpt¹.a": "_lpt¹.a",
    "con .a": "_con .a",
    "console": "console",
    "end.": "end_",
    "end ./x": "end__/x",
    "...": "___",
    "a.wav/b": "a.wav_/b",
    "a.LFR/b.lfr": "a.LFR_/b.lfr",
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names_stay_as_they_are(name):
    assert clean_id(name) == name


@pytest.mark.parametrize(("name", "expected"), ODD.items(), ids=[repr(name) for name in ODD])
def test_odd_names_become_portable_paths(name, expected):
    assert clean_id(name) == expected
    assert clean_id(expected) == expected


IDS = {
    "a/b.c.wav": "a/b.c",
    "a.b/c": "a.b/c",
    "/s/a.wav": "s/a",
    "//s/a.wav": "s/a",
    "./a.wav": "a",
    "a//b.wav": "a/b",
    "a.wav/": "a",
    "a.wav.": "a.wav_",
    "x/.hidden": "x/.hidden",
    ".a.wav": ".a",
    "..a": "_",
    "x/..a": "x",
    "nul.wav": "_nul",
    "a.flac/b.wav": "a.flac_/b",
    "語/é.wav": "語/é",
}


@pytest.mark.parametrize(("path", "expected"), IDS.items())
def test_ids_in_a_manifest_are_paths_without_suffix(path, expected, tmp_path):
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps({"audio_filepath": path}) + "\n")
    corpus = open_corpus(manifest, None, tmp_path / "unused.json")
    assert [clip.id for clip in corpus.read(corpus.shards(1)[0])] == [expected]


@pytest.mark.parametrize(
    "name",
    [
        *("x" * 250, "x" * 5000, "語" * 100, "語" * 5000, "😀" * 63 + "/b", "a/" * 2000 + "b"),
        *("x" * 400 + "/" + "y" * 400, "x" * 239 + "語", "x" * 240 + ".", "é" * 300),
    ],
    ids=lambda name: f"{name[0]}-{len(name)}",
)
@pytest.mark.parametrize("suffix", [".lfr", ".flac", ".pt"])
def test_long_names_fit_the_file_system_and_stay_apart(name, suffix, tmp_path):
    ids = UniqueIds()
    ends = ["", "1", "2", ""]
    made = [ids.add(name + end) for end in ends]
    assert len(set(made)) == len(ends)
    for clip_id in made:
        assert clean_id(clip_id) == clip_id
        path = tmp_path / (clip_id + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert all(len(part.encode()) <= MAX_COMPONENT_BYTES for part in Path(clip_id).parts)


@pytest.mark.slow
def test_random_names_stay_inside_their_folder_and_are_stable(tmp_path):
    rng = random.Random(0)
    pieces = ["..", ".", "/", "a", "A", "aux", "\\", ":", "語", " ", "\0", "\n", "~2", ".wav", "\ud800", "x" * 120]
    for _ in range(3000):
        clip_id = clean_id("".join(rng.choices(pieces, k=rng.randint(0, 9))))
        assert clean_id(clip_id) == clip_id
        assert clean_id(numbered_id(clip_id, 7)) == numbered_id(clip_id, 7)
        assert (tmp_path / clip_id).resolve().is_relative_to(tmp_path) and clip_id.encode()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "a", "a"], ["a", "a~2", "a~3"]),
        (["a", "a~2", "a"], ["a", "a~2", "a~3"]),
        (["a", "a", "a~2"], ["a", "a~2", "a~2~2"]),
        (["a~2", "a~3", "a", "a", "a~3"], ["a~2", "a~3", "a", "a~4", "a~3~2"]),
        (["a", "A", "a"], ["a", "A~2", "a~3"]),
        (["STRASSE", "straße"], ["STRASSE", "straße~2"]),
        (["é", unicodedata.normalize("NFD", "É")], ["é", unicodedata.normalize("NFD", "É") + "~2"]),
        (["a:b", "a|b", "a?b"], ["a_b", "a_b~2", "a_b~3"]),
        (["", ".", "/"], ["_", "_~2", "_~3"]),
        (["d/a", "D/a", "d/b"], ["d/a", "D/a~2", "d/b"]),
    ],
)
def test_clip_ids_are_unique(names, expected):
    ids = UniqueIds()
    assert [ids.add(name) for name in names] == expected


@pytest.mark.parametrize(
    ("name", "is_inside"),
    [
        ("a", True),
        ("sub/../a", True),
        ("../x", False),
        ("/etc/passwd", False),
        ("link/x", False),
        ("a\0", False),
        ("loop", False),
        ("x" * 5000, True),  # the error is reported when the file is opened
    ],
)
def test_paths_outside_a_folder_are_noticed_through_links_too(name, is_inside, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    assert (path_inside(folder, name) is not None) == is_inside


@pytest.fixture(scope="module")
def colliding(tmp_path_factory) -> dict[str, Path]:
    """Write a corpus of each kind with five names, two or three of which are equal on some file systems."""
    lhotse = pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
    from lhotse.cut import MonoCut
    from lhotse.shar import SharWriter

    root = tmp_path_factory.mktemp("colliding")
    (root / "audio").mkdir()
    names = ["a.wav", "a~2.wav", "a.flac", "A.wav", "語.wav"]
    cuts = []
    for number, name in enumerate(names):
        path = root / "audio" / name
        soundfile.write(path, synthesize(0.2, seed=number), RATE)
        recording = lhotse.Recording.from_file(path, recording_id=path.stem)
        cuts.append(MonoCut(path.stem, 0, recording.duration, 0, [], recording=recording))
    lines = [json.dumps({"audio_filepath": f"audio/{name}"}) for name in names]
    (root / "manifest.json").write_text("\n".join(lines) + "\n")
    lhotse.CutSet.from_cuts(cuts).to_file(root / "cuts.jsonl.gz")
    (root / "shar").mkdir()
    with SharWriter(str(root / "shar"), fields={"recording": "wav"}, shard_size=2) as writer:
        for cut in cuts:
            writer.write(cut)
    return {name: root / name for name in ("manifest.json", "audio", "cuts.jsonl.gz", "shar")}


@pytest.mark.parametrize("source", ["manifest.json", "audio", "cuts.jsonl.gz", "shar"])
@pytest.mark.parametrize("size", [1, 2, 256])
def test_corpus_ids_are_unique_for_any_shard_size(source, size, colliding, tmp_path):
    corpus = open_corpus(colliding[source], None, tmp_path / "list.json")
    clips = [clip for part in json.loads(json.dumps(corpus.shards(size))) for clip in corpus.read(part)]
    keys = [unicodedata.normalize("NFC", clip.id.casefold()) for clip in clips]
    assert len(set(keys)) == len(clips) == 5
    lengths = [len(np.asarray(clip.audio(RATE, 10.0))) for clip in clips]
    assert lengths == [round(0.2 * RATE)] * 5
    assert "語" in {clip.id.rpartition("/")[2] for clip in clips}
