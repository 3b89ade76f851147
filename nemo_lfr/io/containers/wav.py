"""Find the recordings in WAV files (RIFF, RIFX, RF64 and BW64), and extract the samples from WAV data in a pipe."""

import io
import struct
from dataclasses import replace

from nemo_lfr.io.containers.blocks import wav_codec
from nemo_lfr.io.containers.joined import HEADER_BYTES, LOOK_BYTES, find_header, header_in, next_file
from nemo_lfr.io.containers.magic import after_tags, after_zeros, has_magic
from nemo_lfr.io.containers.mpeg import mpeg_streams
from nemo_lfr.io.containers.stream import (
    CHUNK_NAME,
    HEADER_CUT,
    JOINED,
    KNOWN_CHUNKS,
    TAGS,
    UNKNOWN_BYTES,
    Span,
    Splice,
    Stream,
    Window,
    cut_short,
    goes_on,
    is_chunk,
    is_zero,
    longer,
    moved,
    whole_file,
)
from nemo_lfr.io.containers.wav_header import WavHeader, is_wav
from nemo_lfr.io.containers.wide import UNKNOWN_LAYOUT, as_32_bits, bits_of, is_wide, wide_gain

SEVERAL = "the audio contains several recordings; write it to a file, and pass the file"
IN_LIST = "the samples are in a LIST chunk of the type wavl, which is not supported; write them to one data chunk"
# Maximum size in bytes of a chunk before the samples; a damaged header may declare gigabytes.
MAX_HEADER_CHUNK = 1 << 16
# Maximum number of bytes buffered from a pipe to distinguish chunks from samples.
MAX_HELD = 1 << 24
# First bytes of DTS (16 and 14 bits) and of other compressed audio (IEC 61937) that is stored as samples on a CD.
CODED = (b"\xfe\x7f\x01\x80", b"\xff\x1f\x00\xe8", b"\x72\xf8\x1f\x4e")
LINEAR = (b"\x01\0", b"\xfe\xff")  # tags in the `fmt ` chunk
# Chunks of files that libsndfile opens by itself. It reads the samples at a wrong place, or refuses the file, if other
# chunks, such as `acid` or `bext`, are shorter than their formats require.
BARE_CHUNKS = (b"fmt ", b"fact", b"ds64")


