"""Write files atomically, check output paths, and remove temporary files of killed runs.

A result is written to a temporary file `NAME.xxxxxxxx.part`, or into a temporary folder `.writing-xxxxxxxx`, and
renamed when it is complete. Temporary files are locked while they are written. A temporary file without a lock was
left by a killed process, and the next run removes it. Symbolic links in place of a temporary file are not followed.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

from nemo_lfr.errors import NemoLfrError, OutputExistsError
from nemo_lfr.io.regular import check_replaceable

PART = re.compile(r"(?P<name>.*)\.[0-9a-f]{8}\.part", re.DOTALL)
WRITING = re.compile(r"\.writing-[a-z0-9_]{8}")
# A temporary name keeps at most this many characters of the final name, since file systems limit the length of names.
KEPT = 60
# Error numbers of `fsync` on file systems that do not have it, such as some FUSE file systems and network drives.
NO_SYNC = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))


def check_overwrite(path: Path, overwrite: bool) -> None:
    """Check that an output path does not exist yet or may be overwritten.

    A broken link counts as an existing file, since the new file would replace the link.

    Args:
        path: output file.
        overwrite: whether an existing file may be replaced.

    Raises:
        OutputExistsError: if `path` exists and `overwrite` is not set.
        NemoLfrError: if `path` is a folder, pipe, device or socket.
    """
    if os.path.isdir(path):
        raise NemoLfrError(f"{path} is a folder, not an output file; choose another name.")
    check_replaceable(path)
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(f"{path} exists; pass --overwrite (overwrite=True) to replace it.")


def publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a complete temporary file its final name.

    If `overwrite` is not set, an existing file with this name is kept. On file systems without hard links, a file that
    another process creates at the last moment may be replaced.

    Args:
        temporary: temporary file in the folder of `path`. If it still exists afterwards, the caller must remove it.
        path: output file.
        overwrite: whether an existing file may be replaced.

    Raises:
        OutputExistsError: if `path` exists and `overwrite` is not set.
        OSError: if the file cannot be renamed.
    """
    if overwrite:
        os.replace(temporary, path)
    elif not _link(temporary, path):
        raise OutputExistsError(
            f"{path} was written by another program in the meantime, and is kept; pass --overwrite (overwrite=True) "
            "to replace it."
        )


def _link(temporary: Path, path: Path) -> bool:
    """Give a file the name `path`. Return False, without a change, if this name already exists."""
    try:
        os.link(temporary, path)
    except OSError:  # mostly a file system without hard links; after other errors, renaming fails, too
        if os.path.lexists(path):
            return _is_linked(temporary, path)
        os.replace(temporary, path)
    return True


def _is_linked(temporary: Path, path: Path) -> bool:
    """Return whether `path` is a second name of the temporary file, although `os.link` raised an error.

    If a reply is lost, NFS repeats the request, which then finds the link of the first request.
    """
    status = os.stat(temporary)
    return status.st_nlink == 2 and os.path.samestat(status, os.lstat(path))


def sync(descriptor: int) -> None:
    """Wait until the data of an open file is on disk.

    On file systems without `fsync`, this function does nothing.

    Args:
        descriptor: descriptor of the open file.

    Raises:
        OSError: if the data cannot be written, for instance on a full disk.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def make_folder(path: Path) -> None:
    """Create an output folder and its parents.

    Raises:
        NemoLfrError: if the path or one of its parents is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        place = next((part for part in (path, *path.parents) if os.path.exists(part) and not part.is_dir()), path)
        raise NemoLfrError(f"{place} is a file, not a folder; choose another name.") from error


