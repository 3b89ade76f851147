"""Tests that imports follow the order of `ORDER` and have no cycles, among folders and among files.

Imports in functions, imports for type checkers, and imports by a name in a string are included.
"""

import ast
import functools
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import nemo_lfr

PACKAGE = Path(nemo_lfr.__file__).parent

# A module may only import modules that are listed above it.
ORDER = (
    "_version",
    "telemetry",
    "errors",
    "arguments",
    "bundled",
    "frames",
    "spec",
    "modules",
    "signal",
    "lm",
    "io",
    "plugins",
    "client",
    "audio",
    "manifests",
    "tokens",
    "checkpoint",
    "codec",
    "streaming",
    "pretrained",
    "transformers",
    "training",
    "nemo",
    "model",
    "corpus",
    "evaluation",
    "web",
    "serve",
    "cli",
    "__main__",
    "testing",
    "__init__",  # of the package; no module imports its public names
)


class Import(NamedTuple):
    """Import of one of our modules by another, named without the package's prefix."""

    importer: str
    imported: str
    where: str


def module_at(path: Path) -> str:
    """Return the module name of a file; that of a folder ends in `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def resolve(parts: list[str]) -> str:
    """Return the module that a dotted name refers to: a file, a folder's `__init__`, or the module with that name."""
    while parts:
        if PACKAGE.joinpath(*parts).with_suffix(".py").is_file():
            return ".".join(parts)
        if PACKAGE.joinpath(*parts, "__init__.py").is_file():
            return ".".join([*parts, "__init__"])
        parts = parts[:-1]
    return "__init__"


def imported_modules(node: ast.AST, path: Path) -> Iterator[str]:
    """Yield our modules that one statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
        yield from (resolve(name[1:]) for name in names if name[0] == PACKAGE.name)
    elif isinstance(node, ast.ImportFrom):
        base = (node.module or "").split(".") if node.module else []
        if node.level:
            folder = path.parent if node.level == 1 else path.parents[node.level - 1]
            base = [PACKAGE.name, *folder.relative_to(PACKAGE).parts, *base]
        if base[0] == PACKAGE.name:
            yield from (resolve([*base[1:], alias.name]) for alias in node.names)
    elif isinstance(node, ast.Call) and (
        getattr(node.func, "attr", None) == "import_module"
        or getattr(node.func, "id", None) in ("import_module", "__import__")
    ):
        for text in ast.walk(node):
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                base = [part for part in text.value.split(".") if part]
                if base[:1] == [PACKAGE.name]:
                    yield resolve(base[1:])


@functools.cache
def all_imports() -> list[Import]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for module in imported_modules(node, path):
                where = f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"
                found.append(Import(module_at(path), module, where))
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def test_every_folder_and_file_has_a_place_in_the_order():
    assert {top(module_at(path)) for path in PACKAGE.rglob("*.py")} <= set(ORDER)


def test_imports_go_down_the_list():
    wrong = [
        f"{entry.where}: {entry.importer} imports {entry.imported}"
        for entry in all_imports()
        if ORDER.index(top(entry.importer)) < ORDER.index(top(entry.imported))
    ]
    assert not wrong, "\n".join(wrong)


def folders() -> list[str]:
    """Return the package and all folders in it."""
    return sorted({module_at(path).rpartition(".")[0] for path in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("folder", folders())
def test_imports_form_no_cycle(folder):
    """Check the members of one folder at a time; a subfolder counts as one member."""
    prefix = folder + "." if folder else ""
    graph: dict[str, set[str]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for entry in all_imports():
        if entry.importer.startswith(prefix) and entry.imported.startswith(prefix):
            importer, imported = top(entry.importer[len(prefix) :]), top(entry.imported[len(prefix) :])
            if importer != imported:
                graph.setdefault(importer, set()).add(imported)
                reasons.setdefault((importer, imported), f"{entry.where}: {entry.importer} imports {entry.imported}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1][::-1]
        pytest.fail("\n".join(reasons[pair] for pair in itertools.pairwise(cycle)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nemo_lfr.errors", {"errors"}),
        ("import nemo_lfr.errors as e, os", {"errors"}),
        ("from nemo_lfr import frames, load", {"frames", "__init__"}),
        ("from nemo_lfr.codec.arrays import Array", {"codec.arrays"}),
        ("from nemo_lfr.codec import arrays", {"codec.arrays"}),
        ("from nemo_lfr.checkpoint import build_parts", {"checkpoint.__init__"}),
        ("from . import arrays", {"codec.arrays"}),
        ("from ..errors import shorten", {"errors"}),
        ("from .. import frames", {"frames"}),
        ("def f():\n    from nemo_lfr.frames import Window", {"frames"}),
        ("if TYPE_CHECKING:\n    import nemo_lfr.frames", {"frames"}),
        ("import_module('nemo_lfr.pretrained').load()", {"pretrained"}),
        ("importlib.import_module(f'nemo_lfr.codec.{name}')", {"codec.__init__"}),
        ("__import__('nemo_lfr.errors', fromlist=['x'])", {"errors"}),
        ("import nemo, torch", set()),
    ],
)
def test_imports_of_every_spelling_are_seen(text, expected):
    nodes = ast.walk(ast.parse(text))
    path = PACKAGE / "codec" / "some_file.py"
    assert {module for node in nodes for module in imported_modules(node, path)} == expected
