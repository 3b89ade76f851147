"""Open untrusted Parquet files.

Some damaged footers make pyarrow crash the process instead of raising an exception. This module therefore reads and
validates the footer of a file in Python before pyarrow opens the file. For the same reason, pyarrow's metadata objects
are not used.

The footer is a struct in Thrift's compact protocol. `_Thrift` reads any such struct as a dictionary whose keys are the
numbers of the fields in Parquet's specification.
"""

import os
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from nemo_lfr.errors import NemoLfrError, quoted, shorten
from nemo_lfr.io.bounded import (
    FREE_BYTES,
    FREE_INPUT_BYTES,
    FREE_INPUT_VALUES,
    FREE_VALUES,
    is_implausible,
)
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.shortage import require

PARQUET_SUFFIXES = frozenset((".parquet", ".parq", ".pq"))
MAGIC = b"PAR1"
TAIL_BYTES = 8  # four bytes with the length of the footer, and the magic number
MAX_FOOTER = 1 << 25  # bytes; a parsed footer takes up to 64 times as much memory
MAX_DEPTH = 32  # levels of nested structs; Parquet's footers have 6
# Type codes of Thrift's compact protocol.
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
REPEATED = 2
# Exceptions that pyarrow raises for damaged files.
READ_ERRORS = (OSError, ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, MemoryError)


class Column(NamedTuple):
    """Column chunk of a Parquet file: the values of one column in one row group.

    Attributes:
        name: path of the column in the schema, joined with dots.
        values: number of values.
        compressed: compressed size in bytes.
        expanded: decompressed size in bytes.
    """

    name: str
    values: int
    compressed: int
    expanded: int


class RowGroup(NamedTuple):
    """Row group of a Parquet file."""

    num_rows: int
    columns: list[Column]


