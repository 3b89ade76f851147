"""Describe a recording as byte ranges of a file, and read it through a file object."""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from nemo_lfr.io.seekable import SeekableBytes

# While the length of the audio is unknown, programs write this value or a larger one into the header.
UNKNOWN_BYTES = 0x7FFF0000
# Name of a chunk. Samples rarely match, since each of their four bytes must be one of these characters.
CHUNK_NAME = re.compile(rb"[A-Za-z0-9_ -]{4}|\(c\) ")
# Chunks that programs write after the samples. A truncated chunk with such a name is accepted.
KNOWN_CHUNKS = frozenset(
    name.ljust(4)
    for name in b"LIST JUNK junk fact cue plst smpl inst bext iXML axml chna cart PEAK PAD FLLR id3 ID3 DISP acid "
    b"_PMX afsp minf elm1 regn umid RIFF RIFX RF64 BW64 fmt data".split()
)
# Tags that players append to files of any format.
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
# Fewer bytes than this after the audio are not treated as audio.
FEW_BYTES = 16

Span = tuple[int, int]
_ZEROS = bytes(1 << 18)


@dataclass
class Stream:
    """One recording in a file.

    Attributes:
        spans: byte ranges [start, stop) of the file that contain the recording, in order.
        header: bytes that a decoder must read before these ranges.
        is_file: whether the stream is the unchanged file, which a decoder can open by itself.
        problem: error message if the recording cannot be read; None if it is complete.
        note: warning about an irregularity that does not prevent reading the recording; None if there is none.
        is_checked: whether the recording was checked for truncation. Some formats cannot be checked.
        by_name: whether libsndfile needs a file name, rather than a file object, to decode the format (MPEG audio).
        padding: number of zeros that a decoder must read after the ranges.
        num_samples: number of samples per channel, if a decoder might return more samples; None otherwise.
        least_samples: minimum number of samples per channel. If a decoder returns fewer, the recording is damaged.
        tail: number of samples per channel in the last page of an Ogg file; for Opus always at 48 kHz.
            libsndfile's seeks into this page may be wrong, since the page may end in the middle of a block.
        gain: factor for the samples that a decoder returns; None if the decoder scales them.
    """

    spans: list[Span]
    header: bytes = b""
    is_file: bool = False
    problem: str | None = None
    by_name: bool = False
    note: str | None = None
    is_checked: bool = True
    padding: int = 0
    num_samples: int | None = None
    least_samples: int = 0
    tail: int = 0
    gain: float | None = None


