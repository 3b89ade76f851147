"""Tests of the server over real sockets: exact results, bad messages, limits, access, files and shutdown."""

import gzip
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from enum import IntEnum

import numpy as np
import pytest
import soundfile

from tests.tiers import slow_after

pytest.importorskip("starlette", reason='the server: pip install starlette "uvicorn[standard]" prometheus_client')
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from nemo_lfr.io.resampling import Resampler
from nemo_lfr.serve.app import Settings
from nemo_lfr.serve.engine import Engine
from nemo_lfr.serve.metrics import Metrics
from nemo_lfr.serve.server import server_config
from nemo_lfr.serve.session import EngineLimits
from nemo_lfr.serve.streams import StreamLimits
from tests.cli.test_cli import run
from tests.crash import ROOT
from tests.models import synthesize
from tests.serve.running import exchange, running, tokens_message

END = '{"type": "end"}'


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def tokens(server):
    return np.asarray(server.codec.encode(synthesize(1.0))[0][0])


def post(server, path, body, **headers):
    request = urllib.request.Request(server.url(path), body, headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wav(audio, rate=22050):
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def decoded(server, tokens, chunk, query="?audio=pcm_f32le"):
    with server.connect("/v1/decode/stream" + query) as socket:
        pieces = [tokens_message(tokens[:, start : start + chunk]) for start in range(0, tokens.shape[1], chunk)]
        binary, texts, code = exchange(socket, [*pieces, END])
    assert code == 1000 and texts[-1]["type"] == "done"
    return np.frombuffer(b"".join(binary), "<f4")


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://evil.example:8000", "evil.example:8000", 403),  # DNS rebinding: the page's own name points here
        ("http://[", "127.0.0.1:8000", 403),
        ("null", "", 403),
        ("http://localhost:8000", "localhost:8000", 400),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", 400),
        ("http://[::1]:8000", "[::1]:8000", 400),
        ("http://127.0.0.1:9000", "127.0.0.1:8000", 403),
    ],
)
def test_only_pages_of_an_address_are_of_the_same_origin(server, origin, host, status):
    assert post(server, "/v1/encode", b"", Origin=origin, Host=host)[0] == status


@pytest.mark.parametrize("token", ["", " ", "s\u00e9cret", "a\nb"])
def test_a_token_that_no_client_can_send_is_refused(capsys, monkeypatch, token):
    monkeypatch.setenv("NEMO_LFR_TOKEN", token)
    code, _, err = run(capsys, "serve", "--port", "0")
    assert code == 2 and "NEMO_LFR_TOKEN" in err


@pytest.mark.slow
@pytest.mark.parametrize("query", ["?audio=pcm_f32le", "?audio=pcm_f32le&ramp=1,2,4", "?audio=pcm_f32le&lookahead=50"])
@pytest.mark.parametrize("chunk", slow_after(1, [7, 1, 1000]))
def test_a_decoded_stream_equals_the_decoded_recording(server, tokens, chunk, query):
    expected = np.asarray(server.codec.decode(tokens[None])[0][0])
    np.testing.assert_allclose(decoded(server, tokens, chunk, query), expected, atol=1e-5)


@pytest.mark.parametrize("rate", [22050, 16000, 48000])
@pytest.mark.parametrize("form", ["pcm_f32le", "pcm_s16le"])
def test_an_encoded_stream_has_the_tokens_of_the_recording(server, rate, form):
    audio = synthesize(1.0, 3)[: round(rate * 0.7)]
    if form == "pcm_s16le":
        audio = np.rint(audio * 32767).astype("<i2")
    with server.connect(f"/v1/encode/stream?audio={form}&sample_rate={rate}&tokens=json") as socket:
        _, texts, code = exchange(
            socket, [audio[start : start + 999].tobytes() for start in range(0, len(audio), 999)] + [END]
        )
    expected, _ = server.codec.encode(audio, sample_rate=rate)
    received = [frame for text in texts for frame in text.get("tokens", [])]
    assert code == 1000 and texts[-1] == {"type": "done", "num_frames": len(received)}
    assert np.array_equal(np.array(received).T, np.asarray(expected[0]))


