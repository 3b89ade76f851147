"""Check that ASF, FLV, AMR, True Audio, WavPack and RealMedia files are complete.

FFmpeg reads the available part of a truncated file, or only the first of several concatenated files, without an error.
"""

import re
import struct
from collections.abc import Iterator

from nemo_lfr.io.containers.joined import compare_end, damage_after, next_file
from nemo_lfr.io.containers.stream import JOINED, NO_LENGTH, Stream, Window, cut_short, whole_file

_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
# First four bytes of the header, and of the objects after it: data and four kinds of index.
_ASF_OBJECTS = (
    (_ASF[:4],),
    tuple(map(bytes.fromhex, ("3626b275", "90080033", "d329e2d6", "f803b1fe", "d03fb73c"))),
)
_ASF_FILE = bytes.fromhex("a1dcab8c")  # first four bytes of the object that declares the size of packets
# In bytes: position of the flags in that object, end of the last field that is read, size of a data object's header.
_ASF_FLAGS, _ASF_FILE_END, _ASF_PACKETS = 88, 100, 50
_ASF_HEAD, _FLV_HEAD, _FLV_TAG = 24, 13, 15  # sizes in bytes; an FLV tag includes the size field after it
# A data object with a smaller declared size has an unknown size, as in FFmpeg.
_ASF_LEAST_DATA = 100
_ASF_PACKET = 0x82  # first byte of a packet with error correction data, which encoders write
_AMR = (b"#!AMR\n", b"#!AMR-WB\n")
_AMR_SIZES = {  # frame size in bytes by frame type, including the type byte
    b"#!AMR\n": (13, 14, 16, 18, 20, 21, 27, 32, 6, 1, 1, 1, 1, 1, 1, 1),
    b"#!AMR-WB\n": (18, 24, 33, 37, 41, 47, 51, 59, 61, 6, 1, 1, 1, 1, 1, 1),
}
_TTA_HEAD = 22
# Patterns of the beginnings of sections. A match after unrecognized bytes shows that audio continues after damage.
_SECTION = {
    "asf": re.compile(rb"\x82\0\0"),
    "flv": re.compile(rb"[\x08\x09\x12].{7}\0\0\0", re.DOTALL),
    "amr": re.compile(rb"[^\0]"),  # any byte may begin a frame
    "wavpack": re.compile(rb"wvpk.{4}[\x02-\x10]\x04", re.DOTALL),
    "real": re.compile(rb"DATA|INDX|MDPR|CONT"),
}
_REAL_CHUNKS, _REAL_DATA_HEAD = (b".RMF", b"PROP", b"CONT", b"MDPR", b"DATA", b"INDX", b"RMMD", b"RMJE"), 18


def is_asf(head: bytes, _: Window) -> bool:
    """Return whether a file is an ASF file (WMA, WMV)."""
    return head == _ASF[:12]


def asf_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an ASF file, after checking the sizes of its objects and packets.

    A live recording does not state the size of its data. The data then extends to the end of the file.
    """
    return walked(window, _asf_parts(window), _SECTION["asf"])


def _asf_parts(window: Window) -> Iterator[int]:
    position, flags, packet = 0, 0, 0
    while len(head := window.at(position, _ASF_HEAD)) == _ASF_HEAD and head[:4] in _ASF_OBJECTS[position > 0]:
        size = struct.unpack_from("<Q", head, 16)[0]
        if head[:4] != _ASF_OBJECTS[1][0]:
            flags, packet = (flags, packet) if position else _asf_properties(window, size)
            yield size if size >= _ASF_HEAD else 0
            position += size
            continue
        is_live = bool(flags & 1) or size < _ASF_LEAST_DATA
        start, end = position + _ASF_PACKETS, window.size if is_live else position + size
        if not packet or window.at(start, 1) != bytes([_ASF_PACKET]) or end > window.size:
            yield 0 if is_live else size
            position = end
            continue
        yield _ASF_PACKETS
        position = start
        while position + packet <= end or (is_live and position < end):
            if window.at(position, 1) != bytes([_ASF_PACKET]):
                break
            yield packet
            position += packet
        else:
            yield from [end - position] * (end > position)
            position = end


def _asf_properties(window: Window, size: int) -> tuple[int, int]:
    """Return the flags of an ASF file and the size of its packets in bytes; each is 0 if it is unknown.

    The size is also 0 if it varies.
    """
    position = 30
    while position + _ASF_HEAD <= min(size, window.size):
        head = window.at(position, _ASF_FILE_END)
        if head[:4] == _ASF_FILE and len(head) == _ASF_FILE_END:
            flags, least, most = struct.unpack_from("<III", head, _ASF_FLAGS)
            return flags, least if least == most else 0
        position += max(struct.unpack_from("<Q", head, 16)[0], _ASF_HEAD)
    return 0, 0


def is_flv(head: bytes, _: Window) -> bool:
    """Return whether a file is a Flash video."""
    return head[:4] == b"FLV\x01"


def flv_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a Flash video file, after checking the sizes of its tags."""
    return walked(window, _flv_parts(window), _SECTION["flv"])


