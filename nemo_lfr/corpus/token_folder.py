"""Read a folder of tokens that `nemo-lfr tokenize` wrote, and validate everything in it.

What `tokenize` recorded is compared with what is there: the number of clips and the size of each file always, its
hash with `verify`. Damage is yielded as an error in the place of the utterances that it costs, so that a caller may
stop at it or continue. Nothing outside the folder is read, through no link either, and nothing in it is executed.
"""

import gzip
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_lfr import frames
from nemo_lfr.corpus.ids import path_inside
from nemo_lfr.corpus.inputs import require
from nemo_lfr.corpus.run import METADATA
from nemo_lfr.corpus.shard import Mark
from nemo_lfr.corpus.token_tensor import read_token_tensor
from nemo_lfr.errors import MissingExtraError, NemoLfrError, TokenFileError, shorten
from nemo_lfr.io.bounded import MAX_LINE, check_columns, member_bytes, open_tar
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.token_file import Metadata, TokenReader

MAX_SHARDS, MAX_CLIPS = 10_000_000, 2**48
# More shards than there are files of them, and so missing or empty ones, than any damage leaves.
SPARE_SHARDS = 1000
ROWS = 64  # of a table, read at once
REPAIR = "run the same tokenize command again, which repairs it"


@dataclass(frozen=True)
class Utterance:
    """One clip's tokens.

    Attributes:
        id: as `tokenize` named it.
        tokens: int64 [C, T].
        num_samples: the samples they stand for.
        context: tokens of its context, int64 [C, T]; None if there is none.
        labels: "text", "speaker" and any other labels of the corpus.
    """

    id: str
    tokens: torch.Tensor
    num_samples: int
    context: torch.Tensor | None = None
    labels: dict[str, Any] = field(default_factory=dict)


