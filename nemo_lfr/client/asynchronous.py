"""Client for asyncio (`AsyncClient`), and its streams."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_lfr.client.conversation import Conversation, SampleType
from nemo_lfr.client.files import AudioFormat, EncodedFile, ServerInfo, decode_tokens, encode_file, get_info
from nemo_lfr.client.server import RETRIED, Server, require_websockets
from nemo_lfr.client.sockets import closed_by, connect_options, handshake_error, ramp_of
from nemo_lfr.errors import ServerError

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncClient:
    """Client of a server, for asyncio; see `Client` for the arguments."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout: float = 60, retry_s: float = 0
    ) -> None:
        self._server = Server(url, token, timeout, retry_s)

    async def info(self) -> ServerInfo:
        """Return the codec and the limits of the server; see `Client.info`."""
        return await asyncio.to_thread(get_info, self._server)

    async def encode_file(self, audio: bytes | str | os.PathLike[str]) -> EncodedFile:
        """Encode an audio file; see `Client.encode_file`."""
        return await asyncio.to_thread(encode_file, self._server, audio)

    async def decode(self, tokens: Any, num_samples: int | None = None, *, audio_format: AudioFormat = "wav") -> bytes:
        """Decode tokens, and return the content of an audio file; see `Client.decode`."""
        return await asyncio.to_thread(decode_tokens, self._server, tokens, num_samples, audio_format)

    def decode_stream(
        self,
        *,
        lookahead: int | None = None,
        first_lookahead: int | None = None,
        ramp: Sequence[int] = (),
        sample_type: SampleType = "float32",
    ) -> "AsyncDecodeStream":
        """Return a stream that decodes one recording. Open the stream with `async with`.

        Args:
            lookahead: number of later frames that a result may depend on; None for the codec's full lookahead, which
                gives the same audio as decoding the whole recording.
            first_lookahead: a smaller lookahead for the first frames, so that the audio starts sooner; see
                `Codec.stream_decoder`.
            ramp: numbers of frames in the first chunks that the server decodes, such as (1, 2, 4). Small first chunks
                give the first audio sooner. By default, the first chunk has all frames that the first audio depends
                on.
            sample_type: type of the samples that the client receives, "float32" or "int16".
        """
        parameters = {"lookahead": lookahead, "first_lookahead": first_lookahead, "ramp": ramp_of(ramp)}
        return AsyncDecodeStream(self._server, Conversation(self._server, "decode", sample_type, **parameters))

    def encode_stream(self, *, sample_rate: int | None = None, lookahead: int | None = None) -> "AsyncEncodeStream":
        """Return a stream that encodes one recording. Open the stream with `async with`.

        Args:
            sample_rate: sample rate of the samples that you send, Hz; None for the sample rate of the codec.
            lookahead: number of later frames that a token may depend on; None for the codec's full lookahead, which
                gives the same tokens as encoding the whole recording.
        """
        parameters = {"sample_rate": sample_rate, "lookahead": lookahead}
        return AsyncEncodeStream(self._server, Conversation(self._server, "encode", "float32", **parameters))


