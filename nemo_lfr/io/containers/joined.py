"""Detection of another audio file after the samples of one, as `cat` joins files."""

from nemo_lfr.io.containers.magic import after_tags, has_magic
from nemo_lfr.io.containers.mpeg import frames_follow
from nemo_lfr.io.containers.stream import JOINED, UNKNOWN_BYTES, Stream, Window, cut_short, whole_file

# Number of bytes that identify MPEG audio and AAC: three of their largest frames.
LOOK_BYTES = 1 << 15
ADTS_HEAD = 7


def next_file(window: Window, position: int) -> int | None:
    """Return the start of an audio file at a position; None if there is none.

    A padding byte, tags or zeros before it are skipped.
    """
    if position >= window.size:
        return None
    for start in (position, position + 1, after_tags(window, position)):
        if has_magic(window, start) or frames_follow(window, start) or _adts_follows(window, start):
            return start
    return None


def adts_size(head: bytes) -> int | None:
    """Return the size of an ADTS (AAC) frame from its first seven bytes.

    The result is None if the bytes are not a frame header.
    """
    if len(head) < ADTS_HEAD or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return None
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size > ADTS_HEAD else None


def _adts_follows(window: Window, position: int) -> bool:
    """Return whether three AAC frames begin at a position."""
    for _ in range(3):
        if (size := adts_size(window.at(position, ADTS_HEAD))) is None:
            return False
        position += size
    return position <= window.size


def compare_size(window: Window, start: int, promised: int) -> list[Stream]:
    """Compare the declared and the available number of bytes of samples.

    Args:
        window: the file.
        start: position of the first sample.
        promised: number of bytes that the header declares.

    Returns:
        The file as one stream, with a problem if it is truncated or another file follows the samples.
    """
    available, end = max(0, window.size - start), start + promised
    if available < promised < UNKNOWN_BYTES:
        return [whole_file(window.size, cut_short(promised, available))]
    return [whole_file(window.size, JOINED if promised and next_file(window, end) is not None else None)]
