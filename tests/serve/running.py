"""A running server with a tiny codec, and clients for it."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from nemo_lfr.serve.app import Settings, create_app
from nemo_lfr.serve.server import server_config
from tests.models import cached_codec


@dataclass(frozen=True)
class Running:
    """A server in a thread of this process."""

    app: Starlette
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def codec(self) -> Any:
        return self.app.state.engine.codec

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def connect(self, path: str, **options: Any) -> Any:
        return connect(f"ws://127.0.0.1:{self.port}{path}", proxy=None, compression=None, **options)


@contextmanager
def running(
    settings: Settings | None = None, kind: str = "symmetric", send_buffer: int | None = None, codec: Any = None
) -> Iterator[Running]:
    """Run a server on a free port, with `send_buffer` bytes for each connection in the kernel.

    The server has a tiny codec of this kind unless a codec is passed.
    """
    settings = settings or Settings()
    app = create_app(codec or cached_codec(kind), settings)
    bound = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = uvicorn.Server(server_config(app, settings))
    loops = []

    async def serve():
        loops.append(asyncio.get_running_loop())
        await server.serve([bound])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(app, bound.getsockname()[1], loops[0])
    finally:
        server.should_exit = True
        thread.join()


def tokens_message(tokens: np.ndarray) -> bytes:
    """Return tokens [C, k] as a message."""
    return np.ascontiguousarray(tokens.T).astype("<i2").tobytes()


def exchange(socket: Any, messages: list[bytes | str]) -> tuple[list[bytes], list[dict[str, Any]], int]:
    """Send all messages; return the binary messages, the JSON messages and the close code that arrive."""
    binary, texts = [], []
    with suppress(ConnectionClosedError):
        for message in messages:
            socket.send(message)
        for message in socket:
            if isinstance(message, bytes):
                binary.append(message)
            else:
                texts.append(json.loads(message))
    return binary, texts, socket.close_code