class ParquetFooter(NamedTuple):
    """Validated footer of a Parquet file.

    Attributes:
        num_rows: number of rows, which equals the sum over all row groups.
        groups: the row groups.
    """

    num_rows: int
    groups: list[RowGroup]

    def rows_at_a_time(self, groups: Iterable[int], most: int) -> int:
        """Return how many rows of some row groups can be read at a time without filling the memory.

        In a dictionary-encoded column, many rows may refer to one large value, which is copied for every row that is
        read.

        Args:
            groups: indices of the row groups.
            most: number of rows to read at a time if all values are small.

        Returns:
            A number from 1 to `most`.
        """
        largest = max((column.expanded for group in groups for column in self.groups[group].columns), default=0)
        return max(1, min(most, FREE_INPUT_BYTES // max(1, largest)))


def open_parquet(path: Path, *, is_input: bool = False) -> tuple[Any, ParquetFooter]:
    """Validate the footer of a Parquet file, and open the file with pyarrow.

    Args:
        path: path of the file.
        is_input: whether the file is a table of recordings; otherwise its columns contain tokens.

    Returns:
        pyarrow's `ParquetFile`, and the footer. Do not use `ParquetFile.metadata`, which may crash the process.

    Raises:
        NemoLfrError: if the file is not a Parquet file, its footer is damaged, or the footer declares an implausible
            size (see `is_implausible`).
    """
    footer = read_footer(path, is_input=is_input)
    try:
        file = require("pyarrow.parquet").ParquetFile(path)
        _ = file.schema_arrow
    except READ_ERRORS as error:
        raise NemoLfrError(f"{path}: not a Parquet file that pyarrow can read ({shorten(error, 200)}).") from error
    return file, footer


def read_footer(path: Path, *, is_input: bool = False) -> ParquetFooter:
    """Read and validate the footer of a Parquet file without pyarrow.

    Args:
        path: path of the file.
        is_input: whether the file is a table of recordings; otherwise its columns contain tokens.

    Raises:
        NemoLfrError: if the footer is damaged or missing, or declares an implausible size (see `is_implausible`).
    """
    status = os.stat(path)
    footer, size = _read_footer(path, (status.st_size, status.st_mtime_ns, status.st_ino))
    _check_expansion(footer, size, path, is_input)
    return footer


@lru_cache(maxsize=4)  # the footer is needed for each shard, and parsing a thousand row groups takes a second
def _read_footer(path: Path, state: tuple[int, ...]) -> tuple[ParquetFooter, int]:
    """Return the validated footer of a file, and the file's size in bytes.

    `state`, the size, modification time and inode of the file, is the cache key, together with the path.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read()
        file.seek(0)
        if size < len(MAGIC) + TAIL_BYTES or tail[4:] != MAGIC or file.read(len(MAGIC)) != MAGIC:
            raise NemoLfrError(f"{path}: not a Parquet file, or it is truncated: it lacks the magic number {MAGIC!r}.")
        (length,) = struct.unpack("<I", tail[:4])
        start = size - TAIL_BYTES - length
        if start < len(MAGIC) or length > MAX_FOOTER:
            limit = min(MAX_FOOTER, size - TAIL_BYTES - len(MAGIC))
            raise NemoLfrError(
                f"{path}: the Parquet file is damaged: it declares a footer of {length} bytes, but the limit is "
                f"{limit} bytes; copy or save it again."
            )
        file.seek(start)
        data = file.read(length)
    try:
        footer = _footer(_Thrift(data).struct(), start)
    except (ValueError, LookupError, TypeError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else shorten(error, 200)
        raise NemoLfrError(
            f"{path}: the footer of the Parquet file is damaged ({reason}); copy or save the file again."
        ) from error
    return footer, size


def _check_expansion(footer: ParquetFooter, size: int, path: Path, is_input: bool) -> None:
    """Raise an error if a footer declares more rows, values or bytes than the file can plausibly contain.

    The limits depend on the size of the file and on the compressed size of each column; see `is_implausible`.
    """
    if is_implausible(footer.num_rows, 0, size, FREE_VALUES):
        raise NemoLfrError(
            f"{path}: the file declares {footer.num_rows} rows, but has only {size} bytes; it is damaged or malicious."
        )
    free = (FREE_INPUT_VALUES, FREE_INPUT_BYTES) if is_input else (FREE_VALUES, FREE_BYTES)
    for chunks in zip(*(group.columns for group in footer.groups), strict=True):
        values, compressed, expanded = (sum(chunk[index] for chunk in chunks) for index in (1, 2, 3))
        if is_implausible(values, expanded, compressed, *free):
            raise NemoLfrError(
                f"{path}: column {shorten(chunks[0].name)!r} declares {values} values and {expanded} bytes, but "
                f"has only {compressed} compressed bytes; the file is damaged or malicious."
            )


def _footer(values: dict[int, Any], end: int) -> ParquetFooter:
    """Convert the struct FileMetaData to a footer, and validate it.

    The row groups must match the schema, and the data of all columns must lie before the position `end`.
    """
    leaves = _leaves(_structs(values[2]))
    groups = []
    for group in _structs(values[4]):
        columns = _structs(group[1])
        if len(columns) != len(leaves):
            raise ValueError(f"a row group has {len(columns)} columns; the schema has {len(leaves)}")
        num_rows = _count(group[3])
        chunks = [_column(chunk, leaf, num_rows, end) for chunk, leaf in zip(columns, leaves, strict=True)]
        groups.append(RowGroup(num_rows, chunks))
    num_rows = _count(values[3])
    if num_rows != sum(group.num_rows for group in groups):
        raise ValueError("the number of rows differs from the sum over all row groups")
    return ParquetFooter(num_rows, groups)


class _Leaf(NamedTuple):
    """Column in a schema: its path, its physical type, and whether one row may contain several values."""

    path: list[bytes]
    kind: int
    repeated: bool


def _leaves(elements: list[dict[int, Any]]) -> list[_Leaf]:
    """Return the columns of a schema, whose elements form a tree that is stored in depth-first order."""
    position = 1
    leaves: list[_Leaf] = []

    def walk(path: list[bytes], children: int, repeated: bool) -> None:
        nonlocal position
        if len(path) > MAX_DEPTH:
            raise ValueError("the schema is nested too deeply")
        for _ in range(children):
            element = elements[position]
            position += 1
            name, many = [*path, _bytes(element[4])], repeated or element.get(3) == REPEATED
            if element.get(5):
                walk(name, _count(element[5]), many)
            elif 1 in element:  # else an empty group
                leaves.append(_Leaf(name, _count(element[1]), many))

    walk([], _count(elements[0].get(5, 0)), False)
    if position != len(elements):
        raise ValueError(f"the schema has {len(elements)} elements, but its tree has only {position}")
    return leaves


def _column(chunk: dict[int, Any], leaf: _Leaf, num_rows: int, end: int) -> Column:
    if 1 in chunk:
        raise ValueError("a column is in another file")
    values = chunk[3]
    if values[3] != leaf.path or values[1] != leaf.kind:
        raise ValueError("a column differs from the schema")
    name = ".".join(part.decode(errors="replace") for part in leaf.path)
    count, expanded, compressed = (_count(values[field]) for field in (5, 6, 7))
    first = min(_count(values[field]) for field in (9, 11) if field in values and (field == 9 or values[field]))
    if count and (first < len(MAGIC) or first + compressed > end):
        raise ValueError(f"column {shorten(name)!r} lies outside the file")
    if count < num_rows or (not leaf.repeated and count > num_rows):
        raise ValueError(f"column {shorten(name)!r} has {count} values for {num_rows} rows")
    return Column(name, count, compressed, expanded)


def _structs(value: Any) -> list[dict[int, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("a list of structs is missing")
    return value


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a name is missing")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a size or count is {quoted(value)}")
    return value


class _Thrift:
    """Reader for Thrift's compact protocol. A list or map with more items than remaining bytes is an error."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read a struct as a dictionary. Keys are the numbers of the fields."""
        if depth > MAX_DEPTH:
            raise ValueError("structs are nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            fields[number] = kind == TRUE if kind <= FALSE else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (I16, I32, I64):
            return self._signed()
        if kind == BINARY:
            return self._take(self._unsigned())
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (LIST, SET):
            head = self._byte()
            size = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15, depth + 1) for _ in range(self._bounded(size))]
        if kind in (TRUE, FALSE, BYTE):  # booleans in a list
            return self._byte()
        if kind == DOUBLE:
            return self._take(8)
        if kind == MAP:
            size = self._bounded(self._unsigned())
            kinds = self._byte() if size else 0
            return [(self._value(kinds >> 4, depth + 1), self._value(kinds & 15, depth + 1)) for _ in range(size)]
        raise ValueError(f"a field has the unknown type {kind}")

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1]

    def _take(self, size: int) -> bytes:
        start, self._position = self._position, self._position + self._bounded(size)
        return self._data[start : self._position]

    def _bounded(self, size: int) -> int:
        if size > len(self._data) - self._position:
            raise ValueError("the data ends within a field")
        return size

    def _unsigned(self) -> int:
        value = self._byte()
        if value < 128:
            return value
        value &= 127
        for shift in range(7, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number has more than 64 bits")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
