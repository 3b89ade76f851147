"""Figures for one pair of recordings: the original and what a codec made of it.

The metrics are other packages' (extra `demo`); one whose package is missing gives a `NotMeasured` that says so.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


class NotMeasured(str):
    """Stands in a table where a figure would, and says why there is none."""


MISSING = NotMeasured('not measured: pip install "nemo-lfr[demo]"')


def si_sdr(reference: np.ndarray, output: np.ndarray, rate: int) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., arXiv 1811.02508), of zero-mean signals."""
    reference, output = reference - reference.mean(), output - output.mean()
    target = reference * (output @ reference) / max(float(reference @ reference), 1e-12)
    noise = target - output
    return 10 * float(np.log10(max(float(target @ target), 1e-12) / max(float(noise @ noise), 1e-12)))


def estoi(reference: np.ndarray, output: np.ndarray, rate: int) -> float | NotMeasured:
    """Extended short-time objective intelligibility (Jensen and Taal 2016): 1 is best."""
    try:
        from pystoi import stoi
    except ImportError:
        return MISSING
    return float(stoi(reference, output, rate, extended=True))


def pesq_wb(reference: np.ndarray, output: np.ndarray, rate: int) -> float | NotMeasured:
    """Wide-band PESQ (ITU-T P.862.2) at 16 kHz: up to 4.64."""
    try:
        from pesq import PesqError, pesq
    except ImportError:
        return MISSING
    from nemo_lfr.audio import resample

    try:
        return float(pesq(16000, resample(reference, rate, 16000), resample(output, rate, 16000), "wb"))
    except PesqError as error:
        return NotMeasured(f"not defined for this pair ({error})")


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], Any]] = {
    "ESTOI": estoi,
    "PESQ-WB": pesq_wb,
    "SI-SDR (dB)": si_sdr,
}


def measure(reference: np.ndarray, output: np.ndarray, rate: int) -> dict[str, float | NotMeasured]:
    """Every metric of two recordings [T] of equal length at `rate` Hz."""
    return {name: metric(reference, output, rate) for name, metric in METRICS.items()}
