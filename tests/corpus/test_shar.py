"""Tests of Lhotse Shar folders in which shards are missing, of archives, and of the array files that are written."""

import gc
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.corpus.formats.shar import ArrayTar
from nemo_lfr.corpus.sources import open_corpus
from nemo_lfr.corpus.sources.base import Clip
from nemo_lfr.errors import ConfigError
from tests.corpora import write_tokens
from tests.models import RATE, synthesize

lhotse = pytest.importorskip("lhotse", reason="pip install '.[corpus]'")


def write_shar(folder: Path, shard_size: int | None) -> Path:
    soundfile.write(folder / "a.wav", synthesize(0.1), RATE)
    cuts = [lhotse.Recording.from_file(folder / "a.wav", recording_id=f"r{index}").to_cut() for index in range(8)]
    (folder / "shar").mkdir()
    lhotse.CutSet.from_cuts(cuts).to_shar(folder / "shar", fields={"recording": "wav"}, shard_size=shard_size)
    return folder / "shar"


@pytest.fixture
def shar(tmp_path) -> Path:
    return write_shar(tmp_path, 2)


def read_clips(path: Path) -> list[Clip]:
    corpus = open_corpus(path, None, path / "unused.json")
    return [clip for part in corpus.shards(100) for clip in corpus.read(part)]


def nothing(path: Path) -> None: ...


def add_other_files(path: Path) -> None:
    """Write files that do not belong to the Shar."""
    (path / "recordings.jsonl").write_text('{"id": "a", "sources": [], "sampling_rate": 1}\n')
    (path / "notes.jsonl").write_text("no JSON\n")
    soundfile.write(path / "x.wav", synthesize(0.1), RATE)
    with tarfile.open(path / "backup.tar", "w") as tar:
        tar.add(path / "x.wav")
        tar.add(path / "x.wav")


def move_to_subfolders(path: Path) -> None:
    for file in list(path.iterdir()):
        folder = path / file.name.partition(".")[0]
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)


def remove_data(path: Path) -> None:
    add_other_files(path)
    for file in path.glob("recording.*tar"):
        file.unlink()


def copy_cuts(path: Path) -> None:
    """Leave two lists of cuts beside audio files."""
    remove_data(path)
    (path / "cuts_dev.jsonl.gz").write_bytes((path / "cuts.jsonl.gz").read_bytes())


