"""Checks of README and docs: code blocks run, links have targets, and the README stays short."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile

import nemo_lfr
from nemo_lfr.pretrained import bundled_checkpoint

ROOT = Path(nemo_lfr.__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
# Blocks that begin with these commands change the environment; CI runs them.
SETUP = re.compile(r"^(pip install|pip wheel|make|uv|\.venv/bin/python -m pytest|pre-commit) ", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
SAMPLE_RATE = 22050


class Block(NamedTuple):
    """Fenced code block of a page, and the number of its first line."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that are run, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["code"], text[: match.start("code")].count("\n") + 1)
        for match in BLOCK.finditer(text)
        if match["language"] in ("python", "bash") and not match["reason"] and not SETUP.match(match["code"])
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Enter a folder with the files that the pages use: speech.wav, speech/, manifest.json and codec.nemo."""
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    voice = sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 20)) * (1 + np.sin(6 * time)) / 8
    speech = (voice + 0.003 * np.random.default_rng(0).standard_normal(len(time))).astype(np.float32)
    (tmp_path / "speech").mkdir()
    for path in ("speech.wav", "speech/a.wav", "speech/b.wav"):
        soundfile.write(tmp_path / path, speech, SAMPLE_RATE)
    lines = [{"audio_filepath": f"speech/{name}.wav", "text": name, "duration": 2.0} for name in "ab"]
    (tmp_path / "manifest.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(bundled_checkpoint(), tmp_path / "codec.nemo")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if (pid := tmp_path / "server.pid").exists():  # of a page that failed before it stopped its server
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def _registries() -> Iterator[None]:
    """Remove what a page registers, since its functions cannot be imported by other tests' processes."""
    from nemo_lfr.codec import backends
    from nemo_lfr.corpus import formats, sources
    from nemo_lfr.evaluation import codecs, metrics, model_metrics
    from nemo_lfr.training import components

    tables: list[Any] = [
        *(backends._OPENERS, formats._registered, codecs._registered, model_metrics._registered),
        *(metrics.METRICS, components._REGISTERED, sources.SOURCES),
    ]
    yield
    for table in tables:
        if isinstance(table, dict):
            for name in [name for name, value in table.items() if _is_of_page(value)]:
                del table[name]
        else:
            table[:] = [value for value in table if not _is_of_page(value)]


def _is_of_page(value: Any) -> bool:
    return getattr(getattr(value, "function", value), "__module__", "") == "docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
@pytest.mark.usefixtures("_registries")
def test_every_code_block_runs(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("docs")  # a real module, so that classes of a page can be pickled
    monkeypatch.setitem(sys.modules, "docs", module)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for block in blocks(page):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), module.__dict__)
        else:
            script = ["bash", "-eo", "pipefail", "-c", block.code]
            done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{name_of(page)}:{block.line}: {done.stderr}"


def test_no_two_pages_write_to_the_same_output() -> None:
    """Check that several pages can be followed in one folder. The README repeats other pages, so it is left out."""
    pages: dict[str, set[str]] = {}
    for page in PAGES[1:]:
        for block in blocks(page):
            for out in re.findall(r"--out[ =](\S+)", block.code):
                pages.setdefault(out.strip("\"'").rstrip("/"), set()).add(name_of(page))
    assert {out: names for out, names in pages.items() if len(names) > 1} == {} and len(pages) > 20


def test_the_readme_is_one_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = [match[1] for match in LINK.finditer(page.read_text(encoding="utf-8"))]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_installs_a_name_from_a_registry(page: Path) -> None:
    assert not re.search(r"pip install \"?nemo[-_]lfr(?!-[\d.]+-py3)", page.read_text(encoding="utf-8"))
