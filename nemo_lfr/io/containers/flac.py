"""Find the FLAC streams in a file. Streams may be concatenated, and their headers may lack the length."""

import functools
from collections.abc import Iterator

from nemo_lfr.io.containers.joined import next_file
from nemo_lfr.io.containers.magic import after_tags
from nemo_lfr.io.containers.stream import HEADER_CUT, JOINED, Stream, Window, without_tags

# The magic number, and the type and length of the first block. Compressed audio is unlikely to contain these bytes.
HEADS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
FRAME, MAX_FRAME = 1 << 16, 1 << 20  # typical and maximum size of a frame in bytes
LAST_FRAME = "the audio was truncated: its last frame is incomplete"
MAX_SAMPLES = (1 << 36) - 1


def flac_streams(window: Window) -> list[Stream]:
    """Find the FLAC streams in a file."""
    starts, found = [0], 8
    while (found := window.find(b"fLaC", found)) >= 0:
        if window.at(found, 8) in HEADS:
            starts.append(found)
        found += 4
    streams = []
    for start, stop in zip(starts, [*starts[1:], window.size], strict=True):
        streams.append(_stream(window, start, stop))
    return streams


def _stream(window: Window, start: int, stop: int) -> Stream:
    """Return bytes [start, stop) as a `Stream`. If the FLAC header and frames disagree, the header is corrected."""
    info = window.at(start + 8, 34)
    if len(info) < 34 or _after_metadata(window, start, stop) is None:
        return Stream([(start, stop)], problem=HEADER_CUT)
    known = int.from_bytes(info[13:18], "big")
    total = known & MAX_SAMPLES
    # With a fixed block size, a frame stores its number. The index of its first sample is this number times the size.
    block_size = int.from_bytes(info[2:4], "big") if info[:2] == info[2:4] else 0
    end = without_tags(window, start, stop)
    is_file = start == 0 and stop == window.size
    counted, is_whole = _last_sample(window, start, end, block_size)
    if counted is None and is_whole:  # the first frame has no valid header, so the length cannot be checked
        return Stream([(start, end)], is_file=is_file)
    if total and counted is not None and is_whole and counted == total:
        return Stream([(start, end)], is_file=is_file)
    if not is_whole and total:
        return _before_others(window, Stream([(start, end)], is_file=is_file), total, block_size)
    problem = None if is_whole else LAST_FRAME
    if counted is not None and counted < total:
        problem = f"the audio was truncated: its header declares {total} samples, but there are {counted}"
    # The header gets the counted number of samples, since libsndfile stops at the number in the header.
    header = window.at(start, 21) + (known - total | (counted or 0)).to_bytes(5, "big")
    return Stream([(start + len(header), end)], header, problem=problem)


def _before_others(window: Window, stream: Stream, total: int, block_size: int) -> Stream:
    """Add a `problem` or a `note` to a FLAC stream whose last bytes are not a complete frame.

    The stream gets a `problem` if it is truncated or another audio file follows it, and a `note` if other data follows
    its last frame.

    Args:
        window: the file.
        stream: the stream.
        total: number of samples that the header declares.
        block_size: number of samples per frame; 0 if it varies.

    Returns:
        `stream` itself, changed in place.
    """
    ((start, stop),) = stream.spans
    first = _after_metadata(window, start, stop)
    position = stop if first is None else first
    begin = None if first is None else _frame_span(window.at(first, 32), block_size)
    while begin is not None and (position := window.find(b"\xff", position, stop)) >= 0:
        head = window.at(position, 32)
        if len(head) > 8 and head[1] & 0xFE == 0xF8:
            span = _frame_span(head, block_size)
            if span is not None and span[1] - begin[0] == total:
                ends = [position + end for end in _frame_ends(window.at(position, min(MAX_FRAME, stop - position)))]
                if ends and not any(after_tags(window, end) >= stop for end in ends):
                    is_joined = any(next_file(window, end) is not None for end in ends)
                    stream.problem = JOINED if is_joined else None
                    stream.note = "the bytes after the last frame are not FLAC and are ignored"
                if ends:
                    return stream
        position += 1
    stream.problem = LAST_FRAME
    return stream


def _frame_ends(data: bytes) -> Iterator[int]:
    """Yield positions at which the frame at the start of `data` may end.

    At the end of a frame, the CRC of all its bytes, including the CRC field, is 0. It may be 0 elsewhere by chance.
    """
    table, value = _crc_table(16, 0x8005), 0
    for index, byte in enumerate(data):
        value = (value << 8 ^ table[value >> 8 ^ byte]) & 0xFFFF
        if not value and index > 8:
            yield index + 1


def _last_sample(window: Window, start: int, stop: int, block_size: int) -> tuple[int | None, bool]:
    """Return the number of samples in a FLAC stream, and whether the stream ends with a complete frame.

    The number is None if the stream does not end with a complete frame, or if the header of the first frame is
    invalid.
    """
    first = _after_metadata(window, start, stop)
    if first is not None and first == stop:
        return 0, True
    for length in (FRAME, MAX_FRAME):
        begin = max(start + 42, stop - length)
        tail = window.at(begin, max(stop - begin, 0))
        position = len(tail)
        while (position := tail.rfind(b"\xff", 0, position)) >= 0:
            frame = tail[position:]
            if len(frame) <= 8 or frame[1] & 0xFE != 0xF8 or (span := _frame_span(frame, block_size)) is None:
                continue
            # The CRC over a complete frame including its CRC field is 0. Compressed samples may resemble a header.
            if _crc(frame, 16, 0x8005) == 0:
                return _counted(window, first, span[1], block_size), True
    return None, False


def _counted(window: Window, first: int | None, end: int, block_size: int) -> int | None:
    """Return the number of samples from the frame at byte `first` up to sample `end`.

    The result is None if there is no frame (`first` is None), or if its header is invalid.
    """
    span = None if first is None else _frame_span(window.at(first, 32), block_size)
    return None if span is None else end - span[0]


def _after_metadata(window: Window, start: int, stop: int) -> int | None:
    """Return the position after a stream's metadata blocks; None if they extend beyond the stream."""
    position, last = start + 4, False
    while not last and position + 4 <= stop:
        head = window.at(position, 4)
        last, position = bool(head[0] & 0x80), position + 4 + int.from_bytes(head[1:], "big")
    return position if last and position <= stop else None


def _frame_span(frame: bytes, block_size: int) -> tuple[int, int] | None:
    """Return the range [first, stop) of samples in a frame; None if the frame's header is invalid."""
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
    if not frame[1] & 1 and not block_size:
        return None
    first = number if frame[1] & 1 else number * block_size
    return first, first + samples


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    """Return the CRC of `data` with a width of `bits` bits, most significant bit first, initial value 0."""
    table, mask, value = _crc_table(bits, polynomial), (1 << bits) - 1, 0
    for byte in data:
        value = (value << 8 ^ table[value >> (bits - 8) ^ byte]) & mask
    return value


@functools.cache
def _crc_table(bits: int, polynomial: int) -> tuple[int, ...]:
    top, mask = 1 << (bits - 1), (1 << bits) - 1
    table = []
    for index in range(256):
        entry = index << (bits - 8)
        for _ in range(8):
            entry = (entry << 1 ^ polynomial if entry & top else entry << 1) & mask
        table.append(entry)
    return tuple(table)
