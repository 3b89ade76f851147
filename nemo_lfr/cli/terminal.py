"""Output of messages and progress on stderr, and of results on stdout."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NoReturn

import click

from nemo_lfr.errors import printable


def echo_stderr(text: str) -> None:
    """Print one line on stderr, with control characters replaced.

    Write errors, such as a log file on a full disk, are ignored so that they do not end the command.

    Raises:
        BrokenPipeError: if the reader of stderr has closed its pipe.
    """
    try:
        click.echo(printable(text), err=True)
    except BrokenPipeError:
        raise
    except OSError:
        discard_output(sys.stderr)


def discard_output(stream: IO[str]) -> None:
    """Redirect a stream to the null device, so that flushing it at exit does not raise."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def echo_stdout(text: object) -> None:
    """Print one line on stdout; on a terminal, replace control characters."""
    click.echo(printable(str(text)) if sys.stdout is not None and sys.stdout.isatty() else str(text))


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar on a terminal, or else plain lines.

    Args:
        total: number of files.

    Yields:
        A function to call once per finished file, with a line to print or "".
    """
    if not sys.stderr.isatty():
        yield lambda text: echo_stderr(text) if text else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("files", total=total)

        def advance(text: str) -> None:
            if text:
                bar.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)

        yield advance


def print_table(values: dict[str, Any]) -> None:
    """Print names and values as two columns on stdout."""
    width = max(len(key) for key in values)
    for key, value in values.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        click.echo(printable(f"{key:<{width}}  {shown}"))


def exit_with_error(text: str) -> NoReturn:
    """Print an error as one line on stderr and exit with code 2."""
    echo_stderr(f"nemo-lfr: error: {' '.join(text.split())}")
    sys.exit(2)
