"""The layouts in which speech language models read tokens: one shard's files each.

- `shar`: Lhotse Shar as NeMo's Magpie reads it: `cuts/cuts.000000.jsonl.gz`, `target_codes/codes.000000.tar`, and
  `context_codes/codes.000000.tar` where contexts are asked for. Arrays [C, T].
- `manifest`: a NeMo manifest with `target_audio_codes_path` (and `context_audio_codes_path`): absolute paths of `.pt`
  files, plain tensors [C, T] that `torch.load` reads with `weights_only`.
- `parquet`: a row for each clip: `id`, `nano_layer_1` ... `nano_layer_C`, `encoded_len`, `num_samples`, `text`,
  `speaker`; `labels` holds the rest as JSON.
- `lfr`: a token file for each clip, and a manifest that names them.

Tokens are int16 where a codebook has at most 32,768 entries, else int32. Equal clips give equal bytes.
"""

import gzip
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from nemo_lfr.corpus.inputs import Clip, require
from nemo_lfr.io.atomic import naming, write_bytes
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.reading import DURATION_SLACK
from nemo_lfr.io.token_file import Metadata, TokenWriter

STATE = ".tokenize"  # below the output: what a run needs to go on
LINES = f"{STATE}/lines"  # of each shard, to be put together at the end
SPEAKER = re.compile(r"\| Language:\w+ Dataset:.+ Speaker:.+ \|", re.DOTALL)  # what Magpie demands


class Sink(ABC):
    """Writes the clips of one shard below `folder`, which becomes part of `final` when the shard is whole.

    Args:
        folder: an empty folder.
        final: where its files will be.
        index: number of the shard.
        codec: what the tokens are.
        dataset: a name for the corpus.
        context: whether contexts are written.
        model: compresses token files; other formats stay raw, as their readers expect.
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
        """Append a clip: tokens [C, T], the samples they stand for, tokens of its context [C, T]."""

    @abstractmethod
    def close(self) -> None:
        """Finish the files; an empty shard has them too."""

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """The path of a file that is written; errors of the system name where it was to be in the end."""
        path = self.folder / name
        with naming(self.final / name, self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path

    def _duration(self, num_samples: int) -> float:
        return round(num_samples / self.codec.sample_rate, 6)


class SharSink(Sink):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        require("lhotse")
        from lhotse.shar.writers.array import ArrayTarWriter

        self._cuts: list[dict[str, Any]] = []
        fields = ["target_codes", *(["context_codes"] if self.context else [])]
        self._arrays: dict[str, Any] = {}
        for field in fields:
            with self._writing(self._tar(field)) as path:
                self._arrays[field] = ArrayTarWriter(str(path), None)
                self._arrays[field].__enter__()

    def _tar(self, field: str) -> str:
        return f"{field}/codes.{self.index:06d}.tar"

    def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
        self._cuts.append(self._cut(clip, num_samples))
        for field, value in (("target_codes", tokens), ("context_codes", context)):
            if field not in self._arrays:
                continue
            with self._writing(self._tar(field)):
                if value is None:
                    self._arrays[field].write_placeholder(clip.id)
                else:
                    self._arrays[field].write(clip.id, value.astype(self.dtype), self._manifest(value))

    def _manifest(self, tokens: np.ndarray) -> Any:
        from lhotse.array import Array, TemporalArray

        # Seconds of a frame as they are, 1024 / 22050; NVIDIA's script rounds the rate to 21.5 first.
        shift = self.codec.samples_per_frame / self.codec.sample_rate
        return TemporalArray(Array("shar", "", "", list(tokens.shape)), temporal_dim=-1, frame_shift=shift, start=0)

    def _cut(self, clip: Clip, num_samples: int) -> dict[str, Any]:
        """The clip's own cut, or one made of its labels, with the speaker as Magpie wants it."""
        duration = self._duration(num_samples)
        made = {"start": 0, "channel": 0, "type": "MonoCut", "supervisions": []}
        cut: dict[str, Any] = {"duration": duration, **(clip.cut or made), "id": clip.id}
        given = clip.labels
        first = cut["supervisions"][0] if cut["supervisions"] else {"start": 0.0, "channel": 0}
        said: dict[str, Any] = {"id": clip.id, "recording_id": clip.id, "duration": duration, **first}
        language = str(given.get("lang") or given.get("language") or "en")
        speaker = str(said.get("speaker") or given.get("speaker") or "unknown")
        if not SPEAKER.fullmatch(speaker):
            words = (re.sub(r"\s+", "_", word) or "unknown" for word in (self.dataset, speaker))
            word = re.sub(r"\W", "_", language)  # of "zh-CN"
            speaker = "| Language:{} Dataset:{} Speaker:{} |".format(word, *words)
        said |= {"text": str(said.get("text") or given.get("text") or ""), "language": language, "speaker": speaker}
        custom = {key: value for key, value in given.items() if key not in ("text", "speaker", "lang", "language")}
        said["custom"] = custom | (said.get("custom") or {})
        cut["supervisions"] = [said, *cut["supervisions"][1:]]
        audio = {} if clip.path is None else self._recording(clip.path, num_samples)
        cut["custom"] = (cut.get("custom") or {}) | audio | {"lang": language, "num_samples": num_samples}
        return cut

    def _recording(self, path: Path, num_samples: int) -> dict[str, Any]:
        """The clip's file as `target_audio`, which Magpie loads for its speaker model; none for a part of a file."""
        try:
            info = soundfile.info(str(path))
        except soundfile.LibsndfileError:  # of a format that Lhotse does not read without other packages either
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
        for field, writer in self._arrays.items():
            with self._writing(self._tar(field)) as path:
                writer.close()
                if not path.exists():  # Lhotse opens it with the first array
                    _empty_tar(path)
        text = "".join(json.dumps(cut, ensure_ascii=False) + "\n" for cut in self._cuts)
        packed = gzip.compress(text.encode(), mtime=0)  # without the time: equal bytes
        with self._writing(f"cuts/cuts.{self.index:06d}.jsonl.gz") as path:
            path.write_bytes(packed)


