"""Told in one sentence: what the machine is short of, and an optional package that is there but cannot be imported."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from nemo_lfr.errors import MissingExtraError, NemoLfrError, install_command, shorten

# In messages of PyTorch and of the C++ library, whose errors have no class of their own.
NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "bad allocation",
    "std::bad_alloc",
    "could not create a memory",
    "failed to map segment",
)
NO_THREAD = ("can't start new thread", "Resource temporarily unavailable")


def shortage_of(error: BaseException) -> str | None:
    """Say what the machine was short of, and what to do; None for an error that is of another kind."""
    text = " ".join(str(error).split())
    reason = f" ({shorten(text, 120)})" if text else ""
    said_so = isinstance(error, RuntimeError | ImportError) and any(said in text for said in NO_MEMORY)
    if isinstance(error, MemoryError) or said_so:
        return f"not enough memory{reason}; process less at a time: a smaller --batch-size, fewer --workers or --jobs."
    if isinstance(error, RuntimeError) and any(said in text for said in NO_THREAD):
        return f"no more threads can be started{reason}; see `ulimit -u`, or end other processes."
    return None


@contextmanager
def sharing(what: str) -> Iterator[None]:
    """Make what processes share, such as locks and shared memory.

    Args:
        what: begins the sentence where that fails, and says who needs it.

    Raises:
        NemoLfrError: if the system has none to give.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise NemoLfrError(
            f"{what} need shared memory, and there is none to be had ({shorten(error, 200)}); free /dev/shm or make "
            "it writable, or give a container more of it (--shm-size)."
        ) from error


def missing_extra(error: Exception, package: str, message: str) -> MissingExtraError:
    """The error for an optional package that could not be imported.

    Args:
        error: what its import raised, of any class: a package may be there and yet fail.
        package: its name.
        message: if it, or something that it needs, is not installed: with the command that installs it.
    """
    if isinstance(error, ModuleNotFoundError | MissingExtraError):
        return MissingExtraError(message)
    if shortage := shortage_of(error):
        return MissingExtraError(f"{package} cannot be imported: {shortage}")
    kind = type(error).__name__
    return MissingExtraError(f"{package} is installed, but cannot be imported ({kind}: {shorten(error, 200)}).")


def require(module: str) -> Any:
    """Import an optional dependency.

    Args:
        module: name of the module.

    Raises:
        MissingExtraError: if it is not installed or cannot be imported.
    """
    try:
        return import_module(module)
    except Exception as error:  # a package may raise anything while it is imported
        package = module.partition(".")[0]
        message = f"{package} is not installed: {install_command(package)}"
        raise missing_extra(error, package, message) from error
