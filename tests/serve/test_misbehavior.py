"""Tests that misbehaving connections do not change the audio of other streams, and leave no resources behind."""

import asyncio
import json
import os
import socket
import time
import urllib.request

import numpy as np
import pytest

pytest.importorskip("starlette", reason='the server: pip install starlette "uvicorn[standard]" prometheus_client')
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")

from benchmarks import misbehave
from nemo_lfr.serve.app import Settings
from nemo_lfr.serve.streams import StreamLimits
from tests.serve.running import running

COUNT = int(os.environ.get("NEMO_LFR_MISBEHAVE", "12"))  # connections of each kind
TOKENS = np.random.default_rng(0).integers(0, 2016, (8, 16))


@pytest.fixture(scope="module")
def server():
    limits = StreamLimits(idle_s=4, send_s=1)
    settings = Settings(stream=limits, token="secret", max_body_bytes=5 << 20)
    with running(settings, send_buffer=1 << 14) as server:  # a client that does not read fills it soon
        yield server


@pytest.fixture(scope="module")
def target(server):
    return misbehave.Target(server.port, "secret")


@pytest.fixture(scope="module")
def expected(server, target):
    """Return the audio of an undisturbed stream, and let the server create the resources that it keeps."""
    asyncio.run(misbehave.misbehave(target, list(misbehave.KINDS), 2 * len(misbehave.KINDS)))
    return asyncio.run(misbehave.decode(target, TOKENS, 0))


def resources(server):
    """Return the numbers of resources that connections use; tasks are counted in the server's event loop."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        "streams": len(server.app.state.engine),
        "tasks": len(asyncio.all_tasks(server.loop)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", misbehave.KINDS)
def test_a_good_stream_is_not_disturbed_and_nothing_is_left(server, target, expected, kind):
    wait_for(lambda: len(server.app.state.engine) == 0)
    before = resources(server)
    late, results = asyncio.run(misbehave.beside(target, [kind], COUNT, TOKENS, 0.005))
    assert not late
    for audio in results:
        np.testing.assert_allclose(audio, expected, atol=misbehave.TOLERANCE)
    wait_for(lambda: all(value <= before[name] for name, value in resources(server).items()))
    with urllib.request.urlopen(server.url("/health")) as response:
        assert json.load(response) == {"status": "ok", "streams": 0}


def empty_frames(opcode: int, count: int, is_last: bool = True) -> bytes:
    """Return empty WebSocket frames of a client."""
    return (bytes([opcode | 128 * is_last, 128]) + bytes(4)) * count


# More than 1,000 per second, even if they are received in two seconds. They fit into one packet.
FLOODS = {
    "pings": empty_frames(9, 2001),
    "pongs": empty_frames(10, 2001),
    "fragments": empty_frames(2, 1, is_last=False) + empty_frames(0, 2001, is_last=False),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_small_frames_ends_its_stream(server, name):
    head = (
        "GET /v1/decode/stream?token=secret HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode())
        received = b""
        while b'"ready"' not in received:
            received += connection.recv(1000)
        connection.sendall(FLOODS[name])
        while piece := connection.recv(1 << 16):
            received += piece
    assert b"\x03\xf0too many pings" in received  # close code 1008
    wait_for(lambda: len(server.app.state.engine) == 0)


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