def check_distinct(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Check that an output path is not the same file as the input, even under another name.

    Raises:
        NemoLfrError: if both paths are the same file, for instance because one is a link to the other.
    """
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise NemoLfrError(f"{target} is the same file as the input {source}; choose another output path.")


def open_temporary(path: Path) -> IO[bytes]:
    """Open a new temporary file in the folder of `path`. The file is locked until it is closed.

    The caller must rename the file to `path`. Unlike a file from `tempfile`, its permissions follow the umask.

    Raises:
        NemoLfrError: if `path` is a pipe, device or socket, since renaming would replace it.
        OSError: if the file cannot be created; the error names `path`.
    """
    check_replaceable(path)
    while True:
        aside = path.with_name(f"{path.name[:KEPT]}.{secrets.token_hex(4)}.part")
        with contextlib.suppress(FileExistsError), naming(path, aside):
            file = open(aside, "x+b")  # noqa: SIM115
            if lock(file.fileno()) is not False and os.path.lexists(aside):
                return file
            file.close()  # before the file was locked, another process took it for a leftover and removed it


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """Yield a temporary file that replaces `path` on success and is removed on error.

    Args:
        path: output file.
        overwrite: whether an existing file may be replaced.

    Raises:
        NemoLfrError: if `path` is a pipe, device or socket.
        OutputExistsError: if `path` exists when the `with` block ends, and `overwrite` is not set.
        OSError: if the file cannot be written, for instance on a full disk; the error names `path`.
    """
    with naming(path), open_temporary(path) as file, naming(path, Path(file.name)):
        try:
            yield file
            file.flush()
            sync(file.fileno())
            if os.name == "nt":  # Windows cannot rename an open file; the file is not locked there
                file.close()
            publish(Path(file.name), path, overwrite)
        finally:
            Path(file.name).unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | Iterable[bytes], overwrite: bool = True) -> Path:
    """Write a file atomically and return its path.

    Args:
        path: output file.
        data: content, as one piece or several.
        overwrite: whether an existing file may be replaced.

    Raises:
        NemoLfrError: if `path` is a pipe, device or socket.
        OutputExistsError: if `path` exists and `overwrite` is not set.
        OSError: if the file cannot be written, for instance on a full disk; the error names `path`.
    """
    with replacing(path, overwrite) as file:
        file.writelines([data] if isinstance(data, bytes) else data)
    return path


def write_new(path: Path, data: bytes) -> bool:
    """Write a file atomically unless it exists.

    If several machines call this function at the same time, exactly one of them writes the file. On file systems
    without hard links, several may write it, and the last one wins.

    Args:
        path: output file; an existing file is kept.
        data: content.

    Returns:
        Whether the file was written.

    Raises:
        NemoLfrError: if `path` is a pipe, device or socket.
        OSError: if the file cannot be written, for instance on a full disk; the error names `path`.
    """
    with naming(path), open_temporary(path) as file, naming(path, Path(file.name)):
        try:
            file.write(data)
            file.flush()
            sync(file.fileno())
            return _link(Path(file.name), path)
        finally:
            Path(file.name).unlink(missing_ok=True)


@contextlib.contextmanager
def writing_folder(parent: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `parent`, and remove the folder at the end.

    Temporary folders that killed runs left in `parent` are removed, too.

    Raises:
        OSError: if the folder cannot be created; the error names `parent`.
    """
    sweep(parent)
    while True:
        folder = parent / f".writing-{secrets.token_hex(4)}"
        with contextlib.ExitStack() as cleanup:
            # Before the folder is created, since a signal may raise an exception right after that.
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            try:
                folder.mkdir(mode=stat.S_IRWXU)
            except OSError as error:
                cleanup.pop_all()
                raise OSError(error.errno, error.strerror, str(parent)) from error
            try:
                descriptor = _open_folder(str(folder))
            except FileNotFoundError:
                continue
            if descriptor is not None:
                cleanup.callback(os.close, descriptor)
            if descriptor is None or folder.exists():
                yield folder
                return
        # Before the folder was locked, another process took it for a leftover and removed it.


def sweep(folder: Path, names: Collection[str] | None = ()) -> None:
    """Remove temporary files and folders that killed runs left in a folder.

    Temporary files of running processes are kept, and so are files whose names do not match the patterns of this
    module. Files that cannot be removed are ignored.

    Args:
        folder: folder to search; it need not exist.
        names: names of output files whose `.part` files are removed. By default, only temporary folders are removed.
            None removes all `.part` files, which is safe only in a folder that this package created.
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
    """Remover of temporary files that killed runs left beside output files.

    Each folder is listed only once.
    """

    def __init__(self) -> None:
        self._leftovers: dict[Path, dict[str, list[os.DirEntry[str]]]] = {}

    def sweep(self, path: Path) -> None:
        """Remove the leftover `.part` files of one output file."""
        if path.parent not in self._leftovers:
            self._leftovers[path.parent] = self._list(path.parent)
        for entry in self._leftovers[path.parent].pop(path.name[:KEPT], []):
            _remove(entry)

    @staticmethod
    def _list(folder: Path) -> "dict[str, list[os.DirEntry[str]]]":
        leftovers: dict[str, list[os.DirEntry[str]]] = {}
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if (match := PART.fullmatch(entry.name)) and not entry.is_dir(follow_symlinks=False):
                    leftovers.setdefault(match["name"], []).append(entry)
        return leftovers


def _remove(entry: "os.DirEntry[str]") -> None:
    with contextlib.suppress(OSError):
        if entry.is_dir(follow_symlinks=False):
            if (descriptor := _open_folder(entry.path)) is not None:
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(descriptor)
        elif entry.is_file(follow_symlinks=False):
            _remove_free_file(entry.path)
        else:
            os.unlink(entry.path)


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Return a context manager that makes OSErrors name the output file instead of a temporary file.

    Args:
        path: the output file. An error without a file name, such as "No space left on device", gets this name.
        temporary: temporary file or folder that becomes `path`. An error that names this file, or a file in
            this folder, gets the name `path` instead.

    Raises:
        OSError: if the block raises an OSError. An error that names any other file is raised unchanged.
    """
    try:
        yield
    except OSError as error:
        named = error.filename
        is_temporary = temporary is not None and isinstance(named, str) and Path(named).is_relative_to(temporary)
        if error.errno is not None and (named is None or is_temporary):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _is_leftover(entry: "os.DirEntry[str]", names: Collection[str] | None) -> bool:
    if WRITING.fullmatch(entry.name):
        return entry.is_dir(follow_symlinks=False)
    match = PART.fullmatch(entry.name)
    return match is not None and (names is None or match["name"] in names) and not entry.is_dir(follow_symlinks=False)


def _remove_free_file(path: str) -> None:
    """Remove a temporary file unless another process holds its lock.

    This function holds the lock until the file is removed. If another process has just created the file and not locked
    it yet, that process notices that the file is gone, and creates another one.
    """
    if os.name == "nt":  # Windows has no such locks, but does not remove open files
        os.unlink(path)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _open_folder(folder: str) -> int | None:
    """Open and lock a folder, and return its descriptor; None if the folder cannot be locked."""
    if os.name == "nt":
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def lock(descriptor: int, shared: bool = False) -> bool | None:
    """Try to lock an open file without waiting.

    Args:
        descriptor: descriptor of the open file.
        shared: whether to take a lock that several processes can hold at the same time, instead of an exclusive one.

    Returns:
        True if the lock was acquired, False if another process holds it, None if the system does not support locks.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a network drive
        return None
    return True