def _flv_parts(window: Window) -> Iterator[int]:
    yield _FLV_HEAD
    position = _FLV_HEAD
    while len(head := window.at(position, 4)) == 4 and head[0] & 0xDF in (8, 9, 18):
        size = _FLV_TAG + int.from_bytes(head[1:], "big")
        yield size
        position += size


def is_amr(head: bytes, _: Window) -> bool:
    """Return whether a file is an AMR file."""
    return head.startswith(_AMR)


def amr_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an AMR file, after checking its frames."""
    return walked(window, _amr_parts(window), _SECTION["amr"])


def _amr_parts(window: Window) -> Iterator[int]:
    magic = next(magic for magic in _AMR if window.at(0, len(magic)) == magic)
    yield len(magic)
    position = len(magic)
    while (head := window.at(position, 1)) and not head[0] & 0x83:  # these bits are always 0
        size = _AMR_SIZES[magic][head[0] >> 3 & 15]
        yield size
        position += size


def is_wavpack(head: bytes, _: Window) -> bool:
    """Return whether a file is a WavPack file."""
    return head[:4] == b"wvpk"


def wavpack_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a WavPack file, after checking its blocks."""
    return walked(window, _wavpack_parts(window), _SECTION["wavpack"])


def _wavpack_parts(window: Window) -> Iterator[int]:
    position = 0
    while len(head := window.at(position, 20)) == 20 and head[:4] == b"wvpk":
        if position and head[16:20] == bytes(4) and head[10:11] == b"\0" and not _is_further(window, position):
            return
        size = 8 + int.from_bytes(head[4:8], "little")
        yield size
        position += size


def _is_further(window: Window, position: int) -> bool:
    """Return whether a WavPack block covers the same time as the previous block, but other channels."""
    return not window.at(position + 25, 1)[0] & 8  # bit 11 of the flags marks the first block of a group


def is_tta(head: bytes, _: Window) -> bool:
    """Return whether a file is a True Audio file."""
    return head[:4] == b"TTA1"


def tta_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a True Audio file, after checking its frames."""
    return walked(window, _tta_parts(window))


def _tta_parts(window: Window) -> Iterator[int]:
    """Yield the sizes of a True Audio file's sections: the header, the table of frame sizes, and each frame."""
    yield _TTA_HEAD
    rate, count = struct.unpack("<II", window.at(10, 8))
    num_frames = -(-count * 245 // (256 * rate)) if rate else 0
    yield 4 * num_frames + 4
    for index in range(num_frames):
        yield int.from_bytes(window.at(_TTA_HEAD + 4 * index, 4), "little")


def is_real(head: bytes, _: Window) -> bool:
    """Return whether a file is a RealMedia file."""
    return head[:4] == b".RMF"


def real_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a RealMedia file, after checking its chunks and packets."""
    return walked(window, _real_parts(window), _SECTION["real"])


def _real_parts(window: Window) -> Iterator[int]:
    position = 0
    while (head := window.at(position, 14))[:4] in _REAL_CHUNKS and (not position or head[:4] != b".RMF"):
        size = int.from_bytes(head[4:8], "big")
        if head[:4] == b"DATA":
            yield _REAL_DATA_HEAD
            position += _REAL_DATA_HEAD
            if head[10:14] == bytes(4) and window.size > position:  # a live recording
                yield 0
            for _ in range(int.from_bytes(head[10:14], "big")):
                size = max(int.from_bytes(window.at(position + 2, 2), "big"), 1)
                yield size
                position += size
            continue
        if size < 10:
            return
        yield size
        position += size


def walked(window: Window, parts: Iterator[int], section: re.Pattern[bytes] | None = None) -> list[Stream]:
    """Return a list with one `Stream` for a file, after checking its sections.

    Args:
        window: the file.
        parts: size of each section in bytes, in order; 0 if the size is unknown.
        section: pattern of the beginning of a section; None if a header states the number of sections. Another section
            after those in `parts` means that the file is damaged.

    Returns:
        The file as one `Stream`. The stream has a `problem` if the file is truncated or damaged, if the size of a
        section is unknown, or if several files are joined. It has a `note` if other bytes follow the audio.
    """
    position = 0
    for size in parts:
        if not size:
            return [whole_file(window.size, NO_LENGTH)]
        if position + size > window.size:
            is_other = window.at(position, 4) != window.at(0, 4)
            is_joined = is_other and next_file(window, position) is not None
            return [whole_file(window.size, JOINED if is_joined else cut_short(size, window.size - position))]
        position += size
    if section is not None and (damage := damage_after(window, position, section)) is not None:
        return [whole_file(window.size, damage)]
    return compare_end(window, position)
