"""`CodecBase`: the properties of a codec, and the checks of its arguments and results.

Streams and exports only need this class. Its subclass `Codec` adds the methods that encode, decode, load and save.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Generic, cast

import numpy as np

from nemo_lfr.arguments import check_whole_number
from nemo_lfr.codec import arguments
from nemo_lfr.codec.arrays import Array, to_numpy
from nemo_lfr.codec.backend import Backend, check_backend, check_result
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.spec import CodecSpec, same_fingerprint


class CodecBase(Generic[Array]):
    """Properties of a codec that follow from its backend, and checks of arguments and results.

    Args:
        backend: backend that runs the encoder and the decoder.
        chunk_frames: frames in one window of long audio, not counting the context around them. Default: the
            backend's choice.

    Raises:
        NemoLfrError: if `backend` is not a backend object (see `check_backend`), or `chunk_frames` is not an integer
            of at least 1.

    Attributes:
        backend: backend that runs the encoder and the decoder.
    """

    backend: Backend[Array]

    def __init__(self, backend: Backend[Array], *, chunk_frames: int | None = None) -> None:
        check_backend(backend)
        self.backend = backend
        self.chunk_frames = backend.batching.chunk_frames if chunk_frames is None else chunk_frames

    @property
    def chunk_frames(self) -> int:
        """Frames in one window of long audio, not counting the context around them.

        It may be changed at any time; results do not depend on it.
        """
        return self._chunk_frames

    @chunk_frames.setter
    def chunk_frames(self, frames: int) -> None:
        self._chunk_frames = check_whole_number(frames, "chunk_frames", 1)

    @property
    def spec(self) -> CodecSpec:
        """Description of the tokens, including the fingerprint, as stored in token files."""
        return replace(self.backend.spec, fingerprint=self.fingerprint)

    @property
    def name(self) -> str:
        """Name of the codec for messages: usually the path or Hub name of its checkpoint."""
        return self.backend.name

    @property
    def sample_rate(self) -> int:
        """Sample rate of the audio, Hz."""
        return self.backend.spec.sample_rate

    @property
    def samples_per_frame(self) -> int:
        """Number of samples per frame."""
        return self.backend.spec.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks C, which is also the number of tokens in one frame."""
        return self.backend.spec.num_codebooks

    @property
    def levels(self) -> tuple[int, ...]:
        """Number of FSQ levels in each dimension of one codebook."""
        return self.backend.spec.levels

    @property
    def precision(self) -> str:
        """Precision of the encoder and decoder; "fp32" gives the reference tokens."""
        return self.backend.spec.precision

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.backend.spec.frame_rate

    @property
    def codebook_size(self) -> int:
        """Number of entries in one codebook; 0 <= token < codebook_size."""
        return self.backend.spec.codebook_size

    @property
    def bit_rate(self) -> float:
        """Bits per second: frame_rate * num_codebooks * log2(codebook_size)."""
        return self.backend.spec.bit_rate

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and settings, 16 hex digits; empty if the backend has no fingerprint."""
        return next(iter(self.backend.fingerprints()), "")

    def made(self, fingerprint: str) -> bool:
        """Return whether tokens with this fingerprint come from this codec.

        Fingerprints that older versions of this package computed for this codec are also accepted. If the backend has
        no fingerprint, the result is True for any fingerprint.
        """
        known = iter(self.backend.fingerprints())
        first = next(known, fingerprint)  # a backend without fingerprints accepts all
        return same_fingerprint(first, fingerprint) or any(same_fingerprint(other, fingerprint) for other in known)

    @property
    def device(self) -> Any:
        """Device of the encoder and decoder."""
        return self.backend.device

    @property
    def encoder(self) -> Any:
        """Encoder: a `torch.nn.Module` if the backend uses PyTorch.

        With another backend, it may be an object with only the attributes `context` and `min_frames`.
        """
        return self.backend.encoder

    @property
    def decoder(self) -> Any:
        """Decoder: a `torch.nn.Module` if the backend uses PyTorch.

        With another backend, it may be an object with only the attributes `context` and `min_frames`.
        """
        return self.backend.decoder

    @property
    def quantizer(self) -> Any:
        """Quantizer module. Only PyTorch backends have one; with other backends, AttributeError is raised."""
        return cast(Any, self.backend).quantizer

    def _encode_frames(self, audio: Array, num_frames: list[int]) -> Array:
        tokens = self.backend.encode_frames(audio, num_frames)
        check_result(self.backend, "encode", tokens, audio, num_frames)
        return tokens

    def _decode_frames(self, tokens: Array, num_frames: list[int]) -> Array:
        audio = self.backend.decode_frames(tokens, num_frames)
        check_result(self.backend, "decode", audio, tokens, num_frames)
        return audio

    def check_audio(self, audio: object, audio_len: object = None) -> tuple[Array, list[int]]:
        """Check clips and convert them to float32 [B, T_audio]; see `nemo_lfr.codec.arguments.check_audio`."""
        return arguments.check_audio(self.backend.arrays, audio, audio_len)

    def check_tokens(self, tokens: object, tokens_len: object = None) -> tuple[Array, list[int]]:
        """Check tokens and convert them to int64 [B, C, T]; see `nemo_lfr.codec.arguments.check_tokens`."""
        return arguments.check_tokens(self.backend.arrays, self.backend.spec, tokens, tokens_len)

    def check_chunk(self, samples: object) -> np.ndarray:
        """Check samples [n] and convert them to float32; see `nemo_lfr.codec.arguments.check_chunk`."""
        return arguments.check_chunk(self.backend.arrays, samples)

    def check_token_chunk(self, tokens: object) -> Any:
        """Check tokens [C, k] and convert them to int64; see `nemo_lfr.codec.arguments.check_token_chunk`."""
        return arguments.check_token_chunk(self.backend.arrays, self.backend.spec, tokens)

    def check_blocks(
        self, blocks: object, name: str, error: type[NemoLfrError], check: Callable[[object], Any]
    ) -> Iterator[np.ndarray]:
        """Check the consecutive chunks of one recording.

        Args:
            blocks: iterable of chunks.
            name: what the chunks contain: "samples" or "tokens".
            error: type of the error to raise.
            check: function that checks one chunk: `check_chunk` or `check_token_chunk`.

        Yields:
            The result of `check` for each chunk, as a numpy array.

        Raises:
            NemoLfrError: of the type `error`, if a chunk is invalid, or `blocks` is not an iterable of arrays.
        """
        if hasattr(blocks, "ndim") or isinstance(blocks, str | bytes) or not isinstance(blocks, Iterable):
            raise error(f"blocks has type {type(blocks).__name__}; pass an iterable of arrays, such as [{name}].")
        for block in blocks:
            with self.backend.computing():  # ends before the `yield`
                chunk = to_numpy(check(block))
            yield chunk

    def check_encoded(self, tokens: Array | np.ndarray) -> None:
        """Raise NemoLfrError if a token [B, C, T] is outside the codebook.

        Such tokens mark frames for which the encoder returned NaN or infinite values.
        """
        arguments.check_encoded(tokens, self.backend.spec, self.name)

    def check_decoded(self, audio: Array | np.ndarray) -> None:
        """Raise NemoLfrError if decoded audio [B, T_audio] contains NaN.

        A NaN marks where the decoder returned NaN or infinite values.
        """
        arguments.check_decoded(audio, self.backend.spec, self.name)
