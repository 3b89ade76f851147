"""Find and read the supervisions (texts and speakers) that accompany a file of Lhotse recordings."""

import json
import logging
import os
import re
from pathlib import Path

from nemo_lfr.errors import ConfigError, counted, shorten
from nemo_lfr.io.json_lines import json_lines
from nemo_lfr.io.manifests import NOT_A_LINE

logger = logging.getLogger(__name__)

# Suffixes of files of JSON lines
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_SUFFIX = re.compile(r"\.jsonl?(\.gz)?$")


def supervisions_beside(recordings: Path) -> Path | None:
    """Return the file of supervisions that accompanies a file of recordings; None if it does not exist.

    Lhotse's recipes write both files to the same folder. Their names differ in the word "recordings" or
    "supervisions", and also in the suffix if only one of them is compressed.

    Raises:
        ConfigError: if there is more than one such file.
    """
    head, word, tail = recordings.name.rpartition("recordings")
    middle = _SUFFIX.sub("", tail)
    paths = [recordings.with_name(f"{head}supervisions{middle}{suffix}") for suffix in SUFFIXES] if word else []
    paths = [path for path in paths if os.path.lexists(path)]
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        raise ConfigError(f"{recordings}: its supervisions are in {names}; remove all but one of these files.")
    return paths[0] if paths else None


def check_supervisions(recordings: Path) -> None:
    """Warn if a file of recordings has no supervisions; refuse supervisions in a JSON list.

    Raises:
        ConfigError: if several files could be the supervisions, or if the file of supervisions is a JSON list.
    """
    if (path := supervisions_beside(recordings)) is not None:
        refuse_list(path)
        return
    names = sorted(path.name for path in recordings.parent.glob("*supervisions*"))
    logger.warning(
        "%s: no file of supervisions with a matching name in this folder%s, so the clips have no texts and speakers.",
        recordings,
        f" (found {shorten(', '.join(names), 200)})" if names else "",
    )


def refuse_list(path: Path) -> None:
    """Raise ConfigError if a file contains a JSON list instead of JSON lines. Lhotse writes lists to .json files."""
    if next(json_lines(path), b"").lstrip().startswith(b"["):
        raise ConfigError(f"{path}: the file is a JSON list; save it as .jsonl or .jsonl.gz with `lhotse copy`.")


def read_supervisions(recordings: Path) -> dict[str, list[bytes]]:
    """Read the supervisions file that accompanies a file of recordings.

    Returns:
        Dict from each recording id to its supervisions, as JSON lines to save memory; empty if there is no such file.
    """
    path = supervisions_beside(recordings)
    found: dict[str, list[bytes]] = {}
    bad = 0
    for line in json_lines(path) if path else ():
        try:
            found.setdefault(str(json.loads(line)["recording_id"]), []).append(line)
        except NOT_A_LINE:
            bad += 1
    if bad:
        logger.warning("%s: skipped %s without a valid supervision.", path, counted(bad, "line"))
    return found
