"""Convert lengths between samples, frames and bits, and split long recordings into windows of frames."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemo_lfr.errors import NemoLfrError


def num_frames(num_samples: int, samples_per_frame: int) -> int:
    """Return how many frames `num_samples` samples fill, rounded up."""
    return -(-num_samples // samples_per_frame)


def bits_per_frame(levels: Sequence[int], num_codebooks: int) -> float:
    """Return the bits of information in one frame: num_codebooks * log2(prod(levels))."""
    return num_codebooks * math.log2(math.prod(levels))


def bytes_per_frame(levels: Sequence[int], num_codebooks: int) -> int:
    """Return the number of bytes in a packed frame: 11 for 8 codebooks of 2016 entries.

    A frame is packed as one mixed-radix number.
    """
    largest: int = math.prod(levels) ** num_codebooks - 1
    return (largest.bit_length() + 7) // 8


def duration_text(seconds: float) -> str:
    """Return a duration for a message in the largest fitting unit: "2.50 hours", "9.5 minutes" or "17.4 seconds"."""
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"


def check_first_lookahead(first_lookahead: int | None, lookahead: int | None) -> None:
    """Check the lookahead for the start of a stream.

    Args:
        first_lookahead: lookahead in frames for the start of the recording; None for the value of `lookahead`.
        lookahead: lookahead in frames; None for the codec's full lookahead.

    Raises:
        NemoLfrError: if `first_lookahead` is larger than `lookahead`.
    """
    if first_lookahead is not None and lookahead is not None and first_lookahead > lookahead:
        raise NemoLfrError(
            f"first_lookahead is {first_lookahead}, but lookahead is only {lookahead}; pass a first_lookahead of at "
            f"most {lookahead}, or a larger lookahead."
        )


@dataclass(frozen=True)
class Context:
    """Numbers of earlier and later frames that the output for a frame depends on."""

    past: int
    future: int


@dataclass(frozen=True)
class Window:
    """Frames [start, stop) to process so that the output for frames [keep_start, keep_stop) is exact."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int

    @property
    def num_frames(self) -> int:
        """Number of frames to process."""
        return self.stop - self.start

    @property
    def kept(self) -> slice:
        """Slice of the frames to keep, relative to the first frame of the window."""
        return slice(self.keep_start - self.start, self.keep_stop - self.start)


def plan_windows(total: int, chunk: int, context: Context) -> Iterator[Window]:
    """Split `total` frames into chunks and yield a window with context for each.

    The output for the kept frames is the same as if the whole recording were processed at once. A last chunk that is
    not longer than the future context is merged into the previous one.

    Args:
        total: number of frames in the recording.
        chunk: number of frames to keep from each window; the last window may keep fewer or more.
        context: context of each frame.

    Yields:
        Windows in order; their kept frames cover the recording exactly once.
    """
    begin = 0
    while begin < total:
        end = begin + chunk
        if end + context.future >= total:
            end = total
        yield Window(max(0, begin - context.past), min(total, end + context.future), begin, end)
        begin = end
