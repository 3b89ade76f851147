"""Output format `shar`: Lhotse Shar, which Lhotse and NeMo's Magpie trainer read.

Shard 0 consists of the files `shar/cuts.000000.jsonl.gz`, `shar/target_codes.000000.tar` and, if context audio was
tokenized, `shar/context_codes.000000.tar`. Arrays have shape [C, T]. Lhotse reads the shards with
`CutSet.from_shar(in_dir="OUT/shar")`. For NeMo, the file `input_cfg.yaml` contains a section of a training config.

Earlier versions wrote `cuts/cuts.000000.jsonl.gz` and `target_codes/codes.000000.tar`. Such folders can be read. A run
that was started with these names keeps them when it is resumed.
"""

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from nemo_lfr.corpus.formats import register_format
from nemo_lfr.corpus.formats.base import (
    REPAIR,
    Damage,
    FormatReader,
    FormatWriter,
    OutputFormat,
    Row,
    ShardFiles,
    num_entries,
    parse_json,
    read_lines,
)
from nemo_lfr.corpus.sources.base import Clip
from nemo_lfr.errors import TokenFileError, counted, shorten
from nemo_lfr.io.bounded import member_bytes, open_tar
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.locate import resolve
from nemo_lfr.io.reading import DURATION_SLACK
from nemo_lfr.io.shortage import require

EXPANDED = re.compile(r"[()\[\]<>{}]|_OP_|_CL_")  # characters that NeMo expands in a path, but not in a list of paths
SPEAKER = re.compile(r"\| Language:\w+ Dataset:.+ Speaker:.+ \|", re.DOTALL)  # Magpie's notation for a speaker


class Layout:
    """Names of the files in a Shar; for a folder that an earlier version wrote, the names of that version.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: Path) -> None:
        self._is_earlier = (folder / "cuts").is_dir()

    @property
    def cuts_folder(self) -> str:
        """Folder of the cuts files."""
        return "cuts" if self._is_earlier else "shar"

    def cuts(self, number: str) -> str:
        """Return the name of a shard's cuts file. `number` is the index of the shard with six digits."""
        return f"{self.cuts_folder}/cuts.{number}.jsonl.gz"

    def tar(self, field: str, number: str) -> str:
        """Return the name of a shard's tar file for one field, such as "shar/target_codes.000000.tar"."""
        return f"{field}/codes.{number}.tar" if self._is_earlier else f"shar/{field}.{number}.tar"


