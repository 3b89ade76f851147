"""One run at a time in a folder of results."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_lfr.errors import NemoLfrError


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which leaves no file in it and ends with the process, however that ends.

    On systems and file systems without such locks nothing is locked.

    Args:
        folder: the folder, which exists.

    Raises:
        NemoLfrError: if another run holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY) if os.name != "nt" else None
    try:
        if descriptor is not None:
            _lock(descriptor, folder)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise NemoLfrError(f"{folder}: another run is writing there; wait for it, or stop it.") from error
