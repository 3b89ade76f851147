"""Find where another audio file begins behind the samples of one, as `cat` joins them."""

from nemo_lfr.io.containers.magic import after_tags, has_magic
from nemo_lfr.io.containers.mpeg import frames_follow
from nemo_lfr.io.containers.stream import JOINED, UNKNOWN_BYTES, Stream, Window, cut_short, whole_file

# Bytes that tell MPEG audio and AAC: three of their largest frames.
LOOK_BYTES = 1 << 15
ADTS_HEAD = 7


def next_file(window: Window, position: int) -> int | None:
    """Return where a file of any format begins at a position, after a pad byte, tags or zeros; None if none does."""
    if position >= window.size:
        return None
    for start in (position, position + 1, after_tags(window, position)):
        if has_magic(window, start) or frames_follow(window, start) or _adts_follows(window, start):
            return start
    return None


def adts_size(head: bytes) -> int | None:
    """Return the bytes of the ADTS frame, of AAC, that begins with seven bytes; None if they begin none."""
    if len(head) < ADTS_HEAD or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return None
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size > ADTS_HEAD else None


def _adts_follows(window: Window, position: int) -> bool:
    """Return whether three frames of AAC begin at a position."""
    for _ in range(3):
        if (size := adts_size(window.at(position, ADTS_HEAD))) is None:
            return False
        position += size
    return position <= window.size


def compare_size(window: Window, start: int, promised: int) -> list[Stream]:
    """Compare the bytes of samples that are promised with those from `start` on; another file may follow them."""
    available, end = max(0, window.size - start), start + promised
    if available < promised < UNKNOWN_BYTES:
        return [whole_file(window.size, cut_short(promised, available))]
    return [whole_file(window.size, JOINED if promised and next_file(window, end) is not None else None)]
