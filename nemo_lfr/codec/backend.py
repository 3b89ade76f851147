"""Backends: the protocol that encodes and decodes whole frames for a `Codec`.

`Codec` does everything else: argument checks, resampling, windows of long recordings, batches, files. The smallest
backend is a subclass of `NumpyBackend` with a name, a `CodecSpec`, the limits of its two networks and two methods; one
call of `nemo_lfr.codec.backends.register` lets `nemo_lfr.load(backend=...)` open it. `nemo_lfr.testing` has the checks
that every backend must pass.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from nemo_lfr.codec.arrays import Array, Arrays, NumpyArrays
from nemo_lfr.frames import Context
from nemo_lfr.spec import CodecSpec

Direction = Literal["encode", "decode"]


class Limits(Protocol):
    """Limits of an encoder or decoder, which determine the windows of a recording."""

    @property
    def context(self) -> Context:
        """Frames on each side that a frame depends on."""

    @property
    def min_frames(self) -> int:
        """Shortest valid input, in frames; shorter input is zero-padded."""


@dataclass(frozen=True)
class ModuleLimits:
    """Limits of an encoder or decoder, as plain values."""

    context: Context
    min_frames: int


@dataclass(frozen=True)
class Batching:
    """Window and batch sizes for a device. Results do not depend on them.

    Attributes:
        chunk_frames: frames of one window of a long recording, without its context. On a CPU long windows do not
            fit the cache. With context, those of the released config are 144 frames to encode and 158 to decode.
        batch_frames: frames of one batch of windows.
        pad_multiple: window widths are padded to a multiple of this many frames, so that few shapes occur.
        mix_widths: windows of similar widths share a batch, rather than only those of one width.
    """

    chunk_frames: int = 132
    batch_frames: int = 160
    pad_multiple: int = 1
    mix_widths: bool = False


class Backend(Protocol[Array]):
    """Encoder and decoder of whole frames, with one array library on one device.

    Results must not depend on what else is in a batch, nor on the padding of an example.
    """

    @property
    def name(self) -> str:
        """Source of the weights, for messages."""

    @property
    def spec(self) -> CodecSpec:
        """Description of the tokens. The fingerprint may be empty here; see `fingerprints`."""

    @property
    def encoder(self) -> Limits:
        """Limits of the encoder, or the encoder itself."""

    @property
    def decoder(self) -> Limits:
        """Limits of the decoder, or the decoder itself."""

    @property
    def arrays(self) -> Arrays[Array]:
        """Array library of arguments and results."""

    @property
    def batching(self) -> Batching:
        """Window and batch sizes that suit the device."""

    @property
    def device(self) -> object:
        """Device of the network; `str(device)` is shown to users."""

    def encode_frames(self, audio: Array, num_frames: list[int]) -> Array:
        """Encode whole frames.

        Args:
            audio: float32, [B, T * samples_per_frame] with T >= `encoder.min_frames`; zero after each example's end.
            num_frames: frames of each example, from 1 to T.

        Returns:
            Tokens [B, C, T] as integers; a token outside the codebook marks a frame that is not finite. Tokens after
            an example's `num_frames` are ignored.
        """

    def decode_frames(self, tokens: Array, num_frames: list[int]) -> Array:
        """Decode whole frames.

        Args:
            tokens: int64, [B, C, T] with T >= `decoder.min_frames`, in [0, codebook_size).
            num_frames: frames of each example, from 1 to T.

        Returns:
            Audio [B, T * samples_per_frame] as float32, NaN where it is not finite. Samples after an example's
            `num_frames` are ignored.
        """

    def fingerprints(self) -> Iterable[str]:
        """Return fingerprints of weights and settings.

        The first is written to files. Tokens with any of them are accepted.
        """

    def load(self, direction: Direction) -> None:
        """Load the weights of one direction, if they are not loaded yet."""

    def computing(self) -> AbstractContextManager[None]:
        """Return a context that isolates the computation from the caller's settings (autocast, ...)."""


class NumpyBackend:
    """Base class of backends with numpy arrays, with defaults for the optional methods."""

    arrays: Arrays[np.ndarray] = NumpyArrays()
    batching = Batching()
    device: object = "cpu"

    def fingerprints(self) -> tuple[str, ...]:
        """Return no fingerprint, so that tokens are not compared with the codec."""
        return ()

    def load(self, direction: Direction) -> None:
        """Do nothing: the weights are loaded."""

    def computing(self) -> AbstractContextManager[None]:
        """Return an empty context: numpy has no settings that change results."""
        return nullcontext()


class Stream(Protocol):
    """Properties of streams in both directions."""

    @property
    def delay_frames(self) -> int:
        """Frames of lookahead that a result waits for."""

    @property
    def exact(self) -> bool:
        """Whether results equal those of the whole recording."""

    @property
    def latency_ms(self) -> float:
        """Milliseconds from a frame's last sample to its result, excluding the computation."""


class EncoderStream(Stream, Protocol):
    """Stream of samples of one recording in, tokens out."""

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Push samples [n]; return the tokens [C, k] whose lookahead is complete."""

    def flush(self) -> np.ndarray:
        """End the recording and return the remaining tokens, int32, shape [C, k]."""


class DecoderStream(Stream, Protocol):
    """Stream of tokens of one recording in, samples out."""

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Push tokens [C, k]; return the samples [n] whose lookahead is complete."""

    def flush(self, num_samples: int | None = None) -> np.ndarray:
        """End the recording; return the remaining samples [n], up to `num_samples` of the whole recording."""


@runtime_checkable
class LatentBackend(Protocol[Array]):
    """Additional methods of a backend that can return the vectors before and after FSQ."""

    def encode_latents(self, audio: Array, num_frames: list[int]) -> Array:
        """Encode whole frames to vectors before FSQ, [B, D, T] as float32; arguments as in `Backend.encode_frames`."""

    def quantize_latents(self, encoded: Array, num_frames: list[int]) -> Array:
        """Apply FSQ to vectors [B, D, T]; the result is zero after each example's `num_frames`."""


@runtime_checkable
class StreamingBackend(Protocol):
    """Additional methods of a backend that can stream."""

    def stream_encoder(self, codec: Any, lookahead: int | None) -> EncoderStream:
        """Return a stream; see `Codec.stream_encoder`."""

    def stream_decoder(self, codec: Any, lookahead: int | None) -> DecoderStream:
        """Return a stream; see `Codec.stream_decoder`."""
