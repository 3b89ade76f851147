"""Settings of a client: the address of the server, the access token, the timeout and retries."""

import numbers
import operator
import re
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
    quoted,
    shorten,
)
from nemo_lfr.io.shortage import missing_extra

T = TypeVar("T")

_FIRST_WAIT_S, _MAX_WAIT_S = 0.1, 2.0
MAX_SECONDS = 1_000_000  # largest timeout; operating systems do not support much larger ones
_USER = re.compile(r"//[^/?#]*@")  # user name and password in a URL
_CONTROL = re.compile(r"[^\x21-\x7e]")  # http.client sends a path in ASCII
FULL = (429, 503)  # HTTP status codes of a server or a proxy that is at its limit
UNREACHED = (502, 504)  # HTTP status codes of a proxy that does not reach the server
RETRIED = (ServerFullError, ServerLostError, ServerShutdownError)


@dataclass(frozen=True)
class Server:
    """Address of a server, and settings for connections to it.

    Attributes:
        url: address of the server, such as "http://127.0.0.1:8000". If a reverse proxy puts the server below a path,
            include this path: "https://example.org/codec".
        token: access token; None if the server does not require one.
        timeout: maximum time in seconds to wait for the server; see `Client`.
        retry_s: number of seconds for which the client keeps trying; see `Client`.
    """

    url: str
    token: str | None
    timeout: float
    retry_s: float

    def __post_init__(self) -> None:
        shown = shorten(_USER.sub("//...@", str(self.url)))
        try:
            parts = urlsplit(self.url)
            host = (parts.hostname or "").encode("idna")  # as the system's resolver does
            is_valid = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
        except (ValueError, TypeError, AttributeError):
            is_valid = False
        if (
            isinstance(self.url, str)
            and not self.url.isascii()
            and self.url.lower().startswith(("http://", "https://"))
        ):
            # Python and browsers convert some names, such as those with "ß", to different hosts.
            raise NemoLfrError(
                f"{shown} has characters that are not ASCII; write the host in Punycode, such as "
                "https://xn--mnchen-3ya.example, and percent-encode other parts of the URL."
            )
        if not is_valid or not isinstance(self.url, str) or parts.query or parts.fragment or _CONTROL.search(self.url):
            raise NemoLfrError(f"{shown} is not the URL of a server; pass a URL such as http://127.0.0.1:8000.")
        if parts.username is not None or parts.password is not None:
            raise NemoLfrError(f"{shown} contains a user name or password; remove it, and pass token=... instead.")
        token = self.token
        if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable()):
            raise NemoLfrError("the access token is not printable ASCII; pass the value that the server requires.")
        for name, value, low in (("timeout", self.timeout, "more than 0"), ("retry_s", self.retry_s, "at least 0")):
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= MAX_SECONDS or (name == "timeout" and not value):
                raise NemoLfrError(
                    f"{name} is {shorten(repr(value))}; pass a number of seconds, {low} and at most {MAX_SECONDS}."
                )

    @property
    def headers(self) -> dict[str, str]:
        """Headers to send with every request."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine. If so, the client does not use a proxy."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def address(self, path: str, parameters: dict[str, object] | None = None, scheme: str = "http") -> str:
        """Return the URL of a request.

        Args:
            path: path below `url`, such as "/v1/info".
            parameters: URL parameters. A parameter with the value None is left out.
            scheme: "http", or "ws" for a WebSocket.
        """
        query = urlencode({name: value for name, value in (parameters or {}).items() if value is not None}, safe=",")
        own, _, rest = self.url.rstrip("/").partition("://")
        base = scheme + own.lower().removeprefix("http") + "://" + rest
        return f"{base}{path}?{query}" if query else base + path

    def waits(self) -> Iterator[float]:
        """Yield the time to wait before each new attempt, in seconds, until `retry_s` seconds have passed."""
        end, wait = time.monotonic() + self.retry_s, _FIRST_WAIT_S
        while (remaining := end - time.monotonic()) > 0:
            yield min(wait, remaining)
            wait = min(2 * wait, _MAX_WAIT_S)

    def retry(self, attempt: Callable[[], T]) -> T:
        """Call a function until it succeeds or `retry_s` seconds have passed, and return its result.

        Only errors in `RETRIED` lead to another attempt.

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
        """Return the error for a server that does not respond.

        Args:
            reason: exception or text that says what happened.
            remedy: advice for the user at the end of the message.
        """
        text = shorten(" ".join(str(reason).split()) or type(reason).__name__, 200).rstrip(".")
        return ServerLostError(f"{self.url} cannot be reached or does not answer ({text}); {remedy}")


def integer_of(name: str, value: Any, low: int = 0) -> int | None:
    """Check an optional integer, and return it as an int or None.

    Args:
        name: name of the argument.
        value: value of the argument.
        low: smallest valid value.

    Raises:
        NemoLfrError: if the value is neither None nor an integer from `low` to 2**63 - 1.
    """
    try:
        count = None if value is None else operator.index(value)
        if isinstance(value, bool):  # which Python accepts as 0 or 1
            count = low - 1
    except TypeError:
        count = low - 1
    if count is not None and not low <= count < 1 << 63:
        raise NemoLfrError(f"{name} is {quoted(value)}; pass an integer of at least {low}, or None.")
    return count


def require_websockets() -> Any:
    """Import the package `websockets`.

    Raises:
        MissingExtraError: if the package is not installed or cannot be imported.
    """
    try:
        import websockets.asyncio.client
        import websockets.exceptions
        import websockets.sync.client
    except Exception as error:  # a package may raise anything while it is imported
        message = f"streams need the package websockets: {install_command('websockets')}"
        raise missing_extra(error, "websockets", message) from error
    return websockets
