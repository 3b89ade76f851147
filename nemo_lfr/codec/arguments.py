"""Validate the arguments of `Codec`, and the tokens and audio that its encoder and decoder return."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemo_lfr.arguments import check_whole_number
from nemo_lfr.codec.arrays import Arrays, Kind, to_numpy
from nemo_lfr.errors import AudioError, NemoLfrError, TokensError
from nemo_lfr.frames import num_frames
from nemo_lfr.io.audio import check_peak, check_rate, resample
from nemo_lfr.spec import CodecSpec


def float_audio(arrays: Arrays[Any], audio: object, name: str = "audio") -> Any:
    """Convert an array of samples to float32; int16 samples are scaled to [-1, 1].

    Args:
        arrays: array library of the result.
        audio: samples, in any shape.
        name: name of `audio` in messages.

    Raises:
        AudioError: if the samples are neither floating point nor int16; the message contains `name`.
    """
    clips = arrays.convert(audio, name, AudioError)
    kind = arrays.kind(clips)
    if kind not in (Kind.FLOAT, Kind.INT16):
        raise AudioError(f"{name} has dtype {clips.dtype}; pass floating-point samples in [-1, 1], or int16 samples.")
    clips = arrays.cast(clips, np.float32)
    return clips / 32768 if kind is Kind.INT16 else clips


def check_audio(
    arrays: Arrays[Any], audio: object, audio_len: object = None, name: str = "audio", first: int = 0
) -> tuple[Any, list[int]]:
    """Check an array of clips and convert it to float32.

    Args:
        arrays: array library of the result.
        audio: floating point in [-1, 1], or int16; [T_audio], [B, T_audio] or [B, 1, T_audio].
        audio_len: samples in each clip, [B]; default: the full length.
        name: name of `audio` in messages.
        first: index of the first clip in messages; not 0 if `audio` is a part of a longer list of clips.

    Returns:
        Audio [B, T_audio] and the number of samples in each clip.

    Raises:
        AudioError: for an unsupported shape, type or length, or for samples that are NaN, infinite or far outside
            [-1, 1].
    """
    clips = float_audio(arrays, audio, name)
    if clips.ndim == 1:
        clips = clips[None]
    if clips.ndim == 3 and clips.shape[1] == 1:
        clips = clips[:, 0]
    if clips.ndim != 2 or not clips.shape[0]:
        raise AudioError(f"{name} has shape {list(clips.shape)}; expected [T_audio] or [B, T_audio], mono.")
    if clips.shape[0] > 1000 and clips.shape[1] <= 8:
        raise AudioError(
            f"{name} has shape {list(clips.shape)}, which looks like {clips.shape[1]} channels; pass one channel "
            "[T_audio], or several clips [B, T_audio]."
        )
    lengths = check_lengths(arrays, audio_len, clips.shape[0], clips.shape[1], "audio_len", AudioError, first)
    for row, peak in enumerate(arrays.peaks(clips, lengths), first):
        check_peak(peak, f"clip {row}")
    return clips, lengths


def check_chunk(arrays: Arrays[Any], samples: object) -> np.ndarray:
    """Check consecutive samples [n] of one recording, n >= 0, and convert them to float32.

    Raises:
        AudioError: if the shape is not [n], the type is not supported, or samples are NaN, infinite or far outside
            [-1, 1].
    """
    chunk = arrays.convert(samples, "audio", AudioError)
    if chunk.ndim != 1:
        raise AudioError(f"samples have shape {list(chunk.shape)}; pass chunks of one recording, each of shape [n].")
    if not len(chunk):
        return np.zeros(0, np.float32)
    clip = float_audio(arrays, chunk)[None]
    check_peak(arrays.peaks(clip, [len(chunk)])[0], "the chunk")
    return to_numpy(clip[0])


def check_token_chunk(arrays: Arrays[Any], spec: CodecSpec, tokens: object) -> Any:
    """Check consecutive tokens [C, k] of one recording, k >= 0, and convert them to int64.

    Raises:
        TokensError: if the shape is not [C, k], the tokens are not integers, or a token is outside the codebook.
    """
    ids = arrays.convert(tokens, "tokens", TokensError)
    if ids.ndim != 2 or ids.shape[0] != spec.num_codebooks:
        raise TokensError(
            f"tokens have shape {list(ids.shape)}; pass chunks of one recording, each of shape "
            f"[{spec.num_codebooks}, k]."
        )
    return check_tokens(arrays, spec, ids, name="the chunk")[0][0]


def resample_clips(
    arrays: Arrays[Any], audio: Any, lengths: list[int], source_rate: int | None, target_rate: int
) -> tuple[Any, list[int]]:
    """Resample a batch of clips.

    Args:
        arrays: array library of the result.
        audio: float32 [B, T_audio].
        lengths: samples in each clip.
        source_rate: sample rate of `audio`, Hz; None if it equals `target_rate`.
        target_rate: sample rate of the result, Hz.

    Returns:
        Audio [B, T_audio] as float32, and the number of samples in each clip.

    Raises:
        AudioError: for an invalid sample rate.
    """
    if source_rate is None:
        return audio, lengths
    check_rate(source_rate)
    if source_rate == target_rate:
        return audio, lengths
    clips = [
        resample(row[:length], source_rate, target_rate) for row, length in zip(to_numpy(audio), lengths, strict=True)
    ]
    padded = np.zeros((len(clips), max(map(len, clips))), np.float32)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    return arrays.cast(arrays.convert(padded, "audio", AudioError), np.float32), [len(clip) for clip in clips]


def check_num_codebooks(spec: CodecSpec, num_codebooks: object) -> int:
    """Return `num_codebooks`, or the codec's number of codebooks if the argument is None.

    Raises:
        TokensError: if `num_codebooks` is not an integer from 1 to the number of codebooks in `spec`.
    """
    if num_codebooks is None:
        return spec.num_codebooks
    return check_whole_number(num_codebooks, "num_codebooks", 1, spec.num_codebooks, TokensError)


def check_tokens(
    arrays: Arrays[Any],
    spec: CodecSpec,
    tokens: object,
    tokens_len: object = None,
    num_codebooks: int | None = None,
    name: str = "utterance {}",
) -> tuple[Any, list[int]]:
    """Check tokens and convert them to int64.

    Args:
        arrays: array library of the result.
        spec: description of the codec.
        tokens: integers, [C, T] or [B, C, T].
        tokens_len: frames in each utterance, [B]; default: the full length.
        num_codebooks: number of codebooks to use, starting with the first; default: all. `tokens` may leave out the
            other codebooks. In the result, all tokens of the other codebooks are `spec.zero_token`.
        name: name of an utterance in messages; "{}" stands for its index.

    Returns:
        Tokens [B, C, T] with all codebooks, and the number of frames in each utterance.

    Raises:
        TokensError: for an unsupported shape or type, a token outside the codebook, or an invalid `tokens_len` or
            `num_codebooks`.
    """
    check_not_empty(tokens, "tokens", "utterance", TokensError)
    ids = arrays.convert(tokens, "tokens", TokensError)
    if not arrays.kind(ids).is_integer:
        raise TokensError(f"tokens have dtype {ids.dtype}; pass integers.")
    if ids.ndim == 2:
        ids = ids[None]
    kept = check_num_codebooks(spec, num_codebooks)
    if ids.ndim != 3 or ids.shape[1] not in (spec.num_codebooks, kept) or not ids.shape[0]:
        raise TokensError(f"tokens have shape {list(ids.shape)}; expected [B, {kept}, T] or [{kept}, T].")
    totals = check_lengths(arrays, tokens_len, ids.shape[0], ids.shape[2], "tokens_len", TokensError)
    is_unsigned = str(ids.dtype).endswith("uint64")
    ids = arrays.cast(ids, np.int64)
    if kept < spec.num_codebooks:
        first = ids[:, :kept]
        ids = arrays.zeros((ids.shape[0], spec.num_codebooks, ids.shape[2]), np.int64) + spec.zero_token
        ids[:, :kept] = first
    if _within(ids, spec.codebook_size):
        return ids, totals  # the usual case: rows are not checked one by one, because each check synchronizes a GPU
    for row, total in enumerate(totals):
        valid = ids[row, :, :total]
        low, high = (int(valid.min()), int(valid.max())) if total else (0, 0)
        if low < 0 or high >= spec.codebook_size:
            bad = low if low < 0 else high
            bad += 2**64 if bad < 0 and is_unsigned else 0
            raise TokensError(
                f"{name.format(row)} contains the token {bad}, which is outside [0, {spec.codebook_size}); pass "
                "tokens of this codec."
            )
    return ids, totals


def check_not_empty(value: object, name: str, item: str, error: type[NemoLfrError]) -> None:
    """Raise an error for an empty list, which could mean an empty batch or one clip without samples.

    Args:
        value: argument of `encode` or `decode`.
        name: name of the argument.
        item: what the list should contain: "clip" or "utterance".
        error: type of the error to raise.

    Raises:
        NemoLfrError: of the type `error`, if the value is an empty list or tuple.
    """
    if isinstance(value, list | tuple) and not value:
        raise error(f"{name} is an empty {type(value).__name__}; pass one {item} or more.")


def check_lengths(
    arrays: Arrays[Any],
    lengths: object,
    batch: int,
    limit: int | None,
    name: str,
    error: type[NemoLfrError],
    first: int = 0,
) -> list[int]:
    """Check the lengths of a batch and return them as Python integers.

    Args:
        arrays: array library that converts `lengths`.
        lengths: integers of shape [batch]; None if every example has the length `limit`.
        batch: number of examples.
        limit: maximum length; None for any length.
        name: name of `lengths` in messages.
        error: type of the error to raise.
        first: index of the first example in messages; not 0 if the batch is a part of a longer list.

    Raises:
        NemoLfrError: of the type `error`, if the shape, the type or a value is invalid.
    """
    if lengths is None:
        assert limit is not None
        return [limit] * batch
    if isinstance(lengths, list | tuple) and len(lengths) == batch and all(type(value) is int for value in lengths):
        return _checked_lengths(lengths, limit, name, error, first)  # no array: a value may exceed int64
    values = arrays.convert(lengths, name, error)
    if not arrays.kind(values).is_integer or tuple(values.shape) != (batch,):
        raise error(
            f"{name} has dtype {values.dtype} and shape {list(values.shape)}; expected integers of shape [{batch}]."
        )
    return _checked_lengths([int(value) for value in values.tolist()], limit, name, error, first)


def _checked_lengths(
    values: Sequence[int], limit: int | None, name: str, error: type[NemoLfrError], first: int
) -> list[int]:
    checked = list(values)
    for row, value in enumerate(checked, first):
        if value < 0 or (limit is not None and value > limit):
            wanted = "a value of at least 0" if limit is None else f"a value between 0 and {limit}"
            raise error(f"{name}[{row}] is {value}; pass {wanted}.")
    return checked


def check_kept_samples(samples: Sequence[int], totals: Sequence[int], samples_per_frame: int) -> None:
    """Check that the number of samples to keep from each utterance fits the utterance's number of frames.

    Args:
        samples: samples to keep from each utterance.
        totals: frames in each utterance.
        samples_per_frame: samples in one frame.

    Raises:
        TokensError: if an utterance has more or fewer frames than its number of samples needs.
    """
    for row, (count, total) in enumerate(zip(samples, totals, strict=True)):
        if num_frames(count, samples_per_frame) != total:
            whole = total * samples_per_frame
            low = max(0, whole - samples_per_frame + 1)
            raise TokensError(
                f"audio_len[{row}] is {count} samples, but utterance {row} has {total} frames, which stand for {low} "
                f"to {whole} samples; pass the length of the original recording at the codec's sample rate."
            )


def check_encoded(tokens: Any, spec: CodecSpec, name: str) -> None:
    """Raise NemoLfrError if a token [B, C, T] is outside the codebook.

    Such tokens mark frames for which the encoder returned NaN or infinite values.
    """
    if not math.prod(tokens.shape) or _within(tokens, spec.codebook_size):
        return
    row = next(row for row, clip in enumerate(tokens) if not _within(clip, spec.codebook_size))
    raise _not_finite(name, spec, "encoder", f"clip {row}")


def check_latents(encoded: Any, spec: CodecSpec, name: str) -> None:
    """Raise NemoLfrError if encoded vectors [B, D, T] contain NaN or infinite values."""
    if not math.prod(encoded.shape) or _is_finite(encoded):
        return
    row = next(row for row, clip in enumerate(encoded) if not _is_finite(clip))
    raise _not_finite(name, spec, "encoder", f"clip {row}")


def _is_finite(values: Any) -> bool:
    return math.isfinite(float(values.max())) and math.isfinite(float(values.min()))


def check_decoded(audio: Any, spec: CodecSpec, name: str) -> None:
    """Raise NemoLfrError if decoded audio [B, T_audio] contains NaN.

    Such samples mark where the decoder returned NaN or infinite values.
    """
    if not math.prod(audio.shape) or not math.isnan(float(audio.max())):
        return
    row = next(row for row, clip in enumerate(audio) if math.isnan(float(clip.max())))
    raise _not_finite(name, spec, "decoder", f"utterance {row}")


def _within(tokens: Any, codebook_size: int) -> bool:
    """Return whether there is at least one token, and all tokens are in [0, codebook_size)."""
    return math.prod(tokens.shape) > 0 and int(tokens.min()) >= 0 and int(tokens.max()) < codebook_size


def _not_finite(name: str, spec: CodecSpec, network: str, what: str) -> NemoLfrError:
    is_half = spec.precision == "fp16"
    advice = 'use precision="fp32" or "bf16"' if is_half else "load the checkpoint again, or use another checkpoint"
    return NemoLfrError(
        f"{name}: the {network} gives NaN or infinite values for {what}. The weights of the {network} are damaged, "
        f"or too large for {spec.precision}; {advice}."
    )
