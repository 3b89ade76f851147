"""WebSocket streams: `/v1/encode/stream` and `/v1/decode/stream`.

Each stream has two tasks. The reader passes messages to the engine and pauses while the engine has enough input. The
writer sends results and pauses while the client does not read. A client that does not read a message within
`StreamLimits.send_s` seconds is disconnected.
"""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.resampling import Resampler
from nemo_lfr.serve.engine import Engine, OverloadedError, ShutdownError
from nemo_lfr.serve.metrics import Metrics
from nemo_lfr.serve.protocol import CloseCode, DecodeProtocol, EncodeProtocol, End, ProtocolError
from nemo_lfr.serve.session import Session
from nemo_lfr.serve.tasks import stop_tasks, within

Protocol = DecodeProtocol | EncodeProtocol


@dataclass(frozen=True)
class StreamLimits:
    """Limits of a WebSocket stream.

    Attributes:
        idle_s: maximum time in seconds between two messages from the client. This limit does not apply after
            the end of the input.
        send_s: maximum time in seconds that the client may take to receive a message.
        max_seconds: maximum duration of a recording, in seconds.
        max_message_bytes: maximum size of a message from the client, in bytes for binary messages and in characters
            for text.
    """

    idle_s: float = 60.0
    send_s: float = 20.0
    max_seconds: float = 4 * 3600.0
    max_message_bytes: int = 1 << 20

    def check_duration(self, num_items: int, rate: float) -> None:
        """Check that the audio so far is not longer than `max_seconds`.

        Args:
            num_items: number of samples or frames that have arrived.
            rate: samples or frames per second, Hz.

        Raises:
            ProtocolError: if the audio is longer.
        """
        if num_items > self.max_seconds * rate:
            raise ProtocolError(
                f"the recording is longer than {self.max_seconds:g} s, the server's limit; send a shorter recording.",
                CloseCode.TOO_BIG,
            )


async def serve_stream(
    websocket: WebSocket,
    protocol_of: type[EncodeProtocol] | type[DecodeProtocol],
    engine: Engine,
    limits: StreamLimits,
    metrics: Metrics,
) -> None:
    """Serve one stream from the handshake to the close frame.

    Args:
        websocket: the connection, before `accept`.
        protocol_of: class of the stream's protocol, `EncodeProtocol` or `DecodeProtocol`.
        engine: engine that encodes or decodes the stream.
        limits: limits of the stream.
        metrics: metrics that record the end of the stream.
    """
    await websocket.accept()
    code, reason, session = CloseCode.FAULT, "internal error", None
    try:
        protocol = protocol_of(engine.codec, websocket.query_params)
        with _open(engine, protocol) as session:
            await _send_text(websocket, _ready(engine, session), limits)
            await _run(websocket, protocol, session, limits)
        code, reason = CloseCode.DONE, ""
    except ProtocolError as error:
        code, reason = error.code, str(error)
    except OverloadedError as error:
        code = CloseCode.RESTART if isinstance(error, ShutdownError) else CloseCode.OVERLOADED
        reason = str(error)
    except NemoLfrError as error:
        code, reason = CloseCode.INVALID, str(error)
    except WebSocketDisconnect:
        code, reason = CloseCode.GONE, ""
    except asyncio.CancelledError:
        code, reason = CloseCode.RESTART, "the server is shutting down"
        raise
    finally:
        metrics.on_close(session, protocol_of.kind, code)
        if code != CloseCode.GONE:
            with suppress(RuntimeError, WebSocketDisconnect, asyncio.TimeoutError, asyncio.CancelledError):
                await _close(websocket, code, reason, limits)


def _open(engine: Engine, protocol: Protocol) -> Any:
    if isinstance(protocol, EncodeProtocol):
        return engine.encoder(protocol.lookahead)
    return engine.decoder(protocol.lookahead, protocol.first_lookahead, ramp=protocol.ramp)


