"""Errors of a stream's connection."""

import asyncio

import pytest

pytest.importorskip("starlette")

from starlette.websockets import WebSocketDisconnect

from nemo_lfr.serve import streams


def test_a_connection_that_uvicorn_has_closed_is_a_disconnect():
    async def sending():
        raise RuntimeError("Unexpected ASGI message 'websocket.send', after sending 'websocket.close'.")

    with pytest.raises(WebSocketDisconnect):
        asyncio.run(streams._send(sending(), streams.StreamLimits()))
