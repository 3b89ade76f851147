"""Continuous batching of live streams.

One thread runs the network. At each step it selects the most urgent stream that has input and other streams of the
same kind, and advances them as one batch. `push_encoders` and `push_decoders` guarantee that each stream gets the
results that it would get alone.

Memory is bounded: `Session.feed` waits while a stream has too much unprocessed input, and a stream with too many
uncollected results is not advanced.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.streaming import StreamDecoder, StreamEncoder, push_decoders, push_encoders
from nemo_lfr.errors import NemoLfrError

logger = logging.getLogger(__name__)


class OverloadedError(NemoLfrError):
    """Error for a new stream when the engine is full or shutting down."""


@dataclass(frozen=True)
class EngineLimits:
    """Limits of an engine.

    Attributes:
        max_streams: maximum number of open sessions, including background sessions for files.
        max_batch: maximum number of streams per step.
        chunk_frames: maximum number of frames of one stream per step. Larger chunks need less computation but make
            other streams wait longer. The chunks of `ramp` do not depend on it.
        max_pending_s: unprocessed input of one stream, in seconds, above which `Session.feed` waits.
        max_uncollected_s: uncollected results of one stream, in seconds, above which it is not advanced.
    """

    max_streams: int = 64
    max_batch: int = 64
    chunk_frames: int = 4
    max_pending_s: float = 10.0
    max_uncollected_s: float = 10.0


@dataclass(frozen=True)
class Step:
    """Measurements of one step, for metrics.

    Attributes:
        kind: "encode" or "decode".
        num_streams: number of streams in the batch.
        num_frames: total number of input frames of these streams.
        seconds: duration of the step.
    """

    kind: str
    num_streams: int
    num_frames: int
    seconds: float


class Session:
    """One recording in an engine; used from a single event loop.

    One task may feed the session while another collects its results.

    Attributes:
        kind: "encode" or "decode".
        first_result_s: seconds from the first input to the first result; None before the first result.
    """

    def __init__(
        self, engine: "Engine", stream: StreamEncoder | StreamDecoder, ramp: tuple[int, ...], live: bool
    ) -> None:
        self.kind = "encode" if isinstance(stream, StreamEncoder) else "decode"
        self.first_result_s: float | None = None
        self._engine, self._stream, self._live = engine, stream, live
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[np.ndarray | BaseException | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._room.set()
        # The attributes below are guarded by the engine's lock.
        self._pending: deque[np.ndarray] = deque()
        self._num_pending = 0  # unprocessed input: samples of an encoder, frames of a decoder
        self._num_uncollected = 0  # uncollected output: frames of an encoder, samples of a decoder
        self._ramp = deque(ramp)  # frames of the next chunks
        self._started: float | None = None
        self._played_until: float | None = None  # when the audio so far will have been played
        self._taken_at = 0.0  # when the last step with this stream began
        self._ended = self._finished = False
        self._num_samples: int | None = None

    @property
    def delay_frames(self) -> int:
        """Number of frames of right context that each result waits for."""
        return self._stream.delay_frames

    @property
    def _frame(self) -> int:
        """Number of input items per frame."""
        return self._engine.codec.samples_per_frame if self.kind == "encode" else 1

    @property
    def _frame_out(self) -> int:
        """Number of output items per frame."""
        return 1 if self.kind == "encode" else self._engine.codec.samples_per_frame

    async def feed(self, items: np.ndarray) -> None:
        """Queue input, then wait while too much of it is unprocessed.

        Args:
            items: samples [n] at the codec's sample rate, or tokens [C, k]. The caller has validated them.
        """
        with self._engine._changed:
            # Nobody takes the input of a finished stream, and an empty piece would stay in the queue until the next.
            if self._finished or not items.shape[-1]:
                return
            self._started = self._started or time.monotonic()
            self._pending.append(items)
            self._num_pending += items.shape[-1]
            if self._is_full():
                self._room.clear()
            self._engine._changed.notify()
        await self._room.wait()

    def end(self, num_samples: int | None = None) -> None:
        """Mark the end of the input.

        Args:
            num_samples: for a decoder, the length of the original recording in samples, to which the audio is trimmed;
                None for complete frames. Encoders ignore it.
        """
        with self._engine._changed:
            self._ended, self._num_samples = True, num_samples
            self._engine._changed.notify()

    async def collect(self) -> np.ndarray | None:
        """Wait for the next result and return it.

        Returns:
            Tokens [C, k] or float32 samples [n]; None after the last result.

        Raises:
            NemoLfrError: the input cannot be encoded or decoded.
            OverloadedError: the engine was closed.
        """
        result = await self._results.get()
        if isinstance(result, BaseException):
            raise result
        if result is not None:
            with self._engine._changed:
                self._num_uncollected -= result.shape[-1]
                self._engine._changed.notify()
        return result

    def empty_result(self) -> np.ndarray:
        """Return an empty result: int32 tokens [C, 0] or float32 samples [0]."""
        if self.kind == "decode":
            return np.zeros(0, np.float32)
        return np.zeros((self._engine.codec.num_codebooks, 0), np.int32)

    def _limit(self, seconds: float) -> int:
        return max(1, int(seconds * self._engine.codec.frame_rate))

    def _ready(self) -> bool:
        """Return whether a step could advance this stream."""
        if (
            self._finished
            or self._num_uncollected > self._limit(self._engine.limits.max_uncollected_s) * self._frame_out
        ):
            return False
        return self._ended or self._is_full() or self._num_pending >= self._wanted() * self._frame

    def _is_full(self) -> bool:
        """Return whether `feed` waits for this stream to be advanced."""
        return self._num_pending > self._limit(self._engine.limits.max_pending_s) * self._frame

    def _wanted(self) -> int:
        return self._ramp[0] if self._ramp else 1

    def _urgency(self) -> tuple[bool, float]:
        """Return a key that sorts live streams first, by the time at which they need a result.

        Background streams follow, and take turns.
        """
        return (False, self._played_until or self._started or 0.0) if self._live else (True, self._taken_at)

    def _take(self) -> np.ndarray:
        """Remove and return the next chunk of the input."""
        self._taken_at = time.monotonic()
        frames = self._ramp.popleft() if self._ramp else self._engine.limits.chunk_frames
        wanted = frames * self._frame
        pieces: list[np.ndarray] = []
        while self._pending and wanted > 0:
            piece = self._pending.popleft()
            if piece.shape[-1] > wanted:
                self._pending.appendleft(piece[..., wanted:])
                piece = piece[..., :wanted]
            pieces.append(piece)
            wanted -= piece.shape[-1]
            self._num_pending -= piece.shape[-1]
        if not self._is_full():
            self._call(self._room.set)
        return np.concatenate(pieces, axis=-1) if pieces else self._empty()

    def _empty(self) -> np.ndarray:
        if self.kind == "encode":
            return np.zeros(0, np.float32)
        return np.zeros((self._engine.codec.num_codebooks, 0), np.int64)

    def _deliver(self, result: np.ndarray) -> None:
        """Pass a result to the asyncio task."""
        if not result.shape[-1]:
            return
        now = time.monotonic()
        if self.first_result_s is None and self._started is not None:
            self.first_result_s = now - self._started
        seconds = result.shape[-1] / self._frame_out / self._engine.codec.frame_rate
        self._played_until = max(self._played_until or now, now) + seconds
        self._num_uncollected += result.shape[-1]
        self._call(self._results.put_nowait, result)

    def _finish(self, error: BaseException | None) -> None:
        """End the stream: wake its tasks, and let `collect` raise the error or return None."""
        if self._finished:
            return
        self._finished = True
        self._call(self._results.put_nowait, error)
        self._call(self._room.set)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed, so nothing waits for this stream
            self._finished = True


class Engine:
    """Engine that encodes and decodes the sessions of one codec in a thread.

    The constructor starts the thread, and `close` stops it.

    Args:
        codec: PyTorch codec; other threads may use it at the same time.
        limits: limits of the engine; the defaults of `EngineLimits` if None.
        on_step: function that the engine's thread calls after each step.

    Raises:
        NemoLfrError: if streams of the codec's backend cannot be batched.

    Attributes:
        draining: whether new sessions are refused. A server sets it to shut down.
        num_opened: number of sessions opened so far.
    """

    def __init__(
        self, codec: Codec[Any], limits: EngineLimits | None = None, on_step: Callable[[Step], None] | None = None
    ) -> None:
        for stream in (codec.stream_encoder(), codec.stream_decoder()):  # loads the weights, too
            if not isinstance(stream, StreamEncoder | StreamDecoder):
                raise NemoLfrError(f"{codec.name}: streams of this backend cannot be batched; load a checkpoint.")
        self.codec, self.limits = codec, limits or EngineLimits()
        self.draining = False
        self.num_opened = 0
        self._on_step = on_step
        self._sessions: list[Session] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="nemo-lfr engine", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return the number of open sessions."""
        return len(self._sessions)

    @contextmanager
    def encoder(self, lookahead: int | None = None, *, live: bool = True) -> Iterator[Session]:
        """Open a session that encodes one recording; it ends with the context.

        Args:
            lookahead: frames of right context, see `Codec.stream_encoder`.
            live: whether the session is a live stream. Background sessions wait for all live streams.

        Yields:
            The session, for samples [n] at the codec's sample rate.

        Raises:
            OverloadedError: if the engine has `max_streams` sessions or is draining.
            NemoLfrError: if `lookahead` is invalid, or streams of the codec's backend cannot be batched.
        """
        yield from self._open(lambda: self.codec.stream_encoder(lookahead), (), live)

    @contextmanager
    def decoder(
        self, lookahead: int | None = None, *, ramp: Sequence[int] = (), live: bool = True
    ) -> Iterator[Session]:
        """Open a session that decodes one recording; it ends with the context.

        Args:
            lookahead: frames of right context, see `Codec.stream_decoder`.
            ramp: number of frames of each of the first chunks, such as (1, 2, 4). A chunk waits until all of its
                frames have arrived.
            live: whether the session is a live stream. Background sessions wait for all live streams.

        Yields:
            The session, for tokens [C, k].

        Raises:
            OverloadedError: as for `encoder`.
            NemoLfrError: as for `encoder`.
        """
        yield from self._open(lambda: self.codec.stream_decoder(lookahead), tuple(ramp), live)

    def _open(self, open_stream: Callable[[], object], ramp: tuple[int, ...], live: bool) -> Iterator[Session]:
        with self._changed:
            if self.draining or self._closing:
                raise OverloadedError("the server is shutting down; connect to another one.")
            if len(self._sessions) >= self.limits.max_streams:
                raise OverloadedError(f"the server has {self.limits.max_streams} streams, its limit; try again later.")
            stream = open_stream()
            assert isinstance(stream, StreamEncoder | StreamDecoder)
            session = Session(self, stream, ramp, live)
            self._sessions.append(session)
            self.num_opened += 1
        try:
            yield session
        finally:
            with self._changed:
                session._finished = True
                self._sessions.remove(session)
                self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread; `collect` of open sessions raises `OverloadedError` after the results so far."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            for session in self._sessions:
                session._finish(OverloadedError("the server is shutting down; connect to another one."))

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                with self._changed:
                    chunks = [session._take() for session in batch]
                step = self._advance(batch, chunks)
            except Exception as error:  # the thread must live on for the other streams
                logger.exception("a step of %d streams failed", len(batch))
                with self._changed:
                    for session in batch:
                        session._finish(error)
                continue
            try:
                if self._on_step:
                    self._on_step(step)
            except Exception:  # of the caller
                logger.exception("on_step failed")

    def _next_batch(self) -> list[Session]:
        """Wait for streams to advance, and return them; none when the engine is being closed."""
        with self._changed:
            while not self._closing:
                if batch := self._choose():
                    return batch
                self._changed.wait()
        return []

    def _choose(self) -> list[Session]:
        """Return the streams of the next step: the most urgent one and others of its kind.

        Background sessions are chosen only if no live stream is ready.
        """
        ready = sorted((session for session in self._sessions if session._ready()), key=Session._urgency)
        if ready and ready[0]._live:
            ready = [session for session in ready if session._live]
        return [session for session in ready if session.kind == ready[0].kind][: self.limits.max_batch]

    def _advance(self, batch: list[Session], chunks: list[np.ndarray]) -> Step:
        started = time.monotonic()
        results = self._push(batch, chunks)
        for number, session in enumerate(batch):
            last = session._ended and not session._num_pending
            if last and not isinstance(results[number], BaseException):
                results[number] = self._flush(session, results[number])
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

    @staticmethod
    def _push(batch: list[Session], chunks: list[np.ndarray]) -> list[Any]:
        """Push chunks to all streams, and return a result or an exception for each.

        If the batch fails, each stream is advanced alone, so that only the streams with an error end.
        """
        push: Callable[..., list[np.ndarray]] = push_encoders if batch[0].kind == "encode" else push_decoders
        streams = [session._stream for session in batch]
        try:
            return list(push(streams, chunks))
        except Exception as error:
            if len(batch) == 1:
                return [error]
        results: list[Any] = []
        for stream, chunk in zip(streams, chunks, strict=True):
            try:
                results += push([stream], [chunk])
            except Exception as error:  # reported to the client of this stream
                results.append(error)
        return results

    @staticmethod
    def _flush(session: Session, result: np.ndarray) -> Any:
        stream = session._stream
        try:
            rest = stream.flush(session._num_samples) if isinstance(stream, StreamDecoder) else stream.flush()
        except Exception as error:  # reported to the client of this stream
            return error
        return np.concatenate([result, rest], axis=-1)
