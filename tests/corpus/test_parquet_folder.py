"""Tests of folders of Parquet files: names, missing files, partitions and files with other columns."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.corpus.sources import find_source, open_corpus
from nemo_lfr.corpus.sources.parquet import Parquet
from nemo_lfr.errors import AudioError, ConfigError
from tests.models import RATE, synthesize

pa = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def sound(tmp_path) -> bytes:
    soundfile.write(tmp_path / "a.wav", synthesize(0.2), RATE)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").unlink()
    return data


def write(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def clips_of(path: Path, size: int = 100) -> list:
    corpus = open_corpus(path, None, path.parent / "unused.json")
    return [clip for part in corpus.shards(size) for clip in corpus.read(part)]


@pytest.mark.parametrize("name", ["a.parquet", "a.pq", "a.parq", "A.PARQUET"])
def test_all_suffixes_of_parquet_are_read(name, sound, tmp_path):
    path = write(tmp_path / "rows" / name, {"audio": [sound], "text": ["x"]})
    assert find_source(path) is Parquet
    assert [clip.labels["text"] for place in (path, path.parent) for clip in clips_of(place)] == ["x", "x"]


def test_a_missing_file_that_the_others_announce_is_named(sound, tmp_path):
    for index in (0, 2):
        path = write(tmp_path / "rows" / f"train-{index:05d}-of-00003.parquet", {"audio": [sound]})
    with pytest.raises(ConfigError, match=r"rows: files are missing: train-00001-of-00003\.parquet;"):
        clips_of(tmp_path / "rows")
    assert len(clips_of(path)) == 1  # a file that is passed by itself
    write(tmp_path / "rows" / "train-00001-of-00003.parquet", {"audio": [sound]})
    assert len(clips_of(tmp_path / "rows")) == 3


PARTITIONS = {
    "a label": ("lang=de", {"lang": "de"}),
    "several": ("lang=de/speaker_id=007", {"lang": "de", "speaker": "007"}),
    "another folder between": ("lang=de/files", {"lang": "de"}),
    "escaped": ("speaker=a%2Fb%20c/topic=x%3Dy", {"speaker": "a/b c", "topic": "x=y"}),
    "missing": ("lang=__HIVE_DEFAULT_PARTITION__/speaker=", {"lang": None, "speaker": None}),
    "not a column": ("=x/y", {}),
    "a column of the file": ("text=folder", {"text": "file"}),
}


@pytest.mark.parametrize("kind", PARTITIONS)
def test_partitions_are_columns(kind, sound, tmp_path):
    folder, expected = PARTITIONS[kind]
    write(tmp_path / "rows" / folder / "p.parquet", {"audio": [sound], "text": ["file"]})
    (clip,) = clips_of(tmp_path / "rows")
    assert {key: clip.labels.get(key) for key in expected} == expected
    assert len(clip.audio(RATE, 10))


@pytest.mark.parametrize("place", ["rows/lang=de", "rows/lang=de/p.parquet"])
def test_a_partition_that_is_read_by_itself_keeps_its_column(place, sound, tmp_path, monkeypatch):
    write(tmp_path / "rows" / "lang=de" / "p.parquet", {"audio": [sound]})
    write(tmp_path / "rows" / "lang=fr" / "p.parquet", {"audio": [sound]})
    assert [clip.labels["lang"] for clip in clips_of(tmp_path / "rows")] == ["de", "fr"]
    assert [clip.labels["lang"] for clip in clips_of(tmp_path / place)] == ["de"]
    monkeypatch.chdir(tmp_path / "rows" / "lang=fr")
    assert [clip.labels["lang"] for clip in clips_of(Path("."))] == ["fr"]


def test_the_sampling_rate_may_be_a_partition(tmp_path):
    write(tmp_path / "sampling_rate=22050" / "p.parquet", {"audio": [synthesize(0.2).tolist()]})
    (clip,) = clips_of(tmp_path)
    assert np.abs(clip.audio(22050, 10) - synthesize(0.2)).max() < 1e-6


def test_another_partition_is_another_corpus(sound, tmp_path):
    write(tmp_path / "rows" / "lang=de" / "p.parquet", {"audio": [sound]})
    before = open_corpus(tmp_path / "rows", None, tmp_path / "unused.json").identity
    (tmp_path / "rows" / "lang=de").rename(tmp_path / "rows" / "lang=fr")
    assert open_corpus(tmp_path / "rows", None, tmp_path / "unused.json").identity != before


def test_a_file_without_the_audio_column_is_a_failure_that_names_it(sound, tmp_path):
    write(tmp_path / "rows" / "a.parquet", {"audio": [sound] * 2, "text": ["a", "b"]})
    write(tmp_path / "rows" / "b.parquet", {"speech": [sound] * 2, "sentence": ["c", "d"]})
    write(tmp_path / "rows" / "c.parquet", {"audio": [sound, b""], "text": ["e", "f"]})
    clips = clips_of(tmp_path / "rows", size=1)
    with pytest.raises(AudioError, match=r"b\.parquet: no column 'audio'.*found \['speech', 'sentence'\]"):
        clips[2].audio(RATE, 10)
    with pytest.raises(AudioError, match=r"c\.parquet, row 1, column 'audio': no audio"):
        clips[4].audio(RATE, 10)
    assert [clip.labels.get("text") for clip in clips] == ["a", "b", None, "e", None]
    assert len({clip.id for clip in clips}) == 5


def test_files_with_other_labels_are_reported(sound, tmp_path, caplog):
    write(tmp_path / "rows" / "a.parquet", {"audio": [sound], "text": ["a"], "speaker": ["s"]})
    write(tmp_path / "rows" / "b.parquet", {"audio": [sound], "sentence": ["b"], "speaker": ["s"]})
    assert [clip.labels["text"] for clip in clips_of(tmp_path / "rows")] == ["a", "b"]
    assert (
        "b.parquet: the columns differ from those of the first file: missing 'text', additional 'sentence'."
        in caplog.text
    )


def test_files_that_do_not_belong_to_the_table_are_skipped(sound, tmp_path):
    folder = tmp_path / "_data"
    for name in ("a.parquet", "_temporary/0/a.parquet", "x/_attempt.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, {"audio": [sound]})
    assert len(clips_of(folder)) == 1
    (folder / "_delta_log").mkdir()
    with pytest.raises(ConfigError, match="this is a Delta Lake or Hudi table"):
        clips_of(folder)
