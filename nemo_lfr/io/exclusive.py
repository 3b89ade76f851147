"""Lock an output folder so that only one run writes to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import lock


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder.

    The lock needs no file, and the system releases it when the process ends in any way. Systems and file systems
    without such locks are not locked.

    Args:
        folder: an existing folder.

    Raises:
        NemoLfrError: if another run holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY) if os.name != "nt" else None
    try:
        if descriptor is not None and lock(descriptor) is False:
            raise NemoLfrError(f"{folder}: another run is writing there; wait for it, or stop it.")
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
