"""Print messages and progress on stderr, and results on stdout."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NoReturn

import click

from nemo_lfr.errors import printable


def echo_stderr(text: str) -> None:
    """Print one line on stderr; file names and labels in it may hold anything.

    A log on a full disk, or a terminal that is gone, does not end the work.
    """
    try:
        click.echo(printable(text), err=True)
    except BrokenPipeError:
        raise
    except OSError:
        discard_output(sys.stderr)


def discard_output(stream: IO[str]) -> None:
    """Drop what is written to a stream from now on, and what waits in it, so that its end raises nothing."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def echo_stdout(text: object) -> None:
    """Print one line of the result on stdout, where a program gets every name as it is, and a terminal a safe one."""
    click.echo(printable(str(text)) if sys.stdout is not None and sys.stdout.isatty() else str(text))


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; its value is called for each finished file, and prints what there is to say of it."""
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
    """Two columns on stdout."""
    width = max(len(key) for key in values)
    for key, value in values.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        click.echo(printable(f"{key:<{width}}  {shown}"))


def exit_with_error(text: str) -> NoReturn:
    """Print an error as one line on stderr and exit with code 2."""
    echo_stderr(f"nemo-lfr: error: {' '.join(text.split())}")
    sys.exit(2)
