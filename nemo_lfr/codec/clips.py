"""Convert audio from all supported forms to one zero-padded batch of mono clips at the codec's sample rate.

| form | channels | sample rate |
| --- | --- | --- |
| array [T_audio], [B, T_audio] or [B, 1, T_audio] | mono | `sample_rate` |
| list or column of clips in the other forms | depends on the clip | declared by the clip, else `sample_rate` |
| path | mixed to mono | declared by the file |
| `datasets` item: {"array", "sampling_rate"} or {"path", "bytes"} | mixed to mono | from the item or the file |
| `AudioDecoder` of `datasets` or TorchCodec, or `AudioSamples` | mixed to mono | from the object |

The clips of a list or column may have different lengths.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Number
from typing import Any, NamedTuple

import numpy as np

from nemo_lfr.codec.arguments import check_audio, check_lengths, check_not_empty, float_audio, resample_clips
from nemo_lfr.codec.arrays import Arrays, Kind, to_numpy
from nemo_lfr.codec.tables import as_list, from_arrow
from nemo_lfr.errors import AudioError, shorten
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.pcm import check_channels, samples_to_float

logger = logging.getLogger(__name__)

MAX_FIRST = 8  # an array with at most this many rows is [channels, T_audio], even if it has fewer columns than rows


class _Recording(NamedTuple):
    """Clip from a source that can declare its sample rate, such as a file or a `datasets` item.

    Attributes:
        audio: samples, [1, T_audio].
        rate: sample rate in Hz; None if the source does not state it.
    """

    audio: Any
    rate: Any


def to_batch(
    arrays: Arrays[Any], audio: object, audio_len: object, sample_rate: int | None, target_rate: int
) -> tuple[Any, list[int]]:
    """Convert audio in any of the supported forms to one batch.

    An array with two rows is a batch of two clips. Without `audio_len`, a warning is logged for such an array, because
    it may be a stereo recording. Another warning is logged if the sample rate is unknown.

    Args:
        arrays: array library of the result.
        audio: see the module's docstring.
        audio_len: samples in each clip before resampling, [B]; default: the full length.
        sample_rate: sample rate of clips that do not declare one, Hz; None for the target rate.
        target_rate: sample rate of the result, Hz.

    Returns:
        Audio [B, T_audio] as float32, and the number of samples in each clip.

    Raises:
        AudioError: if `audio` cannot be read or converted, or `sample_rate` differs from the rate that the source
            declares.
    """
    audio, sample_rate = as_list(audio), plain_number(sample_rate)
    check_not_empty(audio, "audio", "clip", AudioError)
    _check_not_pair(audio)
    if not is_list_of_clips(audio):
        return _clip(arrays, audio, audio_len, sample_rate, target_rate)
    assert isinstance(audio, Sequence)
    limits: Sequence[Any] = [None] * len(audio)
    if audio_len is not None:
        limits = [[length] for length in check_lengths(arrays, audio_len, len(audio), None, "audio_len", AudioError)]
    clips, lengths = [], []
    for index, (clip, limit) in enumerate(zip(audio, limits, strict=True)):
        if is_list_of_clips(clip):  # a clip may also be a nested list [[...]], which stands for [1, T_audio]
            clip = clip[0] if len(clip) == 1 else np.zeros((len(clip), 0), np.float32)
        wave, counts = _clip(arrays, clip, limit, sample_rate, target_rate, index)
        clips.append(wave[0])
        lengths += counts
    batch = arrays.zeros((len(clips), max(lengths)), np.float32)
    for row, (clip, length) in enumerate(zip(clips, lengths, strict=True)):
        batch[row, :length] = clip[:length]
    return batch, lengths


def plain_number(value: Any) -> Any:
    """Convert a 0-d array, tensor or Arrow scalar to a Python number; return any other value unchanged."""
    value = from_arrow(value)
    is_scalar = getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None))
    return value.item() if is_scalar else value


def _check_not_pair(audio: object) -> None:
    """Raise AudioError for a pair of samples and their sample rate, as torchaudio and librosa return it."""
    if not isinstance(audio, list | tuple) or len(audio) != 2:
        return
    for samples, rate in (audio, audio[::-1]):
        if isinstance(rate, Number) and getattr(samples, "ndim", None):
            raise AudioError(
                f"audio is a pair of samples and the number {shorten(rate)}; pass the samples as audio, and their "
                "rate as sample_rate."
            )


def is_list_of_clips(audio: object) -> bool:
    """Return whether `audio` is a list of clips rather than a list of samples."""
    if not isinstance(audio, list | tuple) or not audio:
        return False
    if isinstance(audio[0], str):  # also numpy's strings, which have ndim 0
        return True
    return not isinstance(audio[0], Number) and getattr(audio[0], "ndim", None) != 0


def _clip(
    arrays: Arrays[Any],
    audio: object,
    audio_len: object,
    sample_rate: int | None,
    target_rate: int,
    index: int | None = None,
) -> tuple[Any, list[int]]:
    """Convert one array, file or `datasets` item to clips at the target rate.

    `index` is the position of `audio` in the caller's list of clips, or None if there is no list. In a list, `audio`
    must be a single clip. See `to_batch` for the other arguments.

    Returns:
        Clips as float32, shape [B, T_audio], and the length of each clip in samples.
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
            f"audio is assumed to be at the codec's rate, {target_rate} Hz; pass its rate as sample_rate if this is "
            f"wrong, or sample_rate={target_rate} to confirm."
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
    """Read a path, a `datasets` item, a decoder or `AudioSamples`.

    Return None for any other object, such as an array or a list.
    """
    if isinstance(audio, str | os.PathLike):
        return _read(audio, None, audio_len, sample_rate, target_rate, name)
    if isinstance(audio, Mapping):
        if audio.get("array") is not None:
            rate = plain_number(audio.get("sampling_rate"))
            _check_rates(rate, sample_rate, name)
            return _Recording(_mono(arrays, audio["array"], name), rate)
        path, data = audio.get("path"), audio.get("bytes")
        if path is not None or isinstance(data, bytes):
            return _read(path or name, data, audio_len, sample_rate, target_rate, name)
        keys = shorten([str(key) for key in audio])
        raise AudioError(
            f"{name} is a {type(audio).__name__} with the keys {keys}; it needs 'array' and 'sampling_rate', or a "
            "'path' or 'bytes' that is not None."
        )
    if callable(getattr(audio, "get_all_samples", None)):
        try:
            audio = audio.get_all_samples()
        except Exception as error:  # decoders of other packages may raise anything
            raise AudioError(
                f"{name} cannot be decoded ({shorten(error, 200)}); check that the file is intact, or pass its "
                "samples as an array."
            ) from error
    if hasattr(audio, "sample_rate") and hasattr(audio, "data"):
        _check_rates(audio.sample_rate, sample_rate, name)
        return _Recording(_mono(arrays, audio.data, name), audio.sample_rate)
    return None


