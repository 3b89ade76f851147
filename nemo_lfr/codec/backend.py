"""Interfaces of backends. A backend runs the encoder and the decoder of a `Codec` on whole frames.

`Codec` does everything else: it checks arguments, resamples, cuts long recordings into windows, forms batches, and
reads and writes files. The smallest backend is a subclass of `NumpyBackend` with a name, a `CodecSpec`, the limits of
its encoder and decoder, and the methods `encode_frames` and `decode_frames`. Once it is registered with
`nemo_lfr.codec.backends.register`, `nemo_lfr.load(backend=...)` can open it. `nemo_lfr.testing` has the checks that
every backend must pass.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from nemo_lfr.codec.arrays import Array, Arrays, Kind, NumpyArrays
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.frames import Context
from nemo_lfr.spec import CodecSpec

Operation = Literal["encode", "decode"]


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise NemoLfrError(f"{name} is {value!r}; expected a whole number of at least {least}.")


class Limits(Protocol):
    """Context and shortest input of an encoder or decoder. `Codec` uses these limits to plan its windows."""

    @property
    def context(self) -> Context:
        """Numbers of earlier and later frames that the result for a frame depends on."""

    @property
    def min_frames(self) -> int:
        """Shortest valid input, in frames; `Codec` zero-pads shorter input."""


@dataclass(frozen=True)
class ModuleLimits:
    """Implementation of `Limits` as a data class, for backends whose networks are not PyTorch modules.

    Attributes:
        context: numbers of earlier and later frames that the result for a frame depends on.
        min_frames: shortest valid input, in frames.

    Raises:
        NemoLfrError: if a number of frames is not a whole number or is too small.
    """

    context: Context
    min_frames: int

    def __post_init__(self) -> None:
        past, future = getattr(self.context, "past", None), getattr(self.context, "future", None)
        _check_count("ModuleLimits: context.past", past, 0)
        _check_count("ModuleLimits: context.future", future, 0)
        _check_count("ModuleLimits: min_frames", self.min_frames, 1)


@dataclass(frozen=True)
class Batching:
    """Window and batch sizes that are fast on a device. They do not change results.

    Attributes:
        chunk_frames: frames in one window of a long recording, without the context of the window. The default suits a
            CPU, whose cache is too small for longer windows.
        batch_frames: maximum number of frames, including padding, in a batch of several windows.
        pad_multiple: windows are padded to a multiple of this many frames, so that few different shapes occur.
        mix_widths: whether windows of similar widths share a batch. If false, all windows of a batch have the same
            width.

    Raises:
        NemoLfrError: if a number of frames is not a whole number of at least 1.
    """

    chunk_frames: int = 132
    batch_frames: int = 160
    pad_multiple: int = 1
    mix_widths: bool = False

    def __post_init__(self) -> None:
        for key in ("chunk_frames", "batch_frames", "pad_multiple"):
            _check_count(f"Batching: {key}", getattr(self, key), 1)


def check_backend(backend: Any) -> None:
    """Check that a backend is an object, not a class, and has a `CodecSpec` and a `Batching`.

    Raises:
        NemoLfrError: if the backend is a class, or if its `spec` or `batching` is missing or has the wrong type.
    """
    if isinstance(backend, type):
        raise NemoLfrError(
            f"the backend is the class {backend.__name__}; pass an object, such as {backend.__name__}()."
        )
    for key, kind in (("spec", CodecSpec), ("batching", Batching)):
        value = getattr(backend, key, None)
        if not isinstance(value, kind):
            raise NemoLfrError(
                f"{type(backend).__name__} is not a backend: its attribute `{key}` is {value!r}; expected a "
                f"{kind.__name__} object."
            )


def check_result(backend: Any, operation: Operation, result: Any, inputs: Any, num_frames: Sequence[int]) -> None:
    """Check the type and shape of the result of a backend's `encode_frames` or `decode_frames`.

    Args:
        backend: the backend.
        operation: "encode" or "decode".
        result: value that the method returned.
        inputs: array that the method received.
        num_frames: valid frames in each example.

    Raises:
        NemoLfrError: if the result has another type, shape or dtype than `Backend` specifies.
    """
    spec, kinds = backend.spec, {"encode": "integers", "decode": "floating-point numbers"}
    expected: list[int] = [len(inputs), max(num_frames) * spec.samples_per_frame]
    if operation == "encode":
        expected = [len(inputs), spec.num_codebooks, max(num_frames)]
    found = f"an object of type {type(result).__name__}"
    if isinstance(result, type(inputs)) or isinstance(inputs, type(result)):
        shape, kind = list(result.shape), backend.arrays.kind(result)
        is_right_kind = kind.is_integer if operation == "encode" else kind is Kind.FLOAT
        if is_right_kind and len(shape) == len(expected) and shape[:-1] == expected[:-1] and shape[-1] >= expected[-1]:
            return
        found = f"an array of the shape {shape} and the dtype {result.dtype}"
    raise NemoLfrError(
        f"{type(backend).__name__}.{operation}_frames returned {found}; expected {kinds[operation]} of the shape "
        f"{expected}."
    )


class Backend(Protocol[Array]):
    """Interface of a backend: an encoder and a decoder that run on one device and use one array library.

    The results of an example must not depend on the other examples in the batch, or on the padding after the example.
    """

    @property
    def name(self) -> str:
        """Name of the codec for messages: usually the path or Hub name of its checkpoint."""

    @property
    def spec(self) -> CodecSpec:
        """Description of the tokens. Its field `fingerprint` may be empty; see the method `fingerprints`."""

    @property
    def encoder(self) -> Limits:
        """The encoder itself, or an object with only its `context` and `min_frames`."""

    @property
    def decoder(self) -> Limits:
        """The decoder itself, or an object with only its `context` and `min_frames`."""

    @property
    def arrays(self) -> Arrays[Array]:
        """Array operations for arguments and results."""

    @property
    def batching(self) -> Batching:
        """Window and batch sizes that suit the device."""

    @property
    def device(self) -> object:
        """Device of the encoder and decoder; `str(device)` is shown to users."""

    def encode_frames(self, audio: Array, num_frames: list[int]) -> Array:
        """Encode whole frames.

        Args:
            audio: float32, [B, T * samples_per_frame] with T >= `encoder.min_frames`; zero after each example's end.
            num_frames: valid frames in each example, from 1 to T.

        Returns:
            Tokens [B, C, T] as integers. Where the encoder's output is NaN or infinite, the token is outside the
            codebook, for example -1. Tokens after the end of an example are ignored.
        """

    def decode_frames(self, tokens: Array, num_frames: list[int]) -> Array:
        """Decode whole frames.

        Args:
            tokens: int64, [B, C, T] with T >= `decoder.min_frames`, in [0, codebook_size).
            num_frames: valid frames in each example, from 1 to T.

        Returns:
            Audio [B, T * samples_per_frame] as float32. Where the decoder's output is NaN or infinite, the sample is
            NaN. Samples after the end of an example are ignored.
        """

    def fingerprints(self) -> Iterable[str]:
        """Return the fingerprints of the weights and settings, the current one first.

        A codec has several fingerprints if older versions of this package computed its fingerprint differently. The
        first one is written to new token files. Token files with any of these fingerprints are accepted.
        """

    def load(self, operation: Operation) -> None:
        """Load the weights of the encoder ("encode") or the decoder ("decode"), if they are not loaded yet."""

    def computing(self) -> AbstractContextManager[None]:
        """Return a context manager that keeps the caller's settings, such as autocast, from affecting the networks."""


