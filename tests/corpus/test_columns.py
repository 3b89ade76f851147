"""Tests of columns, audio cells and splits of tables from the Hugging Face Hub and other sources."""

import datetime
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.corpus.sources import open_corpus
from nemo_lfr.corpus.sources.parquet import split_of
from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.io.columns import chosen_columns, standard_labels
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.io.reading import read_file
from tests.models import RATE, synthesize

pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
pa = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
pq = pytest.importorskip("pyarrow.parquet")

WAVE = synthesize(0.5)
PCM = np.round(WAVE * 32767).astype(np.int16)


@pytest.fixture
def wav(tmp_path) -> Path:
    soundfile.write(tmp_path / "a.wav", WAVE, RATE)
    return tmp_path / "a.wav"


def clips_of(path: Path, audio_dir: Path | None = None) -> list:
    corpus = open_corpus(path, audio_dir, path.parent / "unused.json")
    return [clip for part in corpus.shards(100) for clip in corpus.read(part)]


def write(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"sentence": "hi", "client_id": "s1", "locale": "de"}, {"text": "hi", "speaker": "s1", "lang": "de"}),
        ({"transcription": "a", "raw_transcription": "A", "speaker_id": 7}, {"text": "a", "speaker": "7"}),
        ({"text": "a", "sentence": "b", "speaker": "x", "client_id": "y"}, {"text": "a", "speaker": "x"}),
        ({"text": None, "normalized_text": "b"}, {"text": "b"}),
        ({"text": math.nan, "transcript": "c", "speaker_id": 3.0}, {"text": "c", "speaker": "3"}),
        ({"text": math.nan, "speaker": None, "lang": math.nan}, {}),
        ({"text": "nan"}, {"text": "nan"}),  # a word, not a number
        ({"text": "", "sentence": "b"}, {"text": "b"}),
        ({"text": " ", "sentence": "", "transcript": "c"}, {"text": "c"}),
        ({"text": "", "sentence": None}, {"text": ""}),
        ({"text": "", "transcript": ["a", "word"]}, {"text": ""}),
        ({"sentence": "", "speaker": "", "speaker_id": 0}, {"text": "", "speaker": "0"}),
        ({"speaker": 5}, {"speaker": "5"}),
        ({"speaker": 5.0, "text": 7}, {"speaker": "5", "text": "7"}),
        ({"text": 2.5, "sentence": "b", "lang": "de"}, {"text": "2.5", "lang": "de"}),
        ({"text": math.inf, "sentence": "b"}, {"text": "b"}),
        ({"speaker": -math.inf, "speaker_id": 7, "lang": math.inf, "locale": "pl"}, {"speaker": "7", "lang": "pl"}),
    ],
)
def test_labels_come_from_the_columns_of_the_hub(row, expected):
    labels = standard_labels(row)
    assert {key: labels[key] for key in ("text", "speaker", "lang") if key in labels} == expected
    assert all(labels[key] == value for key, value in row.items() if key not in expected and key in labels)


