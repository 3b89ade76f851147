"""Report a main program that worker processes cannot import.

A process that `multiprocessing` spawns imports the main program of its parent. The import fails if the program is not
a file. If the program's calls are not under `if __name__ == "__main__":`, the import runs the whole program again.
"""

import multiprocessing
import os
import sys
from collections.abc import Collection
from multiprocessing import process
from multiprocessing.process import BaseProcess
from pathlib import Path

from nemo_lfr.errors import NemoLfrError, shorten

REMEDY = (
    'put the program into a file, with its calls under `if __name__ == "__main__":`, or use one worker (workers=1 or '
    "jobs=1)"
)


def check_main_program() -> None:
    """End this process with a message if it is a worker that is importing the main program.

    Call this function first in each function that starts workers. A traceback of the worker would only hide the error
    that the parent raises; see `check_starts`.

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

    Workers return errors of their tasks to the parent. A worker therefore ends with a Python error only if it cannot
    import the main program, or the class of one of its arguments.

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
