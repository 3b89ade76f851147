"""Cut recordings into windows, and stack windows into batches.

The result for a frame depends on a limited number of frames around it, which are its context. A window consists of a
chunk of consecutive frames and their context, so the chunk gets the same results as in the whole recording. The
results for the context frames are discarded.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nemo_lfr.codec.arrays import Arrays
from nemo_lfr.codec.backend import Batching, Limits
from nemo_lfr.frames import Context, Window, num_frames, plan_windows


class PlacedWindow(NamedTuple):
    """Window of one recording in the caller's batch.

    Attributes:
        row: index of the recording in the batch.
        window: frames to run, and frames to keep.
    """

    row: int
    window: Window


class Batch(NamedTuple):
    """Batch of windows that run through the network together.

    Attributes:
        places: recording and window of each example.
        inputs: samples or tokens of the windows, [b, ..., T * items_per_frame], zero after each example's end.
    """

    places: list[PlacedWindow]
    inputs: Any

    @property
    def num_frames(self) -> list[int]:
        """Number of frames in each example."""
        return [place.window.num_frames for place in self.places]


class Cutter(NamedTuple):
    """Settings and methods that turn recordings into batches of windows.

    Attributes:
        arrays: array library of the recordings.
        limits: context and shortest input of the encoder or decoder that will run the windows.
        batching: window and batch sizes.
        chunk_frames: frames in one window of a long recording, not counting the context around them.
        items_per_frame: length of one frame on the last axis: `samples_per_frame` for audio, 1 for tokens.
        dtype: dtype of the recordings.
    """

    arrays: Arrays[Any]
    limits: Limits
    batching: Batching
    chunk_frames: int
    items_per_frame: int
    dtype: type[np.generic]

    def width(self, frames: int) -> int:
        """Return the width in frames to which a window of `frames` frames is padded."""
        multiple = self.batching.pad_multiple
        return -(-max(frames, self.limits.min_frames) // multiple) * multiple

    def batches(self, rows: Any, lengths: Sequence[int], totals: Sequence[int]) -> Iterator[Batch]:
        """Cut every recording into windows, and yield batches of windows with equal or similar padded widths.

        Args:
            rows: samples [B, T_audio] or tokens [B, C, T].
            lengths: number of samples (for audio) or frames (for tokens) in each recording.
            totals: number of frames in each recording; a partial last frame counts.
        """
        by_width: dict[int, list[PlacedWindow]] = {}
        for row, total in enumerate(totals):
            for window in plan_windows(total, self.chunk_frames, self.limits.context):
                by_width.setdefault(self.width(window.num_frames), []).append(PlacedWindow(row, window))
        for width, places in group_widths(by_width, self.batching.mix_widths):
            # Batches have 1, 2, 4, ... examples, so that few shapes occur and compiled kernels are reused.
            while places:
                count = min(len(places), max(1, self.batching.batch_frames // width))
                count = 1 << (count.bit_length() - 1)
                yield self._stack(rows, lengths, places[:count])
                places = places[count:]

    def _stack(self, rows: Any, lengths: Sequence[int], places: list[PlacedWindow]) -> Batch:
        size = self.items_per_frame
        width = max(self.width(place.window.num_frames) for place in places)
        inputs = self.arrays.zeros((len(places), *rows.shape[1:-1], width * size), self.dtype)
        for example, (row, window) in zip(inputs, places, strict=True):
            piece = rows[row, ..., window.start * size : lengths[row]]
            piece = piece[..., : window.num_frames * size]
            example[..., : piece.shape[-1]] = piece
        return Batch(places, inputs)


def group_widths(by_width: dict[int, list[Any]], mix: bool) -> Iterable[tuple[int, list[Any]]]:
    """Return pairs (width, windows). The windows of a pair may share a batch, and `width` is that of the widest one.

    Args:
        by_width: dict from padded width to the windows of this width.
        mix: whether windows of similar widths form a group, which is faster on a GPU. Groups with wider windows then
            come first. If false, all windows of a group have one width.
    """
    if not mix:
        return by_width.items()
    groups: dict[int, list[Any]] = {}
    shared = 0
    for width in sorted(by_width, reverse=True):
        if 4 * width < 3 * shared or not shared:
            shared = width
        groups.setdefault(shared, []).extend(by_width[width])
    return groups.items()


def place_windows(
    out: Any,
    places: Sequence[PlacedWindow],
    results: Any,
    items_per_frame: int = 1,
    lengths: Sequence[int] | None = None,
) -> None:
    """Copy the results of each window to their place in `out`, except the results for context frames.

    Args:
        out: output of the whole batch, [B, ..., T * items_per_frame]; changed in place.
        places: recording and window of each example.
        results: results for the windows, [b, ..., t * items_per_frame].
        items_per_frame: length of one frame on the last axis: `samples_per_frame` for audio, 1 for tokens.
        lengths: number of valid samples or frames to copy to each row of `out`; None if all are valid.
    """
    for (row, window), result in zip(places, results, strict=True):
        start, stop = (edge * items_per_frame for edge in (window.keep_start, window.keep_stop))
        if lengths is not None:
            stop = min(stop, lengths[row])
        first = window.kept.start * items_per_frame
        out[row, ..., start:stop] = result[..., first : first + stop - start]


def rolling_windows(
    blocks: Iterable[np.ndarray], items_per_frame: int, chunk: int, context: Context
) -> Iterator[tuple[np.ndarray, Window]]:
    """Cut a recording of unknown length into the windows that `frames.plan_windows` would return.

    Args:
        blocks: consecutive samples or tokens, [..., n] with any n.
        items_per_frame: length of one frame on the last axis: `samples_per_frame` for audio, 1 for tokens.
        chunk: frames in one window, not counting the context around them.
        context: context of the encoder or decoder.

    Yields:
        The samples or tokens of each window, and the window.
    """
    held: list[np.ndarray] = []  # samples or tokens from frame `first` on
    num_held, first, done = 0, 0, 0

    def take(window: Window) -> np.ndarray:
        nonlocal held
        held = [np.concatenate(held, axis=-1)]
        return held[0][..., : (window.stop - first) * items_per_frame]

    for block in blocks:
        if not block.shape[-1]:
            continue
        held.append(block)
        num_held += block.shape[-1]
        # A window is ready once at least one sample or token follows its context.
        while num_held > (done + chunk + context.future - first) * items_per_frame:
            window = Window(first, done + chunk + context.future, done, done + chunk)
            yield take(window), window
            done += chunk
            drop = max(0, done - context.past) - first
            held = [held[0][..., drop * items_per_frame :]]
            first += drop
            num_held = held[0].shape[-1]
    total = first + num_frames(num_held, items_per_frame)
    if total > done:
        window = Window(first, total, done, total)
        yield take(window), window
