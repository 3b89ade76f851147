"""Find the files and folders that match a glob pattern."""

import glob
import os
from collections.abc import Iterator

from nemo_lfr.io.folders import BROKEN, file_identity

_SEPARATORS = {"/", os.sep}


def find_matches(pattern: str, unread: list[OSError] | None = None) -> list[str]:
    """Return the paths that match a glob pattern, sorted.

    `**` matches any number of nested folders. At the end of a pattern, it has no effect: `FOLDER/**` matches only
    FOLDER. As in `glob.glob`, a hidden name matches only if the pattern contains its dot. Links to folders are
    followed. A folder that is reached more than once, for example through a link to its parent, is read once.

    Args:
        pattern: the pattern.
        unread: list to which the errors of unreadable folders are added. If it is None, these folders are ignored.
    """
    errors: list[OSError] = []
    found = _matches(pattern, errors)
    if unread is not None:
        unread += {os.path.abspath(error.filename): error for error in errors}.values()
    return found


def _matches(pattern: str, unread: list[OSError]) -> list[str]:
    """Return the sorted paths that match a glob pattern. The errors of unreadable folders are added to `unread`."""
    head, star, tail = pattern.partition("**")
    if not star or (head and head[-1] not in _SEPARATORS) or (tail and tail[0] not in _SEPARATORS):
        return _glob(pattern, unread)
    tail = tail.lstrip("".join(_SEPARATORS))
    roots = _glob(head, unread) if head else ["."]
    if not tail:
        return sorted(roots)
    found: set[str] = set()
    for root in roots:
        for folder in _folders_below(root, unread):
            path = os.path.join(glob.escape(os.path.relpath(folder) if not head else folder), tail)
            found.update(_matches(os.path.normpath(path) if not head else path, unread))
    return sorted(found)


def _glob(pattern: str, unread: list[OSError]) -> list[str]:
    """Return the paths that match a pattern without `**`, sorted. Unreadable folders add errors to `unread`."""
    parent, rest = os.path.split(pattern.rstrip("".join(_SEPARATORS)))
    while rest:
        if glob.has_magic(rest):
            for folder in glob.glob(parent) if parent else ["."]:
                try:
                    os.scandir(folder).close()
                except OSError as error:
                    if error.errno not in BROKEN:
                        unread.append(error)
        parent, rest = os.path.split(parent)
    return sorted(glob.glob(pattern))


def _folders_below(root: str, unread: list[OSError]) -> Iterator[str]:
    """Yield a folder, and each folder below it exactly once. Hidden folders are skipped.

    The errors of folders that cannot be read are added to `unread`.
    """
    seen = {file_identity(os.stat(root))}

    def is_new(path: str) -> bool:
        try:
            identity = file_identity(os.stat(path))
        except OSError as error:
            if error.errno not in BROKEN:
                unread.append(error)
            return False
        new = identity not in seen
        seen.add(identity)
        return new

    for folder, names, _ in os.walk(root, onerror=unread.append, followlinks=True):
        shown = [name for name in names if not name.startswith(".")]
        shown.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        names[:] = [name for name in shown if is_new(os.path.join(folder, name))]
        yield folder