def _ready(engine: Engine, session: Session) -> dict[str, Any]:
    codec = engine.codec
    return {
        "type": "ready",
        "sample_rate": codec.sample_rate,
        "samples_per_frame": codec.samples_per_frame,
        "num_codebooks": codec.num_codebooks,
        "codebook_size": codec.codebook_size,
        "lookahead_frames": session.delay_frames,
    }


async def _run(websocket: WebSocket, protocol: Protocol, session: Session, limits: StreamLimits) -> None:
    """Run the reader and the writer until the recording ends or one of them fails."""
    reader = asyncio.create_task(_receive_all(websocket, protocol, session, limits))
    writer = asyncio.create_task(_send_all(websocket, protocol, session, limits))
    try:
        await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        await (writer if writer.done() else reader)  # the reader ends only with an error
    finally:
        await stop_tasks((reader, writer))


async def _receive_all(websocket: WebSocket, protocol: Protocol, session: Session, limits: StreamLimits) -> NoReturn:
    """Pass the client's messages to the session, and wait for the client to disconnect.

    Raises:
        ProtocolError: if a message is invalid, too late, or sent after the end of the input.
        WebSocketDisconnect: if the client has closed the connection.
    """
    codec = protocol.codec
    resampler = None
    if isinstance(protocol, EncodeProtocol) and protocol.sample_rate != codec.sample_rate:
        resampler = Resampler(protocol.sample_rate, codec.sample_rate)
    rate = codec.frame_rate if isinstance(protocol, DecodeProtocol) else protocol.sample_rate
    num_items = 0
    while True:
        items = protocol.parse(await within(limits.idle_s, _receive(websocket, limits), "no message received"))
        if isinstance(items, End):
            if resampler:
                await session.feed(resampler.push(np.zeros(0, np.float32), last=True))
            session.end(items.num_samples)
            await _receive(websocket, limits)
            raise ProtocolError(
                'a message follows the end of the input; send {"type": "end"} last, and open a stream for each '
                "recording."
            )
        num_items += items.shape[-1]
        limits.check_duration(num_items, rate)
        if resampler is None:
            await session.feed(items)
            continue
        # At a low sample rate, one message may contain hours of audio, and resampling all of it at once would need too
        # much memory.
        second = int(rate)
        for start in range(0, items.shape[-1], second):
            await session.feed(resampler.push(items[start : start + second]))


async def _receive(websocket: WebSocket, limits: StreamLimits) -> bytes | str:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    data: bytes | str | None = message.get("bytes")
    if data is None:
        data = message["text"]
    if len(data) > limits.max_message_bytes:
        raise ProtocolError(
            f"a message is larger than {limits.max_message_bytes} bytes, the server's limit; send smaller messages.",
            CloseCode.TOO_BIG,
        )
    return data


async def _send_all(websocket: WebSocket, protocol: Protocol, session: Session, limits: StreamLimits) -> None:
    num_items = 0
    while (result := await session.collect()) is not None:
        message = protocol.format(result)
        await _send(
            websocket.send_text(message) if isinstance(message, str) else websocket.send_bytes(message), limits
        )
        num_items += result.shape[-1]
    unit = "num_frames" if isinstance(protocol, EncodeProtocol) else "num_samples"
    await _send_text(websocket, {"type": "done", unit: num_items}, limits)


async def _send_text(websocket: WebSocket, message: dict[str, Any], limits: StreamLimits) -> None:
    await _send(websocket.send_text(json.dumps(message)), limits)


async def _send(sending: Any, limits: StreamLimits) -> None:
    try:
        await within(limits.send_s, sending, "a message was not read")
    except RuntimeError as error:  # raised by uvicorn after it has closed the connection itself
        raise WebSocketDisconnect(1006) from error


async def _close(websocket: WebSocket, code: CloseCode, reason: str, limits: StreamLimits) -> None:
    """Close the connection. After an error, first send a message with the full reason."""
    if code != CloseCode.DONE:
        message = json.dumps({"type": "error", "code": int(code), "error": reason})
        await asyncio.wait_for(websocket.send_text(message), limits.send_s)
    await websocket.close(code, reason.encode()[:120].decode(errors="ignore"))
