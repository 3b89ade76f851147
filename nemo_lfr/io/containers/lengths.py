"""Find the audio in AU, AIFF, CAF and Wave64 files, and correct the lengths in their headers."""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace

from nemo_lfr.io.containers.blocks import BlockCodec, sample_codec
from nemo_lfr.io.containers.joined import compare_end, next_file, samples_follow, until_end
from nemo_lfr.io.containers.magic import has_magic
from nemo_lfr.io.containers.stream import (
    CHUNK_NAME,
    HEADER_CUT,
    JOINED,
    NO_LENGTH,
    UNKNOWN_BYTES,
    Span,
    Stream,
    Window,
    cut_short,
    goes_on,
    longer,
    whole_file,
)
from nemo_lfr.io.containers.wav import samples_stream
from nemo_lfr.io.containers.wav_header import WavHeader

AU_HEADER = 24  # size in bytes
_AU_BITS = {23: 4, 25: 3, 26: 5}  # bits per sample in G.721 and G.723, by the encoding in the header
# An AIFC header declares a number of samples or of blocks. Size of a sample or block in bytes per channel, by codec.
# None: determined by the number of bits in the header.
_AIFC_BYTES = {
    **dict.fromkeys((b"NONE", b"sowt", b"twos", b"raw ", b"in24", b"in32")),
    **dict.fromkeys((b"ulaw", b"ULAW", b"alaw", b"ALAW"), 1),
    **{b"fl32": 4, b"FL32": 4, b"fl64": 8, b"FL64": 8, b"ima4": 34},
}
_AIFC_SAMPLES = {b"ima4": 64, b"GSM ": 160}  # samples per block
_CAF_CHUNKS = frozenset(b"chan edct free info inst kuki mark midi ovvw pakt peak regn strg umid uuid".split())
# Name of a Wave64 chunk, a GUID of 16 bytes: four letters, digits or spaces, four constant bytes, and eight others.
_W64_CHUNK = re.compile(rb"[a-zA-Z0-9 ]{4}\xf3\xac\xd3\x11.{8}", re.DOTALL)
# Sizes of the samples, in a whole number of frames, that sox declares in an AIFF header that it writes to a pipe.
_SOX_UNKNOWN = range(0x7F000008 - 256, 0x7F000008 + 1)
_W64_FORMAT = 1 << 16  # maximum size in bytes of the description of the samples
# A length field in a header: position, format in the notation of `struct`, number to add to the length, and unit of
# the length in bytes.
Field = tuple[int, str, int, int]


def _beyond_end(begin: int, size: int) -> str:
    """Return the error message for a header that puts the first sample after the end of the file."""
    return f"the audio is damaged: its header says that samples begin at byte {begin}, but the file has {size} bytes"


