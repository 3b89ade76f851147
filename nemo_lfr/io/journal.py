"""What a long job has done so far, so that it goes on from there when it is started again, and how it is watched."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import lock, naming, write_bytes
from nemo_lfr.io.regular import open_regular

# A file's name need not be UTF-8; in JSON, the escape that this makes of a wrong byte reads back as that name.
ANY_NAME = "backslashreplace"
# For a number of items, a context whose value is called after each one, with what there is to say of it.
Progress = Callable[[int], AbstractContextManager[Callable[[str], None]]]


class Journal:
    """JSON lines, each on disk before `add` returns; a line that was cut off with its job is passed by.

    It is locked while it is open: what two jobs write at once would be taken for one's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "Journal":
        if self.path.is_symlink():
            raise NemoLfrError(f"{self.path}: is a link, which is not followed; remove it, or choose another --out.")
        if self.path.exists():  # opening a pipe to add to it would wait for its reader
            open_regular(self.path, advice="remove it, or choose another --out").close()
        self._file = open(self.path, "a", encoding="utf-8", errors=ANY_NAME)
        try:
            if lock(self._file.fileno()) is False:
                raise NemoLfrError(
                    f"{self.path.parent}: another run is writing there ({self.path.name}); wait for it, or stop it."
                )
            with naming(self.path):
                self._file.write("\n")  # ends a line that was cut off
                self._file.flush()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # of a full disk, as `add` has told already
            self._file.close()

    def __iter__(self) -> Iterator[Any]:
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def entries(self, length: int) -> Iterator[list[Any]]:
        """Yield the entries that are lists of this length and begin with a text; an edited file may hold others."""
        for entry in self:
            if isinstance(entry, list) and len(entry) == length and isinstance(entry[0], str):
                yield entry

    def add(self, entry: Any) -> None:
        with naming(self.path):
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def write_text(path: Path, text: str) -> Path:
    """Replace a file at once, or not at all; returns its path."""
    return write_bytes(path, text.encode("utf-8", ANY_NAME))