class TokenFolder:
    """A folder of tokens in any format of `tokenize`.

    Args:
        folder: the tokens.
        verify: compare the hash of every file before it is read, not only its size.

    Attributes:
        metadata: what `tokens.json` holds.
        codec: what the tokens are.
        counts: utterances of each shard.

    Raises:
        NemoLfrError: if the folder holds no finished tokens, or its `tokens.json` is damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.path = expand_home(folder)
        self.verify = verify
        name = self.path / METADATA
        if not self.path.is_dir() or not name.exists():
            raise NemoLfrError(
                f"{shorten(folder, 300)}: no {METADATA}; pass a folder that `nemo-lfr tokenize` wrote and finished."
            )
        try:
            self.metadata: dict[str, Any] = _json(regular_file(name).read_bytes())
            self.codec = self._check_metadata()
        except TokenFileError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise TokenFileError(f"{name}: cannot be read: {shorten(reason, 200)}.") from error
        self._reader = READERS[self.metadata["format"]](self)
        self.counts = self._count()
        if verify:
            self._check_records()

    def _check_metadata(self) -> Metadata:
        values = self.metadata
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, found {shorten(values)}")
        for key, highest in (("shards", MAX_SHARDS), ("clips", MAX_CLIPS)):
            if type(values[key]) is not int or not 0 <= values[key] <= highest:
                raise ValueError(f"{key} is {shorten(values[key])}")
        if not isinstance(values["format"], str) or values["format"] not in READERS:
            raise ValueError(f"format is {shorten(values['format'])}; expected one of {', '.join(READERS)}")
        if not isinstance(values.get("context", False), bool):
            raise ValueError(f"context is {shorten(values['context'])}")
        if not isinstance(values["codec"], dict) or not isinstance(values["codec"]["fingerprint"], str):
            raise ValueError("codec is not an object with a fingerprint")
        return Metadata.from_json(json.dumps(values["codec"]).encode())

    def _count(self) -> list[int]:
        """The number of utterances of each shard: as recorded, or counted where nothing was."""
        shards, clips = self.metadata["shards"], self.metadata["clips"]
        counts = self.metadata.get("shard_clips")
        if shards > SPARE_SHARDS:
            there = max(self._reader.num_files(), _num_entries(Mark.folder(self.path)))
            if shards > SPARE_SHARDS + 2 * there:
                raise TokenFileError(f"{self.path}: {METADATA} says {shards} shards, but files of {there} are there.")
        if counts is None:
            marks = [Mark.read(self.path, index) for index in range(shards)] if Mark.folder(self.path).is_dir() else []
            known = [mark.clips for mark in marks if mark]
            counts = known if len(known) == shards else self._reader.count_shards()
        if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
            raise TokenFileError(f"{self.path}/{METADATA}: its counts of clips are damaged.")
        if len(counts) != shards or sum(counts) != clips:
            raise TokenFileError(
                f"{self.path}: holds {sum(counts)} utterances in {len(counts)} shards, but {METADATA} says {clips} "
                f"in {shards}; {REPAIR}."
            )
        return counts

    def _check_records(self) -> None:
        """Raise TokenFileError unless the hashes of every shard are recorded: what is not there proves nothing."""
        missing = [index for index in range(self.metadata["shards"]) if Mark.read(self.path, index) is None]
        if missing:
            raise TokenFileError(
                f"{self.path}: cannot be verified: the hashes of {len(missing)} of {self.metadata['shards']} shards "
                f"are missing from {Mark.folder(self.path)}; copy that folder too, or read without verifying."
            )

    def read(self, shard: int, start: int = 0, stop: int | None = None) -> Iterator[Utterance | TokenFileError]:
        """Utterances [start, stop) of a shard, in order; an error in the place of those that cannot be read."""
        stop = self.counts[shard] if stop is None else min(stop, self.counts[shard])
        files = ShardFiles(self.path, shard, self.verify)
        seen = 0
        damaged = False
        rows = self._reader.rows(files, start, stop)
        while seen < stop - start:
            try:
                item = next(rows, None)
            except NemoLfrError as error:
                yield TokenFileError(str(error))
                return
            except Exception as error:  # of whichever of the formats' readers
                if not damaged:
                    rest = f"utterances {start + seen} to {stop - 1}"
                    yield TokenFileError(f"{self.path}, shard {shard}: {rest} cannot be read ({reason_of(error)}).")
                return
            if item is None:
                if not damaged:
                    yield TokenFileError(
                        f"{self.path}, shard {shard}: ends after {start + seen} of its {self.counts[shard]} "
                        f"utterances; {REPAIR}."
                    )
                return
            if isinstance(item, Damage):
                damaged = True
                if item:
                    yield TokenFileError(item)
                continue
            seen += 1
            try:
                yield self._utterance(item, f"{self.path}, shard {shard}, utterance {start + seen - 1}")
            except NemoLfrError as error:
                yield TokenFileError(str(error))
            except Exception as error:  # of torch, numpy or the row's own values
                yield TokenFileError(
                    f"{self.path}, shard {shard}, utterance {start + seen - 1}: cannot be read ({reason_of(error)})."
                )
        if stop < self.counts[shard] or damaged:
            return
        try:
            more = next(rows, None)
        except Exception as error:
            yield TokenFileError(f"{self.path}, shard {shard}: is damaged at its end ({reason_of(error)}).")
        else:
            if more is not None:
                yield TokenFileError(f"{self.path}, shard {shard}: holds more than its {stop} utterances; {REPAIR}.")

    def _utterance(self, row: "Row", where: str) -> Utterance:
        values = row.load()
        clip_id = values["id"]
        if not isinstance(clip_id, str):
            raise TokenFileError(f"{where}: its id is {shorten(repr(clip_id))}, not a text.")
        where = f"{where} ({shorten(clip_id)})"
        num_samples, labels, context = values["num_samples"], values["labels"], values.get("context")
        if type(num_samples) is not int or not 0 < num_samples < 2**48:
            raise TokenFileError(f"{where}: num_samples is {shorten(repr(num_samples))}.")
        if not isinstance(labels, dict):
            raise TokenFileError(f"{where}: its labels are {shorten(repr(labels))}, not a JSON object.")
        num_frames = frames.num_frames(num_samples, self.codec.samples_per_frame)
        tokens = self._tokens(values["tokens"], num_frames, f"{where}: its tokens")
        if context is not None:
            context = self._tokens(context, None, f"{where}: its context's tokens")
        return Utterance(clip_id, tokens, num_samples, context, labels)

    def _tokens(self, value: Any, num_frames: int | None, what: str) -> torch.Tensor:
        """The tokens [C, T] as int64, whatever a file held: a tensor, an array, or lists."""
        if isinstance(value, torch.Tensor):
            is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
            held = value.untyped_storage().nbytes() if value.layout == torch.strided else 0
            if value.layout != torch.strided or value.is_quantized or value.numel() * value.element_size() > held:
                raise TokenFileError(f"{what} are no plain tensor of what the file holds.")
            kind = str(value.dtype)
        else:
            if isinstance(value, list) and len({len(layer) for layer in value}) != 1:
                lengths = shorten([len(layer) for layer in value])
                raise TokenFileError(f"{what} have layers of unequal lengths {lengths}.")
            value = np.asarray(value)
            is_integer, kind = value.dtype.kind in "iu", str(value.dtype)
        if not is_integer:
            raise TokenFileError(f"{what} are {kind}, not integers.")
        shape = list(value.shape)
        if len(shape) != 2 or shape[0] != self.codec.num_codebooks or shape[1] == 0:
            raise TokenFileError(f"{what} have shape {shape}; expected [{self.codec.num_codebooks}, T].")
        if num_frames is not None and shape[1] != num_frames:
            raise TokenFileError(f"{what} are {shape[1]} frames, but its num_samples make {num_frames}.")
        tokens = value.long() if isinstance(value, torch.Tensor) else torch.from_numpy(value.astype(np.int64))
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.codec.codebook_size:
            raise TokenFileError(
                f"{what} reach from {low} to {high}; a codebook has {self.codec.codebook_size} entries."
            )
        return tokens.contiguous()


class Damage(str):
    """What is wrong with the files of a shard, some of which may be readable."""


class Row:
    """An utterance that is loaded when it is asked for, so that its errors are its own."""

    def __init__(self, load: Any, *arguments: Any) -> None:
        self._load, self._arguments = load, arguments

    def load(self) -> dict[str, Any]:
        values: dict[str, Any] = self._load(*self._arguments)
        return values


class ShardFiles:
    """The files of a shard, compared with what its record says of them."""

    def __init__(self, folder: Path, shard: int, verify: bool) -> None:
        self.folder, self.shard, self.verify = folder, shard, verify
        self._mark = Mark.read(folder, shard)

    def path(self, name: str) -> Path:
        """The file that a text names; raises TokenFileError unless it is whole and inside the folder."""
        path, damage = self.path_and_damage(name)
        if damage:
            raise TokenFileError(damage)
        return path

    def path_and_damage(self, name: str) -> tuple[Path, Damage | None]:
        """As `path`, but a file of another size is returned too, with what is wrong: its begin may be readable."""
        path = self._path(name)
        problem = self._damage(path)
        if problem and self.verify:
            raise TokenFileError(f"{problem}; {REPAIR}.")
        return path, Damage(f"{problem}; {REPAIR}.") if problem else None

    def _path(self, name: str) -> Path:
        path = path_inside(self.folder, name)
        if path is None:
            raise TokenFileError(f"{self.folder}: {shorten(name, 200)!r} lies outside of this folder and is not read.")
        return regular_file(path)

    def _damage(self, path: Path) -> str | None:
        if self._mark is None:
            return None
        root = self.folder.resolve()
        name = path.relative_to(root).as_posix()
        if name not in self._mark.files:
            return None
        return self._mark.damage(root, name, verify=self.verify)


class _Reader(ABC):
    """Reads one format."""

    def __init__(self, folder: TokenFolder) -> None:
        self.folder = folder

    @abstractmethod
    def count_shards(self) -> list[int]:
        """Count the utterances of each shard, in a folder whose records are not there."""

    @abstractmethod
    def num_files(self) -> int:
        """How many shards there could be, by the files that are there."""

    @abstractmethod
    def rows(self, files: ShardFiles, start: int, stop: int) -> Iterator[Row | Damage]:
        """Yield utterances [start, stop) of a shard, and what is behind `stop` if anything is."""

    def _shard_counts(self, count: Callable[[ShardFiles], int]) -> list[int]:
        """Counts of those that can be read; the others share the rest."""
        counts: list[int | None] = []
        for shard in range(self.folder.metadata["shards"]):
            try:
                counts.append(count(ShardFiles(self.folder.path, shard, verify=False)))
            except MissingExtraError:
                raise
            except Exception:  # whoever reads this shard gets it again
                counts.append(None)
        rest = max(0, self.folder.metadata["clips"] - sum(known or 0 for known in counts))
        unknown = counts.count(None)
        shares = iter([rest * (number + 1) // unknown - rest * number // unknown for number in range(unknown)])
        return [next(shares) if known is None else known for known in counts]


class _Shar(_Reader):
    """Lhotse Shar. Read without Lhotse, which passes in silence over what a shorter file does not hold."""

    def num_files(self) -> int:
        return _num_entries(self.folder.path / "cuts")

    def count_shards(self) -> list[int]:
        return self._shard_counts(lambda files: sum(1 for _ in self._cuts(files.path(self._cuts_name(files.shard)))))

    def rows(self, files: ShardFiles, start: int, stop: int) -> Iterator[Row | Damage]:
        names = [self._cuts_name(files.shard)]
        names += [f"{name}/codes.{files.shard:06d}.tar" for name in self._fields()]
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
                    raise TokenFileError(f"{missing}: ends after {number} of {stop} utterances; it was cut short.")
                return
            if number >= start:
                yield Row(self._load, line, items)
        if any(next(column, None) is not None for column in columns):
            raise TokenFileError(f"{paths[0]}: ends before its arrays do; it was cut short.")

    def _fields(self) -> list[str]:
        return ["target_codes", *(["context_codes"] if self.folder.metadata.get("context") else [])]

    @staticmethod
    def _cuts_name(shard: int) -> str:
        return f"cuts/cuts.{shard:06d}.jsonl.gz"

    @staticmethod
    def _cuts(path: Path) -> Iterator[bytes]:
        with gzip.open(path, "rb") as file:
            yield from read_lines(file, path)

    @staticmethod
    def _arrays(path: Path) -> Iterator[tuple[str, bytes | None]]:
        """Names and files of a tar's arrays; each is followed by a description, which says nothing new."""
        with open_tar(path) as tar:
            members = iter(tar)
            for member in members:
                data = member_bytes(tar, member)
                if next(members, None) is None:
                    raise TokenFileError(f"{path}: holds {shorten(member.name)!r}, which is no array; it is damaged.")
                name, _, kind = member.name.rpartition(".")
                yield name, None if kind == "nodata" else data

    @staticmethod
    def _load(line: bytes, items: list[tuple[str, bytes | None]]) -> dict[str, Any]:
        cut = _json(line)
        for name, _ in items:
            if name != cut["id"]:
                raise ValueError(f"the cut {shorten(repr(cut['id']))} stands beside the tokens of {shorten(name)!r}")
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


