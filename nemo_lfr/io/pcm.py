"""Convert integer samples to floating point. The scale depends on the type alone, never on the samples of a clip."""

import numpy as np

from nemo_lfr.errors import AudioError

# Full scale of each type of samples. There is no 64-bit audio: int64 samples are 16-bit samples that were converted by
# Python, JSON or pandas. Audio formats have no unsigned types other than uint8.
FULL_SCALE = {"int8": 2**7, "uint8": 2**7, "int16": 2**15, "int32": 2**31, "int64": 2**15}
# The peak of 24-bit samples that were stored as int32 without a shift is at most this.
LARGEST_24_BIT = 2**23

MAX_CHANNELS = 32


def check_channels(shape: tuple[int, ...], name: str) -> None:
    """Raise AudioError if neither axis of an array can contain channels, as in a spectrogram."""
    if min(shape) > MAX_CHANNELS:
        raise AudioError(
            f"{name} has the shape {tuple(shape)}, so it is unclear which axis contains the channels; expected [T], "
            f"or [C, T] or [T, C] with at most {MAX_CHANNELS} channels and more samples than channels."
        )


def samples_to_float(samples: np.ndarray, name: str) -> np.ndarray:
    """Convert decoded samples to floating point, with full scale at 1.

    | type | full scale |
    | --- | --- |
    | floating point | 1; unchanged |
    | int8 | 128 |
    | uint8 | 128; silence is 128, as in WAV files |
    | int16 | 32,768 |
    | int32 | 2,147,483,648, as libsndfile and torchaudio read it |
    | int64 | 32,768, since lists of Python integers become int64 |

    Args:
        samples: samples of any shape.
        name: name of the samples for messages.

    Raises:
        AudioError: if the samples have another type, or if int64 samples exceed 16 bits. Also if int32 samples are
            not silent but fit into 24 bits, since they may then be 16-bit or 24-bit audio with a smaller full scale.
    """
    kind = samples.dtype.name
    if np.issubdtype(samples.dtype, np.floating):
        return samples
    if kind not in FULL_SCALE:
        raise AudioError(
            f"{name}: the samples have the type {kind}, which has no defined full scale; store floats in [-1, 1], or "
            "int16."
        )
    wave: np.ndarray = samples.astype(np.float64)
    peak = float(np.abs(wave).max(initial=0.0))
    if kind == "int64" and peak > FULL_SCALE[kind]:
        raise AudioError(
            f"{name}: int64 samples are read as 16-bit audio, but reach {peak:.0f}; store floats in [-1, 1], or int32 "
            "with a full scale of 2^31."
        )
    if kind == "int32" and 0 < peak <= LARGEST_24_BIT:
        raise AudioError(
            f"{name}: int32 samples are read with a full scale of 2^31, but reach only {peak:.0f}, as 16-bit or "
            "24-bit audio does; store 16-bit audio as int16, and other audio as floats in [-1, 1]."
        )
    return (wave - 128 if kind == "uint8" else wave) / FULL_SCALE[kind]
