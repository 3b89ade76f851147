"""Settings for glibc's malloc, so that it keeps freed memory for the next window of audio.

By default, glibc returns large blocks to the system when they are freed. Mapping and clearing new pages then takes up
to a third of the encoding time.
"""

import ctypes
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from nemo_lfr.frames import Window

# Parameters of mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD = 32 * 2**20  # the highest value that mallopt accepts
TRIM_THRESHOLD = 2**30
# Number of windows from one trim to the next. Trims are rare, because the first window after a trim must map its
# memory again.
WINDOWS_PER_TRIM = 8
# Number of corpus batches from one trim to the next. Batches of many lengths fragment the heap more than windows do.
BATCHES_PER_TRIM = 4

_batches = itertools.count(1)
_Items = TypeVar("_Items")


def configure_malloc() -> None:
    """Let malloc keep up to 1 GiB of freed memory; do nothing without glibc."""
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def trim_malloc() -> None:
    """Return freed memory to the system; do nothing without glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def trim_after_batch() -> None:
    """Trim the heap once per `BATCHES_PER_TRIM` batches of a corpus. Call this function after every batch."""
    if next(_batches) % BATCHES_PER_TRIM == 0:
        trim_malloc()


def trim_between_windows(windows: Iterable[tuple[_Items, Window]]) -> Iterator[tuple[_Items, Window]]:
    """Yield the windows unchanged, calling `trim_malloc` between some of them.

    Periodic trims keep memory from growing with the duration of a recording. The heap is also trimmed when the width
    of the windows changes.
    """
    width = 0
    for number, (items, window) in enumerate(windows):
        if number and (window.num_frames != width or number % WINDOWS_PER_TRIM == 0):
            trim_malloc()
        width = window.num_frames
        yield items, window


def _glibc() -> ctypes.CDLL | None:
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
