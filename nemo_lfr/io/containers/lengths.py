"""Find the audio in AU, AIFF, CAF and Wave64 files, and correct the length in their headers."""

import re
import struct
from collections.abc import Sequence
from dataclasses import replace

from nemo_lfr.io.containers.joined import compare_end, next_file, until_end
from nemo_lfr.io.containers.magic import has_magic
from nemo_lfr.io.containers.stream import (
    CHUNK_NAME,
    HEADER_CUT,
    JOINED,
    UNKNOWN_BYTES,
    Stream,
    Window,
    cut_short,
    goes_on,
    longer,
    whole_file,
)

AU_HEADER = 24  # size in bytes
_CAF_CHUNKS = frozenset(b"chan edct free info inst kuki mark midi ovvw pakt peak regn strg umid uuid".split())
# Name of a chunk of Wave64: letters, and a constant.
_W64_CHUNK = re.compile(rb"[a-zA-Z0-9 ]{4}\xf3\xac\xd3\x11.{8}", re.DOTALL)
# A length field in a header, as a tuple: position of the field, format in the notation of `struct`, a number to add
# to the length, and the unit of the length in bytes.
Field = tuple[int, str, int, int]


def _to_end(window: Window, begin: int, fields: Sequence[Field], note: str | None = None) -> list[Stream]:
    """Return a file whose samples extend to its end as one `Stream`, with the true length in the header.

    Args:
        window: the file.
        begin: position of the first sample.
        fields: the length fields of the header.
        note: warning about the header.
    """
    if begin > window.size:
        return [whole_file(window.size, f"the audio is damaged: its header says that samples begin at byte {begin}")]
    end = until_end(window, begin)
    if end is None:
        return [whole_file(window.size, JOINED)]
    header = bytearray(window.at(0, max(position + struct.calcsize(form) for position, form, _, _ in fields)))
    for position, form, added, block in fields:
        most = (1 << 8 * struct.calcsize(form)) - 1  # maximum of the field, which means an unknown length
        struct.pack_into(form, header, position, min((end - begin) // block + added, most))
    return [Stream([(len(header), end)], bytes(header), note=note)]


def au_streams(window: Window) -> list[Stream]:
    """Return an AU file as one `Stream`, and correct the length in its header."""
    if window.size < AU_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    order = ">" if window.at(0, 4) == b".snd" else "<"
    offset, length = struct.unpack(f"{order}II", window.at(4, 8))
    available = window.size - offset
    if available < 0:
        return [whole_file(window.size, f"the audio is damaged: its header says that samples begin at byte {offset}")]
    if 0 < length < available and next_file(window, offset + length) is not None:
        return [whole_file(window.size, JOINED)]
    if length != 0xFFFFFFFF and length > available:
        return [whole_file(window.size, cut_short(length, available))]
    is_known = 0 < length <= UNKNOWN_BYTES
    end = offset + length
    if is_known and (not goes_on(window.at(end, 256)) or window.is_zero(end, window.size)):
        return compare_end(window, end)
    note = longer(length, available) if is_known else None
    return _to_end(window, offset, [(8, f"{order}I", 0, 1)], note)


def aiff_streams(window: Window) -> list[Stream]:
    """Return an AIFF or AIFC file as one `Stream`, and correct the lengths in its header."""
    position, common, compressed = 12, None, window.at(8, 4) == b"AIFC"
    while position + 8 <= window.size:
        name, length = struct.unpack(">4sI", window.at(position, 8))
        if name == b"COMM":
            common = position + 8
        if name == b"SSND":
            available = window.size - position - 8
            if common is None or available < 8:
                return []
            offset = int.from_bytes(window.at(position + 8, 4), "big")
            begin = position + 16 + offset
            channels, _, bits = struct.unpack(">hIh", window.at(common, 8))
            block = channels * -(-bits // 8)
            is_known = 8 + offset < length < UNKNOWN_BYTES
            if is_known and length > available:
                return [whole_file(window.size, cut_short(length, available))]
            if is_known:
                end = position + 8 + length
                rest, left, odd = window.at(end, 256), available - length, length % 2
                more = goes_on(rest, left, ">") and goes_on(rest[odd:], left - odd, ">")
                if next_file(window, end) is not None:
                    return [whole_file(window.size, JOINED)]
                if not more or window.is_zero(end, window.size):
                    return compare_end(window, _after_chunks(window, end + odd, ">I"))
            if block <= 0 or (compressed and window.at(common + 18, 4) not in (b"NONE", b"sowt")):
                return []
            note = longer(length, available) if is_known else None
            fields: list[Field] = [(common + 2, ">I", 0, block), (position + 4, ">I", 8 + offset, 1)]
            return _to_end(window, begin, fields, note)
        if not CHUNK_NAME.match(name):
            return []
        position += 8 + length + length % 2
    return [whole_file(window.size, HEADER_CUT)]


def caf_streams(window: Window) -> list[Stream]:
    """Return a CAF file as one `Stream`, and correct the length in its header."""
    position = 8
    while position + 12 <= window.size:
        name, length = struct.unpack(">4sq", window.at(position, 12))
        if name == b"data":
            available = window.size - position - 12
            if length > available:
                return [whole_file(window.size, cut_short(length, available))]
            end, note = position + 12 + length, None
            if length > 4:
                if next_file(window, end) is not None:
                    return [whole_file(window.size, JOINED)]
                if not goes_on(window.at(end, 256)) or window.is_zero(end, window.size):
                    return compare_end(window, _after_chunks(window, end, ">q", _CAF_CHUNKS))
                note = longer(length, available)
            return _to_end(window, position + 12, [(position + 4, ">q", 0, 1)], note)
        if length < 0 or not CHUNK_NAME.match(name):
            return []
        position += 12 + length
    return [whole_file(window.size, HEADER_CUT)]


def w64_streams(window: Window) -> list[Stream]:
    """Return a Wave64 file as one `Stream`, and correct the length in its header."""
    position = 40
    while position + 24 <= window.size:
        name, length = window.at(position, 4), struct.unpack("<q", window.at(position + 16, 8))[0]
        if name == b"data":
            available = window.size - position
            if 24 < length < 1 << 62 and length > available:
                return [whole_file(window.size, cut_short(length, available))]
            if not 24 < length < 1 << 62:
                return _to_end(window, position + 24, [(position + 16, "<q", 24, 1)])
            (stream,) = compare_end(window, _after_w64_chunks(window, position + length))
            # libsndfile would decode all bytes up to the end of the file.
            return [stream if stream.problem else replace(stream, spans=[(0, position + length)], is_file=False)]
        if length < 24:
            return []
        position += length + -length % 8
    return [whole_file(window.size, HEADER_CUT)]


def _after_w64_chunks(window: Window, position: int) -> int:
    """Return the end of the Wave64 chunks that begin at a position, after optional padding."""
    padded = position + -position % 8
    position = padded if window.is_zero(position, padded) else position
    while _W64_CHUNK.fullmatch(window.at(position, 16)) and not has_magic(window, position):
        length = struct.unpack("<q", window.at(position + 16, 8).ljust(8, b"\0"))[0]
        position += max(24, min(length + -length % 8, window.size))
    return position


def _after_chunks(window: Window, position: int, form: str, names: frozenset[bytes] | None = None) -> int:
    """Return the end of the chunks that begin at a position.

    Args:
        window: the file.
        position: end of the samples.
        form: format of the length field, in the notation of `struct`.
        names: names of chunks; by default, all names that consist of letters and digits.
    """
    head = 4 + struct.calcsize(form)
    while position + head <= window.size and not has_magic(window, position):
        name = window.at(position, 4)
        length = struct.unpack(form, window.at(position + 4, head - 4))[0]
        if (name not in names if names is not None else not CHUNK_NAME.match(name)) or length < 0:
            break
        position += head + length + (length % 2 if names is None else 0)
    return position
