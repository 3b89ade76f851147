"""Whole files over HTTP: `POST /v1/encode` and `POST /v1/decode`.

The engine processes files as background sessions: it takes a chunk of a file only when no live stream has input. The
results are the same as in a live stream.
"""

import asyncio
import codecs
import errno
import io
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import soundfile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from nemo_lfr.errors import AudioError, NemoLfrError, shorten
from nemo_lfr.io.audio import AudioReader, Resampler
from nemo_lfr.io.audio_writer import NO_EMPTY, SinkFile, to_int16
from nemo_lfr.io.token_file import Metadata, TokenStreamReader, TokenStreamWriter
from nemo_lfr.serve.engine import Engine
from nemo_lfr.serve.protocol import (
    CloseCode,
    DecodeProtocol,
    ProtocolError,
    check_keys,
    check_names,
    choice,
    parse_text,
)
from nemo_lfr.serve.session import Session
from nemo_lfr.serve.streams import StreamLimits
from nemo_lfr.serve.tasks import stop_tasks, within

T = TypeVar("T")

logger = logging.getLogger(__name__)

_PIECE = 1 << 18  # bytes to send at once
_FORM = "multipart/form-data"
_JSON = "application/json"
_HEAD = 64  # number of bytes that are read from the start of a body to recognize JSON
OPUS_RATE = 24000  # Hz; Opus only supports 8, 12, 16, 24 and 48 kHz
_FORMATS: dict[str, tuple[str, str, str]] = {
    "wav": ("WAV", "PCM_16", "audio/wav"),
    "flac": ("FLAC", "PCM_16", "audio/flac"),
    "opus": ("OGG", "OPUS", "audio/ogg"),
}


class MediaTypeError(NemoLfrError):
    """Raised if a body is compressed, is a form, or does not match its content type."""


class StorageError(NemoLfrError):
    """Raised if the server cannot write a temporary file."""


@contextmanager
def storing() -> Iterator[None]:
    """Log an error of writing a temporary file, and raise it as a `StorageError`.

    Raises:
        StorageError: if a temporary file cannot be written, for example because the disk is full.
    """
    try:
        yield
    except (OSError, AudioError) as error:
        # `AudioReader` copies some recordings to a temporary file. EINVAL is the error of a seek to an invalid
        # position, which a damaged recording causes.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno in (None, errno.EINVAL):
            raise
        logger.error("a temporary file cannot be written: %s", cause)
        raise StorageError(
            f"the server cannot write a temporary file ({cause.strerror}); check the server's folder for temporary "
            "files, or try again later."
        ) from error


async def encode_file(request: Request, engine: Engine, max_bytes: int, limits: StreamLimits) -> Response:
    """Encode the audio file in the body to a token file, or to JSON.

    Args:
        request: request whose URL parameter `format` is lfr (default) or json.
        engine: engine that encodes.
        max_bytes: maximum size of the body.
        limits: limits for the duration of the recording and the time without data.

    Raises:
        ProtocolError: if the body exceeds a limit, or a parameter is invalid.
        ClientDisconnect: if the client has closed the connection.
        NemoLfrError: if the audio cannot be read or encoded.
        OverloadedError: if the engine is at its limit of sessions or is shutting down.
    """
    check_names(request.query_params, {"format", "token"})
    kind = choice(request.query_params, "format", ("lfr", "json"))
    rate = engine.codec.sample_rate
    async with _spooled(request, max_bytes, limits) as path:
        with (
            await asyncio.to_thread(AudioReader, path, rate, name="the body") as reader,
            engine.encoder(live=False) as session,
        ):
            results = [session.empty_result()]
            await _through(request, session, _steps(_limited(reader.blocks(), limits, rate)), results.append)
            num_samples = reader.samples_read
    tokens = np.concatenate(results, axis=1)
    return await asyncio.to_thread(_tokens_response, tokens, num_samples, engine, kind)


