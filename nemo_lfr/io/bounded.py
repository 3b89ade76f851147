"""Bounds on what a small hostile file can make its reader do.

Archives and columns expand, and lines need not end.
"""

import gzip
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_lfr.errors import NemoLfrError, shorten

MAX_LINE = 1 << 26  # bytes of one line of JSON
MAX_MEMBER = 1 << 31  # bytes of one file in an archive
# Tokens take about 11 bits each, and a column of them does not shrink to less than a byte for this many.
VALUES_PER_BYTE, FREE_VALUES = 64, 1 << 20
BYTES_PER_BYTE, FREE_BYTES = 256, 1 << 26


def lines(file: Any) -> Iterator[bytes]:
    """Yield the lines of a file; of one that is longer than `MAX_LINE`, only its first bytes."""
    while line := file.readline(MAX_LINE):
        yield line
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)


class _Requests:
    """A file that refuses to read more at once than a member may hold, as a header of a tar may ask for."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_MEMBER:
            raise NemoLfrError(f"{self._path}: a header in it asks for {size} bytes; it is damaged.")
        data: bytes = self._file.read(size)
        return data


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar, compressed with gzip or not, whose members are to be read by `member_bytes`.

    Raises:
        OSError: if it cannot be opened.
        tarfile.TarError: if it is no tar.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if packed else open(path, "rb") as file:
        requests: Any = _Requests(file, path)
        with tarfile.open(str(path), mode="r:", fileobj=requests) as tar:
            yield tar


def member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the content of a file in a tar.

    Raises:
        NemoLfrError: if it is no plain file, larger than `MAX_MEMBER`, or cut short. A sparse file, a few bytes that
            stand for any number of zeros, is none.
    """
    if not member.isreg() or member.issparse() or member.size > MAX_MEMBER:
        raise NemoLfrError(f"{tar.name!s}: {shorten(member.name)!r} in it is no plain file, or too large.")
    file = tar.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise NemoLfrError(
            f"{tar.name!s}: {shorten(member.name)!r} in it ends after {len(data)} of {member.size} bytes."
        )
    return data


def check_columns(metadata: Any, path: Path) -> None:
    """Refuse a Parquet file of tokens whose columns hold far more than its bytes can.

    Args:
        metadata: of the file, as pyarrow gives it.
        path: for the message.

    Raises:
        NemoLfrError: naming the column.
    """
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            size = column.total_compressed_size
            values, expanded = column.num_values, column.total_uncompressed_size
            if values > VALUES_PER_BYTE * size + FREE_VALUES or expanded > BYTES_PER_BYTE * size + FREE_BYTES:
                raise NemoLfrError(
                    f"{path}: column {shorten(column.path_in_schema)!r} claims {values} values in {size} bytes; "
                    "such a file is not read."
                )
