"""Read archives, tables and JSON lines with limits on size, since small malicious files may expand without bound."""

import gzip
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_lfr.errors import NemoLfrError, shorten

MAX_LINE = 1 << 26  # bytes of one line of JSON
MAX_MEMBER = 1 << 31  # bytes of one file in an archive
# Limits of compression ratios. Tokens have about 11 bits each, so a real column never compresses this well.
VALUES_PER_BYTE, FREE_VALUES = 64, 1 << 20
BYTES_PER_BYTE, FREE_BYTES = 256, 1 << 26
# Of a table of recordings. Silence as decoded samples compresses well, hence the larger free part.
FREE_INPUT_VALUES, FREE_INPUT_BYTES = 1 << 26, 1 << 28


def lines(file: Any) -> Iterator[bytes]:
    """Yield the lines of a binary file, each truncated to `MAX_LINE` bytes."""
    while line := file.readline(MAX_LINE):
        yield line
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)


class _Requests:
    """File wrapper that refuses reads larger than `MAX_MEMBER`, which a damaged tar header may request."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_MEMBER:
            raise NemoLfrError(f"{self._path}: the archive is damaged: a header requests {size} bytes.")
        data: bytes = self._file.read(size)
        return data


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar archive, with or without gzip; read its members with `member_bytes`.

    Raises:
        OSError: if it cannot be opened.
        tarfile.TarError: if it is not a tar archive.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if packed else open(path, "rb") as file:
        requests: Any = _Requests(file, path)
        with tarfile.open(str(path), mode="r:", fileobj=requests) as tar:
            yield tar


def member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the content of a regular file in a tar archive.

    Raises:
        NemoLfrError: if the member is not a regular file, is larger than `MAX_MEMBER`, or is truncated. Sparse files
            are refused, since a few bytes may expand to any number of zeros.
    """
    if not member.isreg() or member.issparse() or member.size > MAX_MEMBER:
        raise NemoLfrError(
            f"{tar.name!s}: its member {shorten(member.name)!r} is not a regular file, or is too large."
        )
    file = tar.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise NemoLfrError(f"{tar.name!s}: {shorten(member.name)!r} ends after {len(data)} of {member.size} bytes.")
    return data


def is_implausible(
    values: int,
    expanded: int,
    size: int,
    free_values: int = FREE_INPUT_VALUES,
    free_bytes: int = FREE_INPUT_BYTES,
) -> bool:
    """Return whether data claims to expand to far more than real data does.

    Args:
        values: number of values or rows that it claims.
        expanded: bytes that it claims to expand to.
        size: its bytes in the file.
        free_values: values that data of any size may have.
        free_bytes: bytes that data of any size may expand to.
    """
    return values > VALUES_PER_BYTE * size + free_values or expanded > BYTES_PER_BYTE * size + free_bytes


def check_columns(metadata: Any, path: Path, *, is_input: bool = False) -> None:
    """Check that no column of a Parquet file expands to far more than a real one does, and that its counts agree.

    A reader stops at the smallest of the counts, so that a damaged one would lose rows without an error.

    Args:
        metadata: pyarrow's metadata of the file.
        path: the file, for messages.
        is_input: whether the file is a table of recordings; otherwise its columns contain tokens.

    Raises:
        NemoLfrError: if a column has an implausible compression ratio, or a number of values other than that of the
            rows; the message names it.
    """
    _check_row_counts(metadata, path)
    free_values, free_bytes = (FREE_INPUT_VALUES, FREE_INPUT_BYTES) if is_input else (FREE_VALUES, FREE_BYTES)
    for column in _column_chunks(metadata, range(metadata.num_row_groups)):
        size = column.total_compressed_size
        values, expanded = column.num_values, column.total_uncompressed_size
        if is_implausible(values, expanded, size, free_values, free_bytes):
            raise NemoLfrError(
                f"{path}: column {shorten(column.path_in_schema)!r} claims {values} values of {expanded} bytes in "
                f"{size} bytes; the file is damaged or malicious."
            )


def _check_row_counts(metadata: Any, path: Path) -> None:
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    if metadata.num_rows != sum(group.num_rows for group in groups):
        raise NemoLfrError(f"{path}: the numbers of rows of its parts do not add up; the file is damaged.")
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    for group in groups:
        for index, column in enumerate(columns):
            values, rows = group.column(index).num_values, group.num_rows
            if values < rows or (column.max_repetition_level == 0 and values > rows):
                text = f"{path}: column {shorten(column.path)!r} has {values} values for {rows} rows"
                raise NemoLfrError(f"{text}; the file is damaged.")


def rows_at_a_time(metadata: Any, groups: Iterable[int], most: int) -> int:
    """Return how many rows of row groups to read at a time, between 1 and `most`.

    All rows may refer to the same value, which is in the file once, but in memory once for each row that is read.

    Args:
        metadata: pyarrow's metadata of a Parquet file.
        groups: indices of the row groups.
        most: number of rows to read at a time if no value can be large.
    """
    largest = max((column.total_uncompressed_size for column in _column_chunks(metadata, groups)), default=0)
    return max(1, min(most, FREE_INPUT_BYTES // max(1, largest)))


def _column_chunks(metadata: Any, groups: Iterable[int]) -> Iterator[Any]:
    for group in groups:
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            yield row_group.column(index)
