"""Encode and decode whole files with HTTP requests."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from nemo_lfr.client.answers import ENCODED, INFO, Kind, audio_problem, parse_object, parse_tokens, problem_of
from nemo_lfr.client.server import Server, integer_of
from nemo_lfr.client.transport import request
from nemo_lfr.errors import (
    AudioError,
    NemoLfrError,
    ServerError,
    ServerRefusedError,
    TokensError,
    printable,
    quoted,
)
from nemo_lfr.frames import num_frames
from nemo_lfr.io.arrays import numeric_array
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.regular import open_regular

AudioFormat = Literal["wav", "flac", "opus"]

# Maximum sizes of responses in bytes, in case the address belongs to another kind of server.
_MAX_INFO = 1 << 20
_MAX_PER_FRAME = 1 << 16  # bytes of audio per frame: 16,384 float samples


@dataclass(frozen=True)
class ServerInfo:
    """Codec and limits of a server.

    Attributes:
        version: version of nemo_lfr on the server.
        model: name of the codec.
        fingerprint: hash of the codec's weights and settings, 16 hex digits.
        sample_rate: sample rate of the codec, Hz.
        samples_per_frame: number of samples per frame.
        frame_rate: frames per second, Hz.
        num_codebooks: number of tokens per frame.
        codebook_size: number of entries in a codebook; 0 <= token < codebook_size.
        bit_rate: bits per second.
        max_streams: maximum number of open streams.
        max_message_bytes: maximum size of a message in a stream, in bytes.
        max_body_bytes: maximum size of a file that is sent to the server, in bytes.
    """

    version: str
    model: str
    fingerprint: str
    sample_rate: int
    samples_per_frame: int
    frame_rate: float
    num_codebooks: int
    codebook_size: int
    bit_rate: float
    max_streams: int
    max_message_bytes: int
    max_body_bytes: int


@dataclass(frozen=True)
class EncodedFile:
    """Tokens of an audio file.

    Attributes:
        tokens: ids in [0, codebook_size), int32, shape [C, T_encoded].
        num_samples: length of the recording in samples at `sample_rate`.
        sample_rate: sample rate of the codec, Hz.
        samples_per_frame: number of samples per frame.
    """

    tokens: np.ndarray
    num_samples: int
    sample_rate: int
    samples_per_frame: int


def get_info(server: Server) -> ServerInfo:
    """Return the codec and the limits of a server.

    Raises:
        ServerError: if the server fails or cannot be reached.
    """
    values = _json(server, "/v1/info", None, _MAX_INFO, INFO)
    return ServerInfo(**{name: values[name] for name in INFO})


def encode_file(server: Server, audio: bytes | str | os.PathLike[str]) -> EncodedFile:
    """Encode an audio file.

    Args:
        server: server to send the file to.
        audio: path of the file, or its content as bytes.

    Raises:
        AudioError: if `audio` is neither bytes nor the path of a readable file, for example if the file does not
            exist.
        ServerError: if the server refuses the file, fails, cannot be reached or does not return valid tokens.
    """
    if isinstance(audio, bytes | bytearray):
        info = get_info(server)
        _check_size(server, info, len(audio), "the content")
        body, name = bytes(audio), ""
    else:
        body, info = _read(server, audio)
        name = f"{printable(os.fspath(audio))}: "
    # The limit is generous: tokens as JSON are smaller than most audio files, but larger than a file of silence in a
    # compressed format.
    try:
        values = _json(server, "/v1/encode?format=json", body, (1 << 26) + 64 * len(body), ENCODED)
    except ServerRefusedError as error:
        raise ServerRefusedError(f"{name}{error}") from None
    tokens = parse_tokens(values["tokens"], info.num_codebooks, info.codebook_size)
    if tokens is None:
        raise _stranger(
            server,
            f"returns tokens that are not frames of {info.num_codebooks} integers from 0 to {info.codebook_size - 1}",
        )
    rates = (info.sample_rate, info.samples_per_frame)
    if (values["sample_rate"], values["samples_per_frame"]) != rates:
        raise _stranger(server, "returns tokens with another sample rate or frame size than /v1/info reports")
    num_samples = values["num_samples"]
    if num_frames(num_samples, info.samples_per_frame) != tokens.shape[1]:
        raise _stranger(server, f"returns {tokens.shape[1]} frames for {num_samples} samples")
    return EncodedFile(tokens, num_samples, *rates)


def _read(server: Server, audio: object) -> tuple[bytes, ServerInfo]:
    """Read an audio file that is not too large for the server. Return its content, and the server's description."""
    if not isinstance(audio, str | os.PathLike):
        raise AudioError(f"audio has type {type(audio).__name__}; pass the path or the content of a file.")
    path = expand_home(audio, AudioError)
    try:
        file = open_regular(path, AudioError, "pass the path or the content of an audio file")
    except OSError as error:
        raise AudioError(f"{printable(str(path))}: {error.strerror}; pass the path of a file.") from None
    with file:
        info = get_info(server)
        size = os.fstat(file.fileno()).st_size
        _check_size(server, info, size, printable(str(path)))
        return file.read(size), info