class _Parquet(_Reader):
    def num_files(self) -> int:
        return _num_entries(self.folder.path / "data")

    def count_shards(self) -> list[int]:
        return self._shard_counts(lambda files: self._open(files.path(self._name(files.shard))).metadata.num_rows)

    def rows(self, files: ShardFiles, start: int, stop: int) -> Iterator[Row | Damage]:
        path, damage = files.path_and_damage(self._name(files.shard))
        if damage:
            yield damage
        with self._open(path) as file:
            check_columns(file.metadata, path)
            first = 0
            for batch in file.iter_batches(ROWS):
                for index in range(max(0, start - first), batch.num_rows):
                    yield Row(self._load, batch, index)
                first += batch.num_rows

    def _load(self, batch: Any, index: int) -> dict[str, Any]:
        row = batch.slice(index, 1).to_pylist()[0]
        layers = range(1, self.folder.codec.num_codebooks + 1)
        labels = _json(row["labels"].encode())
        if isinstance(labels, dict):
            labels |= {key: row[key] for key in ("text", "speaker") if row[key] is not None}
        context = None
        if row.get("context_layer_1") is not None:
            context = [row[f"context_layer_{number}"] for number in layers]
        tokens = [row[f"nano_layer_{number}"] for number in layers]
        values = {"tokens": tokens, "num_samples": row["num_samples"], "context": context, "labels": labels}
        return {"id": row["id"]} | values

    @staticmethod
    def _name(shard: int) -> str:
        return f"data/{shard:06d}.parquet"

    @staticmethod
    def _open(path: Path) -> Any:
        return require("pyarrow.parquet").ParquetFile(path)


