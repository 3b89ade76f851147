"""Tests of the JavaScript client in Node.js, against our server and against servers that break the protocol."""

import contextlib
import functools
import json
import math
import re
import shutil
import socket
import struct
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("starlette", reason='the server: pip install starlette "uvicorn[standard]" prometheus_client')
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")

from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.serve.app import Settings
from nemo_lfr.serve.session import EngineLimits
from nemo_lfr.serve.streams import StreamLimits
from nemo_lfr.web import PAGE
from tests.client.test_client import POLL_S, audio_of
from tests.crash import ROOT
from tests.models import synthesize
from tests.serve.running import running

NODE = shutil.which("node")


@functools.cache
def version() -> int:
    return int(subprocess.run([NODE, "--version"], capture_output=True, text=True).stdout[1:].split(".")[0])


pytestmark = pytest.mark.skipif(not NODE or version() < 20, reason="Node.js 20 or later is not installed")


# `outcome` returns null, or the class, the kind and the message of the error that an action causes.
HEAD = """
import { Client, InputError, ServerError } from "./page/client.js";
const report = (x) => console.log(JSON.stringify(x));
async function outcome(action) {
  try { await action(); } catch (error) { return [error.constructor.name, error.kind ?? "", error.message]; }
  return null;
}
"""


def run(folder: Path, code: str, **values) -> object:
    """Run a module that may use the client's exports and `values`, and return the value that it passes to `report`."""
    shutil.copytree(PAGE, folder / "page", dirs_exist_ok=True)
    (folder / "package.json").write_text('{"type": "module"}')
    script = folder / "script.js"
    lines = [f"const {name} = {json.dumps(value)};" for name, value in values.items()]
    script.write_text(HEAD + "\n".join(lines) + "\n" + code)
    flags = ["--experimental-websocket"] if version() < 22 else []
    done = subprocess.run([NODE, *flags, script], capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def server():
    with running(Settings(token="secret")) as server:
        yield server


DECODE = """
const client = new Client(url, { token: "secret" });
const stream = await client.decodeStream({ ramp: [1, 2] });
for (const frame of frames) stream.push(frame);
stream.end(numSamples);
const samples = [];
for await (const part of stream) samples.push(...part);
const whole = await client.decode(frames, { numSamples });
report([samples, stream.info.num_codebooks, whole.size, (await client.info()).codebook_size]);
"""
ENCODE = """
const client = new Client(url + "/", { token: "secret" });
const stream = await client.encodeStream({ sampleRate: 16000 });
stream.push(new Float32Array(samples));
stream.end();
const tokens = [];
for await (const part of stream) tokens.push(...part);
const { readFile } = await import("node:fs/promises");
report([tokens, (await client.encode(await readFile("speech.wav"))).tokens]);
"""


@pytest.mark.slow
def test_the_javascript_client_has_the_results_of_the_codec(server, tmp_path):
    audio = synthesize(0.4)
    tokens = np.asarray(server.codec.encode(audio)[0][0])
    expected = np.asarray(server.codec.decode(tokens[None])[0][0])[: len(audio)]
    values = {"url": server.url(""), "frames": tokens.T.tolist(), "numSamples": len(audio)}
    samples, num_codebooks, size, codebook_size = run(tmp_path, DECODE, **values)
    np.testing.assert_allclose(samples, expected, atol=1e-5)
    assert (num_codebooks, codebook_size, size) == (8, 2016, 44 + 2 * len(audio))

    soundfile.write(tmp_path / "speech.wav", audio, 22050, subtype="FLOAT")
    slow = audio[: len(audio) // 2]
    streamed, whole = run(tmp_path, ENCODE, url=server.url(""), samples=slow.tolist())
    expected, _ = server.codec.encode(slow, sample_rate=16000)
    assert np.array_equal(np.array(streamed).reshape(-1, 8).T, np.asarray(expected[0]))
    assert np.array_equal(np.array(whole).T, tokens)


ERRORS = """
const good = new Client(url, { token: "secret" });
const wrong = new Client(url, { token: "wrong" });
const gone = new Client("http://127.0.0.1:1");
const results = [
  await outcome(() => wrong.info()), await outcome(() => wrong.decodeStream()),
  await outcome(() => gone.info()), await outcome(() => gone.decodeStream()),
  await outcome(() => good.decode([[9999]])), await outcome(() => good.decodeStream({ ramp: [0] })),
];
const stream = await good.decodeStream();
results.push(await outcome(() => good.decodeStream()));
stream.push(new Int16Array(8 * 30));
results.push(await outcome(async () => { for await (const _ of stream); }));
results.push(await outcome(() => stream.push([])), await outcome(() => stream.end()));
report(results);
"""


def test_the_javascript_client_names_the_kind_of_an_error(tmp_path):
    with running(Settings(EngineLimits(max_streams=1), StreamLimits(max_seconds=1), token="secret")) as server:
        errors = run(tmp_path, ERRORS, url=server.url(""))
    assert {name for name, _, _ in errors} == {"ServerError"} and all(message for _, _, message in errors)
    kinds = ["refused", "refused", "lost", "lost", "refused", "refused", "full", "refused", "refused", "refused"]
    assert [kind for _, kind, _ in errors] == kinds


READY = {
    "type": "ready", "sample_rate": 100, "samples_per_frame": 4, "num_codebooks": 2, "codebook_size": 16,
    "lookahead_frames": 1,
}  # fmt: skip
ERROR = {"type": "error", "code": 1011, "error": "internal error"}
AUDIO = struct.pack("<12f", *range(12))
FRAMES = struct.pack("<6h", *range(6))


def without(message, key):
    return {name: value for name, value in message.items() if name != key}


def done(**count):
    return {"type": "done", **count}


# Kind of stream, messages of the server, and the expected error.
BAD_MESSAGES = {
    "text": ("decode", ["not json"], "a text message is not JSON"),
    "null": ("decode", ["null"], "null is not an object"),
    "list": ("decode", [[]], r"\[\] is not an object"),
    "deep list": ("decode", [READY, "[" * 9999], "not JSON"),
    "no type": ("encode", [READY, {"tokens": [[1, 2]]}], "type is missing"),
    "object as type": ("decode", [{"type": {"a": 1}}], r'type is {"a":1}, not text'),
    "unknown type": ("decode", [{"type": "constructor"}], 'a message of the unknown type "constructor"'),
    "two ready": ("decode", [READY, READY], 'a second message of type "ready"'),
    "audio first": ("decode", [AUDIO], 'a result before the message of type "ready"'),
    "done first": ("decode", [done(num_samples=0)], 'of type "done" before the end'),
    "early done": ("decode", [READY, done(num_samples=0)], 'of type "done" before the end'),
    "odd audio": ("decode", [READY, b"123"], "a binary message of 3 bytes, not a multiple of 4"),
    "NaN": ("decode", [READY, struct.pack("<f", math.nan)], "a sample is NaN"),
    "infinity": ("decode", [READY, struct.pack("<f", -math.inf)], "a sample is -Infinity"),
    "odd tokens": ("encode", [READY, FRAMES[:6]], "a binary message of 6 bytes, not a multiple of 4"),
    "large token": ("encode", [READY, struct.pack("<2h", 0, 16)], "a token is 16"),
    "negative token": ("encode", [READY, struct.pack("<2h", 0, -1)], "a token is -1"),
    "too much audio": ("decode", [READY, AUDIO], "12 samples arrived, but the input gives only 0"),
    "too many tokens": ("encode", [READY, FRAMES], "3 frames arrived, but the input gives only 0"),
    "object as code": ("decode", [READY, ERROR | {"code": {"a": 1}}], r'code is {"a":1}, not a non-negative integer'),
    "no code": ("decode", [without(ERROR, "code")], "code is missing"),
    "object as error": ("decode", [ERROR | {"error": {}}], "error is {}, not text"),
    "large codebook": ("encode", [READY | {"codebook_size": 65536}], "65536 entries, but this client supports"),
    **{
        f"{key} {value}": ("decode", [READY | {key: value}], f"{key} is .*, not a")
        for key in without(READY, "type")
        for value in ("5", -1, 1.5, True, None, {}, 1 << 60)
    },
    **{f"no {key}": ("decode", [without(READY, key)], f"{key} is missing") for key in without(READY, "type")},
    "NaN as rate": ("decode", [json.dumps(READY | {"sample_rate": math.nan})], "not JSON"),
    "infinity as rate": ("decode", [json.dumps(READY).replace("100", "1e999")], "sample_rate is Infinity, not an"),
}
# Kind of stream, its `numSamples`, messages after its input of 3 frames has ended, and the expected error.
BAD_ENDS = {
    "right": ("decode", None, [AUDIO, done(num_samples=12)], None),
    "right tokens": ("encode", None, [FRAMES, done(num_frames=3)], None),
    "trimmed": ("decode", 10, [AUDIO[:40], done(num_samples=10)], None),
    "not trimmed": ("decode", 10, [AUDIO, done(num_samples=12)], None),  # as the server does with a lookahead of 0
    "trimmed too much": ("decode", 10, [AUDIO[:32], done(num_samples=8)], "8 samples arrived, not 10"),
    "lost": ("decode", None, [AUDIO[:32], done(num_samples=12)], "reports 12 samples, but 8 samples arrived"),
    "lost tokens": ("encode", None, [FRAMES[:8], done(num_frames=3)], "reports 3 frames, but 2 frames arrived"),
    "too few": ("decode", None, [AUDIO[:32], done(num_samples=8)], "8 samples arrived, not 12"),
    "too few tokens": ("encode", None, [FRAMES[:8], done(num_frames=2)], "2 frames arrived, not 3"),
    "no count": ("decode", None, [AUDIO, done()], "num_samples is missing"),
    "wrong count": ("decode", None, [AUDIO, done(num_frames=3)], "num_samples is missing"),
    "text as count": ("decode", None, [AUDIO, done(num_samples="12")], 'num_samples is "12", not a non-negative'),
    "fraction": ("encode", None, [FRAMES, done(num_frames=3.5)], "num_frames is 3.5, not a non-negative"),
    "error": ("decode", None, [ERROR], "^internal error$"),
    "long error": ("decode", None, [ERROR | {"code": 4000, "error": "\n\x1b" + "a" * 999}], r"^a{500}\.\.\.$"),
}
STREAMS = """
const results = {};
for (const [name, [kind, numSamples, isEnded]] of Object.entries(rows)) {
  results[name] = await outcome(async () => {
    const stream = await new Client(url)[`${kind}Stream`]();
    if (isEnded) {
      stream.push(kind === "decode" ? new Int16Array(6) : new Float32Array(12));
      stream.end(numSamples);
    }
    for await (const _ of stream);
  });
}
report(results);
"""


@pytest.fixture(scope="module")
def stream_errors(tmp_path_factory):
    """Errors of the streams in `BAD_MESSAGES` and `BAD_ENDS`, which all run in one process."""
    from websockets.sync.server import serve

    rows = {name: (kind, None, False) for name, (kind, _, _) in BAD_MESSAGES.items()}
    rows |= {name: (kind, num_samples, True) for name, (kind, num_samples, _, _) in BAD_ENDS.items()}
    order = iter(rows)

    def answer(connection):
        def send(messages):
            for message in messages:
                connection.send(message if isinstance(message, bytes | str) else json.dumps(message))

        name = next(order)
        with contextlib.suppress(Exception):  # the client closes the connection
            send([READY] if name in BAD_ENDS else BAD_MESSAGES[name][1])
            while "end" not in str(connection.recv(timeout=50)):
                pass
            send(BAD_ENDS[name][2])
            connection.recv(timeout=50)

    with serve(answer, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        try:
            return run(tmp_path_factory.mktemp("streams"), STREAMS, url=url, rows=rows)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", [*BAD_MESSAGES, *BAD_ENDS])
def test_a_message_outside_the_protocol_ends_the_stream_with_an_error(stream_errors, name):
    expected = (BAD_MESSAGES.get(name) or BAD_ENDS[name])[-1]
    if expected is None:
        assert stream_errors[name] is None
        return
    error, kind, message = stream_errors[name]
    assert (error, kind) == ("ServerError", "refused" if name == "large codebook" else "fault")
    assert re.search(expected, message) and "\n" not in message
    assert "error" in name or "codebook" in name or "update this client or the server" in message


INFO = {
    "version": "1", "model": "m", "fingerprint": "f", "sample_rate": 22050, "samples_per_frame": 1024,
    "frame_rate": 21.5, "num_codebooks": 2, "codebook_size": 16, "bit_rate": 172.0, "encoder_lookahead": 5,
    "decoder_lookahead": 0, "max_streams": 1, "max_message_bytes": 1, "max_body_bytes": 1000,
}  # fmt: skip
ENCODED = {"tokens": [[1, 2], [3, 4]], "num_samples": 2000, "sample_rate": 22050, "samples_per_frame": 1024}
HTML = (200, "text/html", b"<html>Please log in to the Wi-Fi</html>")
JSON = "application/json"
WAV, FLAC, OPUS = (audio_of(audio_format) for audio_format in ("wav", "flac", "opus"))
CALLS = {
    "info": "client.info()",
    "encode": "client.encode(new Uint8Array(9))",
    "file": "client.encodeToTokenFile(new Blob(['a']))",
    "wav": "client.decode([[1, 2], [3, 4]])",
    "short": "client.decode([[1, 2], [3, 4]], { numSamples: 2000 })",
    "flac": "client.decode([[1, 2], new Int32Array(2)], { format: 'flac' })",
    "opus": "client.decode(new ArrayBuffer(9), { format: 'opus' })",
}
# Status of a proxy that is at its limit or does not reach the server
PROXY_KINDS = {429: "full", 502: "lost", 503: "full", 504: "lost"}
# Call, status, content type and body of the answer, and the expected error; None for a valid answer.
ANSWERS = [
    *((call, *HTML, "text/html.*, not audio|with JSON|with a token file") for call in CALLS),
    *((call, 200, None, HTML[2], "no content type, not audio|with JSON|with a token file") for call in CALLS),
    *((call, 204, JSON, b"", "status 204") for call in CALLS),
    *((call, 500, JSON, b"null", "status 500") for call in CALLS),
    *((call, status, "text/html", b"<html>", f"status {status}") for call in CALLS for status in PROXY_KINDS),
    ("info", 403, JSON, {"error": {"a": 1}}, "status 403"),
    ("info", 401, JSON, [1], "status 401"),
    ("info", 400, JSON, {"error": "a\nb"}, "^a b$"),
    ("info", 200, JSON, b"[" * 99_999, "with JSON"),
    ("info", 200, JSON, b" " * (1 << 20) + json.dumps(INFO).encode(), "answers with more than 1048576 bytes"),
    ("info", 400, JSON, json.dumps({"error": "a" * 100_000}).encode(), "status 400"),
    ("wav", 200, "audio/wav", WAV + bytes((1 << 20) + (2 << 16)), "answers with more than 1179648 bytes"),
    ("info", 200, JSON, [], r"\[\] is not an object"),
    ("info", 200, "text/plain", INFO, "with JSON"),
    ("info", 200, JSON + "; charset=utf-8", INFO, None),
    *(("info", 200, JSON, without(INFO, key), f"{key} is missing") for key in INFO),
    *(("info", 200, JSON, INFO | {key: {}}, f"{key} is {{}}, not") for key in INFO),
    *(("info", 200, JSON, INFO | {"sample_rate": rate}, "sample_rate is") for rate in (0, -1, 1.5, "a", 1 << 40)),
    ("info", 200, JSON, INFO | {"model": "\x1b[2J"}, "model is .*, not printable text"),
    ("info", 200, JSON, INFO | {"frame_rate": math.nan}, "with JSON"),
    ("encode", 200, JSON, ENCODED, None),
    *(
        ("encode", 200, JSON, ENCODED | {"tokens": tokens}, "frames of 2 integers from 0 to 15|is .*, not a list")
        for tokens in ([[1, -5], [3, 4]], [[1, 16], [3, 4]], [[1, 2.5], [3, 4]], [[1, True], [3, 4]], [[1], [3]], "ab")
    ),
    *(
        ("encode", 200, JSON, ENCODED | {"num_samples": count}, "frames for|num_samples is .*, not a")
        for count in (-1, 99_999, 1024, None, "2000", True, 1 << 80)
    ),
    ("encode", 200, JSON, ENCODED | {"sample_rate": 44_100}, "than /v1/info reports"),
    ("encode", 200, JSON, without(ENCODED, "samples_per_frame"), "samples_per_frame is missing"),
    ("file", 200, "application/octet-stream", b"LFRT...", None),
    ("file", 200, "text/plain", b"LFRT...", "with a token file"),
    ("file", 200, "application/octet-stream", b"LFR", "with a token file"),
    ("wav", 200, "audio/wav", WAV, None),
    ("flac", 200, "audio/flac", FLAC, None),
    ("opus", 200, "application/ogg", OPUS, None),
    ("short", 200, "audio/wav", audio_of("wav", 2000), None),
    ("short", 200, "audio/wav", WAV, "2048 samples at 22050 Hz, not 2000 at 22050 Hz"),
    ("wav", 200, "audio/wav", audio_of("wav", 2047), "2047 samples at 22050 Hz, not 2048 at 22050 Hz"),
    ("flac", 200, "audio/flac", audio_of("flac", 2047), "2047 samples at 22050 Hz, not 2048 at 22050 Hz"),
    ("wav", 200, "audio/wav", audio_of("wav", rate=44_100), "2048 samples at 44100 Hz, not"),
    *(
        (call, 200, f"audio/{call}", audio_of(call, channels=2), f"a {name} file with 2 channels, not 1")
        for call, name in (("wav", "WAV"), ("flac", "FLAC"), ("opus", "Ogg Opus"))
    ),
    ("wav", 200, "audio/wav", WAV[:34] + bytes(2) + WAV[36:], "not a complete WAV file"),  # 0 bits
    ("wav", 200, "audio/wav", WAV[:20] + b"\x02" + WAV[21:], "not a complete WAV file"),  # compressed
    ("wav", 200, JSON, WAV, "application/json.*, not audio"),
    *(("wav", 200, "audio/wav", body, "not a complete WAV file") for body in (b"", WAV[:9], WAV[:30], WAV[:-9], FLAC)),
    *(("flac", 200, "audio/flac", body, "not a complete FLAC file") for body in (b"", FLAC[:30], WAV)),
    *(("opus", 200, "audio/ogg", body, "not a complete Ogg Opus") for body in (b"", OPUS[:40], OPUS[:-9], WAV)),
]  # fmt: skip


@pytest.fixture(scope="module")
def answer_errors(tmp_path_factory):
    """Errors of the requests in `ANSWERS`, which all run in one process. The path of a URL selects the row."""

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            call, *answer, _ = ANSWERS[int(self.path.split("/")[1])]
            status, content_type, body = (200, JSON, INFO) if self.command == "GET" and call != "info" else answer
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            if content_type:
                self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    cases = ", ".join(f"(client) => {CALLS[call]}" for call, *_ in ANSWERS)
    code = f"""
        const results = [];
        for (const [index, call] of [{cases}].entries()) {{
          results.push(await outcome(() => call(new Client(`${{url}}/${{index}}`))));
        }}
        report(results);"""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, args=[POLL_S]).start()
        try:
            return run(tmp_path_factory.mktemp("answers"), code, url=f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()


@pytest.mark.parametrize("index", range(len(ANSWERS)))
def test_only_a_valid_answer_is_returned(answer_errors, index):
    _, status, *_, expected = ANSWERS[index]
    if expected is None:
        assert answer_errors[index] is None
        return
    error, kind, message = answer_errors[index]
    assert (error, kind) == ("ServerError", PROXY_KINDS.get(status, "refused" if 400 <= status < 500 else "fault"))
    assert re.search(expected, message) and "\n" not in message
    assert status != 200 or message.endswith("is it the address of nemo-lfr serve?")


# JavaScript expression that waits for a server, and what the server sends before it stops to answer.
UNANSWERED = {
    "info, no answer": ("client.info()", b""),
    "info, half of the headers": ("client.info()", b"HTTP/1.1 200 OK\r\nContent-Le"),
    "info, half of the body": ("client.info()", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
    "decode, no answer": ("client.decode([[0]])", b""),
    "encode, no answer": ("client.encode(new Uint8Array(100))", b""),
    "stream, no handshake": ("client.decodeStream()", b""),
}
HANG = """
const client = new Client(url, { timeoutSeconds: 0.5 });
report(await outcome(() => ACTION));
"""


@pytest.mark.parametrize("name", UNANSWERED)
def test_a_server_that_does_not_answer_is_an_error_after_the_timeout(name, tmp_path):
    action, start = UNANSWERED[name]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(start)
                    while connection.recv(1 << 16):
                        pass

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        error, kind, message = run(tmp_path, HANG.replace("ACTION", action), url=url)
    assert (error, kind) == ("ServerError", "lost") and "0.5 s" in message and "try again later" in message


STALLED = """
const open = async () => {
  const stream = await new Client(url, { timeoutSeconds: 0.5 }).decodeStream();
  stream.push([1, 2]);
  stream.end();
  for await (const _ of stream);
};
report([await outcome(open), await outcome(open), await outcome(open)]);
"""


@pytest.mark.slow
def test_a_stream_that_makes_no_progress_is_an_error_after_the_timeout(tmp_path):
    from websockets.sync.server import serve

    starts = iter([[], [READY], [READY, AUDIO[:16]]])

    def answer(connection):
        with contextlib.suppress(Exception):  # the client closes the connection
            for message in next(starts):
                connection.send(message if isinstance(message, bytes) else json.dumps(message))
            while True:
                connection.recv(timeout=50)

    with serve(answer, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        errors = run(tmp_path, STALLED, url=f"http://127.0.0.1:{server.socket.getsockname()[1]}")
        server.shutdown()
    for error, kind, message in errors:
        assert (error, kind) == ("ServerError", "lost") and "nothing arrived for 0.5 s" in message


NOT_COUNTS = ("NaN", "-1", "1.5", "Infinity", "2 ** 53", "'5'", "true", "[]", "1n")
# JavaScript expression with an invalid argument, and the expected error.
BAD_ARGUMENTS = {
    **{f"decode.push({items})": "the tokens are of the type" for items in (
        "undefined", "null", "5", "'00000000'", "{ length: 8 }", "new DataView(new ArrayBuffer(8))",
        "new ArrayBuffer(8)", "new Float32Array(8)", "new BigInt64Array(8)", "new Set([1])",
    )},
    **{f"decode.push([0, 0, 0, 0, 0, 0, 0, {token}])": "token 7 is .*; push .* integers from 0 to 2015" for token in (
        "2016", "-1", "65536", "1.5", "NaN", "undefined", "null", "'1'", "true", "1n", "[1]", "{}",
    )},
    "decode.push(new Array(8))": "token 0 is undefined",
    "decode.push([[0, 0, 0, 0, 0, 0, 0, 0]])": r"token 0 is \[0,0,0,0,0,0,0,0\]; push frames of 8",
    "decode.push([0])": "there are 1 tokens; push frames of 8",
    "decode.push(new Int16Array(15))": "there are 15 tokens; push frames of 8",
    **{f"encode.push({items})": "the samples are of the type" for items in (
        "undefined", "null", "5", "'00'", "{ length: 2 }", "new DataView(new ArrayBuffer(8))", "new ArrayBuffer(8)",
        "new Int32Array(2)", "new Uint8Array(2)", "new BigInt64Array(2)",
    )},
    **{f"encode.push([0, {sample}])": "sample 1 is .*; push a Float32Array" for sample in (
        "NaN", "Infinity", "1e30", "32767", "-65", "undefined", "null", "'0'", "true", "[0]",
    )},
    "encode.push(Float32Array.of(NaN))": "sample 0 is NaN",
    "encode.push(Float64Array.of(0, 1e300))": r"sample 1 is 1e\+300",
    "encode.push(new Array(2))": "sample 0 is undefined",
    "encode.end(5)": "numSamples is only for streams that decode",
    **{f"decode.end({count})": "numSamples is .*; pass an integer of at least 0" for count in NOT_COUNTS},
    **{
        f"client.{call.format(value)}": f"^{name} is .*; pass an integer of at least"
        for call, name in {
            "decode([[1]], {{ numSamples: {} }})": "numSamples",
            "decodeStream({{ lookahead: {} }})": "lookahead",
            "decodeStream({{ firstLookahead: {} }})": "firstLookahead",
            "decodeStream({{ ramp: [1, {}] }})": r"ramp\[1\]",
            "encodeStream({{ sampleRate: {} }})": "sampleRate",
            "encodeStream({{ lookahead: {} }})": "lookahead",
        }.items()
        for value in NOT_COUNTS
    },
    **{
        f"{call}{options})": expected
        for call in (
            "client.decode([[1]], ", "client.decodeStream(", "client.encodeStream(", "new Client('http://a', ",
        )
        for options, expected in (
            ("{ first_lookahead: 2 }", "unknown option first_lookahead; use "),
            ("{ lookahead: null, foo: 1 }", "unknown option (foo|lookahead); use "),
            *((value, "the options are .*; pass an object with ") for value in ("5", "null", "[1]")),
        )
    },
    "client.decodeStream({ lookahead: 3, firstLookahead: 4 })":
        "firstLookahead is 4, but lookahead is only 3; pass at most 3, or a larger lookahead",
    "client.encodeStream({ sampleRate: 0 })": "sampleRate is 0; pass an integer of at least 1",
    **{f"client.decodeStream({{ ramp: {ramp} }})": "ramp is" for ramp in ("3", "null", "'1,2'", "{ length: 1 }")},
    "client.decodeStream({ ramp: [null] })": r"ramp\[0\] is null; pass an integer of at least 0\.",
    "client.decode([[1]], { format: 'mp3' })": 'format is "mp3"; pass one of wav, flac, opus',
    "client.decode(new Uint8Array(9), { numSamples: 5 })": "only for a list of frames",
    "client.decode([[1, 2], [1]])": "frame 0 has 2 tokens, and frame 1 has 1",
    **{f"client.decode([[1], [{token}]])": "token 0 is" for token in ("-1", "1.5", "NaN", "'1'", "null", "true")},
    **{f"client.decode([{frame}])": "the tokens are of the type" for frame in ("5", "'1'", "new Float32Array(1)")},
    **{
        f"client.{call}({content})": "file is of the type"
        for call in ("decode", "encode", "encodeToTokenFile")
        for content in ("undefined", "null", "5", "'RIFF'", "{}", "new FormData()", "new ReadableStream()",
                        "new Float32Array(9)", "new Int16Array(8)")  # samples or tokens in place of a file
    },
    **{f"new Client({url})": "is not the URL of a server" for url in (
        "5", "null", "undefined", "''", "'127.0.0.1:8000'", "'ftp://a'", "'http://'", "'http://a:99999'",
        "'http://a/?b=c'", "'http://a b'", "'ftp://user:hidden@a'",
    )},
    "new Client('http://user:hidden@a')": r"^\"http://\.\.\.@a\" contains a user name or password",
    **{f"new Client('http://a', {{ token: {token} }})": "the access token is not printable ASCII" for token in (
        "'s\\u00e9cret'", "'a\\nb'", "5",
    )},
    **{f"new Client('http://a', {{ timeoutSeconds: {value} }})": "timeoutSeconds is .*; pass a positive" for value in (
        "0", "-1", "NaN", "Infinity", "'60'", "null", "1e9",
    )},
    "new Client('http://a', { WebSocket: null }).decodeStream()": "there is no WebSocket class",
}  # fmt: skip


@pytest.fixture(scope="module")
def argument_errors(server, tmp_path_factory):
    """Errors of the calls in `BAD_ARGUMENTS`, and the number of samples that their stream still returns afterwards."""
    cases = ", ".join(f"{json.dumps(call)}: () => {call}" for call in BAD_ARGUMENTS)
    code = f"""
        const client = new Client(url, {{ token: "secret" }});
        const decode = await client.decodeStream();
        const encode = await client.encodeStream();
        const results = {{}};
        for (const [name, call] of Object.entries({{ {cases} }})) results[name] = await outcome(call);
        decode.push(new Uint16Array(8));
        decode.end(1000);
        let count = 0;
        for await (const samples of decode) count += samples.length;
        encode.close();
        for (const stream of [decode, encode]) {{
          results.closed = [await outcome(() => stream.push([])), await outcome(() => stream.end())];
        }}
        report([results, count]);"""
    return run(tmp_path_factory.mktemp("arguments"), code, url=server.url(""))


@pytest.mark.parametrize("call", BAD_ARGUMENTS)
def test_a_bad_argument_is_an_error(argument_errors, call):
    error, _, message = argument_errors[0][call]
    assert error == "InputError" and re.search(BAD_ARGUMENTS[call], message)
    assert "\n" not in message and "hidden" not in message


def test_nothing_of_a_bad_argument_is_sent_and_an_ended_stream_takes_no_input(argument_errors):
    results, count = argument_errors
    assert count == 1000
    ended = ["InputError", "", "the input of this stream has ended; open another stream."]
    assert results["closed"] == [ended, ended]


SAMPLES = """
const client = new Client(url, { token: "secret" });
const results = [];
const types = { float: [Float32Array, Float64Array, Array], integers: [Int16Array] };
for (const [name, kinds] of Object.entries(types)) {
  for (const kind of kinds) {
    const stream = await client.encodeStream({ sampleRate: 16000 });
    stream.push(kind.from(values[name]));
    stream.end();
    const tokens = [];
    for await (const part of stream) tokens.push(...part);
    results.push(tokens);
  }
}
report(results);
"""


def test_every_type_of_samples_is_converted(server, tmp_path):
    integers = np.rint(synthesize(0.2) * 32767).astype(np.int16)
    values = {"float": (integers / 32768).tolist(), "integers": integers.tolist()}
    expected = np.asarray(server.codec.encode(integers, sample_rate=16000)[0][0])
    results = run(tmp_path, SAMPLES, url=server.url(""), values=values)
    assert len(results) == 4
    for tokens in results:
        assert np.array_equal(np.array(tokens).reshape(-1, 8).T, expected)


TRIM = """
const client = new Client(url, { token: "secret" });
const counts = [];
for (const lookahead of [null, 0]) {
  const stream = await client.decodeStream({ lookahead });
  stream.push(new Int8Array(24));
  stream.end(2500);
  let count = 0;
  for await (const samples of stream) count += samples.length;
  counts.push(count);
}
report(counts);
"""


def test_only_a_stream_with_a_lookahead_is_trimmed(server, tmp_path):
    assert run(tmp_path, TRIM, url=server.url("")) == [2500, 3072]


READERS = """
const client = new Client(url, { token: "secret" });
const stream = await client.decodeStream();
stream.push(new Int8Array(800));
stream.end();
const read = async () => {
  let count = 0;
  for await (const samples of stream) count += samples.length;
  return count;
};
const first = read();
const second = await outcome(read);
const count = await first;
const other = await client.decodeStream();
other.push(new Int8Array(800));
other.end();
let size = 0;
for await (const samples of other) { size += samples.length; break; }
const iterator = other[Symbol.asyncIterator]();
const next = [iterator.next(), iterator.next()]; // two waiting calls of one iterator
for (const { value } of await Promise.all(next)) size += value?.length ?? 0;
const third = await outcome(() => other[Symbol.asyncIterator]().next());
for await (const samples of iterator) size += samples.length;
report([second, third, count, size]);
"""


@pytest.mark.slow
def test_only_one_iterator_at_a_time_reads_a_stream(server, tmp_path):
    *errors, count, size = run(tmp_path, READERS, url=server.url(""))
    assert count == size == 100 * 1024
    for error, _, message in errors:
        assert error == "InputError" and message.startswith("another iterator is reading")


RESAMPLE = """
import { resample } from "./page/resample.js";
const results = [];
const values = [0, -1, NaN, Infinity, 1e9, 99, 1000001, 22050.5, "22050", undefined];
for (const rate of values) {
  for (const rates of [[rate, 22050], [22050, rate], [rate, rate]]) {
    results.push(await outcome(() => resample(new Float32Array(100), ...rates)));
  }
}
report([results, resample(new Float32Array(1000).fill(1), 16000, 22050).length]);
"""


def test_resampling_refuses_rates_that_are_not_rates_of_audio(tmp_path):
    errors, length = run(tmp_path, RESAMPLE)
    assert len(errors) == 30 and length == 1378
    for error in errors:
        assert error[0] == "UserError" and error[2].endswith("Hz is not supported; use 100 to 1000000 Hz.")


READ_WAV = """
import { readFileSync } from "node:fs";
import { resample } from "./page/resample.js";
import { readWav } from "./page/wav.js";
const results = {};
for (const name of names) {
  const bytes = new Uint8Array(readFileSync(name + ".wav"));
  const error = await outcome(() => {
    const { samples, sampleRate, note } = readWav(bytes.buffer, name);
    const resampled = resample(samples, sampleRate, 22050).length;
    results[name] = { samples: [...samples], sampleRate, note, resampled };
  });
  if (error) results[name] = error;
}
report(results);
"""
PCM = (synthesize(0.1) * 32767).astype("<i2").tobytes()


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def part(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(body) if size is None else size) + body + bytes(len(body) % 2)


def form(rate: int = 22050, tag: int = 1, bits: int = 16, channels: int = 1) -> bytes:
    block = channels * bits // 8
    return part(b"fmt ", struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits))


def floats(*values: float) -> bytes:
    return riff(form(tag=3, bits=32), part(b"data", np.array([0, *values, 0], "<f4").tobytes()))


WAV_FILES = {
    "whole": riff(form(), part(b"data", PCM)),
    "stereo": riff(form(channels=2), part(b"data", PCM[:4000])),
    "a chunk after the samples": riff(form(), part(b"data", PCM), part(b"LIST", b"INFOICMT")),
    "a damaged chunk after the samples": riff(form(), part(b"data", PCM), part(b"cue ", bytes(range(40)), 1 << 30)),
    "an unknown chunk after the samples": riff(form(), part(b"data", PCM), part(b"abcd", bytes(range(40)))),
    "a tag after the samples": riff(form(), part(b"data", PCM)) + b"TAG" + bytes(range(125)),
    "zeros after the samples": riff(form(), part(b"data", PCM)) + bytes(5000),
    "an odd size without padding": riff(form(bits=8), part(b"data", PCM[:1001])[:-1], part(b"LIST", b"INFO")),
    "format after the samples": riff(part(b"data", PCM), form()),
    "two data chunks": riff(form(), part(b"data", PCM[:1000]), part(b"data", PCM[1000:])),
    "joined": riff(form(), part(b"data", PCM[:1000])) + riff(form(), part(b"data", PCM[1000:])),
    "joined without a size": riff(form(), part(b"data", PCM, 0xFFFFFFFF)) + riff(form(), part(b"data", PCM)),
    "joined with a FLAC file": riff(form(), part(b"data", PCM)) + b"fLaC\0\0\0\x22" + bytes(range(40)),
    "size 0": riff(form(), part(b"data", PCM, 0)),
    "size of a stream": riff(form(), part(b"data", PCM, 0xFFFFFFFF), size=0xFFFFFFFF),
    "size too small": riff(form(), part(b"data", PCM, 1000)),
    "size with the header": riff(form(), part(b"data", PCM, len(PCM) + 44)),
    "cut short": riff(form(), part(b"data", PCM))[:3000],
    "cut in the header": riff(form(), part(b"data", PCM))[:30],
    "no samples": riff(form(), part(b"data", b"")),
    "no format": riff(part(b"data", PCM)),
    "loud": floats(60.0),
    "not scaled": floats(25269.0),
    "infinite": floats(float("inf")),
    "not a number": floats(float("nan")),
    "rate 999983": riff(form(999983), part(b"data", PCM)),
    "rate 7": riff(form(7), part(b"data", PCM)),
}


def test_the_page_reads_the_samples_of_wav_files_as_the_package_does(tmp_path, caplog):
    for name, data in WAV_FILES.items():
        (tmp_path / f"{name}.wav").write_bytes(data)
    results = run(tmp_path, READ_WAV, names=list(WAV_FILES))
    refused = set()
    for name, data in WAV_FILES.items():
        caplog.clear()
        try:
            with AudioReader(name, None, data) as reader:
                expected = np.concatenate([np.zeros(0, np.float32), *reader.blocks()])
        except AudioError:
            refused.add(name)
            assert results[name][0] == "UserError", name
            continue
        assert isinstance(results[name], dict), (name, results[name])
        np.testing.assert_allclose(results[name]["samples"], expected, atol=1e-6, err_msg=name)
        assert results[name]["sampleRate"] == reader.native_rate
        assert bool(results[name]["note"]) == bool(caplog.messages), (name, caplog.messages)
    assert results["cut short"][2] == (
        f"cut short was cut short: its header declares {len(PCM)} bytes of audio, but there are 2956."
    )
    assert (
        "declares 1000 bytes of audio, but there are 4410; all of them were read" in results["size too small"]["note"]
    )
    assert refused == {
        *["cut short", "cut in the header", "no format", "joined with a FLAC file", "not scaled", "infinite"],
        *["not a number", "rate 7"],
    }


# 22051 Hz has 22050 filters. They are interpolated, since all of them would take minutes at a high rate.
TONE = """
import { resample } from "./page/resample.js";
const samples = Float32Array.from({ length: 22051 }, (_, index) => Math.sin((2 * Math.PI * 1000 * index) / 22051));
report([...resample(samples, 22051, 22050)]);
"""


def test_a_rate_with_many_filters_is_resampled_exactly(tmp_path):
    expected = np.sin(2 * np.pi * 1000 * np.arange(22050) / 22050)
    np.testing.assert_allclose(run(tmp_path, TONE)[200:-200], expected[200:-200], atol=1e-5)


@pytest.mark.slow
def test_the_example_of_the_protocol_page_runs(server, tmp_path):
    page = (ROOT / "docs/reference/protocol.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```js\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = code.replace("http://127.0.0.1:8765", server.url(""))
    body = re.sub(r"^import .*$", "", code, flags=re.MULTILINE)
    body = body.replace('");', '", { token: "secret" });', 1)
    assert run(tmp_path, body + "report(samples.length);") == 40 * 1024
