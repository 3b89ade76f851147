"""Signals while a command reads stdin. The first Ctrl-C ends the recording, and the second one stops the command."""

import os
import select
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from nemo_lfr.cli.terminal import echo_stderr

# Seconds after the first Ctrl-C until a command that still runs says how to stop it.
PATIENCE_S = 3.0
REPEAT_S = 0.1
WAITING = "nemo-lfr: interrupted; the input is processed to its end. Press Ctrl-C again to stop at once."
INPUT_ENDED = b"\0"  # no signal has this number


@dataclass(frozen=True)
class InputSignals:
    """Signals that arrive while stdin is read; see `watch_signals`.

    Attributes:
        stopped: descriptor that becomes readable when reading must stop; None if signals are not watched.
    """

    stopped: int | None = None
    _numbers: int | None = None

    def end_input(self) -> None:
        """Let the next SIGINT stop the command, because stdin was read to its end."""
        if self._numbers is not None:
            os.write(self._numbers, INPUT_ENDED)


class _Watcher:
    """Watcher that runs in a thread and decides which signals stop the command.

    While the main thread waits for data in libsndfile, Python calls no signal handlers. The watcher therefore reads
    the numbers of the signals from a pipe, to which Python writes them immediately.

    Args:
        finishes: whether the first SIGINT ends only the recording, and not the command.
        numbers: descriptor to read the numbers of the signals from.
        stop: descriptor that the watcher closes when stdin must not be read any further.

    Attributes:
        answered: whether the main thread has raised KeyboardInterrupt or left the context of `watch_signals`.
    """

    def __init__(self, finishes: bool, numbers: int, stop: int) -> None:
        self._finishes, self._numbers, self._stop = finishes, numbers, stop
        self._main = threading.get_ident()
        # No locks, since the handler may interrupt code that holds one.
        self._stopping = False
        self.answered = False

    def run(self) -> None:
        """Read signals until one of them stops the command or the context ends."""
        last = self._last_signal()
        self._stopping = True
        interrupts = self._finishes and last == bytes([signal.SIGINT])
        if interrupts:
            # `handle` may have run before `_stopping` changed, so the main thread gets the signal again.
            signal.pthread_kill(self._main, signal.SIGINT)
        os.close(self._stop)
        while interrupts and not self.answered:
            # The signal is repeated, since it does not end a system call that begins just after it.
            time.sleep(REPEAT_S)
            signal.pthread_kill(self._main, signal.SIGINT)

    def _last_signal(self) -> bytes:
        """Wait for the signal that stops the command, and return its number as one byte.

        If the context ends first, return b"".
        """
        may_finish, timeout = self._finishes, None
        while True:
            if not select.select([self._numbers], [], [], timeout)[0]:
                timeout = None
                with suppress(BrokenPipeError):
                    echo_stderr(WAITING)
                continue
            number = os.read(self._numbers, 1)
            if number == INPUT_ENDED:
                may_finish = False
            elif may_finish and number == bytes([signal.SIGINT]):
                may_finish, timeout = False, PATIENCE_S
            else:
                return number

    def handle(self, *_: object) -> None:
        """Raise KeyboardInterrupt if `run` has decided to stop the command. Later calls do nothing."""
        if self._stopping and not self.answered:
            self.answered = True
            raise KeyboardInterrupt


@contextmanager
def watch_signals(source: IO[bytes] | None) -> Iterator[InputSignals]:
    """Watch signals until the context ends. If `source` is a pipe, only the second SIGINT raises KeyboardInterrupt.

    In a pipeline such as `arecord | nemo-lfr encode - -`, Ctrl-C sends SIGINT to both processes. The recorder then
    ends, and this command encodes the data that the recorder has written.

    Signals are not watched on Windows or outside the main thread.

    Args:
        source: stdin; None if the command does not read it.
    """
    if source is None or os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield InputSignals()
        return
    stopped, stop = os.pipe()  # `stopped` stays open for the thread that reads stdin
    numbers, into = os.pipe()
    os.set_blocking(into, False)
    # A handler of an embedding program stays, and so does SIG_IGN, which shells set for jobs in the background.
    finishes = _is_pipe(source) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    watcher = _Watcher(finishes, numbers, stop)
    thread = threading.Thread(target=watcher.run, name="nemo-lfr signals", daemon=True)
    before = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    if finishes:
        signal.signal(signal.SIGINT, watcher.handle)
    thread.start()
    try:
        yield InputSignals(stopped, into)
    finally:
        watcher.answered = True
        signal.set_wakeup_fd(before)
        os.close(into)  # ends the thread
        thread.join()
        os.close(numbers)
        if finishes:  # last, since the thread may have sent another signal
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_pipe(source: IO[bytes]) -> bool:
    with suppress(OSError):  # an object without a descriptor
        mode = os.fstat(source.fileno()).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    return False