class Splice(SeekableBytes):
    """File object that contains the header, the byte ranges and the padding of a stream.

    Args:
        file: the file; reading changes its position.
        stream: the stream.
    """

    def __init__(self, file: "BinaryIO | Splice", stream: Stream) -> None:
        size = sum(stop - start for start, stop in stream.spans)
        super().__init__(len(stream.header) + size + stream.padding)
        self._file = file
        self._header = stream.header
        self._spans = stream.spans
        self._padding = stream.padding

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; by default, all remaining bytes."""
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

    def readinto(self, buffer: Any) -> int:
        """Read into a writable buffer and return the number of bytes."""
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
        return bytes(max(0, min(size, self._padding - at)))


def is_zero(data: bytes) -> bool:
    """Return whether all bytes are 0."""
    # Comparing is 50 times as fast as `bytes.strip`.
    return data == (_ZEROS[: len(data)] if len(data) <= len(_ZEROS) else bytes(len(data)))


class Window:
    """Random access to the bytes of a file, with a buffer that avoids many small reads."""

    BLOCK = 1 << 18

    def __init__(self, file: BinaryIO | Splice, size: int) -> None:
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
        """Return the position of the first `pattern` that starts in [position, stop); -1 if there is none."""
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
            if not block or not is_zero(block):
                return False
            start += len(block)
        return True


def without_tags(window: Window, start: int, stop: int) -> int:
    """Return where the audio in [start, stop) ends, before appended ID3v1, APE and Lyrics3 tags."""
    before = None
    while before != stop:
        before = stop
        if window.at(max(stop - 128, start), 3) == b"TAG":
            stop = max(stop - 128, start)
        footer = window.at(max(stop - 32, start), 32)
        if footer[:8] == b"APETAGEX" and len(footer) == 32:
            size, _, flags = struct.unpack_from("<III", footer, 12)
            stop = max(stop - size - (32 if flags >> 31 else 0), start)
        end = window.at(max(stop - 15, start), 15)
        if end[6:] == b"LYRICS200" and end[:6].isdigit():
            stop = max(stop - int(end[:6]) - 15, start)
    return stop


def whole_file(size: int, problem: str | None = None) -> Stream:
    """Return the stream of an unchanged file.

    Args:
        size: size of the file in bytes.
        problem: error message if the file cannot be read.
    """
    return Stream([(0, size)], is_file=True, problem=problem)


def cut_short(promised: int, available: int) -> str:
    """Return the error message for a file that has fewer bytes than its header declares.

    Args:
        promised: number of bytes of audio that the header declares.
        available: number of bytes of audio that the file contains.
    """
    return f"the audio was truncated: its header declares {promised} bytes, but there are {available}"


def longer(promised: int, available: int) -> str:
    """Return the warning about a file that has more bytes than its header declares.

    For the arguments see `cut_short`.
    """
    return f"its header declares {promised} bytes, but there are {available}; all of them are read"


def several_tracks(count: int) -> str | None:
    """Return the warning about a file with several audio tracks; None if there are fewer than two."""
    return f"the file contains {count} audio tracks; the first one is read" if count > 1 else None


# Error message for a file that ends before its first sample.
HEADER_CUT = "the audio was truncated: it ends within its header"
# Error message for several recordings in one file that cannot be separated.
JOINED = "the audio contains several recordings, one after the other; convert each of them to WAV"

# Error message for a file without a length in its header, if a truncated file cannot be detected in another way.
NO_LENGTH = "the audio has no length in its header, as after an interrupted recording; convert it to WAV with ffmpeg"


def is_chunk(rest: bytes, left: int | None = None, order: str = "<") -> bool:
    """Return whether some bytes are the beginning of a RIFF chunk.

    A chunk begins with its name and length. If the name is not in `KNOWN_CHUNKS`, the length must fit into the file.

    Args:
        rest: the bytes.
        left: number of bytes from the beginning of `rest` to the end of the file; None if unknown.
        order: byte order in the notation of `struct`.
    """
    if not CHUNK_NAME.match(rest):
        return False
    if left is None or len(rest) < 8 or rest[:4] in KNOWN_CHUNKS:
        return True
    return bool(struct.unpack_from(f"{order}I", rest, 4)[0] <= left - 8)


def goes_on(rest: bytes, left: int | None = None, order: str = "<") -> bool:
    """Return whether more samples follow than the header declares.

    The result is False if a chunk (see `is_chunk`) or a tag follows, or if fewer than 16 bytes remain.

    Args:
        rest: the first bytes after the declared samples.
        left: number of bytes from the end of the declared samples to the end of the file; None if unknown.
        order: byte order in the notation of `struct`.
    """
    return len(rest) >= FEW_BYTES and not is_chunk(rest, left, order) and not rest.startswith(TAGS)


def moved(stream: Stream, spans: Sequence[Span]) -> Stream:
    """Convert a stream's byte ranges from positions in an excerpt to positions in the file.

    An excerpt is, for example, the content of the `data` chunk of a WAV file.

    Args:
        stream: stream whose byte ranges are positions in the excerpt.
        spans: byte ranges of the file whose concatenation is the excerpt.

    Returns:
        A copy of the stream with the converted ranges, whose `is_file` is False.
    """
    found: list[Span] = []
    for start, stop in stream.spans:
        at = 0
        for begin, end in spans:
            first, last = max(start - at, 0), min(stop - at, end - begin)
            if first < last:
                found.append((begin + first, begin + last))
            at += end - begin
    return replace(stream, spans=found, is_file=False)
