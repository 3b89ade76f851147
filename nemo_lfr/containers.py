"""Where the audio lies in a file: container headers, compared with the bytes that are really there.

Decoders believe headers. Recorders that were killed, pipes and `cat` leave headers that are wrong: a length of 0, of a
quarter, or of the first of several recordings. `find_streams` looks at the container itself and describes each
recording of the file in such a way that libsndfile decodes all of it.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

# What programs write as the length of a WAV file before they know it is this or more.
UNKNOWN_BYTES = 0x7FFF0000
# A chunk's name. Samples hardly ever look like one: all four bytes would have to be letters.
CHUNK_NAME = re.compile(rb"[A-Za-z0-9_ -]{4}")
# Tags that players append to any format.
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
# Fewer bytes than this after the audio are not audio.
FEW_BYTES = 16

Span = tuple[int, int]


@dataclass
class Stream:
    """One recording of a file.

    Attributes:
        spans: bytes [start, stop) of the file that hold it, in order.
        header: bytes to put before them.
        is_file: the file as it is, so that a decoder can open it by itself.
        problem: what is wrong with it; None if it is whole.
        by_name: libsndfile reads this format (MPEG audio) right from a named file only.
    """

    spans: list[Span]
    header: bytes = b""
    is_file: bool = False
    problem: str | None = None
    by_name: bool = False


class Splice(io.RawIOBase):
    """A stream of a file, as a file.

    Args:
        file: what the spans are of; its position changes.
        stream: which bytes.
    """

    def __init__(self, file: BinaryIO, stream: Stream) -> None:
        self._file = file
        self._header = stream.header
        self._spans = stream.spans
        self._length = len(stream.header) + sum(stop - start for start, stop in stream.spans)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        size = max(0, self._length - self._position) if size < 0 else size
        pieces = []
        while size:
            piece = self._next(size)
            if not piece:
                break
            pieces.append(piece)
            self._position += len(piece)
            size -= len(piece)
        return b"".join(pieces)

    def readinto(self, buffer) -> int:  # any writable buffer
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def _next(self, size: int) -> bytes:
        if self._position < len(self._header):
            return self._header[self._position : self._position + size]
        at = self._position - len(self._header)
        for start, stop in self._spans:
            if at < stop - start:
                self._file.seek(start + at)
                return self._file.read(min(size, stop - start - at))
            at -= stop - start
        return b""


def find_streams(file: BinaryIO) -> list[Stream]:
    """Find the recordings of an audio file, one after the other.

    Args:
        file: opened for reading, seekable.

    Returns:
        At least one stream. A format that is not known here is one stream, the file as it is.
    """
    size = file.seek(0, io.SEEK_END)
    window = _Window(file, size)
    head = window.at(0, 12)
    for matches, find in _FORMATS:
        if matches(head, window):
            return find(window) or [_as_it_is(size)]
    return [_as_it_is(size)]


def is_known(head: bytes) -> bool:
    """Return whether the first bytes of a file, a few thousand, are those of a format that is known here."""
    window = _Window(io.BytesIO(head), len(head))
    return any(matches(head[:12], window) for matches, _ in _FORMATS)


class _Window:
    """Random access to a file in few reads."""

    BLOCK = 1 << 18

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self._start, self._block = 0, b""

    def at(self, position: int, count: int) -> bytes:
        """Return up to `count` bytes at `position`."""
        offset = position - self._start
        if offset < 0 or offset + count > len(self._block):
            self.file.seek(position)
            self._start, self._block, offset = position, self.file.read(max(count, self.BLOCK)), 0
        return self._block[offset : offset + count]

    def find(self, pattern: bytes, position: int, stop: int | None = None) -> int:
        """Return where `pattern` begins at or after `position`; -1 if it does not."""
        stop = self.size if stop is None else min(stop, self.size)
        while position < stop:
            block = self.at(position, self.BLOCK)
            index = block.find(pattern)
            if index >= 0:
                return position + index if position + index < stop else -1
            if len(block) < len(pattern):
                return -1
            position += len(block) - len(pattern) + 1
        return -1

    def is_zero(self, start: int, stop: int) -> bool:
        """Return whether all bytes [start, stop) are 0."""
        while start < stop:
            block = self.at(start, min(self.BLOCK, stop - start))
            if not block or block.strip(b"\0"):
                return False
            start += len(block)
        return True


def _as_it_is(size: int, problem: str | None = None) -> Stream:
    return Stream([(0, size)], is_file=True, problem=problem)


def _cut(promised: int, available: int) -> str:
    return f"was cut short: its header promises {promised} bytes, {available} are there"


# WAV: RIFF, RIFX, RF64 and BW64.


def _is_wav(head: bytes, _: _Window) -> bool:
    return head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE"


@dataclass
class WavHeader:
    """The chunks of a WAV file before its samples.

    Attributes:
        magic: of the file.
        format: the whole `fmt ` chunk.
        data_size: bytes of samples, as the header has it.
        long_size: the same of RF64's `ds64` chunk; None if there is none.
    """

    magic: bytes
    format: bytes = b""
    data_size: int = 0
    long_size: int | None = None

    @property
    def order(self) -> str:
        """Byte order, as `struct` spells it."""
        return ">" if self.magic == b"RIFX" else "<"

    @property
    def declared(self) -> int:
        """Bytes of samples that are promised."""
        if self.data_size == 0xFFFFFFFF and self.long_size is not None:
            return self.long_size
        return self.data_size

    def is_unknown(self, available: int | None) -> bool:
        """Return whether the header leaves the length open, where `available` bytes follow, if that is known."""
        declared = self.declared
        if declared == 0 and self.magic in (b"RF64", b"BW64") and self.data_size == 0xFFFFFFFF:
            return True
        return declared >= UNKNOWN_BYTES and (available is None or declared > available)

    def rebuilt(self, size: int | None) -> bytes:
        """Return a header for `size` bytes of samples; for as many as come if None."""
        pad = b"\0" * (len(self.format) % 2)
        chunk = struct.pack(f"{self.order}4sI", b"fmt ", len(self.format)) + self.format + pad
        if size is None:
            magic = self.magic if self.magic == b"RIFX" else b"RIFF"
            start = struct.pack(f"{self.order}4sI4s", magic, 0xFFFFFFFF, b"WAVE")
            return start + chunk + struct.pack(f"{self.order}4sI", b"data", 0xFFFFFFFF)
        total = 4 + len(chunk) + 8 + size
        if total < 0xFFFFFFF0:
            magic = self.magic if self.magic == b"RIFX" else b"RIFF"
            return (
                struct.pack(f"{self.order}4sI4s", magic, total, b"WAVE")
                + chunk
                + struct.pack(f"{self.order}4sI", b"data", size)
            )
        long = struct.pack("<4sIQQQI", b"ds64", 28, total + 36, size, 0, 0)
        return (
            struct.pack("<4sI4s", b"RF64", 0xFFFFFFFF, b"WAVE")
            + long
            + chunk
            + struct.pack("<4sI", b"data", 0xFFFFFFFF)
        )


def read_wav_header(read: Callable[[int], bytes]) -> tuple[WavHeader | None, bytes]:
    """Read a WAV file up to its first sample.

    Args:
        read: returns the next bytes, as many as it is asked for unless the file ends.

    Returns:
        The header, or None where it is not one or holds no samples; and what was read.
    """
    taken = bytearray(read(12))
    header = WavHeader(bytes(taken[:4]))
    if not _is_wav(bytes(taken), None):  # type: ignore[arg-type]  # the head decides
        return None, bytes(taken)
    while len(taken) < 1 << 26:
        start = read(8)
        taken += start
        if len(start) < 8:
            break
        name, size = start[:4], struct.unpack(f"{header.order}I", start[4:])[0]
        if name == b"data":
            header.data_size = size
            return (header if header.format else None), bytes(taken)
        if size > 1 << 26:
            break
        body = read(size + size % 2)
        taken += body
        _note(header, name, body[:size])
    return None, bytes(taken)


def _note(header: WavHeader, name: bytes, body: bytes) -> None:
    if name == b"fmt " and not header.format:
        header.format = body
    elif name == b"ds64" and len(body) >= 16:
        header.long_size = struct.unpack_from("<Q", body, 8)[0]


def goes_on(rest: bytes) -> bool:
    """Return whether samples follow those that a WAV header declares, by the first bytes after them.

    They do not where a chunk, another file or a tag begins, or where next to nothing follows.
    """
    return len(rest) >= FEW_BYTES and not CHUNK_NAME.match(rest) and not rest.startswith(TAGS)


class WavSamples:
    """Filter that keeps the samples of a WAV file that comes in through a pipe, by the rules for files.

    Args:
        header: what was read before the first sample.
        header_size: its bytes.

    Attributes:
        problem: what is wrong with the file, once `finish` was called; None if it is whole.
    """

    def __init__(self, header: WavHeader, header_size: int) -> None:
        self._order = header.order
        self._declared = header.declared
        self._left: int | None = None if header.is_unknown(None) else header.declared
        self._odd = header.declared % 2
        self._held = b""
        self._zeros: int | None = None
        self._skip = 0
        self._done = False
        self._total = header_size
        self.problem: str | None = None

    def push(self, piece: bytes) -> bytes:
        """Take the next bytes of the file; return the samples among them."""
        self._total += len(piece)
        return self._filter(self._held + piece, last=False)

    def finish(self) -> bytes:
        """Take the end of the file; return the samples that are left."""
        samples = self._filter(self._held, last=True)
        counted = self._declared in (self._total, self._total - 8)  # some recorders count the header as well
        if self._left and not self._done and not counted:
            self.problem = _cut(self._declared, self._declared - self._left)
        return samples

    def _filter(self, data: bytes, last: bool) -> bytes:
        samples = []
        self._held = b""
        while data and not self._done:
            if self._skip:
                skipped = min(self._skip, len(data))
                data, self._skip = data[skipped:], self._skip - skipped
            elif self._zeros is not None:
                if not data.strip(b"\0"):
                    self._zeros += len(data)
                    break
                samples.append(bytes(self._zeros))
                self._zeros = self._left = None
            elif self._left is None:
                samples.append(data)
                break
            elif self._left:
                samples.append(data[: self._left])
                data, self._left = data[self._left :], self._left - len(samples[-1])
            elif len(data) < FEW_BYTES + 2 and not last:
                self._held = data
                break
            else:
                data = self._next_chunk(data)
        return b"".join(samples)

    def _next_chunk(self, data: bytes) -> bytes:
        """Decide what follows samples or a chunk; return the data behind what was understood."""
        if goes_on(data) and goes_on(data[self._odd :]):
            self._zeros = 0
            return data
        if not CHUNK_NAME.match(data):
            data = data[self._odd :]
        if len(data) < 8 or not CHUNK_NAME.match(data):
            self._done = True
            return b""
        name, size = struct.unpack(f"{self._order}4sI", data[:8])
        if name in (b"RIFF", b"RIFX", b"RF64", b"BW64") and data[8:12] == b"WAVE":
            self._done = True
            self.problem = "holds several recordings; give it as a file to encode all of them"
        elif name == b"data":
            self._left, self._odd, self._declared = (None if size >= UNKNOWN_BYTES else size), size % 2, size
        else:
            self._skip, self._odd = size, size % 2
        return data[8:]


def _wav_streams(window: _Window, start: int = 0) -> list[Stream]:
    size = window.size
    header = WavHeader(window.at(start, 4))
    spans: list[Span] = []
    problem, exact, following = None, True, None
    position = start + 12
    while position + 8 <= size:
        name, length = struct.unpack(f"{header.order}4sI", window.at(position, 8))
        begin = position + 8
        if spans and name in (b"RIFF", b"RIFX", b"RF64", b"BW64") and window.at(begin, 4) == b"WAVE":
            following = position
            break
        if not CHUNK_NAME.match(name):
            break
        if name != b"data":
            _note(header, name, window.at(begin, length) if name in (b"fmt ", b"ds64") else b"")
            position = _after(window, begin, length)
            exact = exact and (bool(spans) or position == begin + length + length % 2)
            continue
        header.data_size = length
        stop, problem, is_exact = _wav_data(window, header, start, begin)
        exact = exact and is_exact and not spans
        spans.append((begin, stop))
        position = _after(window, begin, stop - begin)
    if not spans or not header.format:
        return []
    length = sum(stop - begin for begin, stop in spans)
    if exact and start == 0 and following is None:
        return [_as_it_is(size, problem)]
    streams = [Stream(spans, header.rebuilt(length), problem=problem)]
    return streams if following is None else streams + _wav_streams(window, following)


def _wav_data(window: _Window, header: WavHeader, start: int, begin: int) -> tuple[int, str | None, bool]:
    """Return where samples that begin at `begin` end, what is wrong, and whether the header says the same."""
    available, declared = window.size - begin, header.declared
    if header.is_unknown(available):
        return window.size, None, False
    if declared > available:
        # Some recorders count the header as well.
        counted = declared in (window.size - start, window.size - start - 8)
        return window.size, None if counted else _cut(declared, available), False
    stop = begin + declared
    rest = window.at(stop, 256)
    if goes_on(rest) and goes_on(rest[declared % 2 :]) and not window.is_zero(stop, window.size):
        return window.size, None, False
    return stop, None, True


def _after(window: _Window, begin: int, length: int) -> int:
    """Return where the next chunk begins; some writers leave out the padding of an odd one."""
    position = begin + length
    padded = position + length % 2
    if padded != position and CHUNK_NAME.match(window.at(position, 4)) and window.at(position, 1) != b"\0":
        return position
    return padded


# Other containers with a length in their header.


def _patched(size: int, problem: str | None, patches: list[tuple[int, bytes]], window: _Window) -> list[Stream]:
    """Return the file with some bytes of its header replaced."""
    if not patches:
        return [_as_it_is(size, problem)]
    end = max(position + len(value) for position, value in patches)
    header = bytearray(window.at(0, end))
    for position, value in patches:
        header[position : position + len(value)] = value
    return [Stream([(end, size)], bytes(header), problem=problem)]


def _au_streams(window: _Window) -> list[Stream]:
    order = ">" if window.at(0, 4) == b".snd" else "<"
    offset, length = struct.unpack(f"{order}II", window.at(4, 8))
    available = window.size - offset
    if length != 0xFFFFFFFF and length > available:
        return [_as_it_is(window.size, _cut(length, available))]
    if length == available or available < 0 or length > UNKNOWN_BYTES:
        return []
    if length and not goes_on(window.at(offset + length, 256)):
        return []
    return _patched(window.size, None, [(8, struct.pack(f"{order}I", available))], window)


def _aiff_streams(window: _Window) -> list[Stream]:
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
                return [_as_it_is(window.size, _cut(length, available))]
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
    return []


def _caf_streams(window: _Window) -> list[Stream]:
    position = 8
    while position + 12 <= window.size:
        name, length = struct.unpack(">4sq", window.at(position, 12))
        if name == b"data":
            available = window.size - position - 12
            if length > available:
                return [_as_it_is(window.size, _cut(length, available))]
            if length > 4:
                return []
            return _patched(window.size, None, [(position + 4, struct.pack(">q", available))], window)
        if length < 0 or not CHUNK_NAME.match(name):
            return []
        position += 12 + length
    return []


def _w64_streams(window: _Window) -> list[Stream]:
    position = 40
    while position + 24 <= window.size:
        name, length = window.at(position, 4), struct.unpack("<q", window.at(position + 16, 8))[0]
        if name == b"data":
            available = window.size - position
            if 24 < length < 1 << 62 and length > available:
                return [_as_it_is(window.size, _cut(length, available))]
            if 24 < length < 1 << 62:
                return []
            return _patched(window.size, None, [(position + 16, struct.pack("<q", available))], window)
        if length < 24:
            return []
        position += length + -length % 8
    return []


# Ogg: logical streams one after the other.


def _ogg_streams(window: _Window) -> list[Stream]:
    links: list[Stream] = []
    open_serials: set[int] = set()
    numbers: dict[int, int] = {}
    position, start, in_heads = 0, 0, True
    problem = None
    while position < window.size:
        page = window.at(position, 27)
        if page[:4] != b"OggS":
            found = window.find(b"OggS", position + 1)
            gap = (window.size if found < 0 else found) - position
            if found < 0 and (window.at(position, 8).startswith(TAGS) or window.is_zero(position, window.size)):
                break
            problem = problem or f"is damaged: {gap} bytes at {position} are not Ogg pages"
            if found < 0:
                break
            position = found
            continue
        table = window.at(position + 27, page[26]) if len(page) == 27 else b""
        length = 27 + len(table) + sum(table)
        if len(page) < 27 or len(table) < page[26] or position + length > window.size:
            problem = problem or "was cut short: its last page is not whole"
            position = window.size
            break
        if _ogg_checksum(window.at(position, length)) != struct.unpack_from("<I", page, 22)[0]:
            problem = problem or f"is damaged: the Ogg page at byte {position} has a wrong checksum"
        flags, serial, number = page[5], *struct.unpack_from("<II", page, 14)
        if flags & 2:  # begins a logical stream
            if not in_heads:  # after the pages of others: the next recording
                links.append(Stream([(start, position)], problem=problem or _unfinished(open_serials)))
                start, problem = position, None
                open_serials, numbers = set(), {}
            in_heads = True
            open_serials.add(serial)
        else:
            in_heads = False
            if serial in numbers and number != (numbers[serial] + 1) & 0xFFFFFFFF:
                problem = problem or f"is damaged: Ogg pages are missing at byte {position}"
        numbers[serial] = number
        if flags & 4:
            open_serials.discard(serial)
        position += length
    links.append(Stream([(start, position)], problem=problem or _unfinished(open_serials)))
    if len(links) == 1:
        links[0].is_file = True
    return links


_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def _ogg_checksum(page: bytes) -> int:
    """Return the CRC of a page, whose own field counts as zero.

    Ogg's CRC is zlib's with the bits of every byte, and of the result, in the other order, and without inversions.
    """
    cleared = page[:22] + bytes(4) + page[26:]
    inverted = zlib.crc32(cleared.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{inverted:032b}"[::-1], 2)


def _unfinished(open_serials: set[int]) -> str | None:
    return "was cut short: its last page is missing" if open_serials else None


# FLAC.

# A name and the length of the first block: compressed audio does not hold eight such bytes by chance.
_FLAC_HEADS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
_MAX_FLAC_FRAME = 1 << 20


def _flac_streams(window: _Window) -> list[Stream]:
    starts, found = [0], 8
    while (found := window.find(b"fLaC", found)) >= 0:
        if window.at(found, 8) in _FLAC_HEADS:
            starts.append(found)
        found += 4
    streams = []
    for start, stop in zip(starts, [*starts[1:], window.size], strict=True):
        info = window.at(start + 8, 34)
        total = int.from_bytes(info[13:18], "big") & ((1 << 36) - 1) if len(info) == 34 else -1
        if total:
            streams.append(Stream([(start, stop)], is_file=start == 0 and stop == window.size))
            continue
        # The length is left open; the last frame's number tells it.
        counted = _last_flac_sample(window, start, stop, int.from_bytes(info[2:4], "big"))
        problem = "was cut short: its last frame is not whole" if counted is None else None
        known = int.from_bytes(info[13:18], "big") | (counted or 0)
        header = window.at(start, 21) + known.to_bytes(5, "big")
        streams.append(Stream([(start + len(header), stop)], header, problem=problem))
    return streams


def _last_flac_sample(window: _Window, start: int, stop: int, block_size: int) -> int | None:
    """Return the samples of a FLAC stream, by its last frame; None if that is not whole."""
    if window.at(stop - 128, 3) == b"TAG":
        stop -= 128
    begin = max(start + 42, stop - _MAX_FLAC_FRAME)
    tail = window.at(begin, stop - begin)
    if not tail:
        return 0
    position = len(tail)
    while (position := tail.rfind(b"\xff", 0, position)) >= 0:
        frame = tail[position:]
        if len(frame) > 8 and frame[1] & 0xFE == 0xF8 and (end := _flac_frame_end(frame, block_size)) is not None:
            # The CRC of a whole frame with its own at the end is 0.
            return end if _crc(frame, 16, 0x8005) == 0 else None
    return 0 if begin == start + 42 and _only_metadata(window, start, stop) else None


def _only_metadata(window: _Window, start: int, stop: int) -> bool:
    """Return whether nothing follows a FLAC stream's blocks of metadata."""
    position, last = start + 4, False
    while not last and position + 4 <= stop:
        head = window.at(position, 4)
        last, position = bool(head[0] & 0x80), position + 4 + int.from_bytes(head[1:], "big")
    return last and position == stop


