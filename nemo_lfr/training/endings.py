"""How a training script ends when something outside of it fails: in one line rather than in a traceback."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_lfr.errors import NemoLfrError

# What the place that is written to may refuse; other errors of the system may be faults of a program.
PLACE = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, getattr(errno, "EDQUOT", errno.ENOSPC)}
ADVICE = "make room or choose another place, and start the same command again; what was there before is whole"


@contextmanager
def ending_in_one_line(folder: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """End the process with one line on stderr if a user's mistake, a full disk or a missing permission ends a run.

    Logs that cannot be written, as on a full disk, do not print a traceback for each line either.

    Args:
        folder: of the run, to be named where an error does not say which file could not be written.

    Raises:
        SystemExit: in the place of such an error. Others pass.
    """
    before = logging.raiseExceptions
    logging.raiseExceptions = False
    try:
        yield
    except Exception as error:
        text = _line(error, folder)
        if text is None:
            raise
        raise SystemExit(f"error: {text}") from None
    finally:
        logging.raiseExceptions = before


def _line(error: BaseException, folder: str | os.PathLike[str] | None) -> str | None:
    """Say in one line what failed; None for an error that may be a program's fault."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in PLACE:
            return f"{cause.filename or folder or 'a file'}: {cause.strerror}; {ADVICE}."
        if isinstance(cause, NemoLfrError):
            # One that comes from a loader's worker holds that process's traceback, which ends with the reason.
            lines = [line for line in str(cause).splitlines() if line.strip()]
            return lines[-1].strip() if lines else type(cause).__name__
        cause = cause.__cause__ or cause.__context__
    return None
