"""Linear PCM that stores 17 to 24 bits per sample in 4 bytes.

The bits are in the low bytes (`arecord -f S24_LE`) or in the high bytes, and the header is the same in both cases.
libsndfile guesses the case from the first samples, and reads a pipe as if each sample had 3 bytes.
"""

import struct
from collections.abc import Sequence

import numpy as np

from nemo_lfr.io.containers.stream import Span, Window

UNKNOWN_LAYOUT = (
    "the header declares {} bits in 4 bytes for each sample, but the position of the bits is unknown; export the "
    "audio again as 16-bit PCM"
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
    is_linear = tag == _PCM or (tag == _EXTENSIBLE and form[24:28] == struct.pack(f"{order}I", _PCM))
    return is_linear and channels > 0 and align == 4 * channels and 16 < bits <= 24


def bits_of(form: bytes, order: str) -> int:
    """Return the number of bits per sample that the content of a `fmt ` chunk declares."""
    bits: int = struct.unpack_from(f"{order}H", form, 14)[0]
    return bits


def wide_gain(window: Window, form: bytes, order: str, spans: Sequence[Span]) -> float | None:
    """Return the factor for samples that are read as 32-bit integers, for a file for which `is_wide` is true.

    Args:
        window: the file.
        form: content of the `fmt ` chunk.
        order: byte order in the notation of `struct`.
        spans: byte ranges of the samples.

    Returns:
        1 if the bits are in the high bytes, a power of two if they are in the low bytes. None if they are in neither,
        for example in files of Cool Edit, which contain floats.
    """
    bits = bits_of(form, order)
    is_low = is_high = True
    for start, stop in spans:
        for position in range(start, stop - 3, _BLOCK):
            data = window.at(position, min(_BLOCK, stop - position))
            values = np.frombuffer(data, f"{order}i4", len(data) // 4)
            is_low = is_low and bool(((values >= -(1 << bits - 1)) & (values < 1 << bits - 1)).all())
            is_high = is_high and not (values & ((1 << 32 - bits) - 1)).any()
    if is_low:  # also if both are true: samples in the high bytes would then have a level below -48 dB
        return float(1 << 32 - bits)
    return 1.0 if is_high else None


def as_32_bits(form: bytes, order: str) -> bytes:
    """Return the content of a `fmt ` chunk that declares 32-bit integers.

    The sample rate and the number of channels are those in `form`.
    """
    _, channels, rate, _, align = struct.unpack_from(f"{order}HHIIH", form)
    return struct.pack(f"{order}HHIIHH", _PCM, channels, rate, rate * align & 0xFFFFFFFF, align, 32)