NUMBERS = {
    "a number": ({"speaker": 7, "text": 8}, {"speaker": "7", "text": "8"}),
    "infinity": ({"speaker": -math.inf, "speaker_id": "s7", "text": math.inf}, {"speaker": "s7"}),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", ["m.json", "metadata.jsonl", "a.parquet", "folder", "cuts.jsonl"])
def test_numbers_become_text_and_infinity_is_missing_in_every_input(name, kind, wav, tmp_path):
    values, expected = NUMBERS[kind]
    path = tmp_path / name
    if name == "a.parquet":
        write(path, {"file_name": ["a.wav"]} | {key: [value] for key, value in values.items()})
    elif name == "cuts.jsonl":
        import lhotse

        recording = lhotse.Recording.from_file(wav)
        segment = lhotse.SupervisionSegment("s", recording.id, 0, recording.duration)
        segment.text, segment.speaker = values["text"], values["speaker"]
        cut = lhotse.MonoCut("c", 0, recording.duration, 0, [segment], recording=recording, custom=dict(values))
        lhotse.CutSet.from_cuts([cut]).to_file(path)
    else:
        key = "audio_filepath" if name == "m.json" else "file_name"
        table = tmp_path / "metadata.jsonl" if name == "folder" else path
        table.write_text(json.dumps({key: "a.wav", **values}))
    (clip,) = clips_of(tmp_path if name == "folder" else path)
    assert {key: clip.labels[key] for key in ("text", "speaker") if key in clip.labels} == expected
    if name in ("m.json", "metadata.jsonl"):
        (recording,) = read_manifest(path)
        assert {key: recording.labels[key] for key in ("text", "speaker") if recording.labels.get(key)} == expected


# Columns of two rows, and whether the rows are refused because their segments would not be read.
SEGMENTS = {
    "starts in one file": ({"file_name": ["a.wav", "a.wav"], "Start_Time": [0.0, 0.1]}, True),
    "starts in two files": ({"file_name": ["a.wav", "b.wav"], "start": [0.0, 0.1]}, False),
    "no starts": ({"file_name": ["a.wav", "a.wav"], "start": [None, None]}, False),
    "NaN": ({"file_name": ["a.wav", "a.wav"], "start": [math.nan, math.nan]}, False),
    "empty text": ({"file_name": ["a.wav", "a.wav"], "start": ["", ""]}, False),
    "one start": ({"file_name": ["a.wav", "a.wav"], "start": [None, 1]}, False),
    "segments that are read": ({"audio_filepath": ["a.wav", "a.wav"], "start": [0, 1], "offset": [0, 0.1]}, False),
    "offsets that are not read": ({"file_name": ["a.wav", "a.wav"], "Offset": [0, 0.1]}, True),
}


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("name", ["t.jsonl", "m.json", "a.parquet", "saved", "folder"])
def test_segments_that_are_not_read_are_refused(name, kind, wav, tmp_path, caplog):
    columns, is_refused = SEGMENTS[kind]
    path = tmp_path / name
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if name == "m.json":
        rows = [{"audio_filepath": row.pop("file_name", "a.wav")} | row for row in rows]
        is_refused = is_refused and kind != "offsets that are not read"
    if name == "a.parquet":
        write(path, columns)
    elif name == "saved":
        pytest.importorskip("datasets", reason="pip install datasets").Dataset.from_dict(columns).save_to_disk(path)
    else:
        table = tmp_path / "metadata.jsonl" if name == "folder" else path
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = tmp_path if name == "folder" else path
    if is_refused:
        with pytest.raises(
            ConfigError, match=r"'a\.wav' is listed again, but '\w+' does not select .* offset for the start"
        ):
            clips_of(source)
        assert not caplog.text.count("does not select")  # the error suffices
    elif name != "folder":
        assert len(clips_of(source)) == 2
        count = 0 if kind in ("no starts", "NaN", "empty text", "segments that are read") else 1
        assert caplog.text.count("does not select a part of the file") == count or kind.startswith("offsets")
    if name in ("m.json", "t.jsonl") and is_refused:
        with pytest.raises(ConfigError, match="is listed again"):
            read_manifest(path)


def test_column_choices_are_logged_once(wav, tmp_path, caplog):
    assert chosen_columns(["audio", "text", "speaker", "lang"]) == {}
    table = {"audio": [{"bytes": wav.read_bytes(), "path": "a.wav"}], "sentence": ["hello"], "client_id": ["s1"]}
    (clip,) = clips_of(write(tmp_path / "a.parquet", table))
    assert (clip.labels["text"], clip.labels["speaker"]) == ("hello", "s1")
    assert caplog.text.count("text from column 'sentence', speaker from column 'client_id'") == 1


def struct(array, rate=RATE, **more) -> dict:
    return {"array": array, "sampling_rate": rate, "path": "a.wav", **more}


def array2d(samples: np.ndarray) -> "pa.Array":
    """Return a column with the type of `datasets.Array2D`, inside a struct of samples."""
    stored = pa.array([samples.tolist()], pa.list_(pa.list_(pa.float32())))
    values = pa.ExtensionArray.from_storage(Array2D(), stored)
    return pa.StructArray.from_arrays([values, pa.array([RATE])], ["array", "sampling_rate"])


def tensor(samples: np.ndarray) -> "pa.Array":
    """Return a column with a tensor of fixed shape inside a struct of samples."""
    values = pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([samples]))
    return pa.StructArray.from_arrays([values, pa.array([RATE])], ["array", "sampling_rate"])


