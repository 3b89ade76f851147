"""Select and read the recordings of an evaluation, and store a list of them in the output folder."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_lfr.corpus.inventory import digest
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.io.atomic import sweep
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.locate import resolve
from nemo_lfr.io.manifests import Recording
from nemo_lfr.io.reading import check_end, check_listed
from nemo_lfr.io.regular import open_regular

CLAIMS = "recordings.json"  # file in the output folder that describes each recording, by key
SOURCE = "source"  # key of the entry for the source; the keys of recordings start with digits


def choose(recordings: Sequence[Recording], limit: int | None, seed: int) -> dict[str, Recording]:
    """Select up to `limit` recordings at random.

    Args:
        recordings: recordings in the order of the manifest.
        limit: maximum number of recordings; None selects all.
        seed: random seed of the selection.

    Returns:
        A dictionary from unique keys to the selected recordings, in the order of the manifest. The key of a recording
        does not depend on `limit`.
    """
    indices = range(len(recordings))
    if limit is not None and limit < len(recordings):
        indices = sorted(random.Random(seed).sample(indices, limit))  # type: ignore[assignment]
    return {f"{index:05d}-{re.sub('[^A-Za-z0-9._-]', '_', recordings[index].name.stem)[:60]}": recordings[index]
            for index in indices}  # fmt: skip


def read(path: Path, rate: int, offset: float, duration: float) -> np.ndarray:
    """Read a segment of an audio file.

    Args:
        path: audio file.
        rate: sample rate to convert to, in Hz.
        offset: start of the segment in seconds.
        duration: length of the segment in seconds.

    Returns:
        Mono samples, shape [T].

    Raises:
        AudioError: if the file cannot be read, or ends before the end of the segment.
    """
    check_listed(path)
    with AudioReader(path, rate) as reader:
        check_end(reader, offset, duration, str(path))
        return reader.segment(offset, duration)


def claim(out: Path, recordings: dict[str, Recording], rate: int, source: str = "") -> None:
    """Add recordings to the file `recordings.json` in the folder of an evaluation.

    The file maps the key of each recording to its path, offset, duration, sample rate and hash. All recordings of an
    evaluation must come from the same source, such as one manifest.

    Args:
        out: folder of the evaluation.
        recordings: recordings by key, from `choose`.
        rate: sample rate of the comparison in Hz.
        source: text that identifies the source of the recordings; an empty string if the source is unknown.

    Raises:
        NemoLfrError: if `out` contains recordings from another source or at another rate, or if a recording has
            changed since it was added.
    """
    path = out / CLAIMS
    sweep(out, [path.name])
    files = {item.path for item in recordings.values() if item.path.is_file()}  # a missing file has no results
    contents = {file: digest(file)[:16] for file in files}
    claims: dict[str, object] = {
        key: [str(resolve(item.path)), item.offset, item.duration, rate, contents[item.path]]
        for key, item in recordings.items()
        if item.path in files
    }
    if source and files:
        claims[SOURCE] = source
    stored = _stored_claims(path)
    keys = {_position(key): key for key in stored}
    for key, value in claims.items():
        if keys.get(_position(key), key) != key or stored.get(key, value) != value:
            raise NemoLfrError(
                f"{out}: this folder contains an evaluation of other or changed recordings, or at another sample "
                "rate; choose another --out."
            )
    write_text(path, json.dumps(stored | claims, ensure_ascii=False, indent=0))


def _stored_claims(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        with open_regular(path) as file:
            stored = json.load(file)
        if not isinstance(stored, dict):
            raise ValueError("expected a JSON object")
    except OSError as error:
        raise NemoLfrError(f"{path}: the file cannot be read ({error.strerror}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise NemoLfrError(f"{path}: the file is damaged ({shorten(error, 200)}); choose another --out.") from error
    return stored


def _position(key: str) -> str:
    """Return the position of a recording in its source: the digits at the start of the recording's key."""
    return key.partition("-")[0]
