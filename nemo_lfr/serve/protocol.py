"""Parse and format the messages of WebSocket streams, version 1; docs/reference/protocol.md is the specification.

Each stream is for one recording. Binary messages contain little-endian samples or tokens. Text messages are JSON
objects with either `tokens` or the `type` of a control message. An invalid message ends only its own stream. Unknown
and repeated keys and parameters are refused.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from nemo_lfr.codec.codec import Codec
from nemo_lfr.errors import AudioError, NemoLfrError, shorten
from nemo_lfr.io.audio import pcm16
from nemo_lfr.io.resampling import MAX_RATE, MIN_RATE, check_peak

MAX_RAMP = 8  # maximum number of chunks in `ramp`
MAX_CHUNK = 64  # maximum number of frames in one of these chunks


class CloseCode(IntEnum):
    """WebSocket close codes of the server, as defined in RFC 6455 and IANA's registry."""

    DONE = 1000
    GONE = 1001  # the client closed the connection; this code is counted in metrics but never sent
    INVALID = 1007  # invalid message or parameter
    POLICY = 1008  # wrong token or origin, or a client that is idle, does not read, or sends too many pings
    TOO_BIG = 1009  # message or recording above its limit
    FAULT = 1011  # unexpected error in the server
    RESTART = 1012  # the server is shutting down
    OVERLOADED = 1013  # too many streams; try again later


class ProtocolError(NemoLfrError):
    """Error that ends a stream or rejects a request.

    Args:
        message: reason for the client.
        code: close code of the stream. HTTP requests get status 413 for `TOO_BIG`, 408 for `POLICY` and 400 for other
            codes.

    Attributes:
        code: the close code.
    """

    def __init__(self, message: str, code: CloseCode = CloseCode.INVALID) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class End:
    """Message that ends the input of a stream.

    Attributes:
        num_samples: length of the original recording in samples; None if the client did not send it.
    """

    num_samples: int | None = None


def integer(query: Mapping[str, str], name: str, default: int | None, low: int, high: int) -> int | None:
    """Return an integer parameter of a URL, or `default` if it is absent.

    Args:
        query: parameters of the URL.
        name: name of the parameter.
        default: value of an absent parameter.
        low: smallest valid value.
        high: largest valid value.

    Raises:
        ProtocolError: if the parameter is not an integer from `low` to `high`.
    """
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise ProtocolError(f"{name}={shorten(text)} is not valid; pass an integer from {low} to {high}.")
    return int(text)


