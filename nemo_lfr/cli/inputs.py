"""Check the inputs of `encode` and `decode`."""

import contextlib
import errno
import os
from collections.abc import Collection
from pathlib import Path

from nemo_lfr.cli.identify import (
    ANY_RATE,
    AUDIO,
    CHECKPOINT,
    ENTROPY_MODEL,
    TOKEN_SUFFIX,
    TOKENS,
    Identity,
    identify_content,
    identify_suffix,
)
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.folders import BROKEN

# Error numbers for a path that does not exist. Windows has another one for names that contain a `*`.
MISSING = BROKEN | {errno.EINVAL}


def path_exists(text: str) -> bool:
    """Return whether a path exists; True if this is unknown, for example because a permission is missing."""
    try:
        os.lstat(text)
    except ValueError:  # a NUL character in the path
        return False
    except OSError as error:
        return error.errno not in MISSING
    return True


def check_input(path: Path, suffixes: Collection[str], *, is_only: bool = False) -> None:
    """Check that an input is a file for this command, by its content.

    An audio file, a token file, a checkpoint or an entropy model is refused if it is for another command. Any other
    file that this command cannot read is refused only if it is the only input.

    Args:
        path: input from the command line.
        suffixes: suffixes of the files that the command selects in folders.
        is_only: whether this is the only input.

    Raises:
        NemoLfrError: if the file is refused.
    """
    wanted = TOKENS if TOKEN_SUFFIX in suffixes else AUDIO
    identity = identify_content(path) if path.is_file() else None
    if identity is None and wanted.kind == TOKENS.kind and _opens_as_audio(path):
        identity = AUDIO
    if identity is None:
        if is_only:
            _try_to_open(path, wanted)
        return
    known = {AUDIO.kind, TOKENS.kind, CHECKPOINT.kind, ENTROPY_MODEL.kind}
    if identity.kind != wanted.kind and (is_only or identity.kind in known):
        raise NemoLfrError(f"{path}: this is {identity.text}, not {wanted.text}; {identity.advice}.")


def _opens_as_audio(path: Path) -> bool:
    """Return whether a file has an audio suffix and can be opened as audio, whatever its first bytes are."""
    if not path.is_file() or identify_suffix(path).kind != AUDIO.kind:
        return False
    with contextlib.suppress(NemoLfrError, OSError):
        _try_to_open(path, AUDIO)
        return True
    return False


def _try_to_open(path: Path, wanted: Identity) -> None:
    """Open a file as a token file or as audio, depending on `wanted`. Raise the reader's error if this fails."""
    if wanted.kind == TOKENS.kind:
        from nemo_lfr.io.token_file import TokenReader

        with TokenReader(path):
            pass
    else:
        from nemo_lfr.io.audio import AudioReader

        with AudioReader(path, ANY_RATE):
            pass
