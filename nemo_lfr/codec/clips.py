"""Audio in the forms in which callers have it, converted to one padded batch of mono clips at the codec's rate.

| form | channels | rate |
| --- | --- | --- |
| array [T_audio], [B, T_audio] or [B, 1, T_audio] | mono | `sample_rate` |
| list of clips, of any lengths and forms | mono, or as the form of the clip | of each clip, else `sample_rate` |
| path | mixed | of the file |
| {"array", "sampling_rate"} or {"path", "bytes"} of `datasets` | mixed | of the dictionary or the file |
| `AudioDecoder` of `datasets` or TorchCodec, and `AudioSamples` | mixed | of the recording |
"""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Number
from typing import Any, NamedTuple

import numpy as np

from nemo_lfr.codec.arguments import check_audio, check_lengths, float_audio, resample_clips
from nemo_lfr.codec.arrays import Arrays
from nemo_lfr.errors import AudioError, shorten
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.locate import expand_home

logger = logging.getLogger(__name__)

MAX_CHANNELS = 8  # an array of so few columns has its channels there


class _Recording(NamedTuple):
    """One clip whose source declares its rate: samples [1, T_audio], and Hz; None if the rate is missing."""

    audio: Any
    rate: Any


def to_batch(
    arrays: Arrays[Any], audio: object, audio_len: object, sample_rate: int | None, target_rate: int
) -> tuple[Any, list[int]]:
    """Convert audio of any of the forms to one batch.

    A source that declares several channels is mixed to mono. An array of several rows is a batch of clips; for two
    rows without `audio_len`, which may be a stereo recording, a warning is logged once per process. So is one for a
    missing `sample_rate`, unless the source declares its rate.

    Args:
        arrays: library to convert with.
        audio: see the module's docstring.
        audio_len: samples of each clip before resampling, [B]; default: the full length.
        sample_rate: Hz of clips that do not declare their rate; None for the target rate.
        target_rate: Hz of the result.

    Returns:
        Audio [B, T_audio] as float32, and the samples of each clip.

    Raises:
        AudioError: for audio of another form, a rate that contradicts the source, or a file that cannot be read.
    """
    if not _is_list_of_clips(audio):
        return _clip(arrays, audio, audio_len, sample_rate, target_rate)
    assert isinstance(audio, Sequence)
    limits: Sequence[Any] = [None] * len(audio)
    if audio_len is not None:
        limits = [[length] for length in check_lengths(arrays, audio_len, len(audio), None, "audio_len", AudioError)]
    clips, lengths = [], []
    for index, (clip, limit) in enumerate(zip(audio, limits, strict=True)):
        if _is_list_of_clips(clip):  # one clip as [[...]]: lists nest as arrays have dimensions
            clip = clip[0] if len(clip) == 1 else np.zeros((len(clip), 0), np.float32)
        wave, counts = _clip(arrays, clip, limit, sample_rate, target_rate, index)
        clips.append(wave[0])
        lengths += counts
    batch = arrays.zeros((len(clips), max(lengths)), np.float32)
    for row, (clip, length) in enumerate(zip(clips, lengths, strict=True)):
        batch[row, :length] = clip[:length]
    return batch, lengths


def _is_list_of_clips(audio: object) -> bool:
    """Return whether audio is a list, and its items are not samples."""
    if not isinstance(audio, list | tuple) or not audio:
        return False
    return not isinstance(audio[0], Number) and getattr(audio[0], "ndim", None) != 0


