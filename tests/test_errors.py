"""Tests of shortened text and of the commands that install optional packages."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from nemo_lfr import errors
from nemo_lfr.errors import NEMO_PACKAGES, install_command, shorten

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _fresh_requirements():
    errors._requirements.cache_clear()
    yield
    errors._requirements.cache_clear()


@pytest.mark.parametrize(
    ("requirements", "packages", "command"),
    [
        (['PyStoi; extra == "demo"'], ["pystoi"], "pip install PyStoi"),
        (['lhotse>=1.30; extra == "corpus"'], ["lhotse"], 'pip install "lhotse>=1.30"'),
        (['nemo-toolkit[tts]>=3.0; extra == "nemo"'], ["nemo_toolkit[tts]"], 'pip install "nemo-toolkit[tts]>=3.0"'),
        (['av>=12; extra == "a"', 'av>=13; extra == "b"'], ["av"], 'pip install "av>=12"'),
        ([], ["pystoi", "pesq"], "pip install pystoi pesq"),
        ([], ["nemo_toolkit[tts]"], 'pip install "nemo_toolkit[tts]"'),
        (None, ["datasets"], "pip install datasets"),
    ],
)
def test_an_install_command_names_packages_with_our_version_limits(monkeypatch, requirements, packages, command):
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    assert install_command(*packages) == command


def test_an_install_command_works_where_the_package_is_not_installed(monkeypatch):
    def raise_not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", raise_not_found)
    assert install_command(*NEMO_PACKAGES).startswith('pip install "nemo_toolkit[tts]" lightning')


@pytest.mark.slow
def test_no_file_tells_users_to_install_an_unpublished_name():
    pattern = re.compile(r"(?:pip|uv add|uv pip)\b[^\n]*install[^\n]*nemo[-_]lfr(?!-[\d.]+-py3)\[")
    folders = ("nemo_lfr", "tests", "examples", "benchmarks", "recipes", "conf", "docs")
    suffixes = {".py", ".ipynb", ".md", ".yaml"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert [str(path) for path in [*files, ROOT / "README.md"] if pattern.search(path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\nb\x1b[0m", "a?b?[0m"), ("x" * 100, "x" * 80 + "..."), (10**5000, "int"), ("\u202egpj.exe", "?gpj.exe")],
    ids=["controls", "long", "integer of too many digits", "writing direction"],
)
def test_shortened_text_is_one_printable_line(text, expected):
    assert shorten(text) == expected
