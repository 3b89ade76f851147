"""Open and replace only regular files.

Reading a pipe or a device may block or never end. Git LFS pointers are refused too: they stand in for files that were
not downloaded yet.
"""

import io
import os
import stat
from pathlib import Path
from typing import IO, Any

from nemo_lfr.errors import NemoLfrError, printable

POINTER = b"version https://git-lfs"
POINTER_PROBLEM = "this is a Git LFS pointer, not the file itself; run `git lfs pull`"


def open_regular(
    path: str | os.PathLike[str],
    error: type[NemoLfrError] = NemoLfrError,
    advice: str = "pass the path of a regular file",
) -> IO[bytes]:
    """Open a regular file for reading, without blocking on a pipe or a device.

    Args:
        path: the file.
        error: exception class to raise.
        advice: what the user should do, for the end of the error message.

    Raises:
        NemoLfrError: of class `error`, if `path` is not a regular file, or is a Git LFS pointer.
        OSError: if the file cannot be opened. This error, and errors when the file is read, name `path`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        if os.path.exists(path):
            _refuse(path, os.stat(path).st_mode, error, advice)
        raise
    try:
        _refuse(path, os.fstat(descriptor).st_mode, error, advice)
    except BaseException:
        os.close(descriptor)
        raise
    file = io.BufferedReader(_NamedFile(descriptor, path))
    try:
        if file.read(len(POINTER)) == POINTER:
            raise error(f"{printable(os.fspath(path))}: {POINTER_PROBLEM}.")
        file.seek(0)
        return file
    except BaseException:
        file.close()
        raise


class _NamedFile(io.FileIO):
    """File whose read errors, for instance on a damaged disk, name its path.

    Args:
        descriptor: descriptor of the open file; this object closes it.
        path: path of the file.
    """

    def __init__(self, descriptor: int, path: str | os.PathLike[str]) -> None:
        super().__init__(descriptor, "rb")
        self._path = os.fspath(path)

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, and return the number of bytes."""
        try:
            return super().readinto(buffer)
        except OSError as error:
            error.filename = self._path
            raise

    def readall(self) -> bytes:
        """Read the rest of the file."""
        try:
            return super().readall()
        except OSError as error:
            error.filename = self._path
            raise


def check_replaceable(path: str | os.PathLike[str], error: type[NemoLfrError] = NemoLfrError) -> None:
    """Check that an output path is not a pipe, a device or a socket, which the output file would replace.

    Args:
        path: output file; it need not exist.
        error: exception class to raise.

    Raises:
        NemoLfrError: of class `error`, if `path` is a pipe, a device or a socket.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISDIR(mode):  # a folder has its own message
        _refuse(path, mode, error, "choose another output path")


def _refuse(path: str | os.PathLike[str], mode: int, error: type[NemoLfrError], advice: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for test, name in kinds if test(mode)), "a device")
    raise error(f"{printable(os.fspath(path))}: not a regular file but {kind}; {advice}.")


def not_a_file(path: Path) -> str | None:
    """Return the reason why audio cannot be read from a path; None if the path is a regular file."""
    try:
        if path.is_file():
            return None
    except (OSError, ValueError) as error:  # a name that is too long or contains NUL
        return getattr(error, "strerror", None) or str(error)
    if path.is_dir():
        return "not a file but a folder"
    if path.exists():
        return "not a regular file; to read a pipe, connect it to stdin: nemo-lfr encode - -"
    return "a link to a missing file" if path.is_symlink() else "no such file"
