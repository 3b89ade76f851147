"""Checks and temporary files for the argument "-", which stands for stdin or stdout."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nemo_lfr.cli.files import FileTask
from nemo_lfr.cli.interrupts import watch_signals
from nemo_lfr.cli.session import current
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import naming


def check_pipe(inputs: Sequence[str], out: Path | None) -> None:
    """Check the arguments of a command that reads stdin or writes stdout, and set these streams to blocking mode.

    Another process may have set non-blocking mode, in which a pause of the sender looks like the end of the input.

    Args:
        inputs: inputs from the command line; at least one is "-".
        out: value of --out, if it was passed.

    Raises:
        NemoLfrError: if the inputs are not `-`, `- -` or `FILE -`, if --out or --json was passed, or if stdin or
            stdout is closed or is a terminal.
    """
    if current().as_json:
        raise NemoLfrError("-: --json cannot be used with pipes, because stdout receives the output; remove --json.")
    if "" in inputs:
        raise NemoLfrError("'': no such file or folder.")
    if out is not None or len(inputs) > 2 or inputs[-1] != "-":
        raise NemoLfrError(f"{' '.join(inputs)}: for pipes, pass `-`, `- -` or `FILE -`, without --out.")
    streams = {"stdin": sys.stdin, "stdout": sys.stdout} if inputs[0] == "-" else {"stdout": sys.stdout}
    for name, stream in streams.items():
        if stream is None or stream.isatty():
            problem = "is closed" if stream is None else "is a terminal"
            raise NemoLfrError(f"-: {name} {problem}; connect it to a pipe or a file.")
    for stream in streams.values():
        # Streams without a descriptor, and Windows before Python 3.12.
        with suppress(OSError, ValueError, AttributeError):
            os.set_blocking(stream.fileno(), True)


@contextmanager
def spooled(source: str, suffix: str, new_suffix: str) -> Iterator[FileTask]:
    """Write the output to a temporary file, and copy this file to stdout when the context ends.

    If `source` is "-", stdin is first copied to a temporary file. If the context ends with an error, nothing is
    written to stdout.

    Args:
        source: path of the input, or "-" for stdin.
        suffix: suffix of the temporary input file.
        new_suffix: suffix of the temporary output file.

    Yields:
        The task to run in the context. Its output is the temporary file.

    Raises:
        NemoLfrError: if the `with` block raises it. The message then names stdin instead of the temporary file.
    """
    with tempfile.TemporaryDirectory(prefix="nemo-lfr-") as folder:
        path = Path(source)
        if source == "-":
            path = Path(folder, f"stdin{suffix}")
            with watch_signals(sys.stdin.buffer), naming(path), open(path, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        task = FileTask(path, Path(folder, f"stdout{new_suffix}"))
        try:
            yield task
        except NemoLfrError as error:
            raise NemoLfrError(str(error).replace(str(path), "stdin") if source == "-" else str(error)) from error
        with open(task.target, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