class Array2D(pa.ExtensionType):
    """Extension type that stores lists of lists, like that of `datasets`."""

    def __init__(self):
        super().__init__(pa.list_(pa.list_(pa.float32())), "tests.Array2D")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls()


CELLS = {
    "floats": [struct(WAVE.tolist())],
    "float32": pa.array([struct(WAVE)], pa.struct([("array", pa.list_(pa.float32())), ("sampling_rate", pa.int64())])),
    "16-bit": pa.array([struct(PCM)], pa.struct([("array", pa.list_(pa.int16())), ("sampling_rate", pa.int32())])),
    "Python's integers": [struct(PCM.tolist())],
    "32-bit": pa.array(
        [struct(PCM.astype(np.int32) * 2**16)],
        pa.struct([("array", pa.list_(pa.int32())), ("sampling_rate", pa.int32())]),
    ),
    "channels first": [struct([WAVE.tolist(), WAVE.tolist()])],
    "channels last": [struct(np.stack([WAVE, WAVE], axis=1).tolist())],
    "Array2D, channels first": array2d(np.stack([WAVE, WAVE])),
    "Array2D, channels last": array2d(np.stack([WAVE, WAVE], axis=1)),
    "tensor, channels first": tensor(np.stack([WAVE, WAVE])),
    "tensor, channels last": tensor(np.stack([WAVE, WAVE], axis=1)),
    "one channel": [struct([WAVE.tolist()])],
    "large lists": pa.array(
        [struct(WAVE)], pa.struct([("array", pa.large_list(pa.float64())), ("sampling_rate", pa.int64())])
    ),
    "no bytes beside": [struct(WAVE.tolist(), bytes=None)],
    "another name of the rate": [{"array": WAVE.tolist(), "sample_rate": float(RATE)}],
}


@pytest.mark.parametrize("kind", CELLS)
def test_decoded_samples_are_read(kind, tmp_path):
    (clip,) = clips_of(write(tmp_path / "a.parquet", {"audio": CELLS[kind]}))
    assert np.abs(clip.audio(RATE, 100) - WAVE).max() < 1e-4
    assert len(clip.audio(2 * RATE, 100)) == 2 * len(WAVE)
    with pytest.raises(AudioError, match=r"lasts 0\.5 s"):
        clip.audio(RATE, 0.1)


def test_samples_without_a_struct_use_the_rate_column(tmp_path):
    (clip,) = clips_of(write(tmp_path / "a.parquet", {"audio": [WAVE.tolist()], "sampling_rate": [RATE]}))
    assert np.abs(clip.audio(RATE, 100) - WAVE).max() < 1e-6
    (clip,) = clips_of(write(tmp_path / "b.parquet", {"speech": [WAVE.tolist()]}))
    with pytest.raises(AudioError, match="have no sampling rate"):
        clip.audio(RATE, 100)


BAD_CELLS = {
    "null": [None],
    "null bytes and path": [{"bytes": None, "path": None}],
    "no bytes": [b""],
    "a number": [7],
    "words": [["a", "b"]],
    "channels of different lengths": [struct([[0.0, 0.1], [0.1]])],
    "a null channel": [struct([[0.0, 0.1], None])],
    "as many channels as samples": [struct(np.zeros((5, 5)).tolist())],
    "a spectrogram": [struct(np.zeros((80, 200)).tolist())],
    "three axes": [struct(np.zeros((2, 2, 20)).tolist())],
    "a null in the samples": [struct([0.1, None, 0.2])],
    "NaN": [struct([0.1, math.nan])],
    "numbers that were not divided": [struct([30_000.5, -20_000.5])],
    "no rate": [struct([0.1], None)],
    "an absurd rate": [struct([0.1], 10**9)],
    "a rate of zero": [struct([0.1], 0)],
    "an empty path": [""],
    "a long path": ["x" * 300],
    "not text in memory": [{"bytes": b"hello", "path": "a.wav"}],
}


