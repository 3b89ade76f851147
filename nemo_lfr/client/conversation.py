"""Parse and format the messages of one stream, without network access.

docs/reference/protocol.md is the specification. Both clients use this module.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from nemo_lfr.client.answers import has_type, parse_object, parse_tokens
from nemo_lfr.client.server import Server, count_of
from nemo_lfr.errors import (
    AudioError,
    NemoLfrError,
    ServerError,
    ServerFullError,
    ServerLostError,
    ServerRefusedError,
    ServerShutdownError,
    TokensError,
    quoted,
    shorten,
)
from nemo_lfr.io.arrays import numeric_array

SampleType = Literal["float32", "int16"]

_WIRE = {"float32": ("pcm_f32le", "<f4"), "int16": ("pcm_s16le", "<i2")}
_MAX_MESSAGE = 1 << 16  # bytes
_INT16_SIZE = 1 << 15  # size of the largest codebook whose tokens fit into int16
_ERRORS: dict[int, type[ServerError]] = {
    1007: ServerRefusedError,
    1008: ServerRefusedError,
    1009: ServerRefusedError,
    1011: ServerError,
    1012: ServerShutdownError,
    1013: ServerFullError,
}
_REASONS = {
    1012: "the server is shutting down; connect to another one.",
    1013: "the server is full; try again later.",
}


class Conversation:
    """Parser and formatter for the messages of one stream.

    Args:
        server: server of the stream.
        kind: "encode" or "decode".
        sample_type: type of the samples in messages, "float32" or "int16".
        parameters: URL parameters. A parameter with the value None is left out.

    Attributes:
        sample_rate: sample rate of the codec, Hz.
        samples_per_frame: number of samples per frame.
        num_codebooks: number of tokens per frame.
        codebook_size: number of entries in a codebook; 0 <= token < codebook_size.
        delay_frames: number of later frames that must arrive before the result for a frame is returned.
        done: whether all results have arrived.
    """

    sample_rate: int
    samples_per_frame: int
    num_codebooks: int
    codebook_size: int
    delay_frames: int

    def __init__(
        self,
        server: Server,
        kind: Literal["encode", "decode"],
        sample_type: SampleType = "float32",
        **parameters: object,
    ) -> None:
        if sample_type not in _WIRE:
            raise NemoLfrError(f"sample_type {quoted(sample_type)} is unknown; use one of {', '.join(_WIRE)}.")
        self.kind, self._server = kind, server
        audio, self._dtype = _WIRE[sample_type]
        form = {"tokens": "json"} if kind == "encode" else {}
        self.address = server.address(f"/v1/{kind}/stream", {"audio": audio, **form, **parameters}, "ws")
        self.done = False
        self._ended = False
        self._num_sent = self._num_received = 0  # samples or frames

    def open(self, message: bytes | str) -> None:
        """Read the server's first message, which describes the codec.

        Raises:
            ServerError: if the server refuses the stream.
        """
        values = self._control(message)
        if values.get("type") != "ready":
            raise self._unknown()
        names = ("sample_rate", "samples_per_frame", "num_codebooks", "codebook_size")
        delay = values.get("lookahead_frames")
        if not all(has_type(values.get(name), int) for name in names) or not (delay == 0 or has_type(delay, int)):
            raise self._unknown()
        self.sample_rate, self.samples_per_frame, self.num_codebooks, self.codebook_size = (
            int(values[name]) for name in names
        )
        self.delay_frames = int(delay or 0)

    def messages(self, items: Any) -> Iterator[bytes | str]:
        """Yield messages of at most 64 KiB that contain a piece of input.

        Args:
            items: samples [n], tokens [C, k], or the tokens of one frame, [C].

        Raises:
            AudioError: if the samples are not valid.
            TokensError: if the tokens are not valid.
            NemoLfrError: if the input has already ended.
        """
        if self._ended:
            raise NemoLfrError("the input of this stream has ended; open another stream.")
        array = self._samples(items) if self.kind == "encode" else self._tokens(items)
        width = array.itemsize * (array.shape[1] if array.ndim == 2 else 1)
        step = max(1, _MAX_MESSAGE // width)
        for start in range(0, len(array), step):
            piece = array[start : start + step]
            self._num_sent += len(piece)
            yield json.dumps({"tokens": piece.tolist()}) if piece.dtype == np.int64 else piece.tobytes()

    def _samples(self, items: Any) -> np.ndarray:
        samples = numeric_array(items, "samples", AudioError)
        if samples.ndim != 1 or not (samples.dtype == np.int16 or np.issubdtype(samples.dtype, np.floating)):
            raise AudioError(
                f"the samples have dtype {samples.dtype} and shape {list(samples.shape)}; push float or int16 "
                "samples of shape [n]."
            )
        if samples.dtype == np.int16:
            samples = samples / np.float32(1 << 15)
        return samples.astype("<f4")

    def _tokens(self, items: Any) -> np.ndarray:
        """Check tokens, and return them as [k, C]: int16 if the codebook has at most 2**15 entries, else int64."""
        tokens = numeric_array(items, "tokens", TokensError)
        frames = tokens[None] if tokens.ndim == 1 else tokens.T
        if frames.ndim != 2 or frames.shape[1] != self.num_codebooks or not np.issubdtype(frames.dtype, np.integer):
            raise TokensError(
                f"the tokens have dtype {tokens.dtype} and shape {list(tokens.shape)}; push integers of shape "
                f"[{self.num_codebooks}, k], or [{self.num_codebooks}] for one frame."
            )
        if frames.size and not 0 <= frames.min() <= frames.max() < self.codebook_size:
            raise TokensError(f"a token is out of range; push tokens from 0 to {self.codebook_size - 1}.")
        return np.ascontiguousarray(frames, "<i2" if self.codebook_size <= _INT16_SIZE else np.int64)

    def end(self, num_samples: int | None = None) -> str:
        """Return the message that ends the input.

        Args:
            num_samples: for decoding, the length of the recording in samples. The audio is trimmed to this length;
                None for no trimming.

        Raises:
            NemoLfrError: if the input has already ended.
        """
        if self._ended:
            raise NemoLfrError("the input of this stream has ended; open another stream.")
        num_samples = count_of("num_samples", num_samples)
        self._ended = True
        return json.dumps({"type": "end"} | ({} if num_samples is None else {"num_samples": num_samples}))

    def result(self, message: bytes | str) -> np.ndarray | None:
        """Return the result in a message from the server.

        Returns:
            Samples [n] of type `sample_type`, or tokens [C, k]; None if the message says that there are no more
            results.

        Raises:
            ServerError: if the message reports an error or does not follow the protocol.
        """
        if isinstance(message, bytes):
            if self.kind == "encode" or len(message) % np.dtype(self._dtype).itemsize:
                raise self._unknown()
            samples = np.frombuffer(message, self._dtype)
            self._num_received += len(samples)
            return samples
        values = self._control(message)
        if values.get("type") == "done":
            self.done = True
            return None
        if self.kind == "decode" or "tokens" not in values:
            raise self._unknown()
        tokens = parse_tokens(values["tokens"], self.num_codebooks, self.codebook_size)
        if tokens is None:
            raise self._unknown()
        self._num_received += tokens.shape[1]
        return tokens

    def joined(self, results: list[np.ndarray]) -> np.ndarray:
        """Concatenate results; without results, return an empty array."""
        shape = (self.num_codebooks, 0) if self.kind == "encode" else (0,)
        empty = np.zeros(shape, np.int32 if self.kind == "encode" else self._dtype)
        return np.concatenate([empty, *results], axis=-1)

    def _control(self, message: bytes | str) -> dict[str, Any]:
        """Return the JSON object in a text message.

        Raises:
            ServerError: if the message reports an error.
        """
        values = parse_object(message) if isinstance(message, str) else None
        if values is None:
            raise self._unknown()
        if values.get("type") == "error":
            code, reason = values.get("code"), shorten(values.get("error", ""), 500)
            raise _ERRORS.get(code, ServerError)(f"{self._server.url}: {reason}")  # type: ignore[arg-type]
        return values

    def closed(self, code: int | None, reason: str) -> ServerError:
        """Return the error for a connection that was closed before the last result.

        Args:
            code: WebSocket close code; None if the connection ended without a close frame.
            reason: reason in the close frame, or another description of what happened.
        """
        if code in _ERRORS and code != 1011:  # from a proxy; `nemo-lfr serve` first sends an error message
            text = shorten(reason or _REASONS.get(code, f"the connection was closed with code {code}."), 500)
            return _ERRORS[code](f"{self._server.url}: {text}")
        unit_in, unit_out = ("samples", "frames") if self.kind == "encode" else ("frames", "samples")
        detail = f"code {code}" if code else "no close frame"
        return ServerLostError(
            f"the connection to {self._server.url} was lost ({shorten(reason, 200) or detail}) after "
            f"{self._num_sent} {unit_in} were sent and {self._num_received} {unit_out} received; open another "
            f"stream and send the recording again."
        )

    def _unknown(self) -> ServerError:
        return ServerError(
            f"{self._server.url} sent a message that does not follow version 1 of the protocol; update this package "
            "or the server."
        )
