"""The contract of backends, which every registered one keeps, and the registry.

A new backend adds how to make a model of its own to `MODELS`.
"""

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import nemo_lfr
from nemo_lfr import AudioError, Codec, NemoLfrError, TokenFileError, TokensError
from nemo_lfr.codec import backends
from nemo_lfr.codec.arrays import to_numpy
from nemo_lfr.codec.backend import StreamingBackend
from nemo_lfr.io.token_file import TokenReader
from tests import level_backend
from tests.models import cached_codec, codec_config, synthesize, write_nemo

KIND = "two_stages"


def write_checkpoint(folder: Path) -> Path:
    return write_nemo(folder / "codec.nemo", codec_config(KIND))


def write_onnx(folder: Path) -> Path:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="pip install '.[onnx]'")
    from nemo_lfr.codec.onnx.export import export_onnx

    export_onnx(cached_codec(KIND), folder)
    return folder


def write_levels(folder: Path) -> Path:
    path = folder / "codec.levels"
    path.touch()
    return path


MODELS: dict[str, Callable[[Path], Path]] = {"torch": write_checkpoint, "onnx": write_onnx, "levels": write_levels}


@pytest.fixture(scope="module", autouse=True)
def levels() -> Iterator[None]:
    """A third party's backend, registered by one call."""
    backends.register("levels", level_backend.OPENER)
    yield
    backends.unregister("levels")


@pytest.fixture(scope="module", params=list(MODELS))
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """A codec over each backend."""
    model = MODELS[request.param](tmp_path_factory.mktemp(request.param))
    return nemo_lfr.load(model, "cpu", backend=request.param)


def with_chunks(codec: Codec, chunk_frames: int) -> Codec:
    return Codec(codec.backend, chunk_frames=chunk_frames)


def speech(codec: Codec, frames: float, seed: int = 0) -> np.ndarray:
    """Synthetic speech of so many frames."""
    samples = round(frames * codec.samples_per_frame)
    return synthesize(samples / 22050 + 0.01, seed)[:samples]


def tokens_of(codec: Codec, clip: np.ndarray) -> np.ndarray:
    return to_numpy(codec.encode(clip)[0])[0]


def audio_of(codec: Codec, tokens: np.ndarray) -> np.ndarray:
    return to_numpy(codec.decode(tokens)[0])[0]


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    """Same tokens; one of a thousand may be a rounding tie, which other sums of the same products decide."""
    assert got.shape == expected.shape
    assert (got != expected).mean() <= 1e-3


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """Same audio, but for the order of sums in fp32."""
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_every_registered_backend_is_under_contract():
    assert set(backends.backend_names()) == set(MODELS)


def test_codec_has_a_spec(codec):
    spec = codec.spec
    spec.validate()
    assert (codec.sample_rate, codec.samples_per_frame) == (spec.sample_rate, spec.samples_per_frame)
    assert (codec.levels, codec.num_codebooks, codec.precision) == (spec.levels, spec.num_codebooks, spec.precision)
    assert codec.fingerprint == spec.fingerprint and codec.made(spec.fingerprint)
    assert not codec.made("f" * 16)
    assert codec.name in repr(codec) and f"{codec.sample_rate} Hz" in repr(codec)


