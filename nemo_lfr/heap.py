"""glibc's heap: by default it gives every large block back to the system when it is freed, and asks for it again.

An encoder frees and takes hundreds of megabytes for a second of audio, so that each page of them is mapped and cleared
anew: up to a third of the time. A process whose work this is keeps them instead.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

# mallopt's parameters, and the highest threshold that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD = 32 * 2**20
TRIM_THRESHOLD = 2**30
# Windows of a recording from one release to the next: each costs the mapping of a window's memory anew.
WINDOWS = 8

_Window = TypeVar("_Window")


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


def flat(windows: Iterable[_Window]) -> Iterator[_Window]:
    """The same windows; what was freed is given back after some, so that a longer recording needs no more memory.

    After the first two too: what the parts keep is allocated among the temporary memory of these.
    """
    for number, window in enumerate(windows):
        yield window
        if number < 2 or number % WINDOWS == 0:
            release_heap()


def _glibc() -> ctypes.CDLL | None:
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
