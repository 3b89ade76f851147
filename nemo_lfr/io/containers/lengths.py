"""AU, AIFF, CAF and Wave64: containers with one length field in their header."""

import struct

from nemo_lfr.io.containers.joined import next_file
from nemo_lfr.io.containers.stream import (
    CHUNK_NAME,
    HEADER_CUT,
    JOINED,
    UNKNOWN_BYTES,
    Stream,
    Window,
    cut_short,
    goes_on,
    whole_file,
)

AU_HEADER = 24  # size in bytes


def _patched(size: int, problem: str | None, patches: list[tuple[int, bytes]], window: Window) -> list[Stream]:
    """Return the file with some bytes of its header replaced."""
    if not patches:
        return [whole_file(size, problem)]
    end = max(position + len(value) for position, value in patches)
    header = bytearray(window.at(0, end))
    for position, value in patches:
        header[position : position + len(value)] = value
    return [Stream([(end, size)], bytes(header), problem=problem)]


def au_streams(window: Window) -> list[Stream]:
    """Find the audio of an AU file; correct the length in its header."""
    if window.size < AU_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    order = ">" if window.at(0, 4) == b".snd" else "<"
    offset, length = struct.unpack(f"{order}II", window.at(4, 8))
    available = window.size - offset
    if available < 0:
        return [whole_file(window.size, f"is damaged: its header says that samples begin at byte {offset}")]
    if 0 < length < available and next_file(window, offset + length) is not None:
        return [whole_file(window.size, JOINED)]
    if length != 0xFFFFFFFF and length > available:
        return [whole_file(window.size, cut_short(length, available))]
    if length == available or length > UNKNOWN_BYTES:
        return []
    if length and not goes_on(window.at(offset + length, 256)):
        return []
    return _patched(window.size, None, [(8, struct.pack(f"{order}I", available))], window)


def aiff_streams(window: Window) -> list[Stream]:
    """Find the audio of an AIFF or AIFC file; correct the length in its header."""
    position, common, compressed = 12, None, window.at(8, 4) == b"AIFC"
    while position + 8 <= window.size:
        name, length = struct.unpack(">4sI", window.at(position, 8))
        if name == b"COMM":
            common = position + 8
        if name == b"SSND":
            begin, available = position + 16, window.size - position - 8
            if common is None:
                return []
            channels, _, bits = struct.unpack(">hIh", window.at(common, 8))
            block = channels * -(-bits // 8)
            unknown = length <= 8 or length >= UNKNOWN_BYTES
            if not unknown and length > available:
                return [whole_file(window.size, cut_short(length, available))]
            if not unknown and length < available:
                rest, left = window.at(position + 8 + length, 256), available - length
                if _another(window, position + 8 + length, b"FORM"):
                    return [whole_file(window.size, JOINED)]
                odd = length % 2
                unknown = goes_on(rest, left, ">") and goes_on(rest[odd:], left - odd, ">")
                unknown = unknown and not window.is_zero(position + 8 + length, window.size)
            if not unknown or block <= 0 or (compressed and window.at(common + 18, 4) not in (b"NONE", b"sowt")):
                return []
            count = (window.size - begin) // block
            patches = [
                (common + 2, struct.pack(">I", count)),
                (position + 4, struct.pack(">I", 8 + count * block)),
            ]
            return _patched(window.size, None, patches, window)
        if not CHUNK_NAME.match(name):
            return []
        position += 8 + length + length % 2
    return [whole_file(window.size, HEADER_CUT)]


def caf_streams(window: Window) -> list[Stream]:
    """Find the audio of a CAF file; correct the length in its header."""
    position = 8
    while position + 12 <= window.size:
        name, length = struct.unpack(">4sq", window.at(position, 12))
        if name == b"data":
            available = window.size - position - 12
            if length > available:
                return [whole_file(window.size, cut_short(length, available))]
            if length > 4:
                end = position + 12 + length
                rest = window.at(end, 256)
                if _another(window, end, b"caff"):
                    return [whole_file(window.size, JOINED)]
                if not goes_on(rest) or window.is_zero(end, window.size):
                    return []
            return _patched(window.size, None, [(position + 4, struct.pack(">q", available))], window)
        if length < 0 or not CHUNK_NAME.match(name):
            return []
        position += 12 + length
    return [whole_file(window.size, HEADER_CUT)]


def w64_streams(window: Window) -> list[Stream]:
    """Find the audio of a Wave64 file; correct the length in its header."""
    position = 40
    while position + 24 <= window.size:
        name, length = window.at(position, 4), struct.unpack("<q", window.at(position + 16, 8))[0]
        if name == b"data":
            available = window.size - position
            if 24 < length < 1 << 62 and length > available:
                return [whole_file(window.size, cut_short(length, available))]
            if 24 < length < 1 << 62:
                is_joined = _another(window, position + length, b"riff")
                return [whole_file(window.size, JOINED)] if is_joined else []
            return _patched(window.size, None, [(position + 16, struct.pack("<q", available))], window)
        if length < 24:
            return []
        position += length + -length % 8
    return [whole_file(window.size, HEADER_CUT)]


def _another(window: Window, end: int, magic: bytes) -> bool:
    """Return whether another file begins after the samples.

    A file of the same format may also follow the chunks after the samples.
    """
    found = window.find(magic, end)
    return next_file(window, end) is not None or (found >= 0 and window.at(found + 8, 4) == window.at(8, 4))