@pytest.mark.parametrize("samples", [1, -1, 0, 1000])
def test_clips_of_any_length_have_ceil_frames(codec, samples):
    """Around a whole number of frames, and one sample alone."""
    length = samples if samples == 1 else 7 * codec.samples_per_frame + samples
    clip = synthesize(1)[:length]
    tokens, tokens_len = codec.encode(clip)
    frames = -(-length // codec.samples_per_frame)
    assert tuple(tokens.shape) == (1, codec.num_codebooks, frames) and tokens_len.tolist() == [frames]
    assert str(tokens.dtype).endswith("int32") and str(tokens_len.dtype).endswith("int64")
    assert int(tokens.min()) >= 0 and int(tokens.max()) < codec.codebook_size
    audio, audio_len = codec.decode(tokens, tokens_len, [length])
    assert tuple(audio.shape) == (1, length) and audio_len.tolist() == [length]
    assert str(audio.dtype).endswith("float32") and float(abs(audio).max()) <= 1


def test_an_empty_clip_has_no_frames(codec):
    tokens, tokens_len = codec.encode(np.zeros(0, np.float32))
    assert tokens.shape[2] == 0 and tokens_len.tolist() == [0]
    assert codec.decode(tokens)[0].shape[1] == 0


def test_a_batch_gives_each_clip_what_it_gets_alone_whatever_follows_its_end(codec):
    clips = [speech(codec, frames, seed) for seed, frames in enumerate((9.5, 23, 1, 16.2))]
    batch = np.full((len(clips), max(map(len, clips))), 0.7, np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    tokens, tokens_len = codec.encode(batch, [len(clip) for clip in clips])
    ids = to_numpy(tokens).copy()
    for clip, row, frames in zip(clips, ids, tokens_len.tolist(), strict=True):
        assert_same(row[:, :frames], tokens_of(codec, clip))
        assert not row[:, frames:].any()
        row[:, frames:] = codec.codebook_size - 1
    audio, audio_len = codec.decode(ids, tokens_len)
    for row, samples, number, frames in zip(
        to_numpy(audio), audio_len.tolist(), ids, tokens_len.tolist(), strict=True
    ):
        assert_close(row[:samples], audio_of(codec, number[:, :frames]))
        assert not row[samples:].any()


@pytest.mark.parametrize("chunk_frames", [3, 11])
def test_long_recordings_give_the_same_in_windows_and_blocks(codec, chunk_frames):
    clip, chunked = speech(codec, 40.3), with_chunks(codec, chunk_frames)
    expected = tokens_of(codec, clip)
    assert_same(tokens_of(chunked, clip), expected)
    blocks = list(chunked.encode_blocks(np.array_split(clip, 7)))
    assert_same(np.concatenate(blocks, axis=1), expected)
    heard = audio_of(codec, expected)
    assert_close(audio_of(chunked, expected), heard)
    assert_close(np.concatenate(list(chunked.decode_blocks(np.array_split(expected, 5, axis=1)))), heard)


def test_files_carry_the_spec_and_come_back(codec, tmp_path):
    clip = speech(codec, 20.5)
    soundfile.write(tmp_path / "a.wav", clip, codec.sample_rate, subtype="FLOAT")
    assert codec.encode_file(tmp_path / "a.wav", tmp_path / "a.lfr") == len(clip)
    with TokenReader(tmp_path / "a.lfr") as reader:
        assert {name: getattr(reader.metadata, name) for name in vars(codec.spec)} == vars(codec.spec)
        tokens = reader.read()
    assert_same(tokens, tokens_of(codec, clip))
    assert codec.decode_file(tmp_path / "a.lfr", tmp_path / "b.wav") == len(clip)
    heard, rate = soundfile.read(tmp_path / "b.wav", dtype="float32")
    assert rate == codec.sample_rate
    np.testing.assert_allclose(heard, audio_of(codec, tokens)[: len(clip)], atol=1e-4)  # the file has 16 bits


def test_files_of_another_codec_are_refused(codec, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(5000, np.float32), 22050)
    cached_codec("nano").encode_file(tmp_path / "a.wav", tmp_path / "a.lfr")
    with pytest.raises(TokenFileError, match="made by a codec with"):
        codec.decode_file(tmp_path / "a.lfr", tmp_path / "b.wav")
    assert not (tmp_path / "b.wav").exists()


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda codec: codec.encode(np.full(5000, np.nan, np.float32)), AudioError),
        (lambda codec: codec.encode(np.zeros(5000, np.int64)), AudioError),
        (lambda codec: codec.encode(np.zeros(5000, bool)), AudioError),
        (lambda codec: codec.encode(np.zeros((2, 3, 4), np.float32)), AudioError),
        (lambda codec: codec.encode("audio"), AudioError),
        (lambda codec: codec.encode(np.zeros(50, np.float32), [51]), AudioError),
        (lambda codec: codec.encode(np.zeros(50, np.float32), sample_rate=0), AudioError),
        (lambda codec: codec.decode(np.zeros((codec.num_codebooks, 3), np.float32)), TokensError),
        (lambda codec: codec.decode(np.zeros((codec.num_codebooks + 1, 3), int)), TokensError),
        (lambda codec: codec.decode(np.full((codec.num_codebooks, 3), codec.codebook_size)), TokensError),
        (lambda codec: codec.decode(np.full((codec.num_codebooks, 3), -1)), TokensError),
        (lambda codec: codec.decode(np.zeros((codec.num_codebooks, 3), int), audio_len=[1]), TokensError),
    ],
)
def test_invalid_arguments_raise(codec, call, error):
    with pytest.raises(error):
        call(codec)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda codec: pickle.loads(pickle.dumps(codec))])
