"""Estimate F0 with pYIN from librosa.

numba writes compiled kernels to a cache on disk without a lock. If two processes compile at the same time, every later
call may end in a segmentation fault. This module therefore compiles the kernels under a lock, into a cache of its own.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
from filelock import FileLock

SAMPLE_RATE = 16000
HOP_LENGTH = 320
RANGE_HZ = (60.0, 500.0)
END_FACTOR = 1.01  # estimates closer than this to an end of the range are not trusted, see `estimate_pitch`


def estimate_pitch(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate F0 and voicing with pYIN (Mauch and Dixon, 2014), from 60 to 500 Hz.

    Frames within 1 % of 60 or 500 Hz count as unvoiced, because librosa's pYIN reports rumble and hum in pauses as
    voiced frames with an F0 of 60 Hz.

    The first call on a machine compiles librosa's kernels, which takes 10 to 30 s.

    Args:
        audio: float32 [T] at 16 kHz.

    Returns:
        F0 in Hz (NaN in unvoiced frames), and the voicing decisions (bool). Both have shape [frames], with a
        hop of 20 ms.

    Raises:
        ModuleNotFoundError: if librosa is not installed.
    """
    f0, voiced, _ = _pyin()(np.ascontiguousarray(audio, dtype=np.float32))
    # Comparisons with NaN, the F0 of an unvoiced frame, are false.
    voiced = voiced & (f0 > RANGE_HZ[0] * END_FACTOR) & (f0 < RANGE_HZ[1] / END_FACTOR)
    return np.where(voiced, f0, np.nan), voiced


@cache
def _pyin() -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Compile the kernels of pYIN or load them from the cache, and return the pYIN function."""
    with _numba_cache():
        import librosa

        pyin = partial(
            librosa.pyin, fmin=RANGE_HZ[0], fmax=RANGE_HZ[1], sr=SAMPLE_RATE, frame_length=1024, hop_length=HOP_LENGTH
        )
        pyin(np.sin(np.arange(SAMPLE_RATE // 4, dtype=np.float32) * 0.05))
    return pyin


@contextmanager
def _numba_cache() -> Iterator[None]:
    """Lock a cache folder, and make numba use it for modules that are imported inside the context.

    The folder is NUMBA_CACHE_DIR if this variable is set, otherwise `nemo_lfr/numba` in the user's cache folder. If
    the folder cannot be written to or locked, a temporary folder is used instead. Modules of librosa that were
    imported earlier keep using their previous cache.
    """
    import numba

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or home / "nemo_lfr" / "numba")
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "nemo_lfr.lock"))
        except (OSError, NotImplementedError):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nemo-lfr-numba-")))
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
        try:
            yield
        finally:
            numba.config.CACHE_DIR = before
