"""Cache of scanned recordings for files that are opened repeatedly.

Training opens a file for each segment. A scan reads an entire FLAC, MP3 or Ogg file: 0.2 to 1 s for an hour of audio,
far longer than reading a segment takes.
"""

import os
import time
from typing import BinaryIO

from nemo_lfr.io.containers import find_streams
from nemo_lfr.io.containers.stream import Stream

MAX_FILES = 4096
MAX_STREAMS = 64
# A file that changed more recently may change again without a new modification time.
SETTLED_NS = 2_000_000_000

# Without a lock, which a fork could leave locked: each operation on the dictionary is atomic.
_found: dict[tuple[int, ...], list[Stream]] = {}


def cached_streams(file: BinaryIO) -> list[Stream]:
    """Return the result of `find_streams`, from the cache if the file is unchanged.

    Args:
        file: opened for reading, seekable. An object that is not a file of the file system is scanned every time.

    Returns:
        The recordings of the file, see `find_streams`.
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
    """Return a key that identifies a file and its version; None if there is none."""
    try:
        state = os.fstat(file.fileno())
    except OSError:  # not a file of the file system
        return None
    if not state.st_ino or time.time_ns() - state.st_mtime_ns < SETTLED_NS:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