@pytest.mark.parametrize("kind", BAD_CELLS)
def test_invalid_cell_fails_only_its_clip(kind, wav, tmp_path):
    bad = write(tmp_path / "data" / "bad.parquet", {"audio": pa.array(BAD_CELLS[kind]), "text": ["b"]})
    good = write(tmp_path / "data" / "good.parquet", {"audio": [{"bytes": wav.read_bytes()}], "text": ["g"]})
    first, second = clips_of(bad.parent)
    with pytest.raises(AudioError, match=r"row 0") as error:
        if not len(first.audio(RATE, 100)):  # as in the code that tokenizes clips
            raise AudioError("row 0")
    assert "\n" not in str(error.value)
    assert len(second.audio(RATE, 100)) == len(WAVE) and good.exists()


def test_invalid_text_label_fails_only_its_clip(wav, tmp_path):
    data = wav.read_bytes()
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.int32([0, 1, 2]).tobytes()), pa.py_buffer(b"a\xff")]
    )
    first, second = clips_of(write(tmp_path / "a.parquet", {"audio": [data, data], "text": text}))
    assert len(first.audio(RATE, 100)) and first.labels == {"text": "a"}
    with pytest.raises(AudioError, match="not UTF-8"):
        second.audio(RATE, 100)


def test_paths_are_relative_to_the_table_or_the_audio_folder(wav, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    table = write(tmp_path / "tables" / "a.parquet", {"audio": ["../a.wav", "~/a.wav", "a.wav", None]})
    found = [clip.audio for clip in clips_of(table)]
    assert len(found[0](RATE, 100)) == len(found[1](RATE, 100)) == len(WAVE)
    with pytest.raises(AudioError, match="no such file"):
        found[2](RATE, 100)
    assert len(clips_of(table, tmp_path)[2].audio(RATE, 100)) == len(WAVE)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/validation-00000.parquet", "valid"),
        ("dev.parquet", "valid"),
        ("default/test/0000.parquet", "test"),
        ("TRAIN_clean_100.parquet", "train"),
        ("trainer.parquet", None),
        ("latest.parquet", None),
        ("rows/a.parquet", None),
    ],
)
def test_splits_are_named_by_files_and_folders(path, split):
    assert split_of(Path(path)) == split


