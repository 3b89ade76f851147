"""ASGI application of the server: routes and access control.

Any ASGI server, or Ray Serve, can run the application that `create_app` returns.
"""

import asyncio
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from nemo_lfr._version import __version__
from nemo_lfr.arguments import check_whole_number
from nemo_lfr.codec.codec import Codec
from nemo_lfr.errors import NemoLfrError, quoted, shorten
from nemo_lfr.serve.engine import Engine, OverloadedError
from nemo_lfr.serve.files import MediaTypeError, StorageError, decode_file, encode_file, storing
from nemo_lfr.serve.health import find_fault
from nemo_lfr.serve.metrics import Metrics
from nemo_lfr.serve.openapi import OPENAPI
from nemo_lfr.serve.page import is_page, page_routes
from nemo_lfr.serve.protocol import CloseCode, DecodeProtocol, EncodeProtocol, ProtocolError, check_names
from nemo_lfr.serve.session import EngineLimits
from nemo_lfr.serve.streams import StreamLimits, serve_stream

# Origins as browsers send them, in lower case and without a path. The first two are those of pages on a disk.
_ORIGIN = re.compile(r"null|file://|[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        engine: limits of the engine, which runs the codec for all clients.
        stream: limits of each WebSocket stream; `idle_s` and `max_seconds` also apply to posted files.
        max_body_bytes: maximum size of a posted file.
        max_files: maximum number of files that are received or processed at the same time.
        token: access token, which clients must send in the header `Authorization: Bearer TOKEN` or in the URL
            parameter `token`; None admits every client.
        origins: origins of the web sites whose pages may connect, such as "https://example.org".

    Raises:
        NemoLfrError: if a value is invalid, such as an empty token.
    """

    engine: EngineLimits = field(default_factory=EngineLimits)
    stream: StreamLimits = field(default_factory=StreamLimits)
    max_body_bytes: int = 100 << 20
    max_files: int = 16
    token: str | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole_number(self.max_body_bytes, "max_body_bytes", 1)
        check_whole_number(self.max_files, "max_files", 1)
        token = self.token
        is_text = isinstance(token, str) and token.isascii() and token.isprintable()
        if token is not None and not (is_text and token and token == token.strip()):
            raise NemoLfrError(
                "the token is empty, not printable ASCII or surrounded by spaces; pass a secret, or None to admit "
                "every client."
            )
        if isinstance(self.origins, str):
            raise NemoLfrError(f"origins is {quoted(self.origins)}; pass a tuple of origins.")
        for origin in self.origins:
            if not isinstance(origin, str) or not _ORIGIN.fullmatch(origin):
                raise NemoLfrError(
                    f"{quoted(origin)} is not an origin; pass a scheme and a host without a path, such as "
                    "https://example.org or http://localhost:3000."
                )


def create_app(codec: Codec[Any], settings: Settings | None = None) -> Starlette:
    """Create the ASGI application that serves a codec.

    While the application runs, a thread runs the codec; see `Engine`.

    Args:
        codec: codec with the PyTorch backend.
        settings: limits and access control; default: `Settings()`.

    Raises:
        NemoLfrError: if the codec's backend cannot process streams in batches.
    """
    settings = settings or Settings()
    metrics = Metrics()
    engine = Engine(codec, settings.engine, metrics.on_step)
    metrics.watch(engine)
    files = asyncio.Semaphore(settings.max_files)

    def stream(kind: type[DecodeProtocol] | type[EncodeProtocol]) -> Callable[[WebSocket], Awaitable[None]]:
        async def endpoint(websocket: WebSocket) -> None:
            await serve_stream(websocket, kind, engine, settings.stream, metrics)

        return endpoint

    def file(
        serve: Callable[[Request, Engine, int, StreamLimits], Awaitable[Response]],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            if files.locked():
                raise OverloadedError(f"the server is at its limit of {settings.max_files} files; try again later.")
            async with files:
                with storing():
                    return await serve(request, engine, settings.max_body_bytes, settings.stream)

        return endpoint

    async def health() -> Response:
        fault = None if engine.draining else await find_fault(engine)
        status = "draining" if engine.draining else "broken" if fault else "ok"
        reason = {"error": fault} if fault else {}
        return JSONResponse({"status": status, "streams": len(engine), **reason}, 200 if status == "ok" else 503)

    app = Starlette(
        routes=[
            Route("/v1/encode", file(encode_file), methods=["POST"]),
            Route("/v1/decode", file(decode_file), methods=["POST"]),
            WebSocketRoute("/v1/encode/stream", stream(EncodeProtocol)),
            WebSocketRoute("/v1/decode/stream", stream(DecodeProtocol)),
            Route("/v1/info", _without_parameters(lambda: JSONResponse(_info(engine, settings)))),
            Route("/health", _without_parameters(health)),
            Route(
                "/metrics",
                _without_parameters(lambda: Response(metrics.text(), media_type="text/plain; version=0.0.4")),
            ),
            Route("/openapi.json", _without_parameters(lambda: JSONResponse(OPENAPI))),
            *page_routes(),
        ],
        exception_handlers={NemoLfrError: _report, HTTPException: _report_path, ClientDisconnect: _drop},
        lifespan=lambda _: _running(engine),
    )
    app.router.redirect_slashes = False  # most clients do not send the body of a POST request again after a redirect
    _control_access(app, settings)
    app.state.engine = engine
    return app


@asynccontextmanager
async def _running(engine: Engine) -> AsyncIterator[None]:
    engine.start()  # an app may be started several times, for instance in a notebook or in tests
    try:
        yield
    finally:
        engine.close()


def _without_parameters(
    respond: Callable[[], Response | Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that calls `respond`, and refuses all URL parameters except the access token."""

    async def endpoint(request: Request) -> Response:
        check_names(request.query_params, {"token"})
        response = respond()
        return response if isinstance(response, Response) else await response

    return endpoint


def _control_access(app: Starlette, settings: Settings) -> None:
    app.add_middleware(_Admission, settings=settings)
    if settings.origins:  # runs before `_Admission`, because browsers send preflight requests without the token
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )


