"""Streaming encoder and decoder.

Results are the same as for the whole recording, whatever the chunk size. The result for a frame depends on some later
frames, the lookahead, and is returned as soon as they have arrived. With the released config, the encoder waits for 6
later frames and the decoder for 13. A smaller `lookahead` reduces latency at some cost in quality: each frame is then
processed as if the recording ended after its lookahead. Only one thread at a time may push to a stream. A push that
raises an error leaves all streams unchanged.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from nemo_lfr.codec.arguments import check_whole_number
from nemo_lfr.codec.base import CodecBase
from nemo_lfr.codec.cpu.products import stream_weights
from nemo_lfr.codec.stream_modules import StreamModules, check_lookahead, check_network
from nemo_lfr.codec.stream_ops import LayerState, State, Step, StreamOps, run_batched
from nemo_lfr.errors import AudioError, NemoLfrError, TokensError, shorten
from nemo_lfr.modules.finite import quantize, to_audio


class _Stream:
    """Base class of the streaming encoder and decoder.

    Args:
        codec: codec that checks arguments and results. Several streams may share one codec.
        modules: modules and settings of the codec's backend.
        context: number of later frames that the result of a frame depends on.
        min_frames: shortest valid input of the network, in frames.
        items: numbers of input and output items (samples or tokens) in one frame.
        lookahead: number of later frames to wait for; None for `context`.
        first_lookahead: number of later frames to wait for at the start of the recording; None for `lookahead`.
    """

    def __init__(
        self,
        codec: CodecBase[torch.Tensor],
        modules: StreamModules,
        context: int,
        min_frames: int,
        items: tuple[int, int],
        lookahead: int | None,
        first_lookahead: int | None = None,
    ) -> None:
        check_lookahead(lookahead=lookahead, first_lookahead=first_lookahead)
        self.codec, self.modules = codec, modules
        self.delay_frames = context if lookahead is None else min(lookahead, context)
        self.first_delay_frames = self.delay_frames if first_lookahead is None else min(first_lookahead, context)
        self.exact = self.delay_frames == self.first_delay_frames == context
        self._min_frames = min_frames
        self._items_in, self._items_out = items  # in one frame
        self._piece = max(1, codec.chunk_frames // 2) * self._items_in  # items processed at a time
        self._state = State()
        self._num_in = 0  # frames
        self._num_computed = 0  # items of the output whose lookahead is complete
        self._num_out = 0  # items of the output that were returned
        self._finished, self._has_more = False, False  # flushed; the current push has more frames to process
        self._in_use = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy. The copy is an independent stream."""
        return self.__dict__ | {"_in_use": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._in_use = threading.Lock()

    @property
    def latency_ms(self) -> float:
        """Milliseconds from the last sample of a frame to the result for this frame, excluding processing time."""
        return 1000 * self.delay_frames / self.codec.frame_rate

    def _num_due(self) -> int:
        """Return how many output items (tokens or samples) can be returned, because their lookahead has arrived."""
        # The first frames only wait for the first lookahead. They play while the lookahead of later frames arrives.
        early_frames = min(self.delay_frames - self.first_delay_frames, self._num_in - self.first_delay_frames)
        return max(self._num_in - self.delay_frames, early_frames) * self._items_out

    def _check_open(self) -> None:
        if self._finished:
            raise NemoLfrError("this stream was flushed; open a new stream.")


class StreamEncoder(_Stream):
    """Streaming encoder of one recording; see `Codec.stream_encoder`."""

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
            AudioError: for an unsupported shape or type, or NaN values.
            NemoLfrError: after `flush`.
        """
        return push_encoders([self], [samples])[0]

    def flush(self) -> np.ndarray:
        """End the recording and return the remaining tokens [C, k].

        A partial frame is zero-padded.
        """
        with _exclusive([self]):
            return self._flush()

    def _flush(self) -> np.ndarray:
        self._check_open()
        self._finished = True
        frame = self.codec.samples_per_frame
        total = -(-self.num_samples // frame)
        padded = max(total, self._min_frames if total else 0) * frame
        audio = np.pad(self._rest, (0, padded - self._num_in * frame - len(self._rest)))
        self._num_in = total
        if not total:
            return np.zeros((self.codec.num_codebooks, 0), np.int32)
        num_out = self._num_out
        return _advance_encoders([self], [torch.from_numpy(audio)[None]], last=True)[0][:, : total - num_out]

    def _check(self, samples: np.ndarray) -> np.ndarray:
        """Validate samples [n] and convert them to float32."""
        self._check_open()
        clip = self.codec.backend.arrays.convert(samples, "audio", AudioError)
        if clip.ndim != 1:
            raise AudioError(f"samples have shape {list(clip.shape)}; pass one recording of shape [n].")
        if not len(clip):
            return np.zeros(0, np.float32)
        return self.codec.check_audio(clip)[0][0].cpu().numpy()

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


class StreamDecoder(_Stream):
    """Streaming decoder of one recording; see `Codec.stream_decoder`."""

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
        """D, the dimensions of a dequantized frame."""
        return self.codec.num_codebooks * len(self.codec.levels)

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Push tokens, and return the audio for which enough later tokens have arrived.

        Args:
            tokens: [C, k], k >= 0.

        Returns:
            Audio [n] as float32; n is a multiple of `samples_per_frame` and may be 0.

        Raises:
            TokensError: for an unsupported shape or type, or a token outside the codebook.
            NemoLfrError: after `flush`.
        """
        return push_decoders([self], [tokens])[0]

    def flush(self, num_samples: int | None = None) -> np.ndarray:
        """End the recording and return the remaining audio [n].

        Args:
            num_samples: length of the original recording in samples; the audio is trimmed to this length. Default: no
                trimming. With a lookahead of 0, `push` has already returned the last frame, so the caller must trim.

        Raises:
            TokensError: if `num_samples` does not match the number of frames.
            NemoLfrError: if the stream was flushed before.
        """
        with _exclusive([self]):
            return self._flush(num_samples)

    def _flush(self, num_samples: int | None) -> np.ndarray:
        self._check_open()
        frame = self.codec.samples_per_frame
        if num_samples is not None:
            num_samples = check_whole_number(num_samples, "num_samples", 0, error=TokensError)
        if num_samples is not None and -(-num_samples // frame) != self._num_in:
            raise TokensError(
                f"num_samples is {num_samples}, but {self._num_in} frames were pushed; pass the original length."
            )
        self._finished = True
        if not self._num_in:
            return np.zeros(0, np.float32)
        silence = torch.zeros(1, self._dim, max(0, self._min_frames - self._num_in), dtype=torch.float32)
        total = self._num_in * frame if num_samples is None else num_samples
        num_out = self._num_out
        return _advance_decoders([self], [silence], last=True)[0][: max(0, total - num_out)]

    def _check(self, tokens: np.ndarray) -> torch.Tensor:
        """Validate tokens [C, k] and convert them to int64."""
        self._check_open()
        ids = self.codec.backend.arrays.convert(tokens, "tokens", TokensError)
        if ids.ndim != 2:
            raise TokensError(f"tokens have shape {list(ids.shape)}; pass one recording of shape [C, k].")
        return self.codec.check_tokens(ids)[0][0]

    def _has_frame(self, num_frames: int) -> bool:
        return num_frames > 0

    def _take(self, tokens: torch.Tensor) -> torch.Tensor:
        """Dequantize tokens [C, k] to frames [1, D, k]."""
        self._num_in += tokens.shape[1]
        return self.modules.quantizer.decode(tokens[:, None])


@contextmanager
def _exclusive(streams: Sequence[_Stream]) -> Iterator[None]:
    """Reserve streams for this thread, and restore their state after an error.

    Raises:
        NemoLfrError: if another thread uses one of the streams.
    """
    with ExitStack() as stack:
        for stream in streams:
            if not stream._in_use.acquire(blocking=False):
                raise NemoLfrError(
                    "another thread is pushing to this stream; push the chunks of a recording one after the other, "
                    "and open a stream for each recording."
                )
            stack.callback(stream._in_use.release)
        before = [dict(vars(stream)) for stream in streams]
        try:
            with streams[0].modules.computing():
                yield
        except BaseException:
            for stream, attributes in zip(streams, before, strict=True):
                vars(stream).update(attributes)
            raise


def push_encoders(streams: Sequence[StreamEncoder], samples: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Push samples to several streams of one codec. Streams whose states have equal shapes run as one batch.

    Args:
        streams: streaming encoders, each of them only once.
        samples: chunk of samples [n] for each stream; n may be 0.

    Returns:
        For each stream, the tokens [C, k] that `StreamEncoder.push` would return.

    Raises:
        AudioError: as in `StreamEncoder.push`. All streams then remain unchanged.
        NemoLfrError: if the streams belong to different codecs, a stream is passed twice or is in use by another
            thread, or the numbers of streams and chunks differ.
    """
    return _push(streams, samples, StreamEncoder, _advance_encoders)


def push_decoders(streams: Sequence[StreamDecoder], tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Push tokens [C, k] to each of several streams, and return audio [n] for each stream; see `push_encoders`."""
    return _push(streams, tokens, StreamDecoder, _advance_decoders)


def _push(
    streams: Sequence[Any], inputs: Sequence[Any], kind: type[_Stream], advance: Callable[..., list[np.ndarray]]
) -> list[np.ndarray]:
    streams, inputs = _listed(streams, "streams"), _listed(inputs, "chunks")
    for stream in streams:
        if not isinstance(stream, kind):
            raise NemoLfrError(f"a stream is {shorten(type(stream).__name__)}; pass only {kind.__name__} objects.")
        if stream.codec is not streams[0].codec:
            raise NemoLfrError("the streams belong to several codecs; pass the streams of one codec.")
    if len(streams) != len(inputs):
        raise NemoLfrError(f"got {len(inputs)} chunks for {len(streams)} streams; pass one for each; it may be empty.")
    if len({id(stream) for stream in streams}) < len(streams):
        raise NemoLfrError("the same stream was passed twice; join its chunks, or push them one after the other.")
    if not streams:
        return []
    with _exclusive(streams):
        return _push_checked(streams, inputs, advance)


def _listed(values: Any, what: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise NemoLfrError(f"{what} are {shorten(type(values).__name__)}; pass a list of {what}.") from None


def _push_checked(
    streams: Sequence[Any], inputs: Sequence[Any], advance: Callable[..., list[np.ndarray]]
) -> list[np.ndarray]:
    """Validate all inputs, then process them in pieces of bounded size."""
    checked = [stream._check(new) for stream, new in zip(streams, inputs, strict=True)]
    size = streams[0]._piece
    longest = max(new.shape[-1] for new in checked)
    results = []
    for at in range(0, max(longest, 1), size):
        taken = []
        for stream, new in zip(streams, checked, strict=True):
            taken.append(stream._take(new[..., at : at + size]))
            stream._has_more = stream._has_frame(new.shape[-1] - at - size)
        results.append(advance(streams, taken))
    return [np.concatenate(pieces, axis=-1) for pieces in zip(*results, strict=True)]


def _advance_encoders(streams: Sequence[Any], inputs: list[torch.Tensor], last: bool = False) -> list[np.ndarray]:
    codec, modules = streams[0].codec, streams[0].modules
    check_network(modules.encoder, f"the encoder of {modules.name}")

    def step(state: dict[Hashable, LayerState], audio: torch.Tensor, last: bool) -> torch.Tensor:
        with modules.autocast():
            ops = StreamOps(state, last, stream_weights(modules.encoder))
            encoded = modules.encoder.run(ops, audio.unsqueeze(2).to(modules.device))
        return quantize(modules.quantizer, encoded.transpose(1, 2).float())  # [B, C, k]

    return _advance(streams, inputs, last, step, codec.check_encoded)


def _advance_decoders(streams: Sequence[Any], inputs: list[torch.Tensor], last: bool = False) -> list[np.ndarray]:
    codec, modules = streams[0].codec, streams[0].modules
    check_network(modules.decoder, f"the decoder of {modules.name}")

    def step(state: dict[Hashable, LayerState], dequantized: torch.Tensor, last: bool) -> torch.Tensor:
        decoder = modules.decoder
        with modules.autocast():
            ops = StreamOps(state, last, stream_weights(decoder))
            hidden = decoder.run(ops, dequantized.transpose(1, 2).to(modules.device))
            return to_audio(decoder.out_activation, hidden.transpose(1, 2)).squeeze(1).float()  # [B, n]

    return _advance(streams, inputs, last, step, codec.check_decoded)


def _advance(
    streams: Sequence[_Stream],
    inputs: list[torch.Tensor],
    last: bool,
    step: Step,
    check: Callable[[np.ndarray], None],
) -> list[np.ndarray]:
    """Process the new input of every stream, and return the new output items of each stream."""
    states, results = run_batched([stream._state for stream in streams], inputs, last, step)
    for stream, state in zip(streams, states, strict=True):
        stream._state = state
    computed = [stream._num_computed + result.shape[-1] for stream, result in zip(streams, results, strict=True)]
    early = [
        number
        for number, stream in enumerate(streams)
        if not (stream.exact or last or stream._has_more)
        and inputs[number].numel()
        and stream._num_due() > max(computed[number], stream._num_out)
    ]
    if early:
        # With a shorter lookahead, process the frames that are due as if the recordings ended here.
        ends = []
        for number in early:
            missing = max(0, streams[number]._min_frames - streams[number]._num_in) * streams[number]._items_in
            ends.append(inputs[number].new_zeros(*inputs[number].shape[:-1], missing))
        _, rests = run_batched([streams[number]._state for number in early], ends, True, step)
        for number, rest in zip(early, rests, strict=True):
            results[number] = torch.cat([results[number], rest], dim=-1)
    returned = []
    for stream, result, whole in zip(streams, results, computed, strict=True):
        due = whole if stream.exact or last or stream._has_more else stream._num_due()
        stop = max(whole, due, stream._num_out)
        new = result[..., stream._num_out - stream._num_computed : stop - stream._num_computed]
        returned.append(new.cpu().numpy().copy())  # a copy: a view would keep the results of the whole batch in memory
        stream._num_computed, stream._num_out = whole, stop
        check(returned[-1][None])
    return returned
