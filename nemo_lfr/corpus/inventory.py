"""Detect changes to the files that list the clips of a corpus, such as a manifest.

A clip is identified by its position in these files. A run is therefore resumed only if the hashes of the files are the
same as when the run was planned. An active run stops if the size or modification time of a file changes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

# `sampled_digest` hashes files up to WHOLE_BYTES completely. Of larger files, it hashes the first and last END_BYTES,
# and evenly spaced blocks between them.
WHOLE_BYTES = 1 << 20
END_BYTES = 1 << 16
BLOCK_BYTES, BLOCKS = 1 << 12, 16


def digest(path: Path) -> str:
    """Return the SHA-256 hash of a file in hex."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def sampled_digest(path: Path) -> str:
    """Return a hash of a file's size and of some of its blocks, in hex.

    The blocks include the end of the file, where Parquet stores the sizes and statistics of all columns.
    """
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start, length in _blocks(size):
            file.seek(start)
            found.update(file.read(length))
    return found.hexdigest()


def list_digest(files: Iterable[tuple[str, str]]) -> str:
    """Return a hash of 16 hex digits for a list of pairs (file name, hash of the file)."""
    return hashlib.sha256(json.dumps(list(files)).encode(errors="surrogateescape")).hexdigest()[:16]


class Watch:
    """Watcher that detects changes to files by their size and modification time."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._states = {path: _state(path) for path in files}

    def changed(self, files: Iterable[Path]) -> Path | None:
        """Return the first of `files` that has changed since the watcher was created; None if all are unchanged."""
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
