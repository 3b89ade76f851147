"""Blocking client (`Client`), and its streams."""

import contextlib
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_lfr.client.conversation import Conversation, SampleType
from nemo_lfr.client.files import AudioFormat, EncodedFile, ServerInfo, decode_tokens, encode_file, get_info
from nemo_lfr.client.server import Server, require_websockets
from nemo_lfr.client.sockets import closed_by, connect_options, handshake_error, ramp_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Client:
    """Client of a server.

    Several threads may use one client, but only one thread may use a stream.

    Args:
        url: address of the server.
        token: access token, if the server requires one.
        timeout: maximum time in seconds to wait for a connection or a response. A large file may take longer if at
            least 64 kB arrive per second.
        retry_s: time in seconds for which the client keeps trying to open a stream or to send a file while the server
            is full, is shutting down or cannot be reached.

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
            AudioError: if `audio` is neither bytes nor the path of a regular file.
            FileNotFoundError: if the file does not exist.
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
            ServerError: if the server refuses the tokens, fails or cannot be reached.
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
            first_lookahead: a smaller lookahead for the first frames, so that the audio starts sooner; see
                `Codec.stream_decoder`.
            ramp: numbers of frames in the first chunks that the server decodes, such as (1, 2, 4). Small first chunks
                give the first audio sooner. By default, the first chunk has all frames that the first audio depends
                on.
            sample_type: type of the samples that the client receives, "float32" or "int16".

        Raises:
            MissingExtraError: if websockets is not installed.
            ServerError: if the server refuses the stream, fails or cannot be reached.
        """
        parameters = {"lookahead": lookahead, "first_lookahead": first_lookahead, "ramp": ramp_of(ramp)}
        return self._server.retry(
            lambda: DecodeStream(self._server, Conversation(self._server, "decode", sample_type, **parameters))
        )

    def encode_stream(self, *, sample_rate: int | None = None, lookahead: int | None = None) -> "EncodeStream":
        """Open a stream that encodes one recording.

        Args:
            sample_rate: sample rate of the samples that you send, Hz; None for the sample rate of the codec.
            lookahead: number of later frames that a token may depend on; None for the codec's full lookahead, which
                gives the same tokens as encoding the whole recording.

        Raises:
            MissingExtraError: if websockets is not installed.
            ServerError: if the server refuses the stream, fails or cannot be reached.
        """
        parameters = {"sample_rate": sample_rate, "lookahead": lookahead}
        return self._server.retry(
            lambda: EncodeStream(self._server, Conversation(self._server, "encode", "float32", **parameters))
        )


class _Stream:
    """Base class of streams. The constructor connects to the server."""

    def __init__(self, server: Server, conversation: Conversation) -> None:
        websockets = require_websockets()
        self._stack = contextlib.ExitStack()  # closes the connection, which is a context manager
        self._server, self._conversation = server, conversation
        self._closed: Any = websockets.exceptions.ConnectionClosed
        try:
            # The queue of received messages is unlimited. Otherwise a large `push` could deadlock: the server stops
            # reading input while its results are not received, and the client does not receive during the push.
            connection = websockets.sync.client.connect(
                conversation.address, max_queue=None, **connect_options(server)
            )
            self._socket: Any = self._stack.enter_context(connection)
        except Exception as error:
            raise handshake_error(server, error) from error
        try:
            conversation.open(self._receive(server.timeout))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def sample_rate(self) -> int:
        """Sample rate of the codec, Hz."""
        return self._conversation.sample_rate

    @property
    def samples_per_frame(self) -> int:
        """Number of samples per frame."""
        return self._conversation.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        """Number of tokens per frame."""
        return self._conversation.num_codebooks

    @property
    def delay_frames(self) -> int:
        """Number of later frames that must arrive before the result for a frame is returned."""
        return self._conversation.delay_frames

    def close(self) -> None:
        """Close the connection; results that have not arrived are lost."""
        self._stack.close()

    def _push(self, items: Any) -> np.ndarray:
        results = []
        for message in self._conversation.messages(items):
            self._send(message)
            results += self._arrived()
        return self._conversation.joined(results + self._arrived())

    def _flush(self, num_samples: int | None = None) -> np.ndarray:
        self._send(self._conversation.end(num_samples))
        results = []
        while (result := self._conversation.result(self._receive(self._server.timeout))) is not None:
            results.append(result)
        self.close()
        return self._conversation.joined(results)

    def _arrived(self) -> list[np.ndarray]:
        """Return the results that have arrived, without waiting."""
        results = []
        with contextlib.suppress(TimeoutError):
            while not self._conversation.done:
                result = self._conversation.result(self._receive(0))
                if result is not None:
                    results.append(result)
        return results

    def _send(self, message: bytes | str) -> None:
        try:
            self._socket.send(message)
        except self._closed:
            while True:  # the server may have sent the reason; `result` then raises an error with it
                self._conversation.result(self._receive(self._server.timeout))

    def _receive(self, timeout: float) -> bytes | str:
        """Return the next message.

        Raises:
            TimeoutError: if no message has arrived and `timeout` is 0.
            ServerError: if the connection is closed, or no message arrives for `timeout` seconds.
        """
        try:
            message: bytes | str = self._socket.recv(timeout)
        except TimeoutError:
            if timeout == 0:
                raise
            raise self._conversation.closed(None, f"no answer for {timeout:g} s") from None
        except self._closed as error:
            raise closed_by(self._conversation, error) from error
        return message


class DecodeStream(_Stream):
    """Stream that decodes one recording; see `Client.decode_stream`."""

    def push(self, tokens: Any) -> np.ndarray:
        """Send tokens, and return the audio that has arrived so far.

        This method does not wait for the audio of these tokens.

        Args:
            tokens: integers of shape [C, k], or [C] for one frame.

        Returns:
            Samples [n] in [-1, 1] as `sample_type`; n may be 0.

        Raises:
            TokensError: if the tokens are not valid.
            ServerError: if the server ends the stream or the connection is lost.
        """
        return self._push(tokens)

    def flush(self, num_samples: int | None = None) -> np.ndarray:
        """End the recording, and wait for the remaining audio [n].

        Args:
            num_samples: length of the recording in samples. The audio is trimmed to this length; None for no trimming.

        Raises:
            ServerError: if the server ends the stream or the connection is lost.
        """
        return self._flush(num_samples)


class EncodeStream(_Stream):
    """Stream that encodes one recording; see `Client.encode_stream`."""

    def push(self, samples: Any) -> np.ndarray:
        """Send samples, and return the tokens that have arrived so far.

        This method does not wait for the tokens of these samples.

        Args:
            samples: floating point in [-1, 1] or int16, shape [n].

        Returns:
            Tokens [C, k] as int32; k may be 0.

        Raises:
            AudioError: if the samples are not valid.
            ServerError: if the server ends the stream or the connection is lost.
        """
        return self._push(samples)

    def flush(self) -> np.ndarray:
        """End the recording, and wait for the remaining tokens [C, k].

        Raises:
            ServerError: if the server ends the stream or the connection is lost.
        """
        return self._flush()
