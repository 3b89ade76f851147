"""Command group `nemo-lfr` and its entry point.

Each command has its own file and imports torch and other large packages only when it runs, so that `--help` is fast.
Results go to stdout and everything else to stderr. Usage errors print one line and exit with code 2.
"""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from nemo_lfr._version import __version__
from nemo_lfr.cli.decode import decode
from nemo_lfr.cli.demo import demo
from nemo_lfr.cli.detokenize import detokenize
from nemo_lfr.cli.encode import encode
from nemo_lfr.cli.entropy import entropy
from nemo_lfr.cli.evaluate import evaluate
from nemo_lfr.cli.export import export
from nemo_lfr.cli.info import info
from nemo_lfr.cli.prepare import prepare
from nemo_lfr.cli.terminal import discard_output, echo_stderr, exit_with_error
from nemo_lfr.cli.tokenize import tokenize
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.shortage import shortage_of

DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nemo-lfr")
def app() -> None:
    """Encode speech to tokens at 21.5 frames per second, and decode it."""


for command in (encode, decode, info, demo, export, prepare, tokenize, detokenize, evaluate, entropy):
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
            echo_stderr(f"nemo-lfr: ended by {signal.Signals(received[0]).name}.")
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _prepare_streams() -> None:
    """Open closed standard descriptors on the null device, and let stdout print any file name.

    A file that is opened while descriptor 1 or 2 is closed would receive the output of print and of native libraries.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  stays open until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of `nemo-lfr`.

    Args:
        arguments: arguments without the program name; default: those of the process.
    """
    _prepare_streams()
    with _stopped_by_signals():
        _run(arguments)


def _check_current_folder() -> None:
    """Exit with an error if the current folder was removed.

    Python and PyTorch call `os.getcwd` in many places and would fail there with a traceback.
    """
    try:
        os.getcwd()
    except OSError as error:
        exit_with_error(f"the current folder cannot be used ({error.strerror}); go to another one.")


def _run(arguments: Sequence[str] | None) -> None:
    _check_current_folder()
    os.environ.setdefault("PATH", os.defpath)  # importing Lhotse fails without PATH
    try:
        app.main(args=arguments, prog_name="nemo-lfr", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        echo_stderr(error.format_message())
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "nemo-lfr"
        exit_with_error(f"{error.format_message()} Try '{command} --help'.")
    except click.ClickException as error:
        exit_with_error(error.format_message())
    except click.Abort as error:
        # click turns EOFError and KeyboardInterrupt into Abort; only the latter is an interrupt.
        if isinstance(error.__cause__ or error.__context__, EOFError):
            exit_with_error(f"a file ends too early ({error.__cause__ or error.__context__}).")
        echo_stderr("nemo-lfr: interrupted.")
        sys.exit(130)
    except KeyboardInterrupt:
        echo_stderr("nemo-lfr: interrupted.")
        sys.exit(130)
    except BrokenPipeError:
        discard_output(sys.stdout)
        sys.exit(1)
    except NemoLfrError as error:
        exit_with_error(str(error))
    except OSError as error:
        name = error.filename
        if name is None and error.errno in DISK_FULL:  # errors of our file writers have a name
            name = "stdout"
            discard_output(sys.stdout)
        exit_with_error(f"{name}: {error.strerror}." if name else f"{error.strerror or error}.")
    except (MemoryError, RuntimeError) as error:
        shortage = shortage_of(error)
        if shortage is None:
            raise
        exit_with_error(shortage)


if __name__ == "__main__":
    main()
