"""Output rules of one run of the command line: --json, --quiet, --verbose, and the failures so far."""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import click

from nemo_lfr.cli.terminal import echo_stderr
from nemo_lfr.errors import Failure, failure

# Exit codes. A signal ends a command with 128 + its number.
DONE = 0
FAILED = 1
USAGE = 2

SHOWN_FAILURES = 20
logger = logging.getLogger("nemo_lfr")


@dataclass
class Session:
    """State of one run of the command line.

    Attributes:
        as_json: print the result as JSON on stdout, and nothing else.
        quiet: print only errors on stderr.
        verbose: print the log of the package, and tracebacks, on stderr.
        started: whether the arguments were accepted and the work has begun; decides the exit code of an error.
        failures: records of what was requested but not done.
        reported: number of failures that `report_failures` has already printed.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    started: bool = False
    failures: list[Failure] = field(default_factory=list)
    reported: int = 0

    def report_failures(self, total: int = 0, shown: int = SHOWN_FAILURES, see: str = "") -> None:
        """Print the failures that were not reported yet on stderr.

        Args:
            total: number of inputs, for the last line.
            shown: how many failures to print.
            see: where all failures are listed.
        """
        failures = self.failures[self.reported :]
        self.reported = len(self.failures)
        for record in failures[:shown]:
            echo_stderr(f"nemo-lfr: error: {record['error']}")
        if len(failures) > shown > 0:
            echo_stderr(f"nemo-lfr: {len(failures) - shown} more failed{see and f'; see {see}'}.")
        if failures and total > 1:
            echo_stderr(f"nemo-lfr: {len(failures)} of {total} failed.")


def current() -> Session:
    """Return the session of the command that runs; a new one outside of commands."""
    context = click.get_current_context(silent=True)
    return (context and context.find_object(Session)) or Session()


def begin_work() -> None:
    """Note that the arguments were accepted: an error from here on is a failure of the work, not of usage."""
    current().started = True


def note(text: str) -> None:
    """Print a line on stderr that --quiet suppresses."""
    if not current().quiet:
        echo_stderr(text)


def print_line(text: object) -> None:
    """Print one line of the result on stdout, unless --json was passed; on a terminal, replace control characters."""
    from nemo_lfr.errors import printable

    if not current().as_json:
        click.echo(printable(str(text)) if sys.stdout is not None and sys.stdout.isatty() else str(text))


def fail(source: object, error: BaseException) -> None:
    """Record that an input failed, for the list at the end and for --json; exit code 1.

    Args:
        source: path or name of the input.
        error: the exception that it caused.
    """
    logger.debug("%s", source, exc_info=error)
    current().failures.append(failure(source, error))


def print_json(values: Any) -> None:
    """Print a command's result on stdout, if --json was passed."""
    session = current()
    if session.as_json:
        click.echo(json.dumps({**values, "failures": session.failures}, indent=2))


class _StderrHandler(logging.Handler):
    """Handler that prints log messages as lines of the command; a repeated message is printed once."""

    def __init__(self, verbose: bool) -> None:
        super().__init__(logging.DEBUG if verbose else logging.WARNING)
        self._verbose = verbose
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; its traceback too if the command is verbose."""
        text = record.getMessage()
        if self._verbose:
            echo_stderr(f"nemo-lfr: {record.levelname.lower()}: {record.name}: {text}")
            if record.exc_info:
                for line in "".join(traceback.format_exception(*record.exc_info)).splitlines():
                    echo_stderr(line)
        elif text not in self._seen:
            self._seen.add(text)
            echo_stderr(f"nemo-lfr: {text}")


@contextmanager
def output_rules(session: Session) -> Iterator[None]:
    """Send the package's log to stderr as the session requires, and reserve stdout for JSON.

    With --json, what other packages (such as NeMo) print to stdout goes to stderr.
    """
    handler = _StderrHandler(session.verbose)
    if session.quiet:
        handler.setLevel(logging.ERROR)
    before = logger.level
    logger.addHandler(handler)
    if session.verbose:
        logger.setLevel(logging.DEBUG)
    try:
        if session.as_json:
            with redirect_stdout(sys.stderr):
                yield
        else:
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
