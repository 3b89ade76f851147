"""Whole files over HTTP: `POST /v1/encode` and `POST /v1/decode`.

The engine processes files as background sessions, which wait for all live streams. Results equal those of a live
stream.
"""

import asyncio
import io
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.audio import AudioReader, resample
from nemo_lfr.io.token_file import Metadata, TokenStreamReader, TokenStreamWriter
from nemo_lfr.serve.engine import Engine, Session
from nemo_lfr.serve.protocol import CloseCode, DecodeProtocol, ProtocolError, check_names, choice, parse_text
from nemo_lfr.serve.streams import StreamLimits
from nemo_lfr.serve.tasks import stop_tasks

T = TypeVar("T")

OPUS_RATE = 24000  # Hz; Opus supports 8, 12, 16, 24 and 48 kHz
_FORMATS: dict[str, tuple[str, str, str]] = {
    "wav": ("WAV", "PCM_16", "audio/wav"),
    "flac": ("FLAC", "PCM_16", "audio/flac"),
    "opus": ("OGG", "OPUS", "audio/ogg"),
}


async def encode_file(request: Request, engine: Engine, max_bytes: int, limits: StreamLimits) -> Response:
    """Encode the audio file in the body to a token file, or to JSON.

    Args:
        request: `format` is lfr (default) or json.
        engine: encodes.
        max_bytes: limit of the body.
        limits: limits of the recording and of the time between two parts of the body.

    Raises:
        ProtocolError: the body exceeds a limit, or a parameter is invalid.
        ClientDisconnect: the client has closed the connection.
        NemoLfrError: the audio cannot be read or encoded.
        OverloadedError: the engine is full.
    """
    check_names(request.query_params, {"format", "token"})
    kind = choice(request.query_params, "format", ("lfr", "json"))
    rate = engine.codec.sample_rate
    async with _spooled(request, max_bytes, limits) as path:
        with (
            await asyncio.to_thread(AudioReader, path, rate, name="the body") as reader,
            engine.encoder(live=False) as session,
        ):
            tokens = await _through(request, session, _steps(_limited(reader.blocks(), limits, rate)))
            num_samples = reader.samples_read
    return await asyncio.to_thread(_tokens_response, tokens, num_samples, engine, kind)


async def decode_file(request: Request, engine: Engine, max_bytes: int, limits: StreamLimits) -> Response:
    """Decode the token file in the body, or JSON with `tokens`, to an audio file.

    Args:
        request: `format` is wav (default), flac or opus; the content type of JSON is application/json.
        engine: decodes.
        max_bytes: limit of the body.
        limits: limits of the recording and of the time between two parts of the body.

    Raises:
        ProtocolError: the body exceeds a limit, or a parameter is invalid.
        ClientDisconnect: the client has closed the connection.
        NemoLfrError: the tokens cannot be read or decoded.
        OverloadedError: the engine is full.
    """
    check_names(request.query_params, {"format", "token"})
    kind = choice(request.query_params, "format", tuple(_FORMATS))
    async with _spooled(request, max_bytes, limits) as path:
        is_json = request.headers.get("content-type", "").partition(";")[0].strip() == "application/json"
        read = _read_json if is_json else _read_lfr
        tokens, num_samples = await asyncio.to_thread(read, path, engine, limits)
    with engine.decoder(live=False) as session:
        audio = await _through(request, session, _steps(iter([tokens])), num_samples)
    return await asyncio.to_thread(_audio_response, audio, engine.codec.sample_rate, kind)


def _limited(pieces: Iterable[np.ndarray], limits: StreamLimits, rate: float) -> Iterator[np.ndarray]:
    """Yield pieces [..., k] of a recording until it exceeds `max_seconds`; compressed silence is very long.

    Raises:
        ProtocolError: the recording is too long.
    """
    num_items = 0
    for piece in pieces:
        num_items += piece.shape[-1]
        if num_items > limits.max_seconds * rate:
            raise ProtocolError(f"the recording is longer than {limits.max_seconds:g} s.", CloseCode.TOO_BIG)
        yield piece


def _read_lfr(path: Path, engine: Engine, limits: StreamLimits) -> tuple[np.ndarray, int | None]:
    with path.open("rb") as file:
        reader = TokenStreamReader(file, "the body")
        reader.check_codec(engine.codec)
        blocks = list(_limited(reader.blocks(), limits, engine.codec.frame_rate))
    count = engine.codec.num_codebooks
    return np.concatenate([np.zeros((count, 0), np.int32), *blocks], axis=1).astype(np.int64), reader.num_samples


def _read_json(path: Path, engine: Engine, limits: StreamLimits) -> tuple[np.ndarray, int | None]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("the body is not UTF-8.") from None
    protocol = DecodeProtocol(engine.codec, {})
    fields = parse_text(text)
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


def _audio_response(audio: np.ndarray, sample_rate: int, kind: str) -> Response:
    container, subtype, media_type = _FORMATS[kind]
    if kind == "opus":
        audio, sample_rate = resample(audio, sample_rate, OPUS_RATE), OPUS_RATE
    file = io.BytesIO()
    soundfile.write(file, audio.clip(-1, 1), sample_rate, format=container, subtype=subtype)
    return Response(file.getvalue(), media_type=media_type)


def _rates(engine: Engine) -> dict[str, Any]:
    return {"sample_rate": engine.codec.sample_rate, "samples_per_frame": engine.codec.samples_per_frame}


async def _through(
    request: Request, session: Session, pieces: AsyncIterator[np.ndarray], num_samples: int | None = None
) -> np.ndarray:
    """Pass all pieces through a session, and return the concatenated results.

    Raises:
        ClientDisconnect: nobody waits for them any more.
    """
    results: list[np.ndarray] = []

    async def feed() -> None:
        async for piece in pieces:
            await session.feed(piece)
        session.end(num_samples)

    async def collect() -> None:
        while (result := await session.collect()) is not None:
            results.append(result)

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
    return np.concatenate(results, axis=-1) if results else session.empty_result()


async def _steps(iterator: Iterator[T]) -> AsyncIterator[T]:
    """Yield the items of a blocking iterator, which runs in worker threads."""
    end = object()
    step: Callable[..., Any] = next
    while True:
        running = asyncio.create_task(asyncio.to_thread(step, iterator, end))
        try:
            item = await asyncio.shield(running)
        except asyncio.CancelledError:
            # The caller closes the file next, which a thread that still reads it would not survive.
            while not running.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            with suppress(BaseException):  # its error comes too late
                running.result()
            raise
        if item is end:
            return
        yield item


@asynccontextmanager
async def _spooled(request: Request, max_bytes: int, limits: StreamLimits) -> AsyncIterator[Path]:
    """Write the body to a temporary file.

    Raises:
        ProtocolError: it has more than `max_bytes`, or stalls.
    """
    parts = request.stream()

    async def next_part() -> bytes | None:
        return await anext(parts, None)

    with tempfile.TemporaryDirectory(prefix="nemo-lfr-") as folder:
        path = Path(folder, "body")
        size = 0
        with path.open("wb") as file:
            while (part := await _before(next_part(), limits.idle_s)) is not None:
                size += len(part)
                if size > max_bytes:
                    raise ProtocolError(f"the body is larger than {max_bytes} bytes.", CloseCode.TOO_BIG)
                file.write(part)
        if not size:
            raise NemoLfrError("the body is empty.")
        yield path


async def _before(part: Awaitable[T], seconds: float) -> T:
    try:
        return await asyncio.wait_for(part, seconds)
    except asyncio.TimeoutError:
        raise ProtocolError(f"no part of the body for {seconds:g} s.", CloseCode.POLICY) from None
