"""Tests of the forms of audio that `Codec.encode` accepts or refuses, with one row of a table per form."""

import logging
import pathlib
from array import array
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from nemo_lfr.codec import clips
from nemo_lfr.codec.clips import to_batch
from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import resample
from nemo_lfr.io.token_file import TokenReader
from nemo_lfr.testing.codecs import synthesize
from tests.models import cached_codec

RATE = 22050
FIRST, SECOND = synthesize(0.1), synthesize(0.17, seed=1)
STEREO = np.stack([FIRST, FIRST[::-1]])
MIXED = STEREO.mean(0)
AT_16K = resample(FIRST, RATE, 16000)
INT16 = (FIRST * 32767).astype(np.int16)


class Decoder:
    """Stand-in for the `AudioDecoder` of `datasets` and TorchCodec, which need FFmpeg's libraries."""

    def __init__(self, data: np.ndarray, rate: int = RATE) -> None:
        self.samples = SimpleNamespace(data=torch.from_numpy(np.atleast_2d(data)), sample_rate=rate)

    def get_all_samples(self) -> SimpleNamespace:
        return self.samples


class BrokenDecoder:
    def get_all_samples(self) -> None:
        raise RuntimeError("no audio stream")


def item(array: Any, rate: int | None = RATE) -> dict[str, Any]:
    """Return an item of a decoded audio column of `datasets`."""
    return {"path": None, "array": array, "sampling_rate": rate}


# name -> (audio, audio_len, sample_rate, expected clips at the codec's rate)
FORMS: dict[str, tuple[Any, Any, Any, list[np.ndarray]]] = {
    # Arrays
    "[B, 1, T]": (STEREO[:, None], [len(FIRST)] * 2, RATE, [*STEREO]),
    "[1, 1, T] tensor": (torch.from_numpy(FIRST)[None, None], None, RATE, [FIRST]),
    "[1, T]": (FIRST[None], None, RATE, [FIRST]),
    # Lists
    "arrays of unequal lengths": ([FIRST, SECOND], None, RATE, [FIRST, SECOND]),
    "a tuple of tensors": ((torch.from_numpy(SECOND), torch.from_numpy(FIRST)), None, RATE, [SECOND, FIRST]),
    "tensors of equal lengths": ([torch.from_numpy(FIRST)] * 2, None, RATE, [FIRST, FIRST]),
    "clips of [1, T]": ([FIRST[None], SECOND[None]], None, RATE, [FIRST, SECOND]),
    "lists of unequal lengths": ([FIRST.tolist(), SECOND.tolist()], None, RATE, [FIRST, SECOND]),
    "[B, 1, T] as lists": ([[FIRST.tolist()], [SECOND.tolist()]], None, RATE, [FIRST, SECOND]),
    "one list of numbers": (FIRST.tolist(), None, RATE, [FIRST]),
    "a list of numpy numbers": (list(FIRST), None, RATE, [FIRST]),
    "with lengths": ([FIRST, SECOND], [len(FIRST), 999], RATE, [FIRST, SECOND[:999]]),
    "with an empty clip": ([FIRST, FIRST[:0]], None, RATE, [FIRST, FIRST[:0]]),
    "at another rate": ([AT_16K, FIRST], None, 16000, [resample(AT_16K, 16000, RATE), resample(FIRST, 16000, RATE)]),
    "of int16": ([INT16], None, RATE, [INT16 / np.float32(32768)]),
    "a deque": (deque([FIRST, SECOND]), None, RATE, [FIRST, SECOND]),
    "an array of objects": (np.array([FIRST, SECOND, None], object)[:2], None, RATE, [FIRST, SECOND]),
    "array.array of int16": (array("h", INT16.tobytes()), None, RATE, [INT16 / np.float32(32768)]),
    "a rate in a tensor": (AT_16K, None, torch.tensor(16000), [resample(AT_16K, 16000, RATE)]),
    "of several forms": ([FIRST, item(SECOND), Decoder(STEREO)], None, RATE, [FIRST, SECOND, MIXED]),
    "of several rates": ([item(AT_16K, 16000), item(SECOND)], None, None, [resample(AT_16K, 16000, RATE), SECOND]),
    # Items of datasets and decoders
    "an item": (item(FIRST), None, None, [FIRST]),
    "an item of tensors": (item(torch.from_numpy(FIRST), torch.tensor(RATE)), None, None, [FIRST]),
    "an item of numpy arrays": (item(FIRST, np.array(RATE)), None, RATE, [FIRST]),
    "an item and its rate": (item(FIRST), None, RATE, [FIRST]),
    "an item of float64": (item(FIRST.astype(np.float64)), None, None, [FIRST]),
    "an item of a list": (item(FIRST.tolist()), None, None, [FIRST]),
    "an item with a length": (item(FIRST), [999], None, [FIRST[:999]]),
    "a stereo item": (item(STEREO), None, None, [MIXED]),
    "a stereo item, channels last": (item(STEREO.T), None, None, [MIXED]),
    "an item of 16 channels, channels last": (item(np.outer(FIRST, np.eye(16)[3])), None, None, [FIRST / 16]),
    "an item without a rate": (item(FIRST, None), None, RATE, [FIRST]),
    "a decoder": (Decoder(FIRST), None, None, [FIRST]),
    "a decoder at another rate": (Decoder(AT_16K, 16000), None, None, [resample(AT_16K, 16000, RATE)]),
    "a stereo decoder": (Decoder(STEREO), None, None, [MIXED]),
    "samples of a decoder": (Decoder(STEREO).samples, None, None, [MIXED]),
    "decoders": ([Decoder(FIRST), Decoder(SECOND)], None, None, [FIRST, SECOND]),
}  # fmt: skip