def test_several_splits_are_not_mixed(wav, tmp_path):
    import datasets

    audio = {"audio": [{"bytes": wav.read_bytes()}]}
    for name in ("train-0", "train-1", "test-0"):
        write(tmp_path / "hub" / "data" / f"{name}.parquet", audio)
    with pytest.raises(ConfigError, match=r"contains files of the splits test, train, which must not be mixed"):
        clips_of(tmp_path / "hub")
    write(tmp_path / "half" / "part-0.parquet", audio)
    write(tmp_path / "half" / "test.parquet", audio)
    with pytest.raises(ConfigError, match=r"contains files of the split test and files without a split"):
        clips_of(tmp_path / "half")
    assert len(clips_of(tmp_path / "hub" / "data" / "test-0.parquet")) == 1
    (tmp_path / "hub" / "data" / "test-0.parquet").unlink()
    (tmp_path / "hub" / "data" / "._test-0.parquet").write_bytes(b"Mac OS X")
    assert len(clips_of(tmp_path / "hub")) == 2
    saved = datasets.Dataset.from_dict({"audio": [str(wav)]})
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match="test, train; pass the folder of one split"):
        clips_of(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").unlink()
    with pytest.raises(ConfigError, match="test, train; pass the folder of one of them"):
        clips_of(tmp_path / "saved")
    (clip,) = clips_of(tmp_path / "saved" / "test")
    assert len(clip.audio(RATE, 100)) == len(WAVE)


def test_columns_that_datasets_would_decode_are_read_without_it(wav, tmp_path):
    """`datasets` would need torchcodec to decode them."""
    import datasets

    names = datasets.ClassLabel(names=["de", "pl"])
    rows = {"audio": [str(wav)] * 2, "language": [1, 0], "sentence": ["a", None]}
    made = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio()).cast_column("language", names)
    made.save_to_disk(tmp_path / "saved")
    table = made.with_format("arrow")[:]
    features = made.features.arrow_schema.metadata
    pq.write_table(table.replace_schema_metadata(features), tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        clips = clips_of(path)
        assert [clip.labels for clip in clips] == [
            {"language": "pl", "lang": "pl", "text": "a", "sentence": "a"},
            {"language": "de", "lang": "de"},
        ]
        assert all(len(clip.audio(RATE, 100)) == len(WAVE) for clip in clips)


def test_a_damaged_file_of_several_is_a_failure(wav, tmp_path):
    audio = {"audio": [{"bytes": wav.read_bytes()}] * 3}
    for name in ("a", "b"):
        write(tmp_path / "rows" / f"{name}.parquet", audio)
    whole = (tmp_path / "rows" / "a.parquet").read_bytes()
    (tmp_path / "rows" / "a.parquet").write_bytes(whole[: len(whole) // 2])
    bad, *good = clips_of(tmp_path / "rows")
    with pytest.raises(AudioError, match=r"a\.parquet: not a Parquet file"):
        bad.audio(RATE, 100)
    assert len(good) == 3
    # Damage the start of a column's first page. The rows that cannot be read are failures.
    (tmp_path / "rows" / "a.parquet").write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    clips = clips_of(tmp_path / "rows")
    assert len(clips) == 6
    for clip in clips[:3]:
        with pytest.raises(AudioError):
            clip.audio(RATE, 100)


@pytest.mark.parametrize("kind", ["a.parquet", "saved"])
def test_capitals_in_names_of_columns_are_understood(kind, wav, tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")

    def clips(**columns) -> list:
        rows = {"Audio": [{"bytes": wav.read_bytes()}], "ID": ["x"], **columns}
        if kind == "saved":
            datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / kind)
        else:
            write(tmp_path / kind, rows)
        return clips_of(tmp_path / kind)

    (clip,) = clips(Text=["hi"], Locale=["de"], Other=["y"])
    assert len(clip.audio(RATE, 100)) == len(WAVE) and clip.id.startswith("x-")
    assert clip.labels.items() >= {"text": "hi", "lang": "de", "locale": "de", "Other": "y"}.items()
    with pytest.raises(ConfigError, match=f"{kind}: the columns 'Text' and 'TEXT' differ only in case"):
        clips(Text=["hi"], TEXT=["ho"])


@pytest.mark.parametrize("name", ["audio", "text"])
def test_two_columns_of_one_name_are_refused(name, wav, tmp_path):
    columns = [pa.array([wav.read_bytes()]), pa.array(["hi"]), pa.array(["there"])]
    pq.write_table(pa.table(columns, names=["audio", "text", name]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=rf"a\.parquet: two columns are named '{name}'; rename or remove one"):
        clips_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["t.csv", "a.parquet"])
def test_sections_of_a_file_are_clips_where_the_column_is_that_of_nemo(name, wav, tmp_path):
    rows = {"audio_filepath": ["a.wav"] * 3, "offset": [0.1, 0.4, None], "duration": [0.2, None, None]}
    if name == "t.csv":
        lines = [
            ",".join("" if value is None else str(value) for value in row) for row in zip(*rows.values(), strict=True)
        ]
        (tmp_path / name).write_text("\n".join([",".join(rows), *lines]))
    else:
        write(tmp_path / name, rows)
    clips = clips_of(tmp_path / name)
    assert len({clip.id for clip in clips}) == 3
    assert [len(clip.audio(RATE, 100)) / RATE for clip in clips] == pytest.approx([0.2, 0.1, 0.5], abs=1e-3)


@pytest.mark.parametrize("kind", ["bytes", "struct", "samples"])
def test_sections_of_embedded_audio_are_clips_or_failures(kind, wav, tmp_path):
    samples, rate = soundfile.read(wav, dtype="float32")
    cell = {
        "bytes": wav.read_bytes(),
        "struct": {"bytes": wav.read_bytes(), "path": "a.wav"},
        "samples": {"array": samples.tolist(), "sampling_rate": rate},
    }[kind]
    write(
        tmp_path / "a.parquet",
        {"audio_filepath": [cell] * 3, "offset": [0.1, None, 0.0], "duration": [0.2, None, 0.51]},
    )
    part, *whole = clips_of(tmp_path / "a.parquet")
    assert [len(clip.audio(RATE, 100)) / RATE for clip in whole] == pytest.approx([0.5, 0.5], abs=1e-3)
    if kind == "samples":
        with pytest.raises(AudioError, match=r"row 0.*cannot select a part of decoded samples"):
            part.audio(RATE, 100)
    else:
        assert len(part.audio(RATE, 100)) / RATE == pytest.approx(0.2, abs=1e-3)


DURATIONS = [datetime.timedelta(seconds=0.1), datetime.timedelta(seconds=0.2)]
TYPED_TIMES = {  # values of `offset` and `duration`; None if the row is a failure
    "timedelta": (pa.array(DURATIONS), True),
    "timedelta in a dictionary": (pa.array(DURATIONS).dictionary_encode(), True),
    "nanoseconds": (pa.array([100_000_001, 200_000_001], pa.duration("ns")), True),
    "milliseconds": (pa.array([100, 200], pa.duration("ms")), True),
    "decimal numbers": (pa.array([0.1, 0.2]).cast(pa.decimal128(9, 3)), True),
    "text": (pa.array(["0.1", "0.2"]), True),
    "times of day": (pa.array([datetime.time(0, 0, 0, 100_000), datetime.time(0, 0, 0, 200_000)]), False),
    "dates": (pa.array([datetime.datetime(2020, 1, 1)] * 2), False),
    "bytes": (pa.array([b"0.1", b"0.2"]), False),
    "lists": (pa.array([[0.1], [0.2]]), False),
    "booleans": (pa.array([False, True]), False),
    "negative durations": (pa.array([-1, -1], pa.duration("s")), False),
}


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
@pytest.mark.parametrize("kind", TYPED_TIMES)
def test_typed_times_are_seconds_or_a_failure(kind, name, wav, tmp_path):
    values, is_valid = TYPED_TIMES[kind]
    table = pa.table({"audio_filepath": [str(wav)], "offset": values[:1], "duration": values[1:]})
    if name == "saved":
        datasets = pytest.importorskip("datasets", reason="pip install datasets")
        datasets.Dataset(table).save_to_disk(str(tmp_path / name))
    elif "dictionary" in kind:
        pytest.skip("pyarrow does not restore this type from Parquet")
    else:
        pq.write_table(table, tmp_path / name)
    (clip,) = clips_of(tmp_path / name)
    if is_valid:
        assert np.array_equal(clip.audio(RATE, 100), read_file(wav, 0.1, 0.2, RATE, 100))
    else:
        with pytest.raises(AudioError, match=r"row 0, column 'audio_filepath': offset .*expected a number of seconds"):
            clip.audio(RATE, 100)


def test_typed_labels_are_kept_or_named(wav, tmp_path, caplog):
    columns = {
        "audio": [wav.read_bytes()],
        "when": [datetime.datetime(2020, 1, 2, 3, 4, 5)],
        "day": [datetime.date(2020, 1, 2)],
        "took": [datetime.timedelta(seconds=1.5)],
        "id": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(range(16))], pa.binary(16))),
        "late": pa.array([1 << 62], pa.timestamp("ms")),
        "wrapped": pa.array([1 << 62], pa.timestamp("us", "UTC")),
        "later": pa.array([(1 << 31) - 1], pa.date32()),
        "night": pa.array([86400], pa.time32("s")),
        "evening": pa.array([86399], pa.time32("s")),
        "nothing": pa.nulls(1),
        "picture": [b"x"],
        "fixed": pa.array([b"x"], pa.binary(1)),
        "embedding": [[0.1, 0.2]],
        "about": [{"age": 7}],
        "matrix": pa.ExtensionArray.from_storage(Array2D(), pa.array([[[0.5]]], pa.list_(pa.list_(pa.float32())))),
    }
    (clip,) = clips_of(write(tmp_path / "a.parquet", columns))
    assert clip.labels == {
        "when": "2020-01-02 03:04:05.000000",
        "day": "2020-01-02",
        "took": 1.5,
        "evening": "23:59:59.000",
        "id": "00010203-0405-0607-0809-0a0b0c0d0e0f",
    }
    (message,) = [
        record.getMessage() for record in caplog.records if "of these types are not read" in record.getMessage()
    ]
    named = re.findall(r"'(\w+)' \(", message)
    assert named == ["picture", "fixed", "embedding", "about", "matrix"]
    assert "audio is read from column" not in caplog.text


