"""Session of one stream or file. Its queues connect asyncio tasks with the engine's thread."""

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

    An engine works in steps. In each step, it processes one chunk of each selected stream, in one batch.

    Attributes:
        max_streams: maximum number of open sessions, including background sessions for files.
        max_batch: maximum number of streams per step.
        max_frames: maximum number of frames per step, summed over its streams, to limit the memory and the duration of
            the step. A step with only one stream may have more frames.
        chunk_frames: maximum number of frames of one stream per step. Larger chunks need less computation but make
            other streams wait longer. The limit does not apply to the first chunk, nor to the chunks of a `ramp`.
        max_pending_s: maximum unprocessed input of one stream, in seconds of audio. Above this limit,
            `Session.feed` waits.
        max_uncollected_s: maximum uncollected results of one stream, in seconds of audio. Above this limit, the
            stream is paused.
    """

    max_streams: int = 64
    max_batch: int = 64
    max_frames: int = 48
    chunk_frames: int = 4
    max_pending_s: float = 10.0
    max_uncollected_s: float = 10.0


class Session:
    """One live stream or file that an engine processes. Use it from the event loop in which it was created.

    Attributes:
        kind: "encode" or "decode".
        first_result_s: seconds from the first input to the first result; None while there is no result.
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
        self._num_pending = 0  # input that is not processed yet, in samples (encoding) or frames (decoding)
        self._num_uncollected = 0  # results that were not collected, in frames (encoding) or samples (decoding)
        # Numbers of frames in the next chunks. Without a ramp, the first chunk has all frames that the first frame of
        # the result depends on. This is fastest if these frames arrive at once. If they arrive one by one, a ramp is
        # faster, because the first chunks are processed while the next frames arrive.
        self._ramp = deque(ramp or (stream.first_delay_frames + 1,))
        self._started: float | None = None
        self._played_until: float | None = None  # when the audio so far will have been played
        self._taken_at = 0.0  # when the last step with this stream began
        self._ended = self._finished = False
        self._num_samples: int | None = None

    @property
    def delay_frames(self) -> int:
        """Lookahead: number of later frames that must arrive before the result for a frame is returned."""
        return self._stream.delay_frames

    @property
    def _frame(self) -> int:
        """Length of one frame in the input: `samples_per_frame` when encoding, 1 when decoding."""
        return self._codec.samples_per_frame if self.kind == "encode" else 1

    @property
    def _frame_out(self) -> int:
        """Length of one frame in the results: 1 when encoding, `samples_per_frame` when decoding."""
        return 1 if self.kind == "encode" else self._codec.samples_per_frame

    @property
    def _is_last_step(self) -> bool:
        """Whether the input has ended and all of it was taken."""
        return self._ended and not self._num_pending

    async def feed(self, items: np.ndarray) -> None:
        """Queue input. If more than `max_pending_s` of audio is unprocessed, wait.

        Args:
            items: valid samples [n] or tokens [C, k] of this stream's codec.
        """
        with self._changed:
            # A finished stream takes no input. An empty piece would stay in the queue until more input arrives.
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
            num_samples: for decoding, the length of the recording in samples. The audio is trimmed to this length;
                None for no trimming.
        """
        with self._changed:
            self._ended, self._num_samples = True, num_samples
            self._changed.notify()

    async def collect(self) -> np.ndarray | None:
        """Wait for the next result, and return it: tokens [C, k] or samples [n]; None after the last result.

        Raises:
            NemoLfrError: if the input cannot be encoded or decoded.
            ShutdownError: if the engine was closed.
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
        return self._stream._empty()

    def _limit(self, seconds: float) -> int:
        return max(1, int(seconds * self._codec.frame_rate))

    def _ready(self) -> bool:
        """Return whether the next step could process a chunk of this stream."""
        if self._finished or self._num_uncollected > self._limit(self._limits.max_uncollected_s) * self._frame_out:
            return False
        return self._ended or self._is_full() or self._num_pending >= self._wanted() * self._frame

    def _is_full(self) -> bool:
        """Return whether there is so much unprocessed input that `feed` waits."""
        return self._num_pending > self._limit(self._limits.max_pending_s) * self._frame

    def _wanted(self) -> int:
        return self._ramp[0] if self._ramp else 1

    def _urgency(self) -> tuple[bool, float]:
        """Return a sort key. The stream with the smallest key is the most urgent.

        Live streams come first, in the order in which their clients run out of audio. Background sessions follow, the
        one that has waited longest first.
        """
        return (False, self._played_until or self._started or 0.0) if self._live else (True, self._taken_at)

    def _available(self) -> int:
        """Return the number of frames that the next step could process."""
        return min(self._num_pending // self._frame, self._limits.chunk_frames)

    def _next_frames(self) -> int:
        """Return the maximum number of frames of this stream that the next step processes."""
        frames = self._ramp[0] if self._ramp else max(1, self._available())
        # The last step also processes the frames that were waiting for their lookahead.
        ends = self._ended and self._num_pending <= frames * self._frame
        return frames + self._stream.delay_frames if ends else frames

    def _take(self, frames: int) -> np.ndarray:
        """Remove the next chunk from the queue and return it.

        The first chunks have the sizes in `ramp`, and later ones have `frames` frames. The last chunk may be shorter.
        """
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
        """Queue a result for `collect`."""
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
