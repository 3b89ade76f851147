"""Validate what a server sends, because the program at an address may not be `nemo-lfr serve`.

The tables of this module list every key that the clients read, and its valid values. Other keys are ignored.
"""

import io
import json
import reprlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from nemo_lfr.errors import shorten
from nemo_lfr.io.containers.wav_header import read_wav_header

StreamKind = Literal["encode", "decode"]

_WAV_TAGS = (1, 3, 0xFFFE)  # format tags of a WAV file with samples that are not compressed


@dataclass(frozen=True)
class Kind:
    """Kind of JSON value.

    Attributes:
        text: description for error messages.
        accepts: function that returns whether a value is of this kind.
    """

    text: str
    accepts: Callable[[Any], bool]


def _integer(low: int, bits: int) -> Callable[[Any], bool]:
    # `type` rather than `isinstance`, because a bool is also an instance of int
    return lambda value: type(value) is int and low <= value < 1 << bits


POSITIVE = Kind("an integer from 1 to 2**31 - 1", _integer(1, 31))
COUNT = Kind("a non-negative integer", _integer(0, 63))
LIMIT = Kind("a positive integer", _integer(1, 63))
NUMBER = Kind("a positive number", lambda value: type(value) in (int, float) and 0 < value < 1 << 63)
TEXT = Kind("text", lambda value: isinstance(value, str))
NAME = Kind("printable text", lambda value: isinstance(value, str) and value.isprintable())
LIST = Kind("a list", lambda value: isinstance(value, list))

# JSON objects in answers to HTTP requests
INFO = {
    "version": NAME,
    "model": NAME,
    "fingerprint": NAME,
    "sample_rate": POSITIVE,
    "samples_per_frame": POSITIVE,
    "frame_rate": NUMBER,
    "num_codebooks": POSITIVE,
    "codebook_size": POSITIVE,
    "bit_rate": NUMBER,
    "max_streams": LIMIT,
    "max_message_bytes": LIMIT,
    "max_body_bytes": LIMIT,
}
ENCODED = {"tokens": LIST, "num_samples": COUNT, "sample_rate": POSITIVE, "samples_per_frame": POSITIVE}

# Text messages of a stream, by their type. A message without a type contains tokens.
READY = {
    "sample_rate": POSITIVE,
    "samples_per_frame": POSITIVE,
    "num_codebooks": POSITIVE,
    "codebook_size": POSITIVE,
    "lookahead_frames": COUNT,
}
_ERROR = {"code": COUNT, "error": TEXT}
MESSAGES: dict[StreamKind, dict[str, dict[str, Kind]]] = {
    "encode": {"ready": READY, "error": _ERROR, "tokens": {"tokens": LIST}, "done": {"num_frames": COUNT}},
    "decode": {"ready": READY, "error": _ERROR, "done": {"num_samples": COUNT}},
}


def parse_object(text: bytes | str) -> dict[str, Any] | None:
    """Parse a JSON object; return None if the text is anything else, or if the object has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key is repeated")
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def problem_of(values: Mapping[str, Any], schema: Mapping[str, Kind]) -> str | None:
    """Describe the first missing or invalid value of a JSON object; return None if all values are valid.

    Args:
        values: the JSON object.
        schema: kind of value for each key. Other keys of the object are ignored.
    """
    for name, kind in schema.items():
        if name not in values:
            return f"{name} is missing"
        if not kind.accepts(values[name]):
            return f"{name} is {show(values[name])}, not {kind.text}"
    return None


def message_type(values: Mapping[str, Any]) -> str:
    """Return the type of a text message, or "" if the type is not valid.

    A message without the key "type" has the type "tokens". The value of this key must be another string.
    """
    if "type" not in values:
        return "tokens"
    name = values["type"]
    return name if isinstance(name, str) and name != "tokens" else ""


def show(value: object) -> str:
    """Return a short form of a JSON value for an error message. The value may be large or deeply nested."""
    return shorten(reprlib.repr(value))


def parse_tokens(frames: list[Any], num_codebooks: int, codebook_size: int) -> np.ndarray | None:
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
    if any(type(token) is not int for frame in frames for token in frame):  # numpy converts a bool among integers
        return None
    return tokens.T.astype(np.int32)


def audio_problem(content: bytes, audio_format: str, sample_rate: int, num_samples: int) -> str | None:
    """Describe what is wrong with an audio file from the server; return None if the file is valid.

    Args:
        content: content of the file.
        audio_format: "wav", "flac" or "opus".
        sample_rate: expected sample rate of a WAV or FLAC file, Hz; not checked for Opus.
        num_samples: expected length of a WAV or FLAC file, in samples; not checked for Opus.
    """
    name = {"wav": "WAV", "flac": "FLAC", "opus": "Ogg Opus"}[audio_format]
    read = {"wav": _wav_figures, "flac": _flac_figures, "opus": _opus_figures}[audio_format]
    figures = read(content)
    if figures is None:
        return f"data that is not a complete {name} file"
    if figures.channels != 1:
        return f"a {name} file with {figures.channels} channels, not 1"
    if audio_format != "opus" and (figures.sample_rate, figures.num_samples) != (sample_rate, num_samples):
        return f"{figures.num_samples} samples at {figures.sample_rate} Hz, not {num_samples} at {sample_rate} Hz"
    return None


class _Figures(NamedTuple):
    """Description of an audio file. For Opus, the sample rate and the number of samples are unknown, and set to 0."""

    channels: int
    sample_rate: int
    num_samples: int


def _wav_figures(content: bytes) -> _Figures | None:
    """Return the description of a WAV file; None if the file is invalid or truncated."""
    header, start = read_wav_header(io.BytesIO(content).read)
    if header is None or header.magic != b"RIFF" or len(header.format) < 16:
        return None
    tag, channels, rate, width, bits = struct.unpack_from("<HHI4xHH", header.format)
    is_plain = tag in _WAV_TAGS and width > 0 and 8 * width == channels * bits
    is_whole = len(start) + header.data_size <= len(content)
    return _Figures(channels, rate, header.data_size // width) if is_plain and is_whole else None


def _flac_figures(content: bytes) -> _Figures | None:
    """Return the description of a FLAC file, according to its header; None if the header is invalid."""
    if content[:4] != b"fLaC" or len(content) < 42:
        return None
    bits = int.from_bytes(content[18:26], "big")  # bits: 20 sample rate, 3 channels, 5 sample size, 36 length
    return _Figures((bits >> 41 & 7) + 1, bits >> 44, bits & ((1 << 36) - 1))


def _opus_figures(content: bytes) -> _Figures | None:
    """Return the description of an Ogg Opus file; None if the file is not complete."""
    position, is_last = 0, False
    while content[position : position + 4] == b"OggS" and position + 27 <= len(content):
        is_last = bool(content[position + 5] & 4)
        count = content[position + 26]
        position += 27 + count + sum(content[position + 27 : position + 27 + count])
    is_whole = is_last and position == len(content) and content[28:36] == b"OpusHead" and position >= 38
    return _Figures(content[37], 0, 0) if is_whole else None
