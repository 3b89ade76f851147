"""Checks that every backend must pass. A check that fails raises AssertionError."""

import copy
import dataclasses
import functools
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from nemo_lfr import frames
from nemo_lfr.codec.arrays import to_numpy
from nemo_lfr.codec.backend import StreamingBackend
from nemo_lfr.codec.codec import Codec
from nemo_lfr.errors import AudioError, NemoLfrError, TokenFileError, TokensError
from nemo_lfr.io.token_file import Metadata, TokenReader, TokenWriter
from nemo_lfr.testing.codecs import SAMPLE_RATE, synthesize


def assert_tokens_equal(actual: np.ndarray, expected: np.ndarray, max_ties: float = 1e-3) -> None:
    """Assert that tokens are equal except for rounding ties.

    Args:
        actual: tokens of any shape.
        expected: tokens of the same shape.
        max_ties: maximum fraction of tokens that may differ. Every difference counts as a rounding tie: a value so
            close to the edge between two FSQ levels that its token depends on the order of fp32 additions.

    Raises:
        AssertionError: if the shapes differ, or if more than `max_ties` of the tokens differ.
    """
    _require(actual.shape == expected.shape, f"tokens have shape {actual.shape}, not {expected.shape}")
    if actual.size and (actual != expected).mean() > max_ties:
        np.testing.assert_array_equal(actual, expected)


def assert_audio_close(actual: np.ndarray, expected: np.ndarray, atol: float = 1e-5) -> None:
    """Assert that waveforms are equal up to fp32 rounding.

    Args:
        actual: audio of any shape.
        expected: audio of the same shape.
        atol: maximum absolute difference of a sample.

    Raises:
        AssertionError: if the shapes differ, or a sample differs by more than `atol`.
    """
    _require(actual.shape == expected.shape, f"audio has shape {actual.shape}, not {expected.shape}")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def _require(condition: bool, message: str) -> None:
    """Raise an AssertionError if a condition is false, even under `python -O`."""
    if not condition:
        raise AssertionError(message)


def _speech(codec: Codec[Any], num_frames: float, seed: int = 0) -> np.ndarray:
    """Return synthetic speech [T_audio] with a duration of `num_frames` codec frames."""
    num_samples = round(num_frames * codec.samples_per_frame)
    return synthesize(num_samples / SAMPLE_RATE + 0.01, seed)[:num_samples]


def _tokens(codec: Codec[Any], clip: np.ndarray) -> np.ndarray:
    tokens: np.ndarray = to_numpy(codec.encode(clip, sample_rate=codec.sample_rate)[0])[0]  # [C, T]
    return tokens


def _audio(codec: Codec[Any], tokens: np.ndarray) -> np.ndarray:
    audio: np.ndarray = to_numpy(codec.decode(tokens)[0])[0]  # [T_audio]
    return audio


def check_spec(codec: Codec[Any]) -> None:
    """Check that `Codec.spec` is valid, and that the codec accepts tokens with its own fingerprint.

    A codec that has a fingerprint must also refuse tokens with the fingerprint of another codec. The codec's `repr`
    must contain its name.
    """
    spec = codec.spec
    spec.validate()
    _require(codec.fingerprint == spec.fingerprint, "Codec.fingerprint differs from the fingerprint of its spec")
    _require(codec.made(spec.fingerprint), "the codec does not accept its own fingerprint")
    if spec.fingerprint:
        _require(not codec.made("f" * 16), "the codec accepts the fingerprint of another codec")
    _require(codec.name in repr(codec), f"the repr {codec!r} does not contain the model's name {codec.name!r}")


