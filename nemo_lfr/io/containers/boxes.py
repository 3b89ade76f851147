"""Completeness checks for Matroska, MP4 and MPEG-TS, which FFmpeg decodes.

FFmpeg reads the available part of a truncated file, and the first of several concatenated files, without an error.
These checks look at the outermost elements of a file.
"""

import re
import struct

from nemo_lfr.io.containers.joined import next_file
from nemo_lfr.io.containers.stream import JOINED, Stream, Window, cut_short, whole_file

_BOX_NAME = re.compile(rb"[A-Za-z0-9]{3}[A-Za-z0-9 ]")
_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
# Ids of the elements in a Segment and a Cluster of Matroska and WebM.
_IN_SEGMENT = {_CLUSTER, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
_IN_CLUSTER = {0xE7, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF, 0x5854}
_ANYWHERE = {0xEC, 0xBF}  # Void, CRC-32
_ELEMENTS = _IN_SEGMENT | _IN_CLUSTER | _ANYWHERE | {_EBML, _SEGMENT}
_PACKET = 188


def is_matroska(head: bytes, _: Window) -> bool:
    """Return whether a file is Matroska or WebM."""
    return head[:4] == b"\x1a\x45\xdf\xa3"


def matroska_streams(window: Window) -> list[Stream]:
    """Check the elements of a Matroska or WebM file.

    Elements are nested, and the outer ones may have an unknown size.
    """
    position = 0
    while position < window.size:
        head = window.at(position, 12)
        name, begin = _number(head, 0, keep=True)
        if name not in _ELEMENTS:
            return _followed(window, position)
        size, begin = _number(head, begin)
        if size is None:
            return [whole_file(window.size, "was cut short: its last element is not whole")]
        unknown = size == (1 << 7 * (begin - _width(name))) - 1
        if not unknown and position + begin + size > window.size:
            return [whole_file(window.size, cut_short(size, window.size - position - begin))]
        position += begin + (0 if unknown or name == _SEGMENT else size)
    return [whole_file(window.size)]


def _followed(window: Window, position: int) -> list[Stream]:
    """Reject another file at a position.

    Other bytes there are padding, or damage that FFmpeg can handle.
    """
    return [whole_file(window.size, JOINED if next_file(window, position) is not None else None)]


def _width(name: int) -> int:
    return (name.bit_length() + 7) // 8


def _number(data: bytes, position: int, keep: bool = False) -> tuple[int | None, int]:
    """Read an EBML number, whose first byte encodes its length.

    With `keep`, the length marker is kept, as in element ids.
    """
    if position >= len(data) or not data[position]:
        return None, position
    width = 9 - data[position].bit_length()
    if position + width > len(data):
        return None, position
    value = int.from_bytes(data[position : position + width], "big")
    return (value if keep else value & ((1 << 7 * width) - 1)), position + width


def is_mp4(head: bytes, _: Window) -> bool:
    """Return whether a file is MP4 or QuickTime."""
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def mp4_streams(window: Window) -> list[Stream]:
    """Check the boxes of an MP4, M4A, MOV or 3GP file."""
    position, indexes = 0, 0
    while position + 8 <= window.size:
        size, name = struct.unpack(">I4s", window.at(position, 8))
        if not _BOX_NAME.fullmatch(name) and not indexes:
            break
        if not _BOX_NAME.fullmatch(name):
            return _followed(window, position)
        if size == 1 and position + 16 <= window.size:
            size = struct.unpack(">Q", window.at(position + 8, 8))[0]
        if size == 0:  # the box extends to the end of the file
            break
        if size < 8:
            break
        if position + size > window.size:
            return [whole_file(window.size, cut_short(size, window.size - position))]
        indexes += name == b"moov"
        position += size
    return [whole_file(window.size, JOINED if indexes > 1 else None)]


def is_transport(head: bytes, window: Window) -> bool:
    """Return whether a file is MPEG-TS."""
    return head[:1] == b"\x47" and all(window.at(_PACKET * index, 1) == b"\x47" for index in (1, 2, 3))


def transport_streams(window: Window) -> list[Stream]:
    """Check the packets of an MPEG-TS file, which all have the same size."""
    rest = window.size % _PACKET
    is_cut = rest and window.at(window.size - rest, 1) == b"\x47"
    return [whole_file(window.size, "was cut short: its last packet is not whole" if is_cut else None)]
