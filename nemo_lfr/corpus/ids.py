"""Clip ids: unique relative paths that every file system and archive accepts.

Ids have no file suffix. The same rules apply when tokens are written and when a folder of tokens from another machine
is read: a path joined from a folder, an id and a suffix never leaves the folder.
"""

import hashlib
import re
import unicodedata
from pathlib import Path, PurePosixPath

# File systems allow 255 bytes per path component. The remainder is for ".flac" and for temporary suffixes of writers.
MAX_COMPONENT_BYTES = 240
MAX_ID_BYTES = 700
HASH_DIGITS = 12
# Characters that Windows rejects, and those that change how a line of text is displayed or split.
_NOT_PORTABLE = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"|?*\\\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]',
)
# Windows opens a device for these names, with any suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\.|$)", re.IGNORECASE)
# A folder with such a name could collide with another clip's file.
_FILE_SUFFIX = re.compile(r"\.(lfr|pt|wav|flac)$", re.IGNORECASE)


def clean_id(name: str) -> str:
    """Return a valid clip id for any name.

    The id is a relative path without traversal, with portable characters and bounded length. Ordinary names and
    results of this function are returned unchanged. A component or name that is too long is truncated and ends with a
    hash of the full text, so that different names stay different.
    """
    components = [part for part in PurePosixPath(name).parts if part not in ("/", "//", ".", "..")]
    if not components:
        return "_"
    *folders, last = [_clean_component(part) for part in components]
    cleaned = "/".join([*(_shorten(_FILE_SUFFIX.sub(r".\1_", folder)) for folder in folders), _shorten(last)])
    if len(cleaned.encode()) > MAX_ID_BYTES:
        return _shorten(last, of=name)
    return cleaned


def numbered_id(clip_id: str, number: int) -> str:
    """Return the id of the `number`-th clip with the same name (unchanged for 1)."""
    if number < 2:
        return clip_id
    folder, slash, last = clip_id.rpartition("/")
    return folder + slash + _shorten(f"{last}~{number}")


class UniqueIds:
    """Counter that makes the ids of clips with the same name unique, in order.

    Ids that a file system could treat as equal are the same: case and Unicode normalization make no difference.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def number(self, clip_id: str) -> int:
        """Register a clean id and return the number that makes it unique.

        See `numbered_id`.
        """
        key = _collision_key(clip_id)
        number = self._counts.get(key, 0) + 1
        if number > 1:
            while (other := _collision_key(numbered_id(clip_id, number))) in self._counts:
                number += 1
            self._counts[other] = 1
        self._counts[key] = number
        return number

    def add(self, name: str) -> str:
        """Return a clean id for any name that differs from all previous ids."""
        clip_id = clean_id(name)
        return numbered_id(clip_id, self.number(clip_id))


def path_inside(folder: Path, name: str) -> Path | None:
    """Return the path of a file that `name` refers to, if it is inside the folder.

    Absolute paths are allowed if they lead into the folder. Links are resolved before the comparison.

    Args:
        folder: the folder.
        name: a relative or absolute path.

    Returns:
        The resolved path, or None if it is outside the folder.
    """
    try:
        path = Path(folder, name).resolve()
        return path if path.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL character, or a name that is too long
        return None


def _clean_component(text: str) -> str:
    text = _NOT_PORTABLE.sub("_", text)
    kept = text.rstrip(". ")  # Windows removes trailing dots and spaces
    text = kept + "_" * (len(text) - len(kept))
    return f"_{text}" if _RESERVED.match(text) else text


def _shorten(text: str, of: str | None = None) -> str:
    """Truncate a component to the allowed length, with a hash at the end.

    With `of`, the result always ends with the hash of that text.
    """
    data = text.encode()
    if of is None and len(data) <= MAX_COMPONENT_BYTES:
        return text
    digest = hashlib.sha256((text if of is None else of).encode(errors="surrogatepass")).hexdigest()[:HASH_DIGITS]
    kept = data[: MAX_COMPONENT_BYTES - 1 - HASH_DIGITS].decode(errors="ignore")
    return f"{kept}-{digest}"


def _collision_key(clip_id: str) -> str:
    if clip_id.isascii():
        return clip_id.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", clip_id).casefold())