@pytest.mark.slow
def test_concurrent_streams_equal_single_streams(server, tokens):
    alone = [decoded(server, np.roll(tokens, number, axis=1), 5) for number in range(6)]
    together = [None] * 6

    def work(number):
        together[number] = decoded(server, np.roll(tokens, number, axis=1), 5)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)  # sums of a batch may be in another order


BAD = {
    "decode": [
        b"123",
        struct.pack("<8h", *[2016] * 8),
        struct.pack("<8h", *[-1] * 8),
        "not json",
        "[" * 100_000,
        "[]",
        "{}",
        '{"tokens": [[1, 2]]}',
        '{"tokens": [[1, 2, 3, 4, 5, 6, 7, 1e9]]}',
        '{"tokens": [[1, 2, 3, 4, 5, 6, 7, 99999999999999999999999]]}',
        '{"tokens": [[1, 2, 3, 4, 5, 6, 7, true]]}',
        '{"tokens": {"0": 1}}',
        '{"type": "end", "num_samples": -1}',
        '{"type": "end", "num_samples": 5.0}',
        '{"type": "end", "num_samples": 999999}',
        '{"type": "end", "tokens": [[1, 1, 1, 1, 1, 1, 1, 1]]}',
        '{"type": "end", "num_sample": 5}',
        '{"type": "end", "num_samples": 0, "num_samples": 0}',
        '{"tokens": [[1, 1, 1, 1, 1, 1, 1, 1]], "num_samples": 5}',
        '{"tokens": [[1, 1, 1, 1, 1, 1, 1, 1]], "tokens": []}',
    ],
    "encode": [
        b"123",
        struct.pack("<2f", float("nan"), 0),
        struct.pack("<f", 1e30),
        "text",
        '{"type": "done"}',
        '{"type": "end", "num_samples": 5}',
        '{"type": "end", "type": "end"}',
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    slow_after(2, [(kind, message) for kind in BAD for message in BAD[kind]], lambda row: (row[0], type(row[1]))),
)
def test_a_bad_message_ends_its_own_stream_with_the_reason(server, tokens, kind, message):
    with server.connect("/v1/decode/stream?audio=pcm_f32le") as other:
        other.send(tokens_message(tokens[:, :9]))
        with server.connect(f"/v1/{kind}/stream?audio=pcm_f32le") as socket:
            _, texts, code = exchange(socket, [message])
        assert code == 1007 and texts[-1]["type"] == "error" and texts[-1]["code"] == 1007 and texts[-1]["error"]
        binary, _, code = exchange(other, [tokens_message(tokens[:, 9:]), END])
    expected = np.asarray(server.codec.decode(tokens[None])[0][0])
    np.testing.assert_allclose(np.frombuffer(b"".join(binary), "<f4"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("query", "match"),
    [
        ("?lookahead=-1", "lookahead=-1 is not valid; pass an integer from 0 to 1000"),
        ("?lookahead=x", "lookahead=x is not valid"),
        ("?lookahead=3&first_lookahead=4", "first_lookahead is 4, but lookahead is only 3; pass"),
        ("?ramp=", "ramp= is not valid; pass integers from 1 to 64"),
        ("?ramp=0", "ramp=0 is not valid; pass integers from 1 to 64, separated by commas, such as ramp=1,2,4"),
        ("?ramp=1,,2", "ramp=1,,2 is not valid; pass integers from 1 to 64, separated by commas, such as ramp=1,2,4"),
        ("?ramp=1,1,1,1,1,1,1,1,1", "ramp has 9 chunks; pass at most 8"),
        ("?audio=mp3", "audio=mp3 is not valid"),
        ("?volume=1", "unknown parameter volume"),
        ("?ramp=1&ramp=2", "the parameter ramp is repeated"),
    ],
)
def test_a_bad_parameter_is_refused(server, query, match):
    with server.connect("/v1/decode/stream" + query) as socket:
        _, texts, code = exchange(socket, [])
    assert code == 1007 and match in texts[-1]["error"]


@pytest.mark.parametrize("message", [bytes(4096), END, "x"])
@pytest.mark.parametrize(("kind", "size"), [("encode", 1 << 18), ("decode", 1 << 12)])
def test_a_message_after_the_end_of_the_input_is_an_error(server, kind, size, message):
    with server.connect(f"/v1/{kind}/stream") as socket:
        _, texts, code = exchange(socket, [bytes(size), END, message])
    assert code == 1007 and "a message follows the end of the input; send" in texts[-1]["error"]


@pytest.mark.slow
def test_a_message_at_a_low_rate_is_resampled_piece_by_piece(server, monkeypatch):
    sizes = []
    push = Resampler.push

    def recorded(self, samples, last=False):
        result = push(self, samples, last=last)
        sizes.append(len(result))
        return result

    monkeypatch.setattr(Resampler, "push", recorded)
    with server.connect("/v1/encode/stream?sample_rate=100") as socket:
        _, texts, code = exchange(socket, [bytes(2 * 3000), END])  # 30 s
    assert code == 1000 and texts[-1]["num_frames"] == 646  # 30 * 22050 / 1024, rounded up
    assert max(sizes) < 10 * 22050  # at 100 Hz the resampler itself holds 8 s


def test_an_empty_recording_is_done_at_once(server):
    for kind, unit in (("decode", "num_samples"), ("encode", "num_frames")):
        with server.connect(f"/v1/{kind}/stream") as socket:
            binary, texts, code = exchange(socket, [END])
        assert (binary, texts[-1], code) == ([], {"type": "done", unit: 0}, 1000)


def test_files_are_encoded_and_decoded_like_streams(server):
    audio = synthesize(0.9, 5)
    expected, _ = server.codec.encode(audio)
    status, lfr = post(server, "/v1/encode", wav(audio))
    assert status == 200
    status, text = post(server, "/v1/encode?format=json", wav(audio))
    fields = json.loads(text)
    assert np.array_equal(np.array(fields["tokens"]).T, np.asarray(expected[0])) and fields["num_samples"] == len(
        audio
    )
    results = {}
    for kind in ("wav", "flac", "opus"):
        optional = json.dumps(fields | {"sample_rate": None, "samples_per_frame": None}).encode("utf-8-sig")
        as_json = {"Content-Type": "Application/JSON; charset=utf-8"}
        for body, headers in ((lfr, {}), (text, as_json), (optional, as_json)):
            status, data = post(server, f"/v1/decode?format={kind}", body, **headers)
            assert status == 200, data
            result, rate = soundfile.read(io.BytesIO(data))
            assert abs(len(result) / rate - len(audio) / 22050) < 0.001
            results.setdefault(kind, result)
            assert np.array_equal(results[kind], result)
    samples, _ = server.codec.decode(expected, audio_len=[len(audio)])
    for kind in ("wav", "flac"):
        assert np.abs(results[kind] - np.asarray(samples[0])).max() < 0.6 / 32768  # rounded, not truncated
    status, text = post(server, "/v1/decode", lfr[:-9])
    assert status == 400 and json.loads(text)["error"].endswith("truncated. Send the complete, intact file.")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/encode", b"", 400),
        ("/v1/encode", b"no audio", 400),
        ("/v1/decode", b"no tokens", 400),
        ("/v1/decode?format=mp3", b"x", 400),
        ("/v1/decode?x=1", b"x", 400),
        ("/v1/decode?format=wav&format=wav", b"x", 400),
        ("/v1/nothing", b"x", 404),
    ],
)
def test_a_bad_request_is_an_error_of_the_client(server, path, body, status):
    received, text = post(server, path, body)
    assert received == status and json.loads(text)["error"]


