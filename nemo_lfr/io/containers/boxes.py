"""Check the outermost elements of Matroska and MP4 files for truncation and damage.

FFmpeg reads the available part of a truncated file, or only the first of several concatenated files, without an error.
"""

import re
import struct
from dataclasses import replace

from nemo_lfr.io.containers.joined import compare_end, damage_after, find_header
from nemo_lfr.io.containers.stream import JOINED, TAGS, Stream, Window, cut_short, whole_file

_BOX_NAME = re.compile(rb"[A-Za-z0-9]{3}[A-Za-z0-9 ]")
_BOX = re.compile(rb"\0.{3}(?:moof|moov|mdat)", re.DOTALL)  # beginning of a box with audio or an index
# Names of boxes that may precede the media data in a fragmented file.
_FRAGMENTS = frozenset(b"moof mdat moov ftyp styp sidx ssix emsg prft free skip wide uuid meta".split())
_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
# Beginning of a Cluster, or of a SimpleBlock of one of the first tracks.
_AUDIO = re.compile(rb"\x1f\x43\xb6\x75|\xa3(?:[\x80-\xff]|[\x40-\x7f].)[\x81-\x84]..[\0\x80]", re.DOTALL)
# Ids of the elements that may occur in a Segment and in a Cluster of Matroska and WebM.
_IN_SEGMENT = {_CLUSTER, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
_IN_CLUSTER = {0xE7, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF, 0x5854}
_ANYWHERE = {0xEC, 0xBF}  # Void, CRC-32
_ELEMENTS = _IN_SEGMENT | _IN_CLUSTER | _ANYWHERE | {_EBML, _SEGMENT}


def is_matroska(head: bytes, _: Window) -> bool:
    """Return whether a file is a Matroska or WebM file."""
    return head[:4] == b"\x1a\x45\xdf\xa3"


def matroska_streams(window: Window) -> list[Stream]:
    """Find the recordings in a Matroska or WebM file, and check the sizes of its elements.

    Outer elements may have an unknown size. In a concatenated file, each recording begins with an EBML element.
    """
    position, start = 0, 0
    streams: list[Stream] = []
    while position < window.size:
        head = window.at(position, 12)
        name, begin = _number(head, 0, keep=True)
        if name not in _ELEMENTS:
            break
        if name == _EBML and position > start:
            streams.append(Stream([(start, position)]))
            start = position
        size, begin = _number(head, begin)
        if size is None:
            return [whole_file(window.size, "the audio was truncated: its last element is incomplete")]
        unknown = size == (1 << 7 * (begin - _width(name))) - 1
        if not unknown and position + begin + size > window.size:
            return [whole_file(window.size, cut_short(size, window.size - position - begin))]
        position += begin + (0 if unknown or name == _SEGMENT else size)
    if (damage := damage_after(window, position, _AUDIO)) is not None:
        return [whole_file(window.size, damage)]
    (last,) = compare_end(window, position)
    return [
        *streams,
        replace(last, spans=[(start, stop) for _, stop in last.spans], is_file=last.is_file and not start),
    ]


def _width(name: int) -> int:
    return (name.bit_length() + 7) // 8


def _number(data: bytes, position: int, keep: bool = False) -> tuple[int | None, int]:
    """Read an EBML number, whose first byte encodes the length of the number.

    Args:
        data: bytes that contain the number.
        position: position of the number in `data`.
        keep: whether to keep the bits that encode the length, as in the ids of elements.

    Returns:
        The number and the position after it; (None, `position`) if the number is invalid or incomplete.
    """
    if position >= len(data) or not data[position]:
        return None, position
    width = 9 - data[position].bit_length()
    if position + width > len(data):
        return None, position
    value = int.from_bytes(data[position : position + width], "big")
    return (value if keep else value & ((1 << 7 * width) - 1)), position + width


def is_mp4(head: bytes, _: Window) -> bool:
    """Return whether a file is an MP4 or QuickTime file."""
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def mp4_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an MP4, M4A, MOV or 3GP file, after checking the sizes of its boxes."""
    position, indexes, is_joined, is_fragmented, before = 0, 0, False, False, b"moov"
    while position + 8 <= window.size:
        size, name = struct.unpack(">I4s", window.at(position, 8))
        if not _BOX_NAME.fullmatch(name) or window.at(position, 11).startswith(TAGS):
            break
        if size == 1 and position + 16 <= window.size:
            size = struct.unpack(">Q", window.at(position + 8, 8))[0]
        if size == 0:  # the box extends to the end of the file
            size = window.size - position
            is_joined = is_joined or find_header(window, position + 8) is not None
        if size < 8:
            break
        if position + size > window.size:
            return [whole_file(window.size, cut_short(size, window.size - position))]
        if name == b"mdat" and is_fragmented and before not in _FRAGMENTS:
            missing_index = f"the audio is damaged: no index describes the samples at position {position}"
            return [whole_file(window.size, missing_index)]
        indexes += name == b"moov"
        is_fragmented |= name == b"moov" and window.find(b"mvex", position, position + size) >= 0
        before = name
        position += size
    if indexes > 1 or is_joined:
        return [whole_file(window.size, JOINED)]
    if (damage := damage_after(window, position, _BOX)) is not None:
        return [whole_file(window.size, damage)]
    (stream,) = compare_end(window, position)
    return [replace(stream, spans=[(0, window.size)], is_file=True)]
