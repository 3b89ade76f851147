"""Load extensions that other installed packages provide through entry points.

A package lists its extensions in its `pyproject.toml`:

    [project.entry-points."nemo_lfr.formats"]
    text = "my_package.text_format:TextFormat"

The groups are `nemo_lfr.backends`, `nemo_lfr.sources`, `nemo_lfr.formats` and `nemo_lfr.commands`. An extension is
imported on first use. Extensions for evaluations (codecs and metrics) use other groups;
see `nemo_lfr.evaluation.plugins`.
"""

from typing import TYPE_CHECKING, Any

from nemo_lfr.errors import NemoLfrError, shorten

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def plugin_names(group: str) -> list[str]:
    """Return the sorted names of the entry points in a group, without importing the extensions."""
    from importlib.metadata import entry_points  # imported late, because importing it is slow

    return sorted({point.name for point in entry_points(group=group)})


def load_plugin(group: str, name: str) -> Any:
    """Import an extension of an installed package.

    Args:
        group: group of the entry point, such as "nemo_lfr.formats".
        name: name of the entry point.

    Returns:
        The object that the entry point names, or None if there is no entry point of this name.

    Raises:
        NemoLfrError: if the extension cannot be imported.
    """
    from importlib.metadata import entry_points

    for point in entry_points(group=group, name=name):
        try:
            return point.load()
        except Exception as error:  # importing a package may raise anything
            reason = shorten(" ".join(str(error).split()), 200)
            raise NemoLfrError(
                f"{_described(point)} cannot be loaded ({reason}); repair or uninstall this package."
            ) from error
    return None


def _described(point: "EntryPoint") -> str:
    package = f" of the package {point.dist.name}" if point.dist is not None else ""
    return f"entry point {point.name!r} (group {point.group}){package}"
