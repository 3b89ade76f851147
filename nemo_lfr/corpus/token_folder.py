"""Read and validate a folder of tokens that `nemo-lfr tokenize` wrote.

The files are compared with the records of the run. The reader yields an error in place of a damaged utterance. Files
outside the folder are not read, even through links, and no code in the folder is executed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_lfr import frames
from nemo_lfr.corpus.formats import FORMAT, format_names, get_format
from nemo_lfr.corpus.formats.base import REPAIR, Damage, Row, ShardFiles, num_entries, parse_json, regular_file
from nemo_lfr.corpus.inventory import Watch
from nemo_lfr.corpus.records import METADATA, RESUME, ShardRecord, describe_unfinished
from nemo_lfr.errors import NemoLfrError, TokenFileError, counted, quoted, shorten
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.token_file import Metadata
from nemo_lfr.plugins import naming_extension

MAX_SHARDS, MAX_CLIPS = 10_000_000, 2**48
# If the files of some shards are missing, the other shards can still be read. If `tokens.json` lists more shards than
# SPARE_SHARDS + 2 * (number of shards with files), however, it counts as damaged.
SPARE_SHARDS = 1000


@dataclass(frozen=True)
class TokenizedUtterance:
    """Tokens of one clip.

    Attributes:
        id: clip id, as assigned by `tokenize`.
        tokens: tokens [C, T], int64.
        num_samples: number of audio samples that the tokens represent.
        context: tokens of the context audio [C, T], int64; None if the clip has no context audio.
        labels: "text" (None for a clip without text), "speaker" and any other labels of the corpus.
    """

    id: str
    tokens: torch.Tensor
    num_samples: int
    context: torch.Tensor | None = None
    labels: dict[str, Any] = field(default_factory=dict)


class TokenFolder:
    """Reader of a folder of tokens, in any format that `tokenize` writes.

    Args:
        folder: the folder of tokens.
        verify: before a file is read, compare its hash, and not only its size, with the record of the run.

    Attributes:
        metadata: content of `tokens.json`.
        codec: properties of the codec that made the tokens, such as its levels and fingerprint.
        counts: number of utterances in each shard.
        identity: hash of the codec and of the contents of all shards when the folder was opened.

    Raises:
        NemoLfrError: if the folder does not contain the tokens of a complete run, its `tokens.json` is damaged,
            or `verify` is set and the hashes of a shard are not recorded.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.path = expand_home(folder).absolute()  # so that the working directory may change
        self.verify = verify
        name = self.path / METADATA
        if unfinished := describe_unfinished(self.path):
            raise NemoLfrError(f"{shorten(folder, 300)}: the tokenize run is not finished ({unfinished}); {RESUME}.")
        if self.path.is_file() and (self.path.parent / METADATA).exists():
            raise NemoLfrError(
                f"{shorten(folder, 300)}: this is a file in a folder of tokens; pass the folder {self.path.parent}."
            )
        if not self.path.is_dir() or not name.exists():
            raise NemoLfrError(
                f"{shorten(folder, 300)}: no {METADATA}; pass the folder of a finished `nemo-lfr tokenize` run."
            )
        self._watch = Watch([name])
        try:
            self.metadata: dict[str, Any] = parse_json(regular_file(name).read_bytes())
            self.codec = self._check_metadata()
        except TokenFileError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise TokenFileError(f"{name}: cannot be read: {shorten(reason, 200)}.") from error
        output = get_format(self.metadata["format"])
        with naming_extension(output, FORMAT):
            self._reader = output.reader(self.path, self.metadata, self.codec)
            self.counts = self._count()
        self._firsts = [0, *accumulate(self.counts)]
        self.identity = self._identify()
        if verify:
            self._check_records()

    def _check_metadata(self) -> Metadata:
        values = self.metadata
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, found {quoted(values)}")
        for key, highest in (("shards", MAX_SHARDS), ("clips", MAX_CLIPS)):
            if type(values[key]) is not int or not 0 <= values[key] <= highest:
                raise ValueError(f"{key} is {quoted(values[key])}; expected an integer from 0 to {highest}")
        if not isinstance(values["format"], str) or values["format"] not in format_names():
            raise ValueError(f"format is {quoted(values['format'])}; expected one of {', '.join(format_names())}")
        if not isinstance(values.get("context", False), bool):
            raise ValueError(f"context is {quoted(values['context'])}; expected true or false")
        if not isinstance(values["codec"], dict) or not isinstance(values["codec"]["fingerprint"], str):
            raise ValueError(f"codec is {quoted(values['codec'])}; expected an object whose fingerprint is a string")
        return Metadata.from_json(json.dumps(values["codec"]).encode())

    def _count(self) -> list[int]:
        """Return the number of utterances in each shard, from `tokens.json`, from the records, or by counting."""
        shards, clips = self.metadata["shards"], self.metadata["clips"]
        counts = self.metadata.get("shard_clips")
        if shards > SPARE_SHARDS:
            present = max(self._reader.num_files(), num_entries(ShardRecord.folder(self.path)))
            if shards > SPARE_SHARDS + 2 * present:
                raise TokenFileError(
                    f"{self.path}: {METADATA} lists {shards} shards, but only {present} have files; {REPAIR}."
                )
        if counts is None:
            records = (
                [ShardRecord.read(self.path, index) for index in range(shards)]
                if ShardRecord.folder(self.path).is_dir()
                else []
            )
            known = [record.clips for record in records if record]
            counts = known if len(known) == shards else self._reader.count_shards()
        if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
            raise TokenFileError(f"{self.path}/{METADATA}: shard_clips is not a list of clip counts; {REPAIR}.")
        if len(counts) != shards or sum(counts) != clips:
            raise TokenFileError(
                f"{self.path}: found {counted(sum(counts), 'utterance')} in {counted(len(counts), 'shard')}, but "
                f"{METADATA} lists {counted(clips, 'utterance')} in {counted(shards, 'shard')}; {REPAIR}."
            )
        return counts

    def _identify(self) -> str:
        """Return a hash of the codec and of the contents of all shards, 16 hex digits.

        In a folder without records, the result depends only on the codec, the counts of clips and frames, and the
        options `context` and `pad`.
        """
        counts = {key: self.metadata.get(key) for key in ("clips", "frames", "context", "pad")}
        identity = hashlib.sha256(json.dumps([self.codec.fingerprint, self.counts, counts]).encode())
        for index in range(self.metadata["shards"]):
            record = ShardRecord.read(self.path, index)
            identity.update(json.dumps(record and sorted(record.files.items())).encode())
        return identity.hexdigest()[:16]

    def _was_replaced(self) -> bool:
        """Return whether another run has replaced the tokens in the folder since this object opened it."""
        name = self.path / METADATA
        if self._watch.changed([name]) is None:
            return False
        watch = Watch([name])  # before the file is read, to detect a change while it is read
        try:
            metadata = parse_json(regular_file(name).read_bytes())
            keys = ("format", "shards", "clips", "shard_clips", "frames")
            is_same = all(metadata.get(key) == self.metadata.get(key) for key in keys)
            is_same = is_same and metadata["codec"]["fingerprint"] == self.codec.fingerprint
        except (NemoLfrError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return True
        # Tokens of parallel corpora, such as clean and noisy speech, may differ only in the hashes of their files.
        if not is_same or self._identify() != self.identity:
            return True
        self._watch = watch  # `tokenize` wrote the file again, as it does when a complete run is resumed
        return False

    def _check_records(self) -> None:
        """Raise TokenFileError unless the hashes of every shard are recorded."""
        missing = [index for index in range(self.metadata["shards"]) if ShardRecord.read(self.path, index) is None]
        if missing:
            raise TokenFileError(
                f"{self.path}: tokens cannot be verified, because the hashes of {len(missing)} of "
                f"{self.metadata['shards']} shards are missing from {ShardRecord.folder(self.path)} or damaged; if "
                "you copied the tokens from elsewhere, copy that folder too, or remove --verify (verify=True)."
            )

    def read(
        self, shard: int, start: int = 0, stop: int | None = None
    ) -> Iterator[TokenizedUtterance | TokenFileError]:
        """Yield the utterances [start, stop) of a shard in order.

        Args:
            shard: index of the shard.
            start: index of the first utterance in the shard.
            stop: index after the last utterance; None for the end of the shard.

        Yields:
            Utterances and errors. An error takes the place of one or more consecutive utterances that cannot be read,
            or reports other damage, such as more utterances than were recorded.
        """
        if self._was_replaced():
            yield TokenFileError(f"{self.path}: the folder was replaced after it was opened; open it again.")
            return
        stop = self.counts[shard] if stop is None else min(stop, self.counts[shard])
        files = ShardFiles(self.path, shard, self.verify, self._firsts[shard])
        seen = 0
        damaged = False
        rows = self._reader.rows(files, start, stop)
        while seen < stop - start:
            try:
                item = next(rows, None)
            except NemoLfrError as error:
                yield TokenFileError(str(error))
                return
            except Exception as error:  # the exceptions depend on the format's reader
                if not damaged:
                    rest = f"utterances {start + seen} to {stop - 1}"
                    yield TokenFileError(f"{self.path}, shard {shard}: {rest} cannot be read ({reason_of(error)}).")
                return
            if item is None:
                if not damaged:
                    yield TokenFileError(
                        f"{self.path}, shard {shard}: found only {start + seen} of "
                        f"{counted(self.counts[shard], 'utterance')}; {REPAIR}."
                    )
                return
            if isinstance(item, Damage):
                damaged = True
                if item:
                    yield TokenFileError(item)
                continue
            where = f"{self.path}, shard {shard}, utterance {start + seen}"
            seen += 1
            try:
                yield self._utterance(item, where)
                continue
            except NemoLfrError as error:
                invalid = TokenFileError(str(error))
            except Exception as error:  # raised by torch, numpy or the values of the row
                invalid = TokenFileError(f"{where}: cannot be read ({reason_of(error)}).")
            invalid.source = where
            yield invalid
        if stop < self.counts[shard] or damaged:
            return
        try:
            more = next(rows, None)
        except Exception as error:
            yield TokenFileError(f"{self.path}, shard {shard}: damaged at the end ({reason_of(error)}); {REPAIR}.")
        else:
            if more is not None:
                yield TokenFileError(
                    f"{self.path}, shard {shard}: found more than the {stop} utterances that are recorded; {REPAIR}."
                )

    def _utterance(self, row: Row, where: str) -> TokenizedUtterance:
        values = row.load()
        clip_id = values["id"]
        if not isinstance(clip_id, str):
            raise TokenFileError(f"{where}: id is {shorten(repr(clip_id))}, not a string.")
        where = f"{where} ({shorten(clip_id)})"
        num_samples, labels, context = values["num_samples"], values["labels"], values.get("context")
        if type(num_samples) is not int or not 0 < num_samples < 2**48:
            number = shorten(repr(num_samples))
            raise TokenFileError(f"{where}: num_samples is {number}, not an integer from 1 to 2^48 - 1.")
        if not isinstance(labels, dict):
            raise TokenFileError(f"{where}: labels are {shorten(repr(labels))}, not a JSON object.")
        num_frames = frames.num_frames(num_samples, self.codec.samples_per_frame)
        tokens = self._tokens(values["tokens"], num_frames, f"{where}: tokens")
        if context is not None:
            context = self._tokens(context, None, f"{where}: context tokens")
        # For a clip without text, "text" is missing, null or "" in the files, depending on the format.
        labels = {**labels, "text": labels.get("text") or None}
        return TokenizedUtterance(clip_id, tokens, num_samples, context, labels)

    def _tokens(self, value: Any, num_frames: int | None, what: str) -> torch.Tensor:
        """Validate tokens and convert them to int64 [C, T].

        Args:
            value: tensor, array, or list of lists.
            num_frames: expected number of frames; None for any number.
            what: plural subject of error messages.
        """
        if isinstance(value, torch.Tensor):
            is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
            held = value.untyped_storage().nbytes() if value.layout == torch.strided else 0
            if value.layout != torch.strided or value.is_quantized or value.numel() * value.element_size() > held:
                raise TokenFileError(f"{what} must be a dense tensor with all of its values stored in the file.")
            kind = str(value.dtype)
        else:
            if isinstance(value, list) and len({len(layer) for layer in value}) != 1:
                lengths = shorten([len(layer) for layer in value])
                raise TokenFileError(f"{what} have codebooks of unequal lengths {lengths}.")
            value = np.asarray(value)
            is_integer, kind = value.dtype.kind in "iu", str(value.dtype)
        if not is_integer:
            raise TokenFileError(f"{what} are {kind}, not integers.")
        shape = list(value.shape)
        if len(shape) != 2 or shape[0] != self.codec.num_codebooks or shape[1] == 0:
            raise TokenFileError(f"{what} have shape {shape}; expected [{self.codec.num_codebooks}, T].")
        if num_frames is not None and shape[1] != num_frames:
            raise TokenFileError(f"{what} have {shape[1]} frames, but num_samples corresponds to {num_frames}.")
        tokens = value.long() if isinstance(value, torch.Tensor) else torch.from_numpy(value.astype(np.int64))
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.codec.codebook_size:
            raise TokenFileError(f"{what} range from {low} to {high}; expected [0, {self.codec.codebook_size}).")
        return tokens.contiguous()


def reason_of(error: BaseException) -> str:
    """Return the first line of an exception that a third-party library raised, for an error message.

    For a KeyError, the result says which key is missing. If there is no message, the result is the name of the
    exception's class.
    """
    if isinstance(error, KeyError):
        return f"{shorten(repr(error.args[0] if error.args else ''))} is missing"
    lines = str(error).strip().splitlines()
    return shorten(lines[0], 200).rstrip(".") if lines else type(error).__name__
