"""Tests of a codec, a metric and a model metric that another package provides through the entry-point group."""

import csv
import json
import sys

import pytest
import soundfile

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation import codecs, model_metrics, plugins
from nemo_lfr.evaluation.metrics import METRICS, Metric, register_metric
from tests.cli.test_cli import run as command
from tests.models import RATE, synthesize

MODULES = {
    "dummy_codec": '''
import numpy as np
from nemo_lfr.evaluation.codecs import register_codec
from nemo_lfr.evaluation.codecs.base import ComparedCodec, RoundTrip

@register_codec
class EightBits(ComparedCodec):
    """Samples of 8 bits."""

    kind = usage = name = identity = "eightbits"

    def round_trip(self, audio, rate):
        samples = (audio * 127).round()
        return RoundTrip(samples / 127, np.int64(len(audio)), np.int64(len(audio)), 0.5, 0.25)
''',
    "dummy_metric": """
import numpy as np
from nemo_lfr.evaluation.metrics import Metric, register_metric

def peak_error(original, output):
    return np.abs(original.wave - output.wave).max()

register_metric("peak error", Metric("", "lower", "Largest difference of a sample.", function=peak_error))

def failing(original, output):
    raise KeyError("no such feature")

register_metric("failing", Metric("", "lower", "Fails.", function=failing))
""",
    "dummy_model_metric": '''
import numpy as np
from nemo_lfr.evaluation.metrics import Metric
from nemo_lfr.evaluation.model_metrics import register_model_metric
from nemo_lfr.evaluation.model_metrics.base import ModelMetric

@register_model_metric
class Letters(ModelMetric):
    """Letters of the text."""

    kind = "letters"
    metrics = {"letters": Metric("", None, "Letters of the text.")}

    def measure(self, original, output, labels):
        return {"letters": np.float32(len(labels["text"]) + len(self.name))}
''',
}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a package with a module of each kind, and remove its codecs and metrics after the test."""
    site = tmp_path / "site"
    info = site / "dummies-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dummies\nVersion: 1.0\n")
    points = "".join(f"{name} = {name}\n" for name in (*MODULES, "dummy_broken"))
    (info / "entry_points.txt").write_text(f"[{plugins.ENTRY_POINTS}]\n{points}")
    for name, text in MODULES.items():
        (site / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(site)
    for package in (codecs, model_metrics):
        plugins.import_submodules(package.__name__)
    tables = (METRICS, codecs._registered, model_metrics._registered)
    before = [dict(table) for table in tables]
    plugins.load_plugins.cache_clear()
    yield
    plugins.load_plugins.cache_clear()
    for table, entries in zip(tables, before, strict=True):
        for name in set(table) - set(entries):
            del table[name]
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def manifest(tmp_path):
    lines = []
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", synthesize(0.5, number), RATE, subtype="FLOAT")
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "duration": 0.5, "text": "abcd"}))
    (tmp_path / "manifest.json").write_text("\n".join(lines))
    return tmp_path / "manifest.json"


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_evaluation_uses_a_codec_and_metrics_of_another_package(plugin, manifest, tmp_path, capsys, caplog, jobs):
    arguments = ["--codec", "eightbits", "--model-metric", "letters:ab", "--workers", jobs, "--examples", 1]
    code, _, err = command(capsys, "evaluate", manifest, "--out", tmp_path / "out", *arguments)
    assert code == 0, err
    with open(tmp_path / "out" / "recordings.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["codec"] for row in rows] == ["eightbits"] * 2
    assert all(0 < float(row["peak error"]) <= 0.5 / 127 + 1e-6 and float(row["letters"]) == 6 for row in rows)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "peak error ↓" in report and "Largest difference of a sample." in report and "Model: ab." in report
    assert "failing of 2 recordings: not measured: KeyError: 'no such feature'" in report
    assert "dummy_broken are not available, because this module cannot be imported (ModuleNotFoundError" in caplog.text


def test_help_lists_a_codec_and_a_model_metric_of_another_package(plugin, capsys):
    code, out, _ = command(capsys, "evaluate", "--help")
    text = " ".join(out.split())
    assert code == 0 and "eightbits" in text and "squim, asr, speaker, letters" in text and "lfr (the bundled" in text


def test_a_registration_may_be_repeated_but_not_taken_over(plugin):
    codecs.codec_kinds()
    for name in MODULES:
        del sys.modules[name]
    plugins.load_plugins.cache_clear()
    assert "eightbits" in codecs.codec_kinds()  # the modules were imported again
    with pytest.raises(NemoLfrError, match="metric 'peak error' is already registered"):
        register_metric("peak error", Metric("", None, "Other.", function=lambda original, output: 0.0))
    for table, register, kind in (
        (codecs.codec_kinds(), codecs.register_codec, "eightbits"),
        (model_metrics.model_metric_kinds(), model_metrics.register_model_metric, "letters"),
    ):
        other = type("Other", (table[kind],), {})
        with pytest.raises(NemoLfrError, match=f"'{kind}' is already registered; choose another name"):
            register(other)
    clash = type("Clash", (model_metrics.model_metric_kinds()["letters"],), {"kind": "clash", "metrics": {"STOI": 1}})
    with pytest.raises(NemoLfrError, match="metric 'STOI' is already registered"):
        model_metrics.register_model_metric(clash)


def test_a_metric_without_a_function_is_rejected():
    with pytest.raises(NemoLfrError, match="metric 'none' has no function"):
        register_metric("none", Metric("", None, "Nothing."))


def test_a_metric_that_worker_processes_cannot_import_is_named(plugin, manifest, tmp_path, capsys):
    register_metric("local", Metric("", None, "Local.", function=lambda original, output: 0.0))
    arguments = ["--codec", "original", "--out", tmp_path / "out", "--workers", 2]
    code, _, err = command(capsys, "evaluate", manifest, *arguments)
    assert code == 1 and "metric 'local' cannot be sent to worker processes" in err and "use --workers 1" in err
