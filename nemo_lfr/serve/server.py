"""Run the application with uvicorn. After SIGTERM or SIGINT, the server waits for open streams to end."""

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
from nemo_lfr.serve.protocol import CloseCode

_POLL_S = 0.1
_SLICE = 1 << 14  # bytes of received data that are parsed before the number of frames is checked
_MAX_HEADERS = 1 << 16  # maximum size in bytes of headers or trailers, not counting the first piece that is received
_MAX_SMALL = 1000  # pings, pongs and small fragments per second that one client may send
_SMALL = 64  # bytes in a small fragment
_CLOSE_S = 3  # seconds at the end of the drain time that are reserved for closing connections


class _WebSockets(WebSocketsSansIOProtocol):
    """Subclass of uvicorn's WebSocket protocol that limits what a faulty client can do.

    It disconnects clients that stop reading. uvicorn would wait for them indefinitely, even after the application has
    closed the stream.

    It also disconnects clients that send too many pings, pongs or small fragments. These never reach the application,
    so its limits do not apply to them.
    """

    send_s = 20.0
    _cutoff: asyncio.TimerHandle | None = None
    _second = _num_small = 0  # the current second, and the number of small frames in it
    _is_flood = False

    def data_received(self, data: bytes) -> None:
        """Parse received data in slices, until the client has sent too many small frames."""
        for start in range(0, len(data), _SLICE):
            if self._is_flood:
                return
            super().data_received(data[start : start + _SLICE])

    def handle_ping(self) -> None:
        """Answer a ping. Too many pings within a second end the connection."""
        self._count_small()
        super().handle_ping()

    def handle_pong(self, event: Any) -> None:
        """Process a pong. Too many pongs within a second end the connection."""
        self._count_small()
        super().handle_pong(event)

    def handle_cont(self, event: Any) -> None:
        """Process a fragment of a message. Too many small fragments within a second end the connection."""
        if len(event.data) < _SMALL:
            self._count_small()
        super().handle_cont(event)

    def _count_small(self) -> None:
        second = int(self.loop.time())
        self._num_small = self._num_small + 1 if second == self._second else 1
        self._second = second
        if self._num_small > _MAX_SMALL and not self._is_flood:
            self._is_flood = True
            self.conn.fail(CloseCode.POLICY, "too many pings, pongs or small fragments")
            self.handle_parser_exception()
            if self._cutoff is None:  # the client may not read the close frame
                self._cutoff = self.loop.call_later(self.send_s, self.transport.abort)

    def pause_writing(self) -> None:
        """Start a timer when the write buffer is full.

        The connection is cut unless the client reads enough data within `send_s` seconds.
        """
        super().pause_writing()
        self._end_cutoff()
        self._cutoff = asyncio.get_running_loop().call_later(self.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the timer of `pause_writing` when the client has read enough data."""
        self._end_cutoff()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer when the connection is closed."""
        self._end_cutoff()
        super().connection_lost(exc)

    def _end_cutoff(self) -> None:
        if self._cutoff is not None:
            self._cutoff.cancel()
            self._cutoff = None


class _HeaderLimit(asyncio.Protocol):
    """Mixin for uvicorn's HTTP protocols that limits the size of headers and trailers, and the time for headers.

    With h11, uvicorn itself limits the size.
    """

    idle_s = 60.0
    transport: asyncio.Transport
    send_400_response: Callable[[str], None]
    cycle: Any  # the latest request; None before the first request
    _limit: asyncio.TimerHandle | None = None
    # Bytes received since the request began or since the last part of its body; the data in which that happened is
    # not counted.
    # None between requests, and always with h11.
    _num_bytes: int | None = None

    def on_message_begin(self) -> None:
        """Start to count the bytes of the headers."""
        self._num_bytes = 0
        super().on_message_begin()  # type: ignore[misc]

    def on_body(self, body: bytes) -> None:
        """Reset the count of received bytes after each part of the body."""
        self._num_bytes = 0
        super().on_body(body)  # type: ignore[misc]

    def on_message_complete(self) -> None:
        """Stop counting bytes. `on_message_begin` starts the next count."""
        self._num_bytes = None
        super().on_message_complete()  # type: ignore[misc]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timer for the headers of the first request."""
        super().connection_made(transport)
        self._start_limit()

    def data_received(self, data: bytes) -> None:
        """Pass data on to uvicorn, or answer with status 400 if the headers or trailers are too large."""
        if self._num_bytes is not None:
            self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes is not None and self._num_bytes > _MAX_HEADERS:
            self.send_400_response("The headers or trailers of the request are too large.")
            return
        is_served = self.cycle is not None and not self.cycle.response_complete
        if is_served or self.transport.get_protocol() is not self:  # a WebSocket has a separate protocol object
            self._end_limit()
        else:
            self._start_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer for the headers."""
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

    After the first signal, `/health` returns 503 and new streams are refused. The server waits up to
    `drain_s` minus 3 seconds for open streams to end. It then closes the remaining ones with code 1012. A second
    signal ends the wait at once.

    Args:
        config: uvicorn's settings.
        app: application that `create_app` returned.
        drain_s: maximum time in seconds from the first signal to the end of the process.
    """

    def __init__(self, config: uvicorn.Config, app: Starlette, drain_s: float) -> None:
        super().__init__(config)
        self._app, self._drain_s = app, drain_s
        self._loop: asyncio.AbstractEventLoop | None = None  # None before `startup`
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the first signal, begin to wait for open streams to end. At the second one, stop."""
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
    """Keep a log record, but remove its traceback if a client sent a message that is not UTF-8."""
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
        ws_max_size=settings.stream.max_message_bytes * 2,  # the server's own limit is smaller and gives a clear error
        ws_per_message_deflate=False,
        # No time limit for pongs, because the server does not read them while it has enough input.
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
        app: application that `create_app` returned.
        host: address to bind to.
        port: TCP port; 0 for a free one.
        settings: settings of the application.
        drain_s: maximum time in seconds from the first signal to the end of the process.
        on_start: function that is called with the server's URL after the address is bound.

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
            f"the server cannot bind to {host}:{port} ({error.strerror or error}); choose another --port or --host."
        ) from error
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{bound.getsockname()[1]}"
    if on_start:
        on_start(url)
    config = server_config(app, settings)
    logging.getLogger("uvicorn.error").addFilter(_without_traceback)
    with bound, suppress(KeyboardInterrupt):  # after it has stopped, uvicorn raises the signal that stopped it
        Server(config, app, drain_s).run(sockets=[bound])
    return url
