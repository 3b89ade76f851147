"""Whose an output folder is: a run stops before it writes into a folder that was removed, or made anew by another run.

A lock keeps two runs apart as long as its file stays. Who removes the folder of a run that still works, perhaps on
another machine, and starts a second one, has two that each hold a lock. So the folder also holds a random text, made
with it, which every process of a run compares before it puts a file into place.
"""

import secrets
from pathlib import Path

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.regular import open_regular

NAME = "claim"
LENGTH = 32  # hex digits


def claim(state: Path) -> str:
    """The text of an output's folder of state, which is made if there is none; to be called under the folder's lock.

    Raises:
        OSError: if it cannot be written.
    """
    text = _read(state)
    if text is None:
        text = secrets.token_hex(LENGTH // 2)
        write_text(state / NAME, text)
    return text


def check_claim(state: Path, text: str) -> None:
    """Raise NemoLfrError unless the folder is the one that was claimed; an empty text is of nobody."""
    if text and _read(state) != text:
        raise NemoLfrError(
            f"{state.parent}: was removed, or made anew by another run, while this one was writing there; stop the "
            "other run, or choose another --out, and start this one again."
        )


def _read(state: Path) -> str | None:
    try:
        with open_regular(state / NAME) as file:
            text = file.read(LENGTH + 1).decode("ascii")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # NemoLfrError is one: a pipe or folder of that name
        return None
    return text if len(text) == LENGTH else None
