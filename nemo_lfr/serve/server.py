"""uvicorn server that drains open streams on SIGTERM and SIGINT."""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.serve.app import Settings

_POLL_S = 0.1
_CLOSE_S = 3  # end of the drain time, in which connections are closed and the process ends


class _WebSockets(WebSocketsSansIOProtocol):
    """WebSocket protocol of uvicorn that disconnects clients that stop reading.

    uvicorn itself waits indefinitely for such a client, even after the application has closed the stream, because the
    close frame is queued behind unread data.
    """

    send_s = 20.0
    _cutoff: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Start the time limit of `send_s` seconds when the write buffer is full."""
        super().pause_writing()
        self._cutoff = asyncio.get_running_loop().call_later(self.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the time limit when the client has read enough."""
        self._end_cutoff()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limit of a closed connection."""
        self._end_cutoff()
        super().connection_lost(exc)

    def _end_cutoff(self) -> None:
        if self._cutoff is not None:
            self._cutoff.cancel()
            self._cutoff = None


class _HeaderLimit(asyncio.Protocol):
    """Mixin of uvicorn's HTTP protocols that closes a connection whose request does not arrive.

    uvicorn limits only the time between two requests.
    """

    idle_s = 60.0
    transport: asyncio.Transport
    cycle: Any  # the last request; None before the first
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the time limit."""
        super().connection_made(transport)
        self._start_limit()

    def data_received(self, data: bytes) -> None:
        """End the time limit when the headers of a request are complete, or start it for the next request."""
        super().data_received(data)
        is_served = self.cycle is not None and not self.cycle.response_complete
        if is_served or self.transport.get_protocol() is not self:  # a WebSocket has a protocol of its own
            self._end_limit()
        else:
            self._start_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the time limit."""
        self._end_limit()
        super().connection_lost(exc)

    def _start_limit(self) -> None:
        if self._limit is None:
            self._limit = asyncio.get_running_loop().call_later(self.idle_s, self.transport.close)

    def _end_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


class Server(uvicorn.Server):
    """uvicorn server that waits for open streams before it stops.

    After the first signal, `/health` returns 503 and new streams are refused. Open streams have most of `drain_s` to
    end and are then closed with code 1012. A second signal skips the rest of this wait.

    Args:
        config: uvicorn's settings.
        app: application returned by `create_app`.
        drain_s: maximum time from the first signal to the end, in seconds. Open streams have 3 s less, and are then
            closed.
    """

    def __init__(self, config: uvicorn.Config, app: Starlette, drain_s: float) -> None:
        super().__init__(config)
        self._app, self._drain_s = app, drain_s
        self._loop: asyncio.AbstractEventLoop | None = None  # None before `startup`
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining at the first signal, and stop at the second one."""
        if self._draining is not None or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._app.state.engine.draining = True
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        end = asyncio.get_running_loop().time() + max(0.0, self._drain_s - _CLOSE_S)
        while len(self._app.state.engine) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the server, and store its event loop for `handle_exit`."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Reduce uvicorn's record of a text message that is not UTF-8 to one line: any client can cause it."""
    if record.getMessage().startswith("Invalid UTF-8"):
        record.exc_info = None
    return True


def server_config(app: Starlette, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's settings for an application."""
    http = type("Http", (_HeaderLimit, AutoHTTPProtocol), {"idle_s": settings.stream.idle_s})
    websockets = type("WebSockets", (_WebSockets,), {"send_s": settings.stream.send_s})
    return uvicorn.Config(
        app,
        log_level="warning",
        http=http,
        ws=websockets,
        ws_max_size=settings.stream.max_message_bytes * 2,  # uvicorn itself rejects larger messages
        ws_per_message_deflate=False,
        # Pings without a time limit: the pong of a client waits while the server does not read, which may take longer.
        ws_ping_timeout=None,
        timeout_graceful_shutdown=1,
    )


def run(
    app: Starlette,
    host: str,
    port: int,
    settings: Settings,
    drain_s: float = 30.0,
    on_start: Callable[[str], None] | None = None,
) -> str:
    """Serve an application until SIGTERM or SIGINT.

    Args:
        app: application returned by `create_app`.
        host: address to bind.
        port: TCP port; 0 for a free one.
        settings: settings of the application.
        drain_s: maximum time from the first signal to the end, in seconds.
        on_start: function called with the server's URL after the address is bound.

    Returns:
        The URL of the server.

    Raises:
        NemoLfrError: if the address cannot be bound.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        raise NemoLfrError(
            f"{host}:{port} cannot be bound ({error.strerror or error}); choose another --port."
        ) from error
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{bound.getsockname()[1]}"
    if on_start:
        on_start(url)
    config = server_config(app, settings)
    logging.getLogger("uvicorn.error").addFilter(_without_traceback)
    with bound, suppress(KeyboardInterrupt):  # after it has stopped, uvicorn re-raises the signals it received
        Server(config, app, drain_s).run(sockets=[bound])
    return url
