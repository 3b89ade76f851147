"""Text files of other people: UTF-8, with or without a byte order mark, read line by line."""

import codecs
import math
from pathlib import Path
from typing import Any

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.regular import open_regular

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(data: bytes) -> str:
    """Decode UTF-8; a byte order mark, which Notepad and PowerShell write, is dropped.

    Raises:
        ValueError: if it is not UTF-8, saying what it looks like and what to do.
    """
    if data.startswith(UTF16_MARKS):
        raise ValueError("UTF-16 text; save it as UTF-8")
    if b"\0" in data:
        raise ValueError("not text: it holds NUL bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def read_lines(path: Path, error: type[NemoLfrError] = NemoLfrError) -> list[bytes]:
    """Return the lines of a file as bytes without their ends, for each to be decoded, and fail, on its own.

    Only a line feed ends a line, as in JSON lines: a text may hold the other separators that Unicode knows.

    Raises:
        ValueError: if it is UTF-16.
        NemoLfrError: of class `error`, naming it, if it is no regular file.
        OSError: if it cannot be read.
    """
    with open_regular(path, error) as file:
        data = file.read()
    if data.startswith(UTF16_MARKS):
        raise ValueError("UTF-16 text; save it as UTF-8")
    return [line.removesuffix(b"\r") for line in data.removeprefix(codecs.BOM_UTF8).split(b"\n")]


def without_nonfinite(value: Any) -> Any:
    """Replace NaN and infinity by None, in dicts and lists too: they are not JSON, which most readers refuse whole."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(item) for item in value]
    return value


def is_missing(value: Any) -> bool:
    """Whether a label holds no value: None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))
