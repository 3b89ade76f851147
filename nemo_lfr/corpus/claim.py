"""Detect that the output folder was removed, and that another run created it again.

If a user removes the folder of an active run and starts a second run with the same path, both runs hold a lock. Each
run therefore has a random ID, the claim, which is stored in the file `claim` of its state folder. Every process of the
run checks this file before it moves results into the output folder, and stops if the file contains another ID.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import write_new
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.regular import open_regular

NAME = "claim"
LENGTH = 32  # number of hex digits
REMOVAL_SECONDS = 1.0  # time in which a removal that has begun should reach the claim


def claim(state: Path) -> str:
    """Return the claim of an output folder, which is the random ID of the run that owns the folder.

    If the state folder contains no valid claim, a new one is written. The caller must hold the lock of the output.

    Args:
        state: the state folder of the output.

    Returns:
        The claim, 32 hex digits.

    Raises:
        OSError: if the claim cannot be written.
    """
    text = _read(state)
    if text is None:
        text = secrets.token_hex(LENGTH // 2)
        if not write_new(state / NAME, text.encode()):
            written = _read(state)  # by another part of the run; None if the file is damaged
            if written is not None:
                return written
            write_text(state / NAME, text)
    return text


def check_claim(state: Path, text: str) -> None:
    """Raise NemoLfrError unless the state folder contains the claim of this run.

    Args:
        state: the state folder of the output.
        text: the claim; an empty string disables the check.

    Raises:
        NemoLfrError: if the state folder does not exist or belongs to another run.
    """
    if text and not holds_claim(state, text):
        raise NemoLfrError(
            f"{state.parent}: this folder was removed or replaced during the run; start the run again, and choose "
            "another --out if another run writes to this folder."
        )


@contextmanager
def writing(state: Path, text: str) -> Iterator[None]:
    """Return a context manager for a block that writes to the output folder, which another process may be removing.

    The claim may be the last file that a removal deletes. If the block fails because a file is missing, this function
    therefore waits up to a second for the removal of the claim.

    Args:
        state: the state folder of the output.
        text: the claim; an empty string disables the check.

    Raises:
        NemoLfrError: if the folder does not contain the claim before the block, or after an OSError in the block.
        OSError: if the block raises it for another reason.
    """
    check_claim(state, text)
    try:
        yield
    except OSError as error:
        # `Path.mkdir(exist_ok=True)` raises FileExistsError if a folder is removed between its two system calls.
        is_missing = isinstance(error, (FileNotFoundError, FileExistsError))
        end = time.monotonic() + (REMOVAL_SECONDS if is_missing else 0)
        while text and holds_claim(state, text) and time.monotonic() < end:
            time.sleep(0.05)
        check_claim(state, text)
        raise


def holds_claim(state: Path, text: str) -> bool:
    """Return whether the state folder contains the claim `text`."""
    return _read(state) == text


def _read(state: Path) -> str | None:
    try:
        with open_regular(state / NAME) as file:
            text = file.read(LENGTH + 1).decode("ascii")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NemoLfrError for a pipe or folder
        return None
    return text if len(text) == LENGTH else None
