"""Whole files over HTTP: `POST /v1/encode` and `POST /v1/decode`.

The engine processes files as background sessions, which wait for all live streams. Results equal those of a live
stream.
"""

import asyncio
import io
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.audio import AudioReader, resample
from nemo_lfr.io.token_file import Metadata, TokenStreamReader, TokenStreamWriter
from nemo_lfr.serve.engine import Engine
from nemo_lfr.serve.protocol import CloseCode, DecodeProtocol, End, ProtocolError, check_names, choice

T = TypeVar("T")

OPUS_RATE = 24000  # Hz; Opus supports 8, 12, 16, 24 and 48 kHz
_FORMATS: dict[str, tuple[str, str, str]] = {
    "wav": ("WAV", "PCM_16", "audio/wav"),
    "flac": ("FLAC", "PCM_16", "audio/flac"),
    "opus": ("OGG", "OPUS", "audio/ogg"),
}


async def encode_file(request: Request, engine: Engine, max_bytes: int) -> Response:
    """Encode the audio file in the body to a token file, or to JSON.

    Args:
        request: request whose URL parameter `format` is "lfr" (default) or "json".
        engine: engine that encodes the audio.
        max_bytes: maximum size of the body, in bytes.

    Returns:
        The token file; or JSON with `tokens` as a list of frames, `num_samples`, `sample_rate` and
        `samples_per_frame`.

    Raises:
        ProtocolError: if the body is too large, or a parameter is invalid.
        OverloadedError: if the engine has no room for another session.
        NemoLfrError: if the audio cannot be read or encoded.
    """
    check_names(request.query_params, {"format", "token"})
    kind = choice(request.query_params, "format", ("lfr", "json"))
    async with _spooled(request, max_bytes) as path:
        with (
            AudioReader(path, engine.codec.sample_rate, name="the body") as reader,
            engine.encoder(live=False) as session,
        ):
            tokens = await _through(session, _steps(reader.blocks()))
            num_samples = reader.samples_read
    if kind == "json":
        return JSONResponse({"tokens": tokens.T.tolist(), "num_samples": num_samples} | _rates(engine))
    file = io.BytesIO()
    writer = TokenStreamWriter(file, Metadata.of(engine.codec))
    writer.write(tokens)
    writer.finish(num_samples)
    return Response(file.getvalue(), media_type="application/octet-stream")


async def decode_file(request: Request, engine: Engine, max_bytes: int) -> Response:
    """Decode the token file in the body, or JSON with `tokens`, to an audio file.

    Args:
        request: request whose URL parameter `format` is "wav" (default), "flac" or "opus". A JSON body has the content
            type `application/json`.
        engine: engine that decodes the tokens.
        max_bytes: maximum size of the body, in bytes.

    Returns:
        The audio file at the codec's sample rate, or at 24 kHz for Opus. Samples are clipped to [-1, 1].

    Raises:
        ProtocolError: if the body is too large, or a parameter or the JSON is invalid.
        OverloadedError: if the engine has no room for another session.
        NemoLfrError: if the tokens cannot be read or decoded.
    """
    check_names(request.query_params, {"format", "token"})
    kind = choice(request.query_params, "format", tuple(_FORMATS))
    async with _spooled(request, max_bytes) as path:
        is_json = request.headers.get("content-type", "").partition(";")[0].strip() == "application/json"
        read = _read_json if is_json else _read_lfr
        tokens, num_samples = await asyncio.to_thread(read, path, engine)
    with engine.decoder(live=False) as session:
        audio = await _through(session, _steps(iter([tokens])), num_samples)
    return await asyncio.to_thread(_audio_response, audio, engine.codec.sample_rate, kind)


def _read_lfr(path: Path, engine: Engine) -> tuple[np.ndarray, int | None]:
    with path.open("rb") as file:
        reader = TokenStreamReader(file, "the body")
        reader.check_codec(engine.codec)
        blocks = list(reader.blocks())
    count = engine.codec.num_codebooks
    return np.concatenate([np.zeros((count, 0), np.int32), *blocks], axis=1).astype(np.int64), reader.num_samples


def _read_json(path: Path, engine: Engine) -> tuple[np.ndarray, int | None]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("the body is not UTF-8.") from None
    protocol = DecodeProtocol(engine.codec, {})
    tokens = protocol.parse(text)
    if isinstance(tokens, End):
        raise ProtocolError('expected {"tokens": [frame, ...]}.')
    fields = json.loads(text)
    end = protocol.parse(json.dumps({"type": "end", "num_samples": fields.get("num_samples")}))
    assert isinstance(end, End)
    return tokens, end.num_samples


def _audio_response(audio: np.ndarray, sample_rate: int, kind: str) -> Response:
    container, subtype, media_type = _FORMATS[kind]
    if kind == "opus":
        audio, sample_rate = resample(audio, sample_rate, OPUS_RATE), OPUS_RATE
    file = io.BytesIO()
    soundfile.write(file, audio.clip(-1, 1), sample_rate, format=container, subtype=subtype)
    return Response(file.getvalue(), media_type=media_type)


def _rates(engine: Engine) -> dict[str, Any]:
    return {"sample_rate": engine.codec.sample_rate, "samples_per_frame": engine.codec.samples_per_frame}


async def _through(session: Any, pieces: AsyncIterator[np.ndarray], num_samples: int | None = None) -> np.ndarray:
    """Feed all pieces to a session and return the concatenated results.

    Args:
        session: session to feed and to end.
        pieces: samples [n] or tokens [C, k].
        num_samples: for a decoder, the length of the original recording; None for complete frames.

    Returns:
        Tokens [C, T] or samples [T_audio].
    """

    async def feed() -> None:
        async for piece in pieces:
            await session.feed(piece)
        session.end(num_samples)

    feeder = asyncio.create_task(feed())
    results = []
    try:
        collecting = asyncio.create_task(session.collect())
        while True:
            await asyncio.wait(
                {feeder, collecting} if not feeder.done() else {collecting}, return_when="FIRST_COMPLETED"
            )
            if feeder.done():
                feeder.result()
            if collecting.done():
                if (result := collecting.result()) is None:
                    break
                results.append(result)
                collecting = asyncio.create_task(session.collect())
    finally:
        feeder.cancel()
        collecting.cancel()
        await asyncio.gather(feeder, collecting, return_exceptions=True)
    return np.concatenate(results, axis=-1) if results else session.empty_result()


async def _steps(iterator: Iterator[T]) -> AsyncIterator[T]:
    """Yield the items of a blocking iterator, which runs in worker threads."""
    end = object()
    step: Callable[..., Any] = next
    while (item := await asyncio.to_thread(step, iterator, end)) is not end:
        yield item


@asynccontextmanager
async def _spooled(request: Request, max_bytes: int) -> AsyncIterator[Path]:
    """Write the body to a temporary file and yield its path.

    Raises:
        ProtocolError: if the body has more than `max_bytes` bytes.
        NemoLfrError: if the body is empty.
    """
    with tempfile.TemporaryDirectory(prefix="nemo-lfr-") as folder:
        path = Path(folder, "body")
        size = 0
        with path.open("wb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise ProtocolError(f"the body is larger than {max_bytes} bytes.", CloseCode.TOO_BIG)
                file.write(chunk)
        if not size:
            raise NemoLfrError("the body is empty.")
        yield path