def _flac_frame_end(frame: bytes, block_size: int) -> int | None:
    """Return the number of the sample after a frame; None if its header is not one."""
    code, rate_code = frame[2] >> 4, frame[2] & 15
    if code == 0 or rate_code == 15 or frame[3] & 1:
        return None
    lead = frame[4]
    extra = 0 if lead < 0x80 else 8 - (lead ^ 0xFF).bit_length() - 1
    if lead >= 0x80 and (extra < 1 or extra > 6):
        return None
    number = lead if not extra else lead & ((1 << (6 - extra)) - 1)
    for byte in frame[5 : 5 + extra]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    position = 5 + extra
    if code in (6, 7):
        samples = int.from_bytes(frame[position : position + code - 5], "big") + 1
        position += code - 5
    else:
        samples = 192 if code == 1 else 576 << (code - 2) if code < 6 else 256 << (code - 8)
    position += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if position >= len(frame) or _crc(frame[:position], 8, 0x07) != frame[position]:
        return None
    return (number if frame[1] & 1 else number * block_size) + samples


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    """Return a CRC, highest bit first, that begins with 0."""
    top, mask, value = 1 << (bits - 1), (1 << bits) - 1, 0
    table = []
    for index in range(256):
        entry = index << (bits - 8)
        for _ in range(8):
            entry = (entry << 1 ^ polynomial if entry & top else entry << 1) & mask
        table.append(entry)
    for byte in data:
        value = (value << 8 ^ table[value >> (bits - 8) ^ byte]) & mask
    return value


