"""Tests of the limits on the length of files and functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemo_lfr

PACKAGE = Path(nemo_lfr.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60

# Longer ones, and why
LONG_FILES = {
    "io/token_file.py": "specification, writer and reader of one file format",
}
LONG_FUNCTIONS = {
    "codec/cuda/triton_kernels.py": {"convolution_kernel": "most lines are arguments, which Triton cannot group"},
}


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Yield the name of each function and its lines, without decorators and docstring."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
            yield node.name, lines(node) - (lines(docstring) if docstring else 0)


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", FILES)
def test_only_the_listed_files_and_functions_are_long(path):
    text = (PACKAGE / path).read_text(encoding="utf-8")
    assert (text.count("\n") > MAX_FILE) == (path in LONG_FILES)
    assert {name for name, size in functions(text) if size > MAX_FUNCTION} == set(LONG_FUNCTIONS.get(path, {}))