def check_lengths(codec: Codec[Any]) -> None:
    """Check shapes, types and ranges of results for clips of several lengths.

    The lengths are 0, 1, n - 1, n and n + 1 samples, where n is the number of samples in 7 frames.
    """
    for length in (0, 1, *(7 * codec.samples_per_frame + extra for extra in (-1, 0, 1))):
        clip = synthesize(length / SAMPLE_RATE)[:length]
        tokens, tokens_len = codec.encode(clip, sample_rate=codec.sample_rate)
        num_frames = frames.num_frames(length, codec.samples_per_frame)
        shape = (1, codec.num_codebooks, num_frames)
        _require(
            tuple(tokens.shape) == shape, f"{length} samples: tokens have shape {tuple(tokens.shape)}, not {shape}"
        )
        _require(
            tokens_len.tolist() == [num_frames], f"{length} samples: tokens_len is {tokens_len}, not [{num_frames}]"
        )
        ids = to_numpy(tokens)
        _require(ids.dtype == np.int32, f"tokens have dtype {ids.dtype}, not int32")
        _require(not ids.size or 0 <= ids.min() <= ids.max() < codec.codebook_size, "a token is outside the codebook")
        audio, audio_len = codec.decode(tokens, tokens_len, [length])
        samples = to_numpy(audio)
        _require(samples.shape == (1, length), f"{length} samples: audio has shape {samples.shape}, not (1, {length})")
        _require(audio_len.tolist() == [length], f"{length} samples: audio_len is {audio_len}, not [{length}]")
        _require(samples.dtype == np.float32, f"audio has dtype {samples.dtype}, not float32")
        _require(not samples.size or abs(samples).max() <= 1, "audio is not in [-1, 1]")