def _check_size(server: Server, info: ServerInfo, size: int, name: str) -> None:
    """Raise ServerRefusedError if a body of `size` bytes is larger than the server's limit."""
    if size > info.max_body_bytes:
        raise ServerRefusedError(
            f"{server.url}: {name} has {size} bytes, more than {info.max_body_bytes}, the server's limit; send a "
            "shorter recording."
        )


def decode_tokens(server: Server, tokens: Any, num_samples: int | None, audio_format: AudioFormat) -> bytes:
    """Decode tokens, and return the content of an audio file.

    Args:
        server: server to send the tokens to.
        tokens: integers, shape [C, T_encoded].
        num_samples: length of the recording in samples. The audio is trimmed to this length; None for no trimming.
        audio_format: format of the audio file: "wav", "flac" or "opus".

    Raises:
        TokensError: if `tokens` is not a two-dimensional array of integers.
        NemoLfrError: if another argument is not valid.
        ServerError: if the server refuses the tokens, fails, cannot be reached or does not return the requested audio.
    """
    if audio_format not in get_args(AudioFormat):
        raise NemoLfrError(f"audio_format {quoted(audio_format)} is not one of {', '.join(get_args(AudioFormat))}.")
    num_samples = integer_of("num_samples", num_samples)
    array = numeric_array(tokens, "tokens", TokensError)
    if array.ndim != 2 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TokensError(
            f"the tokens have dtype {array.dtype} and shape {list(array.shape)}; pass integers [C, T_encoded]."
        )
    body = json.dumps({"tokens": array.T.tolist(), "num_samples": num_samples}).encode()
    headers = {"Content-Type": "application/json"}
    path, limit = f"/v1/decode?format={audio_format}", _MAX_INFO + _MAX_PER_FRAME * array.shape[1]
    content, kind = server.retry(lambda: request(server, path, body, headers, max_bytes=limit))
    if not kind.startswith(("audio/", "application/o")):  # application/ogg, octet-stream
        raise _stranger(server, f"answers with {quoted(kind) if kind else 'no content type'}, not audio")
    info = get_info(server)
    longest = array.shape[1] * info.samples_per_frame
    expected = longest if num_samples is None else min(num_samples, longest)
    if problem := audio_problem(content, audio_format, info.sample_rate, expected):
        raise _stranger(server, f"answers with {problem}")
    return content


def _json(server: Server, path: str, body: bytes | None, max_bytes: int, schema: Mapping[str, Kind]) -> dict[str, Any]:
    """Send a request, and return the JSON object in the response.

    Raises:
        ServerError: if the request fails, or if the response is not a JSON object that matches `schema`.
    """
    headers = None if body is None else {"Content-Type": "audio/*"}
    content, kind = server.retry(lambda: request(server, path, body, headers, max_bytes=max_bytes))
    values = parse_object(content)
    if values is None or kind != "application/json":
        raise _stranger(server, "does not answer with JSON")
    if problem := problem_of(values, schema):
        raise _stranger(server, f"answers with JSON in which {problem}")
    return values


def _stranger(server: Server, problem: str) -> ServerError:
    """Return the error for a response that `nemo-lfr serve` would not send."""
    return ServerError(f"{server.url} {problem}; is it the address of `nemo-lfr serve`?")
