"""Bytes of a checkpoint, read into memory on request.

A file is read and not mapped: a mapped file that another program shortens kills the process that reads it.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from nemo_lfr.errors import CheckpointError


def file_state(descriptor: int) -> tuple[int, int]:
    """Return the size and the time of the last change of an open file."""
    state = os.fstat(descriptor)
    return state.st_size, state.st_mtime_ns


class ByteSource(Protocol):
    """A sequence of bytes of which any piece can be read."""

    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`."""

    def changed(self) -> bool:
        """Whether the bytes may have changed since the source was opened."""


class MemorySource:
    """Bytes in memory, as of a decompressed archive."""

    def __init__(self, contents: bytes | bytearray) -> None:
        self.size = len(contents)
        self._contents = memoryview(contents)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._contents[offset : offset + len(buffer)]

    def changed(self) -> bool:
        return False


class FileSource:
    """A piece of a file, which stays open as long as this object exists.

    Args:
        path: for messages.
        file: the file; it may be closed afterwards.
        offset: where the piece begins.
        size: bytes of the piece.
        state: `file_state` from before anything of the file was read.
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
            CheckpointError: if the file has become shorter, or cannot be read any more.
        """
        done = 0
        try:
            while done < len(buffer):
                count = self._read_some(self._offset + offset + done, buffer[done:])
                if not count:
                    raise CheckpointError(f"{self._path}: was cut short while it was open; load it again.")
                done += count
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be read any more ({error.strerror}).") from error

    def changed(self) -> bool:
        return file_state(self._descriptor) != self._state

    def _read_some(self, position: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):  # needs no lock, also between forked processes, which share a file's position
            return os.preadv(self._descriptor, [buffer], position)
        with self._lock:
            os.lseek(self._descriptor, position, os.SEEK_SET)
            piece = os.read(self._descriptor, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)
