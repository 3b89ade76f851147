"""Output formats of `tokenize`, one module each.

Each module defines the writer, the reader and the summary files of its format. To add a format, define a subclass of
`OutputFormat` and decorate it with `register_format`. If an installed package lists the class in the entry-point group
`nemo_lfr.formats`, `nemo-lfr tokenize --format` accepts the name of the format.

`BUILT_IN` lists the names of the built-in formats, which are also the names of their modules. Formats are imported on
first use, so that the command line can list their names quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.plugins import load_plugin, plugin_names

if TYPE_CHECKING:
    from nemo_lfr.corpus.formats.base import OutputFormat

ENTRY_POINTS = "nemo_lfr.formats"
FORMAT = "output format"  # noun for messages about the errors of other packages' formats
BUILT_IN = ("shar", "manifest", "parquet", "lfr")
_registered: dict[str, "type[OutputFormat]"] = {}


def register_format(output: "type[OutputFormat]") -> "type[OutputFormat]":
    """Register an output format under its `name`. This function can be used as a class decorator.

    Define the class in a module that worker processes can import.

    Args:
        output: class of the format.

    Returns:
        `output` itself.
    """
    _registered[output.name] = output
    return output


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, the built-in ones first and those of installed packages last."""
    return tuple(dict.fromkeys((*BUILT_IN, *_registered, *plugin_names(ENTRY_POINTS))))


def get_format(name: str) -> "type[OutputFormat]":
    """Return the class of the output format with this name.

    Args:
        name: value of `--format`.

    Raises:
        NemoLfrError: if there is no format with this name, or if the format of an installed package cannot be
            imported.
    """
    if name not in _registered:
        if name in BUILT_IN:
            import_module(f"{__name__}.{name}")  # the import registers the format
        elif (output := load_plugin(ENTRY_POINTS, name)) is not None:
            _registered[name] = output
        else:
            raise NemoLfrError(f"format {name!r} is unknown; use one of {list(format_names())}.")
    return _registered[name]