class WavSamples:
    """Filter that extracts the samples from WAV data that arrives in pieces, as from a pipe.

    The samples are found by the same rules as in `wav_streams`.

    Args:
        header: the header before the first sample.
        header_size: size of the header in bytes.

    Attributes:
        problem: error message after `finish`; None if the file is complete.
        note: warning after `finish`, if there are more samples than the header declares; otherwise None.
    """

    def __init__(self, header: WavHeader, header_size: int) -> None:
        self._header, self._header_size = header, header_size
        self._order = header.order
        self._declared = header.declared
        self._left: int | None = None if header.is_unknown(None) else header.declared
        self._odd = header.declared % 2
        self._held = b""
        self._zeros: int | None = None
        self._skip = 0
        self._unknown: bytes | None = None  # name of the last chunk, if its bytes may be samples
        self._extra: int | None = None  # number of bytes of samples after those that the header declares
        self._done = False
        self._look = LOOK_BYTES
        self._at_samples = True  # whether the last chunk contained samples
        self._total = header_size
        self.problem: str | None = None
        self.note: str | None = None

    def push(self, piece: bytes) -> bytes:
        """Process the next bytes of the file and return the samples among them."""
        self._total += len(piece)
        return self._filter(self._held + piece, last=False)

    def finish(self) -> bytes:
        """Process the end of the file and return the remaining samples."""
        samples = self._filter(self._held, last=True)
        if self._extra is not None:
            self.note = longer(self._declared, self._declared + self._extra)
        counted = self._header.includes_header(self._header_size, self._total - self._header_size)
        if self._left and not self._done and not counted:
            self.problem = cut_short(self._declared, self._declared - self._left)
        elif self._skip and self._unknown is not None:
            self.problem = (
                "the audio is longer than its header says, and the remaining bytes may be samples or other data; "
                "write it to a file, and pass the file"
            )
        return samples

    def _filter(self, data: bytes, last: bool) -> bytes:
        samples = []
        self._held = b""
        while data and not self._done:
            if self._skip:
                skipped = min(self._skip, len(data))
                data, self._skip = data[skipped:], self._skip - skipped
            elif self._zeros is not None:
                if is_zero(data):
                    self._zeros += len(data)
                    break
                samples.append(bytes(self._zeros))
                self._extra, self._zeros, self._left = self._zeros, None, None
            elif self._left is None:
                samples.append(self._before_header(data, last))
                break
            elif self._left:
                samples.append(data[: self._left])
                data, self._left = data[self._left :], self._left - len(samples[-1])
            elif not last and len(data) < self._look:
                self._held = data
                break
            else:
                data = self._next_chunk(data, last)
                if self._held:
                    break
        return b"".join(samples)

    def _before_header(self, data: bytes, last: bool) -> bytes:
        """Return the samples in `data` up to the header of another file, if there is one.

        Unless `last` is set, the bytes at the end are kept until the next call, since a header may begin in them.
        """
        if (found := header_in(data)) is not None:
            self._done, self.problem = True, SEVERAL
            return data[:found]
        count = len(data) if last else max(len(data) - HEADER_BYTES, 0)
        self._held = data[count:]
        self._extra = None if self._extra is None else self._extra + count
        return data[:count]

    def _next_chunk(self, data: bytes, last: bool) -> bytes:
        """Read the header of the next chunk, if there is one, and return the rest of the data.

        If more bytes are needed to tell a chunk from samples, all data is kept until more data arrives.
        """
        window = Window(io.BytesIO(data), len(data))
        if not last and len(data) < MAX_HELD and self._is_open(window):
            self._held, self._look = data, 2 * len(data)
            return b""
        self._look = LOOK_BYTES
        other = next_file(window, 0)
        if other is not None:
            self._done = True
            self.problem = SEVERAL
            return b""
        # The number of remaining bytes is unknown. A chunk after the samples is not expected to be larger than this.
        left, order = UNKNOWN_BYTES, self._order
        is_broken = _is_mock_chunk if last else _is_broken_chain
        is_mock = any(is_broken(window, start, order) for start in {0, self._odd})
        is_more = goes_on(data, left, order) and goes_on(data[self._odd :], left, order)
        if self._at_samples and (is_more or is_mock):
            # Zeros after samples are padding. If the header declares no samples, zeros are silence.
            self._zeros = 0 if self._declared else None
            self._left = self._left if self._declared else None
            return data
        if not is_chunk(data, left, order):
            data = data[self._odd :]
        if len(data) < 8 or not is_chunk(data, left, order):
            self._done = True
            return b""
        name, size = struct.unpack(f"{self._order}4sI", data[:8])
        # After a known chunk, bytes that do not look like a chunk are not samples.
        may_be_samples = (self._at_samples or self._unknown is not None) and not data.startswith(TAGS)
        self._at_samples = name == b"data"
        if name == b"data":
            self._left, self._odd, self._declared = (None if size >= UNKNOWN_BYTES else size), size % 2, size
        else:
            self._skip, self._odd = size, size % 2
            self._unknown = name if may_be_samples and name not in KNOWN_CHUNKS else None
        return data[8:]

    def _is_open(self, window: Window) -> bool:
        """Return whether more bytes are needed to distinguish chunks and tags from samples."""
        for start in {0, self._odd}:
            head = window.at(start, 8)
            if head.startswith(b"ID3") and after_tags(window, start) + LOOK_BYTES > window.size:
                return True
            if self._at_samples and CHUNK_NAME.match(head) and head[:4] not in KNOWN_CHUNKS:
                return not _is_broken_chain(window, start, self._order)
        return False


def wav_streams(window: Window) -> list[Stream]:
    """Find the recordings in a WAV file."""
    streams: list[Stream] = []
    start: int | None = 0
    while start is not None:
        recording, start = _recording(window, start)
        streams += recording
    return streams


