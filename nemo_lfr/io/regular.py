"""Open files, and refuse pipes and devices: reading from them may block or never end."""

import os
import stat
from typing import IO

from nemo_lfr.errors import NemoLfrError, printable


def open_regular(
    path: str | os.PathLike[str], error: type[NemoLfrError] = NemoLfrError, advice: str = "give the file itself"
) -> IO[bytes]:
    """Open a regular file for reading, without blocking on a pipe or a device.

    Args:
        path: the file.
        error: exception class to raise.
        advice: what the user should do, for the end of the error message.

    Raises:
        NemoLfrError: of class `error`, if `path` is a pipe, device, socket or folder.
        OSError: if the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        if os.path.exists(path):
            _refuse(path, os.stat(path).st_mode, error, advice)
        raise
    try:
        _refuse(path, os.fstat(descriptor).st_mode, error, advice)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse(path: str | os.PathLike[str], mode: int, error: type[NemoLfrError], advice: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for test, name in kinds if test(mode)), "a device")
    raise error(f"{printable(os.fspath(path))}: not a regular file but {kind}; {advice}.")
