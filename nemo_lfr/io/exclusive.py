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
    """Hold an exclusive lock on a folder.

    The lock is on the folder itself. Network drives that only lock files get a file `.lock` in it, which stays. The
    system releases the lock when the process ends in any way. Systems without such locks are not locked.

    Args:
        folder: an existing folder.
        shared: hold a lock that excludes exclusive locks only.

    Raises:
        NemoLfrError: if another run holds the lock.
    """
    with ExitStack() as stack:
        if os.name != "nt" and _lock(folder, stack, shared) is False:
            raise NemoLfrError(f"{folder}: another run is writing there; wait until it ends, or stop it.")
        yield


@contextmanager
def exclusive_file(path: Path, message: str) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if it does not exist and stays.

    Network drives share locks on files between machines, but not those on folders.

    Args:
        path: the file, in an existing folder.
        message: message of the error.

    Raises:
        NemoLfrError: if another process holds the lock.
    """
    with ExitStack() as stack:
        if os.name != "nt" and _lock_path(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, stack, False) is False:
            raise NemoLfrError(message)
        yield


def _lock(folder: Path, stack: ExitStack, shared: bool) -> bool | None:
    """Try to lock a folder, or else a file in it; see `lock`. The stack closes what was opened."""
    for path, flags in ((folder, os.O_RDONLY), (folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)):
        if (locked := _lock_path(path, flags, stack, shared)) is not None:
            return locked
    return None


def _lock_path(path: Path, flags: int, stack: ExitStack, shared: bool) -> bool | None:
    descriptor = os.open(path, flags, 0o666)
    stack.callback(os.close, descriptor)
    return lock(descriptor, shared)