def _recording(window: Window, start: int) -> tuple[list[Stream], int | None]:
    """Return the streams of the recording at `start`, and the start of the next recording (None if there is none)."""
    size = window.size
    header = WavHeader(window.at(start, 12))
    spans: list[Span] = []
    problem, note, exact, following, has_list = None, None, True, None, False
    position = start + 12
    while position + 8 <= size:
        name, length = struct.unpack(f"{header.order}4sI", window.at(position, 8))
        begin = position + 8
        if not spans and not any(name) and (after := after_zeros(window, position)) > position:
            position, exact = after, False
            continue
        if spans and name in (b"RIFF", b"RIFX", b"RF64", b"BW64") and window.at(begin, 4) == b"WAVE":
            following = position
            break
        is_other = spans and (has_magic(window, position) or _is_tag(name))
        if is_other or not (CHUNK_NAME.match(name) or (not spans and begin + length <= size)):
            break
        if name != b"data":
            has_list = has_list or (name == b"LIST" and window.at(begin, 4) == b"wavl")
            is_read = name in (b"fmt ", b"ds64")
            header.note(name, window.at(begin, min(length, MAX_HEADER_CHUNK)) if is_read else b"")
            position = _after(window, begin, length)
            exact = exact and name in BARE_CHUNKS and (bool(spans) or position == begin + length + length % 2)
            continue
        header.data_size = length
        stop, problem, is_exact = _wav_data(window, header, start, begin)
        exact = exact and is_exact and not spans
        if 0 < header.declared < stop - begin:
            note = note or longer(header.declared, stop - begin)
        spans.append((begin, stop))
        position = _after(window, begin, stop - begin)
    if following is None and spans and (other := next_file(window, position)) is not None:
        if is_wav(window.at(other, 12), window):
            following = other
        else:
            problem = problem or JOINED
    if has_list and not spans:
        return [Stream([(start, size)], problem=IN_LIST)], None
    if not spans or not header.format:
        return [Stream([(start, size)], problem=_no_samples(window, start, position, header, spans))], None
    if header.is_mpeg:
        return _mpeg_inside(window, spans, problem), following
    if header.format[:2] in LINEAR and window.at(after_zeros(window, spans[0][0]), 4) in CODED:
        problem = (
            problem
            or "the audio contains DTS or AC-3, although its header says linear PCM; convert it to WAV with ffmpeg"
        )
    # libsndfile does not read BW64, which differs from RF64 only in its name.
    is_file = exact and start == 0 and following is None and header.magic != b"BW64" and not header.is_changed
    stream = samples_stream(window, header, spans)
    if is_file and stream.num_samples is None and stream.gain is None and stream.problem is None:
        return [whole_file(size, problem)], None
    return [replace(stream, problem=problem or stream.problem, note=note or stream.note)], following


def samples_stream(window: Window, header: WavHeader, spans: list[Span]) -> Stream:
    """Return one `Stream` of the samples of a WAV file, with a new header."""
    length = sum(stop - begin for begin, stop in spans)
    if is_wide(header.format, header.order):
        gain = wide_gain(window, header.format, header.order, spans)
        problem = UNKNOWN_LAYOUT.format(bits_of(header.format, header.order)) if gain is None else None
        header = replace(header, format=as_32_bits(header.format, header.order))
        return Stream(spans, header.rebuilt(length), problem=problem, gain=gain)
    codec = wav_codec(header.format, header.order)
    stream = Stream(spans) if codec is None else codec.fit(Stream(spans), length)
    return replace(stream, header=header.rebuilt(length + stream.padding))


def _is_tag(head: bytes) -> bool:
    """Return whether four bytes are the start of a metadata tag, rather than the name of a known chunk."""
    return head not in KNOWN_CHUNKS and any(head.startswith(tag[:4]) for tag in TAGS)


def _no_samples(window: Window, start: int, stop: int, header: WavHeader, spans: list[Span]) -> str:
    """Return the error message for a WAV file that lacks a `data` or `fmt ` chunk and whose chunks end at `stop`."""
    declared = int.from_bytes(window.at(start + 4, 4), "big" if header.order == ">" else "little")
    is_whole = stop == window.size and declared in (stop - start, stop - start - 8)
    if not spans and stop + 8 > window.size and not is_whole:
        return HEADER_CUT
    return f"the audio is damaged: it has no {'data' if header.format else 'fmt'} chunk"


