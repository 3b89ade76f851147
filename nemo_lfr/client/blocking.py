"""Blocking client (`Client`), and its streams."""

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nemo_lfr.client.connection import Connection
from nemo_lfr.client.conversation import Conversation, SampleType
from nemo_lfr.client.files import AudioFormat, EncodedFile, ServerInfo, decode_tokens, encode_file, get_info
from nemo_lfr.client.properties import CodecProperties
from nemo_lfr.client.server import Server
from nemo_lfr.errors import NemoLfrError, ServerError

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class Client:
    """Client of `nemo-lfr serve`.

    Several threads may use one client, but only one thread at a time may use a stream.

    Args:
        url: address of the server.
        token: access token, if the server requires one.
        timeout: maximum time in seconds to wait for a connection or a response. A large file or response may take
            longer if at least 64 kB are transferred per second. A method of a stream fails if the server neither reads
            input nor sends a result for `timeout` seconds.
        retry_s: number of seconds for which the client keeps trying to open a stream or to send a request while
            the server is full, is shutting down or cannot be reached.

    Raises:
        NemoLfrError: if an argument is not valid.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout: float = 60, retry_s: float = 0
    ) -> None:
        self._server = Server(url, token, timeout, retry_s)

    def info(self) -> ServerInfo:
        """Return the codec and the limits of the server.

        Raises:
            ServerError: if the server fails or cannot be reached.
        """
        return get_info(self._server)

    def encode_file(self, audio: bytes | str | os.PathLike[str]) -> EncodedFile:
        """Encode an audio file.

        Args:
            audio: path or content of the file.

        Raises:
            AudioError: if `audio` is neither bytes nor the path of a readable file, for example if the file does not
                exist.
            ServerError: if the server refuses the file, fails or cannot be reached.
        """
        return encode_file(self._server, audio)

    def decode(self, tokens: Any, num_samples: int | None = None, *, audio_format: AudioFormat = "wav") -> bytes:
        """Decode tokens, and return the content of an audio file.

        Args:
            tokens: integers, shape [C, T_encoded].
            num_samples: length of the recording in samples. The audio is trimmed to this length; None for no trimming.
            audio_format: "wav", "flac" or "opus".

        Raises:
            TokensError: if `tokens` is not a two-dimensional array of integers.
            NemoLfrError: if another argument is not valid.
            ServerError: if the server refuses the tokens, fails, cannot be reached or does not return the requested
                audio.
        """
        return decode_tokens(self._server, tokens, num_samples, audio_format)

    def decode_stream(
        self,
        *,
        lookahead: int | None = None,
        first_lookahead: int | None = None,
        ramp: Sequence[int] = (),
        sample_type: SampleType = "float32",
    ) -> "DecodeStream":
        """Open a stream that decodes one recording.

        Args:
            lookahead: number of later frames that a result may depend on; None for the codec's full lookahead, which
                gives the same audio as decoding the whole recording.
            first_lookahead: a smaller lookahead for the first frames, so that the audio starts sooner; at
                most `lookahead`. See `Codec.stream_decoder`.
            ramp: numbers of frames in the first chunks that the server decodes, such as (1, 2, 4). If you push frames
                one by one, the audio starts sooner with small first chunks. By default, the first chunk contains all
                frames that the first frame of audio depends on.
            sample_type: type of the samples that the client receives, "float32" or "int16".

        Raises:
            NemoLfrError: if an argument is not valid.
            MissingExtraError: if websockets is not installed.
            ServerError: if the server refuses the stream, fails or cannot be reached.
        """
        return DecodeStream(
            self._server, Conversation.decoding(self._server, lookahead, first_lookahead, ramp, sample_type)
        )

    def encode_stream(self, *, sample_rate: int | None = None, lookahead: int | None = None) -> "EncodeStream":
        """Open a stream that encodes one recording.

        Args:
            sample_rate: sample rate of the samples that you send, Hz; None for the sample rate of the codec.
            lookahead: number of later frames that a token may depend on; None for the codec's full lookahead, which
                gives the same tokens as encoding the whole recording.

        Raises:
            NemoLfrError: if an argument is not valid.
            MissingExtraError: if websockets is not installed.
            ServerError: if the server refuses the stream, fails or cannot be reached.
        """
        return EncodeStream(self._server, Conversation.encoding(self._server, sample_rate, lookahead))


class _Stream(CodecProperties):
    """Base class of the streams of `Client`. The constructor connects to the server.

    A separate thread receives results and enforces time limits, even while the calling thread is busy.

    A stream can be used once. After a `ServerError`, all methods except `close` raise this error again.
    """

    def __init__(self, server: Server, conversation: Conversation) -> None:
        self._conversation = conversation
        self._connection = Connection(server, conversation)
        self._results: deque[np.ndarray] = deque()
        self._in_use = threading.Lock()
        try:
            self._loop = _LoopThread()
        except OSError as error:
            raise server.lost(error, "close other streams or files.") from error
        weakref.finalize(self, self._loop.stop)  # for a stream that was not closed
        try:
            self._loop.run(self._connection.open())
            self._receiver = self._loop.run(_start(_receive_all(self._connection, self._results)))
        except BaseException:
            self._loop.stop()
            raise

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _property(self, name: str) -> int:
        return self._conversation._property(name)

    def close(self) -> None:
        """Close the connection; results that have not arrived are lost. A second call has no effect.

        After `close`, the other methods raise NemoLfrError.
        """
        if not self._conversation.closed:
            self._loop.run(self._connection.close())
            self._loop.stop()

    def _push(self, items: Any) -> np.ndarray:
        with self._exclusive():
            self._call(self._connection.send, items)
            return self._arrived()

    def _flush(self, num_samples: int | None = None) -> np.ndarray:
        with self._exclusive():
            self._call(self._connection.end, num_samples)
            self._loop.run(asyncio.wait([self._receiver]))
            result = self._arrived()
            self.close()
            return result

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Reserve the stream for this thread.

        Raises:
            NemoLfrError: if another thread uses the stream.
        """
        if not self._in_use.acquire(blocking=False):
            raise NemoLfrError(
                "another thread is using this stream; let only one thread push to a stream and flush it, and open a "
                "stream for each recording."
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _call(self, send: Callable[[Any], Coroutine[Any, Any, None]], argument: Any) -> None:
        """Run a method that sends input. If sending fails, raise the error that the server reported, if any."""
        self._conversation.check_input()
        try:
            self._loop.run(send(argument))
        except ServerError:
            # The connection is closed. The server may have sent the reason before.
            self._loop.run(asyncio.wait([self._receiver]))
            self._conversation.check_open()
            raise

    def _arrived(self) -> np.ndarray:
        """Return the results that have arrived, without waiting."""
        if self._conversation.failure is not None:
            raise self._conversation.failure
        results = [self._results.popleft() for _ in range(len(self._results))]
        return self._conversation.joined(results)


class DecodeStream(_Stream):
    """Stream that decodes one recording; see `Client.decode_stream`."""

    def push(self, tokens: Any) -> np.ndarray:
        """Send tokens, and return the audio that has arrived, without waiting for more.

        Args:
            tokens: integers of shape [C, k], or [C] for one frame.

        Returns:
            Samples [n] of type `sample_type`, float32 in [-1, 1] or int16; n may be 0.

        Raises:
            TokensError: if the tokens are not valid.
            NemoLfrError: if the stream is closed, or another thread is using it.
            ServerError: if the server ends the stream, sends an invalid message or stops reading, or if the connection
                is lost.
        """
        return self._push(tokens)

    def flush(self, num_samples: int | None = None) -> np.ndarray:
        """End the recording, wait for the remaining audio [n], and close the stream.

        Args:
            num_samples: length of the recording in samples. The audio is trimmed to this length; None for no trimming.
                If `lookahead` or `first_lookahead` is 0, the server may already have sent the whole last frame. The
                caller must then trim the audio.

        Raises:
            NemoLfrError: if the stream is closed, another thread is using it, or `num_samples` is not valid.
            ServerError: if the server ends the stream, sends an invalid message or does not answer in time, or if the
                connection is lost.
        """
        return self._flush(num_samples)


class EncodeStream(_Stream):
    """Stream that encodes one recording; see `Client.encode_stream`."""

    def push(self, samples: Any) -> np.ndarray:
        """Send samples, and return the tokens that have arrived, without waiting for more.

        Args:
            samples: floating point in [-1, 1] or int16, shape [n].

        Returns:
            Tokens [C, k] as int32; k may be 0.

        Raises:
            AudioError: if the samples are not valid.
            NemoLfrError: if the stream is closed, or another thread is using it.
            ServerError: if the server ends the stream, sends an invalid message or stops reading, or if the connection
                is lost.
        """
        return self._push(samples)

    def flush(self) -> np.ndarray:
        """End the recording, wait for the remaining tokens [C, k], and close the stream.

        Raises:
            NemoLfrError: if the stream is closed, or another thread is using it.
            ServerError: if the server ends the stream, sends an invalid message or does not answer in time, or if the
                connection is lost.
        """
        return self._flush()


async def _receive_all(connection: Connection, results: "deque[np.ndarray]") -> None:
    """Move all results of a stream to a queue. If receiving fails, the error is recorded in the `Conversation`."""
    with suppress(NemoLfrError):
        async for result in connection.results():
            results.append(result)


async def _start(coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Start a coroutine in the background, and return its task."""
    return asyncio.create_task(coroutine)


class _LoopThread:
    """Event loop in a daemon thread.

    Raises:
        OSError: if the event loop cannot be created, for example because too many files are open.
    """

    def __init__(self) -> None:
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="nemo_lfr.client", daemon=True)
        self._thread.start()
        self._started.result()

    def _run(self) -> None:
        main = self._main()
        try:
            asyncio.run(main)
        except Exception as error:  # such as OSError: too many open files
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            main.close()

    async def _main(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._started.set_result(None)
        await self._stopped.wait()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, and return its result.

        Raises:
            NemoLfrError: if the thread does not run, for example because the process was forked.
        """
        if not self._thread.is_alive():
            coroutine.close()
            raise NemoLfrError("this stream is closed, or was opened by another process; open another stream.")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # has an effect only if the call was interrupted

    def stop(self) -> None:
        """Cancel all coroutines and end the thread. A second call has no effect."""
        with suppress(RuntimeError):  # raised if the loop is closed
            self._loop.call_soon_threadsafe(self._stopped.set)
