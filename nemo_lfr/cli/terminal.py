"""Print messages and progress on stderr."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import click

from nemo_lfr.errors import printable

# Seconds between two progress lines if stderr is not a terminal.
HEARTBEAT_S = 20.0


def echo_stderr(text: str) -> None:
    """Print one line on stderr, with control characters replaced.

    If the line cannot be written, for example because the disk is full, the error is ignored.

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


@contextmanager
def heartbeat(describe: Callable[[], str]) -> Iterator[None]:
    """Print a progress line on stderr every `HEARTBEAT_S` seconds until the context ends.

    A separate thread prints the lines, so they also appear while one long file is processed.

    Args:
        describe: function that returns the finished work as text, such as "3 of 10 files".
    """
    ended = threading.Event()
    started = time.monotonic()

    def run() -> None:
        with suppress(BrokenPipeError):
            while not ended.wait(HEARTBEAT_S):
                echo_stderr(f"nemo-lfr: {describe()} done after {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=run, name="nemo-lfr heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[..., Any]]:
    """Show a progress bar on a terminal.

    Args:
        unit: noun for the items, such as "files".

    Yields:
        A function that updates the bar. Its keyword arguments are `completed` and `total` (numbers of items), `text`
        (shown beside the bar) and `line` (printed above the bar).
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(unit, total=None, text="")

        def update(line: str = "", **values: Any) -> None:
            if line:
                bar.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
            bar.update(task, **values)

        yield update
