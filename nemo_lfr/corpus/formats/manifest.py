"""Output format `manifest`: a `.pt` file for each clip, and a NeMo manifest.

Each line of the manifest contains the absolute path `target_audio_codes_path` and, if context audio was tokenized and
the clip has any, `context_audio_codes_path`. The files contain tensors [C, T], which `torch.load` reads with
`weights_only=True`.
"""

import io
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lfr.corpus.formats import register_format
from nemo_lfr.corpus.formats.base import (
    REPAIR,
    Damage,
    FormatReader,
    FormatWriter,
    OutputFormat,
    Row,
    ShardFiles,
    parse_json,
    read_lines,
)
from nemo_lfr.corpus.ids import path_inside
from nemo_lfr.corpus.records import METADATA, STATE
from nemo_lfr.corpus.sources.base import Clip
from nemo_lfr.corpus.token_tensor import read_token_tensor
from nemo_lfr.errors import TokenFileError, shorten
from nemo_lfr.io.atomic import write_bytes

LINES = f"{STATE}/lines"  # folder with the manifest lines of each shard, which `finish` concatenates


def own_labels(clip: Clip) -> dict[str, Any]:
    """Return the labels of a clip for its line in the manifest.

    In this line, the key "id" contains the clip's id. A label "id" of the corpus is renamed to "source_id" or, if the
    clip has this label too, to "source_id_2", "source_id_3" ...
    """
    labels = dict(clip.labels)
    if "id" in labels:
        names = ("source_id", *(f"source_id_{number}" for number in range(2, len(labels) + 2)))
        labels[next(name for name in names if name not in labels)] = labels.pop("id")
    return labels


class ManifestWriter(FormatWriter):
    """Writer for the `.pt` files of each clip, and for the manifest lines of the shard."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lines: list[dict[str, Any]] = []

    def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
        """Write the `.pt` files of a clip, and append its manifest line."""
        line = {**own_labels(clip), "id": clip.id, "duration": self._duration(num_samples), "num_samples": num_samples}
        for name, value in (("target", tokens), ("context", context)):
            if value is not None:
                path = f"{name}_codes/{clip.id}.pt"
                self._save(path, value)
                line[f"{name}_audio_codes_path"] = str(self.final / path)
        self._lines.append(line)

    def _save(self, path: str, tokens: np.ndarray) -> None:
        import torch

        buffer = io.BytesIO()  # if it wrote to a path, torch.save would store the file name in the file
        torch.save(torch.from_numpy(tokens.astype(self.dtype)), buffer)
        with self._writing(path) as file:
            file.write_bytes(buffer.getvalue())

    def close(self) -> None:
        """Write the manifest lines of the shard."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)
        with self._writing(f"{LINES}/{self.index:06d}.json") as path:
            path.write_text(text, encoding="utf-8")


class ManifestReader(FormatReader):
    """Reader for a manifest that lists `.pt` files."""

    _is_reported = False  # whether a wrong number of lines was reported, which is done only once for all shards

    def count_shards(self) -> list[int]:
        """Return the number of clips for each shard.

        Manifest lines do not name their shards, so the clips are divided equally, up to rounding.
        """
        clips, shards = self.summary["clips"], self.summary["shards"]
        return [clips * (shard + 1) // shards - clips * shard // shards for shard in range(shards)]

    def num_files(self) -> int:
        """Return the number of lines, as an estimate of the largest possible number of shards."""
        return len(self._starts) - 1

    @cached_property
    def _starts(self) -> np.ndarray:
        """Return the byte offsets of the lines that are not blank and of the end of the file, int64 [lines + 1]."""
        starts, position = [], 0
        with open(self._path, "rb") as file:
            for line in read_lines(file, self._path, keep_empty=True):
                if line.strip():
                    starts.append(position)
                position += len(line)
        return np.array([*starts, position], np.int64)

    @property
    def _path(self) -> Path:
        return ShardFiles(self.folder, 0, verify=False).path("manifest.json")

    def rows(self, files: ShardFiles, start: int, stop: int) -> Iterator[Row | Damage]:
        """Yield the utterances [start, stop) of a shard, and messages about damage."""
        lines, clips = len(self._starts) - 1, self.summary["clips"]
        if lines != clips:
            problem = f"found {lines} lines, but {METADATA} lists {clips} clips; {REPAIR}."
            yield Damage("" if self._is_reported else f"{self._path}: {problem}")
            self._is_reported = True
        with open(self._path, "rb") as file:
            for number in range(files.first + start, min(files.first + stop, lines)):
                file.seek(int(self._starts[number]))
                line = file.read(int(self._starts[number + 1] - self._starts[number]))
                yield Row(self._load, files, line)

    def _load(self, files: ShardFiles, line: bytes) -> dict[str, Any]:
        labels = parse_json(line)
        tokens, context = (
            self._tensor(files, name, labels[f"{name}_audio_codes_path"])
            if f"{name}_audio_codes_path" in labels
            else None
            for name in ("target", "context")
        )
        values = {"tokens": tokens, "context": context, "num_samples": labels["num_samples"]}
        return {"id": labels["id"], "labels": labels} | values

    def _tensor(self, files: ShardFiles, name: str, text: Any) -> Any:
        """Read a `.pt` file of a clip, even if the output folder was moved after the manifest was written.

        Args:
            files: files of the shard.
            name: "target" or "context".
            text: path of the file, as stored in the manifest.
        """
        if not isinstance(text, str):
            raise TokenFileError(
                f"{self.folder}: a path in the manifest is {shorten(repr(text))}, not a string; {REPAIR}."
            )
        below = f"/{name}_codes/"
        if path_inside(self.folder, text) is None and below in text:
            text = f"{name}_codes/{text.rpartition(below)[2]}"
        return read_token_tensor(files.path(text))


@register_format
class ManifestFormat(OutputFormat):
    """Output format `manifest`: a `.pt` file for each clip, and a NeMo manifest."""

    name = "manifest"
    writer = ManifestWriter
    reader = ManifestReader
    summary_files = ("manifest.json",)

    @classmethod
    def finish(cls, out: Path, num_shards: int, context: bool) -> None:
        """Write the manifest of all shards."""
        shards = ((out / LINES / f"{index:06d}.json").read_bytes() for index in range(num_shards))
        write_bytes(out / "manifest.json", (cls.current_lines(lines, out) for lines in shards))

    @classmethod
    def current_lines(cls, lines: bytes, out: Path) -> bytes:
        """Return the manifest lines of a shard with the current paths of the files in `out`."""
        return _with_current_paths(lines, out)


def _with_current_paths(lines: bytes, out: Path) -> bytes:
    """Replace the stored paths in the manifest lines of a shard by paths inside `out`."""
    moved = []
    for line in lines.decode().split("\n")[:-1]:
        entry = json.loads(line)
        paths = {
            f"{name}_audio_codes_path": str(out / f"{name}_codes/{entry['id']}.pt")
            for name in ("target", "context")
            if f"{name}_audio_codes_path" in entry
        }
        moved.append(json.dumps(entry | paths, ensure_ascii=False) + "\n")
    return "".join(moved).encode()
