"""Tests of the server's page in Chromium: recordings, files, live streams, access, layout and accessibility."""

import io
import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("starlette", reason='the server: pip install starlette "uvicorn[standard]" prometheus_client')
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")

from nemo_lfr.io.token_file import Metadata, TokenStreamReader, TokenStreamWriter
from nemo_lfr.serve.app import Settings
from nemo_lfr.serve.session import EngineLimits
from nemo_lfr.web import EXAMPLE_PATH, PAGE
from tests.models import RATE, synthesize
from tests.serve.running import running
from tests.web.browser import CHROMIUM, browsing

pytestmark = [pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium"), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
TSC = ROOT / "node_modules" / "typescript" / "bin" / "tsc"
READY = "!document.getElementById('record').disabled"
SHOWN = f"!document.getElementById('results').hidden && {READY}"
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    soundfile.write(folder / "microphone.wav", np.tile(synthesize(2.0, 1), 10), RATE, subtype="PCM_16")
    with browsing(folder / "profile", folder / "microphone.wav") as tab:
        yield tab


@pytest.fixture
def page(tab, server):
    tab.problems.clear()
    tab.open(server.url("/"))
    tab.wait(READY)
    yield tab
    assert tab.problems == []


def lfr(codec, tokens, num_samples):
    file = io.BytesIO()
    writer = TokenStreamWriter(file, Metadata.of(codec))
    writer.write(tokens)
    writer.finish(num_samples)
    return file.getvalue()


def tokens_of(data):
    reader = TokenStreamReader(io.BytesIO(data), "the download")
    return np.concatenate(list(reader.blocks()), axis=1), reader.num_samples


def saved(page, name):
    return page.bytes_of(f"document.getElementById('save-{name}').href")


def played(page, version):
    """Return the samples that an audio element plays, as the browser decodes them, and their rate."""
    source = f"document.querySelector('#{version} audio').src"
    _, rate = soundfile.read(io.BytesIO(page.bytes_of(source)))
    decode = f"""blobs.get({source}).arrayBuffer()
        .then(data => new OfflineAudioContext(1, 1, {rate}).decodeAudioData(data))
        .then(audio => audio.getChannelData(0))"""
    return np.frombuffer(page.bytes_of(decode), np.float32), rate


def check_decoded(samples, codec, tokens, num_samples):
    """Compare the samples of a 16-bit file with Python's results."""
    audio = np.asarray(codec.decode(tokens[None])[0][0])[:num_samples].clip(-1, 1)
    np.testing.assert_allclose(samples, audio, atol=2 / 32768)


def check_result(page, codec):
    """Compare the tokens and both audio elements with Python's results."""
    original, rate = played(page, "original")
    tokens, num_samples = tokens_of(saved(page, "tokens"))
    assert np.array_equal(tokens, np.asarray(codec.encode(original, sample_rate=rate)[0][0]))
    decoded, decoded_rate = played(page, "decoded")
    assert decoded_rate == RATE and len(decoded) == num_samples == pytest.approx(len(original) * RATE / rate, abs=1)
    check_decoded(decoded, codec, tokens, num_samples)
    return original, rate


def test_a_recording_has_the_tokens_and_the_audio_of_python(page, server):
    page.click("#record")
    page.wait(
        "document.getElementById('record').classList.contains('on') && document.getElementById('choose').disabled"
    )
    time.sleep(1.0)
    page.run("document.getElementById('record').click(); document.getElementById('record').click()")  # a double click
    page.wait(SHOWN)
    original, rate = check_result(page, server.codec)
    assert rate in (44100, 48000) and len(original) > 0.5 * rate and np.abs(original).max() > 0.01


def test_a_file_is_played_in_both_versions(page, server, tmp_path):
    soundfile.write(tmp_path / "speech.wav", synthesize(1.0), RATE, subtype="FLOAT")
    page.choose("#file", tmp_path / "speech.wav")
    page.wait(SHOWN)
    original, rate = check_result(page, server.codec)
    assert rate == RATE and np.array_equal(original, synthesize(1.0))
    assert page.run("document.activeElement.textContent") == "speech.wav"
    paused = "[...document.querySelectorAll('audio')].map(audio => audio.paused)"
    page.click("#original .play")
    page.wait("document.querySelector('#original audio').currentTime > 0.1")
    page.click("#switch")
    page.wait("document.querySelector('#decoded audio').currentTime > 0.15")
    assert page.run(paused)[0] and page.run("document.querySelector('#original audio').currentTime") < 1
    colors = """[...document.querySelectorAll('canvas[role=img]')].map(canvas => new Set(new Uint32Array(
        canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size)"""
    assert min(page.run(colors)) > 20


def test_the_example_is_the_bundled_recording(page):
    page.click("#example")
    page.wait(SHOWN)
    expected, _ = soundfile.read(EXAMPLE_PATH, dtype="float32")
    original, rate = played(page, "original")
    assert rate == RATE
    np.testing.assert_allclose(original, expected, atol=1.01 / 32768)  # browsers scale 16-bit FLAC in two ways


def test_a_token_file_is_played(page, server, tmp_path):
    tokens = np.asarray(server.codec.encode(synthesize(1.0))[0][0])
    (tmp_path / "speech.lfr").write_bytes(lfr(server.codec, tokens, 22000))
    page.choose("#file", tmp_path / "speech.lfr")
    page.wait(SHOWN)
    samples, _ = played(page, "decoded")
    check_decoded(samples, server.codec, tokens, 22000)
    numbers = page.run("document.getElementById('numbers').textContent")
    assert np.array_equal(np.array([line.split() for line in numbers.splitlines()], int), tokens)
    assert page.run("document.getElementById('original').hidden")


BAD_FILES = {
    "text": (b"no audio", "neither a token file nor audio"),
    "empty": (b"", "neither a token file nor audio"),
    "cut": (lambda data: data[:-9], "damaged or incomplete"),
    "changed": (lambda data: data[:-40] + b"?" + data[-39:], "damaged or incomplete"),
    "longer": (lambda data: data + b"\0", "damaged or incomplete"),
    "version": (lambda data: data[:4] + b"\x09" + data[5:], "version 9"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_message(page, server, tmp_path, name):
    data, message = BAD_FILES[name]
    if callable(data):
        data = data(lfr(server.codec, np.zeros((8, 5), int), 5000))
    (tmp_path / f"{name}.lfr").write_bytes(data)
    page.choose("#file", tmp_path / f"{name}.lfr")
    page.wait(f"document.querySelector('#status.error') && {READY}")
    assert message in page.run(STATUS) and page.run("document.getElementById('results').hidden")


def test_an_error_of_the_server_is_shown(page, tmp_path):
    other = Metadata(22050, 1024, (8, 7, 6, 6), 8, "0" * 16)
    file = io.BytesIO()
    TokenStreamWriter(file, other).finish(0)
    (tmp_path / "other.lfr").write_bytes(file.getvalue())
    page.choose("#file", tmp_path / "other.lfr")
    page.wait("document.querySelector('#status.error')")
    assert page.run(STATUS).startswith("The server says: ")
    assert len(page.problems) == 1 and "400" in page.problems.pop()  # the browser logs the response


def test_the_microphone_is_heard_through_the_streams(page, server):
    page.run("document.getElementById('delay').value = 4")
    page.run("document.getElementById('delay').dispatchEvent(new Event('input'))")
    assert page.run("document.getElementById('delay').getAttribute('aria-valuetext')") == "186 ms"
    page.click("#live-start")
    page.wait("document.getElementById('live-delay').textContent.endsWith(' ms')")
    assert len(server.app.state.engine) == 2
    page.click("#live-start")
    page.wait("document.getElementById('live-status').textContent === 'Stopped.'")
    end = time.monotonic() + 10
    while len(server.app.state.engine):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_loopback_that_the_server_ends_says_why_and_closes_both_streams(tab):
    status = "document.getElementById('live-status').textContent"
    with running(Settings(EngineLimits(max_streams=1))) as server:
        engine = server.app.state.engine
        tab.open(server.url("/"))
        tab.wait(READY)
        tab.click("#live-start")
        tab.wait(f"{status}.startsWith('The server says: the server is at its limit of 1 ')")
        end = time.monotonic() + 10
        while len(engine):
            assert time.monotonic() < end
            time.sleep(0.02)
        engine.limits = EngineLimits()
        tab.click("#live-start")
        tab.wait("document.getElementById('live-delay').textContent.endsWith(' ms')")
        engine.close()
        tab.wait(f"{status}.startsWith('The server says: ')")
        assert tab.run("document.getElementById('live-label').textContent") == "Start"
        tab.open("about:blank")


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_microphone_that_is_not_needed_is_released(page, server, is_broken):
    broken = "AudioWorklet.prototype.addModule = () => Promise.reject(new Error('broken'));"
    page.run(f"""(() => {{
        const media = navigator.mediaDevices;
        const ask = media.getUserMedia.bind(media);
        media.getUserMedia = async wanted => {{
            await new Promise(resolve => (window.allow = resolve));
            window.stream = await ask(wanted);
            {broken if is_broken else ""}
            return window.stream;
        }}; }})()""")
    page.click("#live-start")
    page.wait("window.allow")
    if not is_broken:
        page.click("#live-start")
        page.wait("document.getElementById('live-status').textContent === 'Stopped.'")
    page.run("allow()")
    page.wait("window.stream?.getTracks().every(track => track.readyState === 'ended')")
    assert len(server.app.state.engine) == 0
    assert page.run("document.getElementById('live-label').textContent") == "Start"


def test_playback_waits_after_a_gap_and_skips_what_is_too_late(page):
    worklet = (PAGE / "playback-worklet.js").read_text(encoding="utf-8")
    heard, played = page.run(f"""(() => {{
        class AudioWorkletProcessor {{ port = {{ postMessage() {{}} }}; }}
        let Kind;
        const registerProcessor = (_, kind) => (Kind = kind);
        {worklet}
        const player = new Kind({{ processorOptions: {{ hold: 200, limit: 1000 }} }});
        const heard = [];
        let next = 1;
        const push = count => player.port.onmessage({{ data: new Float32Array(count).map(() => next++) }});
        const play = () => {{
            const out = new Float32Array(128);
            player.process([], [[out]]);
            heard.push(out[0], out[127]);
        }};
        push(150); play();         // waits for 200
        push(150); play(); play(); // 1 to 256
        play(); play();            // 257 to 300, then nothing
        push(1100); play();        // 1101 of 1400 are skipped up to the last 200
        return [heard, player.played]; }})()""")
    assert heard == [0, 0, 1, 128, 129, 256, 257, 0, 0, 0, 1201, 1328] and played == 1328


def test_a_page_asks_for_the_access_token(tab):
    with running(Settings(token="a secret")) as server:
        tab.open(server.url("/"))
        tab.wait("!document.getElementById('access').hidden")
        for token, is_right in (("s\u00e9cret", False), ("wrong", False), ("a secret", True)):
            tab.run(f"document.getElementById('token').value = {json.dumps(token)}")
            tab.click("#access button")
            wrong = f"{STATUS} === 'The access token is wrong.' && !document.getElementById('access').hidden"
            tab.wait(READY if is_right else wrong)
        tab.click("#live-start")
        tab.wait("document.getElementById('live-delay').textContent.endsWith(' ms')")
        tab.open(server.url("/?1#token=a%20secret"))
        tab.wait(READY)
        assert tab.run("document.getElementById('access').hidden")
        tab.open("about:blank")


def test_the_page_may_only_load_its_own_files(page, server):
    with urllib.request.urlopen(server.url("/")) as response:
        headers, text = response.headers, response.read().decode()
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'" and "nosniff" in str(headers)
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    sources = {source for directive in policy.split("; ") for source in directive.split()[1:]}
    assert policy.startswith("default-src 'none'") and sources == {"'none'", "'self'", "blob:"}
    assert not re.search(r'(src|href)="(https?:)?//', text) and "style=" not in text and "onclick" not in text
    blocked = page.run("fetch('https://example.org').then(() => 'loaded', () => 'blocked')")
    assert blocked == "blocked" and page.problems
    page.problems.clear()


def test_a_page_that_was_opened_as_a_file_says_how_to_serve_it(tab, tmp_path):
    (tmp_path / "page").mkdir()
    for path in PAGE.iterdir():
        (tmp_path if path.name == "index.html" else tmp_path / "page").joinpath(path.name).write_bytes(
            path.read_bytes()
        )
    tab.open((tmp_path / "index.html").as_uri())
    tab.wait("document.getElementById('status').innerText.includes('python -m http.server')")
    tab.open("about:blank")
    tab.problems.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_both_window_sizes_and_has_no_serious_accessibility_findings(page, tmp_path, scheme):
    soundfile.write(tmp_path / f"{'a-long-name-' * 8}.wav", synthesize(1.0), RATE)
    page.choose("#file", next(tmp_path.glob("*.wav")))
    page.wait(SHOWN)
    page.run("document.querySelector('details').open = true")
    for width in (320, 390, 800, 1280):
        page.show(width, 800, scheme)
        assert page.run("document.documentElement.scrollWidth - innerWidth") <= 0
    if AXE.is_file():
        page.run(AXE.read_text(encoding="utf-8") + "; 0")
        found = page.run(
            "axe.run().then(done => done.violations.map(each => [each.impact, each.id, each.nodes[0].html]))"
        )
        assert [each for each in found if each[0] in ("serious", "critical")] == []


def test_everything_can_be_reached_by_keyboard(page, tmp_path):
    soundfile.write(tmp_path / "speech.wav", synthesize(0.5), RATE)
    page.choose("#file", tmp_path / "speech.wav")
    page.wait(SHOWN)
    page.run("document.activeElement.blur(); getSelection().removeAllRanges(); scrollTo(0, 0)")
    name = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent.trim()"
    names = []
    for _ in range(14):
        page.key("Tab")
        names.append(page.run(name) or page.run("document.activeElement.labels?.[0]?.textContent"))
    expected = ["Play the original version", "Position in the original version", "Play the decoded version"]
    assert set(expected) <= set(names)
    assert {"Record", "Choose a file", "Use the example", "Switch version", "Show the numbers", "Start"} <= set(names)
    page.run("document.querySelector('#decoded .play').focus()")
    page.key(" ")
    page.wait("document.querySelector('#decoded audio').currentTime > 0")


def test_the_page_reads_and_writes_token_files_as_python_does(page, server):
    codec = server.codec
    rng = np.random.default_rng(0)
    for count in (0, 1, 300):
        tokens = rng.integers(0, codec.codebook_size, (8, count))
        data = lfr(codec, tokens, count * 1024)
        script = f"""import("/page/lfr.js").then(({{ readTokenFile, writeTokenFile }}) => {{
            const file = readTokenFile(new Uint8Array({json.dumps(list(data))}));
            const written = writeTokenFile(file.metadata, file.tokens, file.numSamples);
            return [Array.from(file.tokens), file.numSamples, Array.from(written)]; }})"""
        found, num_samples, written = page.run(script)
        assert np.array_equal(np.array(found, int).reshape(-1, 8).T, tokens) and num_samples == count * 1024
        assert bytes(written) == data


@pytest.mark.skipif(not TSC.is_file() or not shutil.which("node"), reason="needs npm's packages: npm ci")
def test_the_types_of_the_modules_are_right():
    done = subprocess.run(["node", TSC, "-p", ROOT / "tsconfig.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
