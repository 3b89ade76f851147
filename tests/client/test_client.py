"""Tests of the clients against a server with a tiny codec: results, refused requests, limits and lost servers."""

import asyncio
import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.tiers import slow_after

pytest.importorskip("starlette", reason='the server: pip install starlette "uvicorn[standard]" prometheus_client')
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")

from nemo_lfr.client import AsyncClient, Client
from nemo_lfr.errors import (
    AudioError,
    NemoLfrError,
    ServerError,
    ServerFullError,
    ServerLostError,
    ServerRefusedError,
    ServerShutdownError,
    TokensError,
)
from nemo_lfr.serve.app import Settings
from nemo_lfr.serve.engine import Engine
from nemo_lfr.serve.session import EngineLimits
from nemo_lfr.serve.streams import StreamLimits
from tests.models import synthesize
from tests.serve.running import running


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def audio():
    return synthesize(0.5)


@pytest.fixture(scope="module")
def tokens(server, audio):
    return np.asarray(server.codec.encode(audio)[0][0])


MASKED = np.ma.masked_array(np.zeros((8, 3), int), np.eye(8, 3, dtype=bool))


POLL_S = 0.01  # stopping a server of Python takes up to this time, and by default 0.5 s


def client_of(server, **options):
    return Client(server.url(""), **options)


async def pieces(array, size):
    for start in range(0, array.shape[-1], size):
        yield array[..., start : start + size]


def decode(client, tokens, size, **options):
    with client.decode_stream(**options) as stream:
        parts = [stream.push(tokens[:, start : start + size]) for start in range(0, tokens.shape[1], size)]
        return np.concatenate([*parts, stream.flush()])


def decode_async(server, tokens, size, **options):
    async def work():
        async with AsyncClient(server.url("")).decode_stream(**options) as stream:
            return np.concatenate([part async for part in stream.through(pieces(tokens, size))])

    return asyncio.run(work())


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "options", slow_after(2, [{}, {"ramp": (1, 2, 4)}, {"lookahead": 50}, {"sample_type": "int16"}]), ids=str
)
def test_both_clients_decode_like_the_codec(server, tokens, size, options):
    expected = np.asarray(server.codec.decode(tokens[None])[0][0])
    for audio in (decode(client_of(server), tokens, size, **options), decode_async(server, tokens, size, **options)):
        assert audio.dtype == options.get("sample_type", "float32")
        scale = 32768 if audio.dtype == np.int16 else 1
        np.testing.assert_allclose(audio / scale, expected.clip(-1, 1), atol=1e-5 if scale == 1 else 1 / 16384)


@pytest.mark.parametrize("rate", [22050, 16000])
@pytest.mark.parametrize("dtype", slow_after(2, [np.float32, np.int16, np.float64]))
def test_both_clients_encode_like_the_codec(server, audio, rate, dtype):
    samples = np.rint(audio * 32767).astype(np.int16) if dtype == np.int16 else audio.astype(dtype)
    expected, _ = server.codec.encode(samples, sample_rate=rate)
    with client_of(server).encode_stream(sample_rate=rate) as stream:
        parts = [stream.push(samples[:3000]), stream.push(samples[3000:]), stream.flush()]

    async def work():
        async with AsyncClient(server.url("")).encode_stream(sample_rate=rate) as stream:
            sending = asyncio.create_task(stream.send(samples))
            await sending
            await stream.end()
            return [part async for part in stream]

    for received in (parts, asyncio.run(work())):
        assert np.array_equal(np.concatenate(received, axis=1), np.asarray(expected[0]))


@pytest.mark.slow
def test_files_are_encoded_and_decoded(server, audio, tokens, tmp_path):
    path = tmp_path / "speech.wav"
    soundfile.write(path, audio, 22050, subtype="FLOAT")
    client = client_of(server)
    encoded = client.encode_file(path)
    assert np.array_equal(encoded.tokens, tokens) and encoded.num_samples == len(audio)
    assert np.array_equal(client.encode_file(path.read_bytes()).tokens, tokens)
    for audio_format in ("wav", "flac", "opus"):
        content = client.decode(encoded.tokens, encoded.num_samples, audio_format=audio_format)
        result, rate = soundfile.read(io.BytesIO(content))
        assert abs(len(result) / rate - len(audio) / 22050) < 0.001

    async def work():
        other = AsyncClient(server.url("/"))
        return (await other.encode_file(path)).tokens, await other.decode(tokens), await other.info()

    other_tokens, content, info = asyncio.run(work())
    assert np.array_equal(other_tokens, tokens) and content == client.decode(tokens)
    assert info == client.info() and info.fingerprint == server.codec.fingerprint


