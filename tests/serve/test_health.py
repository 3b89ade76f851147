"""Tests of the health of a server whose network fails, and of CORS headers for pages of other origins."""

import asyncio
import json
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

from tests.tiers import slow_after

pytest.importorskip("starlette", reason='the server: pip install starlette "uvicorn[standard]" prometheus_client')
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")

from nemo_lfr.client import Client
from nemo_lfr.errors import NemoLfrError, ServerError
from nemo_lfr.serve import health
from nemo_lfr.serve.app import Settings, create_app
from nemo_lfr.serve.engine import Engine
from nemo_lfr.serve.session import EngineLimits
from tests.models import cached_codec
from tests.serve.running import running


def request(server, path, method="GET", **headers):
    """Return the status, the headers and the JSON of a response; None for one without JSON."""
    asked = urllib.request.Request(server.url(path), None, headers, method=method)
    try:
        response = urllib.request.urlopen(asked)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        body = response.read()
    return response.status, response.headers, json.loads(body) if body.startswith(b"{") else None


def decode(server, num_samples=None):
    with Client(server.url("")).decode_stream() as stream:
        stream.push(np.zeros((8, 3), int))
        return stream.flush(num_samples)


def fail(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with more")


@pytest.mark.slow
@pytest.mark.parametrize("function", slow_after(1, ["push_decoders", "flush_decoders", "Engine._advance"]))
@pytest.mark.parametrize("is_full", slow_after(1, [False, True]))
def test_a_network_that_fails_is_reported_until_it_works(monkeypatch, function, is_full):
    with running(Settings(EngineLimits(max_streams=1))) as server:
        decode(server)
        monkeypatch.setattr(f"nemo_lfr.serve.engine.{function}", fail)
        with pytest.raises(ServerError):
            decode(server)
        others = [Client(server.url(""), retry_s=5).decode_stream()] if is_full else []
        for _ in range(2):
            status, _, values = request(server, "/health")
            assert status == 503 and values["status"] == "broken"
            assert values["error"] == "RuntimeError: " + " ".join(
                ["CUDA error: an illegal memory access was encountered Compile with more"]
            )
        for other in others:
            other.close()
        monkeypatch.undo()
        for _ in range(100):  # a full server works again when the stream has been removed
            status, _, values = request(server, "/health")
            if status == 200:
                break
        assert (status, values) == (200, {"status": "ok", "streams": 0})


@pytest.mark.slow
def test_an_error_of_the_client_is_not_a_fault():
    with running() as server:
        with pytest.raises(ServerError):
            decode(server, num_samples=99999)
        assert request(server, "/health")[0] == 200


@pytest.mark.slow
def test_a_step_that_does_not_return_is_a_fault(monkeypatch):
    release, entered = threading.Event(), threading.Event()
    monkeypatch.setattr(health, "STALLED_S", 0.0)
    advance = Engine._advance

    def stall(*arguments):
        entered.set()
        release.wait(20)
        return advance(*arguments)

    with running() as server:
        assert request(server, "/health")[0] == 200
        monkeypatch.setattr(Engine, "_advance", stall)
        with Client(server.url("")).decode_stream() as stream:
            stream.push(np.zeros((8, 20), int))
            entered.wait(20)
            status, _, values = request(server, "/health")
            release.set()
        assert status == 503 and "a step of the engine has been running" in values["error"]


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.mark.slow
def test_pages_of_allowed_origins_can_read_responses():
    with running(Settings(token="secret", origins=("https://a.example",))) as server:
        status, headers, _ = request(server, "/v1/decode", "OPTIONS", Origin="https://a.example", **PREFLIGHT)
        assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://a.example"
        assert "authorization" in headers["Access-Control-Allow-Headers"].lower()
        for token, expected in (("secret", 200), ("wrong", 401)):  # a page can read the reason of a refusal
            status, headers, _ = request(
                server, "/v1/info", Origin="https://a.example", Authorization=f"Bearer {token}"
            )
            assert (status, headers["Access-Control-Allow-Origin"]) == (expected, "https://a.example")
        status, headers, _ = request(server, "/v1/info", Origin="https://b.example", Authorization="Bearer secret")
        assert status == 403 and "Access-Control-Allow-Origin" not in headers
        status, headers, _ = request(server, "/v1/decode", "OPTIONS", Origin="https://b.example", **PREFLIGHT)
        assert status >= 400 and "Access-Control-Allow-Origin" not in headers


@pytest.mark.slow
def test_a_server_without_origins_sends_no_cors_headers():
    with running() as server:
        for origin in ("https://a.example", server.url("")):
            headers = request(server, "/v1/info", Origin=origin)[1]
            assert not any(name.lower().startswith("access-control") for name in headers)


@pytest.mark.slow
def test_an_app_serves_again_after_a_shutdown():
    app = create_app(cached_codec("symmetric"))

    async def run():
        async with app.router.lifespan_context(app):
            with app.state.engine.decoder() as session:
                await session.feed(np.zeros((8, 3), int))
                session.end()
                assert await session.collect() is not None

    for _ in range(2):
        asyncio.run(run())
        app.state.engine.draining = True  # the server sets this when it receives a signal


@pytest.mark.parametrize(
    "settings",
    [
        {"token": ""},
        {"token": 5},
        {"token": "secret "},
        {"token": "naïve"},
        {"origins": "https://a.example"},
        {"origins": ("https://a.example/",)},
        {"origins": ("a.example",)},
        {"origins": ("*",)},
        {"max_files": 0},
        {"max_body_bytes": "1MB"},
    ],
    ids=str,
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(NemoLfrError, match=r"secret|pass a tuple|not an origin|pass an integer"):
        Settings(**settings)
