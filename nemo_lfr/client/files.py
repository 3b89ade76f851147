"""Encode and decode whole files with HTTP requests."""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from nemo_lfr.client.server import Server
from nemo_lfr.errors import ServerError, ServerFullError, ServerRefusedError, ServerShutdownError, TokensError, shorten

R = TypeVar("R")
AudioFormat = Literal["wav", "flac", "opus"]


@dataclass(frozen=True)
class ServerInfo:
    """Codec and limits of a server.

    Attributes:
        version: version of nemo_lfr on the server.
        model: name of the codec.
        fingerprint: fingerprint of the codec.
        sample_rate: sample rate of the codec, Hz.
        samples_per_frame: number of samples per frame.
        frame_rate: frames per second, Hz.
        num_codebooks: number of tokens per frame.
        codebook_size: number of entries in a codebook; 0 <= token < codebook_size.
        bit_rate: bits per second.
        max_streams: maximum number of open streams.
        max_message_bytes: maximum size of a message in a stream.
        max_body_bytes: maximum size of a file.
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
    values = _json(server, server.retry(lambda: _request(server, "/v1/info", None)))
    return _record(server, ServerInfo, values)


def encode_file(server: Server, audio: bytes | str | os.PathLike[str]) -> EncodedFile:
    """Encode an audio file.

    Args:
        server: server to send the file to.
        audio: path or content of the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ServerError: if the server refuses the file, fails or cannot be reached.
    """
    body = audio if isinstance(audio, bytes) else Path(audio).read_bytes()
    address = "/v1/encode?format=json"
    values = _json(server, server.retry(lambda: _request(server, address, body, {"Content-Type": "audio/*"})))
    return _record(server, EncodedFile, values | {"tokens": _tokens(server, values.get("tokens"))})


def decode_tokens(server: Server, tokens: Any, num_samples: int | None, audio_format: AudioFormat) -> bytes:
    """Decode tokens to the content of an audio file.

    Args:
        server: server to send the tokens to.
        tokens: integers, shape [C, T_encoded].
        num_samples: length of the recording in samples. The audio is trimmed to this length; None for no trimming.
        audio_format: format of the audio file.

    Raises:
        TokensError: if `tokens` is not a two-dimensional array of integers.
        ServerError: if the server refuses the tokens, fails or cannot be reached.
    """
    array = np.asarray(tokens)
    if array.ndim != 2 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TokensError(f"tokens are {array.dtype} of shape {list(array.shape)}; pass integers [C, T_encoded].")
    body = json.dumps({"tokens": array.T.tolist(), "num_samples": num_samples}).encode()
    headers = {"Content-Type": "application/json"}
    return server.retry(lambda: _request(server, f"/v1/decode?format={audio_format}", body, headers))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Handler that follows no redirects.

    urllib would send the access token to the other address, but not the file.
    """

    def redirect_request(self, *_: Any) -> None:
        """Return None, so that urllib raises the redirect as an error."""


def _request(server: Server, path: str, body: bytes | None, headers: Mapping[str, str] | None = None) -> bytes:
    request = urllib.request.Request(server.address(path), body, {**server.headers, **(headers or {})})
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    handlers += [urllib.request.ProxyHandler({})] if server.is_local else []
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=server.timeout) as response:
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        with error:
            target = error.headers.get("Location")
            if target and 300 <= error.code < 400:
                message = f"{server.url} redirects to {shorten(target, 300)}; pass that address."
                raise ServerRefusedError(message) from None
            raise _refusal(server, error.code, error.read(100_000)) from None
    except urllib.error.URLError as error:
        raise server.lost(error.reason) from error
    except (OSError, http.client.HTTPException) as error:
        raise server.lost(error) from error


def _refusal(server: Server, status: int, content: bytes) -> ServerError:
    """Return the error for a response with another HTTP status than 200."""
    try:
        values = json.loads(content)
        reason, kind = str(values["error"]), values.get("type")
    except (ValueError, KeyError, TypeError, AttributeError):  # the response of a proxy, for example
        reason, kind = http.client.responses.get(status, "error") + ".", None
    message = f"{server.url}: {shorten(reason, 500)} (HTTP status {status})"
    if status == 503:
        return ServerShutdownError(message) if kind == "ShutdownError" else ServerFullError(message)
    return ServerRefusedError(message) if 400 <= status < 500 else ServerError(message)


def _json(server: Server, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ServerError(f"{server.url} does not answer with JSON; is it the address of `nemo-lfr serve`?")
    return values


def _tokens(server: Server, frames: Any) -> np.ndarray:
    """Convert the list of frames in a response to tokens [C, T_encoded]."""
    if frames == []:  # an empty recording, where the list does not show the number of codebooks
        return np.zeros((get_info(server).num_codebooks, 0), np.int32)
    try:
        tokens = np.array(frames, np.int32)
    except (ValueError, TypeError, OverflowError):
        tokens = np.zeros(0, np.int32)
    if tokens.ndim != 2:
        raise ServerError(f"{server.url} does not report tokens; is it the address of `nemo-lfr serve`?")
    return tokens.T


def _record(server: Server, kind: type[R], values: dict[str, Any]) -> R:
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if missing := [name for name in names if name not in values]:
        raise ServerError(f"{server.url} does not report {', '.join(missing)}; is it the address of `nemo-lfr serve`?")
    return kind(**{name: values[name] for name in names})
