"""State of one run of a command: the options --json, --quiet and --verbose, and the failures so far."""

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import click

from nemo_lfr.cli.terminal import echo_stderr
from nemo_lfr.errors import Failure, failure

# Exit codes. A command that is stopped by a signal exits with 128 + the number of the signal.
DONE = 0
FAILED = 1
USAGE = 2

SHOWN_FAILURES = 20
_SURROGATES = re.compile("[\ud800-\udfff]")
logger = logging.getLogger("nemo_lfr")


@dataclass
class Session:
    """State of one run of a command.

    Attributes:
        as_json: whether to print the result as JSON on stdout, and print nothing else on stdout.
        quiet: whether to print only errors on stderr.
        verbose: whether to print log messages and tracebacks on stderr.
        started: whether the arguments were accepted and the work has begun. This determines the exit code of an error.
        failures: records of requested work that failed.
        reported: number of failures that `report_failures` has already printed.
        lost_output: whether a part of the result could not be printed, because stdout was closed.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    started: bool = False
    failures: list[Failure] = field(default_factory=list)
    reported: int = 0
    lost_output: bool = False

    def report_failures(
        self, total: int = 0, shown: int = SHOWN_FAILURES, see: str = "", failed: int | None = None
    ) -> None:
        """Print on stderr the failures that have not been printed yet.

        Args:
            total: number of inputs. If it is 2 or more, a last line says how many of the inputs failed.
            shown: maximum number of failures to print.
            see: name of the file that lists all failures; "" for none.
            failed: number of inputs that failed; None if each failure affects one input.
        """
        failures = self.failures[self.reported :]
        self.reported = len(self.failures)
        for record in failures[:shown]:
            echo_stderr(f"nemo-lfr: error: {record['error']}")
        if len(failures) > shown > 0:
            echo_stderr(f"nemo-lfr: {len(failures) - shown} more failed{see and f'; see {see}'}.")
        if failures and total > 1:
            echo_stderr(f"nemo-lfr: {max(len(failures), failed or 0)} of {total} failed.")


def current() -> Session:
    """Return the session of the running command; a new session if no command is running."""
    context = click.get_current_context(silent=True)
    return (context and context.find_object(Session)) or Session()


def begin_work() -> None:
    """Record that the arguments were accepted. Errors after this are failures of the work, not usage errors."""
    current().started = True


def note(text: str) -> None:
    """Print a line on stderr, unless --quiet was passed."""
    if not current().quiet:
        echo_stderr(text)


def print_line(text: object) -> None:
    """Print one line of the result on stdout, unless --json was passed.

    On a terminal, control characters are replaced.
    """
    from nemo_lfr.errors import printable

    if not current().as_json:
        _echo(printable(str(text)) if sys.stdout is not None and sys.stdout.isatty() else str(text))


def fail(source: object, error: BaseException) -> None:
    """Record that an input failed. The command prints the failure at the end and exits with code 1.

    Args:
        source: path or name of the input.
        error: exception that the input caused.
    """
    logger.debug("%s", source, exc_info=error)
    current().failures.append(failure(source, error))


def print_json(values: Any) -> None:
    """Print the result of a command on stdout, if --json was passed."""
    session = current()
    if session.as_json:
        _echo(json_text({**values, "failures": session.failures}))


def json_text(values: Any) -> str:
    r"""Return JSON for `--json`, as ASCII.

    Bytes of file names that are not UTF-8 are replaced by escapes such as `\xff`, because strict JSON parsers refuse
    surrogates.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False)
    if not _SURROGATES.search(text):
        return json.dumps(values, indent=2)
    text = _SURROGATES.sub(lambda match: json.dumps(_escaped(match[0]))[1:-1], text)
    return json.dumps(json.loads(text), indent=2)


def _escaped(surrogate: str) -> str:
    code = ord(surrogate)
    is_byte = 0xDC80 <= code <= 0xDCFF
    return f"\\x{code - 0xDC00:02x}" if is_byte else f"\\u{code:04x}"


def _echo(text: str) -> None:
    if sys.stdout is None:
        current().lost_output = True
    click.echo(text)


class _StderrHandler(logging.Handler):
    """Handler that prints log messages on stderr. Without --verbose, a repeated message is printed only once."""

    def __init__(self, verbose: bool) -> None:
        super().__init__(logging.DEBUG if verbose else logging.WARNING)
        self._verbose = verbose
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log record, unless its text was printed before. --verbose prints all records, with tracebacks."""
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
    """Print the package's log messages on stderr while the context is active.

    With --json, text that other packages (such as NeMo) print on stdout is redirected to stderr.
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
