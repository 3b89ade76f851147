"""Tests of files over HTTP: limits, clients that disconnect, and reader threads."""

import asyncio
import errno
import io
import json
import resource
import socket
import tempfile
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import soundfile

pytest.importorskip("starlette", reason='the server: pip install starlette "uvicorn[standard]" prometheus_client')
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")

from nemo_lfr.io.audio import AudioReader
from nemo_lfr.serve import files
from nemo_lfr.serve.app import Settings
from nemo_lfr.serve.engine import Engine
from nemo_lfr.serve.streams import StreamLimits
from tests.models import synthesize
from tests.serve.running import running
from tests.serve.test_server import post, wav


@contextmanager
def posting(server, body, missing=0):
    """Send a request whose body lacks `missing` bytes, and yield its socket."""
    head = f"POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body) + missing}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        yield connection


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_recording_that_is_too_long_is_refused():
    with running() as server:
        _, lfr = post(server, "/v1/encode", wav(synthesize(1.0)))
    frames = json.dumps({"tokens": np.zeros((22, 8), int).tolist()}).encode()
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(22050), 22050, format="FLAC")
    with running(Settings(stream=StreamLimits(max_seconds=0.5))) as server:
        assert post(server, "/v1/encode", silence.getvalue())[0] == 413
        assert post(server, "/v1/decode", lfr)[0] == 413
        assert post(server, "/v1/decode", frames, **{"Content-Type": "application/json"})[0] == 413
        assert len(server.app.state.engine) == 0


@pytest.mark.slow
def test_a_body_that_stalls_is_refused():
    with running(Settings(stream=StreamLimits(idle_s=0.2))) as server, posting(server, b"x", missing=9) as connection:
        assert b" 408 " in connection.recv(1000).splitlines()[0]


def is_healthy(connection: socket.socket) -> bool:
    """Read the answer of /health, which may arrive in pieces."""
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(1000)
        assert part
        answer += part
    return answer.startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_a_connection_without_a_complete_request_is_closed():
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(Settings(stream=StreamLimits(idle_s=0.3))) as server:
        for complete, partial in ((b"", b""), (b"", b"GET /hea"), (request, b"GET /hea")):
            with socket.create_connection(("127.0.0.1", server.port), timeout=4) as connection:
                if complete:
                    connection.sendall(complete)
                    assert is_healthy(connection)
                connection.sendall(partial)
                while connection.recv(1000):
                    pass
        with socket.create_connection(("127.0.0.1", server.port), timeout=4) as connection:
            connection.sendall(request)
            assert is_healthy(connection)
            time.sleep(0.5)
            connection.sendall(request)
            assert is_healthy(connection)


CHUNKED = b"POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nR\r\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "more"),
    [
        pytest.param(b"GET /health HTTP/1.1\r\nX: ", b"a" * 10_000, id="one header"),
        pytest.param(b"GET /health HTTP/1.1\r\n", b"X: a\r\n" * 2000, id="headers"),
        pytest.param(b"GET /", b"a" * 10_000, id="path"),
        pytest.param(CHUNKED + b"0\r\nX: ", b"a" * 10_000, id="one trailer"),
        pytest.param(CHUNKED + b"0\r\n", b"X: a\r\n" * 2000, id="trailers"),
        pytest.param(CHUNKED + b"1;x=", b"a" * 10_000, id="chunk extension"),
    ],
)
def test_endless_headers_and_trailers_are_refused(start, more):
    with running() as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert is_healthy(connection)
        received = b""
        connection.sendall(start)
        with suppress(ConnectionError):
            for _ in range(1000):  # 10 MB
                connection.sendall(more)
                connection.settimeout(0.01)
                with suppress(TimeoutError):
                    received = connection.recv(1000)
                if received:
                    break
        assert received.startswith(b"HTTP/1.1 400")


@pytest.mark.slow
def test_more_files_than_the_limit_are_refused():
    with running(Settings(max_files=1)) as server:
        with posting(server, b"x", missing=9):
            wait_for(lambda: post(server, "/v1/encode", b"x")[0] == 503)
        wait_for(lambda: post(server, "/v1/encode", b"x")[0] == 400)


