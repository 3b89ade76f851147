"""End training scripts with a one-line error message if a run fails for a reason that the user can fix."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_lfr.errors import NemoLfrError

# System errors whose cause is the disk that a run writes to. Other system errors may be bugs, so their traceback is
# shown.
PLACE = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, getattr(errno, "EDQUOT", errno.ENOSPC)}
ADVICE = "free some space or choose another folder, and run the same command again; no existing file was damaged"


@contextmanager
def ending_in_one_line(folder: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Exit with one line on stderr if a run fails for a reason that the user can fix.

    Such reasons are invalid input, a full disk and a missing permission. Inside this context, a
    log record that cannot be written, for example because the disk is full, causes no traceback either.

    Args:
        folder: folder of the run. The message contains this path if the error does not name a file.

    Raises:
        SystemExit: if such an error occurs. Other exceptions are not changed.
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
    """Describe an error in one line, or return None if it may be a bug."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in PLACE:
            return f"{cause.filename or folder or 'a file'}: {cause.strerror}; {ADVICE}."
        if isinstance(cause, NemoLfrError):
            return str(cause).strip() or type(cause).__name__
        cause = cause.__cause__ or cause.__context__
    return None
