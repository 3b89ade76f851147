"""Resample audio, and check sample rates and sample values."""

import math

import numpy as np

from nemo_lfr.errors import AudioError

MIN_RATE, MAX_RATE = 100, 1_000_000  # Hz
# Floating-point recordings overshoot 1 slightly; 16-bit integers that were not divided by 32768 go far beyond it.
MAX_PEAK = 64.0


def resample(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample float32 samples [T] as `librosa.load` does: soxr's high quality, ceil(T * to_rate / from_rate) samples.

    Raises:
        AudioError: if a rate is not a number of Hz that audio has.
    """
    check_rate(from_rate)
    resampler = Resampler(from_rate, to_rate)
    return resampler.push(wave, last=True)


class Resampler:
    """Resampler of one recording, block by block; the result does not depend on the blocks.

    Args:
        from_rate: Hz of what is pushed.
        to_rate: Hz of what comes out.
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        import soxr

        self._stream = soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32", quality="HQ")
        self._ratio = float(to_rate) / from_rate
        self._taken = self._given = 0

    def push(self, wave: np.ndarray, last: bool = False) -> np.ndarray:
        """Take samples [n]; return those [k] that are ready, and with `last` all that are left."""
        self._taken += len(wave)
        resampled = self._stream.resample_chunk(wave.astype(np.float32, copy=False), last=last)
        if last:
            # librosa's length, and its arithmetic; soxr rounds to the nearest.
            missing = math.ceil(self._taken * self._ratio) - self._given - len(resampled)
            resampled = np.pad(resampled, (0, missing)) if missing > 0 else resampled[: len(resampled) + missing]
        self._given += len(resampled)
        return resampled


def check_rate(rate: object) -> None:
    """Raise AudioError unless `rate` is a number of Hz that audio has."""
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"sample_rate {rate!r} is not a number of Hz between {MIN_RATE} and {MAX_RATE}.")


def check_peak(peak: float, what: str) -> None:
    """Raise AudioError for a peak of samples that no microphone gives, naming `what` they are."""
    if not math.isfinite(peak):
        raise AudioError(f"{what} holds NaN or infinite samples; clean it first.")
    if peak > MAX_PEAK:
        raise AudioError(
            f"{what} reaches {peak:.6g}, but audio lies in [-1, 1]; if these are 16-bit numbers, divide by 32768."
        )