@pytest.mark.slow
def test_a_push_longer_than_all_buffers_does_not_block(server, tokens, monkeypatch):
    monkeypatch.setattr("nemo_lfr.client.conversation._MAX_MESSAGE", 16)  # a frame
    limits = EngineLimits(max_pending_s=0.1, max_uncollected_s=0.1)
    with running(Settings(limits, StreamLimits(send_s=5))) as server:
        long = np.tile(tokens, (1, 3))
        assert decode(client_of(server), long, long.shape[1]).size == long.shape[1] * 1024
        assert decode_async(server, long, long.shape[1]).size == long.shape[1] * 1024


def test_an_empty_recording_has_an_empty_result(server):
    with client_of(server).decode_stream() as stream:
        assert stream.push(np.zeros((8, 0), int)).shape == (0,) and stream.flush().shape == (0,)
    with client_of(server).encode_stream() as stream:
        assert stream.push(np.zeros(0)).shape == (8, 0) and stream.flush().shape == (8, 0)


def test_an_empty_file_has_no_frames(server):
    content = io.BytesIO()
    soundfile.write(content, np.zeros(0), 22050, format="WAV")
    encoded = client_of(server).encode_file(content.getvalue())
    assert encoded.tokens.shape == (8, 0) and encoded.tokens.dtype == np.int32 and encoded.num_samples == 0
    assert len(soundfile.read(io.BytesIO(client_of(server).decode(encoded.tokens, 0)))[0]) == 0


@pytest.mark.parametrize(
    ("kind", "items", "error"),
    [
        ("decode", np.zeros((7, 3), int), TokensError),
        ("decode", np.zeros((8, 3)), TokensError),
        ("decode", np.full((8, 3), 2016), TokensError),
        ("decode", np.full((8, 3), -1), TokensError),
        ("decode", np.full((8, 3), 1 << 16), TokensError),  # would be 0 as int16
        ("decode", [[[1]]], TokensError),
        ("encode", np.zeros((1, 9), np.float32), AudioError),
        ("encode", np.zeros(9, np.int32), AudioError),
        ("encode", ["a"], AudioError),
        ("encode", np.ma.masked_array(np.zeros(9), [True] + [False] * 8), AudioError),
        ("decode", MASKED, TokensError),
        ("encode", np.full(9, np.nan), ServerRefusedError),
        ("encode", np.full(9, 1e30), ServerRefusedError),
    ],
)
def test_bad_input_is_an_error_of_both_clients(server, kind, items, error):
    with getattr(client_of(server), f"{kind}_stream")() as stream, pytest.raises(error):
        stream.push(items)
        stream.flush()

    async def source():
        yield items

    async def work():
        async with getattr(AsyncClient(server.url("")), f"{kind}_stream")() as stream:
            async for _ in stream.through(source()):
                pass

    with pytest.raises(error):
        asyncio.run(asyncio.wait_for(work(), 20))


def test_an_error_of_the_source_is_raised(server):
    async def source():
        yield np.zeros((8, 3), int)
        raise KeyError("sampler")

    async def work():
        async with AsyncClient(server.url("")).decode_stream() as stream:
            async for _ in stream.through(source()):
                pass

    with pytest.raises(KeyError, match="sampler"):
        asyncio.run(asyncio.wait_for(work(), 20))


def attempts(client, tokens):
    """Return every operation that a client can try on a server."""
    return {
        "info": client.info,
        "encode_file": lambda: client.encode_file(b"x"),
        "decode": lambda: client.decode(tokens),
        "decode_stream": lambda: decode(client, tokens, 9),
        "encode_stream": lambda: client.encode_stream().close(),
    }


def async_attempt(url, **options):
    async def work():
        async with AsyncClient(url, **options).decode_stream():
            pass

    return lambda: asyncio.run(work())


