"""Check that SPHERE, VOC, 8SVX and AVR files are complete.

libsndfile reads the available part of a truncated file without an error, and decodes the headers of concatenated files
as samples.
"""

import re
import struct

from nemo_lfr.io.containers.joined import compare_end, compare_size, damage_after, next_file, note_after
from nemo_lfr.io.containers.stream import CHUNK_NAME, HEADER_CUT, JOINED, Span, Stream, Window, cut_short, whole_file
from nemo_lfr.io.containers.wav_header import WavHeader

SPHERE, VOC, AVR = b"NIST_1A", b"Creative Voice File", b"2BIT"
SVX_FORMS = (b"8SVX", b"16SV")
_SPHERE_FIELD = re.compile(rb"(?m)^(sample_count|sample_n_bytes|channel_count) -i (\d{1,18})\s*$")
_SPHERE_COUNT = re.compile(rb"(?m)^(sample_count -i )\d+")
_SPHERE_LAW = re.compile(rb"(?m)^sample_coding -s\d+ (ulaw|mu-law|alaw|pculaw)")
_SPHERE_HEADER, _MAX_SPHERE_HEADER, _AVR_HEADER = 1024, 1 << 16, 128  # sizes in bytes
_VOC_SOUND = {1: 2, 9: 12}  # types of blocks that begin a sound, and the size of their fields in bytes
# Types of a block that continues a sound, and of one that describes the next sound; the highest defined type
_VOC_MORE, _VOC_EXTENDED, _VOC_LAST = 2, 8, 9
_VOC_REST = re.compile(rb"[^\0\x1a]")  # any byte that is not padding; programs for CP/M and DOS pad files with 0x1A
_VOC_CODECS = {0: 1, 4: 1, 6: 6, 7: 7}  # VOC codec to WAV format tag: linear, A-law, mu-law


def is_sphere(head: bytes, _: Window) -> bool:
    """Return whether a file is a NIST SPHERE file."""
    return head.startswith(SPHERE)


def sphere_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a SPHERE file, after checking its size."""
    own_size = window.at(8, 8).strip()
    start = int(own_size) if own_size.isdigit() else _SPHERE_HEADER
    header = window.at(0, min(start, _MAX_SPHERE_HEADER))
    fields = {name: int(value) for name, value in _SPHERE_FIELD.findall(header)}
    if window.size < start:
        return [whole_file(window.size, HEADER_CUT)]
    if b"shorten" in header:
        return []
    # In A-law and mu-law, a sample has one byte. libsndfile then writes `sample_n_bytes` as text, which is not parsed.
    size = 1 if _SPHERE_LAW.search(header) else fields.get(b"sample_n_bytes", 2)
    block = size * fields.get(b"channel_count", 1)

    def header_for(length: int) -> bytes:
        count = str(length // block).encode() if block else b"0"
        return _SPHERE_COUNT.sub(rb"\g<1>" + count, header, count=1).ljust(start, b"\0")[:start]

    return compare_size(window, start, fields.get(b"sample_count", 0) * block, header_for)


def is_voc(head: bytes, _: Window) -> bool:
    """Return whether a file is a Creative VOC file."""
    return head == VOC[:12]


def voc_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a VOC file. The samples of several blocks are joined after a WAV header.

    libsndfile would decode the headers of all blocks after the first sound as samples.
    """
    position = int.from_bytes(window.at(20, 2), "little")
    spans: list[Span] = []
    kinds: list[bytes] = []
    extended = b""
    while position + 4 <= window.size and (kind := window.at(position, 1)[0]):
        start, stop = position + 4, position + 4 + int.from_bytes(window.at(position + 1, 3), "little")
        if stop > window.size and kind in (*_VOC_SOUND, _VOC_MORE):
            return [whole_file(window.size, cut_short(stop - start, window.size - start))]
        if kind in _VOC_SOUND:
            size = _VOC_SOUND[kind]
            kinds.append(extended or window.at(position, 1) + window.at(start, size))
            extended = b""
            spans.append((start + size, stop))
        elif kind == _VOC_MORE:
            spans.append((start, stop))
        elif kind == _VOC_EXTENDED:
            extended = window.at(position, 1) + window.at(start, 4)
        elif kind > _VOC_LAST:
            break
        position = stop
    if not spans:
        return [whole_file(window.size, HEADER_CUT)] if position + 4 > window.size else []
    is_last = spans[-1][1] == position
    if has_mark := window.at(position, 1) == b"\0":
        position += 1
    if len(set(kinds)) > 1 or next_file(window, position) is not None:
        return [whole_file(window.size, JOINED)]
    if (damage := damage_after(window, position, _VOC_REST)) is not None:
        return [whole_file(window.size, damage)]
    form = _voc_format(kinds[0]) if kinds else None
    if form is None:  # libsndfile would decode compressed samples as linear ones
        return [whole_file(window.size, "the encoding of the VOC file is unknown; convert it to WAV")]
    if len(spans) == 1 and is_last:
        if position < window.size or has_mark:
            return compare_end(window, position)
        # libsndfile needs the zero at the end, which `arecord` does not write to a pipe.
        return [Stream([(0, position)], padding=1)]
    header = WavHeader(b"RIFF", form).rebuilt(sum(stop - start for start, stop in spans))
    return [Stream(spans, header, note=note_after(window, position))]


def _voc_format(block: bytes) -> bytes | None:
    """Return the content of a WAV `fmt ` chunk for a VOC block; None if the encoding is unsupported."""
    if block[0] == 1:
        rate, bits, channels, codec = round(1_000_000 / (256 - block[1])), 8, 1, block[2]
    elif block[0] == _VOC_EXTENDED:
        time, codec, mode = struct.unpack_from("<HBB", block, 1)
        bits, channels = 8, mode + 1
        rate = 256_000_000 // (65536 - time) // channels
    else:
        rate, bits, channels, codec = struct.unpack_from("<IBBH", block, 1)
    if codec not in _VOC_CODECS or not bits or bits % 8:
        return None
    align = channels * bits // 8
    return struct.pack("<HHIIHH", _VOC_CODECS[codec], channels, rate, rate * align, align, bits)


def is_svx(head: bytes, _: Window) -> bool:
    """Return whether a file is an 8SVX or 16SV file."""
    return head[:4] == b"FORM" and head[8:12] in SVX_FORMS


def svx_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an 8SVX or 16SV file, after checking its size.

    The list is empty if the file contains an invalid chunk name.
    """
    position = 12
    while position + 8 <= window.size:
        name, length = struct.unpack(">4sI", window.at(position, 8))
        if name == b"BODY":
            return compare_size(window, position + 8, length)
        if not CHUNK_NAME.match(name):
            return []
        position += 8 + length + length % 2
    return [whole_file(window.size, HEADER_CUT)]


def is_avr(head: bytes, _: Window) -> bool:
    """Return whether a file is an AVR file."""
    return head.startswith(AVR)


def avr_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an AVR file, after checking its size."""
    head = window.at(0, _AVR_HEADER)
    if len(head) < _AVR_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    stereo, bits = struct.unpack_from(">HH", head, 12)
    block = (2 if stereo else 1) * (bits // 8)
    return compare_size(window, _AVR_HEADER, struct.unpack_from(">I", head, 26)[0] * block)
