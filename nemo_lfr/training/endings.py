"""End training scripts with a one-line error message if a run fails for a reason that the user can fix."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_lfr.errors import NemoLfrError, printable

# System errors that are caused by the disk or by the output path, with advice for the user. Other system errors may
# be bugs, so their traceback is shown.
_SPACE = "free some space or choose another folder, and run the same command again; no existing file was damaged"
_PATH = "choose another folder; no existing file was changed"
ADVICE = dict.fromkeys((errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)), _SPACE)
ADVICE |= dict.fromkeys(
    (
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    ),
    _PATH,
)
# Base classes, by name, of the exceptions with which Hydra, Lightning, NeMo and OmegaConf report an invalid config
CONFIG_ERRORS = {"HydraException", "MisconfigurationException", "NeMoBaseException", "OmegaConfBaseException"}


@contextmanager
def ending_in_one_line(*folders: str | os.PathLike[str] | None) -> Iterator[None]:
    """Exit with one line on stderr if a run fails for a reason that the user can fix.

    Such reasons are invalid input, an invalid config, a full disk, and a file or folder that cannot be created or
    written. Inside this context, a log record that cannot be written causes no traceback either.

    Args:
        folders: folders that the run writes to; None is ignored. The message contains the first one if the error does
            not name a file.

    Raises:
        SystemExit: if such an error occurs. Other exceptions are not changed.
    """
    before = logging.raiseExceptions
    logging.raiseExceptions = False
    try:
        yield
    except Exception as error:
        text = _line(error, [Path(folder) for folder in folders if folder])
        if text is None:
            raise
        raise SystemExit(f"error: {text}") from None
    finally:
        logging.raiseExceptions = before


def _line(error: BaseException, folders: list[Path]) -> str | None:
    """Describe an error in one line, or return None if it may be a bug.

    `folders` are the folders that the run writes to; see `ending_in_one_line`.
    """
    if CONFIG_ERRORS & {base.__name__ for base in type(error).__mro__}:
        lines = str(error).split("\n    full_key: ")[0].split()  # OmegaConf adds details on more lines
        return printable(" ".join(lines)) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        # Code often handles EEXIST and then fails for another reason, so this error counts only if nothing handled it.
        if isinstance(cause, OSError) and cause.errno in ADVICE and (cause is error or cause.errno != errno.EEXIST):
            name = cause.filename or next(iter(folders), "a file")
            return f"{name}: {cause.strerror}; {ADVICE[cause.errno]}."
        if isinstance(cause, FileNotFoundError) and _is_not_created(cause.filename, folders):
            return f"{cause.filename}: this folder cannot be created ({cause.strerror}); {_PATH}."
        if isinstance(cause, NemoLfrError):
            return str(cause).strip() or type(cause).__name__
        cause = cause.__cause__ or cause.__context__
    return None


def _is_not_created(path: object, folders: list[Path]) -> bool:
    """Return whether a path is a folder of the run that does not exist yet, or a parent of such a folder."""
    if not isinstance(path, str | os.PathLike):
        return False
    missing = Path(os.path.abspath(path))
    return any(Path(os.path.abspath(folder)).is_relative_to(missing) for folder in folders if not folder.exists())
