"""Tests of the JavaScript client in Node.js against a running server."""

import contextlib
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("starlette", reason='the server: pip install starlette "uvicorn[standard]" prometheus_client')
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")

from nemo_lfr.serve.app import Settings
from nemo_lfr.serve.session import EngineLimits
from tests.crash import ROOT
from tests.models import synthesize
from tests.serve.running import running

NODE = shutil.which("node")
CLIENT = ROOT / "nemo_lfr/web/page/client.js"


def version() -> int:
    return int(subprocess.run([NODE, "--version"], capture_output=True, text=True).stdout[1:].split(".")[0])


pytestmark = pytest.mark.skipif(not NODE or version() < 20, reason="Node.js 20 or later is not installed")


def run(folder: Path, code: str, **values) -> object:
    """Run a module that may use the client's exports and `values`, and return the value that it passes to `report`."""
    shutil.copy(CLIENT, folder / "client.mjs")
    script = folder / "script.mjs"
    lines = [f"const {name} = {json.dumps(value)};" for name, value in values.items()]
    head = (
        'import { Client, ServerError } from "./client.mjs";\nconst report = (x) => console.log(JSON.stringify(x));\n'
    )
    script.write_text(head + "\n".join(lines) + "\n" + code)
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
async function kindOf(action) {
  try { await action(); } catch (error) {
    if (error instanceof ServerError && error.message) return error.kind;
    throw error;
  }
  return "none";
}
const good = new Client(url, { token: "secret" });
const wrong = new Client(url, { token: "wrong" });
const gone = new Client("http://127.0.0.1:1");
const results = [
  await kindOf(() => wrong.info()), await kindOf(() => wrong.decodeStream()),
  await kindOf(() => gone.info()), await kindOf(() => gone.decodeStream()),
  await kindOf(() => good.decode([[9999]])), await kindOf(() => good.decodeStream({ ramp: [0] })),
];
const stream = await good.decodeStream();
results.push(await kindOf(() => good.decodeStream()));
stream.push([0, 0, 0, 0, 0, 0, 0, 9999]);
results.push(await kindOf(async () => { for await (const _ of stream); }));
report(results);
"""


def test_the_javascript_client_names_the_kind_of_an_error(tmp_path):
    with running(Settings(EngineLimits(max_streams=1), token="secret")) as server:
        kinds = run(tmp_path, ERRORS, url=server.url(""))
    assert kinds == ["refused", "refused", "lost", "lost", "refused", "refused", "full", "refused"]


BAD_MESSAGES = """
const kinds = [];
for (let number = 0; number < count; number++) {
  try {
    const stream = await new Client(url).decodeStream();
    for await (const _ of stream);
    kinds.push("none");
  } catch (error) { kinds.push(error instanceof ServerError ? error.kind : String(error)); }
}
report(kinds);
"""
READY = json.dumps({"type": "ready", "sample_rate": 22050, "num_codebooks": 8})


def test_a_message_outside_the_protocol_ends_the_stream_with_an_error(tmp_path):
    from websockets.sync.server import serve

    answers = iter([["not json"], ["null"], [READY, "[" * 9999], [READY, b"123"], [READY, "null"]])

    def answer(connection):
        for message in next(answers):
            connection.send(message)
        with contextlib.suppress(Exception):
            connection.recv(timeout=30)

    with serve(answer, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        kinds = run(tmp_path, BAD_MESSAGES, url=f"http://127.0.0.1:{server.socket.getsockname()[1]}", count=5)
        server.shutdown()
        thread.join()
    assert kinds == ["fault"] * 5


def test_the_example_of_the_protocol_page_runs(server, tmp_path):
    page = (ROOT / "docs/reference/protocol.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```js\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = code.replace("http://127.0.0.1:8765", server.url(""))
    body = re.sub(r"^import .*$", "", code, flags=re.MULTILINE)
    body = body.replace('");', '", { token: "secret" });', 1)
    assert run(tmp_path, body + "report(samples.length);") == 40 * 1024