def check_all(url, tokens, error, match, skip=(), **options):
    calls = attempts(Client(url, **options), tokens) | {"async stream": async_attempt(url, **options)}
    for name, call in calls.items():
        if name not in skip:
            with pytest.raises(error, match=match) as caught:
                call()
            assert type(caught.value) is error, name
            assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_wrong_token_is_refused_and_the_right_one_is_not(tokens):
    with running(Settings(token="secret")) as server:
        check_all(server.url(""), tokens, ServerRefusedError, "token", token="secretive")
        check_all(server.url(""), tokens, ServerRefusedError, "token")
        client = client_of(server, token="secret")
        assert client.info().num_codebooks == 8 and decode(client, tokens, 9).size


@pytest.mark.slow
def test_a_full_server_is_an_error_unless_a_retry_succeeds(tokens):
    with running(Settings(EngineLimits(max_streams=1))) as server:
        with client_of(server).decode_stream() as only:
            check_all(server.url(""), tokens, ServerFullError, "at its limit of", skip=("info", "encode_file"))
            threading.Timer(0.3, only.close).start()
            started = time.monotonic()
            assert decode(client_of(server, retry_s=20), tokens, 9).size
            assert time.monotonic() - started < 10
        async_attempt(server.url(""), retry_s=20)()


@pytest.mark.slow
def test_a_server_that_shuts_down_refuses_with_a_clear_error(tokens):
    with running() as server, client_of(server).decode_stream() as stream:
        server.app.state.engine.draining = True
        check_all(server.url(""), tokens, ServerShutdownError, "shutting down", skip=("info", "encode_file"))
        stream.push(tokens[:, :5])
        assert stream.flush().size <= 5 * 1024


@pytest.mark.slow
def test_streams_ended_by_a_shutdown_raise_a_clear_error(tokens):
    with running() as server:
        stream = client_of(server).decode_stream()
        stream.push(tokens[:, :5])
    with pytest.raises(ServerShutdownError, match="shutting down"):
        stream.flush()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


def test_an_unreachable_server_raises_server_lost_error(tokens):
    check_all(f"http://127.0.0.1:{free_port()}", tokens, ServerLostError, "cannot be reached")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        check_all(url, tokens, ServerLostError, "cannot be reached|no answer", timeout=0.1)


class OtherServer(BaseHTTPRequestHandler):
    """A server that answers some requests with text or odd tokens, and others with 404."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200 if self.path.startswith(("/mounted/v1/info", "/odd/")) else 404)
        content = b'{"tokens": [[1], [2, 3]]}' if self.path.startswith("/odd/") else b"hi"
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    do_POST = do_GET

    def log_message(self, *_):
        pass


def test_a_redirect_is_refused_and_gets_no_token(server):
    class Redirecting(OtherServer):
        def do_GET(self):
            self.send_response(307)
            self.send_header("Location", server.url(self.path))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as other:
        threading.Thread(target=other.serve_forever, args=[POLL_S]).start()
        try:
            client = Client(f"http://127.0.0.1:{other.server_port}", token="secret")
            for call in (client.info, lambda: client.encode_file(b""), lambda: client.decode(np.zeros((8, 1), int))):
                with pytest.raises(ServerRefusedError, match=r"redirects to http.*; pass that address"):
                    call()
        finally:
            other.shutdown()


def test_another_server_is_recognized(tokens):
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherServer) as other:
        threading.Thread(target=other.serve_forever, args=[POLL_S]).start()
        url = f"http://127.0.0.1:{other.server_port}"
        try:
            check_all(url, tokens, ServerRefusedError, "404")
            with pytest.raises(ServerError, match="is it the address of"):
                Client(url + "/mounted/").info()
            with pytest.raises(ServerError, match="version is missing"):
                Client(url + "/odd").encode_file(b"")
        finally:
            other.shutdown()


INFO = {
    "version": "1", "model": "m", "fingerprint": "f", "sample_rate": 22050, "samples_per_frame": 1024,
    "frame_rate": 21.5, "num_codebooks": 2, "codebook_size": 16, "bit_rate": 172.0, "max_streams": 1,
    "max_message_bytes": 1, "max_body_bytes": 1000,
}  # fmt: skip
ENCODED = {"tokens": [[1, 2], [3, 4]], "num_samples": 2000, "sample_rate": 22050, "samples_per_frame": 1024}


def audio_of(audio_format, samples=2048, rate=22050, channels=1):
    content = io.BytesIO()
    kind = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}[audio_format]
    rate = 24000 if audio_format == "opus" else rate
    soundfile.write(content, np.zeros((samples, channels)), rate, kind[1], format=kind[0])
    return content.getvalue()


def response(body, kind="application/json", status="200 OK", length=None, more=""):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}\r\n"
    return [head.encode() + body]


def dripping(head):
    yield head
    while True:  # until the client closes the connection
        time.sleep(0.02)
        yield b"x"


def endless():
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"10000\r\n" + bytes(1 << 16) + b"\r\n"


@contextmanager
def answering(post, info=INFO):
    """Run a server that gives one answer to all POST requests, and `info` to GET requests."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection):
        with connection, suppress(OSError):
            head = connection.recv(1 << 16)
            for piece in response(info) if head.startswith(b"GET") and info is not None else post():
                connection.sendall(piece)

    def work():
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=work, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


