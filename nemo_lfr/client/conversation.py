"""Parse and format the messages of one stream, without network access.

docs/reference/protocol.md is the specification. `Client` and `AsyncClient` both use this module.
"""

import json
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from nemo_lfr.client.answers import (
    MESSAGES,
    READY,
    StreamKind,
    message_type,
    parse_object,
    parse_tokens,
    problem_of,
    show,
)
from nemo_lfr.client.properties import CodecProperties
from nemo_lfr.client.server import Server, integer_of
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
from nemo_lfr.frames import check_first_lookahead, num_frames
from nemo_lfr.io.arrays import numeric_array
from nemo_lfr.io.resampling import num_resampled

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
_NOT_OPEN = "this stream is not open; open it with `async with`."
_REASONS = {
    1012: "the server is shutting down; connect to another one.",
    1013: "the server is full; try again later.",
}


class Conversation(CodecProperties):
    """Parser and formatter for the messages of one stream. Create it with `decoding` or `encoding`.

    Every message of the server is validated, and the results are counted, so a faulty server always causes an error.

    Args:
        server: server of the stream.
        kind: "encode" or "decode".
        sample_type: type of the samples in messages, "float32" or "int16".
        parameters: URL parameters. A parameter with the value None is left out.

    Attributes:
        kind: "encode" or "decode".
        address: URL of the stream.
        failure: error that ended the stream; None if there is none.
        ended: whether the client has ended the input.
        done: whether all results have arrived.
        closed: whether the client has closed the stream.

    Raises:
        NemoLfrError: if `sample_type` is unknown.
    """

    def __init__(
        self, server: Server, kind: StreamKind, sample_type: SampleType = "float32", **parameters: object
    ) -> None:
        if sample_type not in _WIRE:
            raise NemoLfrError(f"sample_type {quoted(sample_type)} is unknown; use one of {', '.join(_WIRE)}.")
        self.kind, self._server = kind, server
        audio, self._dtype = _WIRE[sample_type]
        form = {"tokens": "json"} if kind == "encode" else {}
        self.address = server.address(f"/v1/{kind}/stream", {"audio": audio, **form, **parameters}, "ws")
        self.failure: ServerError | None = None
        self.ended = self.done = self.closed = False
        self._codec: dict[str, int] = {}
        self._input_rate: Any = parameters.get("sample_rate")
        self._num_samples: int | None = None  # length to which the audio is trimmed
        self._num_sent = self._num_received = 0  # samples or frames

    @classmethod
    def decoding(
        cls,
        server: Server,
        lookahead: int | None,
        first_lookahead: int | None,
        ramp: Sequence[int],
        sample_type: SampleType,
    ) -> "Conversation":
        """Create a conversation that decodes; see `Client.decode_stream` for the arguments.

        Raises:
            NemoLfrError: if an argument is not valid.
        """
        try:
            sizes = ",".join(str(operator.index(size)) for size in ramp) or None
        except (TypeError, ValueError):
            raise NemoLfrError(f"ramp is {quoted(ramp)}; pass numbers of frames, such as (1, 2, 4).") from None
        lookaheads = {"lookahead": lookahead, "first_lookahead": first_lookahead}
        valid = {name: integer_of(name, value) for name, value in lookaheads.items()}
        check_first_lookahead(valid["first_lookahead"], valid["lookahead"])
        return cls(server, "decode", sample_type, ramp=sizes, **valid)

    @classmethod
    def encoding(cls, server: Server, sample_rate: int | None, lookahead: int | None) -> "Conversation":
        """Create a conversation that encodes; see `Client.encode_stream` for the arguments.

        Raises:
            NemoLfrError: if an argument is not valid.
        """
        rate = integer_of("sample_rate", sample_rate, 1)
        return cls(server, "encode", sample_rate=rate, lookahead=integer_of("lookahead", lookahead))

    @property
    def opened(self) -> bool:
        """Whether the server has accepted the stream."""
        return bool(self._codec)

    def _property(self, name: str) -> int:
        if not self.opened:
            raise NemoLfrError(_NOT_OPEN)
        return self._codec[name]

    def open(self, message: bytes | str) -> None:
        """Read the server's first message, which describes the codec.

        Raises:
            ServerError: if the server refuses the stream, or the message is not valid.
        """
        values = self._parse(message, "ready")
        self._codec = {name: values[name] for name in READY}

    def check_open(self) -> None:
        """Check that the stream can be used.

        Raises:
            ServerError: if the stream has failed; this is the error that was raised when it failed.
            NemoLfrError: if the stream is not open.
        """
        if self.failure is not None:
            raise self.failure
        if self.closed:
            raise NemoLfrError("this stream is closed; open another stream.")
        if not self.opened:
            raise NemoLfrError(_NOT_OPEN)

    def check_input(self) -> None:
        """Check that the stream accepts input.

        Raises:
            ServerError: if the stream has failed; this is the error that was raised when it failed.
            NemoLfrError: if the input has ended, or the stream is not open.
        """
        if self.ended and self.failure is None:
            raise NemoLfrError("the input of this stream has ended; open another stream.")
        self.check_open()

    def messages(self, items: Any) -> Iterator[bytes | str]:
        """Split a piece of input into messages, each with at most 64 KiB of array data.

        Args:
            items: samples [n], tokens [C, k], or the tokens of one frame, [C].

        Raises:
            AudioError: if the samples are not valid.
            TokensError: if the tokens are not valid.
            NemoLfrError: if the stream is not open or has failed, or its input has ended.
        """
        self.check_input()
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
            ServerError: if the stream has failed.
            NemoLfrError: if `num_samples` is not valid, the stream is not open, or its input has ended.
        """
        self.check_input()
        self._num_samples = num_samples = integer_of("num_samples", num_samples)
        self.ended = True
        return json.dumps({"type": "end"} | ({} if num_samples is None else {"num_samples": num_samples}))

    def result(self, message: bytes | str) -> np.ndarray | None:
        """Return the result in a message from the server.

        Returns:
            Samples [n] of type `sample_type`, or tokens [C, k]; None if the message says that there are no more
            results.

        Raises:
            ServerError: if the message reports an error or is not valid, or if there are too many or too few results
                for the input.
        """
        if self.done:
            raise self.invalid('sent a message after the message of type "done"')
        result = self._audio(message) if isinstance(message, bytes) else self._tokens_or_end(message)
        if result is None:
            self.done = True
            return None
        self._num_received += result.shape[-1]
        if self._num_received > self._num_expected:
            raise self.invalid(
                f"sent {self._num_received} {self._units[1]} for an input of {self._num_sent} {self._units[0]}, which "
                f"gives only {self._num_expected}"
            )
        return result

    def _audio(self, message: bytes) -> np.ndarray:
        size = np.dtype(self._dtype).itemsize
        if self.kind == "encode":
            raise self.invalid("sent a binary message instead of tokens as text")
        if len(message) % size:
            raise self.invalid(f"sent a binary message of {len(message)} bytes, not a multiple of {size}")
        samples = np.frombuffer(message, self._dtype)
        if samples.dtype.kind == "f" and not np.isfinite(samples).all():
            raise self.invalid("sent samples that are NaN or infinite")
        return samples

    def _tokens_or_end(self, message: str) -> np.ndarray | None:
        values = self._parse(message, *(("tokens", "done") if self.kind == "encode" else ("done",)))
        if message_type(values) == "done":
            self._check_total(values["num_frames" if self.kind == "encode" else "num_samples"])
            return None
        tokens = parse_tokens(values["tokens"], self.num_codebooks, self.codebook_size)
        if tokens is None:
            raise self.invalid(
                f"sent tokens that are not frames of {self.num_codebooks} integers from 0 to {self.codebook_size - 1}"
            )
        return tokens

    def _check_total(self, reported: int) -> None:
        """Check the number of frames or samples that the server's last message reports.

        Raises:
            ServerError: if the input has not ended, or if `reported` is not the number that arrived, or not the number
                that the server must send for this input.
        """
        units_in, units_out = self._units
        if not self.ended:
            raise self.invalid('sent the message of type "done" before the end of the input')
        if reported != self._num_received:
            raise self.invalid(
                f"reports {reported} {units_out} in its last message, but {self._num_received} {units_out} arrived"
            )
        # With a lookahead or first lookahead of 0, the server may send the whole last frame before the input ends.
        expected = self._num_expected if self._num_samples is None else min(self._num_samples, self._num_expected)
        if reported not in (expected, self._num_expected):
            raise self.invalid(
                f"sent {reported} {units_out} instead of {expected} for an input of {self._num_sent} {units_in}"
            )

    @property
    def _units(self) -> tuple[str, str]:
        """Names of the items that are sent and received."""
        return ("samples", "frames") if self.kind == "encode" else ("frames", "samples")

    @property
    def _num_expected(self) -> int:
        """Number of frames (or samples, when decoding) that result from the input sent so far, before trimming."""
        if self.kind == "encode":
            num_samples = self._num_sent
            if self._input_rate not in (None, self.sample_rate):
                num_samples = num_resampled(num_samples, self._input_rate, self.sample_rate)
            return num_frames(num_samples, self.samples_per_frame)
        return self._num_sent * self.samples_per_frame

    def joined(self, results: list[np.ndarray]) -> np.ndarray:
        """Concatenate results; without results, return an empty array."""
        shape = (self.num_codebooks, 0) if self.kind == "encode" else (0,)
        empty = np.zeros(shape, np.int32 if self.kind == "encode" else self._dtype)
        return np.concatenate([empty, *results], axis=-1)

    def _parse(self, message: bytes | str, *types: str) -> dict[str, Any]:
        """Return the JSON object in a text message.

        Args:
            message: message of the server.
            types: message types that are valid now.

        Raises:
            ServerError: if the message reports an error, has another type or is not valid.
        """
        values = parse_object(message) if isinstance(message, str) else None
        if values is None:
            raise self.invalid(
                "sent a binary message" if isinstance(message, bytes) else "sent text that is not a JSON object"
            )
        name = message_type(values)
        schema = MESSAGES[self.kind].get(name)
        if schema is None or name not in (*types, "error"):
            raise self.invalid(f"sent a message of the unexpected type {show(values.get('type', name))}")
        if problem := problem_of(values, schema):
            raise self.invalid(f"sent a message of type {name} in which {problem}")
        if name == "error":
            text = f"{self._server.url}: {shorten(values['error'], 500)}"
            raise self.fail(_ERRORS.get(values["code"], ServerError)(text))
        return values

    def lost(self, code: int | None, reason: str) -> ServerError:
        """Return the error for a connection that was closed before the last result.

        Args:
            code: WebSocket close code; None if the connection ended without a close frame.
            reason: reason in the close frame, or another description of what happened.
        """
        if code in _ERRORS and code != 1011:  # from a proxy; `nemo-lfr serve` first sends an error message
            text = shorten(reason or _REASONS.get(code, f"the connection was closed with code {code}."), 500)
            return _ERRORS[code](f"{self._server.url}: {text}")
        unit_in, unit_out = self._units
        detail = f"code {code}" if code else "no close frame"
        return ServerLostError(
            f"the connection to {self._server.url} was lost ({shorten(reason, 200) or detail}) after "
            f"{self._num_sent} {unit_in} were sent and {self._num_received} {unit_out} received; open another "
            f"stream and send the recording again."
        )

    def fail(self, error: ServerError) -> ServerError:
        """Return the error, and record it as `failure` if the stream is open and has not failed before."""
        if self.opened and not self.closed and self.failure is None:
            self.failure = error
        return error

    def invalid(self, problem: str) -> ServerError:
        """Return the error for a message that does not follow the protocol, and record it as in `fail`.

        Args:
            problem: what the server did, such as "sent text that is not a JSON object".
        """
        return self.fail(
            ServerError(
                f"{self._server.url} {problem}; this does not follow version 1 of the protocol. Update this package "
                "or the server."
            )
        )
