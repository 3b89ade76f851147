"""Find the codecs and metrics of this package and of other installed packages.

A codec or metric is registered when its module is imported. To make the command line import such a module, a package
lists it in the entry-point group `nemo_lfr.evaluation`:

    [project.entry-points."nemo_lfr.evaluation"]
    my_codecs = "my_package.codecs"
"""

import logging
import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from nemo_lfr.errors import NemoLfrError, shorten

logger = logging.getLogger(__name__)

ENTRY_POINTS = "nemo_lfr.evaluation"


@cache
def import_submodules(package: str) -> None:
    """Import all modules of a package, in alphabetical order."""
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


@cache
def load_plugins() -> None:
    """Import the modules in the entry-point group `nemo_lfr.evaluation`.

    If a module cannot be imported, a warning is logged, and the module's codecs and metrics are not available. Only
    the first call does anything.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except (Exception, SystemExit) as error:  # another package's module may raise anything
            logger.warning(
                "the codecs and metrics of %s are not available, because this module cannot be imported (%s: %s)",
                point.value, type(error).__name__, shorten(error, 200),
            )  # fmt: skip


def add_entry(table: dict[str, Any], name: str, value: Any, kind: str) -> None:
    """Add an entry to a table of codecs or metrics.

    An existing entry with the same name, module and class (or function) is replaced, so that a notebook cell can be
    run twice.

    Args:
        table: the table.
        name: name of the entry.
        value: the entry: a class, or an object with an attribute `function`.
        kind: noun for the entries in the error message, such as "codec".

    Raises:
        NemoLfrError: if another entry has this name.
    """
    if name in table and _origin(table[name]) != _origin(value):
        raise NemoLfrError(f"{kind} {name!r} is already registered; choose another name.")
    table[name] = value


def in_order(table: dict[str, Any], package: str) -> dict[str, Any]:
    """Sort a table of classes by the names of their modules, built-in classes first.

    Args:
        table: classes by name, in the order in which they were registered.
        package: name of the package that contains the built-in classes.
    """

    def place(item: tuple[str, Any]) -> tuple[bool, str]:
        module = item[1].__module__
        return not module.startswith(f"{package}."), module

    return dict(sorted(table.items(), key=place))


def _origin(value: Any) -> tuple[str, str]:
    defined = value if isinstance(value, type) else value.function
    return getattr(defined, "__module__", ""), getattr(defined, "__qualname__", "")
