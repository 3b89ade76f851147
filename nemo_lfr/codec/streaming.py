"""Encode and decode piece by piece, as the audio or the tokens come in.

The results are those of the whole recording, however it is cut into pieces. Frames come out as soon as the future they
depend on is there: 6 frames later to encode and 13 to decode with the released config, at once where the network is
causal; `nemo_lfr.codec.stream_ops` says what layers keep meanwhile. `lookahead` shortens that at a price: a frame is
then computed as if the recording ended a little later.

A stream takes one push at a time; several threads may push to several streams. A push that raises leaves every one of
its streams as it was.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from nemo_lfr.codec.ambient import check_weights
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.stream_ops import State, Step, StreamOps, run_batched
from nemo_lfr.errors import AudioError, NemoLfrError, TokensError, shorten
from nemo_lfr.modules.altered import refuse_altered
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.finite import quantize, to_audio
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer


class StreamModules(Protocol):
    """What streams compute with: a backend of PyTorch modules."""

    @property
    def name(self) -> str:
        """Where the weights came from, for messages."""

    @property
    def device(self) -> torch.device:
        """Where the modules are."""

    @property
    def encoder(self) -> HiFiGANEncoder:
        """Audio -> encoded frames."""

    @property
    def quantizer(self) -> FiniteScalarQuantizer | GroupFiniteScalarQuantizer:
        """Encoded frames <-> tokens."""

    @property
    def decoder(self) -> HiFiGANDecoder:
        """Dequantized frames -> audio."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which modules run at the codec's precision."""

    def computing(self) -> AbstractContextManager[None]:
        """Return a context that keeps the caller's settings away."""


