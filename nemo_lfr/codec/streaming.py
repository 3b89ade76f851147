"""Streaming encoder and decoder.

Results are the same as for the whole recording, whatever the chunk size. The result for a frame is returned as soon as
its lookahead, the later frames that it depends on, has arrived: 6 frames in the encoder of NVIDIA's codec, and 13 in
its decoder. With a smaller `lookahead`, each frame is processed as if the recording ended after its lookahead, at some
cost in quality. Only one thread at a time may push to a stream. A call of `push` that raises an error leaves all
streams unchanged.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from nemo_lfr.arguments import check_whole_number
from nemo_lfr.codec.base import CodecBase
from nemo_lfr.codec.cpu.products import stream_weights
from nemo_lfr.codec.stream_batches import BaseStream, flush, push, run_step
from nemo_lfr.codec.stream_modules import StreamModules, check_network
from nemo_lfr.codec.stream_ops import LayerState, StreamOps
from nemo_lfr.errors import TokensError
from nemo_lfr.modules.finite import dequantize, quantize, to_audio


class StreamEncoder(BaseStream):
    """Streaming encoder of one recording; see `Codec.stream_encoder`, and `BaseStream` for the arguments."""

    def __init__(self, codec: CodecBase[torch.Tensor], modules: StreamModules, lookahead: int | None = None) -> None:
        encoder = modules.encoder
        items = codec.samples_per_frame, 1
        super().__init__(codec, modules, encoder.context.future, encoder.min_frames, items, lookahead)
        self._rest = np.zeros(0, np.float32)  # samples of an incomplete frame
        self.num_samples = 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Push samples, and return the tokens for which enough later samples have arrived.

        Args:
            samples: [n], n >= 0, at the codec's rate; floating point in [-1, 1], or int16.

        Returns:
            Tokens [C, k] as int32; k may be 0.

        Raises:
            AudioError: for an unsupported shape or type, or for samples that are NaN, infinite or far outside [-1, 1].
            NemoLfrError: after `flush`, or if the encoder returns NaN or infinite values.
        """
        return push_encoders([self], [samples])[0]

    def flush(self) -> np.ndarray:
        """End the recording and return the remaining tokens [C, k].

        A partial frame is zero-padded.

        Raises:
            NemoLfrError: if the stream was flushed before, or if the encoder returns NaN or infinite values.
        """
        return flush_encoders([self])[0]

    def _end(self, length: None) -> tuple[torch.Tensor, int]:
        self._check_open()
        self._finished = True
        frame = self.codec.samples_per_frame
        total = -(-self.num_samples // frame)
        padded = max(total, self._min_frames if total else 0) * frame
        audio = np.pad(self._rest, (0, padded - self._num_in * frame - len(self._rest)))
        self._num_in = total
        return torch.from_numpy(audio)[None], total - self._num_out

    def _empty(self) -> np.ndarray:
        return np.zeros((self.codec.num_codebooks, 0), np.int32)

    def _check(self, samples: np.ndarray) -> np.ndarray:
        """Validate samples [n] and convert them to float32."""
        self._check_open()
        return self.codec.check_chunk(samples)

    def _has_frame(self, num_samples: int) -> bool:
        """Return whether `num_samples` more samples complete a frame."""
        return len(self._rest) + num_samples >= self.codec.samples_per_frame

    def _take(self, audio: np.ndarray) -> torch.Tensor:
        """Add samples [n] and return all whole frames, [1, k * samples_per_frame]."""
        self.num_samples += len(audio)
        audio = np.concatenate([self._rest, audio])
        whole = len(audio) // self.codec.samples_per_frame * self.codec.samples_per_frame
        self._rest = audio[whole:]
        self._num_in += whole // self.codec.samples_per_frame
        return torch.from_numpy(audio[None, :whole])


class StreamDecoder(BaseStream):
    """Streaming decoder of one recording; see `Codec.stream_decoder`, and `BaseStream` for the arguments."""

    def __init__(
        self,
        codec: CodecBase[torch.Tensor],
        modules: StreamModules,
        lookahead: int | None = None,
        first_lookahead: int | None = None,
    ) -> None:
        decoder = modules.decoder
        items = 1, codec.samples_per_frame
        super().__init__(codec, modules, decoder.context.future, decoder.min_frames, items, lookahead, first_lookahead)

    @property
    def _dim(self) -> int:
        """Number of dimensions D of a dequantized frame."""
        return self.codec.num_codebooks * len(self.codec.levels)

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Push tokens, and return the audio for which enough later tokens have arrived.

        Args:
            tokens: [C, k], k >= 0.

        Returns:
            Audio [n] as float32; n may be 0.

        Raises:
            TokensError: for an unsupported shape or type, or a token outside the codebook.
            NemoLfrError: after `flush`, or if the decoder returns NaN or infinite values.
        """
        return push_decoders([self], [tokens])[0]

    def flush(self, num_samples: int | None = None) -> np.ndarray:
        """End the recording and return the remaining audio [n].

        Args:
            num_samples: length of the original recording in samples at the codec's rate; the audio is trimmed to this
                length. Default: no trimming. If `lookahead` or `first_lookahead` is 0, `push` may already have
                returned the whole last frame. The caller must then trim the audio.

        Raises:
            TokensError: if `num_samples` does not match the number of frames.
            NemoLfrError: if the stream was flushed before, or if the decoder returns NaN or infinite values.
        """
        return flush_decoders([self], [num_samples])[0]

    def _end(self, length: Any) -> tuple[torch.Tensor, int]:
        self._check_open()
        frame = self.codec.samples_per_frame
        if length is not None:
            length = check_whole_number(length, "num_samples", 0, error=TokensError)
            if -(-length // frame) != self._num_in:
                raise TokensError(
                    f"num_samples is {length}, but {self._num_in} frames were pushed; pass the length of the "
                    "original recording at the codec's sample rate."
                )
        self._finished = True
        silence = torch.zeros(1, self._dim, max(0, self._min_frames - self._num_in), dtype=torch.float32)
        total = self._num_in * frame if length is None else length
        return silence, max(0, total - self._num_out)

    def _empty(self) -> np.ndarray:
        return np.zeros(0, np.float32)

    def _check(self, tokens: np.ndarray) -> torch.Tensor:
        """Validate tokens [C, k] and convert them to int64."""
        self._check_open()
        ids: torch.Tensor = self.codec.check_token_chunk(tokens)
        return ids

    def _has_frame(self, num_frames: int) -> bool:
        return num_frames > 0

    def _take(self, tokens: torch.Tensor) -> torch.Tensor:
        """Dequantize tokens [C, k] to frames [1, D, k]."""
        self._num_in += tokens.shape[1]
        return dequantize(self.modules.quantizer, tokens[None])


def push_encoders(streams: Sequence[StreamEncoder], samples: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Push samples to several streams of one codec. Streams whose states have equal shapes run as one batch.

    Args:
        streams: streaming encoders, without duplicates.
        samples: chunk of samples [n] for each stream; n may be 0.

    Returns:
        For each stream, the tokens [C, k] that `StreamEncoder.push` would return.

    Raises:
        AudioError: if a chunk has an unsupported shape or type, or samples that are NaN, infinite or far outside
            [-1, 1].
        NemoLfrError: if a stream is unsuitable (for example, flushed before), if the numbers of streams and chunks
            differ, or if the encoder returns NaN or infinite values. After any error, all streams are unchanged.
    """
    return push(streams, samples, StreamEncoder, _advance_encoders)


def push_decoders(streams: Sequence[StreamDecoder], tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Push tokens [C, k] to each of several streams, and return audio [n] for each stream; see `push_encoders`."""
    return push(streams, tokens, StreamDecoder, _advance_decoders)


def flush_encoders(streams: Sequence[StreamEncoder]) -> list[np.ndarray]:
    """End several recordings as one batch, and return the remaining tokens [C, k] of each; see `StreamEncoder.flush`.

    Args:
        streams: streaming encoders of one codec, without duplicates.

    Raises:
        NemoLfrError: as in `push_encoders`. All streams then remain unchanged.
    """
    return flush(streams, None, StreamEncoder, _advance_encoders)


def flush_decoders(
    streams: Sequence[StreamDecoder], num_samples: Sequence[int | None] | None = None
) -> list[np.ndarray]:
    """End several recordings as one batch, and return the remaining audio [n] of each; see `StreamDecoder.flush`.

    Args:
        streams: streaming decoders of one codec, without duplicates.
        num_samples: for each stream, the length of the recording in samples, to which the audio is trimmed, or None to
            return whole frames. Default: whole frames for all streams.

    Raises:
        TokensError: if a length in `num_samples` does not match the number of frames of its stream.
        NemoLfrError: as in `push_encoders`. After any error, all streams are unchanged.
    """
    return flush(streams, num_samples, StreamDecoder, _advance_decoders)


def _advance_encoders(streams: Sequence[Any], inputs: list[torch.Tensor], last: bool) -> list[np.ndarray]:
    codec, modules = streams[0].codec, streams[0].modules
    check_network(modules.encoder, f"the encoder of {modules.name}")

    def step(state: dict[Hashable, LayerState], audio: torch.Tensor, last: bool) -> torch.Tensor:
        with modules.autocast():
            ops = StreamOps(state, last, stream_weights(modules.encoder))
            encoded = modules.encoder.run(ops, audio.unsqueeze(2).to(modules.device))
        return quantize(modules.quantizer, encoded.transpose(1, 2).float())  # [B, C, k]

    return run_step(streams, inputs, last, step, codec.check_encoded)


def _advance_decoders(streams: Sequence[Any], inputs: list[torch.Tensor], last: bool) -> list[np.ndarray]:
    codec, modules = streams[0].codec, streams[0].modules
    check_network(modules.decoder, f"the decoder of {modules.name}")

    def step(state: dict[Hashable, LayerState], dequantized: torch.Tensor, last: bool) -> torch.Tensor:
        decoder = modules.decoder
        with modules.autocast():
            ops = StreamOps(state, last, stream_weights(decoder))
            hidden = decoder.run(ops, dequantized.transpose(1, 2).to(modules.device))
            return to_audio(decoder.out_activation, hidden.transpose(1, 2)).squeeze(1).float()  # [B, n]

    return run_step(streams, inputs, last, step, codec.check_decoded)
