"""Read archives, tables and JSON lines with limits on their size: a small malicious file may expand enormously."""

import gzip
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_lfr.errors import NemoLfrError, shorten

MAX_LINE = 1 << 26  # bytes in a line of JSON
MAX_MEMBER = 1 << 31  # bytes in a file of an archive
# Limits on the number of values and of decompressed bytes per compressed byte. The FREE_ numbers are allowed in
# addition, for any compressed size. Tokens have about 11 bits each, so real columns do not come near these limits.
VALUES_PER_BYTE, FREE_VALUES = 64, 1 << 20
BYTES_PER_BYTE, FREE_BYTES = 256, 1 << 26
# Tables of recordings may contain decoded samples. Silence compresses well, hence the larger numbers.
FREE_INPUT_VALUES, FREE_INPUT_BYTES = 1 << 26, 1 << 28


def lines(file: Any) -> Iterator[bytes]:
    """Yield the lines of a binary file, each truncated to `MAX_LINE` bytes."""
    while line := file.readline(MAX_LINE):
        yield line
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)


class _Requests:
    """File wrapper that raises an error for reads larger than `MAX_MEMBER`, which a damaged tar header may request."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_MEMBER:
            raise NemoLfrError(
                f"{self._path}: the archive is damaged: a header claims a size of {size} bytes; at most {MAX_MEMBER} "
                "are allowed."
            )
        data: bytes = self._file.read(size)
        return data


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar archive, which may be compressed with gzip. Use `member_bytes` to read its members.

    Raises:
        OSError: if the file cannot be opened.
        tarfile.TarError: if the file is not a tar archive.
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
            are refused too, since a few bytes may expand to any number of zeros.
    """
    if not member.isreg() or member.issparse() or member.size > MAX_MEMBER:
        raise NemoLfrError(
            f"{tar.name!s}: the member {shorten(member.name)!r} is not a regular file, or has more than {MAX_MEMBER} "
            "bytes."
        )
    file = tar.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise NemoLfrError(
            f"{tar.name!s}: the member {shorten(member.name)!r} ends after {len(data)} of {member.size} bytes."
        )
    return data


def is_implausible(
    values: int,
    expanded: int,
    size: int,
    free_values: int = FREE_INPUT_VALUES,
    free_bytes: int = FREE_INPUT_BYTES,
) -> bool:
    """Return whether compressed data claims to expand to far more than real data does.

    Args:
        values: claimed number of values or rows.
        expanded: claimed size of the decompressed data in bytes.
        size: size of the compressed data in bytes.
        free_values: number of values that is accepted for any compressed size.
        free_bytes: size of decompressed data that is accepted for any compressed size.
    """
    return values > VALUES_PER_BYTE * size + free_values or expanded > BYTES_PER_BYTE * size + free_bytes


def check_columns(metadata: Any, path: Path, *, is_input: bool = False) -> None:
    """Check the sizes and the numbers of values of all columns in a Parquet file.

    A malicious column may expand to far more than a real one. If a number of values is damaged, readers would silently
    skip rows.

    Args:
        metadata: pyarrow's metadata of the file.
        path: path of the file, for messages.
        is_input: whether the file is a table of recordings; otherwise its columns contain tokens.

    Raises:
        NemoLfrError: if a column has an implausible compression ratio, or the number of its values does not match the
            number of rows.
    """
    _check_row_counts(metadata, path)
    free_values, free_bytes = (FREE_INPUT_VALUES, FREE_INPUT_BYTES) if is_input else (FREE_VALUES, FREE_BYTES)
    for column in _column_chunks(metadata, range(metadata.num_row_groups)):
        size = column.total_compressed_size
        values, expanded = column.num_values, column.total_uncompressed_size
        if is_implausible(values, expanded, size, free_values, free_bytes):
            raise NemoLfrError(
                f"{path}: column {shorten(column.path_in_schema)!r} claims {values} values and {expanded} bytes, but "
                f"has only {size} compressed bytes; the file is damaged or malicious."
            )


def _check_row_counts(metadata: Any, path: Path) -> None:
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    if metadata.num_rows != sum(group.num_rows for group in groups):
        raise NemoLfrError(
            f"{path}: the number of rows differs from the sum over all row groups; the file is damaged."
        )
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    for group in groups:
        for index, column in enumerate(columns):
            values, rows = group.column(index).num_values, group.num_rows
            if values < rows or (column.max_repetition_level == 0 and values > rows):
                text = f"{path}: column {shorten(column.path)!r} has {values} values for {rows} rows"
                raise NemoLfrError(f"{text}; the file is damaged.")


def rows_at_a_time(metadata: Any, groups: Iterable[int], most: int) -> int:
    """Return the number of rows to read at a time from some row groups, between 1 and `most`.

    Many rows may refer to one large value. The file contains it once, but memory contains it once for each row read.

    Args:
        metadata: pyarrow's metadata of a Parquet file.
        groups: indices of the row groups.
        most: number of rows to read at a time if all values are small.
    """
    largest = max((column.total_uncompressed_size for column in _column_chunks(metadata, groups)), default=0)
    return max(1, min(most, FREE_INPUT_BYTES // max(1, largest)))


def _column_chunks(metadata: Any, groups: Iterable[int]) -> Iterator[Any]:
    for group in groups:
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            yield row_group.column(index)
