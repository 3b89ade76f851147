"""Tests of the static site: its files, the files of onnxruntime-web, and the codec in Chromium."""

import functools
import io
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.token_file import Metadata, TokenStreamReader, TokenStreamWriter
from nemo_lfr.web.runtime import SHA512, VERSION, read_runtime
from nemo_lfr.web.site import export_site, index
from tests.cli.test_cli import run
from tests.models import RATE, cached_codec, synthesize
from tests.web.browser import CHROMIUM, browsing

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "node_modules" / "onnxruntime-web"
needs_package = pytest.mark.skipif(
    not (PACKAGE / "dist").is_dir(), reason=f"needs npm's package: npm install --no-save onnxruntime-web@{VERSION}"
)
READY = "!document.getElementById('record').disabled"
SHOWN = f"!document.getElementById('results').hidden && {READY}"


def package(folder, **changes):
    """Write an npm package in which some files have other contents, or are missing if the content is None."""
    (folder / "dist").mkdir(parents=True)
    for name in SHA512:
        data = changes.get(name.replace(".", "_").replace("-", "_"), b"another version")
        if data is not None:
            (folder / "dist" / name).write_bytes(data)
    return folder


def archive(path):
    with tarfile.open(path, "w:gz") as file:
        file.addfile(tarfile.TarInfo("package/README.md"), io.BytesIO(b""))
    return path


def text(path):
    path.write_text("not an archive")
    return path


BAD_PACKAGES = {
    "missing": (lambda root: root / "node_modules", "no such file or folder"),
    "another version": (lambda root: package(root / "p"), "SHA-512 differs"),
    "a missing file": (
        lambda root: package(root / "p", ort_wasm_min_mjs=None),
        "no dist/ort.wasm.min.mjs in this package",
    ),
    "an empty archive": (lambda root: archive(root / "p.tgz"), "no dist/ort.wasm.min.mjs in this package"),
    "no archive": (lambda root: text(root / "p.tgz"), "cannot be read as an archive of npm pack"),
}


@pytest.mark.parametrize("name", BAD_PACKAGES)
def test_a_package_that_is_not_the_pinned_one_is_refused_in_one_line(capsys, tmp_path, name):
    make, message = BAD_PACKAGES[name]
    source = make(tmp_path)
    code, out, err = run(capsys, "export", "web", "--out", tmp_path / "site", "--onnxruntime-web", source)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err and f"onnxruntime-web@{VERSION}" in err
    assert not (tmp_path / "site").exists()


def test_the_name_of_a_codec_is_escaped():
    assert '<meta name="codec" content="&quot;&gt;&lt;script&gt;">' in index('"><script>')
    assert '<meta name="backend" content="browser">' in index("")


@needs_package
@pytest.mark.slow
def test_the_archive_has_the_files_of_the_folder(tmp_path):
    with tarfile.open(tmp_path / "p.tgz", "w:gz", compresslevel=1) as file:
        for name in SHA512:
            file.add(PACKAGE / "dist" / name, f"package/dist/{name}")
    assert read_runtime(tmp_path / "p.tgz") == read_runtime(PACKAGE)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    export_site(cached_codec("symmetric"), folder, PACKAGE, name="a tiny codec")
    return folder


@pytest.fixture(scope="module")
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

        def log_message(self, *_):
            pass

        def end_headers(self):
            self.send_header("Cache-Control", "no-store")  # a test damages a file
            super().end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest.fixture
def page(tab, address):
    tab.problems.clear()
    tab.open(address)
    tab.wait(READY)
    yield tab
    assert tab.problems == []


in_browser = [needs_package, pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")]


def marked(test):
    for mark in in_browser:
        test = mark(test)
    return test


def result(page):
    """Return the tokens, the number of samples and the decoded audio of the page."""
    saved = [page.bytes_of(f"document.getElementById('save-{name}').href") for name in ("tokens", "audio")]
    reader = TokenStreamReader(io.BytesIO(saved[0]), "the download")
    reader.check_codec(cached_codec("symmetric"))
    tokens = np.concatenate(list(reader.blocks()), axis=1)
    decoded, rate = soundfile.read(io.BytesIO(saved[1]), dtype="float32")
    assert rate == RATE and len(decoded) == reader.num_samples
    return tokens, decoded


@marked
@pytest.mark.parametrize("seconds", [0.02, 1.0, 21.0])  # less than the fewest frames, one window, two windows
def test_the_browser_has_the_tokens_and_the_audio_of_python(page, tmp_path, seconds):
    codec = cached_codec("symmetric")
    audio = synthesize(seconds, 3)
    soundfile.write(tmp_path / "speech.wav", audio, RATE, subtype="FLOAT")
    page.choose("#file", tmp_path / "speech.wav")
    page.wait(SHOWN, 60)
    tokens, decoded = result(page)
    expected = np.asarray(codec.encode(audio)[0][0])
    assert tokens.shape == expected.shape and np.mean(tokens != expected) < 1e-3  # rounding ties
    samples = np.asarray(codec.decode(tokens[None])[0][0])[: len(audio)].clip(-1, 1)
    np.testing.assert_allclose(decoded, samples, atol=2 / 32768)
    assert page.run("document.getElementById('live').hidden")
    assert page.run("document.getElementById('codec').textContent").startswith("A tiny codec")


@marked
def test_other_rates_are_resampled(page, tmp_path):
    time = np.arange(48000) / 48000
    tone = (0.5 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)
    script = f"""import("/page/resample.js").then(({{ resample }}) => {{
        const samples = new Float32Array(48000).map((_, index) => 0.5 * Math.sin(2 * Math.PI * 1000 * index / 48000));
        return resample(samples, 48000, {RATE}); }})"""
    found = np.frombuffer(page.bytes_of(script), np.float32)
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(found[200:-200], expected[200:-200], atol=1e-4)
    soundfile.write(tmp_path / "tone.wav", tone, 48000)
    page.choose("#file", tmp_path / "tone.wav")
    page.wait(SHOWN, 60)
    assert len(result(page)[1]) == RATE


@marked
def test_tokens_of_another_codec_are_refused(page, tmp_path):
    for fingerprint, levels in (("0" * 16, (8, 7, 6, 6)), ("", (8, 5, 5, 5))):
        file = io.BytesIO()
        TokenStreamWriter(file, Metadata(RATE, 1024, levels, 8, fingerprint)).finish(0)
        (tmp_path / "other.lfr").write_bytes(file.getvalue())
        page.choose("#file", tmp_path / "other.lfr")
        page.wait("document.querySelector('#status.error')")
        assert "not from the codec of this page" in page.run("document.getElementById('status').textContent")


@marked
def test_an_existing_site_is_not_replaced(site):
    before = (site / "index.html").read_bytes()
    with pytest.raises(NemoLfrError, match="exists; pass --overwrite"):
        export_site(cached_codec("symmetric"), site, PACKAGE)
    assert (site / "index.html").read_bytes() == before


@marked
def test_a_damaged_network_is_one_message(tab, address, site, tmp_path):
    path = site / "page" / "codec" / "encoder.onnx"
    shutil.copy(path, tmp_path / "encoder.onnx")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    try:
        tab.open(address + "?damaged")
        tab.wait(READY)
        soundfile.write(tmp_path / "speech.wav", synthesize(0.5), RATE)
        tab.choose("#file", tmp_path / "speech.wav")
        tab.wait("document.querySelector('#status.error')")
        assert "encoder.onnx of this site is damaged" in tab.run("document.getElementById('status').textContent")
    finally:
        shutil.copy(tmp_path / "encoder.onnx", path)