@pytest.mark.parametrize(
    ("path", "headers", "body", "status", "match"),
    [
        ("/v1/encode", {"Content-Type": "multipart/form-data; boundary=a"}, b"--a\r\n", 415, "--data-binary @FILE"),
        ("/v1/decode", {"Content-Type": "multipart/form-data; boundary=a"}, b"--a\r\n", 415, "--data-binary @FILE"),
        ("/v1/encode", {"Content-Encoding": "gzip"}, gzip.compress(b"RIFF", mtime=0), 415, "content encoding gzip"),
        ("/v1/decode", {}, b'{"tokens": []}', 415, "Content-Type: application/json"),
        ("/v1/decode", {"Content-Type": "text/plain"}, b'\xef\xbb\xbf\n {"tokens": []}', 415, "Content-Type: appl"),
        ("/v1/decode", {"Content-Type": "application/json"}, b"\x89lfr", 400, "a token file without"),
        *(
            ("/v1/decode", {"Content-Type": "application/json"}, b'{"tokens": [], ' + keys + b"}", 400, match)
            for keys, match in (
                (b'"num_sample": 0', "the body has the unknown key 'num_sample'; send only tokens, num_samples,"),
                (b'"format": "flac"', "the body has the unknown key 'format'"),
                (b'"type": "end"', "the body has the unknown key 'type'"),
                (b'"sample_rate": 16000', "sample_rate is 16000, but the codec of this server has 22050; send tokens"),
                (b'"sample_rate": 22050.0', "sample_rate is 22050.0, but the codec of this server has 22050; send"),
                (b'"samples_per_frame": 16', "samples_per_frame is 16, but the codec of this server has 1024"),
            )
        ),
        *(
            (f"{path}?volume=1", {}, None, 400, "unknown parameter volume; use token.")
            for path in ("/v1/info", "/health", "/metrics", "/openapi.json")
        ),
        ("/v1/info?token=a&token=b", {}, None, 400, "the parameter token is repeated"),
        ("/v1/encode/", {}, b"x", 404, "remove the slash"),
        ("/v1/decode/stream/", {}, b"x", 404, "remove the slash"),
    ],
)  # fmt: skip
def test_a_request_in_another_form_is_refused_with_the_remedy(server, path, headers, body, status, match):
    received, text = post(server, path, body, **headers)
    assert received == status and match in json.loads(text)["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"\xff",
        b'{"tokens": 1}',
        b'{"type": "end"}',
        b'{"tokens": [], "num_samples": 1}',
        b'{"tokens": [], "tokens": []}',
    ],
)
def test_bad_json_is_an_error_of_the_client(server, body):
    status, text = post(server, "/v1/decode", body, **{"Content-Type": "application/json"})
    assert status == 400 and '"end"' not in json.loads(text)["error"]
    assert "message" not in json.loads(text)["error"]  # a word of streams


