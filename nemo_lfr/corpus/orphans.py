"""No process outlives the run that started it, however that ended.

This file is also the program of a watcher: it imports the standard library alone, so that it starts at once.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.5
# Processes that were being started when their driver was killed appear within this time.
QUIET_SECONDS = 3.0
VARIABLE = "NEMO_LFR_RUN"
PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process as soon as its parent has ended, or now if it has already.

    Args:
        parent: the parent's process id, as the parent passed it. One that was asked for here could be that of
            whoever adopts orphans.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not _is_alive(parent):
        os._exit(1)
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while _is_alive(parent):
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _is_alive(parent: int) -> bool:
    process = multiprocessing.parent_process()
    return os.getppid() == parent and (process is None or process.is_alive())


@contextmanager
def family() -> Iterator[None]:
    """Kill all processes that are started inside, and their children, if this one is killed before the end.

    A watcher in a session of its own waits for this process to end, and finds them by an environment variable, which
    children inherit. Without /proc nothing is done.
    """
    if not Path("/proc/self/environ").exists():
        yield
        return
    token = uuid.uuid4().hex
    # -S: without site-packages.
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, token],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.environ[VARIABLE] = token
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        assert watcher.stdin is not None
        with contextlib.suppress(OSError):  # it was killed
            watcher.stdin.write(b"end")
            watcher.stdin.flush()
        with contextlib.suppress(OSError):
            watcher.stdin.close()
        watcher.wait()


def _kill_family(token: str) -> None:
    """Kill the processes that carry a token, until there are none for a while."""
    last = time.monotonic()
    while time.monotonic() - last < QUIET_SECONDS:
        for pid in _carriers(f"{VARIABLE}={token}".encode()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                last = time.monotonic()
        time.sleep(0.2)


def _carriers(variable: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    if not sys.stdin.buffer.read():  # else the run came to its end
        _kill_family(sys.argv[1])
