"""F0 by librosa's pYIN.

librosa compiles its kernels with numba, which writes machine code to a cache on disk without a lock. Two processes
that compile at the same time can leave parts in the cache that do not fit together. From then on, every call ends in a
segmentation fault. So the kernels are compiled under a lock, into a cache that only nemo_lfr writes to.
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


def estimate_pitch(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate F0 and voicing with pYIN (Mauch and Dixon, 2014).

    The first call on a machine compiles librosa's kernels, which takes 10 to 30 s.

    Args:
        audio: float32 [T] at 16 kHz.

    Returns:
        F0 in Hz, NaN in unvoiced frames, and the voicing decisions, bool; both [frames], with a hop of 20 ms.

    Raises:
        ModuleNotFoundError: librosa is not installed.
    """
    f0, voiced, _ = _pyin()(np.ascontiguousarray(audio, dtype=np.float32))
    return f0, voiced


@cache
def _pyin() -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return pYIN with all of its kernels compiled or read from the cache."""
    with _numba_cache():
        import librosa

        pyin = partial(
            librosa.pyin, fmin=RANGE_HZ[0], fmax=RANGE_HZ[1], sr=SAMPLE_RATE, frame_length=1024, hop_length=HOP_LENGTH
        )
        pyin(np.sin(np.arange(SAMPLE_RATE // 4, dtype=np.float32) * 0.05))
    return pyin


@contextmanager
def _numba_cache() -> Iterator[None]:
    """Hold the lock of the numba cache, and make numba use that cache for modules that are imported meanwhile.

    The folder is NUMBA_CACHE_DIR if it is set, else `nemo_lfr/numba` in the user's cache folder, or a temporary folder
    if that one cannot be written to or locked. Modules of librosa that were imported before keep the cache they have.
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