def _check_rates(declared: object, passed: object, name: str) -> None:
    """Raise AudioError if a declared sample rate differs from the argument `sample_rate`, or if either is a string."""
    for rate in (declared, passed):
        if isinstance(rate, str):
            raise AudioError(f"{name} has the sample rate {shorten(repr(rate))}, a string; pass a number, in Hz.")
    if declared is not None and passed is not None and declared != passed:
        raise AudioError(
            f"{name} declares a sample rate of {shorten(declared)} Hz, but sample_rate is {shorten(repr(passed))}; "
            "omit sample_rate."
        )


def _read(
    path: str | os.PathLike[str],
    data: bytes | None,
    audio_len: object,
    sample_rate: object,
    target_rate: int,
    name: str,
) -> _Recording:
    """Read and resample an audio file, or the bytes of an audio file, as `Codec.encode_file` does."""
    if audio_len is not None:
        raise AudioError(f"{name} is a file, which has its own length; omit audio_len.")
    with AudioReader(expand_home(path, AudioError), target_rate, data) as reader:
        _check_rates(reader.native_rate, sample_rate, reader.name)
        wave = np.concatenate([np.zeros(0, np.float32), *reader.blocks()])
    return _Recording(wave[None], target_rate)


def _mono(arrays: Arrays[Any], audio: object, name: str) -> Any:
    """Mix samples [T_audio], [channels, T_audio] or [T_audio, channels] to [1, T_audio].

    Integer samples are scaled to [-1, 1]; see `samples_to_float`.
    """
    samples = arrays.convert(audio, name, AudioError)
    if arrays.kind(samples) is Kind.INTEGER:
        samples = samples_to_float(to_numpy(samples), name)
    samples = float_audio(arrays, samples, name)
    if samples.ndim == 2 and len(samples) > 1:
        check_channels(tuple(samples.shape), name)
        last = len(samples) > max(samples.shape[1], MAX_FIRST)
        samples = samples.mean(1) if last else samples.mean(0)
    return samples[None] if samples.ndim == 1 else samples