def check_batches(codec: Codec[Any]) -> None:
    """Check that clips in a batch do not affect each other.

    The samples after the end of a clip must not affect the result of the clip either.
    """
    # A backend may batch windows of similar lengths, such as 20.5 to 23 frames.
    clips = [_speech(codec, num_frames, seed) for seed, num_frames in enumerate((9.5, 23, 1, 22.6, 21.2, 20.5))]
    batch = np.full((len(clips), max(map(len, clips))), 0.7, np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    tokens, tokens_len = codec.encode(batch, [len(clip) for clip in clips], codec.sample_rate)
    ids = to_numpy(tokens).copy()
    counts = tokens_len.tolist()
    for clip, row, count in zip(clips, ids, counts, strict=True):
        assert_tokens_equal(row[:, :count], _tokens(codec, clip))
        _require(not row[:, count:].any(), "tokens after the end of a clip are not 0")
        row[:, count:] = codec.codebook_size - 1
    audio, audio_len = codec.decode(ids, tokens_len)
    for row, length, tokens_row, count in zip(to_numpy(audio), audio_len.tolist(), ids, counts, strict=True):
        assert_audio_close(row[:length], _audio(codec, tokens_row[:, :count]))
        _require(not row[length:].any(), "audio after the end of a clip is not 0")


def check_windows(codec: Codec[Any]) -> None:
    """Check that processing a recording in windows or blocks gives the same results as processing it at once."""
    clip = _speech(codec, 40.3)
    tokens = _tokens(codec, clip)
    audio = _audio(codec, tokens)
    for chunk_frames in (3, 11):
        chunked = Codec(codec.backend, chunk_frames=chunk_frames)
        assert_tokens_equal(_tokens(chunked, clip), tokens)
        assert_tokens_equal(np.concatenate(list(chunked.encode_blocks(np.array_split(clip, 7))), axis=1), tokens)
        assert_audio_close(_audio(chunked, tokens), audio)
        blocks = np.array_split(tokens, 5, axis=1)
        assert_audio_close(np.concatenate(list(chunked.decode_blocks(blocks))), audio)


def check_files(codec: Codec[Any]) -> None:
    """Check that a token file stores the spec of its codec, and that the codec refuses the file of another codec."""
    clip = _speech(codec, 20.5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        soundfile.write(folder / "a.wav", clip, codec.sample_rate, subtype="FLOAT")
        codec.encode_file(folder / "a.wav", folder / "a.lfr")
        with TokenReader(folder / "a.lfr") as reader:
            stored, tokens = reader.metadata, reader.read()
        _require(stored == Metadata.of(codec), f"the file stores the spec {stored}, not {codec.spec}")
        assert_tokens_equal(tokens, _tokens(codec, clip))
        codec.decode_file(folder / "a.lfr", folder / "b.wav")
        audio, sample_rate = soundfile.read(folder / "b.wav", dtype="float32")
        _require(sample_rate == codec.sample_rate, f"decode_file wrote {sample_rate} Hz, not {codec.sample_rate} Hz")
        assert_audio_close(audio, _audio(codec, tokens)[: len(clip)], atol=1e-4)  # the file has 16-bit samples
        other = dataclasses.replace(Metadata.of(codec), num_codebooks=codec.num_codebooks + 1)
        with TokenWriter(folder / "other.lfr", other) as writer:
            writer.write(np.zeros((other.num_codebooks, 3), np.int32))
            writer.finish(3 * codec.samples_per_frame)
        _check_raises(TokenFileError, lambda: codec.decode_file(folder / "other.lfr", folder / "c.wav"), "other codec")
        _require(not (folder / "c.wav").exists(), "decode_file refused a token file but left an audio file")


def check_invalid_arguments(codec: Codec[Any]) -> None:
    """Check that invalid audio raises AudioError and invalid tokens raise TokensError."""
    count = codec.num_codebooks
    audio: dict[str, tuple[Any, ...]] = {
        "audio of NaN": (np.full(5000, np.nan, np.float32),),
        "audio of int64": (np.zeros(5000, np.int64),),
        "audio of bool": (np.zeros(5000, bool),),
        "audio of three dimensions": (np.zeros((2, 3, 4), np.float32),),
        "a string": ("audio",),
        "an empty list of clips": ([],),
        "an array of no clips": (np.zeros((0, 50), np.float32),),
        "audio_len greater than the audio": (np.zeros(50, np.float32), [51]),
        "a sample rate of 0": (np.zeros(50, np.float32), None, 0),
    }
    tokens: dict[str, tuple[Any, ...]] = {
        "tokens of float32": (np.zeros((count, 3), np.float32),),
        "one codebook too many": (np.zeros((count + 1, 3), int),),
        "a token equal to codebook_size": (np.full((count, 3), codec.codebook_size),),
        "a token equal to -1": (np.full((count, 3), -1),),
        "an empty list of utterances": ([],),
        "an array of no utterances": (np.zeros((0, count, 3), int),),
        "audio_len for fewer frames than the tokens have": (np.zeros((count, 3), int), None, [1]),
    }
    for case, arguments in audio.items():
        _check_raises(AudioError, functools.partial(codec.encode, *arguments), case)
    for case, arguments in tokens.items():
        _check_raises(TokensError, functools.partial(codec.decode, *arguments), case)


def _check_raises(error: type[Exception], call: Callable[[], object], case: str) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"{case}: no {error.__name__} was raised")


def check_copies(codec: Codec[Any]) -> None:
    """Check that copied and unpickled codecs have the spec of the original, and give the same tokens."""
    clip = _speech(codec, 6)
    for other in (copy.copy(codec), copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
        _require(other.spec == codec.spec, f"a copy has the spec {other.spec}, not {codec.spec}")
        assert_tokens_equal(_tokens(other, clip), _tokens(codec, clip))


def check_streams(codec: Codec[Any]) -> None:
    """Check that streaming a recording gives the same results as processing it at once.

    If the backend does not support streaming, check that opening a stream raises NemoLfrError.
    """
    if not isinstance(codec.backend, StreamingBackend):
        for open_stream in (codec.stream_encoder, codec.stream_decoder):
            _check_raises(NemoLfrError, open_stream, "a backend without streams")
        return
    clip, encoder, decoder = _speech(codec, 25.4), codec.stream_encoder(), codec.stream_decoder()
    tokens = np.concatenate([*map(encoder.push, np.array_split(clip, 9)), encoder.flush()], axis=1)
    assert_tokens_equal(tokens, _tokens(codec, clip))
    pieces = [*map(decoder.push, np.array_split(tokens, 5, axis=1)), decoder.flush(len(clip))]
    assert_audio_close(np.concatenate(pieces), _audio(codec, tokens)[: len(clip)])


BACKEND_CHECKS: tuple[Callable[[Codec[Any]], None], ...] = (
    check_spec,
    check_lengths,
    check_batches,
    check_windows,
    check_files,
    check_invalid_arguments,
    check_copies,
    check_streams,
)
