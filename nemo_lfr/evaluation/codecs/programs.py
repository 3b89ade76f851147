"""Run external programs that encode and decode."""

import shutil
import subprocess
import time
from pathlib import Path

from nemo_lfr.errors import NemoLfrError


def program_version(program: str, package: str, *arguments: str) -> str:
    """Return a text that identifies the version of an installed program.

    Args:
        program: name of the program.
        package: Debian package of the program, for the error message.
        arguments: arguments that make the program print its version; none if it has no option for this.

    Returns:
        The first line that the program prints, or the size of its file if no arguments are passed.

    Raises:
        NemoLfrError: if the program is not installed.
    """
    path = shutil.which(program)
    if path is None:
        raise NemoLfrError(f"{program} is not installed; on Debian or Ubuntu: apt install {package}")
    if not arguments:  # the program cannot print its version
        return f"{program} of {Path(path).stat().st_size} bytes"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def run_timed(*command: str) -> float:
    """Run a program and return its wall-clock time in seconds.

    Raises:
        NemoLfrError: if the program fails. The message contains the end of what the program printed on stderr.
    """
    started = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise NemoLfrError(f"{command[0]} failed: {run.stderr.strip()[-200:]}")
    return time.perf_counter() - started