HTML = b"<html>Please log in to the Wi-Fi</html>"
ANY = {  # wrong for every request
    "page": lambda: response(HTML, "text/html"),
    "page without a type": lambda: [b"HTTP/1.1 200 OK\r\n\r\n" + HTML],
    "list": lambda: response([]),
    "nothing": lambda: response(b""),
    "cut status line": lambda: [b"HTTP/1.1 200 O"],
    "cut body": lambda: response(b"RIFF", "audio/wav", length=5000),
    "deep": lambda: response(b"[" * 100_000),
    "slow head": lambda: dripping(b"HTTP/1.1 200 O"),
    "slow header": lambda: dripping(b"HTTP/1.1 200 OK\r\nA: "),
    "slow body": lambda: dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"),
    "cut chunks": lambda: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nRIFFx\r\n"],
    "slow error": lambda: dripping(b"HTTP/1.1 500 X\r\n\r\n"),
    "odd error": lambda: response({"error": {"a": 1}}, status="403 X"),
    "list of an error": lambda: response([1], status="401 X"),
    "redirect to a file": lambda: response(b"", status="302 Found", more="Location: file:///etc/passwd\r\n"),
    "not HTTP": lambda: [b"\0\xff\n\n"],
}


@pytest.mark.parametrize("name", ANY)
def test_another_program_is_never_taken_for_the_server(name):
    calls = {
        "info": (lambda client: client.info(), None),
        "encode": (lambda client: client.encode_file(b"x"), INFO),
        "decode": (lambda client: client.decode(np.zeros((2, 2), int)), INFO),
    }
    for call, info in calls.values():
        with answering(ANY[name], info) as url, pytest.raises(ServerError) as caught:
            call(Client(url, timeout=0.1))
        assert "\n" not in str(caught.value)

    async def work(url):
        await AsyncClient(url, timeout=0.1).decode(np.zeros((2, 2), int))

    with answering(ANY[name]) as url, pytest.raises(ServerError):
        asyncio.run(work(url))


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [[1, -5], [3, 4]]},
        {"tokens": [[1, 16], [3, 4]]},
        {"tokens": [[1, 2.5], [3, 4]]},
        {"tokens": [[1, 10**40], [3, 4]]},
        {"tokens": [[1, True], [3, 4]]},
        {"tokens": [[1, {}], [3, 4]]},
        {"tokens": {"0": [1, 2]}},
        {"tokens": [[1, math.nan], [3, 4]]},
        {"tokens": [[1], [1, 2]]},
        {"tokens": [[1, 2, 3], [1, 2, 3]]},
        {"tokens": []},
        {"tokens": "ab"},
        {"num_samples": -1},
        {"num_samples": 99_999},
        {"num_samples": 1024},
        {"num_samples": None},
        {"num_samples": True},
        {"num_samples": 2000.0},
        {"num_samples": math.nan},
        {"num_samples": 1 << 80},
        {"sample_rate": 44_100},
        {"samples_per_frame": "1024"},
    ],
    ids=str,
)
def test_tokens_that_cannot_be_of_the_codec_are_refused(change):
    with answering(lambda: response(ENCODED | change)) as url, pytest.raises(ServerError, match="is it the address"):
        Client(url).encode_file(b"x")


