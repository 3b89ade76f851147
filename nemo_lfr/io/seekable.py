"""File objects that get their bytes from another object, such as several ranges of a file."""

import io
from typing import Any


class SeekableBytes(io.RawIOBase):
    """Read-only file object with a known length. Subclasses implement `read` or `readinto`.

    Args:
        length: number of bytes.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position and return it.

        A position before the first byte becomes 0.
        """
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position


class SeekableFile(SeekableBytes):
    """File object for libsndfile that reads from another file object.

    In a damaged file, libsndfile may seek to a position before the first byte. This object then seeks to the first
    byte, because an exception would be printed on stderr.

    Args:
        file: seekable file, open for reading. Closing this object does not close it.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file.seek(0, io.SEEK_END))
        self._file = file

    def readinto(self, buffer: Any) -> int:
        """Read into a writable buffer and return the number of bytes."""
        self._file.seek(self._position)
        count: int = self._file.readinto(buffer)
        self._position += count
        return count
