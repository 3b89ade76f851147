"""Read a clip of a corpus from an audio file, a section of one, encoded bytes, or an array of samples."""

import math
from pathlib import Path

import numpy as np

from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader, check_peak, check_rate, resample

# Durations in manifests are rounded. A file that differs by more than this and 2% is not the one described.
DURATION_SLACK = 0.1  # seconds
# Rounding of a cut's duration in manifests. A cut that ends this close to the end of its file is the whole file.
ROUNDED = 0.01  # seconds


def read_file(
    path: Path, offset: float | None, duration: float | None, sample_rate: int, longest: float = math.inf
) -> np.ndarray:
    """Read an audio file, or the section of it that a manifest describes.

    Without an offset, a duration that differs from the file's by no more than rounding means the whole file.

    Args:
        path: the file.
        offset: start in seconds; None for the beginning.
        duration: seconds to read; None for the rest of the file.
        sample_rate: Hz of the result.
        longest: limit for the clip's duration, in seconds.

    Returns:
        Mono float32 samples [T].

    Raises:
        AudioError: if the file cannot be read, is shorter than the manifest says, or if the clip lasts more than
            `longest` seconds.
    """
    with AudioReader(path, sample_rate) as reader:
        return _read(reader, offset, duration, longest, str(path))


def read_bytes(data: bytes, name: str, sample_rate: int, longest: float = math.inf) -> np.ndarray:
    """Read an encoded audio file from memory, such as a table's cell; see `read_file`."""
    with AudioReader(name, sample_rate, data) as reader:
        return _read(reader, None, None, longest, name)


def read_part(
    source: Path | bytes, name: str, offset: float, duration: float, sample_rate: int, longest: float = math.inf
) -> np.ndarray:
    """Read a section of an audio file or of its bytes, such as that of a cut; see `read_file`."""
    with AudioReader(
        source if isinstance(source, Path) else name, sample_rate, None if isinstance(source, Path) else source
    ) as reader:
        return _read(reader, offset, duration, longest, name)


def read_samples(
    samples: np.ndarray, rate: object, name: str, sample_rate: int, longest: float = math.inf
) -> np.ndarray:
    """Convert decoded samples, such as a table's column, to mono float32 at `sample_rate`.

    Integers are divided by the full scale of their type. For int32 and int64, which lists of Python integers become,
    this is the full scale of 16 bits if all values fit into 16 bits, else of 32 bits.

    Args:
        samples: shape [T], [C, T] or [T, C]; the shorter axis is that of the channels.
        rate: sample rate of `samples` in Hz.
        name: name of the clip for messages.
        sample_rate: Hz of the result.
        longest: limit for the clip's duration, in seconds.

    Returns:
        Mono float32 samples [T].

    Raises:
        AudioError: if `samples` are not audio, have no rate, or last more than `longest` seconds.
    """
    if rate is None:
        raise AudioError(f"{name}: contains decoded samples without a sampling rate.")
    try:
        check_rate(rate)
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from None
    assert isinstance(rate, int | float | np.number)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.number) or np.iscomplexobj(samples):
        raise AudioError(f"{name}: contains an array of shape {samples.shape}, {samples.dtype}; expected samples [T].")
    wave: np.ndarray = _to_float(samples)
    if wave.ndim == 2:
        wave = wave.mean(axis=int(np.argmin(wave.shape)))
    _check_length(len(wave) / float(rate), longest, name)
    check_peak(float(np.abs(wave).max(initial=0.0)), f"{name}:")
    wave = wave.astype(np.float32)
    return resample(wave, int(rate), sample_rate) if int(rate) != sample_rate and len(wave) else wave


def _to_float(samples: np.ndarray) -> np.ndarray:
    if np.issubdtype(samples.dtype, np.floating):
        return samples
    wave: np.ndarray = samples.astype(np.float64)
    if samples.dtype == np.uint8:
        return (wave - 128) / 128
    bits = {1: 8, 2: 16, 4: 32}.get(samples.dtype.itemsize)
    if samples.dtype.itemsize >= 4:
        bits = 16 if np.abs(wave).max(initial=0.0) <= 2**15 else 32
    assert bits is not None
    wave /= 2 ** (bits - 1)
    return wave


def _read(reader: AudioReader, offset: float | None, duration: float | None, longest: float, name: str) -> np.ndarray:
    slack = max(DURATION_SLACK, 0.02 * (duration or 0.0))
    rounded, offset = slack if offset is None else ROUNDED, offset or 0.0
    if duration is not None and offset + duration > reader.duration + slack:
        raise AudioError(
            f"{name}: contains {reader.duration:.2f} s of audio, but its manifest says {offset + duration:.2f} s."
        )
    _check_length(reader.duration - offset if duration is None else duration, longest, name)
    if offset or (duration is not None and duration < reader.duration - rounded):
        return reader.segment(offset, reader.duration - offset if duration is None else duration)
    return np.concatenate([np.zeros(0, np.float32), *reader.blocks()])


def _check_length(duration: float, longest: float, name: str) -> None:
    if duration > longest:
        raise AudioError(f"{name}: lasts {duration:.1f} s, more than the limit of {longest:g} s.")
