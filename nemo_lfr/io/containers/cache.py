"""Remember the recordings of files that are opened again and again, as for the segments of a training run.

Finding them reads a whole FLAC, MP3 or Ogg file: 0.2 to 1 s for an hour of audio, far more than a segment takes.
"""

import os
import time
from typing import BinaryIO

from nemo_lfr.io.containers import find_streams
from nemo_lfr.io.containers.stream import Stream

MAX_FILES = 4096
MAX_STREAMS = 64
# A file that was changed more recently may change again without another time of change.
SETTLED_NS = 2_000_000_000

# Without a lock, which a fork could leave locked: each operation on the table is atomic.
_found: dict[tuple[int, ...], list[Stream]] = {}


def cached_streams(file: BinaryIO) -> list[Stream]:
    """Return the result of `find_streams`, from memory if this file was scanned before and has not changed.

    Args:
        file: opened for reading, seekable. What is not a file of a file system is scanned every time.
    """
    key = _state(file)
    streams = None if key is None else _found.get(key)
    if streams is None:
        streams = find_streams(file)
        if key is not None and len(streams) <= MAX_STREAMS:
            if len(_found) >= MAX_FILES:
                _found.clear()
            _found[key] = streams
    return streams


def _state(file: BinaryIO) -> tuple[int, ...] | None:
    """Return what tells a file, and a version of it, from any other; None if nothing does."""
    try:
        state = os.fstat(file.fileno())
    except OSError:  # not a file of the system
        return None
    if not state.st_ino or time.time_ns() - state.st_mtime_ns < SETTLED_NS:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
