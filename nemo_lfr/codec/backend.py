"""What a backend is: something that encodes and decodes whole frames, and says what its tokens are.

`Codec` does everything else: argument checks, resampling, windows of long recordings, batches, files. The smallest
backend is a subclass of `NumpyBackend` with a name, a `CodecSpec`, the limits of its two networks and two methods; one
call of `nemo_lfr.codec.backends.register` lets `nemo_lfr.load(backend=...)` open it. `tests/codec/test_backends.py`
has such a backend, and the contract that every backend must keep.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from nemo_lfr.codec.arrays import Array, Arrays, NumpyArrays
from nemo_lfr.frames import Context
from nemo_lfr.spec import CodecSpec

Direction = Literal["encode", "decode"]


class Limits(Protocol):
    """An encoder or decoder, as far as cutting recordings into windows needs to know it."""

    @property
    def context(self) -> Context:
        """Frames on each side of a frame that its result depends on."""

    @property
    def min_frames(self) -> int:
        """Fewest frames that can be computed; shorter input is completed with silence."""


@dataclass(frozen=True)
class ModuleLimits:
    """Limits of an encoder or decoder, as plain values."""

    context: Context
    min_frames: int


@dataclass(frozen=True)
class Batching:
    """How recordings are cut and stacked for a device. Results do not depend on it.

    Attributes:
        chunk_frames: frames of one window of a long recording, without its context. On a CPU long windows leave the
            cache; with their context those of the released config are 144 frames wide to encode and 158 to decode.
        batch_frames: frames of one batch of windows.
        pad_multiple: windows are computed in memory of a multiple of so many frames, so that few shapes occur.
        mix_widths: windows of similar widths share a batch, rather than only those of one width.
    """

    chunk_frames: int = 132
    batch_frames: int = 160
    pad_multiple: int = 1
    mix_widths: bool = False


class Backend(Protocol[Array]):
    """Encodes and decodes whole frames with one array library, on one device.

    Results must not depend on what else is in a batch, nor on the padding of an example.
    """

    @property
    def name(self) -> str:
        """Where the weights came from, for messages."""

    @property
    def spec(self) -> CodecSpec:
        """What the tokens are. Cheap: the fingerprint may be empty here, `fingerprints` is asked for it."""

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
        """What suits the device."""

    @property
    def device(self) -> object:
        """Where the network runs; `str` of it is shown to users."""

    def encode_frames(self, audio: Array, num_frames: list[int]) -> Array:
        """Encode whole frames.

        Args:
            audio: float32, [B, T * samples_per_frame] with T >= `encoder.min_frames`; silent after each example's end.
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

    def fingerprints(self) -> tuple[str, ...]:
        """Identify the weights and settings: the first is written to files, tokens with any of them are accepted."""

    def load(self, direction: Direction) -> None:
        """Read the weights of one direction now, if they have not been read yet."""

    def computing(self) -> AbstractContextManager[None]:
        """Return a context that keeps the caller's settings (autocast, default device ...) from the computation."""


class NumpyBackend:
    """Base class of backends that take numpy arrays on a CPU: everything that `Backend` can leave at a default."""

    arrays: Arrays[np.ndarray] = NumpyArrays()
    batching = Batching()
    device: object = "cpu"

    def fingerprints(self) -> tuple[str, ...]:
        """Return nothing: tokens are not compared with the codec that decodes them."""
        return ()

    def load(self, direction: Direction) -> None:
        """Do nothing: the weights are there."""

    def computing(self) -> AbstractContextManager[None]:
        """Do nothing: numpy has no settings that change results."""
        return nullcontext()


class Stream(Protocol):
    """What streams of both directions say of themselves."""

    @property
    def delay_frames(self) -> int:
        """Frames that a result waits for."""

    @property
    def exact(self) -> bool:
        """Whether results are those of the whole recording."""

    @property
    def latency_ms(self) -> float:
        """Milliseconds from a frame's last sample to its result, without the time to compute it."""


class EncoderStream(Stream, Protocol):
    """Takes samples of one recording as they come, and returns its tokens."""

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take samples [n]; return the tokens [C, k] that are complete."""

    def flush(self) -> np.ndarray:
        """End the recording; return the remaining tokens [C, k]."""


class DecoderStream(Stream, Protocol):
    """Takes tokens of one recording as they come, and returns its audio."""

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Take tokens [C, k]; return the samples [n] that are complete."""

    def flush(self, num_samples: int | None = None) -> np.ndarray:
        """End the recording; return the remaining samples [n], up to `num_samples` of the whole recording."""
