"""Read a clip of a corpus from an audio file, a section of a file, encoded bytes, or an array of samples."""

import logging
import math
import os
from pathlib import Path

import numpy as np

from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader, check_peak, check_rate, resample
from nemo_lfr.io.pcm import check_channels, samples_to_float
from nemo_lfr.io.resampling import count_samples

logger = logging.getLogger(__name__)

# Durations in manifests are rounded. A difference up to this value, or 2% of the duration if that is more, is ignored.
DURATION_SLACK = 0.1  # seconds


def read_file(
    path: Path, offset: float | None, duration: float | None, sample_rate: int, longest: float = math.inf
) -> np.ndarray:
    """Read an audio file, or the section of a file that a manifest describes.

    If `offset` is None, and `duration` differs from the duration of the file only by rounding, the whole file is read.

    Args:
        path: the file.
        offset: start in seconds; None for the beginning.
        duration: seconds to read; None for the rest of the file.
        sample_rate: sample rate of the result in Hz.
        longest: maximum duration of the clip in seconds.

    Returns:
        Mono float32 samples [T].

    Raises:
        AudioError: if the file cannot be read, is shorter than the manifest says, or if the clip lasts more than
            `longest` seconds.
    """
    check_listed(path)
    with AudioReader(path, sample_rate) as reader:
        return _read(reader, offset, duration, longest, str(path))


def check_listed(path: Path) -> None:
    """Check that an audio file from a manifest or table exists.

    Raises:
        AudioError: if there is no such file. The message suggests `--audio-dir`, the option for the folder that
            paths start from.
    """
    try:
        os.lstat(path)
    except FileNotFoundError as error:
        raise AudioError(
            f"{path}: no such file; if the paths in the manifest start from another folder, pass it as --audio-dir "
            "(audio_dir)."
        ) from error
    except (OSError, ValueError):
        pass  # the reader reports other problems


def read_bytes(
    data: bytes,
    name: str,
    sample_rate: int,
    longest: float = math.inf,
    *,
    offset: float | None = None,
    duration: float | None = None,
) -> np.ndarray:
    """Read an encoded audio file in memory, or a section of it; see `read_file`.

    Args:
        data: content of the audio file.
        name: name of the clip for messages.
        sample_rate: sample rate of the result in Hz.
        longest: maximum duration of the clip in seconds.
        offset: start in seconds; None for the beginning.
        duration: seconds to read; None for the rest of the file.

    Returns:
        Mono float32 samples [T].

    Raises:
        AudioError: if the bytes cannot be read as audio, if the audio is shorter than the section, or if the clip
            lasts more than `longest` seconds.
    """
    with AudioReader(name, sample_rate, data) as reader:
        return _read(reader, offset, duration, longest, name)


def read_part(
    source: Path | bytes, name: str, offset: float, duration: float, sample_rate: int, tolerance: float
) -> np.ndarray:
    """Read a section of an audio file for a cut, from a path or from bytes in memory.

    As in Lhotse, the missing samples are filled by reflection if the audio ends at most `tolerance` seconds too early.

    Args:
        source: path of the audio file, or its content.
        name: name of the clip for messages.
        offset: start of the section in seconds.
        duration: duration of the section in seconds.
        sample_rate: sample rate of the result in Hz.
        tolerance: maximum number of seconds that may be missing at the end of the section.

    Returns:
        Mono float32 samples [T].

    Raises:
        AudioError: if the audio cannot be read, ends more than `tolerance` seconds before the section does, or
            contains no sample of the section.
    """
    path, data = (source, None) if isinstance(source, Path) else (name, source)
    with AudioReader(path, sample_rate, data) as reader:
        missing = count_missing(reader, offset, duration, name, tolerance)
        rate, count = reader.native_rate, count_samples(duration, reader.native_rate)
        if missing <= 0:
            is_whole = missing == 0 and count_samples(offset, rate) == 0
            pieces = [np.zeros(0, np.float32), *reader.blocks()] if is_whole else [reader.segment(offset, duration)]
            return np.concatenate(pieces)
    with AudioReader(path, None, data) as reader:  # Lhotse adds the samples before it resamples
        samples = reader.segment(offset, duration)
        samples = np.pad(samples, (0, max(0, count - len(samples))), mode="reflect")
    return resample(samples, rate, sample_rate) if rate != sample_rate else samples