def _to_end(window: Window, begin: int, fields: Sequence[Field], note: str | None = None) -> list[Stream]:
    """Return one `Stream` for a file whose samples extend to its end, with the true length in the header.

    Args:
        window: the file.
        begin: position of the first sample.
        fields: the length fields of the header.
        note: warning about the header.
    """
    if begin > window.size:
        return [whole_file(window.size, _beyond_end(begin, window.size))]
    end = until_end(window, begin)
    if end is None:
        return [whole_file(window.size, JOINED)]
    header = bytearray(window.at(0, max(position + struct.calcsize(form) for position, form, _, _ in fields)))
    for position, form, added, block in fields:
        most = (1 << 8 * struct.calcsize(form)) - 1  # maximum of the field, which means an unknown length
        struct.pack_into(form, header, position, min((end - begin) // block + added, most))
    return [Stream([(len(header), end)], bytes(header), note=note)]


def au_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an AU file, and correct the length in its header."""
    (stream,) = _au_streams(window)
    head = window.at(0, 16)
    if stream.problem or len(head) < 16:
        return [stream]
    order = ">" if head[:4] == b".snd" else "<"
    offset, _, encoding = struct.unpack(f"{order}III", head[4:])
    if encoding not in _AU_BITS:
        return [stream]
    end = stream.spans[-1][1]
    return [sample_codec(_AU_BITS[encoding]).fit(stream, end - offset)]


def _au_streams(window: Window) -> list[Stream]:
    if window.size < AU_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    order = ">" if window.at(0, 4) == b".snd" else "<"
    offset, length = struct.unpack(f"{order}II", window.at(4, 8))
    available = window.size - offset
    if offset < AU_HEADER:
        return [
            whole_file(
                window.size,
                f"the audio is damaged: its header says that samples begin at byte {offset}, but the header has "
                f"{AU_HEADER} bytes",
            )
        ]
    if available < 0:
        return [whole_file(window.size, _beyond_end(offset, window.size))]
    if 0 < length < available and next_file(window, offset + length) is not None:
        return [whole_file(window.size, JOINED)]
    if length != 0xFFFFFFFF and length > available:
        return [whole_file(window.size, cut_short(length, available))]
    is_known = 0 < length <= UNKNOWN_BYTES
    end = offset + length
    if is_known and not samples_follow(window, end):
        return compare_end(window, end)
    note = longer(length, available) if is_known else None
    return _to_end(window, offset, [(8, f"{order}I", 0, 1)], note)


def aiff_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an AIFF or AIFC file, and correct the lengths in its header."""
    position, common = 12, None
    while position + 8 <= window.size:
        name, length = struct.unpack(">4sI", window.at(position, 8))
        if name == b"COMM":
            common = position + 8
        if name == b"SSND":
            if common is None or window.size - position < 16:
                return []
            return _aiff_samples(window, common, position, length)
        if not CHUNK_NAME.match(name):
            return []
        position += 8 + length + length % 2
    return [whole_file(window.size, HEADER_CUT)]


def _aiff_samples(window: Window, common: int, position: int, length: int) -> list[Stream]:
    """Return a list with one `Stream` for an AIFF or AIFC file.

    Args:
        window: the file.
        common: position of the content of the chunk `COMM`.
        position: position of the chunk `SSND`.
        length: size of the chunk `SSND` in bytes, as declared.
    """
    available = window.size - position - 8
    offset = int.from_bytes(window.at(position + 8, 4), "big")
    channels, count, bits = struct.unpack(">hIh", window.at(common, 8))
    kind = window.at(common + 18, 4) if window.at(8, 4) == b"AIFC" else b"NONE"
    is_known = 8 + offset < length < UNKNOWN_BYTES and length not in _SOX_UNKNOWN
    if is_known and length > available:
        return [whole_file(window.size, cut_short(length, available))]
    if is_known:
        end = position + 8 + length
        rest, left, odd = window.at(end, 256), available - length, length % 2
        more = goes_on(rest, left, ">") and goes_on(rest[odd:], left - odd, ">")
        if next_file(window, end) is not None:
            return [whole_file(window.size, JOINED)]
        if not more or window.is_zero(end, window.size):
            streams = compare_end(window, _after_chunks(window, end + odd, ">I"))
            size = int.from_bytes(window.at(common - 4, 4), "big")
            head = b"FORM" + struct.pack(">I", 20 + size + size % 2 + length) + window.at(8, 4)
            chunks = [(common - 8, common + size + size % 2), (position, end)]
            if kind in _AIFC_BYTES or kind in _AIFC_SAMPLES or kind[:3] == b"DWV":
                streams = [_without_metadata(stream, chunks, head) for stream in streams]
            return [_aifc_whole(stream, kind, channels, count, length - 8 - offset) for stream in streams]
    note = longer(length, available) if is_known else None
    if kind not in _AIFC_BYTES:
        # If the size of a sample is unknown, so is the number of samples.
        damage = f"the audio is damaged: its header declares {length} bytes, but there are {available}"
        return [whole_file(window.size, damage if is_known else NO_LENGTH if available > 8 else None)]
    block = channels * (_AIFC_BYTES[kind] or -(-bits // 8))
    if block <= 0:
        return []
    fields: list[Field] = [(common + 2, ">I", 0, block), (position + 4, ">I", 8 + offset, 1)]
    streams = _to_end(window, position + 16 + offset, fields, note)
    return [_aifc_whole(s, kind, channels, 0, s.spans[-1][1] - position - 16 - offset) for s in streams]


def _without_metadata(stream: Stream, chunks: list[Span], header: bytes = b"") -> Stream:
    """Return a stream with only the chunks that describe or contain samples.

    A stream with an error message is returned unchanged.

    libsndfile refuses some files with metadata that it does not expect, or reads the samples at a wrong place.

    Args:
        stream: stream of the file.
        chunks: byte ranges of the chunks to keep.
        header: bytes that precede the chunks.
    """
    return stream if stream.problem else replace(stream, header=header, spans=chunks, is_file=False)


def _aifc_whole(stream: Stream, kind: bytes, channels: int, count: int, size: int) -> Stream:
    """Return a stream limited to the samples that an AIFF or AIFC file contains.

    Args:
        stream: stream of the file.
        kind: name of the codec.
        channels: number of channels.
        count: number of samples that the header declares; 0 if unknown.
        size: total size of all samples in bytes.
    """
    if stream.problem or channels <= 0:
        return stream
    if kind[:3] == b"DWV":  # libsndfile ignores the number of samples in the header
        return replace(stream, num_samples=count) if count else replace(stream, problem=NO_LENGTH)
    if kind not in _AIFC_SAMPLES:
        return stream
    block = _AIFC_BYTES.get(kind) or 33
    fitted = replace(BlockCodec(block * channels, _AIFC_SAMPLES[kind]).fit(stream, size), padding=0)
    if kind == b"GSM " and count:  # libsndfile decodes as many samples as the header declares
        return replace(fitted, num_samples=min(count, size // block * _AIFC_SAMPLES[kind]))
    return fitted


def caf_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a CAF file, or an empty list if a chunk of the file is invalid.

    If the file's header contains no valid length, the stream has a new header with the actual length of the audio.
    """
    streams = _caf_streams(window)
    problem = _caf_bits_problem(window) or _caf_packets_problem(window, bool(streams and streams[0].header))
    return [stream if stream.problem else replace(stream, problem=problem) for stream in streams]


def _caf_bits_problem(window: Window) -> str | None:
    """Return an error message for a CAF file with samples of 17 to 24 bits in 4 bytes; otherwise None."""
    name, _, _, form, _, size, _, channels, bits = struct.unpack(">4sqd4sIIIII", window.at(8, 44).ljust(44, b"\0"))
    if (name, form) == (b"desc", b"lpcm") and 16 < bits <= 24 and size == 4 * channels:
        return f"{bits}-bit samples in 4 bytes each are not supported in CAF; export the audio again as 16-bit PCM"
    return None


def _caf_packets_problem(window: Window, to_end: bool) -> str | None:
    """Return an error message if a CAF file has less audio than its table of packets declares; otherwise None.

    Args:
        window: the file.
        to_end: whether the audio extends to the end of the file, whatever size the header declares.
    """
    is_variable, available, promised = False, 0, 0
    for position, name, length in _caf_chunks(window, window.size):
        if name == b"desc":
            # If packets differ only in size, and not in their number of samples, the table contains only sizes.
            size, samples = struct.unpack(">II", window.at(position + 28, 8).ljust(8, b"\0"))
            is_variable = not size and samples > 0
        if name == b"data":
            available = (window.size - position - 12 if to_end else length) - 4
        if name == b"pakt" and is_variable and 24 < length <= window.size - position - 12:
            promised = _sum_of_sizes(window.at(position + 36, length - 24))
    return cut_short(promised, available) if 0 < available < promised else None


def _sum_of_sizes(table: bytes) -> int:
    """Return the sum of the integers in a table of CAF packets.

    Each byte contains seven bits of an integer. Its highest bit is set if the next byte belongs to the same integer.
    """
    total = number = 0
    for byte in table:
        number = number << 7 | byte & 127
        if byte < 128:
            total, number = total + number, 0
    return total


def _caf_chunks(window: Window, end: int) -> Iterator[tuple[int, bytes, int]]:
    """Yield the position, name and declared length of each chunk of a CAF file, up to `end` or a negative length."""
    position, length = 8, 0
    while length >= 0 and position + 12 <= end:
        name, length = struct.unpack(">4sq", window.at(position, 12))
        yield position, name, length
        position += 12 + length


def _caf_streams(window: Window) -> list[Stream]:
    for position, name, length in _caf_chunks(window, window.size):
        if name == b"data":
            available = window.size - position - 12
            if length > available:
                return [whole_file(window.size, cut_short(length, available))]
            end, note = position + 12 + length, None
            if length > 4:
                if next_file(window, end) is not None:
                    return [whole_file(window.size, JOINED)]
                if not samples_follow(window, end):
                    last = _after_chunks(window, end, ">q", _CAF_CHUNKS)
                    return [_without_metadata(s, _needed_of_caf(window, last)) for s in compare_end(window, last)]
                note = longer(length, available)
            return _to_end(window, position + 12, [(position + 4, ">q", 0, 1)], note)
        if length < 0 or not CHUNK_NAME.match(name):
            return []
    return [whole_file(window.size, HEADER_CUT)]


def _needed_of_caf(window: Window, end: int) -> list[Span]:
    """Return the byte ranges of the header and of the first chunk of each needed kind in a CAF file, up to `end`."""
    found = {b"": (0, 8)}
    for position, name, length in _caf_chunks(window, end):
        if name in (b"desc", b"kuki", b"pakt", b"data"):
            found.setdefault(name, (position, position + 12 + length))
    return list(found.values())


def w64_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a Wave64 file, or an empty list if a chunk of the file is invalid.

    If the file's header contains no valid length, the stream has a new header with the actual length of the audio.
    """
    position, header = 40, WavHeader(b"RIFF")
    while position + 24 <= window.size:
        name, length = window.at(position, 4), struct.unpack("<q", window.at(position + 16, 8))[0]
        if name == b"data":
            return [_w64_samples(window, header, position, length)]
        if length < 24:
            return []
        if name == b"fmt ":
            header.note(name, window.at(position + 24, min(length - 24, _W64_FORMAT)))
        position += length + -length % 8
    return [whole_file(window.size, HEADER_CUT)]


def _w64_samples(window: Window, header: WavHeader, position: int, length: int) -> Stream:
    """Return a Wave64 file as one `Stream`.

    `position` and `length` are the position and the declared size, in bytes, of the chunk with the samples.
    """
    available = window.size - position
    if 24 < length < 1 << 62 and length > available:
        return whole_file(window.size, cut_short(length, available))
    if not 24 < length < 1 << 62:
        (stream,) = _to_end(window, position + 24, [(position + 16, "<q", 24, 1)])
        end = stream.spans[-1][1]
    else:
        (stream,) = compare_end(window, _after_w64_chunks(window, position + length))
        # libsndfile would decode all bytes up to the end of the file.
        end = position + length
    as_wav = samples_stream(window, header, [(position + 24, end)])
    # In Wave64, libsndfile does not read the extended description, and refuses metadata that it does not expect.
    return stream if stream.problem else replace(as_wav, note=stream.note or as_wav.note)


def _after_w64_chunks(window: Window, position: int) -> int:
    """Skip padding, and then Wave64 chunks, from a position on; return the position after them."""
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
        position: position of the first chunk, which is the end of the samples.
        form: format of the length field, in the notation of `struct`.
        names: names of the chunks to pass over; by default, all names that `CHUNK_NAME` matches.
    """
    head = 4 + struct.calcsize(form)
    while position + head <= window.size and not has_magic(window, position):
        name = window.at(position, 4)
        length = struct.unpack(form, window.at(position + 4, head - 4))[0]
        if (name not in names if names is not None else not CHUNK_NAME.match(name)) or length < 0:
            break
        position += head + length + (length % 2 if names is None else 0)
    return position
