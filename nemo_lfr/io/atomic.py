"""Files that appear whole or not at all, and the removal of what killed runs left.

A result is written aside, as `NAME.xxxxxxxx.part` or in a folder `.writing-xxxxxxxx`, and renamed. While it is
written, it is locked; one that nobody holds a lock on was left by a killed process, and the next run removes it.
Nothing is ever opened through a link that lies where a file aside is to be.
"""

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

from nemo_lfr.errors import NemoLfrError

PART = re.compile(r"(?P<name>.*)\.[0-9a-f]{8}\.part", re.DOTALL)
WRITING = re.compile(r"\.writing-[a-z0-9_]{8}")
# Characters of the final name in a name aside, so that it fits a directory entry.
KEPT = 60


def check_overwrite(path: Path, overwrite: bool) -> None:
    """Raise unless `path` is free, or is a file that may be replaced."""
    if os.path.isdir(path):
        raise NemoLfrError(f"{path} is a folder, where a file is to be written; choose another name.")
    if os.path.exists(path) and not overwrite:
        raise NemoLfrError(f"{path} exists; pass --overwrite (overwrite=True) to replace it.")


def check_distinct(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raise if a result would replace what it is made from, by whatever name."""
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise NemoLfrError(f"{source} would be replaced by its own result; choose another target than {target}.")


def open_temporary(path: Path) -> IO[bytes]:
    """Open a new file beside `path`, to be renamed to it, with the permissions of any new file.

    It is locked until it is closed.

    Raises:
        OSError: naming `path`.
    """
    while True:
        aside = path.with_name(f"{path.name[:KEPT]}.{secrets.token_hex(4)}.part")
        with contextlib.suppress(FileExistsError), naming(path, aside):
            file = open(aside, "x+b")  # noqa: SIM115
            if lock(file.fileno()) is not False and os.path.lexists(aside):
                return file
            file.close()  # another process takes it for a leftover, since it saw it before it was locked


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a new file aside; it takes the place of `path` in the end, or is removed if an error is raised.

    Raises:
        OSError: naming `path`, as on a full disk.
    """
    with naming(path), open_temporary(path) as file, naming(path, Path(file.name)):
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # which renames no open file, and has no locks to lose
                file.close()
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> Path:
    """Replace a file at once, or not at all; returns its path.

    What a killed run left of it is removed by `sweep`, which a command calls once for all of its files.

    Args:
        path: of the file.
        data: its content, whole or piece by piece.

    Raises:
        OSError: naming `path`, as on a full disk.
    """
    with replacing(path) as file:
        file.writelines([data] if isinstance(data, bytes) else data)
    return path


@contextlib.contextmanager
def writing_folder(parent: Path) -> Iterator[Path]:
    """Make a folder inside `parent` for files that are to be renamed, and remove it, and older ones, in the end.

    Raises:
        OSError: naming `parent`, if no folder can be made there.
    """
    sweep(parent)
    while True:
        try:
            folder = tempfile.mkdtemp(dir=parent, prefix=".writing-")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(parent)) from error
        descriptor = _open_folder(folder)
        if descriptor is None or os.path.exists(folder):
            break
        os.close(descriptor)  # taken for a leftover before it was locked
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def sweep(folder: Path, names: Collection[str] | None = ()) -> None:
    """Remove what killed runs left in a folder: `.writing-*`, and the `.part` files of some final names.

    What another process is writing stays, and so does everything that is not named as this module names it. What
    cannot be removed is not an error.

    Args:
        folder: need not exist.
        names: final names; None for all, in a folder that holds this package's files alone.
    """
    shortened = None if names is None else {name[:KEPT] for name in names}
    try:
        with os.scandir(folder) as entries:
            leftovers = [entry for entry in entries if _is_leftover(entry, shortened)]
    except OSError:
        return
    for entry in leftovers:
        _remove(entry)


class Sweeper:
    """Removes what killed runs left of files whose names come one by one; each folder is listed once."""

    def __init__(self) -> None:
        self._leftovers: dict[Path, dict[str, list[os.DirEntry[str]]]] = {}

    def sweep(self, path: Path) -> None:
        """Remove the `.part` files of one final name, as `sweep` does."""
        if path.parent not in self._leftovers:
            self._leftovers[path.parent] = self._list(path.parent)
        for entry in self._leftovers[path.parent].pop(path.name[:KEPT], []):
            _remove(entry)

    @staticmethod
    def _list(folder: Path) -> "dict[str, list[os.DirEntry[str]]]":
        found: dict[str, list[os.DirEntry[str]]] = {}
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if (match := PART.fullmatch(entry.name)) and not entry.is_dir(follow_symlinks=False):
                    found.setdefault(match["name"], []).append(entry)
        return found


def _remove(entry: "os.DirEntry[str]") -> None:
    with contextlib.suppress(OSError):
        if entry.is_dir(follow_symlinks=False):
            if (descriptor := _open_folder(entry.path)) is not None:
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(descriptor)
        elif not entry.is_file(follow_symlinks=False) or _is_free(entry.path):
            os.unlink(entry.path)


@contextlib.contextmanager
def naming(path: Path, aside: Path | None = None) -> Iterator[None]:
    """Have errors of the system name a file that a user knows.

    Args:
        path: for errors that come without a name, as those of a full disk do.
        aside: a file or folder that becomes `path`; errors that name it, or what is inside it, name `path` too.
    """
    try:
        yield
    except OSError as error:
        named = error.filename
        is_aside = aside is not None and isinstance(named, str) and Path(named).is_relative_to(aside)
        if error.errno is not None and (named is None or is_aside):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _is_leftover(entry: "os.DirEntry[str]", names: Collection[str] | None) -> bool:
    if WRITING.fullmatch(entry.name):
        return entry.is_dir(follow_symlinks=False)
    match = PART.fullmatch(entry.name)
    return match is not None and (names is None or match["name"] in names) and not entry.is_dir(follow_symlinks=False)


def _is_free(path: str) -> bool:
    """Whether no process holds the lock of a file aside."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        # Windows has no locks, but removes no open files either.
        return lock(descriptor) or os.name == "nt"
    finally:
        os.close(descriptor)


def _open_folder(folder: str) -> int | None:
    """Open and lock a folder; None where another process holds its lock, or the system has no such locks."""
    if os.name == "nt":
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def lock(descriptor: int) -> bool | None:
    """Lock an open file without waiting: False if another process holds the lock, None if there are no locks here."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a network drive
        return None
    return True
