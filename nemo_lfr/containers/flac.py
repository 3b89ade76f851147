"""FLAC: streams one after the other, whose length may be left open."""

from nemo_lfr.containers.stream import Stream, Window

# A name and the length of the first block: compressed audio does not hold eight such bytes by chance.
HEADS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
MAX_FRAME = 1 << 20


def flac_streams(window: Window) -> list[Stream]:
    starts, found = [0], 8
    while (found := window.find(b"fLaC", found)) >= 0:
        if window.at(found, 8) in HEADS:
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
        counted = _last_sample(window, start, stop, int.from_bytes(info[2:4], "big"))
        problem = "was cut short: its last frame is not whole" if counted is None else None
        known = int.from_bytes(info[13:18], "big") | (counted or 0)
        header = window.at(start, 21) + known.to_bytes(5, "big")
        streams.append(Stream([(start + len(header), stop)], header, problem=problem))
    return streams


def _last_sample(window: Window, start: int, stop: int, block_size: int) -> int | None:
    """Return the samples of a FLAC stream, by its last frame; None if that is not whole."""
    if stop - start > 128 and window.at(stop - 128, 3) == b"TAG":
        stop -= 128
    begin = max(start + 42, stop - MAX_FRAME)
    tail = window.at(begin, stop - begin)
    if not tail:
        return 0
    position = len(tail)
    while (position := tail.rfind(b"\xff", 0, position)) >= 0:
        frame = tail[position:]
        if len(frame) > 8 and frame[1] & 0xFE == 0xF8 and (end := _frame_end(frame, block_size)) is not None:
            # The CRC of a whole frame with its own at the end is 0.
            return end if _crc(frame, 16, 0x8005) == 0 else None
    return 0 if begin == start + 42 and _only_metadata(window, start, stop) else None


def _only_metadata(window: Window, start: int, stop: int) -> bool:
    """Return whether nothing follows a FLAC stream's blocks of metadata."""
    position, last = start + 4, False
    while not last and position + 4 <= stop:
        head = window.at(position, 4)
        last, position = bool(head[0] & 0x80), position + 4 + int.from_bytes(head[1:], "big")
    return last and position == stop


def _frame_end(frame: bytes, block_size: int) -> int | None:
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
