"""Random access to the bytes of a checkpoint in a file or in memory.

Files are not memory-mapped: if another program truncates a mapped file, reading it kills the process.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from nemo_lfr.errors import CheckpointError


def file_state(descriptor: int) -> tuple[int, int]:
    """Return the size of an open file in bytes, and the time of its last change in nanoseconds."""
    state = os.fstat(descriptor)
    return state.st_size, state.st_mtime_ns


class ByteSource(Protocol):
    """Interface of a sequence of bytes with random access."""

    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`."""

    def changed(self) -> bool:
        """Return whether the bytes may have changed since the source was opened."""


class MemorySource:
    """Bytes in memory, such as those of a decompressed archive."""

    def __init__(self, contents: bytes | bytearray) -> None:
        self.size = len(contents)
        self._contents = memoryview(contents)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`."""
        buffer[:] = self._contents[offset : offset + len(buffer)]

    def changed(self) -> bool:
        """Return False, since bytes in memory do not change."""
        return False


class FileSource:
    """Byte range of a file.

    Args:
        path: path of the file, for messages.
        file: the open file. Its descriptor is duplicated, so the caller may close `file` at any time.
        offset: start of the range.
        size: length of the range in bytes.
        state: size and modification time of the file before it was first read, from `file_state`.
    """

    def __init__(self, path: Path, file: IO[bytes], offset: int, size: int, state: tuple[int, int]) -> None:
        self.size = size
        self._path, self._offset, self._state = path, offset, state
        self._descriptor = os.dup(file.fileno())
        self._lock = threading.Lock()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`.

        Raises:
            CheckpointError: if the file was truncated or can no longer be read.
        """
        done = 0
        try:
            while done < len(buffer):
                count = self._read_some(self._offset + offset + done, buffer[done:])
                if not count:
                    raise CheckpointError(f"{self._path}: the file was truncated while it was open; load it again.")
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: the file can no longer be read ({error.strerror}); check the disk."
            ) from error

    def changed(self) -> bool:
        """Return whether the file's size or modification time has changed since it was opened."""
        return file_state(self._descriptor) != self._state

    def _read_some(self, position: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):  # does not use the file position, which threads and forked processes share
            return os.preadv(self._descriptor, [buffer], position)
        with self._lock:
            os.lseek(self._descriptor, position, os.SEEK_SET)
            piece = os.read(self._descriptor, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)