async def decode_file(request: Request, engine: Engine, max_bytes: int, limits: StreamLimits) -> Response:
    """Decode the token file in the body, or JSON with `tokens`, to an audio file.

    Args:
        request: request whose URL parameter `format` is wav (default), flac or opus. The body is JSON if the content
            type is application/json, and a token file otherwise.
        engine: engine that decodes.
        max_bytes: maximum size of the body.
        limits: limits for the duration of the recording and the time without data.

    Raises:
        ProtocolError: if the body exceeds a limit, or a parameter is invalid.
        ClientDisconnect: if the client has closed the connection.
        NemoLfrError: if the tokens cannot be read or decoded.
        OverloadedError: if the engine is at its limit of sessions or is shutting down.
    """
    check_names(request.query_params, {"format", "token"})
    kind = choice(request.query_params, "format", tuple(_FORMATS))
    async with _spooled(request, max_bytes, limits) as path:
        read = _read_json if _media_type(request) == _JSON else _read_lfr
        tokens, num_samples = await asyncio.to_thread(read, path, engine, limits)
    audio = _AudioFile(engine.codec.sample_rate, kind)
    try:
        with engine.decoder(live=False) as session:
            await _through(request, session, _steps(iter([tokens])), audio.write, num_samples)
        return await asyncio.to_thread(audio.response)
    except BaseException:
        audio.close()
        raise


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_is_plain(request: Request) -> None:
    """Check that the body is the file itself.

    Raises:
        MediaTypeError: if the body is a form, or compressed.
    """
    if _media_type(request) == _FORM:
        raise MediaTypeError("the body is a form; send the file itself: curl --data-binary @FILE.")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise MediaTypeError(f"the body has the content encoding {shorten(encoding)}; send it uncompressed.")


def _limited(pieces: Iterable[np.ndarray], limits: StreamLimits, rate: float) -> Iterator[np.ndarray]:
    """Yield the pieces [..., k] of a recording unchanged, and check its duration.

    Args:
        pieces: consecutive samples or tokens.
        limits: limits with the maximum duration.
        rate: samples or frames per second.

    Raises:
        ProtocolError: if the recording is longer than `limits.max_seconds`.
    """
    num_items = 0
    for piece in pieces:
        num_items += piece.shape[-1]
        limits.check_duration(num_items, rate)
        yield piece


def _read_lfr(path: Path, engine: Engine, limits: StreamLimits) -> tuple[np.ndarray, int | None]:
    with path.open("rb") as file:
        if file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
            raise MediaTypeError(f"the body looks like JSON; send it with the header Content-Type: {_JSON}.")
        file.seek(0)
        reader = TokenStreamReader(file, "the body", remedy="Send the complete, intact file.")
        reader.check_codec(engine.codec)
        blocks = list(_limited(reader.blocks(), limits, engine.codec.frame_rate))
    count = engine.codec.num_codebooks
    return np.concatenate([np.zeros((count, 0), np.int32), *blocks], axis=1), reader.num_samples


def _read_json(path: Path, engine: Engine, limits: StreamLimits) -> tuple[np.ndarray, int | None]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows programs write a byte order mark
    except UnicodeDecodeError:
        raise ProtocolError(
            f"the body is not valid UTF-8; send JSON in UTF-8, or a token file without the content type {_JSON}."
        ) from None
    protocol = DecodeProtocol(engine.codec, {})
    fields, rates = parse_text(text, "the body"), _rates(engine)
    check_keys(fields, ("tokens", "num_samples", *rates), "the body")
    for key, rate in rates.items():
        value = fields.get(key)
        if value is not None and (type(value) is not int or value != rate):
            raise ProtocolError(
                f"{key} is {shorten(repr(value), 40)}, but the codec of this server has {rate}; send tokens of "
                "this codec."
            )
    (tokens,) = _limited([protocol.tokens_of(fields)], limits, engine.codec.frame_rate)
    return tokens, protocol.end_of(fields).num_samples


def _tokens_response(tokens: np.ndarray, num_samples: int, engine: Engine, kind: str) -> Response:
    if kind == "json":
        return JSONResponse({"tokens": tokens.T.tolist(), "num_samples": num_samples} | _rates(engine))
    file = io.BytesIO()
    writer = TokenStreamWriter(file, Metadata.of(engine.codec))
    writer.write(tokens)
    writer.finish(num_samples)
    return Response(file.getvalue(), media_type="application/octet-stream")