def test_the_column_of_audio_is_named_if_its_name_is_not_known(wav, tmp_path, caplog):
    cells = [{"bytes": wav.read_bytes(), "path": None}]
    (clip,) = clips_of(write(tmp_path / "a.parquet", {"prompt": cells, "answer": cells}))
    assert len(clip.audio(RATE, 100)) == len(WAVE)
    assert "the audio is read from column 'prompt'" in caplog.text and "not read: 'answer' (" in caplog.text


def test_a_column_with_lists_of_files_is_refused(wav, tmp_path):
    files = [[{"bytes": wav.read_bytes(), "path": "a.wav"}] * 2]
    with pytest.raises(ConfigError, match="each cell of the column 'audio' is a list of audio files; write a table"):
        clips_of(write(tmp_path / "a.parquet", {"audio": files}))


@pytest.mark.parametrize("url", ["https://host/a.wav", "hf://datasets/x/a.wav", "file:///a.wav", "zip://a.wav::b.zip"])
@pytest.mark.parametrize("name", ["m.json", "t.csv", "a.parquet"])
def test_a_url_of_audio_is_named_as_a_url(name, url, tmp_path):
    path = tmp_path / name
    if name == "a.parquet":
        write(path, {"audio": [{"bytes": None, "path": url}]})
    else:
        path.write_text(json.dumps({"audio_filepath": url}) if name == "m.json" else f"path\n{url}\n")
    (clip,) = clips_of(path)
    with pytest.raises(AudioError, match=f"'{re.escape(url)}' is a URL, but only local files are read; download it"):
        clip.audio(RATE, 100)


