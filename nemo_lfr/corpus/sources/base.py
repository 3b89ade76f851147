"""Base class for corpus readers, and the types of clips and shard specifications.

No audio is read when a corpus is split into shards. The specification of a shard is a small JSON object, from which
any worker can find the clips of the shard. An audio file is opened only when its clip is loaded.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nemo_lfr.corpus.inventory import digest
from nemo_lfr.errors import AudioError

# Function (sample rate in Hz, maximum duration in seconds) -> samples [T_audio], float32.
AudioLoader = Callable[[int, float], np.ndarray]
# JSON object that specifies which clips of the corpus a shard consists of.
ShardSpec = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """One utterance of a corpus.

    Attributes:
        id: name that is unique in the corpus, and that can be used as a relative path without suffix.
        origin: file, and row or cut, from which the clip was read; for messages.
        audio: function that loads the samples, or raises AudioError.
        context: function that loads the context audio, on which a TTS model is conditioned; None if the clip has none.
        labels: labels in the corpus ("text", "speaker", "lang", "audio_filepath" ...).
        cut: Lhotse cut as a dictionary; None if the clip was not read from a cut.
        path: audio file that contains the clip; None if it is not known.
    """

    id: str
    origin: str
    audio: AudioLoader
    context: AudioLoader | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    cut: dict[str, Any] | None = None
    path: Path | None = None


@dataclass(frozen=True)
class OpenOptions:
    """Options for opening a corpus. Each reader uses only the options that apply to its kind of corpus.

    Attributes:
        audio_dir: folder that relative paths in a manifest or table start from; None for the folder of the manifest
            or table.
        listing: path of the list of clips that the readers `Folder` and `TextTable` write.
        relist: whether to write `listing`, check the corpus and log warnings. Only the process that plans a run does
            this. If False, an existing list is read.
        allow_url: whether to download audio from http(s) URLs in Lhotse manifests.
    """

    audio_dir: Path | None
    listing: Path
    relist: bool = True
    allow_url: bool = False


class CorpusReader(ABC):
    """Base class for corpus readers, which yield the clips of a corpus in a fixed order.

    Attributes:
        base_advice: advice for users who want relative paths in the corpus to start from another folder, such as
            "pass --audio-dir {}". "{}" stands for the path of this folder.
    """

    base_advice: ClassVar[str] = "pass --audio-dir {}"

    @classmethod
    @abstractmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether this class reads an existing file or folder."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path, options: OpenOptions) -> "CorpusReader":
        """Open a corpus. `accepts` must have returned True for its path.

        Raises:
            NemoLfrError: if the corpus cannot be read.
        """

    @property
    def identity(self) -> str:
        """Return a hash of the list of clips. A run is resumed only if the hash is unchanged.

        The hash does not depend on the path of the corpus, so that a run can be resumed after the corpus was moved. By
        default, this is a hash of the contents of `files`.
        """
        return hashlib.sha256("".join(digest(path) for path in self.files).encode()).hexdigest()[:16]

    def older_shards(self, identity: str, shards: list[ShardSpec], size: int) -> list[ShardSpec] | None:
        """Convert the shards of a plan that an earlier version of this reader made.

        Args:
            identity: hash of the corpus in the plan, which differs from the current `identity`.
            shards: shards in the plan.
            size: number of clips per shard.

        Returns:
            The shards in the form of this version; None if the plan was made for another corpus. By default,
            this method returns None.
        """
        return None

    @property
    def base(self) -> Path | None:
        """Folder that relative paths of audio files start from; None if the corpus has no such paths.

        It is part of the plan of a run, because two corpora with the same list can be in different folders.
        """
        return None

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """Return the files that list the clips.

        Shard specifications refer to clips by their position in these files.
        """

    def files_of(self, shard: ShardSpec) -> list[Path]:
        """Return the files among `files` from which a shard is read; by default all of them."""
        return self.files

    @abstractmethod
    def shards(self, size: int) -> list[ShardSpec]:
        """Split the corpus into shards of `size` clips. The last shard may be smaller."""

    @abstractmethod
    def read(self, shard: ShardSpec) -> Iterator[Clip]:
        """Yield the clips of a shard in order.

        A malformed entry of the corpus becomes a clip whose `audio` function raises AudioError.
        """


def repeat_number(shard: ShardSpec, index: int) -> int:
    """Return the number with which `numbered_id` makes the id of a clip unique.

    Clips with the same name are numbered from 1 in order. A number is skipped if the id with this number, such as
    "a~2", is the name of another clip.

    Args:
        shard: specification of the shard. For clips whose name has occurred before, the dictionary "repeats" maps the
            index of the clip, as text, to the number.
        index: index of the clip in the shard.
    """
    number: int = shard.get("repeats", {}).get(str(index), 1)
    return number


def unreadable(message: str) -> AudioLoader:
    """Return an audio loader that raises AudioError with this message."""
    return partial(_raise, message)


def _raise(message: str, sample_rate: int, longest: float) -> np.ndarray:
    raise AudioError(message)
