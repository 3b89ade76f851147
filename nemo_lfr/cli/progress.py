"""Show the progress of a command: a bar on a terminal, otherwise occasional lines, and nothing with --quiet."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nemo_lfr.cli.session import begin_work, current
from nemo_lfr.cli.terminal import echo_stderr, heartbeat, progress_bar
from nemo_lfr.errors import counted


@contextmanager
def progress(total: int, unit: str = "file", *, prints_lines: bool = False) -> Iterator[Callable[[str], None]]:
    """Report the progress of work on a known number of items.

    Args:
        total: number of items.
        unit: noun for the items, in the singular.
        prints_lines: whether the command prints a line on stdout for each item. If so, no bar is shown when both
            stdout and stderr are terminals.

    Yields:
        A function to call after each finished item. Its argument is a line to print on stderr, or "".
    """
    begin_work()
    done = 0

    def count(line: str) -> None:
        nonlocal done
        done += 1
        if line:
            echo_stderr(line)

    if current().quiet or (prints_lines and sys.stdout.isatty() and sys.stderr.isatty()):
        yield count
    elif not sys.stderr.isatty():
        with heartbeat(lambda: f"{done} of {counted(total, unit)}"):
            yield count
    else:
        with progress_bar(f"{unit}s") as update:
            update(total=total)

            def advance(line: str) -> None:
                nonlocal done
                done += 1
                update(line, completed=done)

            yield advance
