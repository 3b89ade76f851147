"""Read the lines of JSON-lines files, which may be compressed with gzip."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from nemo_lfr.errors import ConfigError
from nemo_lfr.io.text import iter_lines


def json_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a JSON-lines file, except blank ones. The file may be compressed with gzip.

    Args:
        path: the file.

    Yields:
        Each line as bytes with its line ending, truncated to `MAX_LINE` bytes. A byte order mark is removed.

    Raises:
        ConfigError: if the file cannot be read or is UTF-16, or its gzip data is damaged or truncated.
    """
    lines = iter_lines(path, ConfigError, truncate=True)
    while True:
        # The caller's exceptions are not those of the file, so the `yield` is outside of the `try`.
        try:
            line = next(lines, None)
        except ConfigError:
            raise
        except OSError as error:
            raise ConfigError(f"{path}: the file cannot be read ({error.strerror or error}).") from error
        except ValueError as error:
            raise ConfigError(f"{path}: the file cannot be read: {error}.") from error
        if line is None:
            return
        if line.strip():
            yield line


class LineRanges:
    """Reader of ranges of a file's lines. If ranges are read in order, the file is read only once.

    Args:
        path: the file; see `json_lines`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: Iterator[bytes] | None = None
        self._next = 0  # index of the next line of `_lines`

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the lines [start, stop), counted without blank lines; see `json_lines` for the errors."""
        lines, position = self._lines, self._next
        self._lines = None  # so that a range that is read at the same time does not take lines of this one
        if lines is None or position > start:
            lines, position = json_lines(self._path), 0
        for line in islice(lines, stop - position):
            position += 1
            if position > start:
                yield line
        self._lines, self._next = lines, position
