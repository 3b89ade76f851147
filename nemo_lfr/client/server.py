"""Address of a server, access to it, and retries."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

from nemo_lfr.errors import (
    NemoLfrError,
    ServerError,
    ServerFullError,
    ServerLostError,
    ServerShutdownError,
    install_command,
    shorten,
)
from nemo_lfr.io.shortage import missing_extra

T = TypeVar("T")

_FIRST_WAIT_S, _MAX_WAIT_S = 0.1, 2.0
RETRIED = (ServerFullError, ServerLostError, ServerShutdownError)


@dataclass(frozen=True)
class Server:
    """Server as a client sees it.

    Attributes:
        url: its address, such as "http://127.0.0.1:8000", with the path under which it is mounted.
        token: access token; None for a server without one.
        timeout: longest wait for a connection or an answer, in seconds.
        retry_s: time to retry to open a stream or to send a file if the server is full, shuts down or cannot be
            reached, in seconds.
    """

    url: str
    token: str | None
    timeout: float
    retry_s: float

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_valid = False
        if not is_valid or parts.query or parts.fragment:
            raise NemoLfrError(f"{shorten(self.url)} is not the URL of a server; pass one as http://127.0.0.1:8000.")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise NemoLfrError("the access token is not printable ASCII.")
        if self.timeout <= 0 or self.retry_s < 0:
            raise NemoLfrError(f"timeout {self.timeout} must be positive, and retry_s {self.retry_s} not negative.")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine, which no proxy can reach."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def address(self, path: str, parameters: dict[str, object] | None = None, scheme: str = "http") -> str:
        """Return the URL of a request.

        Args:
            path: path below `url`, such as "/v1/info".
            parameters: parameters; None omits one.
            scheme: "http", or "ws" for a WebSocket.
        """
        query = urlencode({name: value for name, value in (parameters or {}).items() if value is not None}, safe=",")
        base = scheme + self.url.rstrip("/").removeprefix("http")
        return f"{base}{path}?{query}" if query else base + path

    def waits(self) -> Iterator[float]:
        """Yield the waits between attempts, in seconds, until `retry_s` is over."""
        end, wait = time.monotonic() + self.retry_s, _FIRST_WAIT_S
        while (remaining := end - time.monotonic()) > 0:
            yield min(wait, remaining)
            wait = min(2 * wait, _MAX_WAIT_S)

    def retry(self, attempt: Callable[[], T]) -> T:
        """Return the result of an attempt, which is repeated after the errors of `RETRIED`.

        Raises:
            ServerError: the error of the last attempt.
        """
        waits = self.waits()
        while True:
            try:
                return attempt()
            except RETRIED:
                wait = next(waits, None)
                if wait is None:
                    raise
            time.sleep(wait)

    def lost(self, reason: object, remedy: str = "check its address, or try again later.") -> ServerError:
        """Return the error for a server that does not answer.

        Args:
            reason: exception or text.
            remedy: what to do.
        """
        text = shorten(" ".join(str(reason).split()) or type(reason).__name__, 200).rstrip(".")
        return ServerLostError(f"{self.url} cannot be reached or does not answer ({text}); {remedy}")


def require_websockets() -> Any:
    """Import websockets.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import websockets.asyncio.client
        import websockets.exceptions
        import websockets.sync.client
    except Exception as error:  # a package may raise anything while it is imported
        message = f"streams of a server need websockets: {install_command('websockets')}"
        raise missing_extra(error, "websockets", message) from error
    return websockets
