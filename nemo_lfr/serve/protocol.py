"""Messages of the WebSocket streams, version 1; docs/guides/serving.md is the specification.

A stream is one recording. Binary messages carry samples or tokens, little-endian; text messages are JSON objects with
a `type`. Parsing validates everything, so that a bad message ends its own stream only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from nemo_lfr.codec.codec import Codec
from nemo_lfr.errors import AudioError, NemoLfrError, shorten
from nemo_lfr.io.resampling import MAX_RATE, MIN_RATE, check_peak

MAX_RAMP = 8  # chunks
MAX_CHUNK = 64  # frames


class CloseCode(IntEnum):
    """WebSocket close codes of RFC 6455 that the server uses, and why."""

    DONE = 1000
    GONE = 1001  # never sent: the client closed the connection
    INVALID = 1007  # a message or a parameter that this stream cannot take
    POLICY = 1008  # wrong token or origin, idle for too long, or results that are not collected
    TOO_BIG = 1009  # a message, or a recording, above the limit
    FAULT = 1011
    RESTART = 1012  # the server is shutting down
    OVERLOADED = 1013  # try again later


class ProtocolError(NemoLfrError):
    """Message or parameter that ends a stream.

    Attributes:
        code: the close code.
    """

    def __init__(self, message: str, code: CloseCode = CloseCode.INVALID) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class End:
    """End of the input.

    Attributes:
        num_samples: length of the original recording, if the client knows it.
    """

    num_samples: int | None = None


def integer(query: Mapping[str, str], name: str, default: int | None, low: int, high: int) -> int | None:
    """Return an integer parameter of a URL.

    Raises:
        ProtocolError: it is not an integer from `low` to `high`.
    """
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise ProtocolError(f"{name}={shorten(text)} is not an integer from {low} to {high}.")
    return int(text)


def choice(query: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """Return a parameter of a URL that is one of `choices`; the first is the default.

    Raises:
        ProtocolError: it is another value.
    """
    text = query.get(name, choices[0])
    if text not in choices:
        raise ProtocolError(f"{name}={shorten(text)} is not one of {', '.join(choices)}.")
    return text


def ramp(query: Mapping[str, str]) -> tuple[int, ...]:
    """Return the frames of a decoder's first chunks from the parameter `ramp`, such as `1,2,4`.

    Raises:
        ProtocolError: it is not a list of at most `MAX_RAMP` integers from 1 to `MAX_CHUNK`.
    """
    text = query.get("ramp", "")
    names = text.split(",") if text else []
    if len(names) > MAX_RAMP:
        raise ProtocolError(f"ramp has {len(names)} chunks; the limit is {MAX_RAMP}.")
    sizes = [integer({"ramp": name.strip()}, "ramp", None, 1, MAX_CHUNK) for name in names]
    return tuple(size for size in sizes if size is not None)


def check_names(query: Mapping[str, str], names: set[str]) -> None:
    """Check that a URL has no unknown parameter.

    Raises:
        ProtocolError: it has one.
    """
    for name in query:
        if name not in names:
            raise ProtocolError(f"unknown parameter {shorten(name)}; known: {', '.join(sorted(names))}.")


def _parse_text(text: str) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("a text message is not JSON.") from None
    if not isinstance(message, dict):
        raise ProtocolError("a text message is not a JSON object.")
    return message


class DecodeProtocol:
    """Messages of `/v1/decode/stream`.

    Args:
        codec: determines codebooks and rates.
        query: parameters of the URL.

    Raises:
        ProtocolError: an invalid parameter.
    """

    kind = "decode"

    def __init__(self, codec: Codec[Any], query: Mapping[str, str]) -> None:
        check_names(query, {"audio", "lookahead", "ramp", "token"})
        self.codec = codec
        self.audio = choice(query, "audio", ("pcm_s16le", "pcm_f32le"))
        self.lookahead = integer(query, "lookahead", None, 0, 1000)
        self.ramp = ramp(query)

    def parse(self, message: bytes | str) -> np.ndarray | End:
        """Return the tokens [C, k] of a message, or the end.

        Raises:
            ProtocolError: the message is not valid.
        """
        count, size = self.codec.num_codebooks, self.codec.codebook_size
        if isinstance(message, bytes):
            if len(message) % (2 * count):
                raise ProtocolError(f"{len(message)} bytes are not frames of {count} tokens of int16.")
            tokens = np.frombuffer(message, "<i2").reshape(-1, count).T
        else:
            fields = _parse_text(message)
            if fields.get("type") == "end":
                return self._end(fields)
            tokens = self._from_lists(fields.get("tokens"), count)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            raise ProtocolError(f"tokens are outside 0 to {size - 1}.")
        return tokens.astype(np.int64)

    @staticmethod
    def _end(fields: dict[str, Any]) -> End:
        num_samples = fields.get("num_samples")
        if num_samples is not None and (type(num_samples) is not int or num_samples < 0):
            raise ProtocolError("num_samples is not a non-negative integer.")
        return End(num_samples)

    @staticmethod
    def _from_lists(frames: Any, count: int) -> np.ndarray:
        if not isinstance(frames, list) or not all(
            isinstance(frame, list) and len(frame) == count and all(type(token) is int for token in frame)
            for frame in frames
        ):
            raise ProtocolError(
                f'expected {{"tokens": [frame, ...]}} with frames of {count} integers, or {{"type": "end"}}.'
            )
        try:
            return np.array(frames, np.int64).reshape(-1, count).T
        except OverflowError:
            raise ProtocolError("tokens are outside the codebook.") from None

    def format(self, audio: np.ndarray) -> bytes:
        """Return the message for samples [n]."""
        if self.audio == "pcm_f32le":
            return audio.astype("<f4").tobytes()
        samples: np.ndarray = np.rint(audio.clip(-1, 1) * 32767).astype("<i2")
        return samples.tobytes()


class EncodeProtocol:
    """Messages of `/v1/encode/stream`; see `DecodeProtocol`."""

    kind = "encode"

    def __init__(self, codec: Codec[Any], query: Mapping[str, str]) -> None:
        check_names(query, {"audio", "lookahead", "sample_rate", "tokens", "token"})
        self.codec = codec
        self.audio = choice(query, "audio", ("pcm_s16le", "pcm_f32le"))
        self.tokens = choice(query, "tokens", ("int16", "json"))
        self.lookahead = integer(query, "lookahead", None, 0, 1000)
        self.ramp: tuple[int, ...] = ()
        rate = integer(query, "sample_rate", codec.sample_rate, MIN_RATE, MAX_RATE)
        assert rate is not None
        self.sample_rate = rate

    def parse(self, message: bytes | str) -> np.ndarray | End:
        """Return the samples [n] of a message as float32, or the end.

        Raises:
            ProtocolError: the message is not valid.
        """
        if isinstance(message, str):
            if _parse_text(message).get("type") != "end":
                raise ProtocolError('expected samples in a binary message, or {"type": "end"}.')
            return End()
        kind = np.dtype("<i2" if self.audio == "pcm_s16le" else "<f4")
        if len(message) % kind.itemsize:
            raise ProtocolError(f"{len(message)} bytes are not samples of {self.audio}.")
        samples = np.frombuffer(message, kind).astype(np.float32)
        if self.audio == "pcm_s16le":
            return samples / np.float32(32768)
        try:
            check_peak(float(np.abs(samples).max(initial=0)), "a message")
        except AudioError as error:
            raise ProtocolError(str(error)) from None
        return samples

    def format(self, tokens: np.ndarray) -> bytes | str:
        """Return the message for tokens [C, k], frame by frame."""
        if self.tokens == "json":
            return json.dumps({"tokens": tokens.T.tolist()})
        return np.ascontiguousarray(tokens.T).astype("<i2").tobytes()
