"""Cutting of recordings into windows, and stacking of windows into batches."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nemo_lfr.codec.arrays import Arrays
from nemo_lfr.codec.backend import Batching, Limits
from nemo_lfr.frames import Context, Window, num_frames, plan_windows


class PlacedWindow(NamedTuple):
    """Window of one recording of a batch."""

    row: int
    window: Window


class Batch(NamedTuple):
    """Batch of windows that are computed together.

    Attributes:
        places: row and window of each example.
        inputs: array [b, ..., T * items_per_frame], zero after each example's end.
    """

    places: list[PlacedWindow]
    inputs: Any

    @property
    def num_frames(self) -> list[int]:
        """Frames of each example."""
        return [place.window.num_frames for place in self.places]


class Cutter(NamedTuple):
    """Cutter of rows of items into batches of windows.

    Attributes:
        arrays: library of the rows.
        limits: limits of the encoder or decoder that computes the windows.
        batching: window and batch sizes.
        chunk_frames: frames of one window of a long recording, without its context.
        items_per_frame: samples or tokens of one frame along the last axis of a row.
        dtype: dtype of the rows.
    """

    arrays: Arrays[Any]
    limits: Limits
    batching: Batching
    chunk_frames: int
    items_per_frame: int
    dtype: type[np.generic]

    def width(self, frames: int) -> int:
        """Return the padded width of a window, in frames."""
        multiple = self.batching.pad_multiple
        return -(-max(frames, self.limits.min_frames) // multiple) * multiple

    def batches(self, rows: Any, lengths: Sequence[int], totals: Sequence[int]) -> Iterator[Batch]:
        """Cut every row into windows, and stack windows of equal padded width.

        Args:
            rows: array [B, ..., items].
            lengths: items of each row.
            totals: frames of each row.
        """
        by_width: dict[int, list[PlacedWindow]] = {}
        for row, total in enumerate(totals):
            for window in plan_windows(total, self.chunk_frames, self.limits.context):
                by_width.setdefault(self.width(window.num_frames), []).append(PlacedWindow(row, window))
        for width, places in group_widths(by_width, self.batching.mix_widths):
            # Batches of 1, 2, 4 ... examples: few shapes, so that kernels are reused.
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
    """Group windows that may share a batch, with the width of the widest.

    Args:
        by_width: windows of each width.
        mix: let windows of similar widths share a batch, widest first, as a GPU is faster with few, large batches.
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
    limits: Sequence[int] | None = None,
) -> None:
    """Copy the exact frames of each window to `out` [B, ..., items], up to the row's limit."""
    for (row, window), result in zip(places, results, strict=True):
        start, stop = (edge * items_per_frame for edge in (window.keep_start, window.keep_stop))
        if limits is not None:
            stop = min(stop, limits[row])
        first = window.kept.start * items_per_frame
        out[row, ..., start:stop] = result[..., first : first + stop - start]


def rolling_windows(
    blocks: Iterable[np.ndarray], items_per_frame: int, chunk: int, context: Context
) -> Iterator[tuple[np.ndarray, Window]]:
    """Yield the windows of `frames.plan_windows` for a recording of unknown length.

    Args:
        blocks: consecutive items [..., any].
        items_per_frame: items of one frame along the last axis.
        chunk: frames of one window, without its context.
        context: context of the network.

    Yields:
        The items of each window, and the window.
    """
    held: list[np.ndarray] = []  # items from frame `first` on
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
        # A window is ready once at least one item follows its context.
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
