"""Cache the positions of the recordings in each file, since training opens a file again for each segment.

To find the recordings in a FLAC, MP3 or Ogg file, the whole file must be read. That takes 0.2 to 1 s for an hour of
audio, far longer than reading a segment.
"""

import os
import time
from typing import BinaryIO

from nemo_lfr.io.containers import find_streams
from nemo_lfr.io.containers.stream import Stream

MAX_FILES = 4096
MAX_STREAMS = 64
# A file that changed less than this many nanoseconds ago may change again and keep its modification time.
SETTLED_NS = 2_000_000_000

# There is no lock, since a forked process could inherit it in the locked state. Each operation on the dict is atomic.
_found: dict[tuple[int, ...], list[Stream]] = {}


def cached_streams(file: BinaryIO) -> list[Stream]:
    """Find the recordings in a file with `find_streams`, or use the cached result if the file is unchanged.

    Args:
        file: seekable file, open for reading. For an object in memory, the result is not cached.

    Returns:
        The recordings in the file, in order.
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
    """Return a key that identifies a file and its version; None if the file should not be cached."""
    try:
        state = os.fstat(file.fileno())
    except OSError:  # not a file in the file system
        return None
    if not state.st_ino or time.time_ns() - state.st_mtime_ns < SETTLED_NS:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