@pytest.mark.slow
def test_a_file_whose_client_has_left_is_not_computed(monkeypatch, caplog):
    step = Engine._advance

    def slow(self, *arguments):
        time.sleep(0.1)
        return step(self, *arguments)

    monkeypatch.setattr(Engine, "_advance", slow)
    with running() as server:
        engine = server.app.state.engine
        with posting(server, wav(np.zeros(120 * 22050, np.float32))):  # 65 s of steps
            wait_for(lambda: len(engine) == 1)
        wait_for(lambda: len(engine) == 0)
    assert "Exception" not in caplog.text


@pytest.mark.slow
def test_a_decoded_file_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 1000)
    audio = synthesize(3.0)
    for kind in files._FORMATS:
        file = files._AudioFile(22050, kind)
        for start in range(0, len(audio), 4096):
            file.write(audio[start : start + 4096])
        response = file.response()

        async def body(response=response):
            return [piece async for piece in response.body_iterator]

        pieces = asyncio.run(body())
        assert max(map(len, pieces)) == 1000
        assert int(response.headers["content-length"]) == sum(map(len, pieces))
        result, rate = soundfile.read(io.BytesIO(b"".join(pieces)))
        assert abs(len(result) / rate - 3.0) < 0.001


def mp3(audio):
    file = io.BytesIO()
    soundfile.write(file, audio, 22050, format="MP3")
    return file.getvalue()


@contextmanager
def full_disk(monkeypatch):
    """Fail to write files of more than 10,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def missing_folder(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/nowhere")
        yield


@contextmanager
def full_at_second_copy(monkeypatch):
    """Fail when the reader copies a recording that libsndfile must open by its name."""

    def fail(self, source):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(AudioReader, "_spool", fail)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "path", "reason"),
    [
        pytest.param(full_disk, "encode", "File too large", id="body"),
        pytest.param(full_disk, "decode?format=wav", "File too large", id="wav"),
        pytest.param(full_disk, "decode?format=flac", "File too large", id="flac"),
        pytest.param(full_disk, "decode?format=opus", "File too large", id="opus"),
        pytest.param(missing_folder, "encode", "No such file or directory", id="no folder"),
        pytest.param(missing_folder, "decode", "No such file or directory", id="no folder, decode"),
        pytest.param(full_at_second_copy, "encode", "No space left on device", id="copy of the body"),
    ],
)
def test_a_temporary_file_that_cannot_be_written_is_reported(monkeypatch, caplog, failing, path, reason):
    opened = []
    create = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: opened.append(create(**options)) or opened[-1])
    noise = np.random.default_rng(0).normal(size=44100).astype(np.float32) / 8
    with running() as server:
        body = bytes(100) + mp3(noise) if failing is full_at_second_copy else wav(noise)
        if "decode" in path:
            _, body = post(server, "/v1/encode", body)
        caplog.clear()
        with failing(monkeypatch):
            status, text = post(server, f"/v1/{path}", body)
        error = json.loads(text)
        assert (status, error["type"]) == (507, "StorageError") and f"({reason});" in error["error"]
        assert [record.levelname for record in caplog.records if not record.name.startswith("asyncio")] == ["ERROR"]
        assert all(file.closed for file in opened)  # an open file would still occupy the disk
        assert post(server, f"/v1/{path}", body)[0] == 200
    assert all(file.closed for file in opened)


@pytest.mark.slow
@pytest.mark.parametrize("kind", files._FORMATS)
def test_an_empty_recording_is_only_sent_as_wav(kind):
    with running() as server:
        headers = {"Content-Type": "application/json"}
        status, body = post(server, f"/v1/decode?format={kind}", b'{"tokens": []}', **headers)
    if kind == "wav":
        assert status == 200 and len(soundfile.read(io.BytesIO(body))[0]) == 0
    else:
        assert status == 400 and f"{kind} files cannot be empty; use format=wav".encode() in body


def test_a_thread_that_reads_is_awaited_when_its_task_is_canceled():
    reading, proceed = threading.Event(), threading.Event()

    def blocks():
        reading.set()
        proceed.wait(10)
        yield 1

    async def read():
        async for _ in files._steps(blocks()):
            pass

    async def work():
        task = asyncio.create_task(read())
        await asyncio.to_thread(reading.wait, 10)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
        proceed.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)

    asyncio.run(work())
