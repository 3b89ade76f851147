"""Append-only log in JSON lines for resuming long jobs, and the type of progress callbacks."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import naming, sync, write_bytes
from nemo_lfr.io.regular import open_regular

# File names need not be valid UTF-8. This error handler writes an invalid byte as an escape sequence of JSON.
ANY_NAME = "backslashreplace"
# `progress(total)` is a context manager that yields `advance(message)`, which is called after each item.
Progress = Callable[[int], AbstractContextManager[Callable[[str], None]]]


class Journal:
    """Append-only file of JSON lines. Each entry is on disk before `add` returns.

    The caller must hold the lock of the output folder (`nemo_lfr.io.exclusive`), so that two jobs cannot write to the
    file at the same time. Lines that a killed job left incomplete are skipped when the file is read.

    Args:
        path: the file; it is created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "Journal":
        if self.path.is_symlink():
            raise NemoLfrError(
                f"{self.path}: the file is a link, and links are not followed; remove it, or choose another --out."
            )
        if self.path.exists():  # opening a named pipe for appending would block until another process reads from it
            open_regular(self.path, advice="remove it, or choose another --out").close()
        self._file = open(self.path, "a", encoding="utf-8", errors=ANY_NAME)
        try:
            with naming(self.path):
                self._file.write("\n")  # ends a line that a killed job may have left incomplete
                self._file.flush()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # `add` has already reported a full disk
            self._file.close()

    def __iter__(self) -> Iterator[Any]:
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def entries(self, length: int) -> Iterator[list[Any]]:
        """Yield the entries that are lists of `length` values and begin with a string.

        Other entries, which may occur in a file that a user edited, are skipped.
        """
        for entry in self:
            if isinstance(entry, list) and len(entry) == length and isinstance(entry[0], str):
                yield entry

    def add(self, entry: Any) -> None:
        """Append an entry, and wait until it is on disk.

        Args:
            entry: any value that JSON can represent.
        """
        with naming(self.path):
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()
            sync(self._file.fileno())


def write_text(path: Path, text: str, overwrite: bool = True) -> Path:
    """Write a text file in UTF-8 atomically, and return its path.

    Args:
        path: output file.
        text: content.
        overwrite: whether an existing file may be replaced.

    Raises:
        OutputExistsError: if `path` exists and `overwrite` is not set.
        OSError: if the file cannot be written. An existing file is kept.
    """
    return write_bytes(path, text.encode("utf-8", ANY_NAME), overwrite)
