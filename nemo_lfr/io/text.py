"""Read UTF-8 text files, with or without a byte order mark, line by line."""

import codecs
import gzip
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io import bounded
from nemo_lfr.io.regular import open_regular

GZIP, GZIP_MAGIC = ".gz", b"\x1f\x8b"
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(data: bytes) -> str:
    """Decode UTF-8 text, and remove the byte order mark that Notepad and PowerShell write.

    Raises:
        ValueError: if `data` is not UTF-8 text.
    """
    if data.startswith(UTF16_MARKS):
        raise ValueError("UTF-16 text; save it as UTF-8")
    if b"\0" in data:
        raise ValueError("not text: it contains NUL bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def iter_lines(path: Path, error: type[NemoLfrError] = NemoLfrError, *, truncate: bool = False) -> Iterator[bytes]:
    """Yield the lines of a file as bytes, with their line ends. Gzip data is decompressed, whatever the file's name.

    Args:
        path: the file.
        error: exception class for a path that is not a regular file.
        truncate: whether to truncate lines of more than `bounded.MAX_LINE` bytes, instead of raising an error.

    Yields:
        Each line. A byte order mark is removed.

    Raises:
        ValueError: if the content cannot be split into lines, for example because it is damaged or UTF-16.
        NemoLfrError: of class `error`, if `path` is not a regular file.
        OSError: if the file cannot be read.
    """
    with open_regular(path, error) as file:
        is_packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        lines = _decompressed(file, truncate) if is_packed else bounded.lines(file, truncate=truncate)
        for number, line in enumerate(lines):
            if number == 0:
                if line.startswith(UTF16_MARKS):
                    raise ValueError("UTF-16 text; save it as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
            yield line


def read_lines(path: Path, error: type[NemoLfrError] = NemoLfrError) -> list[bytes]:
    """Return the lines of a file as bytes, without line ends. Gzip data is decompressed.

    Only a line feed ends a line, since a text may contain other Unicode line separators.

    Args:
        path: the file.
        error: exception class for a path that is not a regular file.

    Raises:
        ValueError: if the file is UTF-16, a line is too long for `bounded.lines`, or the compressed data is damaged
            or expands too much.
        NemoLfrError: of class `error`, if `path` is not a regular file.
        OSError: if the file cannot be read.
    """
    lines = list(iter_lines(path, error))
    if not lines or lines[-1].endswith(b"\n"):
        lines.append(b"")  # the empty line after the last line feed
    return [line.removesuffix(b"\n").removesuffix(b"\r") for line in lines]


def _decompressed(file: IO[bytes], truncate: bool) -> Iterator[bytes]:
    """Yield the lines of a gzip file. If `truncate` is set, long lines are truncated."""
    size = os.fstat(file.fileno()).st_size
    total = 0
    try:
        with gzip.open(file) as stream:
            for line in bounded.lines(stream, truncate=truncate):
                total += len(line)
                if bounded.is_implausible(0, total, size, free_bytes=bounded.FREE_BYTES):
                    raise ValueError(f"its {size} bytes expand to more than {total} bytes; it is damaged or malicious")
                yield line
    except EOFError as error:
        raise ValueError("its compressed data ends too early; download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"its compressed data is damaged ({error}); download it again") from error


def is_nested_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and dictionaries are nested more than `levels` levels deep."""
    if not isinstance(value, dict | list | tuple):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_nested_deeper(item, levels - 1) for item in items)


def without_nonfinite(value: Any) -> Any:
    """Replace NaN and infinity by None, recursively, since JSON does not allow them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(item) for item in value]
    return value


def is_missing(value: Any) -> bool:
    """Return whether a label has no value: it is None, NaN (which pandas writes for missing values) or infinite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))
