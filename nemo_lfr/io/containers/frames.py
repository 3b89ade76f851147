"""Check files that consist only of codec frames, such as AAC and AC-3.

FFmpeg decodes a truncated frame without an error, and decodes other bytes after the last frame as if they were audio.
"""

from collections.abc import Callable

from nemo_lfr.io.containers.joined import compare_end, next_file
from nemo_lfr.io.containers.sizes import FRAME_HEAD, FRAME_SIZES, FrameSize, frame_size_at
from nemo_lfr.io.containers.stream import TAGS, Stream, Window, whole_file

_GSM_FRAME, _GSM_RATE, _GSM_SAMPLES = 33, 8000, 160


def is_frames(head: bytes, window: Window) -> bool:
    """Return whether a file begins with a frame of AAC, AC-3, E-AC-3, DTS or LOAS.

    A second frame must follow, unless the file ends within the first frame or directly after it.
    """
    return _size_of(head, window) is not None


def _size_of(head: bytes, window: Window) -> FrameSize | None:
    for size_of in FRAME_SIZES.values():
        size = size_of(window.at(0, FRAME_HEAD))
        if size is not None and (size >= window.size or frame_size_at(window, size, size_of) is not None):
            return size_of
    return None


def frames_streams(window: Window) -> list[Stream]:
    """Return a file of codec frames as one `Stream`, after checking that frames follow each other up to the end."""
    size_of = _size_of(window.at(0, FRAME_HEAD), window)
    assert size_of is not None
    return _walk(window, size_of)


def _walk(window: Window, size_of: FrameSize) -> list[Stream]:
    position = 0
    while (size := frame_size_at(window, position, size_of)) is not None and position + size <= window.size:
        position += size
    rest = window.at(position, FRAME_HEAD)
    if size is not None or (0 < len(rest) < FRAME_HEAD and rest[:1] == window.at(0, 1)):
        rest_size = window.size - position
        note = f"the audio ends within a frame, as recorded streams do; its last {rest_size} bytes are ignored"
        return [Stream([(0, position)], note=note)]
    if not _file_follows(window, position, size_of) and (again := _resumed(window, position, size_of)) is not None:
        problem = f"the audio is damaged: {again - position} bytes at position {position} are not codec frames"
        return [whole_file(window.size, problem)]
    return compare_end(window, position)


def _file_follows(window: Window, position: int, size_of: FrameSize) -> bool:
    """Return whether another file begins at a position or after the tags that begin there.

    Frames of the file's own codec count as another file only if tags precede them. Otherwise, they are the rest of a
    damaged file.
    """
    start = next_file(window, position)
    is_tagged = window.at(position, 11).startswith(TAGS)
    return start is not None and (is_tagged or frame_size_at(window, start, size_of) is None)


def _resumed(window: Window, position: int, size_of: Callable[[bytes], int | None]) -> int | None:
    """Return the position at which frames continue after unrecognized bytes; None if no frames follow."""
    sync = window.at(0, 1)
    while (position := window.find(sync, position + 1)) >= 0:
        start = position
        for _ in range(4):
            if (size := frame_size_at(window, start, size_of)) is None:
                break
            start += size
        else:
            return position
    return None


def is_gsm(head: bytes, window: Window) -> bool:
    """Return whether a file begins with four or more GSM 06.10 frames, whose first four bits are constant."""
    starts = range(0, min(window.size - _GSM_FRAME, 32 * _GSM_FRAME) + 1, _GSM_FRAME)
    return len(starts) > 3 and all(window.at(start, 1)[0] >> 4 == 0xD for start in starts)


def gsm_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a GSM 06.10 file, after checking its frames.

    The stream gets an AIFC header, because libsndfile recognizes files without a header only by their suffix.
    """
    (stream,) = _walk(window, lambda head: _GSM_FRAME if head[:1] and head[0] >> 4 == 0xD else None)
    size = sum(stop - start for start, stop in stream.spans)
    common = b"\0\x01" + (size // _GSM_FRAME * _GSM_SAMPLES).to_bytes(4, "big") + b"\0\x10"
    # The rate is an 80-bit float: 8000 = 1.953125 * 2^12.
    common += (0x400B).to_bytes(2, "big") + (_GSM_RATE << 51).to_bytes(8, "big") + b"GSM \0\0"
    chunks = b"COMM" + len(common).to_bytes(4, "big") + common + b"SSND" + (8 + size).to_bytes(4, "big") + bytes(8)
    header = b"FORM" + (4 + len(chunks) + size).to_bytes(4, "big") + b"AIFC" + chunks
    stream.header, stream.is_file = header, False
    return [stream]
