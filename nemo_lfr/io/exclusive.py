"""Lock an output folder so that only one run writes to it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import lock

LOCK_FILE = ".lock"


@contextmanager
def exclusive(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a folder while this context manager is active.

    The folder itself is locked. On network drives that can lock only files, the file `.lock` in the folder is locked
    instead, and is not removed afterwards. The system releases the lock when the process ends for any reason. Nothing
    is locked on systems without such locks.

    Args:
        folder: an existing folder.
        shared: whether several runs may hold the lock at the same time. No run can hold an exclusive lock while
            another run holds a shared one, and vice versa.

    Raises:
        NemoLfrError: if another run holds the lock.
    """
    with ExitStack() as stack:
        if os.name != "nt" and _lock(folder, stack, shared) is False:
            raise NemoLfrError(f"{folder}: another run is writing to this folder; wait until it ends, or stop it.")
        yield


@contextmanager
def exclusive_file(path: Path, message: str) -> Iterator[None]:
    """Hold an exclusive lock on a file while this context manager is active.

    On network drives, other machines see locks on files, but not locks on folders.

    Args:
        path: file in an existing folder. It is created if it does not exist, and is not removed afterwards.
        message: message of the error.

    Raises:
        NemoLfrError: if another process holds the lock.
    """
    with ExitStack() as stack:
        if os.name != "nt" and _lock_path(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, stack, False) is False:
            raise NemoLfrError(message)
        yield


def _lock(folder: Path, stack: ExitStack, shared: bool) -> bool | None:
    """Try to lock a folder, or a file in it if folders cannot be locked; see `lock` for the result."""
    for path, flags in ((folder, os.O_RDONLY), (folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)):
        if (locked := _lock_path(path, flags, stack, shared)) is not None:
            return locked
    return None


def _lock_path(path: Path, flags: int, stack: ExitStack, shared: bool) -> bool | None:
    descriptor = os.open(path, flags, 0o666)
    stack.callback(os.close, descriptor)
    return lock(descriptor, shared)
