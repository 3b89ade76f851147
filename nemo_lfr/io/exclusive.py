"""Lock an output folder so that only one run writes to it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import lock

LOCK_FILE = ".lock"


class _LockedFile:
    """Descriptor of a locked file.

    Forked children close the descriptors that they inherit, because a child may outlive the run and would keep the
    lock.
    """

    _opened: ClassVar[set["_LockedFile"]] = set()

    def __init__(self, path: Path, flags: int) -> None:
        self.descriptor: int | None = os.open(path, flags, 0o666)
        self._opened.add(self)

    def close(self) -> None:
        """Close the descriptor, which releases its lock. Further calls have no effect."""
        self._opened.discard(self)
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @classmethod
    def close_all(cls) -> None:
        """Close all descriptors. In a forked child, this does not release the locks of the parent."""
        for file in list(cls._opened):
            file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_LockedFile.close_all)


@contextmanager
def exclusive(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a folder while this context manager is active.

    On network drives that can lock only files, the file `.lock` in the folder is locked, and is not removed
    afterwards. The system releases the lock when the process ends for any reason. Without support for locks,
    such as on Windows, nothing is locked.

    Args:
        folder: an existing folder.
        shared: whether other runs that also set `shared` may hold the lock at the same time. Otherwise, no other run
            may hold it.

    Raises:
        NemoLfrError: if another run holds the lock.
    """
    with ExitStack() as stack:
        if os.name != "nt" and _lock(folder, stack, shared) is False:
            raise NemoLfrError(
                f"{folder}: another run is writing to this folder; wait until it ends, stop it, or choose another "
                "folder."
            )
        yield


@contextmanager
def exclusive_file(path: Path, message: str) -> Iterator[None]:
    """Hold an exclusive lock on a file while this context manager is active.

    Without support for locks, such as on Windows, nothing is locked. On network drives, other machines see locks on
    files, but not locks on folders.

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
    """Try to lock a folder, or a file in it if folders cannot be locked.

    The lock is held until `stack` closes.

    Returns:
        True if the lock was acquired, False if another process holds it, None if the system does not support locks.
    """
    for path, flags in ((folder, os.O_RDONLY), (folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)):
        if (locked := _lock_path(path, flags, stack, shared)) is not None:
            return locked
    return None


def _lock_path(path: Path, flags: int, stack: ExitStack, shared: bool) -> bool | None:
    file = _LockedFile(path, flags)
    stack.callback(file.close)
    assert file.descriptor is not None
    return lock(file.descriptor, shared)