class _Stream:
    """What both directions share: frames in, results out, in order and once.

    Args:
        codec: checks arguments and results; a codec serves any number of streams.
        modules: of the codec's backend.
        lookahead: frames that a result may wait for; None for all that it depends on.
    """

    def __init__(
        self,
        codec: Codec[torch.Tensor],
        modules: StreamModules,
        context: int,
        min_frames: int,
        items: tuple[int, int],
        lookahead: int | None,
    ) -> None:
        if lookahead is not None and (isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 0):
            raise NemoLfrError(f"lookahead {lookahead!r} is not a number of frames; use 0 to {context}, or None.")
        self.codec, self.modules = codec, modules
        self.delay_frames = context if lookahead is None else min(lookahead, context)
        self.exact = self.delay_frames == context
        self._min_frames = min_frames
        self._items_in, self._items_out = items  # of a frame
        self._piece = max(1, codec.chunk_frames // 2) * self._items_in  # items taken at a time
        self._state: State = {}
        self._num_in = 0  # frames
        self._num_computed = 0  # items of the output whose whole future was there
        self._num_out = 0  # items of the output that were given out
        self._finished = False
        self._goes_on = False  # more frames of this push are to come
        self._in_use = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a stream of its own that goes on from here."""
        return self.__dict__ | {"_state": dict(self._state), "_in_use": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._in_use = threading.Lock()

    @property
    def latency_ms(self) -> float:
        """Milliseconds from a frame's last sample to its result, the time to compute it left out."""
        return 1000 * self.delay_frames / self.codec.frame_rate

    def _check_open(self) -> None:
        if self._finished:
            raise NemoLfrError("this stream was flushed; start another one.")


class StreamEncoder(_Stream):
    """Audio of one recording in, tokens out. Made by `Codec.stream_encoder`."""

    def __init__(self, codec: Codec[torch.Tensor], modules: StreamModules, lookahead: int | None = None) -> None:
        encoder = modules.encoder
        items = codec.samples_per_frame, 1
        super().__init__(codec, modules, encoder.context.future, encoder.min_frames, items, lookahead)
        self._rest = np.zeros(0, np.float32)  # samples of a frame that is not whole
        self.num_samples = 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take samples [n] at the codec's rate, floating point in [-1, 1] or int16, n >= 0; tokens [C, k] as int32.

        Raises:
            AudioError: for another shape or type, or a NaN.
            NemoLfrError: after `flush`.
        """
        return push_encoders([self], [samples])[0]

    def flush(self) -> np.ndarray:
        """The recording ends: the tokens [C, k] that are left. A partial frame is completed with silence."""
        with _in_turn([self]):
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
        given = self._num_out
        return _advance_encoders([self], [torch.from_numpy(audio)[None]], last=True)[0][:, : total - given]

    def _check(self, samples: np.ndarray) -> np.ndarray:
        """Samples [n] that can be taken."""
        self._check_open()
        if np.ndim(samples) != 1:
            raise AudioError(f"samples have shape {list(np.shape(samples))}; push one recording's, [n].")
        if not len(samples):
            return np.zeros(0, np.float32)
        return self.codec.check_audio(samples)[0][0].cpu().numpy()

    def _has_frame(self, num_samples: int) -> bool:
        """Whether so many samples more complete a frame."""
        return len(self._rest) + num_samples >= self.codec.samples_per_frame

    def _take(self, audio: np.ndarray) -> torch.Tensor:
        """The whole frames [1, k * samples_per_frame] that are there with these samples [n]."""
        self.num_samples += len(audio)
        audio = np.concatenate([self._rest, audio])
        whole = len(audio) // self.codec.samples_per_frame * self.codec.samples_per_frame
        self._rest = audio[whole:]
        self._num_in += whole // self.codec.samples_per_frame
        return torch.from_numpy(audio[None, :whole])


class StreamDecoder(_Stream):
    """Tokens of one recording in, audio out. Made by `Codec.stream_decoder`."""

    def __init__(self, codec: Codec[torch.Tensor], modules: StreamModules, lookahead: int | None = None) -> None:
        decoder = modules.decoder
        items = 1, codec.samples_per_frame
        super().__init__(codec, modules, decoder.context.future, decoder.min_frames, items, lookahead)

    @property
    def _dim(self) -> int:
        """D, the dimensions of a dequantized frame."""
        return self.codec.num_codebooks * len(self.codec.levels)

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Take tokens [C, k], k >= 0; audio [n] as float32, whole frames.

        Raises:
            TokensError: for another shape or type, or a token outside the codebook.
            NemoLfrError: after `flush`.
        """
        return push_decoders([self], [tokens])[0]

    def flush(self, num_samples: int | None = None) -> np.ndarray:
        """The recording ends: the audio [n] that is left.

        Args:
            num_samples: of the recording that was encoded, to which the audio is cut; whole frames if not given. A
                causal decoder has given the last frame's samples already: cut them yourself.

        Raises:
            TokensError: if the frames do not make so many samples.
        """
        with _in_turn([self]):
            return self._flush(num_samples)

    def _flush(self, num_samples: int | None) -> np.ndarray:
        self._check_open()
        frame = self.codec.samples_per_frame
        if num_samples is not None and -(-num_samples // frame) != self._num_in:
            raise TokensError(f"num_samples is {num_samples}, but {self._num_in} frames were pushed.")
        self._finished = True
        if not self._num_in:
            return np.zeros(0, np.float32)
        silence = torch.zeros(1, self._dim, max(0, self._min_frames - self._num_in), dtype=torch.float32)
        total = self._num_in * frame if num_samples is None else num_samples
        given = self._num_out
        return _advance_decoders([self], [silence], last=True)[0][: max(0, total - given)]

    def _check(self, tokens: np.ndarray) -> torch.Tensor:
        """Tokens [C, k] that can be taken."""
        self._check_open()
        if np.ndim(tokens) != 2:
            raise TokensError(f"tokens have shape {list(np.shape(tokens))}; push one recording's, [C, k].")
        return self.codec.check_tokens(tokens)[0][0]

    def _has_frame(self, num_frames: int) -> bool:
        return num_frames > 0

    def _take(self, tokens: torch.Tensor) -> torch.Tensor:
        """Dequantized frames [1, D, k] of tokens [C, k]."""
        self._num_in += tokens.shape[1]
        return self.modules.quantizer.decode(tokens[:, None])


@contextmanager
def _in_turn(streams: Sequence[_Stream]) -> Iterator[None]:
    """Keep streams to this thread, and the caller's settings away; undo what was taken if something raises.

    Raises:
        NemoLfrError: if another thread uses one of them.
    """
    with ExitStack() as stack:
        for stream in streams:
            if not stream._in_use.acquire(blocking=False):
                raise NemoLfrError(
                    "this stream is being pushed to by another thread; push the pieces of one recording one after "
                    "the other, and open a stream for each recording."
                )
            stack.callback(stream._in_use.release)
        before = [dict(vars(stream)) for stream in streams]
        states = [dict(stream._state) for stream in streams]
        try:
            with streams[0].modules.computing():
                yield
        except BaseException:
            for stream, attributes, state in zip(streams, before, states, strict=True):
                vars(stream).update(attributes)
                stream._state = state
            raise


def push_encoders(streams: Sequence[StreamEncoder], samples: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Push to many streams of one codec at once; those in one phase are computed as one batch.

    Args:
        streams: each once.
        samples: for each stream, [n].

    Returns:
        For each stream, tokens [C, k]: those of `StreamEncoder.push`.

    Raises:
        AudioError: as `StreamEncoder.push`, and no stream has taken anything.
        NemoLfrError: for streams of several codecs, one that is there twice or in use by another thread, or another
            number of pieces than of streams.
    """
    return _push(streams, samples, StreamEncoder, _advance_encoders)


def push_decoders(streams: Sequence[StreamDecoder], tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """As `push_encoders`: for each stream tokens [C, k] in and audio [n] out."""
    return _push(streams, tokens, StreamDecoder, _advance_decoders)


def _push(
    streams: Sequence[Any], inputs: Sequence[Any], kind: type[_Stream], advance: Callable[..., list[np.ndarray]]
) -> list[np.ndarray]:
    streams, inputs = _listed(streams, "streams"), _listed(inputs, "pieces")
    for stream in streams:
        if not isinstance(stream, kind):
            raise NemoLfrError(f"one of the streams is {shorten(type(stream).__name__)}, not {kind.__name__}.")
        if stream.codec is not streams[0].codec:
            raise NemoLfrError("these streams are of several codecs; push to those of one at a time.")
    if len(streams) != len(inputs):
        raise NemoLfrError(f"{len(streams)} streams, but {len(inputs)} pieces; pass one for each, empty if need be.")
    if len({id(stream) for stream in streams}) < len(streams):
        raise NemoLfrError("one stream is there twice; join its pieces, or push them one after the other.")
    if not streams:
        return []
    with _in_turn(streams):
        return _take_turn(streams, inputs, advance)


def _listed(values: Any, what: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise NemoLfrError(f"{what} are {shorten(type(values).__name__)}; pass a list of them.") from None


def _take_turn(
    streams: Sequence[Any], inputs: Sequence[Any], advance: Callable[..., list[np.ndarray]]
) -> list[np.ndarray]:
    """Check all inputs, then take them, in pieces that need no more memory than a chunk of a recording."""
    checked = [stream._check(new) for stream, new in zip(streams, inputs, strict=True)]
    size = streams[0]._piece
    longest = max(new.shape[-1] for new in checked)
    results = []
    for at in range(0, max(longest, 1), size):
        taken = []
        for stream, new in zip(streams, checked, strict=True):
            taken.append(stream._take(new[..., at : at + size]))
            stream._goes_on = stream._has_frame(new.shape[-1] - at - size)
        results.append(advance(streams, taken))
    return [np.concatenate(pieces, axis=-1) for pieces in zip(*results, strict=True)]


def _advance_encoders(streams: Sequence[Any], inputs: list[torch.Tensor], last: bool = False) -> list[np.ndarray]:
    codec, modules = streams[0].codec, streams[0].modules
    check_weights(modules.encoder, f"the encoder of {modules.name}")
    refuse_altered(modules.encoder, f"the encoder of {modules.name}")

    def step(state: State, audio: torch.Tensor, last: bool) -> torch.Tensor:
        with modules.autocast():
            encoded = modules.encoder.run(StreamOps(state, last), audio.unsqueeze(1).to(modules.device))
        return quantize(modules.quantizer, encoded.float())  # [B, C, k]

    return _advance(streams, inputs, last, step, codec.check_encoded)


def _advance_decoders(streams: Sequence[Any], inputs: list[torch.Tensor], last: bool = False) -> list[np.ndarray]:
    codec, modules = streams[0].codec, streams[0].modules
    check_weights(modules.decoder, f"the decoder of {modules.name}")
    refuse_altered(modules.decoder, f"the decoder of {modules.name}")

    def step(state: State, dequantized: torch.Tensor, last: bool) -> torch.Tensor:
        decoder = modules.decoder
        with modules.autocast():
            hidden = decoder.run(StreamOps(state, last), dequantized.to(modules.device))
            return to_audio(decoder.out_activation, hidden).squeeze(1).float()  # [B, n]

    return _advance(streams, inputs, last, step, codec.check_decoded)


def _advance(
    streams: Sequence[_Stream],
    inputs: list[torch.Tensor],
    last: bool,
    step: Step,
    check: Callable[[np.ndarray], None],
) -> list[np.ndarray]:
    """Bring every stream forward by its input; what comes out of each, from the first item that was not given out."""
    results = run_batched([stream._state for stream in streams], inputs, last, step)
    computed = [stream._num_computed + result.shape[-1] for stream, result in zip(streams, results, strict=True)]
    early = [
        number
        for number, stream in enumerate(streams)
        if not (stream.exact or last or stream._goes_on) and inputs[number].numel()
    ]
    if early:
        # As if the recordings ended here: of that, the frames that are due.
        states = [copy.copy(streams[number]._state) for number in early]
        ends = []
        for number in early:
            missing = max(0, streams[number]._min_frames - streams[number]._num_in) * streams[number]._items_in
            ends.append(inputs[number].new_zeros(*inputs[number].shape[:-1], missing))
        for number, rest in zip(early, run_batched(states, ends, True, step), strict=True):
            results[number] = torch.cat([results[number], rest], dim=-1)
    given = []
    for stream, result, whole in zip(streams, results, computed, strict=True):
        due = whole if stream.exact or stream._goes_on else (stream._num_in - stream.delay_frames) * stream._items_out
        stop = max(whole, due, stream._num_out)
        given.append(result[..., stream._num_out - stream._num_computed : stop - stream._num_computed].cpu().numpy())
        stream._num_computed, stream._num_out = whole, stop
        check(given[-1][None])
    return given
