"""Read archives, tables and JSON lines with limits on their size.

Without limits, a small malicious file could expand to many gigabytes.
"""

import gzip
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_lfr.errors import NemoLfrError, shorten

MAX_LINE = 1 << 28  # bytes in a line of text; a JSON array of a whole corpus may be one line
MAX_MEMBER = 1 << 31  # bytes in one member of an archive
# Limits on the number of values, and on the decompressed size. Each compressed byte allows for VALUES_PER_BYTE values.
# FREE_VALUES more are always allowed. A token takes about 11 bits, so real columns do not come near these limits.
VALUES_PER_BYTE, FREE_VALUES = 64, 1 << 20
BYTES_PER_BYTE, FREE_BYTES = 256, 1 << 26
# Tables of recordings may contain decoded samples. Silence compresses well, hence the larger limits.
FREE_INPUT_VALUES, FREE_INPUT_BYTES = 1 << 26, 1 << 28


def lines(file: Any, *, truncate: bool = False) -> Iterator[bytes]:
    """Yield the lines of a text file that is open in binary mode.

    Args:
        file: the file.
        truncate: whether to truncate a line of more than `MAX_LINE` bytes, instead of raising an error.

    Raises:
        ValueError: if a line has more than `MAX_LINE` bytes, and `truncate` is not set.
    """
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            if not truncate:
                raise ValueError(
                    f"line {number} has more than {MAX_LINE >> 20} MiB, so the file is most likely not text"
                )
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE)
            line = line[:MAX_LINE]
        yield line


class _Requests:
    """File wrapper that refuses to read more than `MAX_MEMBER` bytes at a time.

    Without the limit, a damaged header in a tar archive could cause a huge read.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_MEMBER:
            raise NemoLfrError(
                f"{self._path}: the archive is damaged: a header declares a size of {size} bytes; at most "
                f"{MAX_MEMBER} are allowed."
            )
        data: bytes = self._file.read(size)
        return data


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar archive, which may be compressed with gzip. Use `member_bytes` to read its members.

    Raises:
        OSError: if the file cannot be opened.
        tarfile.TarError: if the file is not a tar archive.
        NemoLfrError: if a header declares a size of more than `MAX_MEMBER` bytes.
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
            f"{tar.name!s}: the member {shorten(member.name)!r} is truncated after {len(data)} of {member.size} "
            "bytes; copy or create the archive again."
        )
    return data


def is_implausible(
    values: int,
    expanded: int,
    size: int,
    free_values: int = FREE_INPUT_VALUES,
    free_bytes: int = FREE_INPUT_BYTES,
) -> bool:
    """Return whether compressed data declares implausibly many values or decompressed bytes.

    Each limit is a multiple of the compressed size, plus a constant.

    Args:
        values: declared number of values or rows.
        expanded: declared size of the decompressed data in bytes.
        size: size of the compressed data in bytes.
        free_values: the constant in the limit on values.
        free_bytes: the constant in the limit on the decompressed size, in bytes.
    """
    return values > VALUES_PER_BYTE * size + free_values or expanded > BYTES_PER_BYTE * size + free_bytes