def _mpeg_inside(window: Window, spans: list[Span], problem: str | None) -> list[Stream]:
    """Return the MPEG audio in a WAV file, without the WAV header.

    With the header, libsndfile would use the length that the header declares, which is only an estimate.
    """
    inner = Stream(spans)
    streams = [
        moved(stream, spans)
        for stream in mpeg_streams(Window(Splice(window.file, inner), sum(stop - start for start, stop in spans)))
    ]
    return [replace(stream, problem=problem or stream.problem) for stream in streams]


def _wav_data(window: Window, header: WavHeader, start: int, begin: int) -> tuple[int, str | None, bool]:
    """Return the end of the samples, an error message (or None), and whether the length in the header is correct."""
    available, declared = window.size - begin, header.declared
    if header.is_unknown(available):
        return *_to_end(window, begin), False
    if declared > available:
        counted = header.includes_header(begin - start, available)
        return window.size, None if counted else cut_short(declared, available), False
    stop = begin + declared
    if next_file(window, stop) is None and _samples_follow(window, stop, declared, header.order):
        return *_to_end(window, stop), False
    return stop, None, True


def _to_end(window: Window, position: int) -> tuple[int, str | None]:
    """Return the end of samples of unknown length, and an error message or None.

    The samples end at the header of another WAV file, or at the end of the file. The header of an audio file in
    another format is an error.
    """
    found = find_header(window, position)
    if found is None:
        return window.size, None
    return (found, None) if is_wav(window.at(found, 12), window) else (window.size, JOINED)


def _samples_follow(window: Window, stop: int, declared: int, order: str) -> bool:
    """Return whether the bytes after the declared samples are samples too, rather than chunks, tags or padding."""
    rest, left, odd = window.at(stop, 256), window.size - stop, declared % 2
    more = goes_on(rest, left, order) and goes_on(rest[odd:], left - odd, order)
    if not more and not any(_is_mock_chunk(window, start, order) for start in (stop, stop + odd)):
        return False
    # Zeros after samples are padding. If the header declares no samples, zeros are silence.
    return not declared or not window.is_zero(stop, window.size)


def _is_mock_chunk(window: Window, position: int, order: str) -> bool:
    """Return whether bytes that look like a chunk are samples."""
    end = _end_of_chunks(window, position, order)
    is_beyond = end > max(window.size + 1, position) and not window.at(position, 11).startswith(TAGS)
    return is_beyond or _is_broken_chain(window, position, order)


def _is_broken_chain(window: Window, position: int, order: str) -> bool:
    """Return whether unrecognized bytes follow one or more chunks with unknown names.

    Bytes are unrecognized if they are not a known chunk, another audio file, tags or padding.
    """
    if window.at(position, 11).startswith(TAGS):
        return False
    end = _end_of_chunks(window, position, order)
    if end == position or end + 8 > window.size or window.at(end, 4) in KNOWN_CHUNKS:
        return False
    return next_file(window, end) is None and after_tags(window, end) < window.size


def _end_of_chunks(window: Window, position: int, order: str) -> int:
    """Return the end of the consecutive chunks with unknown names that begin at a position."""
    while position + 8 <= window.size:
        head = window.at(position, 8)
        if not CHUNK_NAME.match(head) or head[:4] in KNOWN_CHUNKS:
            break
        position = _after(window, position + 8, struct.unpack_from(f"{order}I", head, 4)[0])
    return position


def _after(window: Window, begin: int, length: int) -> int:
    """Return the position after a chunk whose content has `length` bytes and starts at `begin`.

    A padding byte follows content of odd length. Some writers omit it.
    """
    position = begin + length
    padded = position + length % 2
    if padded != position and CHUNK_NAME.match(window.at(position, 4)) and window.at(position, 1) != b"\0":
        return position
    return padded
