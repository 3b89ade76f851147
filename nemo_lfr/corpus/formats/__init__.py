"""Output formats of `tokenize`, one module each.

A module contains the writer, the reader and the summary files of its format. A new format is one subclass of
`OutputFormat`, decorated with `register_format`. A built-in format is a module of this folder with the format's name,
listed in `BUILT_IN`, and is imported on first use. This module imports no format, so that the command line can list
the formats quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from nemo_lfr.errors import NemoLfrError

if TYPE_CHECKING:
    from nemo_lfr.corpus.formats.base import OutputFormat

BUILT_IN = ("shar", "manifest", "parquet", "lfr")
_registered: dict[str, "type[OutputFormat]"] = {}


def register_format(output: "type[OutputFormat]") -> "type[OutputFormat]":
    """Register an output format under its `name`; usable as a class decorator.

    Define the class in a module that worker processes can import.

    Args:
        output: the format.

    Returns:
        The same class.
    """
    _registered[output.name] = output
    return output


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, the built-in ones first."""
    return tuple(dict.fromkeys((*BUILT_IN, *_registered)))


def get_format(name: str) -> "type[OutputFormat]":
    """Return the output format with a name.

    Args:
        name: value of `--format`.

    Raises:
        NemoLfrError: if no format with that name is registered.
    """
    if name in BUILT_IN and name not in _registered:
        import_module(f"{__name__}.{name}")  # the import registers the format
    if name not in _registered:
        raise NemoLfrError(f"format {name!r} is unknown; use one of {list(format_names())}.")
    return _registered[name]
