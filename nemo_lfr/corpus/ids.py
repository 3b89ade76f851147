"""Clip ids: relative paths without suffix that every file system and archive takes, and that no two clips share.

The same rules apply where tokens are written and where a folder of tokens from elsewhere is read: a path joined from
a folder, an id and a suffix never leaves the folder.
"""

import hashlib
import re
import unicodedata
from pathlib import Path, PurePosixPath

# File systems take 255 bytes for each component of a path; the rest is for ".flac" and for what writers add meanwhile.
MAX_COMPONENT_BYTES = 240
MAX_ID_BYTES = 700
HASH_DIGITS = 12
# Characters that Windows refuses, and those that would change how a line of text is shown or split.
_NOT_PORTABLE = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"|?*\\\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]',
)
# Windows opens a device for these names, whatever their suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\.|$)", re.IGNORECASE)
# A folder with such a name could be in the place of another clip's file.
_FILE_SUFFIX = re.compile(r"\.(lfr|pt|wav|flac)$", re.IGNORECASE)


def clean_id(name: str) -> str:
    """Return a clip id for any name: a relative path without traversal, of portable characters and bounded length.

    Ordinary names are returned as they are, and so is every result of this function. A component or a name that is
    too long is cut, and ends with a hash of all of it, so that different names stay different.
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
    """Return the id of the `number`-th clip that has the same name; that of the first is the name."""
    if number < 2:
        return clip_id
    folder, slash, last = clip_id.rpartition("/")
    return folder + slash + _shorten(f"{last}~{number}")


class UniqueIds:
    """Numbers clips of one name, in the order in which they come.

    Two ids are the same if a file system could take them for the same: upper and lower case, and the ways to write
    an accent, do not make a difference.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def number(self, clip_id: str) -> int:
        """Register a clean id; returns the number that makes it unique, see `numbered_id`."""
        key = _collision_key(clip_id)
        number = self._counts.get(key, 0) + 1
        if number > 1:
            while (other := _collision_key(numbered_id(clip_id, number))) in self._counts:
                number += 1
            self._counts[other] = 1
        self._counts[key] = number
        return number

    def add(self, name: str) -> str:
        """Return a clean id for any name that no clip before has got."""
        clip_id = clean_id(name)
        return numbered_id(clip_id, self.number(clip_id))


def path_inside(folder: Path, name: str) -> Path | None:
    """Return the path of a file that a text below `folder` names, or None if it lies elsewhere.

    Absolute paths are allowed as long as they lead into the folder; links are followed before they are compared.
    """
    try:
        path = Path(folder, name).resolve()
        return path if path.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError, RuntimeError):  # a loop of links, NUL, a name that is too long
        return None


def _clean_component(text: str) -> str:
    text = _NOT_PORTABLE.sub("_", text)
    kept = text.rstrip(". ")  # Windows drops them at the end
    text = kept + "_" * (len(text) - len(kept))
    return f"_{text}" if _RESERVED.match(text) else text


def _shorten(text: str, of: str | None = None) -> str:
    """Cut a component to the allowed length; with `of`, mark it with the hash of that text in any case."""
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
