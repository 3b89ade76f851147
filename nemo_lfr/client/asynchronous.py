"""Client for asyncio (`AsyncClient`), and its streams."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_lfr.client.connection import Connection
from nemo_lfr.client.conversation import Conversation, SampleType
from nemo_lfr.client.files import AudioFormat, EncodedFile, ServerInfo, decode_tokens, encode_file, get_info
from nemo_lfr.client.properties import CodecProperties
from nemo_lfr.client.server import Server
from nemo_lfr.errors import ServerError

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncClient:
    """Client of `nemo-lfr serve`, for asyncio; see `Client` for the arguments."""

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
        """Return a stream that decodes one recording; see `Client.decode_stream` for the arguments and the errors.

        The stream connects to the server when you open it with `async with`.
        """
        return AsyncDecodeStream(
            self._server, Conversation.decoding(self._server, lookahead, first_lookahead, ramp, sample_type)
        )

    def encode_stream(self, *, sample_rate: int | None = None, lookahead: int | None = None) -> "AsyncEncodeStream":
        """Return a stream that encodes one recording; see `Client.encode_stream` for the arguments and the errors.

        The stream connects to the server when you open it with `async with`.
        """
        return AsyncEncodeStream(self._server, Conversation.encoding(self._server, sample_rate, lookahead))


class _AsyncStream(CodecProperties):
    """Base class of the streams of `AsyncClient`. A stream can be used once.

    `async with` opens a stream, and raises the same errors as `Client.decode_stream`. After a `ServerError`, all
    methods except `close` raise this error again.

    Send the input in one task and receive the results in another one, or use `through`, which does both. If the client
    does not receive results, the server stops reading input, and disconnects the client after 20 s (by default).
    """

    def __init__(self, server: Server, conversation: Conversation) -> None:
        self._conversation = conversation
        self._connection = Connection(server, conversation)

    async def __aenter__(self) -> "Self":
        await self._connection.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _property(self, name: str) -> int:
        return self._conversation._property(name)

    async def close(self) -> None:
        """Close the connection; results that have not arrived are lost. A second call has no effect."""
        await self._connection.close()

    def __aiter__(self) -> AsyncIterator[np.ndarray]:
        """Return an iterator that yields the results as they arrive, until the last one.

        Until the input ends, the iterator waits for each result without a time limit.

        Returns:
            Iterator over samples [n] when decoding, or tokens [C, k] when encoding. No result is empty.

        Raises:
            NemoLfrError: if the stream is not open, or if another task receives its results.
            ServerError: if the server ends the stream, sends an invalid message or does not answer in time, or if the
                connection is lost.
        """
        return self._connection.results()

    async def through(self, source: AsyncIterator[Any], num_samples: int | None = None) -> AsyncIterator[np.ndarray]:
        """Send a whole recording in a background task, and yield the results.

        Args:
            source: pieces of the input, as for `send`.
            num_samples: for decoding, the length of the recording in samples. The audio is trimmed to this length;
                None for no trimming.

        Yields:
            Samples [n] when decoding, tokens [C, k] when encoding.

        Raises:
            NemoLfrError: if the stream is not open, its input has ended, another task receives its results, or
                `num_samples` is not valid.
            ServerError: if the server ends the stream, sends an invalid message or does not answer in time, or if the
                connection is lost.
            Exception: any error that `source` raises.
        """
        self._conversation.check_input()

        async def send() -> None:
            async for items in source:
                await self._connection.send(items)
            await self._connection.end(num_samples)

        sending = asyncio.create_task(send())
        # If sending fails, the connection is cut, so that the loop below ends.
        sending.add_done_callback(lambda task: self._connection.abort() if _error_of(task) else None)
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


def _error_of(task: "asyncio.Task[None]") -> BaseException | None:
    """Return the exception that ended a task; None if the task succeeded, was canceled or is running."""
    try:
        return task.exception()
    except (asyncio.CancelledError, asyncio.InvalidStateError):  # canceled, or still running
        return None


class AsyncDecodeStream(_AsyncStream):
    """Stream that decodes one recording; see `AsyncClient.decode_stream`."""

    async def send(self, tokens: Any) -> None:
        """Send tokens. If the server has too much unprocessed input, wait.

        Args:
            tokens: integers of shape [C, k], or [C] for one frame.

        Raises:
            TokensError: if the tokens are not valid.
            NemoLfrError: if the stream is not open, or its input has ended.
            ServerError: if the server ends the stream or does not answer in time, or if the connection is lost.
        """
        await self._connection.send(tokens)

    async def end(self, num_samples: int | None = None) -> None:
        """End the recording; the server then sends the remaining audio.

        Args:
            num_samples: length of the recording in samples. The audio is trimmed to this length; None for no trimming.
                If `lookahead` or `first_lookahead` is 0, the server may already have sent the whole last frame. The
                caller must then trim the audio.

        Raises:
            NemoLfrError: if the stream is not open, its input has ended, or `num_samples` is not valid.
            ServerError: if the server ends the stream or does not answer in time, or if the connection is lost.
        """
        await self._connection.end(num_samples)


class AsyncEncodeStream(_AsyncStream):
    """Stream that encodes one recording; see `AsyncClient.encode_stream`."""

    async def send(self, samples: Any) -> None:
        """Send samples. If the server has too much unprocessed input, wait.

        Args:
            samples: floating point in [-1, 1] or int16, shape [n].

        Raises:
            AudioError: if the samples are not valid.
            NemoLfrError: if the stream is not open, or its input has ended.
            ServerError: if the server ends the stream or does not answer in time, or if the connection is lost.
        """
        await self._connection.send(samples)

    async def end(self) -> None:
        """End the recording; the server then sends the remaining tokens.

        Raises:
            NemoLfrError: if the stream is not open, or its input has ended.
            ServerError: if the server ends the stream or does not answer in time, or if the connection is lost.
        """
        await self._connection.end()
