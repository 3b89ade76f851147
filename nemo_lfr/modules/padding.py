"""Padding at the ends of a signal: "reflect", "constant" (zeros) or "replicate".

`pad_signal` pads a batch whose examples have the same length. `fill_padding` writes the same values into a batch whose
examples may have different lengths. The Triton kernels call neither function: they compute the same values themselves.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# PyTorch's name for each padding mode in a config. "circular" is left out: it would join the two ends of a recording.
PAD_MODES = {"reflect": "reflect", "zeros": "constant", "replicate": "replicate"}


def pad_signal(hidden: torch.Tensor, pad: tuple[int, int], mode: str) -> torch.Tensor:
    """Pad a signal [B, H, T] to [B, H, before + T + after], where `pad` is (before, after)."""
    if torch.compiler.is_exporting():
        return F.pad(hidden, pad, mode=mode)
    return F.pad(hidden.unsqueeze(2), (*pad, 0, 0), mode=mode).squeeze(2)


def fill_padding(
    padded: torch.Tensor, pad: tuple[int, int], mode: str, ends: Sequence[int] | torch.Tensor | None
) -> None:
    """Write the padding directly before and directly after the valid part of each example.

    Args:
        padded: buffer [B, H, before + T + after] that already contains the signals; changed in place. Values after the
            padding of an example are not changed.
        pad: number of time steps to write before and after each example.
        mode: "reflect", "constant" or "replicate".
        ends: number of valid time steps in each example, [B], at most T; None if all T are valid. A list is faster on
            a CPU. A tensor on the device of `padded` allows a CUDA graph to be replayed for other lengths.
    """
    before, after = pad
    rows = padded.transpose(1, 2)  # [B, before + T + after, H]
    inner = rows[:, before : rows.shape[1] - after]
    if before:
        rows[:, :before] = _before(inner, before, mode)
    if after and ends is None:
        rows[:, rows.shape[1] - after :] = _after(inner, after, mode)
    elif after and isinstance(ends, torch.Tensor):
        _fill_after(rows, before, after, mode, ends)
    elif after and ends is not None:
        for row, end in zip(rows, ends, strict=True):
            row[before + end : before + end + after] = _after(row[None, before : before + end], after, mode)[0]


def _before(inner: torch.Tensor, count: int, mode: str) -> torch.Tensor:
    """Return `count` time steps of padding before a signal [B, T, H], in a shape that broadcasts to [B, count, H]."""
    if mode == "constant":
        return inner.new_zeros(1, 1, 1)
    return inner[:, :1] if mode == "replicate" else inner[:, 1 : count + 1].flip(1)


def _after(inner: torch.Tensor, count: int, mode: str) -> torch.Tensor:
    """Return `count` time steps of padding after a signal [B, T, H], in a shape that broadcasts to [B, count, H]."""
    if mode == "constant":
        return inner.new_zeros(1, 1, 1)
    return inner[:, -1:] if mode == "replicate" else inner[:, -1 - count : -1].flip(1)


def _fill_after(rows: torch.Tensor, before: int, after: int, mode: str, ends: torch.Tensor) -> None:
    """Write `after` time steps of padding after the end of each example in [B, before + T + after, H]."""
    example = torch.arange(rows.shape[0], device=rows.device)[:, None]
    beyond = torch.arange(after, device=rows.device)
    last = before + ends[:, None] - 1
    target = last + 1 + beyond  # [B, after]
    if mode == "constant":
        rows[example, target] = torch.zeros((), dtype=rows.dtype, device=rows.device)
    else:
        rows[example, target] = rows[example, last - 1 - beyond if mode == "reflect" else last.expand_as(target)]