# name -> (audio, audio_len, sample_rate, message)
REFUSED: dict[str, tuple[Any, Any, Any, str]] = {
    "a stereo clip in a list": ([FIRST, STEREO], None, RATE, r"audio\[1\] has 2 rows"),
    "a stereo clip in a list, channels last": ([STEREO.T], None, RATE, r"audio\[0\] has shape .*2 channels"),
    "a stereo clip as lists": ([STEREO.tolist(), FIRST], None, RATE, r"audio\[0\] has 2 rows"),
    "a pair of audio and rate": ((FIRST, 16000), None, None, "audio is a pair of samples and the number 16000; pass"),
    "a pair of rate and audio": ((16000, FIRST), None, None, "audio is a pair of samples and the number 16000; pass"),
    "NaN in the second clip": ([FIRST, SECOND * np.nan], None, RATE, "clip 1 contains NaN"),
    "nothing in the second clip": ([FIRST, None], None, RATE, r"audio\[1\] has type NoneType"),
    "one length for two clips": ([FIRST, SECOND], [9], RATE, r"audio_len .*\[1\].*\[2\]"),
    "a length beyond the second clip": ([FIRST, SECOND], [9, 99999], RATE, r"audio_len\[1\] is 99999"),
    "a negative length": ([FIRST, SECOND], [9, -1], RATE, r"audio_len\[1\] is -1"),
    "an item at another rate": (item(FIRST), None, 16000, "declares a sample rate of 22050 Hz.*sample_rate is 16000"),
    "the second item at another rate": ([FIRST, item(FIRST)], None, 16000, r"audio\[1\] declares .* 22050 Hz"),
    "an item at a rate in text": (item(FIRST, "22050"), None, RATE, "audio has the sample rate '22050', a string"),
    "rates of several clips": (FIRST, None, torch.tensor([RATE, RATE]), r"sample_rate is .*; expected a number"),
    "a rate in text": (item(FIRST), None, "22050", "audio has the sample rate '22050', a string; pass a number"),
    "an item of a spectrogram": (item(np.zeros((80, 200), np.float32)), None, None, r"shape \(80, 200\), so it is u"),
    "an item at no rate": (item(FIRST, 0), None, None, "sample_rate is 0; expected a number"),
    "samples beyond float32": (item(FIRST.astype(np.float64) * 1e300), None, None, "NaN.*range of float32"),
    "an item of integers": (item((FIRST * 99).astype(np.int32)), None, None, "audio: int32 samples .* reach only"),
    "a row of a table": ({"audio": item(FIRST), "text": ""}, None, None, r"'text'\]; it needs 'array' and"),
    "an item without audio": ({"path": None, "bytes": None}, None, None, "audio is a dict .* not None"),
    "a decoder that fails": (BrokenDecoder(), None, None, "audio cannot be decoded .no audio stream"),
    "a decoder at another rate": (Decoder(FIRST), None, 16000, "declares a sample rate of 22050 Hz"),
    "a path that does not exist": ([FIRST, pathlib.Path("nowhere.wav")], None, RATE, "nowhere.wav: no such file"),
    "an empty path": ("", None, None, "the path '' is empty"),
    "no clips": ([], None, [1], "audio is an empty list"),
}  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    return cached_codec().backend.arrays


