"""External programs that encode and decode."""

import shutil
import subprocess
import time
from pathlib import Path

from nemo_lfr.errors import NemoLfrError


def program_version(program: str, package: str, *arguments: str) -> str:
    """Return the version of an installed program.

    Args:
        program: name of the program.
        package: Debian package of the program, for the error message.
        arguments: arguments that print the version on the first line; none if the program cannot print it.

    Returns:
        That line, or else the size of the program.

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
        NemoLfrError: if it fails; the message ends with its output on stderr.
    """
    started = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise NemoLfrError(f"{command[0]} failed: {run.stderr.strip()[-200:]}")
    return time.perf_counter() - started
