"""Check that MPEG program streams (MPG, VOB) and transport streams (TS, M2TS) are complete.

FFmpeg reads the available part of a truncated file without an error. If several files were joined, FFmpeg reads only
the tracks of the first one.
"""

import numpy as np

from nemo_lfr.io.containers.joined import compare_end, next_file
from nemo_lfr.io.containers.magic import after_zeros
from nemo_lfr.io.containers.stream import JOINED, Stream, Window, cut_short, whole_file

_START = b"\0\0\x01"  # start code of each packet in a program stream, before the packet's id
_END, _PACK, _PRIVATE, _PADDING = 0xB9, 0xBA, 0xBD, 0xBE
_HEAD, _LONGEST_HEAD = 14, 266  # size in bytes of the header of a pack, and of the longest header of a packet
_LEAST = 0xBB  # packets with this or a larger id have a length field
_SYNC, _PACKET = 0x47, 188
_PACKETS = 1 << 13  # number of packets to read at a time
# Pairs (bytes before each packet, distance between packets in bytes): plain, with a time code, with a checksum.
_LAYOUTS = ((0, _PACKET), (4, _PACKET + 4), (0, _PACKET + 16))
_AUDIO_IDS = (*range(0xC0, 0xE0), _PRIVATE, 0xFD)
# First byte of AC-3 data in a private packet. In program streams, a byte of 0x80 or more precedes AC-3, DTS and PCM.
_AC3 = 0x0B

Extents = dict[int, tuple[int, int]]  # a dict from each track to the positions of its first and last packets


def is_program(head: bytes, _: Window) -> bool:
    """Return whether a file is an MPEG program stream."""
    return head[:4] == _START + bytes([_PACK])


def program_streams(window: Window) -> list[Stream]:
    """Return an MPEG program stream as one `Stream`, after checking its packets."""
    position = 0
    extents: Extents = {}
    while (head := window.at(position, _HEAD))[:3] in (_START, bytes(3)) and len(head) > 3:
        if head[:3] == bytes(3):  # stuffing between packets
            end = after_zeros(window, position)
            if window.at(end, 1) != b"\x01":
                break
            position = end - 2
            continue
        kind, size = head[3], _size(head)
        if size is None:
            break
        if position + size > window.size:
            if kind == _PADDING:
                return _joined(window, extents) or [whole_file(window.size)]
            return [whole_file(window.size, cut_short(size, window.size - position))]
        if kind in _AUDIO_IDS and (track := _track(window.at(position, _LONGEST_HEAD))) is not None:
            _note_track(extents, track, position)
        position += size
    if next_file(window, position) is None:
        again = window.find(_START + bytes([_PACK]), position)
        if again >= 0:
            problem = f"the audio is damaged: {again - position} bytes at position {position} are not MPEG packets"
            return [whole_file(window.size, problem)]
        if 0 < window.size - position < _HEAD and window.at(position, 3) == _START:
            return [whole_file(window.size, cut_short(_HEAD, window.size - position))]
    return _joined(window, extents) or compare_end(window, position)


def _size(head: bytes) -> int | None:
    """Return the size of a packet of a program stream; None if the bytes are not a packet."""
    kind = head[3]
    if kind == _END:
        return 4
    if len(head) < _HEAD:
        return None if kind < _PACK else _HEAD
    if kind == _PACK:
        return _HEAD + (head[13] & 7) if head[4] >> 6 == 1 else 12
    return 6 + int.from_bytes(head[4:6], "big") if kind >= _LEAST else None


def _track(packet: bytes) -> int | None:
    """Return the track number of an audio packet; None for a private packet that is not audio."""
    if packet[3] != _PRIVATE or len(packet) < 9:
        return packet[3]
    content = packet[9 + packet[8] :][:1]
    return content[0] if content and (content[0] == _AC3 or content[0] >= 0x80) else None


def _note_track(extents: Extents, track: int, position: int) -> None:
    extents[track] = extents.get(track, (position, position))[0], position


def _joined(window: Window, extents: Extents) -> list[Stream]:
    """Return a stream with a `problem` if several files were joined, else no stream.

    In a joined file, a track ends before another one begins.
    """
    last = min((last for _, last in extents.values()), default=0)
    is_joined = any(first > last for first, _ in extents.values())
    return [whole_file(window.size, JOINED)] if is_joined else []


def _layout(window: Window) -> tuple[int, int] | None:
    for lead, step in _LAYOUTS:
        if all(window.at(lead + step * index, 1) == bytes([_SYNC]) for index in range(4)):
            return lead, step
    return None


def is_transport(_: bytes, window: Window) -> bool:
    """Return whether a file is an MPEG transport stream."""
    return _layout(window) is not None


def transport_streams(window: Window) -> list[Stream]:
    """Return an MPEG transport stream as one `Stream`, after checking its packets, which all have the same size."""
    layout = _layout(window)
    assert layout is not None
    lead, step = layout
    position, extents = 0, Extents()
    while position + step <= window.size:
        block = window.at(position, step * _PACKETS)
        packets = np.frombuffer(block, np.uint8, len(block) // step * step).reshape(-1, step)[:, lead:]
        wrong = np.flatnonzero(packets[:, 0] != _SYNC)
        count = int(wrong[0]) if len(wrong) else len(packets)
        _note_tracks(extents, packets[:count], position // step)
        position += count * step
        if len(wrong):
            break
    if 0 < window.size - position <= lead or window.at(position + lead, 1) == bytes([_SYNC]):
        return [whole_file(window.size, "the audio was truncated: its last packet is incomplete")]
    if next_file(window, position) is None and _resumes(window, position, step):
        damage = f"the audio is damaged: the bytes at position {position} are not an MPEG packet"
        return [whole_file(window.size, damage)]
    return _joined(window, extents) or compare_end(window, position)


def _note_tracks(extents: Extents, packets: np.ndarray, index: int) -> None:
    """Record in `extents` the track of each packet in which an audio frame begins.

    `packets` is uint8 [N, bytes per packet]. `index` is the position of `packets[0]` in the file, in packets.
    """
    ids = (packets[:, 1] & 0x1F).astype(int) << 8 | packets[:, 2]
    # A flag marks a packet in which a frame begins. The frame follows an optional adaptation field.
    for row in np.flatnonzero(packets[:, 1] & 0x40):
        packet = packets[row]
        start = 4 + (1 + int(packet[4]) if packet[3] & 0x20 else 0)
        head = packet[start:].tobytes()
        if len(head) > 3 and head[:3] == _START and head[3] in _AUDIO_IDS and _track(head) is not None:
            _note_track(extents, int(ids[row]), index + int(row))


def _resumes(window: Window, position: int, step: int) -> bool:
    """Return whether packets of `step` bytes begin again anywhere after a position."""
    while (position := window.find(bytes([_SYNC]), position + 1)) >= 0:
        if all(window.at(position + step * index, 1) == bytes([_SYNC]) for index in range(1, 6)):
            return True
    return False
