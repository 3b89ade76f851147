"""Output formats of `tokenize`: one file for each, which contains its writer, its reader and its summary files.

A new format is one subclass of `OutputFormat`, decorated with `register_format`. A built-in one is a module of this
folder with the format's name, listed in `BUILT_IN`, and is imported when it is first used: this file imports no
other, so that the command line can list the formats at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from nemo_lfr.errors import NemoLfrError

if TYPE_CHECKING:
    from nemo_lfr.corpus.formats.base import OutputFormat

BUILT_IN = ("shar", "manifest", "parquet", "lfr")
_registered: dict[str, "type[OutputFormat]"] = {}


def register_format(output: "type[OutputFormat]") -> "type[OutputFormat]":
    """Add an output format under its `name`; usable as a class decorator.

    Define the class in a module that worker processes can import.
    """
    _registered[output.name] = output
    return output


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, the built-in ones first."""
    return tuple(dict.fromkeys((*BUILT_IN, *_registered)))


def get_format(name: str) -> "type[OutputFormat]":
    """Return the format of a name.

    Raises:
        NemoLfrError: if no format of that name is registered.
    """
    if name in BUILT_IN and name not in _registered:
        import_module(f"{__name__}.{name}")  # registers it
    if name not in _registered:
        raise NemoLfrError(f"format {name!r} is unknown; use one of {list(format_names())}.")
    return _registered[name]
