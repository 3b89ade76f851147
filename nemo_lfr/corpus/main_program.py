"""Start worker processes, and report a main program that they cannot import.

A process that `multiprocessing` spawns imports the main program of its parent. The import fails if the program is not
a file. If the program's calls are not under `if __name__ == "__main__":`, the import runs the whole program again.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing import process
from multiprocessing.process import BaseProcess
from pathlib import Path

from nemo_lfr.corpus.orphans import die_with
from nemo_lfr.errors import NemoLfrError, shorten

REMEDY = (
    'put the program into a file, with its calls under `if __name__ == "__main__":`, or use one worker (workers=1 or '
    "jobs=1)"
)


_VARIABLE, _VALUE = "PYTHONSAFEPATH", "nemo_lfr"
_users = 0  # number of threads that are inside `safe_imports`
_lock = threading.Lock()


@contextmanager
def safe_imports() -> Iterator[None]:
    """Keep processes that start inside a `with` block from importing modules of the current folder.

    A process that `multiprocessing` spawns searches the current folder first, until it receives its parent's import
    path. It could import, for example, a `types.py` beside the recordings of a corpus. This function has no effect in
    Python 3.10.
    """
    global _users
    with _lock:
        if is_ours := _users > 0 or _VARIABLE not in os.environ:  # otherwise the user has set the variable
            _users += 1
            os.environ[_VARIABLE] = _VALUE
    try:
        yield
    finally:
        if is_ours:
            with _lock:
                _users -= 1
                if not _users:
                    os.environ.pop(_VARIABLE, None)


def begin_worker(parent: int) -> None:
    """Initialize this worker process, which ends when the process with the id `parent` ends.

    It ignores SIGINT, because its parent handles Ctrl-C.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
    if os.environ.get(_VARIABLE) == _VALUE:
        del os.environ[_VARIABLE]  # programs that the worker starts may need their own folder


def check_main_program() -> None:
    """End this process with a message if it is a worker that is importing the main program.

    No traceback is printed, because it would hide the error that the parent raises; see `check_starts`. Call this
    function first in each function that starts workers.

    Raises:
        SystemExit: with exit code 1, as for an error that the main program raises.
    """
    if getattr(process.current_process(), "_inheriting", False):  # multiprocessing makes the same check
        sys.exit(f"nemo_lfr: error: a worker runs the main program again: {REMEDY}.")


def check_is_file() -> None:
    """Raise NemoLfrError if workers would have to import a main program that is not a file, such as standard input."""
    path = _main_path()
    if path is not None and not path.is_file():
        raise NemoLfrError(f"workers import the main program, but {shorten(path)} is not a file: {REMEDY}.")


def check_starts(workers: Collection[BaseProcess]) -> None:
    """Raise NemoLfrError if a worker has ended with a Python error.

    A worker ends with a Python error only if it cannot import the main program, or the class of one of its arguments.

    Args:
        workers: processes, some of which have ended.
    """
    if any(worker.exitcode == 1 for worker in workers):
        path = _main_path()
        name = "the main program" if path is None else f"the main program {shorten(path)}"
        raise NemoLfrError(f"a worker cannot import {name} (for the reason, see its message above): {REMEDY}.")


def new_children(others: Collection[BaseProcess]) -> set[BaseProcess]:
    """Return the active child processes that are not in `others`."""
    return set(multiprocessing.active_children()).difference(others)


def _main_path() -> Path | None:
    """Return the script that workers import as the main program.

    The result is None after `python -m MODULE` and in an interactive session.
    """
    main = sys.modules["__main__"]
    path: str | None = getattr(main, "__file__", None)
    if path is None or getattr(main, "__spec__", None) is not None or Path(path).stem == "ipython":
        return None
    folder: str = getattr(process, "ORIGINAL_DIR", None) or os.getcwd()
    return Path(folder) / path