def test_times_in_a_text_table_become_numbers(wav, tmp_path):
    (tmp_path / "t.csv").write_text("audio_filepath,offset,duration,take\na.wav,0.1,0.25,07\n")
    (clip,) = clips_of(tmp_path / "t.csv")
    assert clip.labels == {"audio_filepath": "a.wav", "offset": 0.1, "duration": 0.25, "take": "07"}


def test_unlisted_audio_files_beside_a_table_are_reported(wav, tmp_path, caplog):
    write(tmp_path / "a.parquet", {"audio": [wav.read_bytes()]})
    assert len(clips_of(tmp_path)) == 1
    assert "of the 1 audio file in this folder of tables, only those that a table lists" in caplog.text


def test_an_error_names_the_column_that_was_read_as_audio(wav, tmp_path):
    rows = {"thumb": [b"\x89PNG\r\n\x1a\n" + bytes(100)], "sound": [{"bytes": wav.read_bytes()}]}
    (clip,) = clips_of(write(tmp_path / "a.parquet", rows))
    with pytest.raises(AudioError, match=r"a\.parquet, row 0, column 'thumb': "):
        clip.audio(RATE, 100)


def test_a_table_of_other_columns_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"no audio column; expected one of audio, .*found \['text'\]"):
        clips_of(write(tmp_path / "a.parquet", {"text": ["a"]}))
    (clip,) = clips_of(write(tmp_path / "b.parquet", {"odd name": [struct(WAVE.tolist())], "text": ["a"]}))
    assert len(clip.audio(RATE, 100)) == len(WAVE)


@pytest.mark.parametrize("column", ["audio_file", "wav_path", "wav_filepath", "filename", "file_path", "filepath"])
def test_other_names_of_a_column_of_paths_are_understood(column, wav, tmp_path):
    (clip,) = clips_of(write(tmp_path / "a.parquet", {"text": ["t"], column: [wav.name]}), wav.parent)
    assert len(clip.audio(RATE, 100)) == len(WAVE)


