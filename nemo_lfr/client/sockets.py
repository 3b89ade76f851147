"""Helpers for WebSocket connections, which `Client` and `AsyncClient` use."""

import asyncio
from typing import Any

from nemo_lfr.client.conversation import Conversation
from nemo_lfr.client.server import FULL, UNREACHED, Server, require_websockets
from nemo_lfr.errors import ServerError, ServerFullError, ServerRefusedError, shorten

CLOSE_S = 5.0  # maximum time in seconds to wait until the server closes a connection
# Much larger than the messages of a server, which decodes a few frames at once. A message is buffered before it is
# validated.
_MAX_MESSAGE = 1 << 26  # bytes
# Faults for which the package `websockets` closes the connection itself, by close code
_FAULTS = {
    1002: "sent data that is not a WebSocket message",
    1007: "sent text that is not valid UTF-8",
    1009: f"sent a message of more than {_MAX_MESSAGE} bytes",
}


def connect_options(server: Server) -> dict[str, Any]:
    """Return the keyword arguments for `connect` of the package `websockets`."""
    options: dict[str, Any] = {
        "additional_headers": server.headers,
        "compression": None,
        "max_size": _MAX_MESSAGE,
        "open_timeout": server.timeout,
        "close_timeout": min(CLOSE_S, server.timeout),
        # No time limit for pings, because the server does not answer them while it has enough input.
        "ping_timeout": None,
    }
    return options | ({"proxy": None} if server.is_local else {})


def handshake_error(server: Server, error: Exception) -> Exception:
    """Return the error for a connection that could not be opened."""
    websockets = require_websockets()
    if isinstance(error, websockets.exceptions.InvalidStatus):
        status = error.response.status_code
        message = f"{server.url}: the stream was refused with HTTP status {status}"
        targets = error.response.headers.get_all("Location")
        if targets and 300 <= status < 400:
            return ServerRefusedError(f"{server.url} redirects to {shorten(targets[0], 300)}; pass that address.")
        if status in FULL:
            return ServerFullError(f"{message}; try again later.")
        if status in UNREACHED:
            return server.lost(f"HTTP status {status}")
        if 400 <= status < 500:
            return ServerRefusedError(f"{message}; check the address and the access token.")
        return ServerError(f"{message}.")
    if isinstance(error, OSError | asyncio.TimeoutError | websockets.exceptions.WebSocketException):
        return server.lost(error)
    return error


def closed_by(conversation: Conversation, error: Any) -> ServerError:
    """Return the error for a connection that was closed before the last result arrived.

    Args:
        conversation: the stream.
        error: `ConnectionClosed` of the package `websockets`.
    """
    received, sent = error.rcvd, error.sent
    if sent is not None and sent.code in _FAULTS and not error.rcvd_then_sent:
        return conversation.invalid(_FAULTS[sent.code])
    return conversation.lost(received and received.code, received.reason if received else "")
