"""Find the recordings in an Ogg file, and verify the numbers and checksums of its pages."""

import struct
import zlib
from collections.abc import Mapping

from nemo_lfr.io.containers.joined import next_file
from nemo_lfr.io.containers.stream import JOINED, TAGS, Stream, Window, several_tracks

# Beginning of the first packet of an audio codec.
_OPUS = b"OpusHead"
_AUDIO = (b"\x01vorbis", _OPUS, b"\x7fFLAC", b"Speex   ", b"fLaC")


# libsndfile decodes Opus at the input rate in the header. If this rate is 0, which means "unknown" (RFC 7845),
# libsndfile decodes at 8 kHz and loses the upper band. `_with_rate` therefore writes the full rate into the header.
_OPUS_RATE, _RATE_AT = 48000, 12


def ogg_streams(window: Window) -> list[Stream]:
    """Find the recordings in an Ogg file."""
    links: list[Stream] = []
    ends: dict[int, list[int]] = {}
    open_serials: set[int] = set()
    numbers: dict[int, int] = {}
    position, start, in_heads = 0, 0, True
    problem, tracks, header = None, 0, b""
    while position < window.size:
        page = window.at(position, 27)
        if page[:4] != b"OggS":
            found = window.find(b"OggS", position + 1)
            gap = (window.size if found < 0 else found) - position
            if found < 0 and (window.at(position, 8).startswith(TAGS) or window.is_zero(position, window.size)):
                break
            if next_file(window, position) not in (None, found):
                problem = problem or JOINED
            problem = problem or f"the audio is damaged: {gap} bytes at position {position} are not Ogg pages"
            if found < 0:
                break
            position = found
            continue
        table = window.at(position + 27, page[26]) if len(page) == 27 else b""
        length = 27 + len(table) + sum(table)
        if len(page) < 27 or len(table) < page[26] or position + length > window.size:
            problem = problem or "the audio was truncated: its last page is incomplete"
            position = window.size
            break
        if _checksum(window.at(position, length)) != struct.unpack_from("<I", page, 22)[0]:
            problem = problem or f"the audio is damaged: the Ogg page at position {position} has a wrong checksum"
        flags, serial, number = page[5], *struct.unpack_from("<II", page, 14)
        if flags & 2:  # the page begins a logical stream
            if not in_heads:  # after pages of other streams: the next recording
                links.append(_link(start, position, problem, open_serials, tracks, header, ends))
                start, problem, tracks, header = position, None, 0, b""
                open_serials, numbers, ends = set(), {}, {}
            in_heads = True
            open_serials.add(serial)
            is_audio = window.at(position + 27 + len(table), 8).startswith(_AUDIO)
            if is_audio:
                ends[serial] = [0, 0]
            tracks += is_audio
            if position == start:
                header = _with_rate(window.at(position, length), 27 + len(table))
        else:
            in_heads = False
            if serial in numbers and number != (numbers[serial] + 1) & 0xFFFFFFFF:
                problem = problem or f"the audio is damaged: Ogg pages are missing at position {position}"
        numbers[serial] = number
        # A packet ends in this page, so its time stamp is valid.
        if serial in ends and min(table, default=255) < 255:
            (end,) = struct.unpack_from("<q", page, 6)
            ends[serial] = [ends[serial][1], end]
        if flags & 4:
            open_serials.discard(serial)
        position += length
    links.append(_link(start, position, problem, open_serials, tracks, header, ends))
    if len(links) == 1 and not header:
        links[0].is_file = True
    return links


_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def _checksum(page: bytes) -> int:
    """Return the CRC of a page, computed with zeros in the checksum field.

    Ogg's CRC has the polynomial of zlib's CRC, but is neither reflected nor inverted at the start and the end.
    """
    cleared = page[:22] + bytes(4) + page[26:]
    inverted = zlib.crc32(cleared.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{inverted:032b}"[::-1], 2)


def _with_rate(page: bytes, begin: int) -> bytes:
    """Return the first page of an Opus stream with the input rate 0 replaced by 48 kHz.

    The result is b"" for any other page, and for an Opus stream with another rate.

    Args:
        page: the page.
        begin: position of the first packet.
    """
    at = begin + _RATE_AT
    if page[begin : begin + len(_OPUS)] != _OPUS or page[at : at + 4] != bytes(4):
        return b""
    page = page[:at] + struct.pack("<I", _OPUS_RATE) + page[at + 4 :]
    return page[:22] + struct.pack("<I", _checksum(page)) + page[26:]


def _link(
    start: int,
    stop: int,
    problem: str | None,
    open_serials: set[int],
    tracks: int,
    header: bytes,
    ends: Mapping[int, list[int]],
) -> Stream:
    """Return a recording as a `Stream`.

    Args:
        start: position of its first page.
        stop: position after its last page.
        problem: error message if the recording is damaged.
        open_serials: serial numbers of the logical streams whose last page is missing.
        tracks: number of audio tracks.
        header: bytes that replace the first page; b"" to keep it.
        ends: dict from the serial number of each audio track to the time stamps of its last two pages, in samples.
    """
    if open_serials:
        problem = problem or "the audio was truncated: its last page is missing"
    tail = max((last - before for before, last in ends.values()), default=0)
    return Stream(
        [(start + len(header), stop)], header, problem=problem, note=several_tracks(tracks), tail=max(0, tail)
    )
