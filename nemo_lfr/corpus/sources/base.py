"""Base classes of corpus readers, the clip, and the shard specification.

Planning reads no audio. A shard specification is a few numbers, from which any worker finds its clips again. Audio is
opened only on request, so an unreadable file is a failure of its clip alone.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lfr.corpus.inventory import digest
from nemo_lfr.errors import AudioError

# (sample rate in Hz, longest duration in seconds) -> samples [T_audio], float32.
AudioLoader = Callable[[int, float], np.ndarray]
# Which clips of the corpus make one shard; plain JSON.
ShardSpec = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """One utterance of a corpus.

    Attributes:
        id: unique in the corpus, and usable as a relative path without suffix.
        origin: where the clip comes from, for messages.
        audio: loads the samples; raises AudioError.
        context: loads the audio that a TTS model is conditioned on; None if the clip has no context.
        labels: labels of the input ("text", "speaker", "lang", "audio_filepath" ...).
        cut: the Lhotse cut as a dict, if the clip was one.
        path: the audio file that contains the clip.
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
    """Options for opening a corpus; each reader uses those that apply to it.

    Attributes:
        audio_dir: folder of the relative paths in a manifest or table; its own folder if None.
        listing: path of the file list of a folder of audio.
        relist: whether to list a folder again instead of reading `listing`. True in the process that plans a run,
            which also logs warnings about the corpus; False in its workers.
        allow_url: read audio that Lhotse manifests place at an http(s) URL.
    """

    audio_dir: Path | None
    listing: Path
    relist: bool = True
    allow_url: bool = False


class CorpusReader(ABC):
    """Base class of corpus readers: clips in a fixed order."""

    @classmethod
    @abstractmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether this reader is the one for an existing file or folder."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path, options: OpenOptions) -> "CorpusReader":
        """Open a corpus that `accepts` returned True for.

        Raises:
            NemoLfrError: if the corpus cannot be read.
        """

    @property
    def identity(self) -> str:
        """Return a hash of the list of clips, by default of `files`; a run is not resumed with a changed list."""
        return hashlib.sha256("".join(digest(path) for path in self.files).encode()).hexdigest()[:16]

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """Return the files that list the clips.

        A shard locates its clips by their position in these files.
        """

    def files_of(self, shard: ShardSpec) -> list[Path]:
        """Return those of `files` from which a shard is read."""
        return self.files

    @abstractmethod
    def shards(self, size: int) -> list[ShardSpec]:
        """Split the corpus into shards of `size` clips; the last one may be smaller."""

    @abstractmethod
    def read(self, shard: ShardSpec) -> Iterator[Clip]:
        """Yield the clips of a shard in order.

        A malformed entry yields a clip whose `audio()` raises AudioError.
        """


def repeat_number(shard: ShardSpec, index: int) -> int:
    """Return which occurrence of its id a shard's clip is: 1 for the first.

    See `numbered_id`.
    """
    number: int = shard.get("repeats", {}).get(str(index), 1)
    return number


def unreadable(message: str) -> AudioLoader:
    """Return a loader that raises AudioError with a message."""
    return partial(_raise, message)


def _raise(message: str, sample_rate: int, longest: float) -> np.ndarray:
    raise AudioError(message)
