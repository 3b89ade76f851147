"""Base classes for output formats, and for the writers and readers of their shards.

Tokens are stored as int16 if a codebook has at most 32,768 entries, and as int32 otherwise. If a writer
gets the same clips again, it must write the same bytes again.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nemo_lfr.corpus.ids import path_inside
from nemo_lfr.corpus.records import ShardRecord
from nemo_lfr.corpus.sources.base import Clip
from nemo_lfr.errors import MissingExtraError, TokenFileError, shorten
from nemo_lfr.io.atomic import naming
from nemo_lfr.io.bounded import lines
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.locate import resolve
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.token_file import Metadata

REPAIR = "run the same tokenize command again to repair the folder"


class FormatWriter(ABC):
    """Base class for writers, each of which writes the tokens of one shard.

    Args:
        folder: an empty folder to write to. The caller moves the files to `final` when the shard is complete.
        final: the output folder of the run.
        index: index of the shard.
        codec: properties of the codec that made the tokens, such as its levels and fingerprint.
        dataset: name of the corpus.
        context: whether to also write the tokens of context audio (audio on which a TTS model is conditioned).
        model: entropy model for compressing the tokens, in formats that support compression; None for no compression.
    """

    def __init__(
        self,
        folder: Path,
        final: Path,
        index: int,
        codec: Metadata,
        dataset: str,
        context: bool,
        model: EntropyModel | None = None,
    ) -> None:
        self.folder, self.final, self.index = folder, final, index
        self.codec, self.dataset, self.context, self.model = codec, dataset, context, model
        self.dtype = np.int16 if codec.codebook_size <= 2**15 else np.int32

    @abstractmethod
    def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
        """Append a clip.

        Args:
            clip: the clip with its id and labels.
            tokens: integer tokens [C, T].
            num_samples: number of audio samples that the tokens represent.
            context: tokens of the context audio [C, T]; None if the clip has no context audio.
        """

    @abstractmethod
    def close(self) -> None:
        """Write the remaining files of the shard, even if the shard has no clips."""

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """Yield the path of a file to write. An OSError in this context names the final path of the file."""
        path = self.folder / name
        with naming(self.final / name, self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path

    def _duration(self, num_samples: int) -> float:
        return round(num_samples / self.codec.sample_rate, 6)


class Damage(str):
    """Message about damage to the files of a shard. Some utterances of the shard may still be readable."""


class Row:
    """Utterance that is loaded when `load` is called, so that an error in its data affects no other utterance.

    Args:
        load: function that returns the utterance as a dictionary; see the method `load`.
        *arguments: arguments of the function.
    """

    def __init__(self, load: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        self._load, self._arguments = load, arguments

    def load(self) -> dict[str, Any]:
        """Load the utterance as a dictionary.

        Returns:
            Dictionary with "id", "tokens" [C, T], "num_samples" and "labels" (a dictionary). If the utterance has
            context audio, the tokens of this audio are in "context" [C, T].

        Raises:
            Exception: of a type that depends on the format, if the utterance cannot be read.
        """
        return self._load(*self._arguments)


class ShardFiles:
    """Access to the files of a shard. Each file is compared with the shard's record before its path is returned.

    Args:
        folder: the output folder of the run.
        shard: index of the shard.
        verify: whether to compare the files' hashes with the record, and not only their sizes.
        first: number of utterances in all shards before this one.
    """

    def __init__(self, folder: Path, shard: int, verify: bool, first: int = 0) -> None:
        self.folder, self.shard, self.verify, self.first = folder, shard, verify, first
        self._record = ShardRecord.read(folder, shard)

    def path(self, name: str) -> Path:
        """Return the path of a file if it is intact.

        Args:
            name: path of the file relative to the output folder.

        Raises:
            TokenFileError: if the file is missing, damaged or outside the folder.
        """
        path, damage = self.path_and_damage(name)
        if damage:
            raise TokenFileError(damage)
        return path

    def path_and_damage(self, name: str) -> tuple[Path, Damage | None]:
        """Return the path of a file and, if its size is wrong, a message about the damage.

        The beginning of a file with the wrong size may still be readable.

        Args:
            name: path of the file relative to the output folder.

        Raises:
            TokenFileError: if the file is missing or outside the folder, or if it is damaged and `verify` is set.
        """
        path = self._path(name)
        problem = self._damage(path)
        if problem and self.verify:
            raise TokenFileError(f"{problem}; {REPAIR}.")
        return path, Damage(f"{problem}; {REPAIR}.") if problem else None

    def _path(self, name: str) -> Path:
        path = path_inside(self.folder, name)
        if path is None:
            raise TokenFileError(
                f"{self.folder}: file {shorten(name, 200)!r} is outside this folder and is not read; {REPAIR}."
            )
        return regular_file(path)

    def _damage(self, path: Path) -> str | None:
        if self._record is None:
            return None
        root = resolve(self.folder)
        name = path.relative_to(root).as_posix()
        if name not in self._record.files:
            return None
        return self._record.damage(root, name, verify=self.verify)


class FormatReader(ABC):
    """Base class for readers of a folder of tokens.

    Args:
        folder: the output folder of the run.
        summary: validated content of `tokens.json`.
        codec: properties of the codec that made the tokens, such as its levels and fingerprint.
    """

    def __init__(self, folder: Path, summary: dict[str, Any], codec: Metadata) -> None:
        self.folder, self.summary, self.codec = folder, summary, codec

    def count_shards(self) -> list[int]:
        """Count the utterances in each shard.

        This method is only used for runs that did not record these numbers. By default, it reads the shards.
        """
        return self._shard_counts(
            lambda files: sum(isinstance(row, Row) for row in self.rows(files, 0, self.summary["clips"]))
        )

    def num_files(self) -> int:
        """Return an upper bound for the number of shards. By default, this is the number of files in the folder."""
        return sum(path.is_file() for path in self.folder.rglob("*"))

    @abstractmethod
    def rows(self, files: ShardFiles, start: int, stop: int) -> Iterator[Row | Damage]:
        """Yield the utterances [start, stop) of a shard, and messages about damage.

        An implementation may also yield the utterances after `stop`.
        """

    def _shard_counts(self, count: Callable[[ShardFiles], int]) -> list[int]:
        """Return the number of utterances in each shard, according to `count`.

        Shards for which `count` fails get equal shares of the remaining utterances. The number of remaining
        utterances is the total in `tokens.json` minus the counts of the other shards.
        """
        counts: list[int | None] = []
        for shard in range(self.summary["shards"]):
            try:
                counts.append(count(ShardFiles(self.folder, shard, verify=False)))
            except MissingExtraError:
                raise
            except Exception:  # raised again when the shard is read
                counts.append(None)
        rest = max(0, self.summary["clips"] - sum(known or 0 for known in counts))
        unknown = counts.count(None)
        shares = iter([rest * (number + 1) // unknown - rest * number // unknown for number in range(unknown)])
        return [next(shares) if known is None else known for known in counts]


class OutputFormat:
    """Base class for output formats. Register a subclass with `register_format`.

    Attributes:
        name: value of `--format`.
        writer: class that writes one shard.
        reader: class that reads the shards.
        supports_context: whether the format can store the tokens of context audio.
        supports_compression: whether `writer` compresses tokens with the entropy model.
        summary_files: names of the files that `finish` writes.
    """

    name: ClassVar[str]
    writer: ClassVar[type[FormatWriter]]
    reader: ClassVar[type[FormatReader]]
    supports_context: ClassVar[bool] = True
    supports_compression: ClassVar[bool] = False
    summary_files: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def finish(cls, out: Path, num_shards: int, context: bool) -> None:
        """Write the files that summarize all shards. By default, a format has no such files.

        Args:
            out: the output folder of the run.
            num_shards: number of shards. All of them are complete.
            context: whether the tokens of context audio were written too.
        """


def num_entries(folder: Path) -> int:
    """Return the number of entries in a folder; 0 if the folder does not exist."""
    return len(os.listdir(folder)) if folder.is_dir() else 0


def regular_file(path: Path) -> Path:
    """Check that a path is a regular file that can be opened, and return the path.

    Raises:
        TokenFileError: if the path is not a regular file, or cannot be opened.
    """
    try:
        open_regular(path, TokenFileError, REPAIR).close()
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be opened ({error.strerror})"
        raise TokenFileError(f"{shorten(path, 300)}: {what}; {REPAIR}.") from error
    return path


def read_lines(file: Any, path: Path, keep_empty: bool = False) -> Iterator[bytes]:
    """Yield the lines of a JSON-lines file as bytes.

    Args:
        file: the file, open for reading in binary mode.
        path: path of the file for messages.
        keep_empty: whether to yield blank lines too.

    Raises:
        TokenFileError: if a line is too long; see `nemo_lfr.io.bounded.lines`.
    """
    try:
        for line in lines(file):
            if keep_empty or line.strip():
                yield line
    except ValueError as error:
        raise TokenFileError(f"{path}: file is damaged: {error}; {REPAIR}.") from error


def parse_json(data: bytes) -> Any:
    """Parse JSON text in UTF-8, with or without a byte order mark."""
    return json.loads(data.decode("utf-8-sig"))
