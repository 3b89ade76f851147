"""Recognize the splits of a corpus from names of files and folders, and from values of table columns."""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.io.text import is_missing

logger = logging.getLogger(__name__)

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
    """Return the split that a word in a name refers to, such as "valid" for "dev-clean"; None if no word does."""
    return next((split for split, pattern in _PATTERNS.items() if pattern.search(name)), None)


def split_of_parts(parts: Sequence[str]) -> str | None:
    """Return the split of a file from the parts of its path; None if no part contains the name of a split.

    If several parts contain the name of a split, the last one decides.
    """
    return next((split for part in reversed(parts) if (split := split_of_name(part))), None)


def splits_of_folders(
    corpus: Path, folders: set[tuple[str, ...]], speaker_level: int | None
) -> dict[tuple[str, ...], str | None]:
    """Return the split of the files in each folder, according to the folder's path; None for no split.

    If all folders have the same split, the result is None for each of them. If there is a validation set, folders
    without a split belong to "train".

    Args:
        corpus: folder of the corpus, for a warning.
        folders: folders with audio files. Each folder is a tuple of the folder names on its path from `corpus`.
        speaker_level: depth of the folders that are named after speakers; 1 is directly below `corpus`. The names of
            these folders are not searched for splits. None if there are no such folders.
    """
    level = slice(0, 0) if speaker_level is None else slice(speaker_level - 1, speaker_level)
    splits = {}
    for names in folders:
        parts = list(names)
        del parts[level]
        splits[names] = split_of_parts(parts)
    values = set(splits.values())
    if len(values) == 1:  # one split that contains all files does not divide the corpus
        return dict.fromkeys(splits)
    if None in values and (held_out := sorted(values - {None, "train"}, key=str)):
        text = "%s: some folders are named after splits, so their files are %s data; all other files are %s data."
        named = " and ".join("validation" if name == "valid" else str(name) for name in held_out)
        logger.warning(text, corpus, named, "training" if "valid" in values else "training or validation")
    rest = "train" if "valid" in values else None
    return {names: split or rest for names, split in splits.items()}


def split_label(value: Any) -> str | None:
    """Return the split that a value of a "split" column refers to; None if the value is missing or empty.

    Raises:
        ValueError: if the value does not name a split. The caller must skip such a row, since it may be test data.
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
        ConfigError: if the files belong to several splits, or if some of them have a split and others have none.
    """
    found = set(splits)
    if len(found) > 1:
        names = sorted(split for split in found if split)
        files = f"files of the split{'s' if len(names) > 1 else ''} {', '.join(names)}"
        files += " and files without a split" if None in found else ""
        raise ConfigError(f"{path}: the folder contains {files}, which must not be mixed; pass {advice}.")
