"""Load extensions that other installed packages provide through entry points.

A package lists its extensions in its `pyproject.toml`:

    [project.entry-points."nemo_lfr.formats"]
    text = "my_package.text_format:TextFormat"

The groups are `nemo_lfr.backends`, `nemo_lfr.sources`, `nemo_lfr.formats` and `nemo_lfr.commands`. An extension is
imported on first use. Codecs and metrics for evaluations have their own group; see `nemo_lfr.evaluation.plugins`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.io.shortage import shortage_of

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


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
        except (Exception, SystemExit) as error:  # importing a package may raise anything
            message = f"it exits with {error}" if isinstance(error, SystemExit) else str(error)
            reason = shorten(" ".join(message.split()), 200)
            raise NemoLfrError(
                f"{_described(point)} cannot be loaded ({reason}); repair or uninstall this package."
            ) from error
    return None


def _described(point: "EntryPoint") -> str:
    package = f" of the package {point.dist.name}" if point.dist is not None else ""
    return f"entry point {point.name!r} (group {point.group}){package}"


@contextmanager
def naming_extension(extension: Any, role: str) -> Iterator[None]:
    """Replace an unexpected error of an extension by an error that names the extension and its package.

    Errors of this package, of the operating system and of click are raised unchanged, as are EOFError and errors from
    a lack of memory. If `extension` belongs to this package, no error is replaced.

    Args:
        extension: the class or function that is called in the context, or an instance of the class.
        role: noun for the extension, such as "output format".

    Raises:
        NemoLfrError: for any other exception.
    """
    try:
        yield
    except (NemoLfrError, OSError, EOFError):
        raise
    except Exception as error:  # the code of another package may raise anything
        is_click = type(error).__module__.startswith("click.")  # a usage error, or a request to exit
        if is_click or not is_foreign(extension) or shortage_of(error) is not None:
            raise
        reason = shorten(" ".join(str(error).split()), 200)
        raise NemoLfrError(
            f"the {role} {described(extension)} raised {type(error).__name__} ({reason}); correct this error "
            "in the extension, or report it to its author. --verbose prints the traceback."
        ) from error


def named_items(extension: Any, role: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items that an extension supplies. Errors of the extension are replaced as in `naming_extension`."""
    with naming_extension(extension, role):
        iterator = iter(items)
    while True:
        with naming_extension(extension, role):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def is_foreign(extension: Any) -> bool:
    """Return whether a class, function or instance is defined outside this package."""
    return _module(extension).partition(".")[0] != __name__.partition(".")[0]


def described(extension: Any) -> str:
    """Return the full name of an extension, and the name of its package if it is known.

    For an instance, the full name is that of its class.
    """
    from importlib.metadata import entry_points

    module = _module(extension)
    defined = extension if hasattr(extension, "__qualname__") else type(extension)
    name = f"{module}.{defined.__qualname__}"
    top = module.partition(".")[0]
    for group in ("backends", "sources", "formats", "commands"):
        for point in entry_points(group=f"nemo_lfr.{group}"):
            if point.dist is not None and point.value.partition(":")[0].partition(".")[0] == top:
                return f"{name} of the package {point.dist.name}"
    return name


def _module(extension: Any) -> str:
    return str(getattr(extension, "__module__", ""))
