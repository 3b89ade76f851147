"""Read and write a certain number of bytes.

A single call of `read` or `write` on a pipe or an unbuffered file may transfer fewer bytes.
"""

import io
from typing import IO

NOT_BLOCKING = "the file is in non-blocking mode; pass a blocking file"


def read_whole(file: IO[bytes], size: int) -> bytes:
    """Return `size` bytes, or fewer at the end of the file.

    Raises:
        BlockingIOError: if the file is in non-blocking mode and has no data yet.
    """
    pieces, missing = [], size
    while missing:
        piece = file.read(missing)
        if piece is None:
            raise BlockingIOError(NOT_BLOCKING)
        if not piece:
            break
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def write_whole(file: IO[bytes], data: bytes) -> None:
    """Write all bytes.

    Raises:
        BlockingIOError: if the file is in non-blocking mode and accepts no more data.
        OSError: if the file cannot be written.
    """
    rest = memoryview(data)
    while rest:
        count = file.write(rest)
        if count is None and isinstance(file, io.RawIOBase):
            raise BlockingIOError(NOT_BLOCKING)
        if type(count) is not int or not 0 < count < len(rest):
            return  # all is written, or an object whose method `write` does not return the number of bytes
        rest = rest[count:]
