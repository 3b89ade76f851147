"""Reader for a folder of audio files."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_lfr.corpus.sources.base import Clip, OpenOptions, ShardSpec, unreadable
from nemo_lfr.corpus.sources.manifest import Manifest
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.folders import AUDIO_SUFFIXES, describe_contents
from nemo_lfr.io.journal import ANY_NAME, write_text
from nemo_lfr.io.layouts import folder
from nemo_lfr.io.repeated import mark_repeated
from nemo_lfr.io.segment_columns import SegmentCheck

# Key of an entry that cannot be used. Its value is the reason; see `unusable`.
PROBLEM = "nemo_lfr.problem"


class Folder(Manifest):
    """Reader for a folder of audio files. The list of files is first written to a manifest, and then read from it.

    Args:
        path: the manifest.
        audio_dir: folder that relative paths of audio files start from.
        root: folder to put before the name of an unusable entry in messages; None for `audio_dir`.
    """

    base_advice = "pass {} as the corpus"

    def __init__(self, path: Path, audio_dir: Path, root: Path | None = None) -> None:
        super().__init__(path, audio_dir)
        self.root = root or audio_dir

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path is a folder."""
        return path.is_dir()

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "Folder":
        """Write a manifest of the folder and open it. If `options.relist` is False, open the existing manifest."""
        return list_folder(path, options.listing) if options.relist else cls(options.listing, path)

    def _clip(self, name: str, labels: dict[str, Any]) -> Clip:
        problem = labels.pop(PROBLEM, None)
        result = super()._clip(name, labels)
        if problem is None:
            return result
        place = str(self.root / labels["audio_filepath"])
        return replace(result, origin=place, audio=unreadable(f"{place}: {problem}."), path=None)

    def _check_segment(self, line: bytes, check: SegmentCheck) -> None:
        """Do nothing, because `read_table` has checked the tables in the folder."""

    def older_shards(self, identity: str, shards: list[ShardSpec], size: int) -> list[ShardSpec] | None:
        """Return the shards if `identity` is the hash that an older version computed for this folder; otherwise None.

        Older versions also hashed the path of the folder.
        """
        listing = hashlib.sha256()
        with open(self.path, "rb") as file:
            for line in file:
                if PROBLEM.encode() in line:
                    entry = json.loads(line)
                    entry[PROBLEM] = [str(self.root / entry["audio_filepath"]), entry[PROBLEM]]
                    line = f"{json.dumps(entry, ensure_ascii=False)}\n".encode("utf-8", ANY_NAME)
                listing.update(line)
        folder_and_files = f"{self.audio_dir} {listing.hexdigest()}".encode(errors="surrogateescape")
        return self.shards(size) if identity == hashlib.sha256(folder_and_files).hexdigest()[:16] else None


def unusable(name: str, problem: str) -> dict[str, Any]:
    """Return a manifest entry for a clip that cannot be used. The run reports such a clip as a failure.

    Args:
        name: the file, or the line of a file, that has the problem. The clip's id is made from it.
        problem: reason why the clip cannot be used.
    """
    return {"audio_filepath": name, PROBLEM: problem}


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
            entry |= unusable(str(utterance.path), utterance.problem)
        lines.append(json.dumps(entry, ensure_ascii=False))
    if not lines:
        contents = describe_contents(root, AUDIO_SUFFIXES)
        raise NemoLfrError(
            f"{root}: no audio file in this folder{contents}; pass a folder of audio files, or a manifest, cuts or a "
            "table."
        )
    write_text(manifest, "\n".join(lines) + "\n")
    return Folder(manifest, root)
