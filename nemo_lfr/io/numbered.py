"""Find the files that are missing from a numbered set, such as `train-00001-of-00003.parquet`."""

import re
from collections.abc import Iterable
from pathlib import Path

from nemo_lfr.errors import ConfigError, shorten

# Names such as "train-00000-of-00003.parquet". Older versions of `datasets` added a hash after the numbers.
_NUMBERED = re.compile(r"(?P<head>.*?)(?P<index>\d+)(?P<of>[-_. ]?of[-_. ]?)(?P<total>\d+)(?P<tail>.*)", re.IGNORECASE)
NAMED = 5  # maximum number of missing files that a message names
MAX_TOTAL = 1_000_000  # a larger number of files is not plausible, so the name has another meaning


def missing_files(paths: Iterable[Path]) -> list[str]:
    """Return the names of the files that are missing from numbered sets, in order and without their folders.

    Args:
        paths: the files that exist. The files of a set are in the same folder, and have names such as
            `train-00001-of-00003-1a2b.parquet`. The number (00001) and the text after the total (-1a2b) may differ.
    """
    sets: dict[tuple[Path, str, str, int, str], dict[int, re.Match[str]]] = {}
    for path in paths:
        found = _NUMBERED.fullmatch(path.stem)
        if found and 0 < int(found["total"]) <= MAX_TOTAL and int(found["index"]) <= int(found["total"]):
            key = (path.parent, found["head"], found["of"], int(found["total"]), path.suffix)
            sets.setdefault(key, {})[int(found["index"])] = found
    missing = []
    for (_, head, of, total, suffix), files in sets.items():
        some = next(iter(files.values()))
        first = 1 if total in files and 0 not in files else 0  # the files of some programs are numbered from 1
        absent = [index for index in range(first, first + total) if index not in files]
        missing += [f"{head}{index:0{len(some['index'])}d}{of}{some['total']}{suffix}" for index in absent]
    return missing


def check_numbered(folder: Path, paths: Iterable[Path]) -> None:
    """Check that each numbered set, such as `train-00001-of-00003.parquet`, is complete.

    Args:
        folder: folder of the files, for the message.
        paths: the files that exist.

    Raises:
        ConfigError: if files of a set are missing.
    """
    if missing := missing_files(paths):
        names = ", ".join(shorten(name) for name in missing[:NAMED])
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise ConfigError(
            f"{folder}: files are missing: {names}{more}; copy them into the folder. To use only the existing files, "
            "remove the total (such as '-of-00003') from their names."
        )