class NumpyBackend:
    """Base class for backends with numpy arrays, with default implementations of the optional methods."""

    arrays: Arrays[np.ndarray] = NumpyArrays()
    batching = Batching()
    device: object = "cpu"

    def fingerprints(self) -> tuple[str, ...]:
        """Return an empty tuple. Without a fingerprint, a codec accepts the token files of every codec."""
        return ()

    def load(self, operation: Operation) -> None:
        """Do nothing: the weights are already loaded."""

    def computing(self) -> AbstractContextManager[None]:
        """Return a context manager that does nothing: numpy has no settings that change results."""
        return nullcontext()


class Stream(Protocol):
    """Properties that streaming encoders and decoders share."""

    @property
    def delay_frames(self) -> int:
        """Number of later frames that must arrive before the result of a frame is returned."""

    @property
    def exact(self) -> bool:
        """Whether the stream gives the same results as encoding or decoding the whole recording at once."""

    @property
    def latency_ms(self) -> float:
        """Milliseconds from the last sample of a frame to the result for this frame, excluding processing time."""


class EncoderStream(Stream, Protocol):
    """Streaming encoder for one recording: it takes samples and returns tokens."""

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Add samples [n], and return the tokens [C, k] for which enough later samples have arrived; k may be 0."""

    def flush(self) -> np.ndarray:
        """End the recording and return the remaining tokens, int32, shape [C, k]."""


class DecoderStream(Stream, Protocol):
    """Streaming decoder for one recording: it takes tokens and returns samples."""

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Add tokens [C, k], and return the samples [n] for which enough later tokens have arrived; n may be 0."""

    def flush(self, num_samples: int | None = None) -> np.ndarray:
        """End the recording and return the remaining samples [n].

        Args:
            num_samples: length of the whole recording in samples, including the samples that `push` has returned;
                None to return whole frames.
        """


@runtime_checkable
class LatentBackend(Protocol[Array]):
    """Additional methods of a backend that can return the values before and after FSQ."""

    def encode_latents(self, audio: Array, num_frames: list[int]) -> Array:
        """Encode whole frames, and return the values before FSQ, [B, D, T] as float32.

        For the arguments see `Backend.encode_frames`.
        """

    def quantize_latents(self, encoded: Array, num_frames: list[int]) -> Array:
        """Quantize vectors [B, D, T] to codes [B, D, T], which are zero after the end of each example."""


@runtime_checkable
class StreamingBackend(Protocol):
    """Additional methods of a backend that can stream."""

    def stream_encoder(self, codec: Any, lookahead: int | None) -> EncoderStream:
        """Return a streaming encoder for `codec`; see `Codec.stream_encoder`."""

    def stream_decoder(self, codec: Any, lookahead: int | None, first_lookahead: int | None = None) -> DecoderStream:
        """Return a streaming decoder for `codec`; see `Codec.stream_decoder`."""