class _AsyncStream:
    """Base class of streams. `async with` opens a stream, and raises the same errors as `Client.decode_stream`.

    Send the input in one task and receive the results in another one, or use `through`, which does both. If the client
    does not receive results, the server stops reading the input. After 20 s (by default), the server disconnects
    the client.

    Attributes:
        conversation: parser and formatter for the messages of the stream. When the stream is open, it also has the
            properties of the codec, such as `num_codebooks`.
    """

    _socket: Any = None

    def __init__(self, server: Server, conversation: Conversation) -> None:
        websockets = require_websockets()
        self._server, self.conversation = server, conversation
        self._connect, self._closed = websockets.asyncio.client.connect, websockets.exceptions.ConnectionClosed
        self._is_waiting_for_end = False

    async def __aenter__(self) -> "Self":
        waits = self._server.waits()
        while True:
            try:
                await self._open()
                return self
            except RETRIED:
                wait = next(waits, None)
                if wait is None:
                    raise
            await asyncio.sleep(wait)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _open(self) -> None:
        try:
            self._socket = await self._connect(self.conversation.address, **connect_options(self._server))
        except Exception as error:
            raise handshake_error(self._server, error) from error
        try:
            self.conversation.open(await self._receive(is_limited=True))
        except BaseException:
            await self.close()
            raise

    @property
    def sample_rate(self) -> int:
        """Sample rate of the codec, Hz."""
        return self.conversation.sample_rate

    @property
    def delay_frames(self) -> int:
        """Number of later frames that must arrive before the result for a frame is returned."""
        return self.conversation.delay_frames

    async def close(self) -> None:
        """Close the connection; results that have not arrived are lost."""
        if self._socket is not None:
            await self._socket.close()

    async def _send_items(self, items: Any) -> None:
        for message in self.conversation.messages(items):
            await self._send(message)

    async def _end(self, num_samples: int | None = None) -> None:
        await self._send(self.conversation.end(num_samples))
        self._is_waiting_for_end = True

    async def __aiter__(self) -> AsyncIterator[np.ndarray]:
        """Yield results as they arrive, until the last one.

        Yields:
            Samples [n] when decoding, tokens [C, k] when encoding.

        Raises:
            ServerError: if the server ends the stream or the connection is lost.
        """
        while not self.conversation.done:
            result = self.conversation.result(await self._receive())
            if result is not None:
                yield result

    async def through(self, source: AsyncIterator[Any], num_samples: int | None = None) -> AsyncIterator[np.ndarray]:
        """Send a whole recording in a background task, and yield the results.

        Args:
            source: pieces of the input, as for `send`.
            num_samples: for decoding, the length of the recording in samples. The audio is trimmed to this length;
                None for no trimming.

        Yields:
            Samples [n] when decoding, tokens [C, k] when encoding.

        Raises:
            ServerError: if the server ends the stream or the connection is lost.
            Exception: any error that `source` raises.
        """

        async def send() -> None:
            async for items in source:
                await self._send_items(items)
            await self._end(num_samples)

        sending = asyncio.create_task(send())
        # If sending fails, the connection is cut, so that the loop below ends.
        sending.add_done_callback(lambda task: _abort(self._socket) if _error_of(task) else None)
        try:
            async for result in self:
                yield result
        except ServerError:
            cause = _error_of(sending)
            if cause is None or isinstance(cause, ServerError):
                raise
            raise cause from None
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await sending

    async def _send(self, message: bytes | str) -> None:
        try:
            await self._socket.send(message)
        except self._closed as error:
            raise closed_by(self.conversation, error) from error

    async def _receive(self, is_limited: bool = False) -> bytes | str:
        limit = self._server.timeout
        while True:
            # Until the end of the input, the server may have nothing to send. Another task may send the end meanwhile.
            must_answer = self._is_waiting_for_end or is_limited
            try:
                message: bytes | str = await asyncio.wait_for(self._socket.recv(), limit)
            except asyncio.TimeoutError:
                if must_answer:
                    raise self.conversation.closed(None, f"no answer for {limit:g} s") from None
            except self._closed as error:
                raise closed_by(self.conversation, error) from error
            else:
                return message


def _error_of(task: "asyncio.Task[None]") -> BaseException | None:
    """Return the exception that ended a task; None if the task succeeded, was canceled or is running."""
    try:
        return task.exception()
    except (asyncio.CancelledError, asyncio.InvalidStateError):  # canceled, or still running
        return None


def _abort(socket: Any) -> None:
    """Close a connection without waiting for the server."""
    socket.transport.abort()


class AsyncDecodeStream(_AsyncStream):
    """Stream that decodes one recording; see `AsyncClient.decode_stream`."""

    async def send(self, tokens: Any) -> None:
        """Send tokens; wait while the server has enough input.

        Args:
            tokens: integers of shape [C, k], or [C] for one frame.

        Raises:
            TokensError: if the tokens are not valid.
            ServerError: if the server ends the stream or the connection is lost.
        """
        await self._send_items(tokens)

    async def end(self, num_samples: int | None = None) -> None:
        """End the recording; the server then sends the remaining audio.

        Args:
            num_samples: length of the recording in samples. The audio is trimmed to this length; None for no trimming.

        Raises:
            ServerError: if the server ends the stream or the connection is lost.
        """
        await self._end(num_samples)


class AsyncEncodeStream(_AsyncStream):
    """Stream that encodes one recording; see `AsyncClient.encode_stream`."""

    async def send(self, samples: Any) -> None:
        """Send samples; wait while the server has enough input.

        Args:
            samples: floating point in [-1, 1] or int16, shape [n].

        Raises:
            AudioError: if the samples are not valid.
            ServerError: if the server ends the stream or the connection is lost.
        """
        await self._send_items(samples)

    async def end(self) -> None:
        """End the recording; the server then sends the remaining tokens.

        Raises:
            ServerError: if the server ends the stream or the connection is lost.
        """
        await self._end()
