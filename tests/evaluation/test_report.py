"""Tests of the report: best values, paired differences, plots, and the page in a browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from nemo_lfr.evaluation import plots, report, spreadsheets, tables
from nemo_lfr.evaluation.metrics import METRICS, NotMeasured, Undefined
from nemo_lfr.evaluation.results import Evaluation, Result
from nemo_lfr.evaluation.tables import FIRST, SECOND, Table
from nemo_lfr.io.manifests import Recording
from tests.models import RATE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = [f"{number:05d}-clip" for number in range(6)]


def result(name, folder, shift, size=1000.0, missing=()):
    """Return the results of a codec: the values of the first codec plus `shift` and noise."""
    rng = np.random.default_rng(len(name))
    trip = {"seconds": 4.0, "num_bytes": size, "file_bytes": size + 9, "encode_seconds": 0.5, "decode_seconds": 0.25}
    values = {}
    for number, key in enumerate(KEYS):
        base = number / 10 + shift + 0.01 * float(rng.standard_normal())
        values[key] = {"PESQ-WB": 2 + base, "mel distance": 0.5 + base, "lag": 0.0}
        if number in missing:
            values[key]["PESQ-WB"] = Undefined("the original is silent")
    return Result(name, 0.0, (), folder, dict.fromkeys(KEYS, trip), values)


@pytest.fixture
def evaluation(tmp_path):
    labels = {"lang": "<i>en</i>"}
    recordings = {key: Recording("", tmp_path / f"{key}.wav", tmp_path / key, 0.0, 4.0, labels) for key in KEYS}
    results = [
        result("original", tmp_path, 5.0, 90000.0),
        result("a <b>bold</b> codec", tmp_path, 0.0),
        result("b", tmp_path, 0.1, 2000.0, missing=(0, 1)),
        result("c$_^", tmp_path, 0.1, 2000.0),
    ]
    return Evaluation(recordings, RATE, results)


@pytest.mark.parametrize(
    ("better", "cells", "best"),
    [
        ("higher", ["1.0", "2.0", "3.0"], {2}),
        ("lower", ["1.0 (0.9 to 1.1)", "2.0", "3.0"], {0}),
        ("higher", ["-2.0", "-1.0", "-"], {1}),
        ("lower", ["0.50", "0.50", "0.60"], {0, 1}),  # equal as displayed
        ("higher", ["1.0", "-", "-"], set()),  # nothing to compare with
        ("lower", ["0", "0", "0"], set()),
        (None, ["1.0", "2.0", "3.0"], set()),
    ],
)
def test_the_best_value_of_a_column_is_marked(better, cells, best):
    rows = [[name, cell] for name, cell in zip("abc", cells, strict=True)]
    rows += [["original", "99"], [tables.CARD, "-99"]]  # original recordings are not ranked
    table = Table("", ["codec", "metric"], rows, [None, better])
    assert {row for row, column in table.best if column == 1} == best and len(table.best) == len(best)
    assert [f"**{cell}**" in table.markdown() for cell in cells] == [
        row in best or cell in [cells[other] for other in best] for row, cell in enumerate(cells)
    ]


def test_paired_differences_use_the_recordings_that_both_codecs_have(evaluation):
    _, first, second, _ = evaluation.results
    mean = tables.paired_mean(first, second, KEYS, "PESQ-WB")
    expected = [first.values[key]["PESQ-WB"] - second.values[key]["PESQ-WB"] for key in KEYS[2:]]
    assert mean.count == 4 and mean.value == pytest.approx(np.mean(expected))
    assert min(expected) <= mean.low < mean.value < mean.high <= max(expected)
    assert tables.paired_mean(first, second, KEYS[:2], "PESQ-WB") is None


def test_paired_differences_say_which_codec_is_better(evaluation):
    table = tables.differences(evaluation, KEYS)
    assert table.head == ["codecs", "PESQ-WB (MOS) ↑", "mel distance ↓", "lag (ms)"]
    by_name = {row[0]: row[1:] for row in table.rows}
    assert set(by_name) == {"a <b>bold</b> codec minus b", "a <b>bold</b> codec minus c$_^", "b minus c$_^"}
    pesq, mel, lag = by_name["a <b>bold</b> codec minus b"]
    assert re.fullmatch(rf"{SECOND} -0\.\d\d \(-0\.\d\d to -0\.\d\d\)", pesq)  # lower is worse for this metric
    assert re.fullmatch(rf"{FIRST} -0\.\d{{4}} \(.*\)", mel)
    assert lag == "+0.0 (+0.0 to +0.0)"
    assert FIRST not in by_name["b minus c$_^"][0] and SECOND not in by_name["b minus c$_^"][0]


def test_one_codec_has_no_differences(evaluation):
    evaluation.results = evaluation.results[:2]
    assert tables.differences(evaluation, KEYS) is None
    assert len(spreadsheets.differences(evaluation).splitlines()) == 2  # the CSV also has pairs with "original"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.3, 0.9, [-0.2, 0, 0.2, 0.4, 0.6, 0.8]),
        (1.0, 4.6, [1, 2, 3, 4]),
        (0.0021, 0.0043, [0.0025, 0.003, 0.0035, 0.004]),
        (17000, 18000, [17000, 17200, 17400, 17600, 17800, 18000]),
    ],
)
def test_ticks_are_round_values_in_the_range(low, high, ticks):
    assert plots.nice_ticks(low, high) == pytest.approx(ticks)


def svgs(figures):
    return [ElementTree.fromstring(f"<g>{figure['svg']}</g>") for figure in figures]


def test_every_metric_with_a_better_direction_has_a_plot(evaluation):
    figures = plots.metric_plots(evaluation, KEYS, METRICS)
    assert [figure["title"] for figure in figures] == [
        "PESQ-WB (MOS), higher is better",
        "mel distance, lower is better",
    ]
    for drawing in svgs(figures):
        rate, distribution = drawing
        assert rate.get("aria-label").endswith("against bit rate") and distribution.get("role") == "img"
        text = [element.text for element in distribution.iter("text")]
        assert [name for name in text if not re.match(r"-?\d", name)] == ["a <b>bold</b> codec", "b", "c$_^"]
        numbers = [float(value) for element in drawing.iter() for name, value in element.items() if name in "xyx1y1"]
        assert np.isfinite(numbers).all() and min(numbers) >= 0 and max(numbers) <= 400


@pytest.mark.parametrize("count", [1, 2, 9])
def test_plots_of_any_number_of_codecs_and_equal_values(tmp_path, count):
    """A single codec has no plot against bit rate, and an axis for equal values has a finite length."""
    results = [result(f"codec {number}", tmp_path, 0.0, 1000.0 * (number + 1)) for number in range(count)]
    for own in results:
        own.values = {key: {"ESTOI": 0.0} for key in KEYS}
    recordings = dict.fromkeys(KEYS)
    (figure,) = plots.metric_plots(Evaluation(recordings, RATE, results), KEYS, METRICS)
    assert figure["svg"].count("<svg") == (1 if count == 1 else 2)
    assert "nan" not in figure["svg"] and "inf" not in figure["svg"]
    shapes = {(path.get("class"), path.get("d")) for path in svgs([figure])[0].iter("path")}
    assert len(shapes) == count  # color and shape together are unique


def test_a_box_plot_of_values_that_differ_only_by_rounding(tmp_path):
    """Both quartiles of two such values are their mean, so neither value is in the box or within its whiskers."""
    value = 76.75053894050713
    own = result("codec", tmp_path, 0.0, 1000.0)
    own.values = {key: {"ESTOI": value + 2 * np.spacing(value) * (index % 2)} for index, key in enumerate(KEYS[:2])}
    (figure,) = plots.metric_plots(Evaluation(dict.fromkeys(KEYS[:2]), RATE, [own]), KEYS[:2], METRICS)
    (drawing,) = svgs([figure])
    ticks = [text for element in drawing.iter("text") if re.match(r"\d", text := element.text or "")]
    assert "nan" not in figure["svg"] and len(ticks) == len(set(ticks)) > 2


@pytest.mark.parametrize("length", [1, 100, 512, 22050])
def test_spectrograms_of_any_length(length):
    drawing = ElementTree.fromstring(plots.spectrogram(np.zeros(length, np.float32), RATE, "a & <b>"))
    (image,) = drawing.iter("image")
    assert drawing.get("aria-label") == "spectrogram of a & <b>" and image.get("href").startswith("data:image/png")


def test_definitions_keep_the_case_of_a_reason(evaluation):
    """The reason contains a command or path, which would be wrong in lower case."""
    reason = "not measured: download the weights with SQUIM_SUBJECTIVE.get_model()"
    definitions = dict(tables.definitions(replace(evaluation, absent={"Squim MOS": NotMeasured(reason)})))
    assert definitions["Squim MOS"].endswith(f" N{reason[1:]}.")


def page_of(evaluation):
    return report.page(
        title="Test <i>",
        subtitle="6 recordings.",
        quality=tables.quality(evaluation, KEYS),
        differences=tables.differences(evaluation, KEYS),
        tables=[tables.cost(evaluation), *tables.groups(evaluation, "lang")],
        gaps=tables.gaps(evaluation),
        definitions=tables.definitions(evaluation),
        command="nemo-lfr evaluate '<script>alert(1)</script>'",
        versions="none",
        plots=plots.metric_plots(evaluation, KEYS, METRICS),
        examples=[],
    )


def test_the_page_escapes_text_and_allows_only_its_own_script(evaluation):
    page = page_of(evaluation)
    assert "<b>bold" not in page and "<i>" not in page and "<script>alert" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert page.count('<td class="best"') >= 3 and "★" in page
    assert "prefers-color-scheme: dark" in page


PROBE = """
const table = document.querySelector("table"), header = table.tHead.rows[0].cells[3];
const column = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
const results = {buttons: document.querySelectorAll("thead button").length,
  headers: document.querySelectorAll("thead th").length, start: column(), states: [],
  overflow: document.documentElement.scrollWidth - innerWidth,
  svg: [...document.querySelectorAll("svg")].every(svg => svg.getBoundingClientRect().width > 250)};
for (let click = 0; click < 3; click++) {
  header.querySelector("button").click();
  results.states.push([header.getAttribute("aria-sort"), column()]);
}
document.querySelector("title").textContent = JSON.stringify(results);
"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")
def test_a_browser_sorts_the_tables_and_shows_the_plots_on_a_phone(evaluation, tmp_path):
    page = page_of(evaluation)
    allowed = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    page = page.replace("script-src ", f"script-src 'sha256-{allowed}' ")
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"<script>{PROBE}</script></body>"))
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --window-size=500,900 --dump-dom"
    )
    shown = [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(shown, capture_output=True, text=True, timeout=300)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    found = json.loads(html.unescape(title[1]))
    names = ["original", "a <b>bold</b> codec", "b", "c$_^"]
    pesq = {own.name: tables.means(own, KEYS)["PESQ-WB"].value for own in evaluation.results}
    ascending = sorted(names, key=lambda name: pesq[name])
    assert found["buttons"] == found["headers"] and found["overflow"] <= 0 and found["svg"]
    assert found["start"] == names
    assert found["states"] == [["ascending", ascending], ["descending", ascending[::-1]], [None, names]]
