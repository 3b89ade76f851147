"""Records of finished shards, and names of the files of a run."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_lfr.corpus.inventory import digest
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.regular import open_regular

METADATA = "tokens.json"  # written last: its presence means that the output is complete
STATE = ".tokenize"  # state folder inside the output folder; a run needs it to resume
PLAN = "job.json"  # in the state folder: the options and the shards of the run
RESUME = "run the same nemo-lfr tokenize command again, which resumes the run"


def describe_unfinished(out: Path) -> str | None:
    """Describe how many shards of an unfinished run are complete; return None if there is no unfinished run."""
    if (out / METADATA).exists() or not (out / STATE).is_dir():
        return None
    done = sum(path.stem.isdecimal() for path in ShardRecord.folder(out).glob("*.json"))
    try:
        with open_regular(out / STATE / PLAN) as file:
            shards = len(json.load(file)["parts"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # killed before the plan was written
        return f"{done} shards are complete"
    return f"{done} of {shards} shards are complete"


def stored_dataset(out: Path) -> str | None:
    """Return the name of the corpus in the plan of an earlier run; None if there is no such run."""
    try:
        with open_regular(out / STATE / PLAN) as file:
            name = json.load(file)["dataset"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) else None


@dataclass
class ShardRecord:
    """Record of a finished shard: counts, failures, and the hash and size of each file.

    A shard is complete if it has a record. Shards without a record are tokenized again when the run is resumed.
    """

    index: int
    clips: int = 0
    samples: int = 0
    frames: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # path relative to the output folder -> SHA-256
    sizes: dict[str, int] = field(default_factory=dict)  # path relative to the output folder -> bytes

    @staticmethod
    def folder(out: Path) -> Path:
        """Return the folder that contains the records of an output."""
        return out / STATE / "done"

    @classmethod
    def path(cls, out: Path, index: int) -> Path:
        """Return the path of a shard's record."""
        return cls.folder(out) / f"{index:06d}.json"

    @classmethod
    def read(cls, out: Path, index: int) -> "ShardRecord | None":
        """Return the record of a shard; None if it does not exist or is damaged."""
        path = cls.path(out, index)
        try:
            with open_regular(path) as file:
                record = cls(**json.load(file))
            is_valid = record.index == index and all(
                type(count) is int and count >= 0 for count in (record.clips, record.samples, record.frames)
            )
            is_valid = is_valid and all(isinstance(value, str) for pair in record.files.items() for value in pair)
            is_valid = is_valid and all(type(size) is int for size in record.sizes.values())
            is_valid = is_valid and all(isinstance(failure["error"], str) for failure in record.failures)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return record if is_valid else None

    @classmethod
    def find(cls, out: Path, index: int, verify: bool = False) -> "ShardRecord | None":
        """Return the record of a shard if its files are intact; return None otherwise.

        Args:
            out: the output folder.
            index: index of the shard.
            verify: compare the files' hashes with the record, and not only their sizes.
        """
        record = cls.read(out, index)
        return record if record and not any(record.damage(out, name, verify) for name in record.files) else None

    def damage(self, out: Path, name: str, verify: bool = False) -> str | None:
        """Describe how a file of the shard differs from the record.

        Args:
            out: the output folder.
            name: path of the file relative to the output folder.
            verify: whether to compare the file's hash with the record, and not only its size.

        Returns:
            The difference, for messages; None if there is none.
        """
        path = out / name
        if not path.is_file():
            return f"{path}: no such file"
        size = path.stat().st_size
        if size != self.sizes.get(name, size):
            return f"{path}: file has {size} bytes, but {self.sizes[name]} were written"
        if verify and digest(path) != self.files[name]:
            return f"{path}: file is damaged (its SHA-256 differs from the recorded one)"
        return None

    def lost_since(self, earlier: "ShardRecord") -> list[dict[str, str]]:
        """Return the failures of clips that did not fail in an earlier run of the same shard."""
        failed = {failure.get("id") for failure in earlier.failures}
        return [failure for failure in self.failures if failure.get("id") not in failed]

    def write(self, out: Path) -> None:
        """Write the record, which marks the shard as complete."""
        self.path(out, self.index).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path(out, self.index), json.dumps(asdict(self), ensure_ascii=False))