# Number of cuts per shard, a change to the folder, and the class of the reader.
LAYOUTS = {
    "shard numbers": (2, nothing, "Shar"),
    "shard numbers and other files": (2, add_other_files, "Shar"),
    "no shard numbers": (None, nothing, "Shar"),
    "no shard numbers but other files": (None, add_other_files, "Shar"),
    "no shard numbers in subfolders": (None, move_to_subfolders, "Shar"),
    "cuts in a folder of audio files": (None, remove_data, "Folder"),
    "two lists of cuts in a folder of audio files": (None, copy_cuts, "Folder"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_of_a_shar_are_found(layout, tmp_path):
    shard_size, change, reader = LAYOUTS[layout]
    path = write_shar(tmp_path, shard_size)
    change(path)
    assert type(open_corpus(path, None, tmp_path / "list.json")).__name__ == reader
    if reader == "Shar":
        assert [clip.id for clip in read_clips(path)] == [f"r{index}" for index in range(8)]
        assert all(len(clip.audio(RATE, 10)) for clip in read_clips(path))


# Shards that are deleted, and the message about the others.
GAPS = {
    "none": ((), None),
    "the middle": ((1, 2), "the shards 000001, 000002 are missing in this Lhotse Shar"),
    "the first": ((0,), None),
    "the last": ((3,), None),
}


@pytest.mark.parametrize("kind", GAPS)
def test_a_gap_between_shards_is_reported(kind, shar, caplog):
    gone, message = GAPS[kind]
    for number in gone:
        for file in shar.glob(f"*.{number:06d}.*"):
            file.unlink()
    clips = read_clips(shar)
    assert len(clips) == 2 * (4 - len(gone)) and all(len(clip.audio(RATE, 10)) for clip in clips)
    assert (message in caplog.text) if message else ("missing" not in caplog.text)


def test_hidden_files_are_skipped(shar):
    for path in list(shar.iterdir()):
        (shar / f"._{path.name}").write_bytes(b"AppleDouble")
    assert len(read_clips(shar)) == 8


def test_fields_of_other_shards_are_refused(shar):
    (shar / "cuts.000001.jsonl.gz").unlink()
    with pytest.raises(ConfigError, match=r"different numbers of shards \(cuts: 3, recording: 4\); copy the missing"):
        open_corpus(shar, None, shar / "unused.json")
    (shar / "recording.000002.tar").unlink()
    message = r"shards \[1\] of the field 'recording' have no cuts file, and shards \[2\] .* no 'recording' file"
    with pytest.raises(ConfigError, match=message):
        open_corpus(shar, None, shar / "unused.json")


def test_damage_after_the_last_cut_does_not_matter(shar):
    path = shar / "recording.000003.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + last.size + 10])  # without the padding of a tar file
    clips = read_clips(shar)
    assert len(clips) == 8 and all(len(clip.audio(RATE, 10)) for clip in clips)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("out/shar", "part of the tokenized corpus .*/out, which contains no audio"),
        ("out/shar/cuts.000000.jsonl.gz", "part of the tokenized corpus .*/out, which contains no audio"),
        ("shar/cuts.000000.jsonl.gz", "in the other files of a Lhotse Shar; pass the folder of the Shar"),
    ],
)
def test_cuts_without_their_audio_are_refused(name, reason, tmp_path):
    write_shar(tmp_path, 2)
    write_tokens(tmp_path / "out", "shar", [2, 1])
    with pytest.raises(ConfigError, match=reason):
        open_corpus(tmp_path / name, None, tmp_path / "unused.json")


def test_cuts_in_a_tokenized_corpus_that_refer_to_audio_are_read(tmp_path):
    write_shar(tmp_path, 2)
    write_tokens(tmp_path / "out", "shar", [1])
    cut = lhotse.Recording.from_file(tmp_path / "a.wav", recording_id="s0/clip0").to_cut()
    lhotse.CutSet.from_cuts([cut]).to_file(tmp_path / "out" / "shar" / "cuts.000000.jsonl.gz")
    for path in (tmp_path / "out" / "shar", tmp_path / "out" / "shar" / "cuts.000000.jsonl.gz"):
        (clip,) = read_clips(path)
        assert len(clip.audio(RATE, 100))


@pytest.mark.parametrize("name", ["wds-000000.tar", "a.tar.gz", "a.TGZ", "a.zip"])
def test_archives_are_named_as_what_they_are(name, tmp_path):
    (tmp_path / name).write_bytes(b"\0" * 1024)
    with pytest.raises(ConfigError, match="archives, such as WebDataset shards, cannot be read; unpack this one"):
        open_corpus(tmp_path / name, None, tmp_path / "unused.json")


def test_array_files_are_those_of_lhotse(tmp_path):
    from lhotse.array import Array
    from lhotse.shar.utils import to_shar_placeholder
    from lhotse.shar.writers.array import ArrayTarWriter

    array = np.arange(9000, dtype=np.int16).reshape(8, -1)
    manifest = Array("shar", "", "", [8, 1125])
    with ArrayTarWriter(str(tmp_path / "theirs.tar"), None) as theirs:
        theirs.write("a/b", array, manifest)
        theirs.write_placeholder("c")
    ours = ArrayTar(tmp_path / "ours 100%.tar")
    ours.add("a/b", array, to_shar_placeholder(manifest).to_dict())
    ours.add_placeholder("c")
    ours.close()
    assert (tmp_path / "ours 100%.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_prints_nothing_when_an_array_file_is_dropped(monkeypatch):
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    tar = ArrayTar(Path("/dev/full"))
    with pytest.raises(OSError, match="No space"):
        for index in range(40):
            tar.add(str(index), np.zeros((8, 1000), np.int16), {})
    del tar
    gc.collect()
    assert not printed
