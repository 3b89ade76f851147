"""Validate the responses of a server, because the address may belong to a program other than `nemo-lfr serve`."""

import io
import json
import struct
from typing import Any

import numpy as np

from nemo_lfr.io.containers.wav_header import read_wav_header


def parse_object(text: bytes | str) -> dict[str, Any] | None:
    """Parse a JSON object; return None if the text is anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def has_type(value: object, kind: type) -> bool:
    """Return whether a JSON value has the expected type. A number must also be positive and below 2**63.

    Args:
        value: the JSON value.
        kind: expected type: str, int or float.
    """
    if kind is str:
        return isinstance(value, str)
    is_number = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    return is_number and 0 < value < 2**63  # type: ignore[operator]


def parse_tokens(frames: object, num_codebooks: int, codebook_size: int) -> np.ndarray | None:
    """Convert a list of frames to tokens [C, T_encoded]; return None if the list is invalid.

    Args:
        frames: list of frames, each with one token per codebook.
        num_codebooks: number of tokens per frame.
        codebook_size: number of entries in a codebook; 0 <= token < codebook_size.
    """
    if frames == []:
        return np.zeros((num_codebooks, 0), np.int32)
    try:
        tokens = np.array(frames)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    if tokens.ndim != 2 or tokens.shape[1] != num_codebooks or tokens.dtype.kind not in "iu":
        return None
    if not 0 <= tokens.min() <= tokens.max() < codebook_size:
        return None
    return tokens.T.astype(np.int32)


def audio_problem(content: bytes, audio_format: str, sample_rate: int, num_samples: int) -> str | None:
    """Return why a response is not the requested audio file; None if the response is this file.

    Args:
        content: content of the file.
        audio_format: "wav", "flac" or "opus".
        sample_rate: expected sample rate of a WAV or FLAC file, Hz; not checked for Opus.
        num_samples: expected length of a WAV or FLAC file, in samples; not checked for Opus.
    """
    if audio_format == "opus":
        return _ogg_problem(content)
    name = audio_format.upper()
    figures = _wav_figures(content) if audio_format == "wav" else _flac_figures(content)
    if figures is None:
        return f"not a complete {name} file"
    if figures != (sample_rate, num_samples):
        return f"{figures[1]} samples at {figures[0]} Hz, not {num_samples} at {sample_rate} Hz"
    return None


def _wav_figures(content: bytes) -> tuple[int, int] | None:
    """Return the sample rate and the number of samples of a WAV file; None if it is invalid or truncated."""
    header, start = read_wav_header(io.BytesIO(content).read)
    if header is None or header.magic != b"RIFF" or len(header.format) < 16:
        return None
    rate, width = struct.unpack_from("<I4xH", header.format, 4)
    is_whole = len(start) + header.data_size <= len(content)
    return (rate, header.data_size // width) if is_whole and width else None


def _flac_figures(content: bytes) -> tuple[int, int] | None:
    """Return the sample rate and the number of samples in the header of a FLAC file; None if it is invalid."""
    if content[:4] != b"fLaC" or len(content) < 42:
        return None
    bits = int.from_bytes(content[18:26], "big")  # bits: 20 sample rate, 3 channels, 5 sample size, 36 length
    return bits >> 44, bits & ((1 << 36) - 1)


def _ogg_problem(content: bytes) -> str | None:
    """Return why a file is not a complete Ogg Opus file; None if the file is complete.

    The last page of a complete file has the end-of-stream flag.
    """
    position, is_last = 0, False
    while content[position : position + 4] == b"OggS" and position + 27 <= len(content):
        is_last = bool(content[position + 5] & 4)
        count = content[position + 26]
        position += 27 + count + sum(content[position + 27 : position + 27 + count])
    is_whole = is_last and position == len(content) and content[28:36] == b"OpusHead"
    return None if is_whole else "not a complete Ogg Opus file"