class ArrayTar:
    """Tar file with an array and its description for each clip, as in Lhotse Shar.

    The bytes are the same as those of Lhotse's `ArrayTarWriter`, which refuses paths that contain a `%`, and prints a
    traceback after a failed write.

    Args:
        path: path of the file, which is created.
    """

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w")  # noqa: SIM115  closed by `close`

    def add(self, name: str, array: np.ndarray, manifest: dict[str, Any]) -> None:
        """Append the array of the clip `name`, and its description `manifest`."""
        data = io.BytesIO()
        np.save(data, array, allow_pickle=False)
        self._append(f"{name}.npy", data.getvalue())
        self._append(f"{name}.json", f"{json.dumps(manifest)}\n".encode())

    def add_placeholder(self, name: str) -> None:
        """Append two empty members for the clip `name`, which has no array."""
        self._append(f"{name}.nodata", b"")
        self._append(f"{name}.nometa", b"")

    def _append(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        """Write the end of the archive and close the file."""
        self._tar.close()


class SharWriter(FormatWriter):
    """Writer for the files of a Shar shard: a cuts file, and tar files of arrays such as `target_codes`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        require("lhotse")
        self._layout = Layout(self.final)
        self._cuts: list[dict[str, Any]] = []
        fields = ["target_codes", *(["context_codes"] if self.context else [])]
        self._arrays: dict[str, ArrayTar] = {}
        for field in fields:
            with self._writing(self._tar(field)) as path:
                self._arrays[field] = ArrayTar(path)

    def _tar(self, field: str) -> str:
        return self._layout.tar(field, f"{self.index:06d}")

    def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
        """Append a clip's cut and token arrays."""
        self._cuts.append(self._cut(clip, num_samples))
        for field, value in (("target_codes", tokens), ("context_codes", context)):
            if field not in self._arrays:
                continue
            with self._writing(self._tar(field)):
                if value is None:
                    self._arrays[field].add_placeholder(clip.id)
                else:
                    self._arrays[field].add(clip.id, value.astype(self.dtype), self._manifest(value))

    def _manifest(self, tokens: np.ndarray) -> dict[str, Any]:
        from lhotse.array import Array, TemporalArray
        from lhotse.shar.utils import to_shar_placeholder

        # Exact frame duration, 1024 / 22050 s for the released codec. NVIDIA's script rounds the rate to 21.5 Hz.
        shift = self.codec.samples_per_frame / self.codec.sample_rate
        array = Array("shar", "", "", list(tokens.shape))
        manifest = TemporalArray(array, temporal_dim=-1, frame_shift=shift, start=0)
        return to_shar_placeholder(manifest).to_dict()  # type: ignore[no-any-return]

    def _cut(self, clip: Clip, num_samples: int) -> dict[str, Any]:
        """Return a Lhotse cut with the clip's labels.

        If the clip was read from a cut, the text and speaker of that cut take precedence. `SPEAKER` describes the
        notation of speakers.
        """
        duration = self._duration(num_samples)
        default = {"start": 0, "channel": 0, "type": "MonoCut", "supervisions": []}
        cut: dict[str, Any] = {"duration": duration, **(clip.cut or default), "id": clip.id}
        labels = clip.labels
        first = cut["supervisions"][0] if cut["supervisions"] else {"start": 0.0, "channel": 0}
        supervision: dict[str, Any] = {"id": clip.id, "recording_id": clip.id, "duration": duration, **first}
        language = str(labels.get("lang") or "en")
        speaker = str(supervision.get("speaker") or labels.get("speaker") or "unknown")
        if not SPEAKER.fullmatch(speaker):
            names = (re.sub(r"\s+", "_", name) or "unknown" for name in (self.dataset, speaker))
            language_word = re.sub(r"\W", "_", language)  # "zh-CN" has a hyphen
            speaker = "| Language:{} Dataset:{} Speaker:{} |".format(language_word, *names)
        supervision |= {
            "text": str(supervision.get("text") or labels.get("text") or ""),
            "language": language,
            "speaker": speaker,
        }
        custom = {key: value for key, value in labels.items() if key not in ("text", "speaker", "lang", "language")}
        supervision["custom"] = custom | (supervision.get("custom") or {})
        cut["supervisions"] = [supervision, *cut["supervisions"][1:]]
        audio = {} if clip.path is None else self._recording(clip.path, num_samples)
        cut["custom"] = (cut.get("custom") or {}) | audio | {"lang": language, "num_samples": num_samples}
        return cut

    def _recording(self, path: Path, num_samples: int) -> dict[str, Any]:
        """Return {"target_audio": ...}, the recording that Magpie's speaker model reads.

        The result is {} if the clip is only an excerpt from the file, or if the file is not mono or not readable.
        """
        try:
            info = soundfile.info(str(path))
        except soundfile.LibsndfileError:  # Lhotse would need other packages to read the file
            return {}
        if info.channels != 1 or abs(info.duration - num_samples / self.codec.sample_rate) > DURATION_SLACK:
            return {}
        recording = {
            "id": path.stem,
            "sources": [{"type": "file", "channels": [0], "source": str(path)}],
            "sampling_rate": info.samplerate,
            "num_samples": info.frames,
            "duration": info.frames / info.samplerate,
            "channel_ids": [0],
        }
        return {"target_audio": recording}

    def close(self) -> None:
        """Finish the array files and write the cuts file."""
        for field, writer in self._arrays.items():
            with self._writing(self._tar(field)):
                writer.close()
        text = "".join(json.dumps(cut, ensure_ascii=False) + "\n" for cut in self._cuts)
        packed = gzip.compress(text.encode(), mtime=0)  # no timestamp, so that equal clips give equal bytes
        with self._writing(self._layout.cuts(f"{self.index:06d}")) as path:
            path.write_bytes(packed)


class SharReader(FormatReader):
    """Reader for Shar shards.

    Lhotse is not used, since it silently skips the entries that are missing from a truncated file.
    """

    def num_files(self) -> int:
        """Return the number of entries in the cuts folder, as an upper bound for the number of shards."""
        return num_entries(self.folder / Layout(self.folder).cuts_folder)

    def count_shards(self) -> list[int]:
        """Return the number of cuts in each shard."""
        return self._shard_counts(lambda files: sum(1 for _ in self._cuts(files.path(self._cuts_name(files.shard)))))

    def rows(self, files: ShardFiles, start: int, stop: int) -> Iterator[Row | Damage]:
        """Yield all utterances of a shard from `start` on, also those after `stop`, and messages about damage."""
        names = [self._cuts_name(files.shard)]
        names += [Layout(self.folder).tar(name, f"{files.shard:06d}") for name in self._fields()]
        paths = []
        for name in names:
            path, damage = files.path_and_damage(name)
            paths.append(path)
            if damage:
                yield damage
        columns = [self._arrays(path) for path in paths[1:]]
        for number, line in enumerate(self._cuts(paths[0])):
            items = [next(column, None) for column in columns]
            if None in items:
                missing = paths[1 + items.index(None)]
                if number >= start:
                    raise TokenFileError(
                        f"{missing}: file is truncated after {counted(number, 'utterance')}; {REPAIR}."
                    )
                return
            if number >= start:
                yield Row(self._load, line, items)
        if any(next(column, None) is not None for column in columns):
            raise TokenFileError(f"{paths[0]}: file is truncated: the array files contain more utterances; {REPAIR}.")

    def _fields(self) -> list[str]:
        return ["target_codes", *(["context_codes"] if self.summary.get("context") else [])]

    def _cuts_name(self, shard: int) -> str:
        return Layout(self.folder).cuts(f"{shard:06d}")

    @staticmethod
    def _cuts(path: Path) -> Iterator[bytes]:
        with gzip.open(path, "rb") as file:
            yield from read_lines(file, path)

    @staticmethod
    def _arrays(path: Path) -> Iterator[tuple[str, bytes | None]]:
        """Yield the name of each clip in a tar file, and the content of its `.npy` file (None without an array)."""
        with open_tar(path) as tar:
            members = iter(tar)
            for member in members:
                data = member_bytes(tar, member)
                if next(members, None) is None:
                    raise TokenFileError(
                        f"{path}: file is damaged: array {shorten(member.name)!r} has no JSON description; {REPAIR}."
                    )
                name, _, kind = member.name.rpartition(".")
                yield name, None if kind == "nodata" else data

    @staticmethod
    def _load(line: bytes, items: list[tuple[str, bytes | None]]) -> dict[str, Any]:
        cut = parse_json(line)
        for name, _ in items:
            if name != cut["id"]:
                wanted = shorten(repr(cut["id"]))
                raise ValueError(f"expected the tokens of cut {wanted}, found those of {shorten(name)!r}")
        first = cut["supervisions"][0]
        labels = {"text": first.get("text"), "speaker": first.get("speaker"), "lang": first.get("language")}
        arrays = [None if data is None else read_npy(data) for _, data in items]
        return {
            "id": cut["id"],
            "tokens": arrays[0],
            "num_samples": cut["custom"]["num_samples"],
            "context": arrays[1] if len(arrays) > 1 else None,
            "labels": labels | (first.get("custom") or {}),
        }


@register_format
class SharFormat(OutputFormat):
    """Output format `shar`."""

    name = "shar"
    writer = SharWriter
    reader = SharReader
    summary_files = ("input_cfg.yaml",)

    @classmethod
    def finish(cls, out: Path, num_shards: int, context: bool) -> None:
        """Write `input_cfg.yaml`, a section of a NeMo training config that lists all shards."""
        from omegaconf import OmegaConf

        layout, root = Layout(out), resolve(out)
        folder = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(root))  # OmegaConf would interpolate ${...}

        def field_paths(name: Callable[[str], str]) -> str | list[str]:
            if EXPANDED.search(folder):
                return [f"{folder}/{name(f'{index:06d}')}" for index in range(num_shards)]
            return f"{folder}/{name(f'_OP_000000..{num_shards - 1:06d}_CL_')}"  # NeMo's notation for a range

        paths = {"cuts": field_paths(layout.cuts)}
        for field in ("target_codes", *(["context_codes"] if context else [])):
            paths[field] = field_paths(partial(layout.tar, field))
        section = [{"type": "lhotse_shar", "shar_path": paths, "weight": 1.0}]
        write_text(out / "input_cfg.yaml", OmegaConf.to_yaml(OmegaConf.create(section)))


def read_npy(data: bytes) -> np.ndarray:
    """Parse the content of a `.npy` file without copying. A header with a wrong, huge shape allocates no memory.

    Raises:
        ValueError: if the content is damaged, or the array contains Python objects.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("the array contains Python objects, which are not read")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if is_fortran else "C")