@pytest.fixture
def warnings(caplog):
    """Return a function that returns the logged messages; warnings that earlier tests caused are logged again."""
    clips._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_the_batch_of_its_clips(arrays, warnings, name):
    audio, audio_len, rate, expected = FORMS[name]
    batch, lengths = to_batch(arrays, audio, audio_len, rate, RATE)
    assert batch.dtype == torch.float32 and lengths == [len(clip) for clip in expected]
    for row, clip in zip(batch.numpy(), expected, strict=True):
        assert np.array_equal(row[: len(clip)], clip.astype(np.float32))
    assert not warnings()


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_with_the_name_of_the_argument(arrays, name):
    audio, audio_len, rate, message = REFUSED[name]
    with pytest.raises(AudioError, match=message) as error:
        to_batch(arrays, audio, audio_len, rate, RATE)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.slow
@pytest.mark.parametrize("rate", [RATE, 16000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_file_in_any_form_has_the_tokens_of_encode_file(rate, channels, tmp_path, warnings):
    codec, path = cached_codec(), tmp_path / "a.wav"
    soundfile.write(path, np.stack([SECOND, SECOND[::-1]][:channels], 1), rate)
    codec.encode_file(path, tmp_path / "a.lfr")
    with TokenReader(tmp_path / "a.lfr") as reader:
        expected = reader.read()
    data = path.read_bytes()
    forms = [path, str(path), [path], {"path": str(path), "bytes": None}, {"path": "a.wav", "bytes": data}]
    for form in [*forms, {"path": None, "bytes": data}]:
        assert np.array_equal(codec.encode(form)[0][0].numpy(), expected)
    assert np.array_equal(codec.encode(path, sample_rate=rate)[0][0].numpy(), expected)
    with pytest.raises(AudioError, match=rf"a\.wav declares a sample rate of {rate} Hz, but sample_rate is 8000"):
        codec.encode(path, sample_rate=8000)
    with pytest.raises(AudioError, match="omit audio_len"):
        codec.encode(path, [999])
    assert not warnings()


def test_a_list_of_clips_has_the_tokens_of_each_alone():
    codec = cached_codec()
    tokens, tokens_len = codec.encode([FIRST, SECOND], sample_rate=RATE)
    for row, length, clip in zip(tokens, tokens_len, (FIRST, SECOND), strict=True):
        alone, _ = codec.encode(clip, sample_rate=RATE)
        assert torch.equal(row[:, :length], alone[0]) and not row[:, length:].any()


def test_a_missing_rate_is_logged_once(arrays, warnings):
    for _ in range(2):
        to_batch(arrays, FIRST, None, None, RATE)
        to_batch(arrays, [FIRST, item(SECOND, None)], None, None, RATE)
    assert len(warnings()) == 1 and "assumed to be at the codec's rate, 22050 Hz" in warnings()[0]


@pytest.mark.parametrize("audio", [STEREO, torch.from_numpy(STEREO)[:, None]])
def test_two_rows_without_lengths_are_logged_once(arrays, warnings, audio):
    for _ in range(2):
        assert to_batch(arrays, audio, None, RATE, RATE)[1] == [len(FIRST)] * 2
    assert len(warnings()) == 1 and "2 rows is encoded as 2 clips" in warnings()[0]


@pytest.mark.parametrize("audio", [np.repeat(STEREO, 2, axis=0), FIRST])
def test_other_numbers_of_rows_are_not_logged(arrays, warnings, audio):
    to_batch(arrays, audio, None, RATE, RATE)
    assert not warnings()


@pytest.mark.slow
def test_audio_columns_of_datasets_are_encoded(tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    codec, path = cached_codec(), tmp_path / "a.wav"
    soundfile.write(path, AT_16K, 16000)
    column = datasets.Dataset.from_dict({"audio": [str(path)]}).cast_column("audio", datasets.Audio(decode=False))
    assert torch.equal(codec.encode(column[0]["audio"])[0], codec.encode(path)[0])
    assert torch.equal(codec.encode(column["audio"][:1])[0], codec.encode(path)[0])


@pytest.mark.parametrize("form", [None, "numpy", "torch", "pandas", "arrow"])
def test_decoded_audio_in_any_format_of_datasets_is_encoded(form):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    codec = cached_codec()
    rows = [{"array": clip, "sampling_rate": RATE} for clip in (FIRST, SECOND)]
    dataset = datasets.Dataset.from_dict({"audio": rows}).with_format(form)
    expected, lengths = codec.encode([FIRST, SECOND], sample_rate=RATE)
    for audio in (dataset["audio"], dataset[:2]["audio"]):
        tokens, tokens_len = codec.encode(audio)
        assert torch.equal(tokens, expected) and torch.equal(tokens_len, lengths)
    assert torch.equal(codec.encode(dataset[1]["audio"])[0][..., : lengths[1]], expected[1:, :, : lengths[1]])


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("audio") / "a.wav"
    soundfile.write(path, INT16, RATE)
    return path


def arrow(values: Any, kind: str) -> Any:
    pa = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
    samples = pa.list_(pa.int16())
    types = {
        "samples": pa.int16(),
        "list": samples,
        "struct": pa.struct({"array": samples, "sampling_rate": pa.int64()}),
    }
    return pa.array(values, types.get(kind))


def tensors(clips: list[Any]) -> Any:
    """Return an Arrow column with a tensor [C, T] of fixed shape in each cell."""
    pa = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(clips))


def series(values: Any, **options: Any) -> Any:
    return pytest.importorskip("pandas", reason="pip install pandas").Series(values, **options)


COLUMNS = {  # columns and cells of tables with 16-bit samples, or with a file of them
    "Arrow samples": lambda wav: arrow(INT16, "samples"),
    "Arrow chunks": lambda wav: pytest.importorskip("pyarrow").chunked_array([INT16[:100], INT16[100:]]),
    "Arrow list": lambda wav: arrow([INT16], "list"),
    "cell with a list": lambda wav: arrow([INT16], "list")[0],
    "cells with lists": lambda wav: [arrow([INT16], "list")[0]],
    "cell with a tensor": lambda wav: tensors([[INT16]])[0],
    "Arrow structs": lambda wav: arrow([{"array": INT16, "sampling_rate": RATE}], "struct"),
    "cell with a struct": lambda wav: arrow([{"array": INT16, "sampling_rate": RATE}], "struct")[0],
    "cell with bytes": lambda wav: arrow([{"bytes": wav.read_bytes(), "path": None}], "")[0],
    "cell with a path": lambda wav: arrow([str(wav)], "")[0],
    "Arrow paths": lambda wav: arrow([str(wav)], ""),
    "Series of paths": lambda wav: series([str(wav)]),
    "Series of strings in Arrow": lambda wav: series([str(wav)], dtype="string[pyarrow]"),
    "Series of objects": lambda wav: series([wav], dtype=object),
    "Series of dicts": lambda wav: series([{"array": INT16, "sampling_rate": RATE}]),
    "array of paths": lambda wav: np.array([str(wav)]),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_and_cells_of_tables_keep_the_type_of_their_samples(kind, wav):
    codec = cached_codec()
    expected = codec.encode(INT16, sample_rate=RATE)[0]
    for rate in (RATE, pytest.importorskip("pyarrow").scalar(RATE)):
        assert torch.equal(codec.encode(COLUMNS[kind](wav), sample_rate=rate)[0], expected)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda wav: series([str(wav)]).to_frame("path"), r"audio is a data frame; pass its column of audio"),
        (lambda wav: arrow([{"bytes": None, "path": None}], "")[0], r"it needs 'array' and 'sampling_rate'"),
        (lambda wav: arrow([{"bytes": None, "path": None}], ""), r"audio\[0\] is a dict .*it needs 'array'"),
        (lambda wav: arrow([None], "list"), r"audio\[0\] .*None"),
    ],
)
def test_columns_without_audio_are_refused_by_name(make, error, wav):
    with pytest.raises(AudioError, match=error):
        cached_codec().encode(make(wav))