# MPEG audio: frames one after the other, and what encoders say of them in a first frame without sound.

_BITRATES = {  # kbit/s by (is MPEG 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MPEG_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version bits


@dataclass(frozen=True)
class _MpegFrame:
    length: int  # bytes
    layer: int
    rate: int  # Hz
    side: int  # bytes of side information, where layer 3 has it


def _mpeg_frame(head: bytes) -> _MpegFrame | None:
    """Read the four bytes that begin a frame; None if they do not."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_index, bitrate_index = head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or layer == 4 or rate_index == 3 or bitrate_index in (0, 15):
        return None
    first = version == 3
    bitrate = _BITRATES[first, layer][bitrate_index - 1] * 1000
    rate = _MPEG_RATES[version][rate_index]
    padding = head[2] >> 1 & 1
    if layer == 1:
        length = (12 * bitrate // rate + padding) * 4
    else:
        length = (144 if first or layer == 2 else 72) * bitrate // rate + padding
    mono = head[3] >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return _MpegFrame(length, layer, rate, side)


@dataclass
class _MpegPiece:
    """Frames that one encoder wrote."""

    start: int
    stop: int = 0
    count: int = 0
    promised: int | None = None  # frames, by its Xing header; that header is none of them
    first: bytes = b""


def _is_mpeg(head: bytes, window: _Window) -> bool:
    start = _after_id3(window, 0) if head.startswith(b"ID3") else 0
    if head.startswith(b"ID3") and window.at(start, 4) == b"fLaC":
        return False
    frame = _mpeg_frame(window.at(start, 4))
    return head.startswith(b"ID3") or (
        frame is not None and _mpeg_frame(window.at(start + frame.length, 4)) is not None
    )


def _after_id3(window: _Window, position: int) -> int:
    """Return the end of an ID3v2 tag."""
    tag = window.at(position, 10)
    if len(tag) < 10 or tag[:3] != b"ID3" or max(tag[6:10]) > 127:
        return position + 3 if tag[:3] == b"ID3" else position
    size = tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]
    return position + 10 + size + (10 if tag[5] & 0x10 else 0)


def _mpeg_pieces(window: _Window) -> Iterator[_MpegPiece]:
    piece: _MpegPiece | None = None
    kind: tuple[int, int] | None = None
    position = 0
    while position < window.size:
        head = window.at(position, 4)
        frame = _mpeg_frame(head)
        if frame is None or (kind is None and not _confirmed(window, position, frame)):
            if head[:3] == b"ID3":
                position = _after_id3(window, position)
                kind = None
            else:  # a tag of another kind, or damage: look for the next frame
                position = _next_sync(window, position + 1)
                kind = None
            continue
        promised = _xing_frames(window.at(position, 200), frame)
        kind = frame.layer, frame.rate
        if position + frame.length > window.size:
            if piece is not None and piece.promised is None:
                piece.stop = window.size
            break
        if piece is None or promised is not None or _confirmed_kind(piece, frame) is False:
            if piece is not None:
                yield piece
            piece = _MpegPiece(position, promised=promised, first=head)
        if promised is None:
            piece.count += 1
        position += frame.length
        piece.stop = position
    if piece is not None:
        yield piece


def _confirmed(window: _Window, position: int, frame: _MpegFrame) -> bool:
    """Return whether the file ends or another frame of the same kind follows: chance looks like one frame, not two."""
    following = position + frame.length
    if following >= window.size:
        return True
    other = _mpeg_frame(window.at(following, 4))
    if other is None:
        return window.at(following, 11).startswith(TAGS) or window.is_zero(following, min(following + 64, window.size))
    return (other.layer, other.rate) == (frame.layer, frame.rate)


def _confirmed_kind(piece: _MpegPiece, frame: _MpegFrame) -> bool:
    first = _mpeg_frame(piece.first)
    return first is not None and (first.layer, first.rate) == (frame.layer, frame.rate)


def _next_sync(window: _Window, position: int) -> int:
    while True:
        found = window.find(b"\xff", position)
        id3 = window.find(b"ID3", position, found if found >= 0 else None)
        if id3 >= 0:
            return id3
        if found < 0:
            return window.size
        if _mpeg_frame(window.at(found, 4)) is not None:
            return found
        position = found + 1


def _xing_frames(frame_bytes: bytes, frame: _MpegFrame) -> int | None:
    """Return the frames that an encoder's first frame promises; None if it is a frame of sound."""
    if frame.layer != 3:
        return None
    tag = frame_bytes[4 + frame.side : 4 + frame.side + 12]
    if tag[:4] in (b"Xing", b"Info"):
        flags, count = struct.unpack(">II", tag[4:12])
        return count if flags & 1 else 0
    if frame_bytes[36:40] == b"VBRI":
        return struct.unpack(">I", frame_bytes[50:54])[0]
    return None


def _mpeg_streams(window: _Window) -> list[Stream]:
    pieces = [piece for piece in _mpeg_pieces(window) if piece.count or piece.promised]
    streams = []
    for piece in pieces:
        stream = Stream([(piece.start, piece.stop)], by_name=True)
        if piece.promised and piece.count < piece.promised:
            stream.problem = f"was cut short: its header promises {piece.promised} frames, {piece.count} are there"
        if piece.promised and piece.count <= piece.promised:
            stream.is_file = len(pieces) == 1
        else:  # no length, or that of the first of many: libsndfile would guess, and stop there
            stream.header = _xing_header(piece.first, piece.count)
        streams.append(stream)
    return streams


def _xing_header(head: bytes, count: int) -> bytes:
    """Return a frame without sound that promises `count` frames like the one that begins with `head`."""
    frame = _mpeg_frame(head)
    if frame is None or frame.layer != 3:
        return b""
    for index in range(1, 15):
        made = bytes([head[0], head[1] | 1, index << 4 | head[2] & 0x0C, head[3]])
        own = _mpeg_frame(made)
        if own is not None and own.length >= 4 + own.side + 120:
            tag = b"Xing" + struct.pack(">II", 1, count)
            return (made + bytes(own.side) + tag).ljust(own.length, b"\0")
    return b""


_FORMATS: tuple[tuple[Callable[[bytes, _Window], bool], Callable[[_Window], list[Stream]]], ...] = (
    (_is_wav, _wav_streams),
    (lambda head, _: head[:4] == b"OggS", _ogg_streams),
    (lambda head, _: head[:8] in _FLAC_HEADS, _flac_streams),
    (lambda head, _: head[:4] in (b".snd", b"dns."), _au_streams),
    (lambda head, _: head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"), _aiff_streams),
    (lambda head, _: head[:4] == b"caff", _caf_streams),
    (lambda head, _: head[:4] == b"riff", _w64_streams),
    (_is_mpeg, _mpeg_streams),
)