@pytest.mark.slow
def test_streams_that_exceed_limits_are_ended(tokens):
    limits = StreamLimits(idle_s=0.3, max_seconds=0.5, max_message_bytes=2000)
    settings = Settings(EngineLimits(max_streams=2), limits, max_body_bytes=1000)
    with running(settings) as server:
        with server.connect("/v1/decode/stream") as socket:  # silent
            assert exchange(socket, [])[2] == 1008
        with server.connect("/v1/decode/stream") as socket:  # too long
            assert exchange(socket, [tokens_message(tokens[:, :20])])[2] == 1009
        with server.connect("/v1/encode/stream") as socket:  # too large
            assert exchange(socket, [b"\0" * 2002])[2] == 1009
        assert post(server, "/v1/encode", b"\0" * 1001)[0] == 413
        with server.connect("/v1/decode/stream") as one, server.connect("/v1/decode/stream") as two:
            assert json.loads(one.recv())["type"] == json.loads(two.recv())["type"] == "ready"
            with server.connect("/v1/decode/stream") as third:
                assert exchange(third, [])[2] == 1013
            assert post(server, "/v1/encode", wav(synthesize(0.01)))[0] == 503


@pytest.mark.slow
def test_client_that_does_not_read_is_disconnected_with_bounded_memory(tokens):
    limits = EngineLimits(max_pending_s=1, max_uncollected_s=1)
    with running(Settings(limits, StreamLimits(send_s=0.5, idle_s=30))) as server:
        message = tokens_message(np.tile(tokens, (1, 400)))  # 138 KB, and 35 MB of audio
        with (
            server.connect("/v1/decode/stream?audio=pcm_f32le", max_queue=1) as socket,
            pytest.raises(ConnectionClosed),
        ):
            for _ in range(1000):
                socket.send(message)
        engine = server.app.state.engine
        assert decoded(server, tokens, 5).size  # the server lives
        assert len(engine) == 0


