"""Tests of labels in every kind of corpus, including labels that are neither text nor numbers."""

import datetime
import decimal
import json
import logging
import re
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.corpus.formats.manifest import own_labels
from nemo_lfr.corpus.sources import open_corpus
from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.io.manifests import read_manifest
from tests.models import RATE, synthesize
from tests.packages import require

lhotse = pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
pa = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
pq = pytest.importorskip("pyarrow.parquet")
require("datasets", reason="pip install datasets")

WRONG = {
    "a list as text": {"text": ["a", "b"]},
    "translations as text": {"text": {"en": "a"}},
    "a boolean as text": {"text": True},
    "a list as speaker": {"speaker": ["s"]},
    "a number as language": {"lang": 3},
    "a list as language": {"lang": ["de"]},
    "a list in another column": {"sentence": ["a", "b"]},
}


@pytest.fixture
def wav(tmp_path) -> Path:
    soundfile.write(tmp_path / "a.wav", synthesize(0.1), RATE)
    return tmp_path / "a.wav"


def clips_of(path: Path) -> list:
    corpus = open_corpus(path, None, path.parent / "listing.json")
    return [clip for part in corpus.shards(100) for clip in corpus.read(part)]


def corpus_of(kind: str, wav: Path, labels: dict) -> Path:
    """Write a corpus of one clip with these labels."""
    path = wav.parent / kind
    if kind == "a.parquet":
        pq.write_table(pa.Table.from_pylist([{"audio": wav.read_bytes(), **labels}]), path)
    elif kind == "saved":
        from datasets import Dataset  # takes 1 s

        Dataset.from_list([{"audio": wav.read_bytes(), **labels}]).save_to_disk(path)
    elif kind == "cuts.jsonl":
        cut = lhotse.Recording.from_file(wav, recording_id="a").to_cut().to_dict()
        names = {"lang": "language"}
        fields = {names.get(key, key): value for key, value in labels.items() if key != "sentence"}
        custom = {key: value for key, value in labels.items() if key == "sentence"}
        segment = {"id": "a", "recording_id": "a", "start": 0, "duration": cut["duration"], "channel": 0} | fields
        path.write_text(json.dumps(cut | {"supervisions": [segment], "custom": custom}))
    else:
        path.write_text(json.dumps({"audio_filepath" if kind == "m.json" else "file_name": wav.name, **labels}))
    return path


@pytest.mark.parametrize("label", WRONG)
@pytest.mark.parametrize("kind", ["m.json", "metadata.jsonl", "a.parquet", "saved", "cuts.jsonl"])
def test_a_label_that_is_no_text_fails_its_clip(kind, label, wav):
    labels = WRONG[label]
    (clip,) = clips_of(corpus_of(kind, wav, labels))
    (name,) = labels
    with pytest.raises(AudioError, match=rf"the label '{name}' is .*; expected (text or a number|the name of a lang)"):
        clip.audio(RATE, 10)


@pytest.mark.parametrize("label", WRONG)
@pytest.mark.parametrize("kind", ["m.json", "metadata.jsonl"])
def test_training_uses_the_audio_without_such_a_label(kind, label, wav):
    (recording,) = read_manifest(corpus_of(kind, wav, WRONG[label]))
    assert all(recording.labels.get(name) is None for name in ("text", "speaker", "lang"))


