"""Continuous batching of live streams.

One thread runs the codec. At each step, the thread selects the most urgent stream that has input, and other streams of
the same kind (encode or decode). It processes one chunk of each selected stream, in one batch. Each stream gets the
same results as if it were processed alone.

The queues of a stream have limits, so memory is bounded. `Session.feed` waits while a stream has too much
unprocessed input. The engine pauses a stream while its client has not collected earlier results.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.cpu.malloc import trim_malloc
from nemo_lfr.codec.streaming import (
    StreamDecoder,
    StreamEncoder,
    flush_decoders,
    flush_encoders,
    push_decoders,
    push_encoders,
)
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.modules.weights import unchanged_networks
from nemo_lfr.serve.session import EngineLimits, Session

logger = logging.getLogger(__name__)

TRIM_INTERVAL_S = 30.0  # minimum time between trims of the heap, which return freed memory to the system
SHUTTING_DOWN = "the server is shutting down; connect to another one."


class OverloadedError(NemoLfrError):
    """Raised for a new stream or file if the server is at its limit of streams or files.

    The subclass `ShutdownError` is raised if the engine is shutting down.
    """


class ShutdownError(OverloadedError):
    """Raised for streams and files, both new and open, while the engine is shutting down."""


@dataclass(frozen=True)
class Step:
    """Measurements of one step of the engine, which processes one batch.

    Attributes:
        kind: "encode" or "decode".
        num_streams: number of streams in the batch.
        num_frames: number of input frames that the step processed, summed over the streams.
        seconds: duration of the step.
    """

    kind: str
    num_streams: int
    num_frames: int
    seconds: float


class Engine:
    """Thread that encodes and decodes many sessions with one codec.

    A session is a live stream or a posted file. The constructor starts the thread, and `close` stops it.

    Args:
        codec: PyTorch codec. Other threads may use the codec at the same time, but must not change its weights.
        limits: limits of the engine; the defaults of `EngineLimits` if None.
        on_step: function that the engine's thread calls after each completed step, with measurements of the step.

    Raises:
        NemoLfrError: if the codec's backend cannot process streams in batches.

    Attributes:
        draining: whether new sessions are refused. The server sets this attribute when it shuts down.
        num_opened: number of sessions opened so far.
        fault: text of the last unexpected error that ended all streams of a step. It is None again after a step in
            which at least one stream succeeded.
    """

    def __init__(
        self, codec: Codec[Any], limits: EngineLimits | None = None, on_step: Callable[[Step], None] | None = None
    ) -> None:
        for stream in (codec.stream_encoder(), codec.stream_decoder()):
            if not isinstance(stream, StreamEncoder | StreamDecoder):
                raise NemoLfrError(
                    f"{codec.name}: the server needs a backend that can batch streams; load a .nemo checkpoint, which "
                    "uses the PyTorch backend."
                )
            _warm_up(stream)
        self.codec, self.limits = codec, limits or EngineLimits()
        self.draining = False
        self.num_opened = 0
        self.fault: str | None = None
        self._step_started: float | None = None  # while a step is running
        self._trimmed, self._untrimmed = 0.0, False  # time of the last trim; whether memory was freed since then
        self._on_step = on_step
        self._sessions: list[Session] = []
        self._changed = threading.Condition()
        self._start_thread()

    def __len__(self) -> int:
        """Return the number of open sessions."""
        return len(self._sessions)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self._thread.is_alive()

    @property
    def step_s(self) -> float:
        """Duration of the current step so far, in seconds; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    @contextmanager
    def encoder(self, lookahead: int | None = None, *, live: bool = True) -> Iterator[Session]:
        """Open a session that encodes one recording. The session is closed when the context ends.

        Args:
            lookahead: number of later frames that a token may depend on; see `Codec.stream_encoder`.
            live: whether the session is a live stream. Other sessions (files) wait while a live stream has input.

        Yields:
            A session whose input is samples [n] at the codec's sample rate.

        Raises:
            OverloadedError: if the engine has `max_streams` sessions.
            ShutdownError: if the engine is shutting down.
            NemoLfrError: if `lookahead` is invalid.
        """
        yield from self._open(lambda: self.codec.stream_encoder(lookahead), (), live)

    @contextmanager
    def decoder(
        self,
        lookahead: int | None = None,
        first_lookahead: int | None = None,
        *,
        ramp: Sequence[int] = (),
        live: bool = True,
    ) -> Iterator[Session]:
        """Open a session that decodes one recording. The session is closed when the context ends.

        Args:
            lookahead: number of later frames that a sample may depend on; see `Codec.stream_decoder`.
            first_lookahead: a smaller lookahead for the first frames; see `Codec.stream_decoder`.
            ramp: numbers of frames in the first chunks, such as (1, 2, 4). If frames arrive one by one, small first
                chunks give the first audio sooner. By default, the first chunk contains all frames that the first
                frame of audio depends on.
            live: whether the session is a live stream. Other sessions (files) wait while a live stream has input.

        Yields:
            A session whose input is tokens [C, k].

        Raises:
            OverloadedError: if the engine has `max_streams` sessions.
            ShutdownError: if the engine is shutting down.
            NemoLfrError: if a lookahead is invalid.
        """
        yield from self._open(lambda: self.codec.stream_decoder(lookahead, first_lookahead), tuple(ramp), live)

    def _open(self, open_stream: Callable[[], object], ramp: tuple[int, ...], live: bool) -> Iterator[Session]:
        with self._changed:
            if self.draining or self._closing:
                raise ShutdownError(SHUTTING_DOWN)
            if len(self._sessions) >= self.limits.max_streams:
                raise OverloadedError(
                    f"the server is at its limit of {self.limits.max_streams} streams; try again later."
                )
            stream = open_stream()
            assert isinstance(stream, StreamEncoder | StreamDecoder)
            session = Session(self.codec, self.limits, self._changed, stream, ramp, live)
            self._sessions.append(session)
            self.num_opened += 1
        try:
            yield session
        finally:
            with self._changed:
                session._finished = self._untrimmed = True
                self._sessions.remove(session)
                self._changed.notify_all()

    def start(self) -> None:
        """Start the thread again after `close`. Before `close`, this does nothing."""
        if self._closing:
            self.draining = False
            self._start_thread()

    def close(self) -> None:
        """Stop the thread.

        In open sessions, `collect` returns the results that have been computed, and then raises `ShutdownError`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            for session in self._sessions:
                session._finish(ShutdownError(SHUTTING_DOWN))

    def _start_thread(self) -> None:
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="nemo-lfr engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with unchanged_networks():
            self._advance_streams()

    def _advance_streams(self) -> None:
        while batch := self._next_batch():
            try:
                self._step_started = time.monotonic()
                with self._changed:
                    chunks = self._take(batch)
                step = self._advance(batch, chunks)
            except Exception as error:  # the thread must continue for the other streams
                logger.exception("a step with %d streams failed", len(batch))
                self.fault = _description(error)
                with self._changed:
                    for session in batch:
                        session._finish(error)
                continue
            finally:
                self._step_started, self._untrimmed = None, True
            try:
                if self._on_step:
                    self._on_step(step)
            except Exception:  # raised by the caller's function
                logger.exception("on_step failed")

    def _next_batch(self) -> list[Session]:
        """Wait until streams have input, and return the streams of the next step; [] if the engine is being closed."""
        with self._changed:
            while not self._closing:
                until_trim = self._trim_when_due()
                if batch := self._choose():
                    return batch
                self._changed.wait(until_trim)
        return []

    def _trim_when_due(self) -> float | None:
        """Trim the heap if memory may have been freed, at most once in `TRIM_INTERVAL_S` seconds.

        Without trims, fragmentation lets the memory of a busy server grow. A trim takes about 10 ms.

        Returns:
            Seconds until the next trim; None if no trim is needed until more memory is freed.
        """
        if not self._untrimmed:
            return None
        left = self._trimmed + TRIM_INTERVAL_S - time.monotonic()
        if left > 0:
            return left
        trim_malloc()
        self._trimmed, self._untrimmed = time.monotonic(), False
        return None

    def _choose(self) -> list[Session]:
        """Return the streams of the next step: the most urgent ones of one kind, within `limits`.

        The kind (encode or decode) is that of the most urgent stream. Background sessions are chosen only if no live
        stream is ready.
        """
        ready = sorted((session for session in self._sessions if session._ready()), key=Session._urgency)
        if ready and ready[0]._live:
            ready = [session for session in ready if session._live]
        chosen: list[Session] = []
        num_frames = 0
        for session in ready:
            if session.kind != ready[0].kind:
                continue
            num_frames += session._next_frames()
            if len(chosen) == self.limits.max_batch or (chosen and num_frames > self.limits.max_frames):
                break
            chosen.append(session)
        return chosen

    def _take(self, batch: list[Session]) -> list[np.ndarray]:
        """Take a chunk from each stream.

        All chunks have the same number of frames, unless a ramp sets another number or the input of a stream ends.
        """
        available = [session._available() for session in batch if not session._ended]
        frames = max(1, min(available, default=self.limits.chunk_frames))
        return [session._take(frames) for session in batch]

    def _advance(self, batch: list[Session], chunks: list[np.ndarray]) -> Step:
        started = time.monotonic()
        decode = batch[0].kind == "decode"
        results = _for_each(push_decoders if decode else push_encoders, [session._stream for session in batch], chunks)
        ends = [
            number
            for number, session in enumerate(batch)
            if session._is_last_step and not isinstance(results[number], BaseException)
        ]
        if ends:
            for number, rest in zip(ends, self._flush([batch[number] for number in ends]), strict=True):
                failed = isinstance(rest, BaseException)
                results[number] = rest if failed else np.concatenate([results[number], rest], axis=-1)
        self._note_fault(results)
        with self._changed:
            for session, result in zip(batch, results, strict=True):
                if isinstance(result, BaseException):
                    session._finish(result)
                    continue
                session._deliver(result)
                if session._stream._finished:
                    session._finish(None)
        frames = sum(chunk.shape[-1] for chunk in chunks) // batch[0]._frame
        return Step(batch[0].kind, len(batch), frames, time.monotonic() - started)

    def _note_fault(self, results: list[Any]) -> None:
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) < len(results):
            self.fault = None
        elif faults := [error for error in errors if not isinstance(error, NemoLfrError)]:
            self.fault = _description(faults[0])

    @staticmethod
    def _flush(sessions: list[Session]) -> list[Any]:
        """End streams of one kind. Return, for each stream, its remaining result or an exception."""
        streams = [session._stream for session in sessions]
        if sessions[0].kind == "decode":
            return _for_each(flush_decoders, streams, [session._num_samples for session in sessions])
        return _for_each(flush_encoders, streams)


def _for_each(function: Callable[..., list[np.ndarray]], streams: list[Any], *arguments: list[Any]) -> list[Any]:
    """Call a function with a batch of streams, and return a result or an exception for each stream.

    If the batch fails, each stream is processed alone, so that streams without an error get their results.
    """
    try:
        return list(function(streams, *arguments))
    except Exception as error:
        if len(streams) == 1:
            return [error]
    results: list[Any] = []
    for values in zip(streams, *arguments, strict=True):
        try:
            results += function(*([value] for value in values))
        except Exception as error:  # reported to the client of this stream
            results.append(error)
    return results


def _warm_up(stream: StreamEncoder | StreamDecoder) -> None:
    """Process some zeros, so that the first client does not wait for weights to load and kernels to compile."""
    for num_frames in (stream.delay_frames + 1, 1):
        if isinstance(stream, StreamEncoder):
            stream.push(np.zeros(num_frames * stream.codec.samples_per_frame, np.float32))
        else:
            stream.push(np.zeros((stream.codec.num_codebooks, num_frames), np.int64))
    stream.flush()


def _description(error: BaseException) -> str:
    return f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 200)}"
