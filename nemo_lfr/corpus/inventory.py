"""The files that list a corpus's clips: hashes that tell one list from another, and whether a file has changed.

A run is resumed only with the list of clips that it was planned for, and stops if a file of the list is edited while
it runs: parts are found again by their place in these files.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

# Files up to this size are hashed whole; of larger ones, their ends and evenly spaced blocks.
WHOLE_BYTES = 1 << 20
END_BYTES = 1 << 16
BLOCK_BYTES, BLOCKS = 1 << 12, 16


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def sampled_digest(path: Path) -> str:
    """Return a hash of a file's size and of blocks of it, in hex: quick for audio of any length.

    The ends, where Parquet keeps the sizes and statistics of all columns, are always among the blocks.
    """
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start, length in _blocks(size):
            file.seek(start)
            found.update(file.read(length))
    return found.hexdigest()


def list_digest(files: Iterable[tuple[str, str]]) -> str:
    """Return a short hash of a list of file names and their hashes."""
    return hashlib.sha256(json.dumps(list(files)).encode(errors="surrogateescape")).hexdigest()[:16]


class Watch:
    """Tells which of some files have changed since it was made, by their size and time of modification."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._states = {path: _state(path) for path in files}

    def changed(self, files: Iterable[Path]) -> Path | None:
        """Return the first of these files that is not as it was; None if all are."""
        return next((path for path in files if _state(path) != self._states.get(path)), None)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    if size <= WHOLE_BYTES:
        yield 0, size
        return
    yield 0, END_BYTES
    for number in range(BLOCKS):
        yield END_BYTES + (size - 2 * END_BYTES - BLOCK_BYTES) * number // (BLOCKS - 1), BLOCK_BYTES
    yield size - END_BYTES, END_BYTES


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
