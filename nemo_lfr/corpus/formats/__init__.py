"""Output formats of `tokenize`, one module each.

A module contains the writer, the reader and the summary files of its format. A new format is one subclass of
`OutputFormat`, decorated with `register_format`. A package lists it in the entry-point group `nemo_lfr.formats`, and
`nemo-lfr tokenize --format` then accepts it. A built-in format is a module of this folder with the format's name,
listed in `BUILT_IN`, and is imported on first use. This module imports no format, so that the command line can list
the formats quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.plugins import load_plugin, plugin_names

if TYPE_CHECKING:
    from nemo_lfr.corpus.formats.base import OutputFormat

ENTRY_POINTS = "nemo_lfr.formats"
BUILT_IN = ("shar", "manifest", "parquet", "lfr")
_registered: dict[str, "type[OutputFormat]"] = {}


def register_format(output: "type[OutputFormat]") -> "type[OutputFormat]":
    """Register an output format under its `name`; can be used as a class decorator.

    Define the class in a module that worker processes can import.

    Args:
        output: the format.

    Returns:
        The same class.
    """
    _registered[output.name] = output
    return output


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, the built-in ones first and those of installed packages last."""
    return tuple(dict.fromkeys((*BUILT_IN, *_registered, *plugin_names(ENTRY_POINTS))))


def get_format(name: str) -> "type[OutputFormat]":
    """Return the output format with a name.

    Args:
        name: value of `--format`.

    Raises:
        NemoLfrError: if no format with that name is registered, or if a package's format cannot be imported.
    """
    if name not in _registered:
        if name in BUILT_IN:
            import_module(f"{__name__}.{name}")  # the import registers the format
        elif (output := load_plugin(ENTRY_POINTS, name)) is not None:
            _registered[name] = output
        else:
            raise NemoLfrError(f"format {name!r} is unknown; use one of {list(format_names())}.")
    return _registered[name]