class _AudioFile:
    """Temporary audio file that is written piece by piece. The file has no name, so closing it removes it.

    Args:
        sample_rate: sample rate of the audio, Hz.
        kind: format of the file: "wav", "flac" or "opus".
    """

    def __init__(self, sample_rate: int, kind: str) -> None:
        container, subtype, self._media_type = _FORMATS[kind]
        rate = OPUS_RATE if kind == "opus" else sample_rate
        self._resampler = Resampler(sample_rate, rate) if rate != sample_rate else None
        self._kind, self._num_samples = kind, 0
        self._file = tempfile.TemporaryFile(prefix="nemo-lfr-")  # noqa: SIM115  the response still reads it
        self._sink = SinkFile(self._file)
        self._writer = soundfile.SoundFile(self._sink, "w", rate, 1, subtype, format=container)

    def write(self, audio: np.ndarray, last: bool = False) -> None:
        """Write samples [n]. With `last`, also write the samples that the resampler holds back.

        Raises:
            OSError: if the file cannot be written, for instance on a full disk.
        """
        if self._resampler is not None:
            audio = self._resampler.push(audio, last=last)
        with self._sink.raising():
            self._writer.write(audio.clip(-1, 1) if self._kind == "opus" else to_int16(audio))
        self._num_samples += len(audio)

    def response(self) -> Response:
        """Finish the file, and return a response that sends it.

        Raises:
            AudioError: if a FLAC or Opus file would contain no samples.
            OSError: if the file cannot be written, for instance on a full disk.
        """
        self.write(np.zeros(0, np.float32), last=True)
        with self._sink.raising():
            self._writer.close()
        if not self._num_samples and self._kind != "wav":
            raise AudioError(f"{NO_EMPTY.format(self._kind)}; use format=wav.")
        size = self._file.seek(0, io.SEEK_END)
        self._file.seek(0)
        headers = {"Content-Length": str(size)}
        return StreamingResponse(_pieces(self._file), headers=headers, media_type=self._media_type)

    def close(self) -> None:
        """Remove the file. `response` must not be called afterwards."""
        with suppress(OSError):  # closing writes the rest, which fails on a full disk
            self._file.close()


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of a file in pieces, and close the file at the end."""
    with file:
        while piece := file.read(_PIECE):
            yield piece


def _rates(engine: Engine) -> dict[str, Any]:
    return {"sample_rate": engine.codec.sample_rate, "samples_per_frame": engine.codec.samples_per_frame}


async def _through(
    request: Request,
    session: Session,
    pieces: AsyncIterator[np.ndarray],
    consume: Callable[[np.ndarray], None],
    num_samples: int | None = None,
) -> None:
    """Send a recording to a session, and call `consume` with each result in a worker thread.

    `num_samples` is the length of a recording to decode.

    Raises:
        ClientDisconnect: if the client has closed the connection.
    """

    async def feed() -> None:
        async for piece in pieces:
            await session.feed(piece)
        session.end(num_samples)

    async def collect() -> None:
        while (result := await session.collect()) is not None:
            await asyncio.to_thread(consume, result)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect

    collecting = asyncio.create_task(collect())
    tasks = {collecting, asyncio.create_task(feed()), asyncio.create_task(watch())}
    try:
        pending = tasks
        while collecting in pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises the error of a task that failed
    finally:
        await stop_tasks(tasks)


async def _steps(iterator: Iterator[T]) -> AsyncIterator[T]:
    """Yield the items of a blocking iterator, each of which is computed in a worker thread."""
    end = object()
    step: Callable[..., Any] = next
    while True:
        running = asyncio.create_task(asyncio.to_thread(step, iterator, end))
        try:
            item = await asyncio.shield(running)
        except asyncio.CancelledError:
            # Wait for the thread, because the caller closes the file next, and reading a closed file would crash.
            while not running.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            with suppress(BaseException):  # the caller was canceled and cannot handle an error
                running.result()
            raise
        if item is end:
            return
        yield item


@asynccontextmanager
async def _spooled(request: Request, max_bytes: int, limits: StreamLimits) -> AsyncIterator[Path]:
    """Write the body of a request to a temporary file, and remove the file when the context ends.

    Yields:
        The path of the file.

    Raises:
        ProtocolError: if the body has more than `max_bytes`, or no data arrives for `limits.idle_s`.
        MediaTypeError: if the body is a form, or compressed.
        NemoLfrError: if the body is empty.
        OSError: if the file cannot be written.
    """
    _check_is_plain(request)
    parts = request.stream()

    async def next_part() -> bytes | None:
        return await anext(parts, None)

    with tempfile.TemporaryDirectory(prefix="nemo-lfr-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "body")
        size = 0
        with path.open("wb") as file:
            while (part := await within(limits.idle_s, next_part(), "no data received")) is not None:
                size += len(part)
                if size > max_bytes:
                    raise ProtocolError(
                        f"the body is larger than {max_bytes} bytes, the server's limit; send a shorter file.",
                        CloseCode.TOO_BIG,
                    )
                file.write(part)
        if not size:
            raise NemoLfrError("the body is empty; send the content of a file.")
        yield path
