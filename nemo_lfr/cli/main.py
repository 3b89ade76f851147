"""Command group `nemo-lfr` and its entry point.

Each command has its own module, and imports torch and other large packages only when it runs, so that `--help` is
fast. Results go to stdout, and everything else to stderr. `EXIT_CODES` lists the exit codes.
"""

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import click

from nemo_lfr._version import __version__
from nemo_lfr.cli.command import common_options
from nemo_lfr.cli.decode import decode
from nemo_lfr.cli.demo import demo
from nemo_lfr.cli.detokenize import detokenize
from nemo_lfr.cli.encode import encode
from nemo_lfr.cli.entropy import entropy
from nemo_lfr.cli.evaluate import evaluate
from nemo_lfr.cli.export import export
from nemo_lfr.cli.info import info
from nemo_lfr.cli.plugins import PluginGroup
from nemo_lfr.cli.prepare import prepare
from nemo_lfr.cli.serve import serve
from nemo_lfr.cli.session import DONE, FAILED, USAGE, Session, json_text
from nemo_lfr.cli.terminal import discard_output, echo_stderr
from nemo_lfr.cli.tokenize import tokenize
from nemo_lfr.errors import NemoLfrError, failure
from nemo_lfr.io.shortage import shortage_of

DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


EXIT_CODES = {
    DONE: "Everything was done.",
    FAILED: "The work began, but an input, a metric or an output failed.",
    USAGE: "Nothing was done: an argument, or a file that it names, is invalid.",
}
EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code}  {text}" for code, text in EXIT_CODES.items())


@click.group(cls=PluginGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(__version__, prog_name="nemo-lfr")
def app() -> None:
    """Encode speech to tokens at 21.5 frames per second, and decode tokens to speech."""


app.params += common_options()
for command in (encode, decode, info, demo, export, prepare, tokenize, detokenize, evaluate, entropy, serve):
    app.add_command(command)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP, so that cleanup removes partial files.

    Signals that are ignored, such as SIGHUP under nohup, stay ignored.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        sys.exit(128 + number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    except SystemExit:
        if received:
            echo_stderr(f"nemo-lfr: stopped by {signal.Signals(received[0]).name}.")
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _prepare_streams() -> None:
    """Replace closed standard streams with the null device, and let stdout print any file name.

    If a stream stayed closed, the next file that is opened would get its descriptor, and output of native libraries
    would be written to this file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  stays open until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The bytes of file names do not depend on the locale. In the C locale, click would print some of them as "?".
        sys.stdout.reconfigure(encoding="utf-8" if os.name == "posix" else None, errors="surrogateescape")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command-line interface.

    Args:
        arguments: arguments without the program name; default: the arguments of the process.
    """
    _prepare_streams()
    with _stopped_by_signals():
        _run(arguments)


def _exit_with_error(error: BaseException, session: Session, code: int) -> NoReturn:
    """Print an error as one line on stderr, also print it as JSON if --json was passed, and exit."""
    record = failure(getattr(error, "filename", None) or "", error)
    if session.verbose and not isinstance(error, click.UsageError):
        for line in "".join(traceback.format_exception(error)).splitlines():
            echo_stderr(line)
    session.report_failures()
    echo_stderr(f"nemo-lfr: error: {record['error']}")
    if session.as_json:
        click.echo(json_text({"failures": [*session.failures, record]}))
    sys.exit(code)


def _check_current_folder(session: Session) -> None:
    """Exit with an error if the current folder cannot be used, for example because it was removed."""
    try:
        os.getcwd()
    except OSError as error:
        text = f"the current folder cannot be used ({error.strerror}); change to another folder."
        _exit_with_error(NemoLfrError(text), session, USAGE)


def _run(arguments: Sequence[str] | None) -> None:
    session = Session()
    _check_current_folder(session)
    os.environ.setdefault("PATH", os.defpath)  # Lhotse cannot be imported if PATH is not set
    try:
        app.main(args=arguments, prog_name="nemo-lfr", standalone_mode=False, obj=session)
    except click.UsageError as error:
        words = list(sys.argv[1:] if arguments is None else arguments)
        # click may have stopped before it read --json, for example at an unknown command.
        session.as_json = session.as_json or "--json" in words[: [*words, "--"].index("--")]
        _exit_for_usage(error, session)
    except click.ClickException as error:
        _exit_with_error(NemoLfrError(error.format_message()), session, USAGE)
    except (click.Abort, KeyboardInterrupt) as error:
        # click raises Abort for EOFError and for KeyboardInterrupt, but only the latter is an interrupt.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, EOFError):
            _exit_with_error(EOFError(f"a file is truncated ({cause})."), session, FAILED)
        echo_stderr("nemo-lfr: interrupted.")
        sys.exit(130)
    except BrokenPipeError:
        discard_output(sys.stdout)
        sys.exit(FAILED)
    except Exception as error:
        _exit_for(error, session)


def _exit_for_usage(error: click.UsageError, session: Session) -> NoReturn:
    """Print a usage error and the advice to try --help, and exit with code 2."""
    no_arguments = getattr(click.exceptions, "NoArgsIsHelpError", ())  # since click 8.2
    if isinstance(error, no_arguments):
        click.echo(error.format_message(), err=True)
        sys.exit(USAGE)
    command = error.ctx.command_path if error.ctx else "nemo-lfr"
    message = error.format_message()
    text = f"{message}{'' if message.endswith(('.', '?')) else '.'} Try '{command} --help'."
    _exit_with_error(click.UsageError(text), session, USAGE)


def _exit_for(error: Exception, session: Session) -> NoReturn:
    """Print an error that a command raised, and exit with the code for this error.

    Before the work begins (see `session.begin_work`), an error of this package or of the operating system is a usage
    error, unless the disk is full.
    """
    code = FAILED if session.started else USAGE
    if isinstance(error, NemoLfrError):
        _exit_with_error(error, session, code)
    if isinstance(error, OSError):
        if error.errno in DISK_FULL:
            code = FAILED
            if error.filename is None:  # the error is from stdout, since this package's file writers set a name
                discard_output(sys.stdout)
                error = OSError(error.errno, error.strerror, "stdout")
        _exit_with_error(error, session, code)
    shortage = shortage_of(error)
    if shortage is not None:
        _exit_with_error(NemoLfrError(shortage), session, FAILED)
    hint = "" if session.verbose else " Please report this error with the traceback that --verbose prints."
    text = f"unexpected {type(error).__name__}: {error}.{hint}"
    unexpected = RuntimeError(text)
    unexpected.__traceback__, unexpected.__cause__ = None, error
    _exit_with_error(unexpected, session, FAILED)


if __name__ == "__main__":
    main()
