"""Base class of file objects that read their bytes from another object, such as several ranges of a file."""

import io


class SeekableBytes(io.RawIOBase):
    """Read-only file object with a known length. Subclasses implement `read`.

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

        A position before the first byte becomes 0. No exception is raised, since libsndfile's callback would lose it.
        """
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position