def choice(query: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """Return a URL parameter that must be one of `choices`. The default is the first choice.

    Raises:
        ProtocolError: if the parameter has another value.
    """
    text = query.get(name, choices[0])
    if text not in choices:
        raise ProtocolError(f"{name}={shorten(text)} is not valid; pass one of {', '.join(choices)}.")
    return text


def ramp(query: Mapping[str, str]) -> tuple[int, ...]:
    """Return the sizes of a decoder's first chunks from the URL parameter `ramp`.

    Args:
        query: parameters of the URL, such as `{"ramp": "1,2,4"}`.

    Returns:
        The number of frames in each chunk; empty if the parameter is absent.

    Raises:
        ProtocolError: if the parameter is not a list of at most `MAX_RAMP` integers from 1 to `MAX_CHUNK`.
    """
    text = query.get("ramp")
    if text is None:
        return ()
    names = text.split(",")
    if len(names) > MAX_RAMP:
        raise ProtocolError(f"ramp has {len(names)} chunks; pass at most {MAX_RAMP}.")
    try:
        sizes = [integer({"ramp": name.strip()}, "ramp", None, 1, MAX_CHUNK) for name in names]
    except ProtocolError:
        raise ProtocolError(
            f"ramp={shorten(text)} is not valid; pass integers from 1 to {MAX_CHUNK}, separated by commas, such as "
            "ramp=1,2,4."
        ) from None
    return tuple(size for size in sizes if size is not None)


def check_names(query: Mapping[str, str], names: set[str]) -> None:
    """Reject a URL that has a parameter outside `names`, or the same parameter twice.

    Raises:
        ProtocolError: if a parameter is unknown or repeated.
    """
    items = getattr(query, "multi_items", query.items)()  # `items` of Starlette's query has repeated names only once
    for name, count in Counter(name for name, _ in items).items():
        if name not in names:
            raise ProtocolError(f"unknown parameter {shorten(name)}; use {', '.join(sorted(names))}.")
        if count > 1:
            raise ProtocolError(f"the parameter {name} is repeated; pass it once.")


def parse_text(text: str, name: str = "a text message") -> dict[str, Any]:
    """Return the JSON object in a text message or in the body of a request.

    Args:
        text: the JSON text.
        name: description of the text, for error messages.

    Raises:
        ProtocolError: if the text is not a JSON object, or repeats a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ProtocolError(f"{name} has the key {shorten(repr(repeated), 40)} more than once; send it once.")
        return values

    try:
        message = json.loads(text, object_pairs_hook=unique)
    except ProtocolError:
        raise
    except (ValueError, RecursionError):
        raise ProtocolError(f"{name} is not valid JSON.") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"{name} is not a JSON object.")
    return message


def check_keys(fields: Mapping[str, Any], names: tuple[str, ...], name: str) -> None:
    """Reject a JSON object that has a key outside `names`.

    Args:
        fields: the JSON object.
        names: keys that are allowed.
        name: description of the object, for error messages.

    Raises:
        ProtocolError: if a key is unknown.
    """
    unknown = [key for key in fields if key not in names]
    if unknown:
        listing = ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
        raise ProtocolError(f"{name} has the unknown key {shorten(repr(unknown[0]), 40)}; send only {listing}.")


class DecodeProtocol:
    """Parser and formatter for the messages of `/v1/decode/stream`.

    Args:
        codec: codec of the server.
        query: parameters of the URL.

    Raises:
        ProtocolError: if a parameter is invalid.
    """

    kind = "decode"

    def __init__(self, codec: Codec[Any], query: Mapping[str, str]) -> None:
        check_names(query, {"audio", "first_lookahead", "lookahead", "ramp", "token"})
        self.codec = codec
        self.audio = choice(query, "audio", ("pcm_s16le", "pcm_f32le"))
        self.lookahead = integer(query, "lookahead", None, 0, 1000)
        self.first_lookahead = integer(query, "first_lookahead", None, 0, 1000)
        self.ramp = ramp(query)

    def parse(self, message: bytes | str) -> np.ndarray | End:
        """Parse a message that contains tokens or ends the input.

        Args:
            message: int16 tokens, frame by frame, or JSON text.

        Returns:
            Tokens in [0, codebook_size), int64, shape [C, k], where k may be 0; or `End`.

        Raises:
            ProtocolError: if the message is invalid.
        """
        count = self.codec.num_codebooks
        if isinstance(message, bytes):
            if len(message) % (2 * count):
                raise ProtocolError(
                    f"a message has {len(message)} bytes; send a multiple of {2 * count} bytes: whole frames of "
                    f"{count} int16 tokens."
                )
            tokens = np.frombuffer(message, "<i2").reshape(-1, count).T
        else:
            return self._from_text(message)
        return self._checked(tokens)

    def _from_text(self, message: str) -> np.ndarray | End:
        fields = parse_text(message)
        if fields.get("type") == "end":
            check_keys(fields, ("type", "num_samples"), "an end message")
            return self.end_of(fields)
        tokens = self.tokens_of(fields, ', or {"type": "end"}')
        check_keys(fields, ("tokens",), "a message with tokens")
        return tokens

    def tokens_of(self, fields: Mapping[str, Any], alternative: str = "") -> np.ndarray:
        """Return the tokens [C, k] in a JSON object.

        Args:
            fields: the JSON object.
            alternative: end of the error message, which says what else the client may send, such as
                ', or {"type": "end"}'.

        Raises:
            ProtocolError: if the tokens are not valid.
        """
        return self._checked(self._from_lists(fields.get("tokens"), alternative))

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        size = self.codec.codebook_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            raise ProtocolError(f"a token is out of range; send tokens from 0 to {size - 1}.")
        return tokens.astype(np.int64)

    @staticmethod
    def end_of(fields: Mapping[str, Any]) -> End:
        """Convert the JSON object of an end message to an `End`.

        Raises:
            ProtocolError: if the value of `num_samples` is not valid.
        """
        num_samples = fields.get("num_samples")
        if num_samples is not None and (type(num_samples) is not int or num_samples < 0):
            raise ProtocolError(f"num_samples is {shorten(repr(num_samples), 40)}; send an integer of at least 0.")
        return End(num_samples)

    def _from_lists(self, frames: Any, alternative: str) -> np.ndarray:
        count = self.codec.num_codebooks
        if not isinstance(frames, list) or not all(
            isinstance(frame, list) and len(frame) == count and all(type(token) is int for token in frame)
            for frame in frames
        ):
            raise ProtocolError(f'expected {{"tokens": [frame, ...]}} with frames of {count} integers{alternative}.')
        try:
            return np.array(frames, np.int64).reshape(-1, count).T
        except OverflowError:
            raise ProtocolError(
                f"a token is out of range; send tokens from 0 to {self.codec.codebook_size - 1}."
            ) from None

    def format(self, audio: np.ndarray) -> bytes:
        """Return the binary message for samples [n]. Samples that are sent as int16 are clipped."""
        if self.audio == "pcm_f32le":
            return audio.astype("<f4").tobytes()
        return pcm16(audio)


class EncodeProtocol:
    """Parser and formatter for the messages of `/v1/encode/stream`.

    Args:
        codec: codec of the server.
        query: parameters of the URL.

    Attributes:
        sample_rate: sample rate of the client's audio, Hz.

    Raises:
        ProtocolError: if a parameter is invalid.
    """

    kind = "encode"

    def __init__(self, codec: Codec[Any], query: Mapping[str, str]) -> None:
        check_names(query, {"audio", "lookahead", "sample_rate", "tokens", "token"})
        self.codec = codec
        self.audio = choice(query, "audio", ("pcm_s16le", "pcm_f32le"))
        self.tokens = choice(query, "tokens", ("int16", "json"))
        if self.tokens == "int16" and codec.codebook_size > 1 << 15:
            raise ProtocolError(f"tokens up to {codec.codebook_size - 1} do not fit into int16; pass tokens=json.")
        self.lookahead = integer(query, "lookahead", None, 0, 1000)
        self.ramp: tuple[int, ...] = ()
        rate = integer(query, "sample_rate", codec.sample_rate, MIN_RATE, MAX_RATE)
        assert rate is not None
        self.sample_rate = rate

    def parse(self, message: bytes | str) -> np.ndarray | End:
        """Parse a message that contains samples or ends the input.

        Args:
            message: samples in the format of the parameter `audio`, or JSON text.

        Returns:
            Samples at `sample_rate`, float32, shape [n]; or `End`.

        Raises:
            ProtocolError: if the message is invalid.
        """
        if isinstance(message, str):
            fields = parse_text(message)
            if fields.get("type") != "end":
                raise ProtocolError('expected samples in a binary message, or {"type": "end"}.')
            check_keys(fields, ("type",), "an end message")
            return End()
        kind = np.dtype("<i2" if self.audio == "pcm_s16le" else "<f4")
        if len(message) % kind.itemsize:
            raise ProtocolError(
                f"a message has {len(message)} bytes; send a multiple of {kind.itemsize} bytes: whole samples in "
                f"the format {self.audio}."
            )
        samples = np.frombuffer(message, kind).astype(np.float32)
        if self.audio == "pcm_s16le":
            return samples / np.float32(32768)
        try:
            check_peak(float(np.abs(samples).max(initial=0)), "a message")
        except AudioError as error:
            raise ProtocolError(str(error)) from None
        return samples

    def format(self, tokens: np.ndarray) -> bytes | str:
        """Return a message with tokens [C, k], frame by frame: JSON if the client chose "json", otherwise int16."""
        if self.tokens == "json":
            return json.dumps({"tokens": tokens.T.tolist()})
        return np.ascontiguousarray(tokens.T).astype("<i2").tobytes()
