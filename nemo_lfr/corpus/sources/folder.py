"""Reader for a folder of audio files."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_lfr.corpus.inventory import digest
from nemo_lfr.corpus.sources.base import Clip, OpenOptions, unreadable
from nemo_lfr.corpus.sources.manifest import Manifest
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.folders import AUDIO_SUFFIXES, describe_contents
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.layouts import folder
from nemo_lfr.io.repeated import mark_repeated

# Key that marks an entry as unusable. The value is a list of two strings: the file or line, and the problem.
PROBLEM = "nemo_lfr.problem"


class Folder(Manifest):
    """Reader for a folder of audio files. The list of files is first written to a manifest, and then read from it."""

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path is a folder."""
        return path.is_dir()

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "Folder":
        """Write a manifest of the folder and open it. If `options.relist` is False, open the existing manifest."""
        return list_folder(path, options.listing) if options.relist else cls(options.listing, path)

    def _clip(self, name: str, labels: dict[str, Any]) -> Clip:
        place, problem = labels.pop(PROBLEM, ("", None))
        result = super()._clip(name, labels)
        if problem is None:
            return result
        return replace(result, origin=place, audio=unreadable(f"{place}: {problem}."), path=None)

    @property
    def identity(self) -> str:
        """Return a hash of the folder's path and its list of clips, 16 hex digits."""
        folder_and_files = f"{self.audio_dir} {digest(self.path)}".encode(errors="surrogateescape")
        return hashlib.sha256(folder_and_files).hexdigest()[:16]

    @property
    def base(self) -> None:
        """None, because the folder's path is part of `identity`."""


def unusable(name: str, place: str, problem: str) -> dict[str, Any]:
    """Return a manifest entry for a clip that cannot be used. The run reports such a clip as a failure.

    Args:
        name: name from which the clip's id is made.
        place: the file, or the line of a file, that has the problem.
        problem: reason why the clip cannot be used.
    """
    return {"audio_filepath": name, PROBLEM: [place, problem]}


def list_folder(root: Path, manifest: Path) -> Folder:
    """Write a manifest of the audio files in a folder, and open the manifest.

    Raises:
        NemoLfrError: if the folder contains no audio files.
    """
    lines = []
    for utterance in mark_repeated(folder(root)):
        entry = {"audio_filepath": str(utterance.path), **utterance.labels}
        for key in ("speaker", "split", "offset", "duration"):
            if (value := getattr(utterance, key)) not in ("", None):
                entry[key] = value
        if utterance.problem:
            entry |= unusable(str(utterance.path), str(root / utterance.path), utterance.problem)
        lines.append(json.dumps(entry, ensure_ascii=False))
    if not lines:
        contents = describe_contents(root, AUDIO_SUFFIXES)
        raise NemoLfrError(
            f"{root}: no audio file in this folder{contents}; pass a folder of audio files, or a manifest, cuts or a "
            "table."
        )
    write_text(manifest, "\n".join(lines) + "\n")
    return Folder(manifest, root)
