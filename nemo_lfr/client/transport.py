"""HTTP requests with limits for the time and for the size of the response."""

import contextlib
import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from nemo_lfr.client.answers import parse_object
from nemo_lfr.client.server import FULL, UNREACHED, Server
from nemo_lfr.errors import (
    ServerError,
    ServerFullError,
    ServerLostError,
    ServerRefusedError,
    ServerShutdownError,
    shorten,
)

# Minimum speed of a transfer, in bytes per second. A transfer that is fast enough may take longer than the timeout.
MIN_SPEED = 64_000
_PIECE = 1 << 16  # bytes
_MAX_ERROR = 100_000  # bytes


def request(
    server: Server, path: str, body: bytes | None, headers: Mapping[str, str] | None = None, *, max_bytes: int
) -> tuple[bytes, str]:
    """Send a request, and return the body and the content type of the response.

    Args:
        server: the server.
        path: path of the request with its URL parameters, such as "/v1/encode?format=json".
        body: body of a POST request; None for a GET request.
        headers: headers in addition to those of `server`.
        max_bytes: maximum size of the response.

    Returns:
        The body, and the content type without its parameters, such as "application/json"; "" if the response has none.

    Raises:
        ServerError: if the server refuses the request, fails or cannot be reached, or if the response is too large,
            is incomplete or takes too long.
    """
    message = urllib.request.Request(server.address(path), body, {**server.headers, **(headers or {})})
    with _Deadline(server.timeout + len(body or b"") / MIN_SPEED) as deadline:
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects(), _Http(deadline), _Https(deadline)]
        handlers += [urllib.request.ProxyHandler({})] if server.is_local else []
        try:
            with urllib.request.build_opener(*handlers).open(message, timeout=server.timeout) as response:
                deadline.check()
                _check_complete(server, response)
                content = _read(server, response, max_bytes)
                return content, response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(server, error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise server.lost(f"no answer for {server.timeout:g} s" if deadline.is_over else reason) from error


def _check_complete(server: Server, response: Any) -> None:
    """Check that a response has status 200, and that a truncated body can be recognized.

    Raises:
        ServerError: if the status is not 200, or if the response has neither the header Content-Length nor chunked
            encoding.
    """
    if response.status != 200:
        raise ServerError(f"{server.url} answers with HTTP status {response.status}, not 200; is it `nemo-lfr serve`?")
    if response.length is None and not response.chunked:
        raise ServerError(
            f"{server.url} answers without the header Content-Length, so a truncated answer cannot be recognized; is "
            "it `nemo-lfr serve`?"
        )


def _read(server: Server, response: Any, max_bytes: int) -> bytes:
    """Read the body of a response.

    Raises:
        TimeoutError: if the body arrives too slowly.
        http.client.IncompleteRead: if the connection ends before the end of the body.
        ServerError: if the body has more than `max_bytes` bytes.
    """
    start, size = time.monotonic(), 0
    pieces = []
    while piece := response.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            raise ServerError(f"{server.url} answers with more than {max_bytes} bytes; is it `nemo-lfr serve`?")
        elapsed = time.monotonic() - start
        if elapsed > server.timeout + size / MIN_SPEED:
            raise TimeoutError(f"only {size} bytes of the answer arrived in {elapsed:.0f} s")
    content = b"".join(pieces)
    if response.length:  # `read1`, unlike `read`, does not raise this error itself
        raise http.client.IncompleteRead(content, response.length)
    return content


def _refusal(server: Server, error: urllib.error.HTTPError) -> ServerError:
    """Convert a response with an error status to an exception of this package."""
    target, status = error.headers.get("Location"), error.code
    if target and 300 <= status < 400:
        return ServerRefusedError(f"{server.url} redirects to {shorten(target, 300)}; pass that address.")
    try:
        values = parse_object(_read(server, error, _MAX_ERROR)) or {}
    except (OSError, http.client.HTTPException, ServerError):
        values = {}
    reason, kind = values.get("error"), values.get("type")
    if not isinstance(reason, str):  # the response is from a proxy, for example
        reason, kind = http.client.responses.get(status, "error") + ".", None
    message = f"{server.url}: {shorten(reason, 500)} (HTTP status {status})"
    if status in UNREACHED:
        return ServerLostError(message)
    if status in FULL:
        return ServerShutdownError(message) if kind == "ShutdownError" else ServerFullError(message)
    return ServerRefusedError(message) if 400 <= status < 500 else ServerError(message)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Handler that does not follow redirects.

    If urllib followed a redirect, it would send the access token, but not the file, to the new address.
    """

    def redirect_request(self, *_: Any) -> None:
        """Return None, so that urllib reports the redirect as an error."""


class _Deadline:
    """Context that closes a connection if the response headers do not arrive in time.

    The timeout of a socket is not enough: it restarts with each byte, so a slow server could block a client forever.

    Args:
        seconds: maximum time from the start of the request to the end of the response headers.

    Attributes:
        connection: the connection to watch; None before it is opened.
        is_over: whether the time has run out.
    """

    connection: http.client.HTTPConnection | None = None

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._seconds, self._done = seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Deadline":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def check(self) -> None:
        """Stop watching. Raise TimeoutError if the time has run out."""
        self._done.set()
        if self.is_over:
            raise TimeoutError

    def _watch(self) -> None:
        if self._done.wait(self._seconds):
            return
        self.is_over = True
        while not self._done.wait(0.05):  # repeat, because the socket may not be open yet
            opened = self.connection.sock if self.connection is not None else None
            if opened is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(opened, socket.SHUT_RDWR)  # SSLSocket's own method is not thread-safe


class _Watched:
    """Mixin for urllib's handlers that passes each new connection to a `_Deadline`."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def do_open(self, http_class: Any, req: urllib.request.Request, **arguments: Any) -> Any:
        """Send a request; see `urllib.request.AbstractHTTPHandler`."""

        def connect(*place: Any, **options: Any) -> Any:
            self._deadline.connection = http_class(*place, **options)
            return self._deadline.connection

        return super().do_open(connect, req, **arguments)  # type: ignore[misc]


class _Http(_Watched, urllib.request.HTTPHandler):
    """Handler for http URLs."""


class _Https(_Watched, urllib.request.HTTPSHandler):
    """Handler for https URLs."""