@pytest.mark.parametrize(
    "change",
    [
        {"sample_rate": "a"},
        {"num_codebooks": 0},
        {"model": None},
        {"model": "\x1b[2J"},
        {"bit_rate": -1},
        {"frame_rate": math.nan},
        {"frame_rate": math.inf},
        {"max_streams": True},
        {"samples_per_frame": 1024.0},
        {"codebook_size": 1 << 40},
        {"max_body_bytes": [[[[[[[1]]]]]]]},
        {"version": {}},
    ],
    ids=str,
)
def test_an_info_of_wrong_types_is_refused(change):
    with answering(list, INFO | change) as url, pytest.raises(ServerError, match="is it the address"):
        Client(url).info()


def replaced(old, new):
    return lambda pieces: [piece.replace(old, new) for piece in pieces]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (replaced(b"Content-Type", b"X-Type"), "does not answer with JSON|no content type, not audio"),
        (replaced(b"Content-Type: a", b"Content-Type: text/html; a"), "does not answer with JSON|not audio"),
        (replaced(b"Content-Length", b"X-Length"), "without the header Content-Length"),
        (replaced(b"200 OK", b"206 Partial Content"), "HTTP status 206"),
        (replaced(b"200 OK", b"204 No Content"), "HTTP status 204"),
        (lambda pieces: [piece[:-5] for piece in pieces], "cannot be reached or does not answer"),
    ],
)
def test_a_valid_body_in_a_wrong_answer_is_refused(change, match):
    calls = {
        lambda client: client.encode_file(b"x"): response(ENCODED),
        lambda client: client.decode(np.zeros((2, 2), int), audio_format="flac"): response(
            audio_of("flac"), "audio/flac"
        ),
    }
    for call, pieces in calls.items():
        with answering(lambda pieces=pieces: change(pieces)) as url, pytest.raises(ServerError, match=match):
            call(Client(url))


@pytest.mark.parametrize(
    ("status", "error"),
    [(502, ServerLostError), (504, ServerLostError), (429, ServerFullError), (503, ServerFullError)],
)
def test_a_proxy_that_does_not_reach_the_server_or_is_full_is_retried(status, error):
    answers = [response(b"<html>", "text/html", status=f"{status} X"), response(INFO)]
    with answering(lambda: answers.pop(0), info=None) as url:
        assert Client(url, retry_s=30).info().model == INFO["model"]
    broken = response(b"", status=f"{status} X")
    with answering(lambda: broken, info=None) as url:
        for call in (lambda: Client(url).info(), lambda: Client(url).encode_stream()):
            with pytest.raises(error, match=f"status {status}"):
                call()


def test_a_refused_file_is_named(tmp_path):
    path = tmp_path / "music.py"
    path.write_bytes(b"x")
    refusal = response({"error": "not audio."}, status="400 X")
    with answering(lambda: refusal) as url, pytest.raises(ServerRefusedError, match=r"music\.py: .*not audio"):
        Client(url).encode_file(path)


def test_json_with_a_repeated_key_is_refused():
    body = json.dumps(ENCODED).encode()[:-1] + b', "num_samples": 1500}'
    with answering(lambda: response(body)) as url, pytest.raises(ServerError, match="does not answer with JSON"):
        Client(url).encode_file(b"x")


@pytest.mark.parametrize("audio_format", ["wav", "flac", "opus"])
def test_only_the_requested_audio_is_returned(audio_format):
    def decode(content, num_samples=None, kind="audio/wav"):
        with answering(lambda: response(content, kind)) as url:
            return Client(url).decode(np.zeros((2, 2), int), num_samples, audio_format=audio_format)

    right = audio_of(audio_format)
    assert decode(right) == right and decode(right, 5000) == right
    wrong = [right[:-9], right[:30], bytes(len(right)), HTML]
    wrong += [audio_of(other) for other in ("wav", "flac", "opus") if other != audio_format]
    wrong += [audio_of(audio_format, channels=2)]
    if audio_format == "flac":
        wrong = wrong[1:]  # only decoding would find that its end is missing
    if audio_format == "wav":
        wrong += [right[:34] + bytes(2) + right[36:], right[:20] + b"\x02" + right[21:]]  # 0 bits, a compressed format
    if audio_format != "opus":
        wrong += [audio_of(audio_format, 2047), audio_of(audio_format, rate=44_100)]
        with pytest.raises(ServerError, match="2048 samples at 22050 Hz, not 2000"):
            decode(right, 2000)
    for content in wrong:
        with pytest.raises(ServerError, match="is it the address"):
            decode(content)
    with pytest.raises(ServerError, match="'text/html', not audio"):
        decode(right, kind="text/html")