def count_missing(reader: AudioReader, offset: float, duration: float, name: str, tolerance: float) -> int:
    """Return how many samples are missing at the end of a cut, at the rate of the file.

    A warning is logged if more samples are missing than a rounded duration can explain.

    Args:
        reader: reader of the file.
        offset: start of the cut in seconds.
        duration: duration of the cut in seconds.
        name: name of the clip for messages.
        tolerance: maximum number of seconds that may be missing.

    Returns:
        The number of missing samples; negative if the cut ends before the file does.

    Raises:
        AudioError: if more than `tolerance` seconds are missing, or if all samples of the cut are missing.
    """
    rate = reader.native_rate
    first, count, total = (count_samples(seconds, rate) for seconds in (offset, duration, reader.duration))
    missing = first + count - total
    if missing > tolerance * rate or (count and first >= total):
        raise AudioError(
            f"{name}: the audio lasts {total / rate:.2f} s, but the cut requires {offset + duration:.2f} s."
        )
    if missing > DURATION_SLACK * rate:
        text = "%s: the audio ends %.2f s before the cut does; the end is filled by reflection, as in Lhotse."
        logger.warning(text, name, missing / rate)
    return missing


def read_samples(
    samples: np.ndarray, rate: object, name: str, sample_rate: int, longest: float = math.inf
) -> np.ndarray:
    """Convert decoded samples, for instance from a column of a table, to mono float32 samples.

    See `samples_to_float` for the full scale of integers.

    Args:
        samples: samples [T], [C, T] or [T, C]. Of two axes, the shorter one contains the channels, at most 32.
        rate: sample rate of `samples` in Hz.
        name: name of the clip for messages.
        sample_rate: sample rate of the result in Hz.
        longest: maximum duration of the clip in seconds.

    Returns:
        Mono float32 samples [T].

    Raises:
        AudioError: if `samples` are not audio, `rate` is invalid, or the clip lasts more than `longest` seconds.
    """
    if rate is None:
        raise AudioError(f"{name}: the decoded samples have no sampling rate; add `sampling_rate` to the table.")
    try:
        check_rate(rate)
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from None
    assert isinstance(rate, int | float | np.number)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.number) or np.iscomplexobj(samples):
        raise AudioError(
            f"{name}: the audio is an array of {samples.dtype} with shape {samples.shape}; expected numbers with "
            "shape [T] or [C, T]."
        )
    wave: np.ndarray = samples_to_float(samples, name)
    if wave.ndim == 2:
        check_channels(wave.shape, f"{name}: the array of samples")
        if wave.shape[0] == wave.shape[1] > 1:
            raise AudioError(
                f"{name}: the array of samples has the shape {wave.shape}, so it is unclear which axis "
                "contains the channels; store more samples than channels."
            )
        wave = wave.mean(axis=int(np.argmin(wave.shape))) if wave.size else np.zeros(0, np.float32)
    _check_length(len(wave) / float(rate), longest, name)
    check_peak(float(np.abs(wave).max(initial=0.0)), f"{name}: the audio")
    wave = wave.astype(np.float32)
    return resample(wave, float(rate), sample_rate) if rate != sample_rate and len(wave) else wave


def rounding(duration: float) -> float:
    """Return the tolerance in seconds for a listed duration, which may be rounded."""
    return max(DURATION_SLACK, 0.02 * duration)


def _read(reader: AudioReader, offset: float | None, duration: float | None, longest: float, name: str) -> np.ndarray:
    rounded, offset = rounding(duration or 0.0) if offset is None else 0.0, offset or 0.0
    if duration is not None:
        check_end(reader, offset, duration, name)
    _check_length(reader.duration - offset if duration is None else duration, longest, name)
    if offset or (duration is not None and duration < reader.duration - rounded):
        return reader.segment(offset, reader.duration - offset if duration is None else duration)
    return np.concatenate([np.zeros(0, np.float32), *reader.blocks()])


def check_end(reader: AudioReader, offset: float, duration: float, name: str) -> None:
    """Check that an open file contains the whole clip that a manifest lists.

    Args:
        reader: reader of the file.
        offset: start of the clip in seconds.
        duration: length of the clip in seconds.
        name: name of the clip for messages.

    Raises:
        AudioError: if the clip ends after the end of the file, by more than the rounding error of `duration`.
    """
    if offset + duration > reader.duration + rounding(duration):
        raise AudioError(
            f"{name}: the audio lasts {reader.duration:.2f} s, but its manifest requires {offset + duration:.2f} s."
        )


def _check_length(duration: float, longest: float, name: str) -> None:
    if duration > longest:
        raise AudioError(f"{name}: the clip lasts {duration:.1f} s, more than the limit of {longest:g} s.")
