"""Create one-line errors for exhausted system resources and for optional packages that cannot be imported."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from nemo_lfr.errors import MissingExtraError, NemoLfrError, install_command, shorten

# PyTorch and the C++ standard library report a lack of memory as RuntimeError or ImportError with one of these
# phrases.
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

# Address space in bytes that PyTorch needs to be imported, to run, and for each thread (stack and heap). Measured with
# the bundled codec on long files, and rounded up.
_IMPORTED, _COMPUTING, _PER_THREAD = 600 << 20, 256 << 20, 64 << 20
_MAX_THREADS = 16


def check_address_space() -> None:
    """Raise an error if the limit on address space is too low to load and run PyTorch.

    Without enough address space, oneDNN could crash the process.

    Raises:
        NemoLfrError: if the limit (`ulimit -v`) is too low.
    """
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):  # not Linux
        return
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    needed = used + _COMPUTING + _PER_THREAD * threads + (0 if "torch" in sys.modules else _IMPORTED)
    if limit not in (resource.RLIM_INFINITY, -1) and limit < needed:
        raise NemoLfrError(
            f"not enough memory: running PyTorch needs about {needed >> 20} MB of address space, but the limit is "
            f"{limit >> 20} MB; raise it with `ulimit -v {needed >> 10}` or more."
        )


def shortage_of(error: BaseException) -> str | None:
    """Return a message if an error means that memory or threads are exhausted; None for other errors."""
    text = " ".join(str(error).split())
    reason = f" ({shorten(text, 120)})" if text else ""
    is_memory_message = isinstance(error, RuntimeError | ImportError) and any(phrase in text for phrase in NO_MEMORY)
    if isinstance(error, MemoryError) or is_memory_message:
        return f"not enough memory{reason}; free memory, or reduce --batch-size or --workers if the command has them."
    if isinstance(error, RuntimeError) and any(phrase in text for phrase in NO_THREAD):
        return f"no more threads can be started{reason}; raise the limit `ulimit -u`, or end other processes."
    return None


@contextmanager
def sharing(what: str) -> Iterator[None]:
    """Return a context manager that turns failures to create locks or shared memory into one-line errors.

    Args:
        what: plural subject of the error message, such as "several --workers".

    Raises:
        NemoLfrError: if the system cannot provide locks or shared memory.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise NemoLfrError(
            f"{what} need shared memory, which is not available ({shorten(error, 200)}); free /dev/shm, make it "
            "writable, or start the container with a larger --shm-size."
        ) from error


def missing_extra(error: Exception, package: str, message: str) -> MissingExtraError:
    """Return the error for an optional package that could not be imported.

    Args:
        error: exception of any class that the import raised.
        package: name of the package.
        message: message if the package or one of its dependencies is not installed. It contains the command that
            installs the package.
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
        MissingExtraError: if the module is not installed or cannot be imported.
    """
    try:
        return import_module(module)
    except Exception as error:  # a package may raise anything while it is imported
        package = module.partition(".")[0]
        message = f"{package} is not installed: {install_command(package)}"
        raise missing_extra(error, package, message) from error
