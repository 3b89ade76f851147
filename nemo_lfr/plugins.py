"""Entry points through which installed packages extend this package.

A package lists its extensions in `pyproject.toml`:

    [project.entry-points."nemo_lfr.formats"]
    text = "my_package.text_format:TextFormat"

The groups are `nemo_lfr.backends`, `nemo_lfr.sources`, `nemo_lfr.formats` and `nemo_lfr.commands`. An extension is
imported when it is used. For codecs and metrics of evaluations, see `nemo_lfr.evaluation.plugins`.
"""

from typing import TYPE_CHECKING, Any

from nemo_lfr.errors import NemoLfrError, shorten

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def plugin_names(group: str) -> list[str]:
    """Return the sorted names of a group's entry points, without importing them."""
    from importlib.metadata import entry_points  # slow to import

    return sorted({point.name for point in entry_points(group=group)})


def load_plugin(group: str, name: str) -> Any:
    """Import an extension of an installed package.

    Args:
        group: group of the entry point, such as "nemo_lfr.formats".
        name: name of the entry point.

    Returns:
        The object that the entry point names, or None if there is no entry point of this name.

    Raises:
        NemoLfrError: if it cannot be imported.
    """
    from importlib.metadata import entry_points

    for point in entry_points(group=group, name=name):
        try:
            return point.load()
        except Exception as error:  # importing a package may raise anything
            reason = shorten(" ".join(str(error).split()), 200)
            raise NemoLfrError(f"{_described(point)} cannot be loaded ({reason}); repair or uninstall it.") from error
    return None


def _described(point: "EntryPoint") -> str:
    package = f" of the package {point.dist.name}" if point.dist is not None else ""
    return f"{point.group}: {point.name!r}{package}"
