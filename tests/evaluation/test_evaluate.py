"""Tests of `nemo-lfr evaluate`: results, resuming, and the report in a browser."""

import csv
import html
import json
import os
import queue
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import soundfile

from nemo_lfr.cli.main import main
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation import recordings, workers
from nemo_lfr.evaluation.codecs.lfr import LFR
from nemo_lfr.evaluation.metrics import Metric
from nemo_lfr.evaluation.model_metrics import _registered
from nemo_lfr.evaluation.model_metrics.base import ModelMetric
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.io.manifests import read_manifest
from tests.cli.test_cli import run as command
from tests.models import RATE, synthesize

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for number, lang in enumerate(["en", "de", "en"]):
        soundfile.write(folder / f"{number}.wav", synthesize(1, number), RATE, subtype="FLOAT")
        labels = {"text": f"<b>text</b> {number}", "lang": lang, "speaker": f"s{number}"}
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "duration": 1.0} | labels))
    (folder / "manifest.json").write_text("\n".join(lines))
    return folder


def evaluate(capsys, corpus, out, *arguments):
    return command(capsys, "evaluate", corpus / "manifest.json", "--out", out, "--workers", 1, *arguments)


@pytest.fixture(scope="module")
def report(corpus, tmp_path_factory):
    """Evaluate the codec "original" and the bundled codec, and return the output folder."""
    out = tmp_path_factory.mktemp("report")
    arguments = ["--codec", "original", "--codec", "lfr", "--by", "lang", "--workers", "1", "--examples", "2"]
    main(["evaluate", str(corpus / "manifest.json"), "--out", str(out), *arguments])
    return out


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_summary_holds_means_of_the_recordings(report):
    original, ours = rows(report / "summary.csv")
    assert float(original["PESQ-WB"]) == pytest.approx(4.64, abs=0.01) and float(original["mel distance"]) == 0
    own = [row for row in rows(report / "recordings.csv") if row["codec"] == ours["codec"]]
    assert [row["recording"] for row in own] == ["0.wav", "1.wav", "2.wav"]
    for name in ("ESTOI", "SI-SDR", "mel distance"):
        values = [float(row[name]) for row in own]
        assert float(ours[name]) == pytest.approx(np.mean(values))
        low, high = (float(ours[f"{name} {end}"]) for end in ("low", "high"))
        assert min(values) - 1e-9 <= low <= float(ours[name]) <= high <= max(values) + 1e-9
        assert ours[f"{name} n"] == "3"
    seconds, size = (sum(float(row[key]) for row in own) for key in ("seconds", "bytes"))
    assert float(ours["kbit/s"]) == pytest.approx(8 * size / seconds / 1000, abs=0.005)


@pytest.mark.slow
def test_markdown_has_every_table_and_says_what_is_missing(report):
    text = (report / "report.md").read_text()
    for part in ("| nemo_lfr (bundled) | ", "### Cost", "### Codebooks", "### lang: de", "8 x 2016", "nemo-lfr 0."):
        assert part in text
    assert re.search(r"\*\*CER\*\*.*Not measured: --asr was not passed", text)
    assert "CER" not in text.partition("### Cost")[0]  # a metric without values has no column


