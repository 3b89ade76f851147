"""Kill processes that would outlive the run that started them.

A watcher process runs this file as a script. The file imports only the standard library, so that the watcher starts
quickly.
"""

import contextlib
import ctypes
import multiprocessing
import os
import select
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
# After a run was killed, the watcher continues until it has found no further process for this number of seconds.
# Processes that were starting when the run was killed appear within this time.
QUIET_SECONDS = 3.0
VARIABLE = "NEMO_LFR_RUN"
PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process as soon as its parent ends, or at once if the parent has already ended.

    Args:
        parent: process id of the parent, passed by the parent itself. `os.getppid()` would return the id of another
            process if the parent has already ended.
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
    """Kill all processes that were started in this context if this process is killed before the context ends.

    A watcher process recognizes the processes by an environment variable. It scans for them continuously, because
    some of Ray's processes later overwrite their environment and lose their parents. On systems without /proc, this
    context manager does nothing.
    """
    if not Path("/proc/self/environ").exists():
        yield
        return
    token = uuid.uuid4().hex
    # -S skips site-packages, so that the watcher starts faster.
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
        with contextlib.suppress(OSError):  # the watcher was killed
            watcher.stdin.write(b"end")
            watcher.stdin.flush()
        with contextlib.suppress(OSError):
            watcher.stdin.close()
        watcher.wait()


class _Kin:
    """Tracker of a run's processes: those with the run's random id in their environment, and their descendants."""

    def __init__(self, token: str, head: int) -> None:
        self._variable = f"{VARIABLE}={token}".encode()
        self._head = head
        self._started: dict[int, str] = {}  # start time by process id, to detect reused ids
        self._strangers: set[int] = set()

    def look(self, again: bool = False) -> None:
        """Find new processes of the run.

        Args:
            again: whether to scan all processes, instead of only those that appeared since the last call.
        """
        there = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - {os.getpid()}
        self._started = {pid: started for pid, started in self._started.items() if pid in there}
        self._strangers = set() if again else self._strangers & there
        states = {pid: state for pid in there - self._strangers if (state := _state(pid)) is not None}
        # Drop ids that now belong to another process.
        self._started = {pid: was for pid, was in self._started.items() if pid in states and states[pid][1] == was}
        unknown = {pid: parent for pid, (parent, _) in states.items() if pid not in self._started}
        found = {pid for pid in unknown if self._carries(pid)}
        while found:
            self._started |= {pid: states[pid][1] for pid in found}
            unknown = {pid: parent for pid, parent in unknown.items() if pid not in found}
            found = {pid for pid, parent in unknown.items() if parent in self._started}
        # A new child of the run's main process (`head`) shows the variable only after its `exec`, so look at it again.
        self._strangers |= {pid for pid, parent in unknown.items() if parent != self._head and pid != self._head}

    def kill(self) -> bool:
        """Kill all known processes, and return whether any was killed."""
        killed = False
        for pid, started in self._started.items():
            state = _state(pid)
            if state is not None and state[1] == started:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    killed = True
        return killed

    def _carries(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return self._variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False


def _state(pid: int) -> tuple[int, str] | None:
    """Return the parent's id and the start time of a process; None if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else (int(fields[1]), fields[19].decode())


def _watch(token: str) -> None:
    """Wait until the run ends, and kill its processes unless it ended normally.

    When the run ends, it closes the standard input of this process. If the run ends normally, it writes a byte first.

    Args:
        token: random id of the run, which its processes have in the environment variable `NEMO_LFR_RUN`.
    """
    kin = _Kin(token, os.getppid())
    while not select.select([0], [], [], POLL_SECONDS)[0]:
        kin.look()
    if os.read(0, 1):  # the run ended normally
        return
    last = time.monotonic()
    while time.monotonic() - last < QUIET_SECONDS:
        kin.look(again=True)
        if kin.kill():
            last = time.monotonic()
        time.sleep(0.2)


if __name__ == "__main__":
    _watch(sys.argv[1])