def test_an_endless_answer_is_refused():
    with answering(endless) as url, pytest.raises(ServerError, match=r"more than \d+ bytes"):
        Client(url).decode(np.zeros((2, 2), int))


def relay(port, cut):
    """Forward one connection to a server until `cut` is set, and return the port to connect to."""
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source, target):
        while data := source.recv(1 << 16):
            target.sendall(data)

    def work():
        with listener, listener.accept()[0] as near, socket.create_connection(("127.0.0.1", port)) as far:
            for pair in ((near, far), (far, near)):
                threading.Thread(target=lambda pair=pair: _quietly(copy, *pair), daemon=True).start()
            cut.wait(20)
            for one in (near, far):
                one.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=work, daemon=True).start()
    return listener.getsockname()[1]


def _quietly(function, *arguments):
    with suppress(OSError):
        function(*arguments)


@pytest.mark.parametrize("kind", ["push", "flush", "async"])
def test_a_lost_connection_raises_an_error_with_the_progress(server, tokens, kind):
    cut = threading.Event()
    url = f"http://127.0.0.1:{relay(server.port, cut)}"

    def blocking():
        with Client(url).decode_stream() as stream:
            stream.push(tokens[:, :5])
            cut.set()
            while kind == "push":
                stream.push(tokens[:, :0])
                stream.push(tokens[:, :1])
            stream.flush()

    async def work():
        async def source():
            yield tokens[:, :5]
            cut.set()
            await asyncio.sleep(20)

        async with AsyncClient(url).decode_stream() as stream:
            async for _ in stream.through(source()):
                pass

    with pytest.raises(ServerLostError, match=r"was lost .* after \d+ frames were sent and \d+ samples received"):
        asyncio.run(asyncio.wait_for(work(), 20)) if kind == "async" else blocking()


def test_an_unresponsive_server_raises_server_lost_error(server, tokens, monkeypatch):
    release = threading.Event()
    advance = Engine._advance
    monkeypatch.setattr(Engine, "_advance", lambda *arguments: release.wait(20) and advance(*arguments))

    async def work():
        async with AsyncClient(server.url(""), timeout=0.3).decode_stream() as stream:
            await stream.send(tokens[:, :3])
            await stream.end()
            return [part async for part in stream]

    async def through():
        async with AsyncClient(server.url(""), timeout=0.3).decode_stream() as stream:
            return [part async for part in stream.through(pieces(tokens, 3))]

    try:
        with client_of(server, timeout=0.3).decode_stream() as stream, pytest.raises(ServerLostError, match=r"0\.3 s"):
            stream.flush()
        for attempt in (work, through):
            with pytest.raises(ServerLostError, match=r"0\.3 s"):
                asyncio.run(asyncio.wait_for(attempt(), 15))
    finally:
        release.set()


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "127.0.0.1:8000"},
        {"url": "ftp://a"},
        {"url": "http://"},
        {"url": "http://["},
        {"url": "http://a:99999"},
        {"url": "http://a/?b=c"},
        {"token": "s\u00e9cret"},
        {"token": "a\nb"},
        {"url": 5},
        {"url": None},
        {"url": "http://a b"},
        {"url": "http://\u4e2d.invalid"},
        {"url": "HTTPS://b\u00fccher.example:80/codec"},
        {"url": "http://stra\u00dfe.example"},
        {"url": "http://" + "a" * 70},
        {"url": "http://user:secret@127.0.0.1:1"},
        {"url": "ftp://user:secret@127.0.0.1"},
        {"token": 5},
        *({"timeout": value} for value in (0, -1, "5", None, True, math.nan, math.inf, 1e30)),
        *({"retry_s": value} for value in (-1, "5", math.nan)),
    ],
    ids=str,
)
def test_a_bad_argument_of_a_client_is_an_error(arguments):
    is_international = not str(arguments.get("url", "")).isascii()
    for kind in (Client, AsyncClient):
        with pytest.raises(NemoLfrError) as caught:
            kind(**arguments)
        assert "secret" not in str(caught.value)
        assert ("write the host in Punycode" in str(caught.value)) == is_international


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda client: client.decode(np.zeros((8, 1), int), 1.5), NemoLfrError),
        (lambda client: client.decode(np.zeros((8, 1), int), -1), NemoLfrError),
        (lambda client: client.decode(np.zeros((8, 1), int), audio_format="mp3"), NemoLfrError),
        (lambda client: client.decode([[1], [1, 2]]), TokensError),
        (lambda client: client.decode(MASKED), TokensError),
        (lambda client: client.decode([["a"]]), TokensError),
        (lambda client: client.encode_file(5), AudioError),
        (lambda client: client.encode_file("a\0.wav"), AudioError),
        (lambda client: client.encode_file("nowhere.wav"), AudioError),
        (lambda client: client.encode_file(""), AudioError),
        *(
            (lambda client, ramp=ramp: client.decode_stream(ramp=ramp), NemoLfrError)
            for ramp in (3, None, "124", (1, 2.5), (1, "2"))
        ),
    ],
)
def test_a_bad_argument_of_a_request_is_an_error(call, error):
    with pytest.raises(error) as caught:
        call(Client("http://127.0.0.1:1"))
    assert not isinstance(caught.value, ServerError) and "\n" not in str(caught.value)