class ManifestSink(Sink):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lines: list[dict[str, Any]] = []

    def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
        line = {**clip.labels, "id": clip.id, "duration": self._duration(num_samples), "num_samples": num_samples}
        for name, value in (("target", tokens), ("context", context)):
            if value is not None:
                path = f"{name}_codes/{clip.id}.pt"
                self._save(path, value)
                line[f"{name}_audio_codes_path"] = str(self.final / path)
        self._lines.append(line)

    def _save(self, path: str, tokens: np.ndarray) -> None:
        import torch

        buffer = io.BytesIO()  # a file's own name would be written into it
        torch.save(torch.from_numpy(tokens.astype(self.dtype)), buffer)
        with self._writing(path) as file:
            file.write_bytes(buffer.getvalue())

    def close(self) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)
        with self._writing(f"{LINES}/{self.index:06d}.json") as path:
            path.write_text(text, encoding="utf-8")


class LfrSink(ManifestSink):
    def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
        path = f"tokens/{clip.id}.lfr"
        with self._writing(path) as file, TokenWriter(file, self.codec, model=self.model) as writer:
            writer.write(tokens)
            writer.finish(num_samples)
        duration = self._duration(num_samples)
        self._lines.append({**clip.labels, "id": clip.id, "tokens_filepath": path, "duration": duration})


class ParquetSink(Sink):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        require("pyarrow.parquet")
        self._rows: list[dict[str, Any]] = []

    def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
        row: dict[str, Any] = {f"nano_layer_{number}": layer for number, layer in enumerate(tokens, start=1)}
        if context is not None:
            row |= {f"context_layer_{number}": layer for number, layer in enumerate(context, start=1)}
        labels = dict(clip.labels)
        row |= {"id": clip.id, "encoded_len": tokens.shape[1], "num_samples": num_samples}
        for key in ("text", "speaker"):
            value = labels.pop(key, None)
            row[key] = None if value is None else str(value)
        row["labels"] = json.dumps(labels, ensure_ascii=False)
        self._rows.append(row)

    def close(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        layer = pa.list_(pa.from_numpy_dtype(self.dtype))
        layers = range(1, self.codec.num_codebooks + 1)
        columns = [
            ("id", pa.string()),
            *((f"nano_layer_{number}", layer) for number in layers),
            *((f"context_layer_{number}", layer) for number in layers if self.context),
            ("encoded_len", pa.int32()),
            ("num_samples", pa.int64()),
            ("text", pa.string()),
            ("speaker", pa.string()),
            ("labels", pa.string()),
        ]
        table = pa.Table.from_pylist(self._rows, schema=pa.schema(columns))
        with self._writing(f"data/{self.index:06d}.parquet") as path:
            pq.write_table(table, path, compression="zstd")


SINKS: dict[str, type[Sink]] = {
    "shar": SharSink,
    "manifest": ManifestSink,
    "parquet": ParquetSink,
    "lfr": LfrSink,
}


def finish(kind: str, out: Path, num_shards: int, context: bool) -> None:
    """Write what belongs to no shard: one manifest of all, or the section of a training config that reads them."""
    if kind in ("manifest", "lfr"):
        shards = ((out / LINES / f"{index:06d}.json").read_bytes() for index in range(num_shards))
        write_bytes(out / "manifest.json", (_here(lines, out) for lines in shards) if kind == "manifest" else shards)
    if kind == "shar":
        from omegaconf import OmegaConf

        numbers = f"_OP_000000..{num_shards - 1:06d}_CL_"  # NeMo's spelling of a range
        paths = {"cuts": f"{out.resolve()}/cuts/cuts.{numbers}.jsonl.gz"}
        for field in ("target_codes", *(["context_codes"] if context else [])):
            paths[field] = f"{out.resolve()}/{field}/codes.{numbers}.tar"
        section = [{"type": "lhotse_shar", "shar_path": paths, "weight": 1.0}]
        write_text(out / "input_cfg.yaml", OmegaConf.to_yaml(OmegaConf.create(section)))


def _here(lines: bytes, out: Path) -> bytes:
    """The lines of a shard with the paths of their files below `out`, which was moved if they say otherwise."""
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


def _empty_tar(path: Path) -> None:
    import tarfile

    with tarfile.open(path, "w"):
        pass
