"""Make clip ids that are unique and can be used as relative paths on Linux, macOS and Windows.

A clean id contains no `..` and no leading slash, so a path joined from a folder, an id and a file suffix is inside the
folder. Ids are cleaned when tokens are written, and again when tokens are decoded to files.
"""

import hashlib
import re
import unicodedata
from pathlib import Path, PurePosixPath

from nemo_lfr.io.locate import resolve

# File systems allow 255 bytes per path component. The remaining 15 bytes are for ".flac" and for suffixes of temporary
# files.
MAX_COMPONENT_BYTES = 240
MAX_ID_BYTES = 700
HASH_DIGITS = 12
# Characters that Windows rejects, and those that change how a line of text is displayed or split.
_BAD = r'\x00-\x1f\x7f-\x9f<>:"|?*\\\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff'
_NOT_PORTABLE = re.compile(f"[{_BAD}]")
# Names for which Windows opens a device, with or without a suffix.
_DEVICE = r"(?i:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *"
_RESERVED = re.compile(rf"{_DEVICE}(\.|$)")
# Suffixes that the folders in an id must not have: such a folder could have the same path as another clip's file.
_SUFFIX = r"\.(?i:(lfr|pt|wav|flac))"
_FILE_SUFFIX = re.compile(rf"{_SUFFIX}$")
# Matches names that are clean ids, apart from a leading slash and their length. Most names are, so this saves time.
_PART = rf"(?!{_DEVICE}(?:[./]|$))[^{_BAD}/]*[^{_BAD}/. ]"
_CLEAN = re.compile(rf"/?(?!.*{_SUFFIX}/){_PART}(?:/{_PART})*")


def clean_id(name: str) -> str:
    """Return a valid clip id for any name.

    The id is a relative path that does not leave its folder, has a bounded length, and consists of characters that
    Linux, macOS and Windows accept. A name that already is such a path is returned unchanged. A name that is too long
    is shortened, and a hash is appended, so that different names stay different.
    """
    if _CLEAN.fullmatch(name) and len(name.encode()) <= MAX_COMPONENT_BYTES:
        return name.removeprefix("/")
    components = [part for part in PurePosixPath(name).parts if part not in ("/", "//", ".", "..")]
    if not components:
        return "_"
    *folders, last = [_clean_component(part) for part in components]
    cleaned = "/".join([*(_shorten(_FILE_SUFFIX.sub(r".\1_", folder)) for folder in folders), _shorten(last)])
    if len(cleaned.encode()) > MAX_ID_BYTES:
        return _shorten(last, of=name)
    return cleaned


def numbered_id(clip_id: str, number: int) -> str:
    """Return the id of the `number`-th clip with the clean id `clip_id`: "a" for the first, "a~2" for the second."""
    if number < 2:
        return clip_id
    folder, slash, last = clip_id.rpartition("/")
    return folder + slash + _shorten(f"{last}~{number}")


class UniqueIds:
    """Counter that numbers repeated clip names, to make the ids of clips unique.

    Names that differ only in case or Unicode normalization count as equal, since some file systems ignore both.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def number(self, clip_id: str) -> int:
        """Register a clean id, and return the number to pass to `numbered_id` to make the id unique."""
        key = _collision_key(clip_id)
        number = self._counts.get(key, 0) + 1
        if number > 1:
            while (other := _collision_key(numbered_id(clip_id, number))) in self._counts:
                number += 1
            self._counts[other] = 1
        self._counts[key] = number
        return number

    def add(self, name: str) -> str:
        """Return a clean id for any name. The id differs from all ids that this method has returned before."""
        clip_id = clean_id(name)
        return numbered_id(clip_id, self.number(clip_id))


def path_inside(folder: Path, name: str) -> Path | None:
    """Return the path of a file that `name` refers to, if it is inside the folder.

    An absolute path is accepted if it leads into the folder. Links are resolved before the comparison.

    Args:
        folder: the folder.
        name: a relative or absolute path.

    Returns:
        The resolved path, or None if it is outside the folder or cannot be resolved.
    """
    try:
        path = resolve(Path(folder, name))
        return path if path.is_relative_to(resolve(folder)) else None
    except (OSError, ValueError):  # a cycle of links, a NUL character, or a name that is too long
        return None


def _clean_component(text: str) -> str:
    text = _NOT_PORTABLE.sub("_", text)
    kept = text.rstrip(". ")  # Windows removes trailing dots and spaces
    text = kept + "_" * (len(text) - len(kept))
    return f"_{text}" if _RESERVED.match(text) else text


def _shorten(text: str, of: str | None = None) -> str:
    """Truncate a path component that is too long, and append a hash of its full text.

    If `of` is passed, a hash of `of` is appended instead, even to a short component.
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