@pytest.fixture(params=["pipe", "socket", "device", "folder", "pointer"])
def not_audio(request, tmp_path):
    """Return the path of a pipe, socket, device, folder or LFS pointer instead of an audio file."""
    path = tmp_path / "speech.wav"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))
    elif request.param == "device":
        path = Path("/dev/zero")
    elif request.param == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    return path


def test_only_regular_files_are_sent(not_audio):
    url = "http://127.0.0.1:1"
    for call in (Client(url).encode_file, lambda path: asyncio.run(AsyncClient(url).encode_file(path))):
        with pytest.raises(AudioError, match=r"not a regular file but|Git LFS pointer"):
            call(not_audio)


def test_a_file_larger_than_the_limit_of_the_server_is_not_read(tmp_path):
    path = tmp_path / "speech.wav"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with answering(lambda: response(ENCODED), INFO | {"max_body_bytes": 1000}) as url:
        for audio in (path, bytes(1001)):
            with pytest.raises(ServerRefusedError, match="bytes, more than 1000,"):
                Client(url).encode_file(audio)
        assert Client(url).encode_file(bytes(1000)).num_samples == 2000


def test_the_scheme_of_a_url_may_have_capitals(server, tokens):
    client = Client(server.url("").replace("http", "HTTP"))
    assert client.info().num_codebooks == 8 and decode(client, tokens, 9).size


def test_a_flushed_stream_refuses_input(server, tokens):
    with client_of(server).decode_stream() as stream:
        stream.flush()
        for call in (stream.flush, lambda: stream.push(tokens)):
            with pytest.raises(NemoLfrError, match="open another"):
                call()
    with pytest.raises(NemoLfrError, match="sample_type"):
        client_of(server).decode_stream(sample_type="mp3")
    with pytest.raises(ServerRefusedError, match="ramp"):
        client_of(server).decode_stream(ramp=(0,))


def test_a_missing_package_is_named():
    code = (
        "import sys; sys.modules['websockets'] = None\n"
        "import nemo_lfr.client, nemo_lfr.errors\n"
        "try: nemo_lfr.client.Client().decode_stream()\n"
        "except nemo_lfr.errors.MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install" in done.stdout and "websockets" in done.stdout


def test_a_client_imports_no_torch():
    code = "import nemo_lfr.client, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


NOT_COUNTS = (-1, True, False, 1.5, "16000", 1 << 63)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sample_rate", 0), *((name, value) for name in ("sample_rate", "lookahead") for value in NOT_COUNTS)],
)
def test_an_argument_that_is_not_a_count_is_refused(name, value):
    with pytest.raises(NemoLfrError, match=f"{name} is {value!r}; pass an integer of at least"):
        Client("http://127.0.0.1:9").encode_stream(**{name: value})
