"""Check that AVI files are complete, chunk by chunk.

FFmpeg skips what it does not understand, so damage to the name or size of a chunk would lose audio without an error.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from nemo_lfr.io.containers.parts import walked
from nemo_lfr.io.containers.stream import CHUNK_NAME, UNKNOWN_BYTES, Stream, Window

_HEAD, _LIST_HEAD = 8, 12  # sizes in bytes: header of a chunk, header of a list
_LISTS = frozenset((b"hdrl", b"strl", b"movi", b"rec "))  # lists whose chunks are checked
_DATA = re.compile(rb"(\d\d)(wb|dc|db|pc|tx|sb|iv)")  # name of a data chunk: number of the stream, kind of data
_OTHER = re.compile(rb"ix\d\d|JUNK|junk|LIST|rec |segm|\d\d__")  # other chunks in a `movi` list
_INDEX_ENTRY = 16
# Start of a data chunk, an index or a further RIFF chunk. A match after unrecognized bytes shows that the audio
# continues after damage.
_SECTION = re.compile(rb"\d\d(?:wb|dc|db|pc)...\0|idx1|RIFF....AVIX", re.DOTALL)


def is_avi(head: bytes, _: Window) -> bool:
    """Return whether a file is an AVI file."""
    return head[:4] == b"RIFF" and head[8:12] == b"AVI "


def avi_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an AVI file, after checking its chunks."""
    return walked(window, _parts(window), _SECTION)


@dataclass
class _Avi:
    """Information from the chunks that were read so far, for checking the next chunks.

    Attributes:
        kinds: type of each stream, such as b"auds".
        movi_end: end of the current `movi` list; 0 outside of these lists.
        data: a dict from the name of audio chunks, such as b"01wb", to a list of their sizes in bytes. It contains
            only the chunks in the first RIFF chunk.
    """

    kinds: list[bytes] = field(default_factory=list)
    movi_end: int = 0
    data: dict[bytes, list[int]] = field(default_factory=dict)

    def fits(self, name: bytes, start: int, end: int) -> bool:
        """Return whether the format allows a chunk with this name at bytes [start, end) of the file."""
        if start >= self.movi_end:
            return _DATA.fullmatch(name) is None and CHUNK_NAME.fullmatch(name) is not None
        if end > self.movi_end:
            return False
        if (match := _DATA.fullmatch(name)) is None:
            return _OTHER.fullmatch(name) is not None
        number = int(match[1])
        return number < len(self.kinds) and (self.kinds[number] == b"auds") == (match[2] == b"wb")


def _parts(window: Window) -> Iterator[int]:
    """Yield the size in bytes of each section.

    A section is the header of a RIFF chunk, the header of a list, a whole chunk of another type, or padding. The
    iterator stops before the first chunk that does not fit the format.
    """
    position, avi = 0, _Avi()
    while window.at(position, 4) == b"RIFF" and (position == 0 or window.at(position + 8, 4) == b"AVIX"):
        size = int.from_bytes(window.at(position + 4, 4), "little")
        end = position + _HEAD + size
        if not size or size >= UNKNOWN_BYTES:
            yield 0
            return
        yield _LIST_HEAD
        start, position = position, position + _LIST_HEAD
        while position + _HEAD <= end:
            part = _chunk(window, position, end, avi, is_first=not start)
            if part is None:
                return
            yield part
            position += part
        if position < end:  # padding, or an incomplete chunk at the end of the RIFF chunk
            yield end - position
        position = end + size % 2
        if size % 2 and position <= window.size:
            yield 1


def _chunk(window: Window, position: int, end: int, avi: _Avi, is_first: bool) -> int | None:
    """Return the size in bytes of the chunk at `position`; None if the chunk is invalid.

    For a list in `_LISTS`, this is the size of its header, so that the chunks in the list are checked next.

    Args:
        window: the file.
        position: start of the chunk.
        end: end of the RIFF chunk that contains it.
        avi: information from earlier chunks; the information from this chunk is added.
        is_first: whether this is the first RIFF chunk. The index does not list the contents of later RIFF chunks.
    """
    head = window.at(position, _LIST_HEAD)
    name, size = head[:4], int.from_bytes(head[4:_HEAD], "little")
    if len(head) < _HEAD:
        return end - position  # beyond the end of the file, so the caller reports a truncated file
    stop = position + _HEAD + size
    if stop > end and stop <= window.size:
        return None
    if stop > window.size:  # the file is truncated, unless the name of the chunk is damaged too
        return _HEAD + size if CHUNK_NAME.fullmatch(name) else None
    if not avi.fits(name, position, stop):
        return None
    if name == b"LIST" and head[_HEAD:] in _LISTS:
        if head[_HEAD:] == b"movi":
            avi.movi_end = stop
        return _LIST_HEAD
    if name == b"strh":
        avi.kinds.append(head[_HEAD:])
    if is_first and _DATA.fullmatch(name) and name.endswith(b"wb"):
        avi.data.setdefault(name, []).append(size)
    if name == b"idx1" and not _index_fits(window, position + _HEAD, size, avi.data):
        return None
    is_padded = size % 2 and stop < end and not CHUNK_NAME.fullmatch(window.at(stop, 4))
    return _HEAD + size + bool(is_padded)


def _index_fits(window: Window, start: int, size: int, data: dict[bytes, list[int]]) -> bool:
    """Return whether an index lists all audio chunks of the first RIFF chunk.

    FFmpeg may skip a chunk that is missing from the index.

    Args:
        window: the file.
        start: position of the first entry of the index.
        size: size of the index in bytes.
        data: a dict from the name of audio chunks, such as b"01wb", to a list of their sizes in bytes.
    """
    listed: dict[bytes, list[int]] = {name: [] for name in data}
    for position in range(start, start + size, _INDEX_ENTRY):
        entry = window.at(position, _INDEX_ENTRY)
        if entry[:4] in listed:
            listed[entry[:4]].append(int.from_bytes(entry[12:], "little"))
    return listed == data
