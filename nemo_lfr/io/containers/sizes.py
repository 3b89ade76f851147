"""Compute the size of a frame of AAC, AC-3 or another audio format from its header."""

from collections.abc import Callable

from nemo_lfr.io.containers.stream import Window

# Function that returns the size of a frame in bytes from the first bytes of its header; None if they are not a header.
FrameSize = Callable[[bytes], int | None]
FRAME_HEAD = 10  # number of bytes that a `FrameSize` needs
_ADTS_HEAD, _LOAS_HEAD = 7, 3
# AC-3: bit rates in kbit/s, indexed by half the size code; samples per frame; highest version numbers (`bsid`) of
# AC-3 and of E-AC-3.
_AC3_BITRATES = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)
_AC3_SAMPLES, _AC3_LAST, _EAC3_LAST = 1536, 10, 16
_DTS_CORE, _DTS_EXTENSION = b"\x7f\xfe\x80\x01", b"\x64\x58\x20\x25"


def adts_size(head: bytes) -> int | None:
    """Return the size in bytes of an ADTS (AAC) frame, from its first seven bytes; None if they are not a header."""
    if len(head) < _ADTS_HEAD or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return None
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size > _ADTS_HEAD else None


def loas_size(head: bytes) -> int | None:
    """Return the size in bytes of a LOAS (AAC) frame, from its first three bytes; None if they are not a header."""
    if len(head) < _LOAS_HEAD or head[0] != 0x56 or head[1] & 0xE0 != 0xE0:
        return None
    return _LOAS_HEAD + ((head[1] & 0x1F) << 8 | head[2])


def ac3_size(head: bytes) -> int | None:
    """Return the size in bytes of an AC-3 or E-AC-3 frame, from its first six bytes; None if they are not a header."""
    if len(head) < 6 or head[:2] != b"\x0b\x77" or head[5] >> 3 > _EAC3_LAST:
        return None
    if head[5] >> 3 > _AC3_LAST:
        return 2 * (1 + ((head[2] & 7) << 8 | head[3]))
    rate, code = head[4] >> 6, head[4] & 0x3F
    if rate == 3 or code >> 1 >= len(_AC3_BITRATES):
        return None
    bits = _AC3_BITRATES[code >> 1] * 1000 * _AC3_SAMPLES
    return 2 * (bits // (16 * (48000, 44100, 32000)[rate]) + (code & 1 if rate == 1 else 0))


def dts_size(head: bytes) -> int | None:
    """Return the size in bytes of a DTS core frame or DTS-HD extension; None if the bytes are neither.

    Args:
        head: first bytes of the frame; at least `FRAME_HEAD` bytes are needed.
    """
    fields = int.from_bytes(head[4:10], "big")
    if len(head) < FRAME_HEAD:
        return None
    if head.startswith(_DTS_CORE):
        return 1 + (fields >> 20 & 0x3FFF)
    if head.startswith(_DTS_EXTENSION):
        return 1 + (fields >> 5 & 0xFFFFF if head[5] & 0x20 else fields >> 13 & 0xFFFF)
    return None


FRAME_SIZES: dict[str, FrameSize] = {"aac": adts_size, "aac_latm": loas_size, "ac3": ac3_size, "dts": dts_size}


def frame_size_at(window: Window, position: int, size_of: FrameSize) -> int | None:
    """Return the size in bytes of the frame at a position; None if no frame begins there."""
    size = size_of(window.at(position, FRAME_HEAD))
    return size if size else None


def codec_frames_follow(window: Window, position: int) -> bool:
    """Return whether three consecutive frames of AAC, AC-3, E-AC-3, DTS or LOAS begin at a position."""
    return any(_three_follow(window, position, size_of) for size_of in FRAME_SIZES.values())


def _three_follow(window: Window, position: int, size_of: FrameSize) -> bool:
    for _ in range(3):
        if (size := frame_size_at(window, position, size_of)) is None:
            return False
        position += size
    return position <= window.size
