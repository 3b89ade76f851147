"""Linear PCM that stores 17 to 24 bits per sample in 4 bytes.

The bits are in the low bytes (`arecord -f S24_LE`) or in the high bytes, and the header is the same in both cases.
libsndfile guesses the case from the first samples, and reads a pipe as if each sample had 3 bytes.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nemo_lfr.io.containers.stream import Span, Window

WIDE_FLOATS = (
    "the samples are floating-point numbers, although the header says integers; export the audio again as 16-bit PCM"
)
_PCM, _EXTENSIBLE = 0x0001, 0xFFFE
_BLOCK = 1 << 18


def is_wide(form: bytes, order: str) -> bool:
    """Return whether a WAV file has integer samples of 17 to 24 bits in 4 bytes.

    Args:
        form: content of the `fmt ` chunk.
        order: byte order in the notation of `struct`.
    """
    if len(form) < 16:
        return False
    tag, channels, _, _, align, bits = struct.unpack_from(f"{order}HHIIHH", form)
    is_linear = tag == _PCM or (tag == _EXTENSIBLE and form[24:26] == struct.pack(f"{order}H", _PCM))
    return is_linear and channels > 0 and align == 4 * channels and 16 < bits <= 24


class WideLayout(NamedTuple):
    """How to read the samples of a file for which `is_wide` is true.

    Attributes:
        size: number of bytes per sample.
        gain: factor for the samples, which are read as integers of this size.
        problem: error message if the samples cannot be read; None otherwise.
    """

    size: int
    gain: float = 1.0
    problem: str | None = None


def wide_layout(window: Window, form: bytes, order: str, spans: Sequence[Span]) -> WideLayout:
    """Find out how the samples of a file are stored for which `is_wide` is true.

    Args:
        window: the file.
        form: content of the `fmt ` chunk.
        order: byte order in the notation of `struct`.
        spans: byte ranges of the samples.
    """
    bits = struct.unpack_from(f"{order}H", form, 14)[0]
    is_low = is_high = is_float = True
    for start, stop in spans:
        for position in range(start, stop - 3, _BLOCK):
            data = window.at(position, min(_BLOCK, stop - position))
            values = np.frombuffer(data, f"{order}i4", len(data) // 4)
            is_low = is_low and bool(((values >= -(1 << bits - 1)) & (values < 1 << bits - 1)).all())
            is_high = is_high and not (values & ((1 << 32 - bits) - 1)).any()
            sizes = np.abs(np.frombuffer(data, f"{order}f4", len(data) // 4))
            is_float = is_float and bool(((sizes == 0) | ((sizes > 1e-12) & (sizes < 1e8))).all())
    if is_low:  # also if both are true: samples in the high bytes would then have a level below -48 dB
        return WideLayout(4, float(1 << 32 - bits))
    if is_high:
        return WideLayout(4)
    if is_float:  # Cool Edit wrote floats with this header
        return WideLayout(4, problem=WIDE_FLOATS)
    return WideLayout(3)


def with_size(form: bytes, order: str, size: int) -> bytes:
    """Return the content of a `fmt ` chunk that describes the samples as integers of `size` bytes."""
    _, channels, rate = struct.unpack_from(f"{order}HHI", form)
    align = channels * size
    return struct.pack(f"{order}HHIIHH", _PCM, channels, rate, rate * align & 0xFFFFFFFF, align, 8 * size)