@pytest.mark.slow
def test_page_loads_nothing_and_escapes_manifest_labels(report):
    page = re.sub(r"<meta http-equiv=[^>]*>", "", (report / "report.html").read_text())
    sources = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?([^"'\s>)]+)""", page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<b>text</b>" not in page and html.escape("<b>text</b>") in page
    assert page.count("<script") == 1


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")
def test_a_browser_shows_every_picture_and_plays_every_recording(report, tmp_path):
    """Add a script to a copy of the report that sends what the browser has rendered."""
    sent: queue.Queue[bytes] = queue.Queue()

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self):
            sent.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        probe = """<script>addEventListener("load", async () => {
          const decode = async player => {
            const data = await (await fetch(player.src)).arrayBuffer();
            return (await new OfflineAudioContext(1, 1, 22050).decodeAudioData(data)).duration; };
          const audio = await Promise.all([...document.querySelectorAll("audio")].map(decode));
          await fetch("http://127.0.0.1:PORT", {method: "POST", mode: "no-cors", body: JSON.stringify({
            images: [...document.querySelectorAll("svg")].map(i => i.getBoundingClientRect().width),
            audio: audio,
            rows: document.querySelectorAll("tbody tr").length,
            overflow: document.documentElement.scrollWidth - innerWidth })}); });</script>"""
        probe = probe.replace("PORT", str(server.server_port))
        page = tmp_path / "probe.html"
        text = re.sub(r"<meta http-equiv=[^>]*>", "", (report / "report.html").read_text())  # lets the probe run
        page.write_text(text.replace("</body>", probe + "</body>"))
        options = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --window-size=1400,1000 --remote-debugging-port=0"
        )
        shown = [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
        with open(tmp_path / "log", "wb") as log:
            browser = subprocess.Popen(shown, stdout=log, stderr=log)
        try:
            found = json.loads(sent.get(timeout=180))
        except queue.Empty:
            raise AssertionError((tmp_path / "log").read_text()[-2000:]) from None
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
    assert len(found["images"]) == 8 + 2 * 2 and min(found["images"]) > 300  # metrics, and examples x codecs
    assert found["audio"] == pytest.approx([1.0] * 4, abs=0.01)
    assert found["rows"] >= 2 + 2 + 1 + 4 and found["overflow"] <= 0


@pytest.mark.slow
def test_repeated_evaluation_computes_only_missing_results(capsys, corpus, tmp_path, monkeypatch):
    sent, measured = [], []
    round_trip, measure = LFR.round_trip, workers.measure
    monkeypatch.setattr(LFR, "round_trip", lambda self, *args: sent.append(1) or round_trip(self, *args))
    monkeypatch.setattr(workers, "measure", lambda *args: measured.append(args[2]) or measure(*args))
    assert evaluate(capsys, corpus, tmp_path, "--codec", "lfr", "--limit", 2)[0] == 0
    assert len(sent) == 2 + 1 and len(measured) == 2  # 2 recordings and 1 warm-up call
    first = (tmp_path / "summary.csv").read_text()
    assert evaluate(capsys, corpus, tmp_path, "--codec", "lfr", "--limit", 2)[0] == 0
    assert len(sent) == 3 and len(measured) == 2 and (tmp_path / "summary.csv").read_text() == first
    # Simulate a crash with a partial line and a partial file, then add a recording and a codec.
    folder = next((tmp_path / "codecs").iterdir())
    with open(folder / "sent.jsonl", "a") as file:
        file.write('["00001-')
    (folder / "00001-1.part").write_bytes(b"RIFF")
    assert evaluate(capsys, corpus, tmp_path, "--codec", "lfr", "--codec", "original")[0] == 0
    assert len(sent) == 3 + 2 and len(measured) == 2 + 1 + 3
    assert len(rows(tmp_path / "recordings.csv")) == 6


def test_a_limit_selects_recordings_by_the_seed(corpus):
    found = read_manifest(corpus / "manifest.json", corpus) * 20
    draws = [list(recordings.choose(found, 10, seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(draws[0]) == 10
    assert draws[0] == sorted(draws[0]) and set(draws[0]) <= set(recordings.choose(found, None, 0))


@pytest.mark.slow
def test_recordings_that_fail_are_named_and_the_others_measured(capsys, corpus, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    (folder / "1.wav").write_text("no audio")
    soundfile.write(folder / "2.wav", np.zeros(soundfile.info(folder / "2.wav").frames), RATE)
    code, _, err = evaluate(capsys, folder, tmp_path / "out", "--codec", "lfr")
    assert code == 1 and "1.wav: not an audio file" in err
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"- nemo_lfr \(bundled\): 1\.wav: .*not an audio file", text)
    assert "PESQ-WB of 1 recording: the original is silent" in text
    assert len(rows(tmp_path / "out" / "recordings.csv")) == 2


@pytest.mark.slow
def test_codec_exception_fails_only_its_recording(capsys, corpus, tmp_path, monkeypatch):
    round_trip = LFR.round_trip

    def choosy(self, audio, rate):
        if audio[100] == synthesize(1, 1)[100]:
            raise RuntimeError("Padding size should be\nless")
        return round_trip(self, audio, rate)

    monkeypatch.setattr(LFR, "round_trip", choosy)
    code, _, err = evaluate(capsys, corpus, tmp_path, "--codec", "lfr")
    assert code == 1 and "1.wav: RuntimeError: Padding size should be less" in err and "Traceback" not in err
    assert len(rows(tmp_path / "recordings.csv")) == 2


@pytest.mark.slow
def test_spectrograms_work_at_every_rate(capsys, corpus, tmp_path):
    code, _, err = evaluate(capsys, corpus, tmp_path, "--codec", "lfr", "--rate", 44100, "--limit", 2, "--examples", 3)
    assert code == 0, err
    assert (tmp_path / "report.html").read_text().count("<audio") == 4


@pytest.mark.slow
def test_a_wrong_audio_dir_does_not_claim_the_output_folder(capsys, corpus, tmp_path):
    shutil.copy(corpus / "manifest.json", tmp_path / "manifest.json")
    arguments = ["--out", tmp_path / "out", "--workers", 1, "--codec", "original"]
    assert command(capsys, "evaluate", tmp_path / "manifest.json", *arguments)[0] == 1
    code, _, err = command(capsys, "evaluate", tmp_path / "manifest.json", "--audio-dir", corpus, *arguments)
    assert code == 0, err


class LetterCount(ModelMetric):
    """Model metric that counts the letters in the text, and raises an error without text."""

    kind = "letters"
    metrics: ClassVar = {"letters": Metric("", None, "Letters of the text.")}
    texts: ClassVar[list[str]] = []

    def measure(self, original, output, labels):
        self.texts.append(labels["text"])
        if not labels["text"]:
            raise IndexError("no letters")
        return {"letters": float(len(labels["text"]))}


@pytest.mark.slow
def test_a_model_metric_is_computed_again_if_it_failed_or_the_text_has_changed(capsys, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(_registered, "letters", LetterCount)
    lines = [json.loads(line) for line in (corpus / "manifest.json").read_text().splitlines()]
    counts = []
    for text in ("", "abc", "abc", "abcd"):
        lines[0]["text"] = text
        (tmp_path / "manifest.json").write_text("\n".join(map(json.dumps, lines)))
        arguments = ["--out", tmp_path / "out", "--workers", 1, "--codec", "original", "--audio-dir", corpus]
        arguments += ["--model-metric", "letters"]
        assert command(capsys, "evaluate", tmp_path / "manifest.json", *arguments)[0] == 0
        counts.append(rows(tmp_path / "out" / "recordings.csv")[0]["letters"])
    assert counts == ["", "3.0", "3.0", "4.0"]
    assert [text for text in LetterCount.texts if not text.startswith("<b>")] == ["", "abc", "abcd"]
    assert len(LetterCount.texts) == 5


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--asr", "--speaker-model", "--model-metric"])
def test_a_requested_model_that_cannot_be_loaded_gives_exit_code_1(capsys, corpus, tmp_path, option):
    model = tmp_path / "folder without a model"
    model.mkdir()
    value = f"asr:{model}" if option == "--model-metric" else model
    code, _, err = evaluate(capsys, corpus, tmp_path / "out", "--codec", "original", "--limit", 1, option, value)
    assert code == 1 and f"the model {model} could not be loaded" in err
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{corpus}/none.json"], "none.json: no such file"),
        (["{corpus}"], "is a folder, not a manifest; write a manifest with: nemo-lfr prepare folder"),
        (["{corpus}/manifest.json", "--preset", "card-mls"], "manifest.json: not a folder; with --preset"),
        (["{corpus}", "--preset", "card-daps"], "unpack daps.tar.gz"),
        (["{corpus}/manifest.json", "--codec", "mp3"], "unknown codec; use one of codec2:BIT"),
        (["{corpus}/manifest.json", "--by", "nope"], "no recording has the key 'nope'; use one of lang, "),
        (["{corpus}/empty.json"], "no recordings found"),
        (["{corpus}/gone.json"], "no codec processed any recording"),
    ],
)
def test_user_errors_are_one_line_errors(capsys, corpus, tmp_path, arguments, words):
    (corpus / "empty.json").write_text("")
    (corpus / "gone.json").write_text('{"audio_filepath": "gone.wav", "duration": 1}')
    filled = [argument.format(corpus=corpus) for argument in arguments]
    code, out, err = command(capsys, "evaluate", *filled, "--out", tmp_path / "out", "--workers", 1)
    assert code == (1 if "no codec processed" in words else 2)
    assert not out and words in err.splitlines()[-1] and "Traceback" not in err
    assert ("gone.wav: no such file" in err) == ("pass it as --audio-dir" in err)


@pytest.mark.slow
def test_a_clip_that_ends_after_its_file_fails_alone(capsys, corpus, tmp_path):
    clips = [(0, 1.05), (0.25, 0.75), (0, 30), (0.5, 1.0), (9, 1)]  # the files last 1 s; durations are rounded
    lines = [{"audio_filepath": str(corpus / "0.wav"), "offset": at, "duration": length} for at, length in clips]
    (tmp_path / "manifest.json").write_text("\n".join(map(json.dumps, lines)))
    code, _, err = evaluate(capsys, tmp_path, tmp_path / "out", "--codec", "original")
    assert code == 1 and err.count("the audio lasts 1.00 s, but its manifest requires") == 3
    assert len(rows(tmp_path / "out" / "recordings.csv")) == 2


@pytest.mark.slow
def test_a_folder_of_other_recordings_is_refused(capsys, corpus, tmp_path):
    assert evaluate(capsys, corpus, tmp_path, "--codec", "original", "--limit", 1)[0] == 0
    shutil.copytree(corpus, tmp_path / "other")
    code, _, err = evaluate(capsys, tmp_path / "other", tmp_path, "--codec", "original")
    assert code == 2 and "evaluation of other or changed recordings" in err


@pytest.mark.slow
def test_a_manifest_of_other_files_is_refused_in_the_same_folder(capsys, corpus, tmp_path):
    """The file names differ from those in the first manifest, so that results could not be mixed up."""
    other = tmp_path / "other"
    other.mkdir()
    lines = []
    for number in range(3):
        shutil.copy(corpus / f"{number}.wav", other / f"other{number}.wav")
        lines.append(json.dumps({"audio_filepath": f"other{number}.wav", "duration": 1.0}))
    (other / "manifest.json").write_text("\n".join(lines))
    out = tmp_path / "out"
    assert evaluate(capsys, corpus, out, "--codec", "original", "--limit", 1)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, _, err = evaluate(capsys, other, out, "--codec", "original", "--limit", 1)
    assert code == 2 and "evaluation of other or changed recordings" in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "stored",
    [
        {"source": "manifest elsewhere.json"},  # another source, without recordings in common
        {"00000-other": ["/other.wav", 0.0, 1.0, RATE, "0"]},  # an older file: another recording in the same place
        {"00000-0": ["/other.wav", 0.0, 1.0, RATE, "0"]},
    ],
)
def test_a_claim_on_other_recordings_is_kept(corpus, tmp_path, stored):
    chosen = recordings.choose(read_manifest(corpus / "manifest.json"), None, 0)
    (tmp_path / "recordings.json").write_text(json.dumps(stored))
    with pytest.raises(NemoLfrError, match="evaluation of other or changed recordings"):
        recordings.claim(tmp_path, chosen, RATE, "manifest here.json")
    assert json.loads((tmp_path / "recordings.json").read_text()) == stored


@pytest.mark.slow
def test_run_locks_its_folder_until_the_report_is_written(capsys, corpus, tmp_path, monkeypatch):
    locked = []

    def write(*arguments, **options):
        with pytest.raises(NemoLfrError, match="another run"), exclusive(tmp_path):
            locked.append(False)
        locked.append(True)
        return []

    monkeypatch.setattr("nemo_lfr.evaluation.report.write_report", write)
    assert evaluate(capsys, corpus, tmp_path, "--codec", "original", "--limit", 1)[0] == 0
    assert locked == [True]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_manifest_in_a_pipe_is_refused_with_advice(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = command(capsys, "evaluate", tmp_path / "pipe", "--out", tmp_path / "out")
    assert code == 2 and "not a regular file but a pipe; write the manifest to a file and pass its path." in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_report_includes_the_model_cards_values(capsys, tmp_path):
    clean = tmp_path / "daps" / "clean"
    clean.mkdir(parents=True)
    for speaker in ("f10", "m10"):
        soundfile.write(clean / f"{speaker}_script1_clean.wav", np.tile(synthesize(5.25, 1), 2), RATE)
    code, _, err = command(
        capsys, "evaluate", tmp_path, "--preset", "card-daps", "--codec", "original", "--out", tmp_path / "out",
        "--workers", 1,
    )  # fmt: skip
    assert code == 0 and "consecutive segments of 10 s" in err
    (line,) = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "NVIDIA's card" in line]
    for value in ("4.69", "8.07", "0.136", "0.056", "0.77"):
        assert f" {value} |" in line


@pytest.mark.slow
def test_changed_recordings_refuse_an_existing_evaluation(capsys, corpus, tmp_path):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    assert evaluate(capsys, copy, tmp_path / "out", "--limit", 1, "--codec", "original")[0] == 0
    for number in range(3):
        soundfile.write(copy / f"{number}.wav", synthesize(1, number + 5), RATE, subtype="FLOAT")
    code, _, stderr = evaluate(capsys, copy, tmp_path / "out", "--limit", 1, "--codec", "original")
    assert code == 2 and "other or changed recordings" in stderr


@pytest.mark.slow
def test_invalid_journal_entries_are_ignored(capsys, corpus, tmp_path):
    command_line = ("--limit", 1, "--codec", "original")
    assert evaluate(capsys, corpus, tmp_path, *command_line)[0] == 0
    journals = list((tmp_path / "codecs").glob("*/*.jsonl"))
    (folder,) = {path.parent for path in journals}
    (key,) = [path.stem for path in folder.glob("*.wav")]
    for path in journals:
        bad = [5, {"a": 1}, [], [1, 2], [key], [key, 5], [key, {"seconds": "x"}], [key, {"PESQ": []}], [key, 1, 2]]
        path.write_text("\n".join(map(json.dumps, bad)) + "\n" + path.read_text())
    assert evaluate(capsys, corpus, tmp_path, *command_line)[0] == 0
