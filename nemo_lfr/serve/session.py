"""One live stream of an engine: its queues, between an asyncio task and the engine's thread."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.streaming import StreamDecoder, StreamEncoder


@dataclass(frozen=True)
class EngineLimits:
    """Limits of an engine.

    Attributes:
        max_streams: maximum number of open sessions, including background sessions for files.
        max_batch: maximum number of streams per step.
        max_frames: maximum number of frames of all streams per step, which limits its memory and duration.
        chunk_frames: maximum number of frames of one stream per step. Larger chunks need less computation but make
            other streams wait longer. The chunks of `ramp` do not depend on it.
        max_pending_s: unprocessed input of one stream, in seconds, above which `Session.feed` waits.
        max_uncollected_s: uncollected results of one stream, in seconds, above which it is not advanced.
    """

    max_streams: int = 64
    max_batch: int = 64
    max_frames: int = 96
    chunk_frames: int = 4
    max_pending_s: float = 10.0
    max_uncollected_s: float = 10.0


class Session:
    """One live stream of an engine, used from one asyncio task.

    Attributes:
        kind: "encode" or "decode".
        first_result_s: seconds from the first input to the first result; None before that.
    """

    def __init__(
        self,
        codec: Codec[Any],
        limits: EngineLimits,
        changed: threading.Condition,
        stream: StreamEncoder | StreamDecoder,
        ramp: tuple[int, ...],
        live: bool,
    ) -> None:
        self.kind = "encode" if isinstance(stream, StreamEncoder) else "decode"
        self.first_result_s: float | None = None
        self._codec, self._limits, self._changed = codec, limits, changed
        self._stream, self._live = stream, live
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[np.ndarray | BaseException | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._room.set()
        # The attributes below are guarded by the engine's lock.
        self._pending: deque[np.ndarray] = deque()
        self._num_pending = 0  # items of the input that are not processed
        self._num_uncollected = 0  # items of the output that were not collected
        # Frames of the next chunks. Without a ramp, the first chunk has all frames that the first result depends on:
        # smaller chunks would give no whole frame sooner, and need more steps.
        self._ramp = deque(ramp or (stream.first_delay_frames + 1,))
        self._started: float | None = None
        self._played_until: float | None = None  # when the audio so far will have been played
        self._taken_at = 0.0  # when the last step with this stream began
        self._ended = self._finished = False
        self._num_samples: int | None = None

    @property
    def delay_frames(self) -> int:
        """Frames of lookahead that results wait for."""
        return self._stream.delay_frames

    @property
    def _frame(self) -> int:
        """Items of a frame of the input."""
        return self._codec.samples_per_frame if self.kind == "encode" else 1

    @property
    def _frame_out(self) -> int:
        """Items of a frame of the output."""
        return 1 if self.kind == "encode" else self._codec.samples_per_frame

    async def feed(self, items: np.ndarray) -> None:
        """Queue input, and wait while too much of it is unprocessed.

        Args:
            items: valid samples [n] or tokens [C, k] of this stream's codec.
        """
        with self._changed:
            # A finished stream reads no input, and an empty chunk would stay in the queue until the next one.
            if self._finished or not items.shape[-1]:
                return
            self._started = self._started or time.monotonic()
            self._pending.append(items)
            self._num_pending += items.shape[-1]
            if self._is_full():
                self._room.clear()
            self._changed.notify()
        await self._room.wait()

    def end(self, num_samples: int | None = None) -> None:
        """Mark the end of the input.

        Args:
            num_samples: when decoding, the length of the recording in samples, to which the audio is trimmed; if
                None, it is not trimmed.
        """
        with self._changed:
            self._ended, self._num_samples = True, num_samples
            self._changed.notify()

    async def collect(self) -> np.ndarray | None:
        """Return the next result, tokens [C, k] or samples [n], or None after the last one.

        Raises:
            NemoLfrError: the input cannot be encoded or decoded.
            ShutdownError: the engine was closed.
        """
        result = await self._results.get()
        if isinstance(result, BaseException):
            raise result
        if result is not None:
            with self._changed:
                self._num_uncollected -= result.shape[-1]
                self._changed.notify()
        return result

    def empty_result(self) -> np.ndarray:
        """Return a result without frames: tokens [C, 0] or samples [0]."""
        if self.kind == "decode":
            return np.zeros(0, np.float32)
        return np.zeros((self._codec.num_codebooks, 0), np.int32)

    def _limit(self, seconds: float) -> int:
        return max(1, int(seconds * self._codec.frame_rate))

    def _ready(self) -> bool:
        """Return whether a step could advance this stream."""
        if self._finished or self._num_uncollected > self._limit(self._limits.max_uncollected_s) * self._frame_out:
            return False
        return self._ended or self._is_full() or self._num_pending >= self._wanted() * self._frame

    def _is_full(self) -> bool:
        """Return whether `feed` waits for this stream to be advanced."""
        return self._num_pending > self._limit(self._limits.max_pending_s) * self._frame

    def _wanted(self) -> int:
        return self._ramp[0] if self._ramp else 1

    def _urgency(self) -> tuple[bool, float]:
        """Return a key that sorts live streams first, by the time at which they need a result.

        Background streams come last and take turns.
        """
        return (False, self._played_until or self._started or 0.0) if self._live else (True, self._taken_at)

    def _available(self) -> int:
        """Return the number of frames that the next step could process."""
        return min(self._num_pending // self._frame, self._limits.chunk_frames)

    def _next_frames(self) -> int:
        """Return the largest number of frames that the next step takes from this stream."""
        return self._ramp[0] if self._ramp else max(1, self._available())

    def _take(self, frames: int) -> np.ndarray:
        """Remove and return the next chunk of the input, of `frames` frames or the next number of the ramp."""
        self._taken_at = time.monotonic()
        wanted = (self._ramp.popleft() if self._ramp else frames) * self._frame
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
        return np.zeros((self._codec.num_codebooks, 0), np.int64)

    def _deliver(self, result: np.ndarray) -> None:
        """Pass a result to the asyncio task."""
        if not result.shape[-1]:
            return
        now = time.monotonic()
        if self.first_result_s is None and self._started is not None:
            self.first_result_s = now - self._started
        seconds = result.shape[-1] / self._frame_out / self._codec.frame_rate
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
        except RuntimeError:  # the event loop was closed; nobody waits for this stream
            self._finished = True
