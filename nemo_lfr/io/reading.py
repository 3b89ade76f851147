"""Samples of a clip: of a file or a part of it, of bytes in a table, of numbers that a table holds decoded."""

import math
from pathlib import Path

import numpy as np

from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader, check_peak, check_rate, resample

# A manifest's duration is rounded; a file that differs by more is not the one it describes.
DURATION_SLACK = 0.1  # seconds, and a fiftieth
# Durations of a manifest's cuts are rounded to this; one that ends so near to its file's end is the file.
ROUNDED = 0.01  # seconds


def read_file(
    path: Path, offset: float | None, duration: float | None, sample_rate: int, longest: float = math.inf
) -> np.ndarray:
    """Read a file, or the part of it that a manifest names.

    Without an offset it is the file's end that counts where the two differ by no more than rounding would have it.

    Raises:
        AudioError: if it cannot be read, holds less than the manifest says, or lasts more than `longest` seconds.
    """
    with AudioReader(path, sample_rate) as reader:
        return _read(reader, offset, duration, longest, str(path))


def read_bytes(data: bytes, name: str, sample_rate: int, longest: float = math.inf) -> np.ndarray:
    """Read an audio file that lies in a table; raises as `read_file` does."""
    with AudioReader(name, sample_rate, data) as reader:
        return _read(reader, None, None, longest, name)


def read_part(
    source: Path | bytes, name: str, offset: float, duration: float, sample_rate: int, longest: float = math.inf
) -> np.ndarray:
    """Read a part of a file, or of its bytes, to the sample of its own rate; raises as `read_file` does."""
    with AudioReader(
        source if isinstance(source, Path) else name, sample_rate, None if isinstance(source, Path) else source
    ) as reader:
        if offset or duration < reader.duration - ROUNDED:
            # Seconds with eight digits are not whole samples: name the middle of the sample that is meant.
            rate = reader.native_rate
            offset, duration = (round(offset * rate) + 0.25) / rate, (round(duration * rate) - 0.25) / rate
        return _read(reader, offset, duration, longest, name)


def read_samples(
    samples: np.ndarray, rate: object, name: str, sample_rate: int, longest: float = math.inf
) -> np.ndarray:
    """Convert decoded samples of a table, [T] or [C, T] or [T, C], to mono float32 at `sample_rate`.

    Integers are divided by the full scale of their type; int64, which is what a list of Python's integers becomes, is
    taken for the smallest type that holds it.

    Raises:
        AudioError: if they are no audio, have no rate, or last more than `longest` seconds.
    """
    if rate is None:
        raise AudioError(f"{name}: holds decoded samples without a sampling rate.")
    try:
        check_rate(rate)
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from None
    assert isinstance(rate, int | float | np.number)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.number) or np.iscomplexobj(samples):
        raise AudioError(f"{name}: holds an array of shape {samples.shape}, {samples.dtype}; expected samples [T].")
    wave = _to_float(samples)
    if wave.ndim == 2:
        wave = wave.mean(axis=int(np.argmin(wave.shape)))
    _check_length(len(wave) / float(rate), longest, name)
    check_peak(float(np.abs(wave).max(initial=0.0)), f"{name}:")
    wave = wave.astype(np.float32)
    return resample(wave, int(rate), sample_rate) if int(rate) != sample_rate and len(wave) else wave


def _to_float(samples: np.ndarray) -> np.ndarray:
    if np.issubdtype(samples.dtype, np.floating):
        return samples
    wave = samples.astype(np.float64)
    if samples.dtype == np.uint8:
        return (wave - 128) / 128
    bits = {1: 8, 2: 16, 4: 32}.get(samples.dtype.itemsize)
    if samples.dtype.itemsize >= 4:
        bits = 16 if np.abs(wave).max(initial=0.0) <= 2**15 else 32
    assert bits is not None
    return wave / 2 ** (bits - 1)


def _read(reader: AudioReader, offset: float | None, duration: float | None, longest: float, name: str) -> np.ndarray:
    slack = max(DURATION_SLACK, 0.02 * (duration or 0.0))
    rounded, offset = slack if offset is None else ROUNDED, offset or 0.0
    if duration is not None and offset + duration > reader.duration + slack:
        raise AudioError(
            f"{name}: holds {reader.duration:.2f} s, but its manifest says {offset + duration:.2f} s are there."
        )
    _check_length(reader.duration - offset if duration is None else duration, longest, name)
    if offset or (duration is not None and duration < reader.duration - rounded):
        return reader.segment(offset, reader.duration - offset if duration is None else duration)
    return np.concatenate([np.zeros(0, np.float32), *reader.blocks()])


def _check_length(duration: float, longest: float, name: str) -> None:
    if duration > longest:
        raise AudioError(f"{name}: lasts {duration:.1f} s, more than the {longest:g} s that are allowed.")
