"""Find where another audio file begins behind the samples of one, as `cat` joins them."""

from nemo_lfr.containers.magic import after_tags, has_magic
from nemo_lfr.containers.mpeg import frames_follow
from nemo_lfr.containers.stream import JOINED, UNKNOWN_BYTES, Stream, Window, cut_short, whole_file

# Bytes that tell MPEG audio: three of its largest frames.
LOOK_BYTES = 8192


def next_file(window: Window, position: int) -> int | None:
    """Return where a file of any format begins at a position, after a pad byte, tags or zeros; None if none does."""
    if position >= window.size:
        return None
    for start in (position, position + 1, after_tags(window, position)):
        if has_magic(window, start) or frames_follow(window, start):
            return start
    return None


def compare_size(window: Window, start: int, promised: int) -> list[Stream]:
    """Compare the bytes of samples that are promised with those from `start` on; another file may follow them."""
    available, end = max(0, window.size - start), start + promised
    if available < promised < UNKNOWN_BYTES:
        return [whole_file(window.size, cut_short(promised, available))]
    return [whole_file(window.size, JOINED if promised and next_file(window, end) is not None else None)]
