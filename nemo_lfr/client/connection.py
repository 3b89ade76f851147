"""WebSocket connection of one stream, with time limits. `Client` and `AsyncClient` use it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from nemo_lfr.client.conversation import Conversation
from nemo_lfr.client.server import RETRIED, Server, require_websockets
from nemo_lfr.client.sockets import CLOSE_S, closed_by, connect_options, handshake_error
from nemo_lfr.errors import NemoLfrError, ServerError


class Connection:
    """Connection that sends the input of one stream and receives the results.

    All methods must run in the same event loop. One task may send while another one receives.

    Args:
        server: server to connect to.
        conversation: parser and formatter for the messages of the stream.
    """

    def __init__(self, server: Server, conversation: Conversation) -> None:
        websockets = require_websockets()
        self.conversation = conversation
        self._server = server
        self._connect, self._closed = websockets.asyncio.client.connect, websockets.exceptions.ConnectionClosed
        self._socket: Any = None
        self._watchdog = _Watchdog(server.timeout, self.abort)  # each attempt to connect gets a new one
        self._num_sending, self._is_receiving = 0, False

    async def open(self) -> None:
        """Connect to the server. If this fails, try again for up to `retry_s` seconds.

        Raises:
            NemoLfrError: if the stream was opened before.
            ServerError: if the server refuses the stream, fails or cannot be reached.
        """
        if self.conversation.opened or self.conversation.closed:
            raise NemoLfrError("this stream was already opened; open another stream.")
        waits = self._server.waits()
        while True:
            try:
                return await self._open()
            except RETRIED:
                wait = next(waits, None)
                if wait is None:
                    raise
            await asyncio.sleep(wait)

    async def _open(self) -> None:
        self._watchdog = _Watchdog(self._server.timeout, self.abort)
        try:
            connecting = self._connect(self.conversation.address, **connect_options(self._server))
            # As in HTTP requests, a redirect is an error, so that the access token stays with this server.
            connecting.process_redirect = lambda error: error
            self._socket = await connecting
        except Exception as error:
            raise handshake_error(self._server, error) from error
        try:
            with self._receiving():
                self.conversation.open(await self._receive())
        except BaseException:
            self.abort()
            raise

    async def send(self, items: Any) -> None:
        """Send a piece of input; see `Conversation.messages` for the argument and the errors."""
        for message in self.conversation.messages(items):
            await self._send(message)

    async def end(self, num_samples: int | None = None) -> None:
        """End the input; see `Conversation.end` for the argument and the errors."""
        await self._send(self.conversation.end(num_samples))

    async def results(self) -> AsyncIterator[np.ndarray]:
        """Yield the results that are not empty, until the last one.

        Raises:
            NemoLfrError: if the stream is not open, or if another task receives its results.
            ServerError: if the server ends the stream early, or if the connection is lost.
        """
        while not self.conversation.done:
            self.conversation.check_open()
            result = await self._next()
            if result is not None:
                yield result

    async def _next(self) -> np.ndarray | None:
        """Return the next result that is not empty; None if there are no more results."""
        try:
            with self._receiving():
                while True:
                    result = self.conversation.result(await self._receive())
                    if result is None:
                        await self._check_end()
                        return None
                    if result.size:
                        self._watchdog.restart()
                        return result
        except ServerError:
            self.abort()
            raise

    async def _check_end(self) -> None:
        """Wait up to `CLOSE_S` seconds for the server to close the connection.

        Raises:
            ServerError: if the server sends another message.
        """
        try:
            message = await asyncio.wait_for(self._socket.recv(), min(CLOSE_S, self._server.timeout))
        except (self._closed, asyncio.TimeoutError):
            return
        self.conversation.result(message)  # raises an error

    async def close(self) -> None:
        """Close the connection; results that have not arrived are lost. A second call has no effect."""
        self.conversation.closed = True
        if self._socket is not None:
            await self._socket.close()

    def abort(self) -> None:
        """Cut the connection without waiting for the server."""
        if self._socket is not None:
            self._socket.transport.abort()

    async def _send(self, message: bytes | str) -> None:
        self._num_sending += 1
        self._watch()
        try:
            await self._socket.send(message)
        except self._closed as error:
            if self.conversation.closed:  # by another task
                self.conversation.check_open()
            # Not recorded as the failure of the stream, because a message with the reason may still be unread.
            raise self.conversation.failure or self._lost(error) from error
        finally:
            self._num_sending -= 1
            self._watch()

    @contextmanager
    def _receiving(self) -> Iterator[None]:
        if self._is_receiving:
            raise NemoLfrError("two tasks receive the results of this stream; receive them in one task only.")
        self._is_receiving = True
        self._watch()
        try:
            yield
        finally:
            self._is_receiving = False
            self._watch()

    async def _receive(self) -> bytes | str:
        try:
            message: bytes | str = await self._socket.recv()
        except self._closed as error:
            if self.conversation.closed:  # by another task
                self.conversation.check_open()
            raise self.conversation.fail(self._lost(error)) from error
        return message

    def _watch(self) -> None:
        """Start the watchdog if this client is waiting for the server to read input or to answer; else stop it."""
        must_answer = not self.conversation.opened or self.conversation.ended  # else the server may owe no message
        self._watchdog.set(bool(self._num_sending) or (self._is_receiving and must_answer))

    def _lost(self, error: Any) -> ServerError:
        """Return the error for a connection that was closed before the last result arrived."""
        if self._watchdog.is_over:
            return self.conversation.lost(None, f"no answer for {self._server.timeout:g} s")
        return closed_by(self.conversation, error)


class _Watchdog:
    """Timer that calls a function when `seconds` seconds have passed.

    Attributes:
        is_over: whether the function was called.
    """

    def __init__(self, seconds: float, expire: Callable[[], None]) -> None:
        self.is_over = False
        self._seconds, self._expire = seconds, expire
        self._timer: asyncio.TimerHandle | None = None

    def set(self, is_running: bool) -> None:
        """Stop the timer if `is_running` is False; otherwise, start it unless it is running already."""
        if is_running and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)
        elif not is_running and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def restart(self) -> None:
        """Start the timer again from zero if it is running."""
        is_running = self._timer is not None
        self.set(False)
        self.set(is_running)

    def _end(self) -> None:
        self.is_over = True
        self._expire()