def test_copies_compute_the_same(codec, clone):
    clip = speech(codec, 6)
    other = clone(codec)
    assert other.spec == codec.spec
    assert_same(tokens_of(other, clip), tokens_of(codec, clip))


def test_codec_streams_equal_offline_or_raise(codec):
    if not isinstance(codec.backend, StreamingBackend):
        for open_stream in (codec.stream_encoder, codec.stream_decoder):
            with pytest.raises(NemoLfrError, match="does not stream"):
                open_stream()
        return
    clip, stream = speech(codec, 25.4), codec.stream_encoder()
    tokens = np.concatenate([*map(stream.push, np.array_split(clip, 9)), stream.flush()], axis=1)
    assert_same(tokens, tokens_of(codec, clip))
    stream = codec.stream_decoder()
    pieces = [*map(stream.push, np.array_split(tokens, 5, axis=1)), stream.flush(len(clip))]
    assert_close(np.concatenate(pieces), audio_of(codec, tokens)[: len(clip)])


# The registry.


@pytest.mark.parametrize("name", list(MODELS))
def test_load_finds_the_backend_by_the_kind_of_model(tmp_path, name):
    model = MODELS[name](tmp_path)
    expected = type(nemo_lfr.load(model, "cpu", backend=name).backend)
    assert type(nemo_lfr.load(model, "cpu").backend) is expected


def test_models_of_another_kind_are_refused(tmp_path):
    with pytest.raises(NemoLfrError, match=r"'levels' runs a \.levels file, which .*codec\.nemo is not; touch"):
        nemo_lfr.load(write_checkpoint(tmp_path), backend="levels")
    with pytest.raises(NemoLfrError, match=r"a \.levels file; backend 'torch' needs the checkpoint"):
        nemo_lfr.load(write_levels(tmp_path), backend="torch")
    with pytest.raises(NemoLfrError, match="backend 'levels' runs"):
        nemo_lfr.load(backend="levels")


def test_unknown_and_taken_names_are_refused():
    with pytest.raises(NemoLfrError, match="backend 'tensorrt' is unknown; use 'torch', 'onnx' or 'levels'"):
        nemo_lfr.load(backend="tensorrt")
    with pytest.raises(NemoLfrError, match="backend 'torch' is registered already"):
        backends.register("torch", level_backend.open_levels)


def test_a_backend_may_open_checkpoints(tmp_path):
    opened: list[tuple[Path, str | None]] = []

    def open_levels(path, options):
        opened.append((path, options.device))
        return level_backend.LevelBackend(options.name)

    model = write_checkpoint(tmp_path)
    backends.register("of_checkpoints", open_levels)
    try:
        codec = nemo_lfr.load(model, "here", backend="of_checkpoints")
        nemo_lfr.load(backend="of_checkpoints")
    finally:
        backends.unregister("of_checkpoints")
    assert codec.name == str(model)
    assert opened[0] == (model, "here") and opened[1][0].name == "default.nemo"


def test_a_package_registers_a_backend_by_an_entry_point(tmp_path, monkeypatch):
    folder = tmp_path / "plugin-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[nemo_lfr.backends]\nplugged = plugin_of_a_test:OPENER\n")
    (tmp_path / "plugin_of_a_test.py").write_text("from tests.level_backend import OPENER\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = write_levels(tmp_path)
    try:
        assert "plugged" in backends.backend_names()
        assert type(nemo_lfr.load(model, backend="plugged").backend) is level_backend.LevelBackend
    finally:
        backends.unregister("plugged")
        sys.modules.pop("plugin_of_a_test", None)
