"""Reader for Lhotse Shar folders."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from nemo_lfr.corpus.inventory import list_digest, sampled_digest
from nemo_lfr.corpus.sources.base import Clip, CorpusReader, OpenOptions, ShardSpec, repeat_number
from nemo_lfr.corpus.sources.cuts import item_to_clip, number_cuts, refuse_tokens
from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.io.cut_files import check_fields, has_relative_paths, is_shar_file, read_shar
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.shortage import require

logger = logging.getLogger(__name__)

NAMED = 5  # maximum number of missing shards that a message names
_NUMBERED = re.compile(r"\.(\d+)\.(?:jsonl|tar)(?:\.gz)?$")  # end of the name of a file with a shard number
_UNNUMBERED = re.compile(r"[^.]+\.(?:jsonl|tar)(?:\.gz)?")
MAX_SHARDS = 1_000_000  # a larger number in the name of a file is not the number of a shard


class Shar(CorpusReader):
    """Reader for a Lhotse Shar: `cuts.*.jsonl.gz` or `cuts.jsonl.gz`, and the files of the other fields.

    The files may be in one folder, or in a subfolder for each field. Each input shard becomes one output shard, so the
    option for the shard size has no effect.

    Args:
        path: the folder.
        allow_url: whether to download audio that is at an http(s) URL.

    Raises:
        ConfigError: if the fields have different shards, a field has a name that is not allowed, or a file
            is not a regular file.
    """

    base_advice = "run the command in {}"

    def __init__(self, path: Path, allow_url: bool = False) -> None:
        require("lhotse")
        self.path, self.allow_url = path, allow_url
        self.fields = _find_fields(path)
        for files in self.fields.values():
            for file in files:
                open_regular(file, ConfigError).close()  # opening a pipe would block
        check_fields(path, self.fields)
        counts = {name: len(files) for name, files in self.fields.items()}
        if len(set(counts.values())) != 1:
            listing = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise ConfigError(
                f"{path}: not a complete Lhotse Shar: the fields have different numbers of shards "
                f"({shorten(listing, 300)}); copy the missing files."
            )
        numbers = {name: _numbers(files) for name, files in self.fields.items()}
        if others := [name for name in numbers if numbers[name] != numbers["cuts"]]:
            name = others[0]
            field, cuts = Counter(numbers[name]), Counter(numbers["cuts"])
            without_cuts, without_field = (sorted((a - b).elements()) for a, b in ((field, cuts), (cuts, field)))
            raise ConfigError(
                f"{path}: not a complete Lhotse Shar: shards {shorten(without_cuts)} of the field {shorten(name)!r} "
                f"have no cuts file, and shards {shorten(without_field)} of the cuts have no {shorten(name)!r} file; "
                "copy the missing files."
            )

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path is a Shar folder."""
        if not path.is_dir() or not any(list(path.glob(name)) for name in ("cuts.*jsonl*", "cuts/cuts.*jsonl*")):
            return False
        fields = _find_fields(path)
        # If the cuts file has no number and is the only field, it may list audio files in this folder.
        return "cuts" in fields and (len(fields) > 1 or bool(_numbers(fields["cuts"])))

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "Shar":
        """Open the folder. With `options.relist`, log missing shards, and refuse a folder that `tokenize` wrote."""
        shar = cls(path, options.allow_url)
        if options.relist:  # log in the process that plans the run, not in each worker
            shar.log_gaps()
            if shar.fields.keys() <= {"cuts", "target_codes", "context_codes"}:
                refuse_tokens(path, shar.fields["cuts"])
        return shar

    def log_gaps(self) -> None:
        """Log which shards are missing between the first and the last one. Lhotse numbers shards in sequence."""
        numbers = _numbers(self.fields["cuts"])
        if not numbers or numbers[-1] >= MAX_SHARDS:
            return
        missing = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
        if missing:
            names = ", ".join(f"{number:06d}" for number in missing[:NAMED])
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            logger.warning("%s: the shards %s%s are missing in this Lhotse Shar.", self.path, names, more)

    @property
    def identity(self) -> str:
        """Return a hash of all files."""
        return list_digest((file.relative_to(self.path).as_posix(), digest) for file, digest in self._digests)

    def older_shards(self, identity: str, shards: list[ShardSpec], size: int) -> list[ShardSpec] | None:
        """Return `shards` if `identity` is the hash that an older version computed for this corpus; otherwise None."""
        return shards if identity == list_digest((str(file), digest) for file, digest in self._digests) else None

    @cached_property
    def _digests(self) -> list[tuple[Path, str]]:
        return [(file, sampled_digest(file)) for file in self.files]

    @property
    def base(self) -> Path | None:
        """The working directory, which relative paths start from; None if the cuts contain no relative paths."""
        return Path.cwd() if any(map(has_relative_paths, self.fields["cuts"])) else None

    @property
    def files(self) -> list[Path]:
        """Return the files of all fields."""
        return [file for name in sorted(self.fields) for file in self.fields[name]]

    def files_of(self, shard: ShardSpec) -> list[Path]:
        """Return the files from which a shard is read."""
        return [files[shard["shard"]] for files in self.fields.values()]

    def shards(self, size: int) -> list[ShardSpec]:
        """Return one shard for each cuts file."""
        return [
            {"shard": shard, "repeats": {str(index): number for index, number in repeats.items()}}
            for shard, (_, repeats) in enumerate(number_cuts(self.fields["cuts"]))
        ]

    def read(self, shard: ShardSpec) -> Iterator[Clip]:
        """Yield the clips of a shard in order."""
        fields = {name: files[shard["shard"]] for name, files in self.fields.items()}
        cuts = fields.pop("cuts")
        for number, item in enumerate(read_shar(cuts, fields, self.allow_url)):
            yield item_to_clip(item, str(cuts), repeat_number(shard, number), self.allow_url)


def _find_fields(path: Path) -> dict[str, list[Path]]:
    """Return a dict from each field of a Shar to its files, sorted by path.

    If a cuts file has a shard number, files without a number do not belong to the Shar.
    """
    fields: dict[str, list[Path]] = {}
    for file in sorted([*path.glob("*.*"), *path.glob("*/*.*")]):
        flat = file.parent == path
        if file.name.startswith(".") or (not flat and file.parent.name.startswith(".")):
            continue  # such as the AppleDouble files of macOS
        name = file.name.partition(".")[0] if flat or file.name.startswith("cuts.") else file.parent.name
        if _NUMBERED.search(file.name) or _UNNUMBERED.fullmatch(file.name):
            fields.setdefault(name, []).append(file)
    is_numbered = bool(_numbers(fields.get("cuts", [])))
    belongs: Callable[[Path], bool] = (lambda file: bool(_numbers([file]))) if is_numbered else is_shar_file
    kept = {name: [file for file in files if belongs(file)] for name, files in fields.items()}
    return {name: files for name, files in kept.items() if files}


def _numbers(files: Sequence[Path]) -> list[int]:
    """Return the sorted shard numbers in the names of files; a Shar that has one shard may have no numbers."""
    found = (_NUMBERED.search(file.name) for file in files)
    return sorted(int(match[1]) for match in found if match)
