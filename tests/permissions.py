"""Files and folders that cannot be read, also for tests that root runs."""

import contextlib
import encodings.utf_8_sig  # noqa: F401  (Python loads a codec when it is first used, from files that NOBODY may not read)
import os
from collections.abc import Iterator
from pathlib import Path

NOBODY = 65534


@contextlib.contextmanager
def closed(*paths: Path, root: Path) -> Iterator[None]:
    """Make paths unreadable; root becomes another user, because root may read everything.

    Args:
        paths: files and folders.
        root: the folder `tmp_path` of the test. All users may write to it.
    """
    for path in paths:
        path.chmod(0)
    user = os.geteuid()
    if user == 0:
        root.chmod(0o777)
        for folder in root.parents[:3]:  # folders of pytest, one more in a parallel run
            folder.chmod(0o755)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        for path in paths:
            path.chmod(0o700)
