"""Helpers for WebSocket connections, which both clients use."""

import operator
from collections.abc import Sequence
from typing import Any

from nemo_lfr.client.conversation import Conversation
from nemo_lfr.client.server import Server, require_websockets
from nemo_lfr.errors import NemoLfrError, ServerError, ServerFullError, ServerRefusedError, shorten


def connect_options(server: Server) -> dict[str, Any]:
    """Return the keyword arguments for `connect` of the package `websockets`."""
    options: dict[str, Any] = {
        "additional_headers": server.headers,
        "compression": None,
        "max_size": None,
        "open_timeout": server.timeout,
        "close_timeout": 5,
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
        if status in (429, 503):
            return ServerFullError(f"{message}; try again later.")
        if 400 <= status < 500:
            return ServerRefusedError(f"{message}; check the address and the access token.")
        return ServerError(f"{message}.")
    if isinstance(error, OSError | websockets.exceptions.WebSocketException):
        return server.lost(error)
    return error


def ramp_of(ramp: Sequence[int]) -> str | None:
    """Return the URL parameter for a ramp, such as "1,2,4"; None for an empty ramp.

    Raises:
        NemoLfrError: if the ramp is not a sequence of integers.
    """
    try:
        return ",".join(str(operator.index(size)) for size in ramp) or None
    except TypeError:
        raise NemoLfrError(f"ramp is {shorten(repr(ramp))}; pass numbers of frames, such as (1, 2, 4).") from None


def closed_by(conversation: Conversation, error: Any) -> ServerError:
    """Return the error for a connection that was closed before the last result arrived."""
    frame = error.rcvd
    return conversation.closed(frame and frame.code, frame.reason if frame else "")
