"""Tests of `nemo_lfr.testing`: its codecs, its comparisons, and that each check of backends finds a fault."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import nemo_lfr
from nemo_lfr import Codec, testing
from nemo_lfr.codec.backend import Batching, ModuleLimits
from nemo_lfr.frames import Context
from tests.level_backend import LevelBackend


class InvalidSpec(LevelBackend):
    spec = replace(LevelBackend.spec, sample_rate=0)


class TokensOfTheBatch(LevelBackend):
    def encode_frames(self, audio: np.ndarray, num_frames: list[int]) -> np.ndarray:
        return super().encode_frames(audio, num_frames) ^ (len(audio) > 1)


class TokensOutsideTheCodebook(LevelBackend):
    def encode_frames(self, audio: np.ndarray, num_frames: list[int]) -> np.ndarray:
        return super().encode_frames(audio, num_frames) + self.spec.codebook_size


class AudioOfThePadding(LevelBackend):
    batching = Batching(mix_widths=True)

    def decode_frames(self, tokens: np.ndarray, num_frames: list[int]) -> np.ndarray:
        return super().decode_frames(tokens, [tokens.shape[2]] * len(tokens)) * tokens.shape[2] / 100


class TooLittleContext(LevelBackend):
    decoder = ModuleLimits(Context(past=0, future=0), min_frames=1)


class TokensOfThePreviousCall(LevelBackend):
    calls = 0

    def encode_frames(self, audio: np.ndarray, num_frames: list[int]) -> np.ndarray:
        self.calls += 1
        return (super().encode_frames(audio, num_frames) + self.calls) % self.spec.codebook_size


class NotPicklable(LevelBackend):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.function = lambda: None


class BrokenStreams(LevelBackend):
    def stream_encoder(self, codec: Any, lookahead: int | None) -> Any:
        return self

    stream_decoder = stream_encoder

    def push(self, samples: np.ndarray) -> np.ndarray:
        return np.zeros((2, 1), np.int32)

    def flush(self) -> np.ndarray:
        return np.zeros((2, 1), np.int32)


@pytest.mark.parametrize(
    ("backend", "check"),
    [
        (InvalidSpec, testing.check_spec),
        (TokensOutsideTheCodebook, testing.check_lengths),
        (TokensOfTheBatch, testing.check_batches),
        (AudioOfThePadding, testing.check_batches),
        (TooLittleContext, testing.check_windows),
        (TokensOfThePreviousCall, testing.check_files),
        (NotPicklable, testing.check_copies),
        (BrokenStreams, testing.check_streams),
    ],
)
def test_checks_find_faults(backend: type[LevelBackend], check: Callable[[Codec], None]) -> None:
    check(Codec(LevelBackend("sound")))
    with pytest.raises((AssertionError, ValueError, AttributeError)):
        check(Codec(backend("faulty")))


def test_invalid_arguments_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(LevelBackend("careless"))
    monkeypatch.setattr(Codec, "encode", lambda self, *arguments: None)
    with pytest.raises(AssertionError, match="audio of NaN: no AudioError was raised"):
        testing.check_invalid_arguments(codec)


def test_every_check_runs_by_default() -> None:
    checks = {value for name, value in vars(testing).items() if name.startswith("check_")}
    assert set(testing.BACKEND_CHECKS) == checks


def test_comparisons_report_shapes_and_values() -> None:
    zeros = np.zeros((2, 5), np.int32)
    testing.assert_tokens_equal(zeros, zeros.copy())
    for other in (zeros[:, :4], zeros + 1):
        with pytest.raises(AssertionError):
            testing.assert_tokens_equal(zeros, other)
        with pytest.raises(AssertionError):
            testing.assert_audio_close(zeros, other)
    many = np.zeros(2000, np.int32)
    testing.assert_tokens_equal(many, np.where(np.arange(2000) == 7, 1, many))


@pytest.mark.slow
def test_a_written_checkpoint_opens_as_the_built_codec(tmp_path) -> None:
    built = testing.build_codec(seed=3)
    opened = nemo_lfr.load(testing.write_checkpoint(tmp_path / "a.nemo", seed=3), "cpu")
    assert built.samples_per_frame == opened.samples_per_frame == 15
    clip = testing.synthesize(0.1)
    np.testing.assert_array_equal(built.encode(clip)[0], opened.encode(clip)[0])
    assert testing.build_codec(testing.codec_config(), seed=4).samples_per_frame == 1024


def test_neither_pytest_nor_nemo_is_imported() -> None:
    code = "import sys, nemo_lfr.testing; sys.exit(len({'pytest', 'nemo', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


# name -> (call, message)
INVALID_BACKENDS: dict[str, tuple[Callable[[], object], str]] = {
    "a class": (lambda: Codec(LevelBackend), r"the class LevelBackend; pass an object, such as LevelBackend\(\)"),
    "None": (lambda: Codec(None), "NoneType is not a backend"),
    "no spec": (lambda: Codec(changed(spec=None)), "attribute `spec` is None; expected a CodecSpec object"),
    "other batching": (lambda: Codec(changed(batching=8)), "`batching` is 8; expected a Batching object"),
    "batches of nothing": (lambda: Batching(batch_frames=0), "Batching: batch_frames is 0; expected a whole number"),
    "endless windows": (lambda: Batching(chunk_frames=0), "Batching: chunk_frames is 0; expected a whole number"),
    "context": (lambda: ModuleLimits(Context(-1, 0), 1), r"context.past is -1; expected a whole number of at least 0"),
    "fraction": (lambda: ModuleLimits(Context(0, 0.5), 1), "context.future is 0.5; expected a whole number"),
    "no context": (lambda: ModuleLimits(None, 1), "context.past is None"),
    "no frames": (lambda: ModuleLimits(Context(0, 0), 0), "min_frames is 0; expected a whole number of at least 1"),
}


def changed(**attributes: object) -> LevelBackend:
    """Return a backend with other attributes."""
    return type("Changed", (LevelBackend,), attributes)("x")


@pytest.mark.parametrize("kind", INVALID_BACKENDS)
def test_an_invalid_backend_is_refused_in_one_line(kind):
    call, message = INVALID_BACKENDS[kind]
    with pytest.raises(nemo_lfr.NemoLfrError, match=message):
        call()


# name -> (method, change of its result, message)
INVALID_RESULTS: dict[str, tuple[str, Callable[[np.ndarray], object], str]] = {
    "no tokens": ("encode", lambda tokens: None, "encode_frames returned an object of type NoneType; expected"),
    "a list": ("encode", lambda tokens: tokens.tolist(), "encode_frames returned an object of type list"),
    "fractions": ("encode", lambda tokens: tokens + 0.5, "the dtype float64; expected integers"),
    "truth values": ("encode", lambda tokens: tokens > 0, "the dtype bool; expected integers"),
    "a frame less": (
        "encode",
        lambda tokens: tokens[..., :-1],
        r"array of the shape \[.*; expected integers of the shape",
    ),
    "no codebooks": ("encode", lambda tokens: tokens[:, 0], "array of the shape"),
    "two examples": ("encode", lambda tokens: np.concatenate([tokens, tokens]), "array of the shape"),
    "int16 audio": ("decode", lambda audio: (audio * 9).astype(np.int16), "the dtype int16; expected floating-point"),
    "complex audio": ("decode", lambda audio: audio.astype(np.complex64), "the dtype complex64"),
    "channels": ("decode", lambda audio: audio[:, None], "array of the shape"),
    "short audio": ("decode", lambda audio: audio[:, :-1], "array of the shape"),
}


@pytest.mark.parametrize("kind", INVALID_RESULTS)
def test_an_invalid_result_of_a_backend_is_refused_in_one_line(kind):
    operation, change, message = INVALID_RESULTS[kind]
    method = getattr(LevelBackend, f"{operation}_frames")
    codec = Codec(changed(**{f"{operation}_frames": lambda self, *arguments: change(method(self, *arguments))}))
    tokens = np.zeros((1, codec.num_codebooks, 5), int)
    calls = {
        "encode": [
            lambda: codec.encode(np.zeros(500)),
            lambda: list(codec.encode_blocks([np.zeros(500, np.float32)])),
        ],
        "decode": [lambda: codec.decode(tokens), lambda: list(codec.decode_blocks([tokens[0]]))],
    }
    for call in calls[operation]:
        with pytest.raises(nemo_lfr.NemoLfrError, match=message):
            call()