def _clip(
    arrays: Arrays[Any],
    audio: object,
    audio_len: object,
    sample_rate: int | None,
    target_rate: int,
    index: int | None = None,
) -> tuple[Any, list[int]]:
    """Convert an array or one recording.

    Args:
        arrays: library to convert with.
        audio: the array or recording.
        audio_len: as in `to_batch`.
        sample_rate: as in `to_batch`.
        target_rate: as in `to_batch`.
        index: index in the list of clips, where there must be one row; None outside of lists.
    """
    name = "audio" if index is None else f"audio[{index}]"
    recording = _recording(arrays, audio, audio_len, sample_rate, target_rate, name)
    rate = sample_rate
    if recording is not None:
        audio = recording.audio
        rate = sample_rate if recording.rate is None else recording.rate
    waves, lengths = check_audio(arrays, audio, audio_len, name, index or 0)
    if index is not None and len(waves) != 1:
        raise AudioError(f"{name} has {len(waves)} rows; pass each clip of a list as mono, [T_audio].")
    if rate is None:
        _warn_once(
            f"audio is assumed to be at the codec's rate, {target_rate} Hz; pass sample_rate if it has another one, "
            f"or sample_rate={target_rate} to confirm."
        )
    if len(waves) == 2 and audio_len is None:
        _warn_once(
            "an array of 2 rows is encoded as 2 clips; for a stereo recording, pass audio.mean(0). To confirm that "
            "the rows are clips, pass their lengths as audio_len."
        )
    return resample_clips(arrays, waves, lengths, rate, target_rate)


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _recording(
    arrays: Arrays[Any], audio: Any, audio_len: object, sample_rate: object, target_rate: int, name: str
) -> _Recording | None:
    """Read a source that declares its rate and channels; None for arrays."""
    if isinstance(audio, str | os.PathLike):
        return _read(audio, None, audio_len, sample_rate, target_rate, name)
    if isinstance(audio, Mapping):
        if audio.get("array") is not None:
            rate = audio.get("sampling_rate")
            _check_rates(rate, sample_rate, name)
            return _Recording(_mono(arrays, audio["array"], name), rate)
        path, data = audio.get("path"), audio.get("bytes")
        if path is not None or isinstance(data, bytes):
            return _read(path or name, data, audio_len, sample_rate, target_rate, name)
        keys = shorten([str(key) for key in audio])
        raise AudioError(f"{name} is {type(audio).__name__} with keys {keys}; pass 'array' and 'sampling_rate'.")
    if callable(getattr(audio, "get_all_samples", None)):
        try:
            audio = audio.get_all_samples()
        except Exception as error:  # of a decoder of another package
            raise AudioError(f"{name} cannot be decoded: {shorten(error, 200)}") from error
    if hasattr(audio, "sample_rate") and hasattr(audio, "data"):
        _check_rates(audio.sample_rate, sample_rate, name)
        return _Recording(_mono(arrays, audio.data, name), audio.sample_rate)
    return None


def _check_rates(declared: object, passed: object, name: str) -> None:
    """Raise AudioError if the rate of a source and the argument `sample_rate` differ."""
    if declared is not None and passed is not None and declared != passed:
        raise AudioError(
            f"{name} is at {shorten(declared)} Hz by its source, but sample_rate is {shorten(repr(passed))}; omit "
            "sample_rate."
        )


def _read(
    path: str | os.PathLike[str],
    data: bytes | None,
    audio_len: object,
    sample_rate: object,
    target_rate: int,
    name: str,
) -> _Recording:
    """Read a file, or its bytes, as `Codec.encode_file` does."""
    if audio_len is not None:
        raise AudioError(f"{name} is a file, which has its own length; omit audio_len.")
    with AudioReader(expand_home(path, AudioError), target_rate, data) as reader:
        _check_rates(reader.native_rate, sample_rate, reader.name)
        wave = np.concatenate([np.zeros(0, np.float32), *reader.blocks()])
    return _Recording(wave[None], target_rate)


def _mono(arrays: Arrays[Any], audio: object, name: str) -> Any:
    """Mix samples [T_audio], [channels, T_audio] or [T_audio, channels] to [1, T_audio]."""
    samples = float_audio(arrays, audio, name)
    if samples.ndim == 2 and len(samples) > 1:
        last = samples.shape[1] <= MAX_CHANNELS < len(samples)
        samples = samples.mean(1) if last else samples.mean(0)
    return samples[None] if samples.ndim == 1 else samples
