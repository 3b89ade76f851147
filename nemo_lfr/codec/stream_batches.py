"""Base class of the streaming encoder and decoder, and functions that process several streams as one batch.

A batch either succeeds for all of its streams or leaves all of them unchanged.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from nemo_lfr.codec.base import CodecBase
from nemo_lfr.codec.stream_modules import StreamModules, check_lookahead
from nemo_lfr.codec.stream_ops import State, Step, run_batched
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.frames import check_first_lookahead

# Function that processes the input of every stream, and returns the new output items of each stream. The last argument
# says whether the recordings end with this input.
Advance = Callable[[Sequence[Any], list[torch.Tensor], bool], list[np.ndarray]]


class BaseStream:
    """Base class of the streaming encoder and decoder.

    Args:
        codec: codec that checks arguments and results. Several streams may share one codec.
        modules: modules and settings of the codec's backend.
        context: number of later frames that the result of a frame depends on.
        min_frames: shortest valid input of the network, in frames.
        items: numbers of input and output items in one frame. An item is an audio sample, or the tokens of one frame.
        lookahead: number of later frames to wait for; None for all `context` frames.
        first_lookahead: number of later frames to wait for at the start of the recording; None for the value of
            `lookahead`.
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
        check_first_lookahead(first_lookahead, lookahead)
        self.codec, self.modules = codec, modules
        self.delay_frames = context if lookahead is None else min(lookahead, context)
        self.first_delay_frames = self.delay_frames if first_lookahead is None else min(first_lookahead, context)
        self.exact = self.delay_frames == self.first_delay_frames == context
        self._min_frames = min_frames
        self._items_in, self._items_out = items  # in one frame
        self._piece = max(1, codec.chunk_frames // 2) * self._items_in  # items processed at a time
        self._state = State()
        self._num_in = 0  # complete frames of input
        self._num_computed = 0  # items of the output whose lookahead is complete
        self._num_out = 0  # items of the output that were returned
        self._finished = False  # whether the stream was flushed
        self._has_more = False  # whether more input of the same `push` call follows
        self._in_use = threading.Lock()
        self._name = ""  # in messages; empty if the stream is used alone

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy, which is an independent stream."""
        return self.__dict__ | {"_in_use": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._in_use = threading.Lock()
        self._name = ""  # in messages; empty if the stream is used alone

    @property
    def latency_ms(self) -> float:
        """Milliseconds from the last sample of a frame to the result for this frame, excluding processing time."""
        return 1000 * self.delay_frames / self.codec.frame_rate

    def _num_due(self) -> int:
        """Return the total number of output items whose lookahead has arrived."""
        # The first frames only wait for the first lookahead. They play while the lookahead of later frames arrives.
        early_frames = min(self.delay_frames - self.first_delay_frames, self._num_in - self.first_delay_frames)
        return max(self._num_in - self.delay_frames, early_frames) * self._items_out

    def _check_open(self) -> None:
        if self._finished:
            raise NemoLfrError("this stream was flushed; open a new stream.")

    def _check(self, new: Any) -> Any:
        """Validate and convert new input."""
        raise NotImplementedError

    def _has_frame(self, num_items: int) -> bool:
        """Return whether `num_items` more input items complete a frame."""
        raise NotImplementedError

    def _take(self, new: Any) -> torch.Tensor:
        """Add checked input, and return the input of the network for all frames that are now complete."""
        raise NotImplementedError

    def _end(self, length: Any) -> tuple[torch.Tensor, int]:
        """Mark the stream as flushed, and return the last input of the network.

        Args:
            length: length of the recording in samples; None if unknown.

        Returns:
            The last input, and the number of frames (when encoding) or samples (when decoding) still to return.
        """
        raise NotImplementedError

    def _empty(self) -> np.ndarray:
        """Return an output without items."""
        raise NotImplementedError


@contextmanager
def _exclusive(streams: Sequence[BaseStream]) -> Iterator[None]:
    """Reserve streams for this thread, and restore their state after an error.

    Raises:
        NemoLfrError: if another thread uses one of the streams.
    """
    with ExitStack() as stack:
        for stream in streams:
            if not stream._in_use.acquire(blocking=False):
                raise NemoLfrError(
                    "another thread is using this stream; let only one thread at a time push to a stream or flush it, "
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


@contextmanager
def _naming(stream: BaseStream) -> Iterator[None]:
    """Put the name of a stream, if it has one, before the message of an error in this context."""
    try:
        yield
    except NemoLfrError as error:
        if not stream._name:
            raise
        raise type(error)(f"{stream._name}: {error}") from error


def push(streams: Sequence[Any], inputs: Sequence[Any], kind: type[BaseStream], advance: Advance) -> list[np.ndarray]:
    """Push input to several streams of one codec, and return the new output items [..., k] of each stream.

    Args:
        streams: streams of the class `kind`, without duplicates.
        inputs: new input of each stream.
        kind: class of the streams.
        advance: function that processes checked input of the streams.

    Raises:
        NemoLfrError: if a stream is unsuitable (for example, flushed before), if an input is invalid, or if a result
            is not finite.
    """
    streams = _batch(streams, kind)
    inputs = _one_each(inputs, streams, "chunks", "pass one chunk, possibly empty, for each stream")
    if not streams:
        return []
    with _exclusive(streams):
        return _push_checked(streams, inputs, advance)


def flush(
    streams: Sequence[Any], lengths: Sequence[Any] | None, kind: type[BaseStream], advance: Advance
) -> list[np.ndarray]:
    """End several streams of one codec, and return the remaining output items [..., k] of each stream.

    Args:
        streams: streams of the class `kind`, without duplicates.
        lengths: length of each recording in samples, or None for each recording whose length is unknown. If `lengths`
            itself is None, no length is known.
        kind: class of the streams.
        advance: function that processes the last input of the streams.

    Raises:
        NemoLfrError: if a stream is unsuitable (for example, flushed before), if `lengths` is invalid, or if a result
            is not finite.
    """
    streams = _batch(streams, kind)
    if lengths is None:
        lengths = [None] * len(streams)
    lengths = _one_each(lengths, streams, "lengths", "pass one length for each stream")
    if not streams:
        return []
    with _exclusive(streams):
        ends = []
        for stream, length in zip(streams, lengths, strict=True):
            with _naming(stream):
                ends.append(stream._end(length))
        begun = [number for number, stream in enumerate(streams) if stream._num_in]
        rests = _advance_some(streams, begun, [end for end, _ in ends], True, advance)
        return [rest[..., :remaining] for rest, (_, remaining) in zip(rests, ends, strict=True)]


def _advance_some(
    streams: Sequence[Any], numbers: list[int], inputs: list[torch.Tensor], last: bool, advance: Advance
) -> list[np.ndarray]:
    """Process the inputs of some streams, and return the output of every stream.

    Args:
        streams: all streams.
        numbers: indices of the streams whose input is processed. The other streams get an empty output.
        inputs: input of every stream.
        last: whether the recordings end with this input.
        advance: function that processes the inputs.
    """
    results = [stream._empty() for stream in streams]
    if numbers:
        outputs = advance([streams[number] for number in numbers], [inputs[number] for number in numbers], last)
        for number, output in zip(numbers, outputs, strict=True):
            results[number] = output
    return results


def _batch(streams: Sequence[Any], kind: type[BaseStream]) -> list[Any]:
    """Check that the streams can form a batch, and return them as a list."""
    streams = _listed(streams, "streams")
    for stream in streams:
        if not isinstance(stream, kind):
            name = shorten(type(stream).__name__)
            raise NemoLfrError(f"a stream is of type {name}; pass only {kind.__name__} objects.")
        if stream.codec is not streams[0].codec:
            raise NemoLfrError("the streams belong to several codecs; pass the streams of one codec.")
    if len({id(stream) for stream in streams}) < len(streams):
        raise NemoLfrError("the same stream was passed twice; pass each stream only once per call.")
    for number, stream in enumerate(streams):
        stream._name = f"stream {number}" if len(streams) > 1 else ""
    return streams


def _one_each(values: Sequence[Any], streams: list[Any], what: str, remedy: str) -> list[Any]:
    """Check that there is one value for each stream, and return the values as a list."""
    values = _listed(values, what)
    if len(streams) != len(values):
        raise NemoLfrError(f"got {len(values)} {what} for {len(streams)} streams; {remedy}.")
    return values


def _listed(values: Any, what: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise NemoLfrError(f"{what} have the type {shorten(type(values).__name__)}; pass a list of {what}.") from None


def _push_checked(streams: Sequence[Any], inputs: Sequence[Any], advance: Advance) -> list[np.ndarray]:
    """Validate all inputs, then process them in pieces of bounded size."""
    checked = []
    for stream, new in zip(streams, inputs, strict=True):
        with _naming(stream):
            checked.append(stream._check(new))
    size = streams[0]._piece
    longest = max(new.shape[-1] for new in checked)
    results = []
    for at in range(0, max(longest, 1), size):
        taken = []
        for stream, new in zip(streams, checked, strict=True):
            taken.append(stream._take(new[..., at : at + size]))
            stream._has_more = stream._has_frame(new.shape[-1] - at - size)
        # Without a complete frame, a stream has nothing to compute, and a check of its network would take too long.
        ready = [number for number, new in enumerate(taken) if new.shape[-1]]
        results.append(_advance_some(streams, ready, taken, False, advance))
    return [np.concatenate(pieces, axis=-1) for pieces in zip(*results, strict=True)]


def run_step(
    streams: Sequence[BaseStream],
    inputs: list[torch.Tensor],
    last: bool,
    step: Step,
    check: Callable[[np.ndarray], None],
) -> list[np.ndarray]:
    """Run a network on the new input of every stream, and return the new output items of each stream.

    Args:
        streams: streams whose state is updated.
        inputs: new input of each stream.
        last: whether the recordings end with this input.
        step: function that runs the network on a batch.
        check: function that raises an error for results that are not finite.
    """
    states, results = run_batched([stream._state for stream in streams], inputs, last, step)
    for stream, state in zip(streams, states, strict=True):
        stream._state = state
    computed = [stream._num_computed + result.shape[-1] for stream, result in zip(streams, results, strict=True)]
    early = [
        number
        for number, stream in enumerate(streams)
        if not (stream.exact or last or stream._has_more)
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
        with _naming(stream):
            check(returned[-1][None])
    return returned
