"""glibc's heap: by default it gives every large block back to the system when it is freed, and asks for it again.

An encoder frees and takes hundreds of megabytes for a second of audio, so that each page of them is mapped and cleared
anew: up to a third of the time. A process whose work this is keeps them instead.
"""

import ctypes
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from nemo_lfr.frames import Window

# mallopt's parameters, and the highest threshold that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD = 32 * 2**20
TRIM_THRESHOLD = 2**30
# Windows from one release to the next: after each the memory of a window is mapped anew.
WINDOWS = 8
# Batches of a corpus likewise, whose many lengths leave the heap in more pieces than windows do.
BATCHES = 4

_batches = itertools.count(1)
_Items = TypeVar("_Items")


def keep_heap() -> None:
    """Keep freed memory for the next window, up to 1 GiB; nothing where the C library is another."""
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def release_heap() -> None:
    """Give back what was freed: many lengths leave the heap in pieces that it would not use again."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def after_batch() -> None:
    """To call after each batch of a corpus: gives back what was freed, now and then."""
    if next(_batches) % BATCHES == 0:
        release_heap()


def flat(windows: Iterable[tuple[_Items, Window]]) -> Iterator[tuple[_Items, Window]]:
    """The same windows of a recording, for a longer one to need no more memory than a short one.

    What was freed is given back now and then, and before a window of another width, whose blocks may not fit there.
    """
    width = 0
    for number, (items, window) in enumerate(windows):
        if number and (window.num_frames != width or number % WINDOWS == 0):
            release_heap()
        width = window.num_frames
        yield items, window


def _glibc() -> ctypes.CDLL | None:
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