COLUMNS = {
    "date": (pa.array([datetime.datetime(2020, 1, 1)]), None),
    "boolean": (pa.array([True]), None),
    "null list": (pa.array([None], pa.list_(pa.string())), {}),
    "dictionary": (pa.array(["a"]).dictionary_encode(), {"text": "a"}),
    "decimal": (pa.array([decimal.Decimal("7.00")]), {"text": "7"}),
    "bytes": (pa.array([b"a"]), {"text": "a"}),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_types_of_columns(kind, wav):
    column, expected = COLUMNS[kind]
    pq.write_table(pa.table({"audio": [wav.read_bytes()], "text": column}), wav.parent / "a.parquet")
    (clip,) = clips_of(wav.parent / "a.parquet")
    if expected is None:
        with pytest.raises(AudioError, match=r"a\.parquet, row 0: the label 'text' is"):
            clip.audio(RATE, 10)
    else:
        assert clip.labels == expected and len(clip.audio(RATE, 10))


def test_other_columns_may_hold_anything(wav):
    labels = {"text": "a", "words": ["a"], "made": {"by": "me"}, "flag": True}
    for kind in ("m.json", "a.parquet", "saved", "cuts.jsonl"):
        (clip,) = clips_of(corpus_of(kind, wav, {"text": "a"} if kind == "cuts.jsonl" else labels))
        assert clip.labels["text"] == "a" and len(clip.audio(RATE, 10))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"id": "mine", "text": "a"}, {"source_id": "mine", "text": "a"}),
        ({"id": 7}, {"source_id": 7}),
        ({"id": "mine", "source_id": "theirs"}, {"source_id": "theirs", "source_id_2": "mine"}),
        ({"text": "a"}, {"text": "a"}),
    ],
)
def test_the_id_of_the_corpus_is_kept(labels, expected, wav):
    (clip,) = clips_of(corpus_of("m.json", wav, labels))
    kept = own_labels(clip)
    del kept["audio_filepath"]
    assert kept == expected and clip.id == "a"


# Names of a file of recordings and of the files beside it, and the text of the clip or a part of the log or the error.
# A file that ends in .json or .json.gz is a JSON list, as Lhotse writes it.
SUPERVISIONS = [
    ("x_recordings.jsonl.gz", ["x_supervisions.jsonl.gz"], "hi"),
    ("x_recordings.jsonl.gz", ["x_supervisions.jsonl"], "hi"),
    ("recordings_train.jsonl", ["supervisions_train.jsonl.gz", "supervisions_dev.jsonl"], "hi"),
    (
        "recordings.json.gz",
        ["supervisions.jsonl"],
        ConfigError("recordings.json.gz: the file is a JSON list; save"),
    ),
    ("recordings.jsonl", ["supervisions.json"], ConfigError("supervisions.json: the file is a JSON list; save it")),
    ("recordings.jsonl", ["supervisions.json.gz"], ConfigError("supervisions.json.gz: the file is a JSON list; save")),
    (
        "recordings.jsonl",
        ["supervisions.jsonl", "supervisions.jsonl.gz"],
        ConfigError("its supervisions are in supervisions.jsonl and supervisions.jsonl.gz; remove all but one"),
    ),
    ("recordings.jsonl", [], logging.WARNING),
    ("recordings.jsonl", ["x_supervisions.jsonl"], logging.WARNING),
    ("x_recordings.jsonl", ["x_supervisions_fixed.jsonl", "x_supervisions.yaml"], logging.WARNING),
    ("corpus.jsonl", ["supervisions.jsonl"], logging.WARNING),
]


@pytest.mark.parametrize(("name", "names", "expected"), SUPERVISIONS)
def test_supervisions_of_recordings_are_found(name, names, expected, wav, caplog):
    recordings = [lhotse.Recording.from_file(wav, recording_id="a")]
    lhotse.RecordingSet.from_recordings(recordings).to_file(wav.parent / name)
    supervision = lhotse.SupervisionSegment("a", "a", 0, 0.1, text="hi")
    for beside in names:
        lhotse.SupervisionSet.from_segments([supervision]).to_file(wav.parent / beside)
    if isinstance(expected, ConfigError):
        with pytest.raises(ConfigError, match=re.escape(str(expected))):
            clips_of(wav.parent / name)
        return
    (clip,) = clips_of(wav.parent / name)
    assert clip.labels.get("text") == (expected if isinstance(expected, str) else None)
    if expected == logging.WARNING:
        (record,) = caplog.records
        assert "so the clips have no texts" in record.getMessage()
        assert all(beside in record.getMessage() for beside in names)