class _Manifest(_Reader):
    """A manifest of `.pt` files."""

    _is_reported = False  # whether missing lines were, which are the damage of no single shard

    def count_shards(self) -> list[int]:
        """Of lines that belong to no shard, each gets its share."""
        clips, shards = self.folder.metadata["clips"], self.folder.metadata["shards"]
        return [clips * (shard + 1) // shards - clips * shard // shards for shard in range(shards)]

    def num_files(self) -> int:
        return len(self._starts)

    @cached_property
    def _firsts(self) -> np.ndarray:
        """The number of the first utterance of each shard, int64 [shards]."""
        counts = np.array(self.folder.counts, np.int64)
        return np.cumsum(counts) - counts

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each line begins, and the last one ends, int64 [lines + 1]."""
        starts, position = [], 0
        with open(self._path, "rb") as file:
            for line in read_lines(file, self._path, keep_empty=True):
                if line.strip():
                    starts.append(position)
                position += len(line)
        return np.array([*starts, position], np.int64)

    @property
    def _path(self) -> Path:
        return ShardFiles(self.folder.path, 0, verify=False).path("manifest.json")

    def rows(self, files: ShardFiles, start: int, stop: int) -> Iterator[Row | Damage]:
        lines, clips = len(self._starts) - 1, self.folder.metadata["clips"]
        if lines != clips:
            problem = f"holds {lines} lines, but {METADATA} says {clips} clips; {REPAIR}."
            yield Damage("" if self._is_reported else f"{self._path}: {problem}")
            self._is_reported = True
        first = int(self._firsts[files.shard])
        with open(self._path, "rb") as file:
            for number in range(first + start, min(first + stop, lines)):
                file.seek(int(self._starts[number]))
                line = file.read(int(self._starts[number + 1] - self._starts[number]))
                yield Row(self._load, files, line)

    def _load(self, files: ShardFiles, line: bytes) -> dict[str, Any]:
        labels = _json(line)
        tokens, context = (
            self._tensor(files, name, labels[f"{name}_audio_codes_path"])
            if f"{name}_audio_codes_path" in labels
            else None
            for name in ("target", "context")
        )
        values = {"tokens": tokens, "context": context, "num_samples": labels["num_samples"]}
        return {"id": labels["id"], "labels": labels} | values

    def _tensor(self, files: ShardFiles, name: str, text: Any) -> Any:
        """A file that the manifest names by the absolute path where it was written; the folder may have moved."""
        if not isinstance(text, str):
            raise TokenFileError(f"{self.folder.path}: a path of the manifest is {shorten(repr(text))}, not a text.")
        below = f"/{name}_codes/"
        if path_inside(self.folder.path, text) is None and below in text:
            text = f"{name}_codes/{text.rpartition(below)[2]}"
        return read_token_tensor(files.path(text))


class _Lfr(_Manifest):
    """A manifest of `.lfr` files."""

    def _load(self, files: ShardFiles, line: bytes) -> dict[str, Any]:
        labels = _json(line)
        name = labels["tokens_filepath"]
        if not isinstance(name, str):
            raise TokenFileError(f"{self.folder.path}: a path of the manifest is {shorten(repr(name))}, not a text.")
        with TokenReader(files.path(name)) as reader:
            expected, stored = self.folder.codec, reader.metadata
            for key in ("sample_rate", "samples_per_frame", "levels", "num_codebooks", "fingerprint"):
                if getattr(expected, key) != getattr(stored, key):
                    raise TokenFileError(
                        f"{reader.path}: made by a codec with {key} {getattr(stored, key)}, but {METADATA} says "
                        f"{getattr(expected, key)}."
                    )
            tokens = reader.read()
            return {"id": labels["id"], "tokens": tokens, "num_samples": reader.num_samples, "labels": labels}


READERS: dict[str, type[_Reader]] = {"shar": _Shar, "manifest": _Manifest, "parquet": _Parquet, "lfr": _Lfr}


def _num_entries(folder: Path) -> int:
    return len(os.listdir(folder)) if folder.is_dir() else 0


def regular_file(path: Path) -> Path:
    """Return the path, or raise TokenFileError where opening it would fail, or wait for a writer."""
    try:
        open_regular(path, TokenFileError, REPAIR).close()
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be opened ({error.strerror})"
        raise TokenFileError(f"{shorten(path, 300)}: {what}; {REPAIR}.") from error
    return path


def read_lines(file: Any, path: Path, keep_empty: bool = False) -> Iterator[bytes]:
    """Lines of JSON, each of bounded length."""
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise TokenFileError(f"{path}: a line is longer than {MAX_LINE} bytes; it is damaged.")
        if keep_empty or line.strip():
            yield line


def read_npy(data: bytes) -> np.ndarray:
    """A `.npy` file as an array over its own bytes: a header that promises more than there is allocates nothing."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("its array holds Python objects, which are not read")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if is_fortran else "C")


def reason_of(error: BaseException) -> str:
    """An error of another library in a few words on one line."""
    if isinstance(error, KeyError):
        return f"{shorten(repr(error.args[0] if error.args else ''))} is missing"
    lines = str(error).strip().splitlines()
    return shorten(lines[0], 200).rstrip(".") if lines else type(error).__name__


def _json(data: bytes) -> Any:
    return json.loads(data.decode("utf-8-sig"))
