"""Ownership of an output folder: runs stop before writing to a folder they lost.

A lock keeps two runs apart only while the lock file exists. If a user removes the folder of an active run, possibly on
another machine, and starts a second run, both runs hold a lock. The folder therefore also contains a random text that
is created with it. Every process of a run compares this text before it moves a file into place.
"""

import secrets
from pathlib import Path

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import write_new
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.regular import open_regular

NAME = "claim"
LENGTH = 32  # number of hex digits


def claim(state: Path) -> str:
    """Return the random text in an output's state folder that identifies the run that owns the output: its claim.

    The folder and the text are created if they do not exist. The caller must hold the lock of the output. All parts of
    one run share the lock and get the same text.

    Args:
        state: the state folder of the output.

    Returns:
        The text that identifies the owner of the output.

    Raises:
        OSError: if the text cannot be written.
    """
    text = _read(state)
    if text is None:
        text = secrets.token_hex(LENGTH // 2)
        if not write_new(state / NAME, text.encode()):
            written = _read(state)  # by another part of the run, unless it is damaged
            if written is not None:
                return written
            write_text(state / NAME, text)
    return text


def check_claim(state: Path, text: str) -> None:
    """Raise NemoLfrError unless the state folder contains the claim text.

    Args:
        state: the state folder of the output.
        text: the claim of the run; an empty text disables the check.

    Raises:
        NemoLfrError: if the folder does not exist or belongs to another run.
    """
    if text and _read(state) != text:
        raise NemoLfrError(
            f"{state.parent}: was removed or replaced by another run while this one was writing there; stop the other "
            "run or choose another --out, then start this one again."
        )


def _read(state: Path) -> str | None:
    try:
        with open_regular(state / NAME) as file:
            text = file.read(LENGTH + 1).decode("ascii")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NemoLfrError for a pipe or folder
        return None
    return text if len(text) == LENGTH else None
