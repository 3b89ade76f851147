"""NeMo manifests: JSON lines, one recording each."""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from nemo_lfr.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """One line of a manifest."""

    dataset: str
    path: Path
    name: Path  # relative to the dataset's audio_dir
    offset: float  # seconds
    duration: float
    labels: dict[str, Any] = field(default_factory=dict, compare=False)  # the whole line


def read_manifest(
    path: str | os.PathLike[str], audio_dir: str | os.PathLike[str], dataset: str = ""
) -> list[Recording]:
    """The recordings of a NeMo manifest: JSON lines with `audio_filepath`, and `offset` and `duration` in seconds.

    A duration that is missing is read from the file's header.

    Raises:
        ConfigError: naming the manifest and the line.
    """
    recordings = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # text may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the manifest cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = Path(entry["audio_filepath"])
            full = name if name.is_absolute() else Path(audio_dir, name)
            duration = entry.get("duration")
            if duration is None:
                duration = soundfile.info(str(full)).duration
            recordings.append(Recording(dataset, full, name, float(entry.get("offset") or 0), float(duration), entry))
        except soundfile.LibsndfileError as error:
            logger.warning("%s, line %d: passed by: %s", path, number, error)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}, line {number}: not a line of a NeMo manifest: {error!r}") from error
    return recordings