def _info(engine: Engine, settings: Settings) -> dict[str, Any]:
    codec = engine.codec
    return {
        "version": __version__,
        "model": codec.name,
        "fingerprint": codec.fingerprint,
        "sample_rate": codec.sample_rate,
        "samples_per_frame": codec.samples_per_frame,
        "frame_rate": codec.frame_rate,
        "num_codebooks": codec.num_codebooks,
        "codebook_size": codec.codebook_size,
        "bit_rate": codec.bit_rate,
        "encoder_lookahead": codec.encoder.context.future,
        "decoder_lookahead": codec.decoder.context.future,
        "max_streams": settings.engine.max_streams,
        "max_message_bytes": settings.stream.max_message_bytes,
        "max_body_bytes": settings.max_body_bytes,
    }


async def _report(_: Request, error: Exception) -> Response:
    """Return a JSON response for an error of this package."""
    status = 400
    if isinstance(error, OverloadedError):
        status = 503
    elif isinstance(error, StorageError):
        status = 507
    elif isinstance(error, MediaTypeError):
        status = 415
    elif isinstance(error, ProtocolError):
        status = {CloseCode.TOO_BIG: 413, CloseCode.POLICY: 408}.get(error.code, status)
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": str(error), "type": type(error).__name__}, status, headers)


async def _report_path(request: Request, error: Exception) -> Response:
    """Return a JSON response for an error that Starlette raised, such as an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        path = request.url.path
        advice = "remove the slash at the end" if path.endswith("/") else "see the paths in /openapi.json"
        message = f"this server has no {shorten(path)}; {advice}."
    return JSONResponse({"error": message, "type": "HTTPException"}, error.status_code, error.headers)


async def _drop(_: Request, error: Exception) -> Response:
    """Return a response although the client has disconnected, so that no error is logged."""
    return Response(status_code=400)


class _Admission:
    """Middleware that checks the access token and the `Origin` header.

    Without the origin check, any web page that a user opens in a browser could use a server on the user's machine.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on to the application, or refuse it.

        An HTTP request is refused with status 401 or 403, and a WebSocket with close code 1008. Requests for
        `/health`, for the web page and its files are never refused.
        """
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/health" or is_page(scope["path"]):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._is_known_origin(headers):
            await _refuse(
                scope,
                receive,
                send,
                403,
                "web pages of this origin are not allowed; start the server with --allow-origin ORIGIN.",
            )
        elif not self._has_token(headers, QueryParams(scope["query_string"])):
            await _refuse(
                scope,
                receive,
                send,
                401,
                "the access token is missing or wrong; send it as Authorization: Bearer TOKEN.",
            )
        else:
            await self._app(scope, receive, send)

    def _is_known_origin(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or origin in self._settings.origins:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return _is_address(parts.hostname) and parts.netloc == headers.get("host")

    def _has_token(self, headers: Headers, query: QueryParams) -> bool:
        if self._settings.token is None:
            return True
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            sent = query.get("token", "")
        return hmac.compare_digest(sent.strip().encode(), self._settings.token.encode())


def _is_address(host: str | None) -> bool:
    """Return whether a host is an IP address or localhost.

    Other host names are not trusted, because the owner of a domain can point it to this server (DNS rebinding).
    """
    if host is None or host == "localhost":
        return host is not None
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str) -> None:
    if scope["type"] == "http":
        await JSONResponse({"error": message, "type": "AccessError"}, status)(scope, receive, send)
        return
    websocket = WebSocket(scope, receive, send)
    await websocket.accept()
    await websocket.send_json({"type": "error", "code": int(CloseCode.POLICY), "error": message})
    await websocket.close(CloseCode.POLICY, message)
