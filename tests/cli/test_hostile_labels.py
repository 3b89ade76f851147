"""Tests that untrusted labels and names of a manifest are escaped in every format of the `evaluate` report."""

import base64
import csv
import hashlib
import json
import os
from html.parser import HTMLParser

import pytest
import soundfile

from tests.cli.test_cli import run
from tests.models import RATE, synthesize
from tests.packages import require

require("matplotlib", reason="pip install '.[evaluate]'")

LABELS = [
    "=cmd|' /C calc'!A0",
    "<script>alert(1)</script>",
    "a | b\n# heading",
    "\x1b[31mred\x07\u202e\u2066",
    "[a](javascript:alert(1))",
]


class Scripts(HTMLParser):
    """Parser that collects the text of the script elements of a page."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._inside = False

    def handle_starttag(self, tag, attrs):
        self._inside = tag == "script"
        assert not [name for name, _ in attrs if name.startswith("on")]
        assert not [value for name, value in attrs if name in ("href", "src") and value.startswith("javascript:")]

    def handle_data(self, data):
        if self._inside:
            self.found.append(data)

    def handle_endtag(self, tag):
        self._inside = False


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="such names are not allowed there")
def test_labels_and_names_are_escaped_in_tables_pages_and_terminals(tmp_path, capsys):
    lines = []
    for number, label in enumerate(LABELS):
        name = f"{label.replace('/', '_')}.wav"
        soundfile.write(open(tmp_path / name, "wb"), synthesize(0.5, number), RATE, format="WAV")  # noqa: SIM115
        lines.append({"audio_filepath": name, "duration": 0.5, "text": label, "lang": label, "speaker": label})
    lines.append({"audio_filepath": f"{LABELS[3]}-missing.wav", "duration": 0.5, "lang": LABELS[3]})
    manifest, out = tmp_path / "m.json", tmp_path / "out"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--codec", "original", "--out", out, "--workers", 1, "--by", "lang", "--examples", 5]
    code, _, err = run(capsys, "evaluate", manifest, *arguments)
    assert code == 1 and all(char.isprintable() or char == "\n" for char in err)
    with open(out / "recordings.csv", newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert "'=cmd|' _C calc'!A0.wav" in cells and all(cell.isprintable() for cell in cells)
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+", "\t"))]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text and "\n# heading" not in text
    assert text.count("](javascript") == text.count("\\](javascript")
    assert all(char.isprintable() or char == "\n" for char in text)
    page = (out / "report.html").read_text(encoding="utf-8")
    scripts = Scripts()
    scripts.feed(page)
    (script,) = scripts.found
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page  # the page's own
    assert all(char.isprintable() or char == "\n" for char in page)
