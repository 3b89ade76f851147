"""Resample audio, convert seconds to samples, and check sample rates and peaks."""

import math

import numpy as np

from nemo_lfr.errors import AudioError, quoted

MIN_RATE, MAX_RATE = 100, 1_000_000  # Hz
# Floating-point recordings may exceed 1 slightly. 16-bit integers that were not divided by 32768 exceed it by far.
MAX_PEAK = 64.0


def resample(wave: np.ndarray, from_rate: float, to_rate: int) -> np.ndarray:
    """Resample audio exactly as `librosa.load` does, with soxr and its quality setting HQ.

    Args:
        wave: float32 samples [T].
        from_rate: sample rate of `wave` in Hz; need not be a whole number.
        to_rate: sample rate of the result in Hz.

    Returns:
        Samples [n], where n is `num_resampled(T, from_rate, to_rate)`.

    Raises:
        AudioError: if `from_rate` is not a valid sample rate.
    """
    check_rate(from_rate)
    resampler = Resampler(from_rate, to_rate)
    return resampler.push(wave, last=True)


class Resampler:
    """Resample one recording block by block. The result does not depend on the block sizes.

    Args:
        from_rate: sample rate of the input in Hz.
        to_rate: sample rate of the output in Hz.
    """

    def __init__(self, from_rate: float, to_rate: int) -> None:
        import soxr

        self._stream = soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32", quality="HQ")
        self._rates = from_rate, to_rate
        self._num_input = self._num_output = 0

    def push(self, wave: np.ndarray, last: bool = False) -> np.ndarray:
        """Resample the next block of samples.

        Args:
            wave: samples [n].
            last: whether this is the last block.

        Returns:
            The next output samples [k]: those that do not depend on later input, or all remaining ones if `last` is
            set.
        """
        self._num_input += len(wave)
        resampled: np.ndarray = self._stream.resample_chunk(wave.astype(np.float32, copy=False), last=last)
        if last:
            # librosa rounds the length up; soxr rounds it to the nearest.
            missing = num_resampled(self._num_input, *self._rates) - self._num_output - len(resampled)
            resampled = np.pad(resampled, (0, missing)) if missing > 0 else resampled[: len(resampled) + missing]
        self._num_output += len(resampled)
        return resampled


def num_resampled(num_samples: int, from_rate: float, to_rate: int) -> int:
    """Return the length of a recording after resampling: num_samples * to_rate / from_rate, rounded up.

    Args:
        num_samples: length of the recording in samples at `from_rate`.
        from_rate: sample rate of the recording in Hz.
        to_rate: sample rate after resampling in Hz.
    """
    return math.ceil(num_samples * (float(to_rate) / from_rate))  # the floating-point operations of librosa


def count_samples(seconds: float, rate: float) -> int:
    """Convert a time in seconds to the nearest number of samples, as Lhotse does.

    Half a sample is rounded up.

    Args:
        seconds: time in seconds, at least 0.
        rate: sample rate in Hz.
    """
    return math.floor(round(seconds * rate, 8) + 0.5)


def check_rate(rate: object) -> None:
    """Check that a sample rate is a number from 100 to 1,000,000 Hz.

    Raises:
        AudioError: if the sample rate is not such a number.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"sample_rate is {quoted(rate)}; expected a number from {MIN_RATE} to {MAX_RATE} (Hz).")


def check_peak(peak: float, what: str) -> None:
    """Check that the peak of an audio signal is finite and at most 64.

    Args:
        peak: largest absolute value of the samples.
        what: subject of the error message, such as a file name.

    Raises:
        AudioError: if the peak is NaN, infinite or larger than 64.
    """
    if not math.isfinite(peak):
        raise AudioError(
            f"{what} contains NaN or infinite samples, or samples beyond the range of float32; remove them first."
        )
    if peak > MAX_PEAK:
        raise AudioError(
            f"{what} reaches {peak:.6g}, but audio lies in [-1, 1]; if the samples are 16-bit integers, divide by "
            "32768."
        )
