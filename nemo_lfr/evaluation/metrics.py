"""Objective metrics that compare a reconstruction with the original recording.

Third-party packages (extra `evaluate`) compute PESQ, STOI and pitch. If a metric cannot be computed, its value is a
`NotMeasured` with the reason.
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nemo_lfr.errors import AudioError, NemoLfrError, install_command, shorten
from nemo_lfr.evaluation.plugins import add_entry
from nemo_lfr.io.audio import check_peak, check_rate, resample

# (n_fft, hop, window) in samples for the mel and STFT distances, and the number of mel bands for each; as in the
# training config of the codec.
RESOLUTIONS = tuple((size, size // 4, size) for size in (32, 64, 128, 256, 512, 1024, 2048))
MEL_DIMS = (5, 10, 20, 40, 80, 160, 320)
# Least significant bit of 24-bit audio. Audio with a lower peak counts as silent.
SILENCE = 2.0**-23
# Maximum duration for PESQ. P.862 is designed for 8 to 20 s, and its reference code uses tables of fixed size.
PESQ_SECONDS = 60


class NotMeasured(str):
    """Placeholder for a missing value. The text is the reason."""


class Undefined(NotMeasured):
    """Placeholder for a metric that is not defined for this pair of recordings.

    It is stored like a value, because the metric would not be defined in another run either.
    """


def missing(package: str) -> NotMeasured:
    """Return the placeholder for a metric whose package is not installed."""
    return NotMeasured(f"not measured: needs {package}: {install_command(package)}")


class Signal:
    """Mono audio, with cached features that several metrics use.

    Args:
        wave: samples, shape [T].
        rate: sample rate in Hz.

    Raises:
        AudioError: if `wave` is empty, or has a wrong shape or invalid values, or if `rate` is not between 100 and
            1,000,000 Hz.
    """

    def __init__(self, wave: np.ndarray, rate: int) -> None:
        check_rate(rate)
        if wave.ndim != 1 or not len(wave):
            raise AudioError(f"audio has shape {wave.shape}; pass mono audio [T] with one sample or more.")
        check_peak(float(np.abs(wave).max()), "the audio")
        self.wave, self.rate = wave.astype(np.float32), rate

    @property
    def silent(self) -> bool:
        """Return whether the peak of the audio is lower than `SILENCE`."""
        return float(np.abs(self.wave).max()) < SILENCE

    @cached_property
    def at_16k(self) -> np.ndarray:
        """Return the audio resampled to 16 kHz, shape [T]."""
        return resample(self.wave, self.rate, 16000)

    @cached_property
    def spectra(self) -> Any:
        """Return the audio as `Spectra` (audio [1, T] with cached STFTs)."""
        import torch

        from nemo_lfr.signal.spectra import Spectra

        return Spectra(torch.from_numpy(self.wave)[None])

    @cached_property
    def pitch(self) -> tuple[np.ndarray, np.ndarray]:
        """Return F0 in Hz and voicing decisions from `estimate_pitch`, both of shape [frames]."""
        from nemo_lfr.evaluation.pitch import estimate_pitch

        return estimate_pitch(self.at_16k)


Value = float | NotMeasured


def si_sdr(original: Signal, output: Signal) -> Value:
    """Compute the scale-invariant signal-to-distortion ratio in dB."""
    from nemo_lfr.signal.distances import si_sdr

    if output.silent:
        return Undefined("the output is silent")  # for silence, NeMo's formula would give 0 dB
    return _not_of_silence(original) or float(si_sdr(original.spectra.audio, output.spectra.audio))


def mel_distance(original: Signal, output: Signal) -> Value:
    """Compute the L1 log-mel distance (NeMo's MultiResolutionMelLoss) with `RESOLUTIONS`."""
    return _reconstruction(original, output, "mel_l1")


def stft_distance(original: Signal, output: Signal) -> Value:
    """Compute the log-magnitude STFT distance (NeMo's MultiResolutionSTFTLoss) with `RESOLUTIONS`."""
    return _reconstruction(original, output, "stft")


@lru_cache(maxsize=4)
def _reconstruction_loss(rate: int) -> Any:
    from nemo_lfr.signal.distances import ReconstructionLoss

    return ReconstructionLoss(rate, RESOLUTIONS, MEL_DIMS)


def _reconstruction(original: Signal, output: Signal, term: str) -> Value:
    import torch

    shortest = max(size for size, *_ in RESOLUTIONS) // 2 + 1
    if len(original.wave) < shortest:
        return Undefined(f"shorter than {shortest} samples")
    with torch.no_grad():
        return float(_reconstruction_loss(original.rate)(original.spectra, output.spectra, terms=[term])[term])


def pesq_wb(original: Signal, output: Signal) -> Value:
    """Compute wideband PESQ (ITU-T P.862.2) at 16 kHz. The result is on the MOS scale."""
    from pesq import PesqError, pesq

    if (silent := _not_of_silence(original)) is not None:
        return silent
    if len(original.wave) > PESQ_SECONDS * original.rate:
        return Undefined(f"longer than {PESQ_SECONDS} s")
    try:
        return float(pesq(16000, original.at_16k, output.at_16k, "wb"))
    except PesqError as error:
        text = error.args[0] if error.args else error
        return Undefined(text.decode() if isinstance(text, bytes) else str(text))
    except ValueError:  # raised by the C code of pesq if it detects no active speech
        return Undefined("no speech in the output")


def stoi(original: Signal, output: Signal) -> Value:
    """Compute the short-time objective intelligibility (STOI), at most 1."""
    return _intelligibility(original, output, extended=False)


def estoi(original: Signal, output: Signal) -> Value:
    """Compute the extended short-time objective intelligibility (ESTOI), at most 1."""
    return _intelligibility(original, output, extended=True)


def _intelligibility(original: Signal, output: Signal, extended: bool) -> Value:
    from pystoi import stoi

    if (silent := _not_of_silence(original)) is not None:
        return silent
    with warnings.catch_warnings():
        # pystoi warns and returns 1e-5 if there are fewer than 30 frames of speech.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi(original.wave, output.wave, original.rate, extended=extended))
        except (RuntimeWarning, ValueError):
            return Undefined("too little speech for one 384 ms segment")


def f0_error(original: Signal, output: Signal) -> Value:
    """Compute the RMS error of F0 in cents, over the frames that are voiced in both recordings."""
    (f0, voiced), (f0_output, voiced_output) = original.pitch, output.pitch
    both = voiced & voiced_output
    if not both.any():
        return Undefined("no frame is voiced in both recordings")
    return float(np.sqrt(np.mean((1200 * np.log2(f0_output[both] / f0[both])) ** 2)))


def voicing_error(original: Signal, output: Signal) -> Value:
    """Compute the percentage of frames that are voiced in only one of the two recordings."""
    return 100 * float(np.mean(original.pitch[1] != output.pitch[1]))


def lag(original: Signal, output: Signal) -> Value:
    """Compute the delay between the envelopes of the original and the output, in ms.

    The delay is the lag from -100 to 100 ms at which the cross-correlation of the two envelopes is largest. A positive
    delay means that the output is late.
    """
    from scipy.ndimage import uniform_filter1d
    from scipy.signal import correlate

    if original.silent or output.silent:
        return _not_of_silence(original) or Undefined("the output is silent")
    hop, reach = original.rate // 1000, 100
    first, second = (
        envelope - envelope.mean()
        for envelope in (np.sqrt(uniform_filter1d(s.wave**2, 8 * hop)[::hop].clip(0)) for s in (original, output))
    )
    correlation = correlate(second, first, mode="full")
    middle = len(first) - 1
    around = correlation[max(middle - reach, 0) : middle + reach + 1]
    return float(1000 * hop / original.rate * (int(around.argmax()) - min(reach, middle)))


def _not_of_silence(original: Signal) -> Undefined | None:
    return Undefined("the original is silent") if original.silent else None


@dataclass(frozen=True)
class Metric:
    """Description of a metric.

    Attributes:
        unit: unit for table headers, or an empty string.
        better: "higher" if higher values are better, "lower" if lower values are better, None if neither is the case.
        definition: short definition, which is printed with the results.
        package: package that the metric needs, or an empty string.
        function: function that computes the metric from the original and the output, which are `Signal`s with the
            same sample rate and length. None for a metric that a trained model computes.
        digits: number of decimal places in tables.
    """

    unit: str
    better: str | None
    definition: str
    package: str = ""
    function: Callable[[Signal, Signal], Value] | None = None
    digits: int = 3


_LOG = (
    "mean absolute difference of log(x + 1), over windows of 32 to 2,048 samples. The distance depends on the level: "
    "quieter recordings get smaller distances"
)
METRICS: dict[str, Metric] = {
    "PESQ-WB": Metric("MOS", "higher", "ITU-T P.862.2 at 16 kHz, at most 4.64 (package pesq).", "pesq", pesq_wb, 2),
    "ESTOI": Metric("", "higher", "Extended STOI, Jensen and Taal 2016, at most 1 (package pystoi).", "pystoi", estoi),
    "STOI": Metric("", "higher", "Taal et al. 2011, at most 1 (package pystoi).", "pystoi", stoi),
    "SI-SDR": Metric(
        "dB",
        "higher",
        "Scale-invariant SDR of zero-mean signals (Le Roux et al. 2019), computed as in NeMo's SISDRLoss. A shift by "
        "one sample lowers the value, a gain does not. Identical signals reach about 100 dB.",
        "",
        si_sdr,
        2,
    ),
    "mel distance": Metric(
        "", "lower", f"NeMo's MultiResolutionMelLoss: mel magnitudes, {_LOG}.", "librosa", mel_distance, 4
    ),
    "STFT distance": Metric(
        "", "lower", f"NeMo's MultiResolutionSTFTLoss: magnitudes, {_LOG}.", "librosa", stft_distance, 4
    ),
    "F0 error": Metric(
        "cents",
        "lower",
        "RMS difference of F0 over frames that are voiced in both recordings (pYIN, 61 to 495 Hz, every 20 ms).",
        "librosa",
        f0_error,
        1,
    ),
    "voicing error": Metric(
        "%",
        "lower",
        "Percentage of frames that are voiced in only one of the two recordings (pYIN, 61 to 495 Hz, every 20 ms).",
        "librosa",
        voicing_error,
        1,
    ),
    "lag": Metric(
        "ms",
        None,
        "Delay of the output's envelope relative to the original's, after the codec's delay was compensated.",
        "scipy",
        lag,
        1,
    ),
}


def register_metric(name: str, metric: Metric) -> None:
    """Add a metric to `METRICS`, so that evaluations compute it and reports show it.

    Args:
        name: name of the metric in reports.
        metric: description of the metric. Define the `function` in a module that worker processes can import.

    Raises:
        NemoLfrError: if another metric has this name, or the metric has no function.
    """
    if metric.function is None:
        raise NemoLfrError(f"metric {name!r} has no function; pass function= to Metric.")
    add_entry(METRICS, name, metric, "metric")


# Metrics for the demo and for validation during training. Computing them takes seconds instead of minutes.
QUICK = ("ESTOI", "PESQ-WB", "SI-SDR")


def measure(
    original: Signal, output: Signal, names: Collection[str] | None = None, table: Mapping[str, Metric] = METRICS
) -> dict[str, Value]:
    """Compute metrics for a pair of recordings.

    Args:
        original: original recording.
        output: reconstruction, with the rate and length of `original`.
        names: names of metrics in `table`; None for all metrics.
        table: descriptions of the metrics by name.

    Returns:
        The value of each metric, or a `NotMeasured` with the reason.

    Raises:
        AudioError: if the rates or lengths differ.
    """
    if original.rate != output.rate or len(original.wave) != len(output.wave):
        raise AudioError(
            f"the original has {len(original.wave)} samples at {original.rate} Hz, but the output has "
            f"{len(output.wave)} samples at {output.rate} Hz; pass signals with the same rate and length."
        )
    values: dict[str, Value] = {}
    for name in table if names is None else names:
        metric = table[name]
        assert metric.function is not None
        try:
            value = metric.function(original, output)
        except ImportError as error:
            value = missing(error.name or metric.package)
        except Exception as error:  # a metric of another package can raise anything
            value = NotMeasured(f"not measured: {type(error).__name__}: {shorten(error, 200)}")
        values[name] = checked(value)
    return values


def checked(value: Any) -> Value:
    """Convert a metric value to `float`.

    NaN and infinity become `Undefined`. A value that `float` does not accept becomes `NotMeasured`, and a
    `NotMeasured` is unchanged.
    """
    if isinstance(value, NotMeasured):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return NotMeasured(f"not measured: the metric returned {shorten(repr(value), 60)}, not a number")
    return number if math.isfinite(number) else Undefined("NaN or infinite")