@pytest.mark.slow
def test_client_with_delayed_pongs_is_not_disconnected(server, tokens, monkeypatch):
    """The server does not read while it has enough input, so pongs wait."""
    settings = Settings(EngineLimits(max_pending_s=0.1))
    monkeypatch.setattr("tests.serve.running.server_config", _with_fast_pings)
    step = Engine._advance

    def slow(self, *arguments):
        time.sleep(0.1)
        return step(self, *arguments)

    monkeypatch.setattr(Engine, "_advance", slow)
    with running(settings) as slow_server:
        assert decoded(slow_server, np.tile(tokens, (1, 2)), 8).size


def _with_fast_pings(app, settings):
    config = server_config(app, settings)
    config.ws_ping_interval = 0.1
    config.ws_ping_timeout = config.ws_ping_timeout and 0.1
    return config


def test_close_codes_are_numbers_in_metrics():
    metrics = Metrics()
    metrics.on_close(None, "decode", OldIntEnum.POLICY)
    assert 'code="1008"' in metrics.text().decode()


class OldIntEnum(IntEnum):
    """IntEnum whose members `str` converts to their names, as in Python 3.10."""

    POLICY = 1008

    def __str__(self):
        return "CloseCode.POLICY"


@pytest.mark.slow
def test_the_token_and_the_origin_are_checked():
    with running(Settings(token="secret", origins=("https://a.example",))) as server:
        assert post(server, "/v1/encode", b"x")[0] == 401
        assert post(server, "/v1/encode", b"x", Authorization="Bearer wrong")[0] == 401
        assert post(server, "/v1/encode?token=secret", b"x")[0] == 400
        assert post(server, "/v1/encode", b"x", Authorization="Bearer secret")[0] == 400
        assert urllib.request.urlopen(server.url("/health")).status == 200
        for origin, code in (("https://b.example", 1008), ("https://a.example", 1000), (server.url(""), 1000)):
            with server.connect("/v1/decode/stream?token=secret", origin=origin) as socket:
                assert exchange(socket, [END])[2] == code
        with server.connect("/v1/decode/stream?token=no") as socket:
            assert exchange(socket, [])[2] == 1008


@pytest.mark.slow
def test_metrics_and_info_describe_the_server(server, tokens):
    decoded(server, tokens, 4)
    text = urllib.request.urlopen(server.url("/metrics")).read().decode()
    assert 'nemo_lfr_streams_closed_total{code="1000",kind="decode"}' in text and "nemo_lfr_step_seconds_sum" in text
    fields = json.loads(urllib.request.urlopen(server.url("/v1/info")).read())
    assert fields["num_codebooks"] == 8 and fields["fingerprint"] == server.codec.fingerprint
    description = json.loads(urllib.request.urlopen(server.url("/openapi.json")).read())
    routes = {route.path for route in server.app.routes} - {"/openapi.json", "/", "/page", "/page/example.flac"}
    assert set(description["paths"]) == {path for path in routes if "stream" not in path}


@pytest.mark.slow
def test_sigterm_lets_open_streams_end_and_refuses_new_ones():
    command = [sys.executable, "-m", "nemo_lfr", "serve", "--port", "0", "--drain", "60", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = next(line for line in process.stderr if "serving at" in line)
        url = line.rpartition(" ")[2].strip()
        stream_url = url.replace("http", "ws") + "/v1/decode/stream"
        with connect(stream_url, proxy=None) as stream:
            assert json.loads(stream.recv())["type"] == "ready"
            process.send_signal(signal.SIGTERM)
            with pytest.raises(urllib.error.HTTPError, match="503"):
                while True:
                    urllib.request.urlopen(url + "/health")
            with connect(stream_url, proxy=None) as refused:
                assert exchange(refused, [])[2] == 1012
            _, texts, code = exchange(stream, [tokens_message(np.zeros((8, 20), np.int64)), END])
            assert code == 1000 and texts[-1]["num_samples"] == 20 * 1024
        out, _ = process.communicate()
        assert process.returncode == 0
        assert json.loads(out) == {"url": url, "num_streams": 1, "failures": []}
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_port_in_use_is_a_one_line_error(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run(capsys, "serve", "--port", port)
    assert (code, out) == (1, "") and f"the server cannot bind to 127.0.0.1:{port}" in err