def test_text_that_is_stored_as_bytes_is_decoded(wav, tmp_path):
    data = wav.read_bytes()
    columns = {"audio": [data, data], "sentence": [b"h\xc3\xa9", b"\xff"], "other": [b"x", b"y"]}
    first, second = clips_of(write(tmp_path / "a.parquet", columns))
    assert first.labels == {"text": "hé", "sentence": "hé"}
    with pytest.raises(AudioError, match="not UTF-8"):
        second.audio(RATE, 100)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "pipe", "pipe for a state", "no JSON", "no list"])
def test_a_saved_dataset_reads_nothing_outside_of_its_folder(kind, wav, tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("mine", "secret"):
        datasets.Dataset.from_dict({"audio": [str(wav)], "text": [name]}).save_to_disk(str(tmp_path / name))
    mine, secret = tmp_path / "mine", tmp_path / "secret"
    state = json.loads((mine / "state.json").read_text())
    name = state["_data_files"][0]["filename"]
    if kind in ("parent", "absolute"):
        state["_data_files"] = [{"filename": f"../secret/{name}" if kind == "parent" else str(secret / name)}]
        (mine / "state.json").write_text(json.dumps(state))
    elif kind in ("link", "pipe"):
        (mine / name).unlink()
        (os.symlink if kind == "link" else lambda _, path: os.mkfifo(path))(secret / name, mine / name)
    else:
        (mine / "state.json").unlink()
        if kind == "pipe for a state":
            os.mkfifo(mine / "state.json")
        else:
            (mine / "state.json").write_text("{" if kind == "no JSON" else '{"_data_files": 5}')
    with pytest.raises(ConfigError) as error:
        clips_of(mine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("t.csv", "bad", "the row has 1 field"),
        ("t.csv", "a.wav,-1,", "offset is '-1'; expected a number of seconds"),
        ("t.csv", "a.wav,,long", "duration is 'long'; expected a number of seconds"),
        ("t.csv", "x" * 300 + ",,", "is not a valid file name"),
        ("metadata.jsonl", '{"file_name": "a.wav", "lang": 5}', "the label 'lang' is 5"),
        ("metadata.jsonl", '{"file_name": "a.wav", "context_audio_filepath": [1]}', "the path of the audio file is"),
    ],
)
def test_a_problem_is_reported_at_the_table_whatever_the_folder_of_the_audio(name, row, problem, wav, tmp_path):
    path = tmp_path / "tables" / name
    path.parent.mkdir()
    head = ["audio_filepath,offset,duration", "a.wav,,"] if name == "t.csv" else ['{"file_name": "a.wav"}']
    path.write_text("\n".join([*head, row]))
    clips = clips_of(path, audio_dir=wav.parent)
    place = f"{path}, line {len(head) + 1}"
    assert len(clips[0].audio(RATE, 60.0)) == len(WAVE)
    with pytest.raises(AudioError, match=re.escape(problem)) as error:
        clips[1].audio(RATE, 60.0)
    assert str(error.value).startswith(f"{place}: ") and clips[1].origin == place
    assert "unused.json" not in str(error.value)


def test_text_tables_are_read_as_corpora(wav):
    path = wav.parent / "t.csv"
    path.write_text("file_name,sentence,client_id,problem\na.wav,hi,me,none\na.wav,again,me,\nbad\ngone.wav,x,y,\n")
    clips = clips_of(path)
    assert len({clip.id for clip in clips}) == 4 and clips[0].id == "a"
    assert [clip.labels.get("text") for clip in clips] == ["hi", "again", None, "x"]
    assert clips[0].labels["problem"] == "none"  # a column of the user is a label
    assert clips[0].labels["speaker"] == "me" and len(clips[0].audio(RATE, 60.0)) == len(WAVE)
    for clip, reason in ((clips[2], "line 4: the row has 1 field"), (clips[3], "gone.wav")):
        with pytest.raises(AudioError, match=reason):
            clip.audio(RATE, 60.0)
    with pytest.raises(ConfigError, match="has no rows"):
        path.write_text("file_name,text\n")
        clips_of(path)
