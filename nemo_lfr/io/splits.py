"""Names of the splits of a corpus, in the columns of tables and in the names of files and folders."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.io.text import is_missing

SPLITS = ("train", "valid", "test")
# Words that name a split: those that the Hugging Face Hub recognizes, and more. Held-out data comes first, so that a
# name with two words, such as train_dev, does not become training data.
WORDS = {
    "test": "test|testing|eval|evaluation",
    "valid": "validation|valid|val|dev|devel|development",
    "train": "train|training",
}
_PATTERNS = {
    split: re.compile(rf"(?:^|[\W_\d])(?:{words})(?:set)?(?:$|[\W_\d])", re.IGNORECASE)
    for split, words in WORDS.items()
}


def split_of_name(name: str) -> str | None:
    """Return the split that a name contains as a word, such as "valid" for "dev-clean"; None if it has none."""
    return next((split for split, pattern in _PATTERNS.items() if pattern.search(name)), None)


def split_of_parts(parts: Sequence[str]) -> str | None:
    """Return the split that the folders and file in a path name; the last one that names a split decides."""
    return next((split for part in reversed(parts) if (split := split_of_name(part))), None)


def split_label(value: Any) -> str | None:
    """Return the split that the value of a "split" column names; None if the value is empty.

    Raises:
        ValueError: if the value does not name a split. The row must then not be used, not even for training.
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    split = split_of_name(value) if isinstance(value, str) else None
    if split is None:
        raise ValueError(f"the split {shorten(repr(value))} is unknown; use train, validation or test")
    return split


def check_one_split(path: Path, splits: Iterable[str | None], advice: str) -> None:
    """Raise an error if the files of a folder belong to several splits.

    Args:
        path: the folder.
        splits: split of each file; None for files without one.
        advice: what to pass instead.

    Raises:
        ConfigError: if the files belong to several splits, or only some of them to one.
    """
    found = set(splits)
    if len(found) > 1:
        names = ", ".join(sorted(split for split in found if split))
        names += " and files without a split" if None in found else ""
        raise ConfigError(f"{path}: the folder contains the splits {names}, which must not be mixed; pass {advice}.")
