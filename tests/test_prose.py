"""Tests of the prose in code and documentation: spelling, and phrases that are not plain technical English."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nemo_lfr", "tests", "docs", "benchmarks", "conf", "examples", "recipes")
THIS_FILE = Path(__file__).resolve()
# Regular expressions of phrases, and what to write instead. Matching ignores case and line breaks.
BANNED = {
    r"light door|nemo's doors?": "standalone API, NeMo integration",
    r"embedded codec": "bundled codec",
    r"tokens of record": "reference tokens",
    r"what there is": "name the thing",
    r"for ever": "forever, without end",
    r"(can|could|cannot|may|to) be had": "is available, can be downloaded",
    r"be it (?=\w+ or )": "whether",
    r"that (is|are) none": "invalid, without",
    r"goes? on (from|with|where)": "continues, resumes",
    r"(is|are|was|were|be) told to": "receives a signal, is asked to",
    r"(is|are|was|were|be) judged": "is validated, is checked",
    r"a stranger's|of strangers": "untrusted",
    r"at hand": "available",
    r"anew": "again",
    r"amid": "during",
    r"says so": "reports it",
    r"under its hands": "while it runs",
    r"once more": "again",
    r"whatever of it": "any of it",
}
WORDS = re.compile(
    r"\b(?:" + "|".join(f"(?P<p{i}>{phrase})" for i, phrase in enumerate(BANNED)) + r")\b", re.IGNORECASE
)


# Python's tokenizer, written in Python, takes ten times as long as this expression.
STRING_OR_COMMENT = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|(?P<comment>\#[^\n]*)""",
    re.DOTALL,
)


def pieces_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each string and each block of comments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    block: list[str] = []
    first = last = 0
    start, line = 0, 1
    for match in STRING_OR_COMMENT.finditer(text):
        line += text.count("\n", start, match.start())
        start = match.start()
        if match["comment"] is None:
            continue
        if block and line != last + 1:
            yield first, " ".join(block)
            block = []
        if not block:
            first = line
        last = line
        block.append(match["comment"].lstrip("#"))
    yield first, " ".join(block)


def pieces_of_notebook(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each cell."""
    for number, cell in enumerate(json.loads(text)["cells"], 1):
        yield number, "".join(cell["source"])


def pieces_of_text(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each paragraph."""
    line = 1
    for paragraph in text.split("\n\n"):
        yield line, paragraph
        line += paragraph.count("\n") + 2


PIECES = {".py": pieces_of_python, ".ipynb": pieces_of_notebook, ".md": pieces_of_text, ".yaml": pieces_of_text}
FILES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")))
    if path.suffix in PIECES and path != THIS_FILE
)


def faults(text: str, suffix: str) -> list[str]:
    """Return the banned phrases of a text, each with its line and a replacement."""
    found = []
    for line, piece in PIECES[suffix](text):
        prose = re.sub(r"[\s#]+", " ", piece)
        for match in WORDS.finditer(prose):
            instead = list(BANNED.values())[int(str(match.lastgroup)[1:])]
            context = prose[max(0, match.start() - 40) : match.end() + 30]
            found.append(f"{line}: {match[0]!r} in {context!r}; write: {instead}")
    return found


@pytest.mark.slow
def test_no_phrase_of_the_list_is_used() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in FILES
        for fault in faults(path.read_text(encoding="utf-8"), path.suffix)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "suffix", "count"),
    [
        ('"""Opens for\never."""', ".py", 1),
        ("# the light\n# door", ".py", 1),
        ("x = 1  # anew\ny = 2  # and\nz = 3\n# anew", ".py", 2),
        ('raise ValueError(f"{x} cannot be " "had from {y}")', ".py", 1),
        ("def anew(): pass", ".py", 0),
        ("Tokens of\nrecord.\n\nIt goes on with that.", ".md", 2),
        (json.dumps({"cells": [{"source": ["at ", "hand"]}]}), ".ipynb", 1),
        ("renewed hands, foreverness", ".md", 0),
    ],
)
def test_phrases_are_found_in_strings_comments_and_text(text: str, suffix: str, count: int) -> None:
    assert len(faults(text, suffix)) == count


def test_spelling_is_american() -> None:
    pytest.importorskip("codespell_lib", reason="pip install codespell")
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *map(str, FILES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
