"""Read and write `.lfr` token files, which contain the tokens of one recording as a sequence of blocks.

All integers are little-endian. Every CRC is a CRC-32 as in zlib. Version 2 of the format:

    header   4 bytes   magic number, "LFRT"
             1 byte    version, 2
             3 bytes   length H of the metadata, at most 65536
             1 byte    coding of the blocks' payload: 0 for packed frames, 1 for frames that an entropy model
                       compressed; a reader rejects any other value
             H bytes   metadata, a JSON object in UTF-8 (see below)
             4 bytes   CRC of the header before this field
    block    4 bytes   number of frames N, 1 to 65536
             N * F     payload: N frames. Each frame is one number of F bytes, see `packing.py`; for 8 codebooks of
                       2016 entries, F is 11
             4 bytes   one CRC over these bytes, concatenated: the CRC field of the previous section, and this block
                       before this field
    ...      further blocks
    end      4 bytes   0
             8 bytes   number of samples that were encoded; ceil(samples / samples_per_frame) is the number of frames
             4 bytes   outline: one CRC over these bytes, concatenated: the CRC field of the header; then, for each
                       block in order, its N and its CRC field
             4 bytes   CRC of the end section before this field

The metadata contains `sample_rate`, `samples_per_frame`, `levels` (of the FSQ dimensions of one codebook),
`num_codebooks`, `fingerprint` (of the codec's weights and settings), `precision` and `written_by`.

In coding 1 (`nemo_lfr/io/entropy/`), N is at most 1024, and 4 additional bytes after N contain the length of the
payload. The metadata is a list of the same values in the same order, followed by the hash of the entropy model.

In version 1, the length H takes 4 bytes, no coding byte follows it, each CRC covers only its own section, and
there is no outline.

A reader rejects an unknown magic number or version, a wrong CRC or outline, a length out of range, invalid metadata, a
frame whose number is not below codebook_size ^ num_codebooks, an invalid compressed payload, a missing end section, a
number of samples that does not match the number of frames, and bytes after the end section. The position of a block
follows from the lengths of the blocks before it, so a reader can seek without reading all blocks.

A block's CRC also covers the CRC field before the block. The CRC is therefore wrong if a block was moved, repeated,
omitted or taken from another file. A reader that seeks detects such changes by the outline, without reading all
blocks. The same metadata, and the same tokens in the same blocks, always give the same bytes.

Files are written to a temporary name, `NAME.????????.part`, and renamed when they are complete. Each block is written
to the file system immediately. After a crash, the `.part` file can be read with `recover=True` up to its last complete
block.

`docs/concepts/lfr-format.md` shows a file byte by byte.
"""

import contextlib
import json
import logging
import math
import numbers
import operator
import os
import struct
import threading
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from nemo_lfr import frames
from nemo_lfr._version import __version__
from nemo_lfr.errors import EntropyModelError, TokenFileError, TokensError, shorten
from nemo_lfr.io.atomic import check_overwrite, naming, open_temporary, publish, sync
from nemo_lfr.io.entropy import coding as compressed
from nemo_lfr.io.entropy.find import check_layout, find_model
from nemo_lfr.io.entropy.model import HASH, EntropyModel
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.packing import check_range, pack, unpack
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.resampling import count_samples
from nemo_lfr.io.whole import read_whole, write_whole
from nemo_lfr.spec import CodecSpec, KnownCodec, check_text

logger = logging.getLogger(__name__)

MAGIC, VERSION = b"LFRT", 2
READABLE_VERSIONS = (1, 2)
CODING = 0  # packed frames
CODINGS = (CODING, compressed.CODING)
MAX_METADATA_BYTES = 65536
MAX_BLOCK_FRAMES = 65536
BLOCKS_TOGETHER = 16  # number of compressed blocks to decode as one batch


@dataclass(frozen=True)
class Metadata(CodecSpec):
    """Metadata of a token file: the codec that produced the tokens, and the program that wrote the file.

    Attributes:
        written_by: name and version of the program; empty if unknown. See `CodecSpec` for the other attributes.
    """

    written_by: str = f"nemo_lfr {__version__}"

    @classmethod
    def of(cls, codec: KnownCodec) -> "Metadata":
        """Return the metadata for token files of `codec`."""
        return cls(**asdict(codec.spec))

    @classmethod
    def from_json(cls, raw: bytes) -> "Metadata":
        """Parse the metadata of an uncompressed file.

        Raises:
            ValueError: if the metadata is invalid. The error may also be a TypeError or KeyError.
        """
        return cls._from_values(json.loads(raw.decode()))

    @classmethod
    def from_list(cls, raw: bytes) -> tuple["Metadata", str]:
        """Parse the metadata of a compressed file, and the hash of its entropy model.

        The metadata is a list of values without names, because names would take 5 % of a short file.

        Raises:
            ValueError: if the metadata is invalid. The error may also be a TypeError or KeyError.
        """
        values = json.loads(raw.decode())
        if not isinstance(values, list):
            raise TypeError(f"expected a list, found {shorten(repr(values))}")
        named = dict(zip((*cls.__dataclass_fields__, "entropy"), values, strict=False))
        # The hash of the model becomes part of a file name, so only hex digits are allowed.
        entropy = named.get("entropy")
        if not isinstance(entropy, str) or not HASH.fullmatch(entropy):
            raise ValueError(f"'entropy' is {shorten(repr(entropy))}, not the hash of a model")
        return cls._from_values(named), entropy

    @classmethod
    def _from_values(cls, values: Any) -> "Metadata":
        if not isinstance(values, dict):
            raise TypeError(f"expected an object, found {shorten(repr(values))}")
        # The defaults of the class are those of a writer. Another program may have omitted these values.
        known = {"precision": "", "written_by": ""}
        known |= {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("sample_rate", "samples_per_frame", "levels", "num_codebooks"):
            if name not in known:
                raise ValueError(f"{name} is missing")
        if not isinstance(known["levels"], list):
            raise TypeError(f"levels are {shorten(repr(known['levels']))}; expected a list")
        known["levels"] = tuple(known["levels"])
        metadata = cls(**known)
        metadata.validate()
        check_text("written_by", metadata.written_by)
        return metadata


class TokenStreamWriter:
    """Write a token file to an open binary file or pipe. Each section is written as soon as it is complete.

    Args:
        file: binary file or pipe.
        metadata: metadata of the tokens.
        model: entropy model that compresses the tokens; None for packed frames.
        gather: number of frames per block; the last block may have up to 1.5 times as many. If None, each call of
            `write` writes its frames at once, as one block, or as several blocks if they exceed the maximum size.

    Attributes:
        metadata: metadata of the tokens.
        frames_written: number of frames in the blocks that were written.

    Raises:
        EntropyModelError: if `model` and `metadata` differ in levels or number of codebooks.
    """

    def __init__(
        self, file: IO[bytes], metadata: Metadata, model: EntropyModel | None = None, gather: int | None = None
    ) -> None:
        if model is not None:
            check_layout(model, metadata.levels, metadata.num_codebooks, "these tokens")
        self._file = file
        self._model = model
        self._gather = gather
        self._pending: list[np.ndarray] = []
        self.metadata = metadata
        self.frames_written = 0
        self._ended = False
        coding = CODING
        values: dict[str, Any] | list[Any] = asdict(metadata)
        if model is not None:
            coding, values = compressed.CODING, [*asdict(metadata).values(), model.hash]
        text = json.dumps(values, separators=(",", ":")).encode()
        self._checksum = self._write_section(MAGIC + struct.pack("<BI", VERSION, coding << 24 | len(text)) + text)
        self._outline = zlib.crc32(self._checksum)

    def _write_section(self, data: bytes, before: bytes = b"") -> bytes:
        """Write a section and its CRC field, and return the CRC field. The CRC covers `before` and the section."""
        checksum = struct.pack("<I", zlib.crc32(data, zlib.crc32(before)))
        write_whole(self._file, data + checksum)
        self._file.flush()  # so that the block survives if the process is killed
        return checksum

    def write(self, tokens: np.ndarray) -> None:
        """Append frames.

        Args:
            tokens: integer ids in [0, codebook_size), shape [C, T].

        Raises:
            TokensError: if `tokens` are not integers, are out of range or have another number of codebooks, or if
                `finish` was called before.
        """
        self._check_open()
        tokens = _integers(tokens)
        if tokens.ndim != 2 or tokens.shape[0] != self.metadata.num_codebooks:
            raise TokensError(f"tokens have shape {list(tokens.shape)}; expected [{self.metadata.num_codebooks}, T].")
        if self._gather is None:
            self._write_blocks(tokens, MAX_BLOCK_FRAMES if self._model is None else compressed.MAX_BLOCK_FRAMES)
            return
        check_range(tokens, self.metadata.codebook_size)
        self._pending.append(np.array(tokens))
        num_pending = sum(piece.shape[1] for piece in self._pending)
        # Half a block is kept back for the last block: a longer last block costs less than a separate short one.
        if num_pending >= self._gather * 3 // 2:
            self._write_pending((num_pending - self._gather // 2) // self._gather * self._gather)

    def _write_pending(self, count: int) -> None:
        """Write the first `count` pending frames in blocks."""
        assert self._gather is not None
        tokens = np.concatenate(self._pending, axis=1)
        self._pending = [tokens[:, count:]]
        self._write_blocks(tokens[:, :count], self._gather)

    def _write_blocks(self, tokens: np.ndarray, size: int) -> None:
        meta = self.metadata
        for start in range(0, tokens.shape[1], size):
            block = tokens[:, start : start + size]
            if self._model is None:
                payload = pack(block, meta.codebook_size, meta.bytes_per_frame)
            else:
                payload = compressed.encode_payload(self._model, block, meta.bytes_per_frame)
            count = struct.pack("<I", block.shape[1])
            self._checksum = self._write_section(count + payload, before=self._checksum)
            self._outline = zlib.crc32(count + self._checksum, self._outline)
            self.frames_written += block.shape[1]

    def finish(self, num_samples: int) -> None:
        """Write the end section, without which a file is incomplete.

        Args:
            num_samples: number of samples that were encoded.

        Raises:
            TokensError: if `num_samples` is not an integer or does not match the number of frames, or if `finish` was
                called before.
        """
        self._check_open()
        try:
            num_samples = operator.index(num_samples)
        except TypeError:
            raise TokensError(f"num_samples is {shorten(repr(num_samples))}; pass an integer.") from None
        if self._pending:
            remainder = np.concatenate(self._pending, axis=1)
            self._pending = []
            self._write_blocks(remainder, max(1, remainder.shape[1]))
        if frames.num_frames(num_samples, self.metadata.samples_per_frame) != self.frames_written:
            expected = frames.num_frames(num_samples, self.metadata.samples_per_frame)
            raise TokensError(
                f"num_samples is {num_samples}, which corresponds to {expected} frames, but {self.frames_written} "
                "frames were written; pass the number of samples that were encoded."
            )
        self._write_section(struct.pack("<IQI", 0, num_samples, self._outline))
        self._ended = True

    def _check_open(self) -> None:
        if self._ended:
            raise TokensError("`finish` was called, so the file is complete; write to another file.")


def _integers(tokens: Any) -> np.ndarray:
    """Convert tokens to an array of integers.

    Raises:
        TokensError: if the values are not integers; floats with integral values are refused too.
    """
    if isinstance(tokens, np.ma.MaskedArray) and np.ma.is_masked(tokens):
        raise TokensError("tokens are a masked array with masked values; fill them first.")
    try:
        array = np.asarray(tokens)
    except Exception as error:  # array classes of other libraries may raise anything, such as tensors on a GPU
        raise TokensError(
            f"tokens have type {shorten(type(tokens).__name__)} and cannot be converted to a numpy array "
            f"({shorten(error)}); pass an array of integers."
        ) from error
    if not np.issubdtype(array.dtype, np.integer):
        raise TokensError(f"tokens are an array of {array.dtype}; pass integers.")
    return array


class TokenWriter(TokenStreamWriter):
    """Write a token file to a temporary name, and rename it when it is complete.

    Args:
        path: output file; missing folders are created.
        metadata: metadata of the tokens.
        overwrite: whether to replace an existing file.
        model: entropy model that compresses the tokens in blocks of 256 frames; None for packed frames.

    Raises:
        OutputExistsError: if the file exists when writing starts or ends, and `overwrite` is not set.
        EntropyModelError: if `model` and `metadata` differ in levels or number of codebooks.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Metadata,
        overwrite: bool = False,
        model: EntropyModel | None = None,
    ) -> None:
        self.path = expand_home(path)
        self._overwrite = overwrite
        check_overwrite(self.path, overwrite)
        self._finished = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = open_temporary(self.path)
        try:
            with naming(self.path):
                super().__init__(
                    self._temporary, metadata, model, gather=None if model is None else compressed.BLOCK_FRAMES
                )
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk makes closing fail too
                self._temporary.close()
            os.unlink(self._temporary.name)
            raise

    @classmethod
    def for_codec(
        cls,
        path: str | os.PathLike[str],
        codec: KnownCodec,
        overwrite: bool = False,
        model: EntropyModel | None = None,
    ) -> "TokenWriter":
        """Return a writer for the tokens of a codec.

        Args:
            path: the token file.
            codec: codec whose metadata is written into the header.
            overwrite: whether to replace an existing file.
            model: entropy model that compresses the tokens; None for packed frames.

        Raises:
            OutputExistsError: if the file exists and `overwrite` is not set.
            EntropyModelError: if `model` and `codec` differ in levels or number of codebooks.
        """
        return cls(path, Metadata.of(codec), overwrite, model)

    def __enter__(self) -> "TokenWriter":
        return self

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens [C, T]; see `TokenStreamWriter.write`."""
        with naming(self.path):
            super().write(tokens)

    def finish(self, num_samples: int) -> None:
        """Write the end section; see `TokenStreamWriter.finish`."""
        with naming(self.path):
            super().finish(num_samples)
        self._finished = True

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        temporary = Path(self._temporary.name)
        try:
            with naming(self.path, temporary):
                with self._temporary as file:
                    file.flush()
                    sync(file.fileno())
                if kind is None and not self._finished:
                    raise TokensError(
                        f"{self.path}: `finish` was not called, so the file was not written; call it after `write`."
                    )
                if kind is None:
                    publish(temporary, self.path, self._overwrite)
        finally:
            temporary.unlink(missing_ok=True)


class _Sections:
    """Base class of the readers of token files, with methods that read and check each section.

    Args:
        file: binary file, open for reading.
        name: name of the file for messages.
        model: entropy model for a compressed file, or the path of the model (default: see `find_model`).
        remedy: advice at the end of a message about damage after the header.

    Attributes:
        metadata: metadata in the header.
        version: version of the format.
        coding: coding of the blocks' payload, 0 for packed or 1 for compressed frames.
        entropy_hash: hash of the entropy model that the file was compressed with; None for an uncompressed file.
    """

    def __init__(
        self,
        file: IO[bytes],
        name: str | os.PathLike[str],
        model: EntropyModel | str | os.PathLike[str] | None = None,
        remedy: str = "Read the intact part with --recover (recover=True).",
    ) -> None:
        self._file = file
        self._remedy = remedy
        self.path = Path(name)
        self.entropy_hash: str | None = None
        self._passed_model = model
        self._header_is_valid = False
        self._outline = 0
        self.version, self.coding, self.metadata = self._read_header()
        self._bytes_per_frame = self.metadata.bytes_per_frame
        self._max_block_frames = MAX_BLOCK_FRAMES if self.coding == CODING else compressed.MAX_BLOCK_FRAMES
        self._header_is_valid = True

    def _fail(self, reason: str, conclusion: str = "; the file is damaged or truncated") -> TokenFileError:
        hint = f" {self._remedy}" if self._header_is_valid else ""
        return TokenFileError(f"{self.path}: {reason}{conclusion}.{hint}")

    def _take(self, size: int) -> bytes:
        data = read_whole(self._file, size)
        if len(data) != size:
            raise self._fail("the data ends too early")
        return data

    def _check(self, section: bytes, what: str, before: bytes = b"") -> bytes:
        """Read and verify the CRC field after a section, and return the field.

        The CRC covers `before` and the section. `what` names the section in error messages.
        """
        return self._compare(self._take(4), section, what, before)

    def _compare(self, checksum: bytes, section: bytes, what: str, before: bytes) -> bytes:
        if checksum != struct.pack("<I", zlib.crc32(section, zlib.crc32(before))):
            raise self._fail(f"the checksum of {what} is wrong")
        return checksum

    def _read_header(self) -> tuple[int, int, Metadata]:
        head = read_whole(self._file, 5)
        if not head:
            raise TokenFileError(
                f"{self.path}: the input is empty; check the program that wrote it, or copy it again."
            )
        if head[:4] != MAGIC:
            raise TokenFileError(f"{self.path}: not a .lfr token file.")
        if len(head) < 5:
            raise self._fail("the data ends too early")
        version = head[4]
        if version not in READABLE_VERSIONS:
            raise TokenFileError(
                f"{self.path}: the file has format version {version}, but this nemo_lfr reads versions "
                f"{' and '.join(map(str, READABLE_VERSIONS))}; install a newer nemo_lfr."
            )
        head += self._take(4)
        length = int.from_bytes(head[5:], "little")
        coding = CODING
        if version > 1:
            coding, length = length >> 24, length & 0xFFFFFF
        if length > MAX_METADATA_BYTES:
            raise self._fail(f"its metadata length is {length} bytes; the limit is {MAX_METADATA_BYTES}")
        text = self._take(length)
        self._checksum = self._check(head + text, "the header")
        if coding not in CODINGS:
            raise TokenFileError(
                f"{self.path}: its blocks have coding {coding}, but this nemo_lfr reads codings "
                f"{' and '.join(map(str, CODINGS))}; install a newer nemo_lfr."
            )
        self._outline = zlib.crc32(self._checksum)
        try:
            if coding == CODING:
                return version, coding, Metadata.from_json(text)
            metadata, self.entropy_hash = Metadata.from_list(text)
            return version, coding, metadata
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise TokenFileError(f"{self.path}: its metadata is invalid ({shorten(error, 200)}).") from error

    def _read_count(self) -> int:
        """Read the number of frames in the next block; 0 means that the end section follows."""
        count: int = struct.unpack("<I", self._take(4))[0]
        if count > self._max_block_frames:
            raise self._fail(f"a block has {count} frames; the limit is {self._max_block_frames}")
        return count

    @cached_property
    def entropy_model(self) -> EntropyModel:
        """The entropy model that a compressed file needs.

        Raises:
            EntropyModelError: if the model is not found, or if it and the file differ in levels or number of
                codebooks.
        """
        meta = self.metadata
        assert self.entropy_hash is not None
        model = find_model(self.entropy_hash, self.path, meta.written_by, self._passed_model)
        check_layout(model, meta.levels, meta.num_codebooks, self.path)
        return model

    def _read_size(self, count: int) -> tuple[int, bytes]:
        """Read the length of the payload of a block with `count` frames.

        Returns:
            The length in bytes, and the 4 bytes of the file that contain it. In an uncompressed file, the length
            follows from `count`, and the second value is empty.
        """
        if self.coding == CODING:
            return count * self._bytes_per_frame, b""
        field = self._take(4)
        (size,) = compressed.SIZE.unpack(field)
        if size not in compressed.payload_range(count, self._bytes_per_frame):
            raise self._fail(f"a block of {count} frames has a payload of {size} bytes, which is out of range")
        return size, field

    def _read_tokens(self, count: int, first: int, before: bytes) -> tuple[np.ndarray, int, bytes]:
        """Read the rest of a block, after the field with its number of frames (`count`).

        `first` is the index of the first frame, for messages. `before` is the CRC field of the previous section.

        Returns:
            Tokens [C, count], length of the payload in bytes, and CRC field.
        """
        size, field = self._read_size(count)
        body = field + self._take(size)
        checksum = self._take(4)
        payload = self._parse_payload(count, body, checksum, first, before)
        return self._decode([(payload, count)])[0], size, checksum

    def _parse_payload(self, count: int, body: bytes, checksum: bytes, first: int, before: bytes) -> bytes:
        """Verify the CRC of a block and return its payload.

        Args:
            count: number of frames.
            body: bytes between the count and the CRC field.
            checksum: CRC field.
            first: index of the first frame, for messages.
            before: CRC field of the previous section.
        """
        section = struct.pack("<I", count) + body
        self._compare(checksum, section, f"the block at frame {first}", before if self.version > 1 else b"")
        return body if self.coding == CODING else body[compressed.SIZE.size :]

    def _decode(self, blocks: list[tuple[bytes, int]]) -> list[np.ndarray]:
        """Decode blocks to int32 tokens [C, T]. Each block is a pair (payload, number of frames)."""
        meta = self.metadata
        try:
            if self.coding == CODING:
                size = self._bytes_per_frame
                return [unpack(payload, meta.codebook_size, meta.num_codebooks, size) for payload, _ in blocks]
            return compressed.decode_payloads(self.entropy_model, blocks, self._bytes_per_frame)
        except EntropyModelError:
            raise
        except ValueError as error:
            raise self._fail(str(error).rstrip(".")) from error

    def _add_to_outline(self, count: int, checksum: bytes) -> None:
        """Update the outline with a block's number of frames and CRC field."""
        self._checksum = checksum
        self._outline = zlib.crc32(struct.pack("<I", count) + checksum, self._outline)

    def _read_end(self, num_frames: int) -> int:
        """Read and check the end section, whose first field was already read; return the number of samples."""
        fields = self._take(8 if self.version == 1 else 12)
        self._check(bytes(4) + fields, "the end section")
        if read_whole(self._file, 1):
            raise self._fail("other bytes follow its end section")
        if self.version > 1 and fields[8:] != struct.pack("<I", self._outline):
            raise self._fail("its blocks were replaced or reordered", conclusion="")
        num_samples: int = struct.unpack("<Q", fields[:8])[0]
        if frames.num_frames(num_samples, self.metadata.samples_per_frame) != num_frames:
            expected = frames.num_frames(num_samples, self.metadata.samples_per_frame)
            raise self._fail(
                f"its end section declares {num_samples} samples, which correspond to {expected} frames, but its "
                f"blocks have {num_frames} frames"
            )
        return num_samples

    def check_codec(self, codec: KnownCodec) -> None:
        """Check that `codec` can decode these tokens.

        Raises:
            TokenFileError: if `codec` and the codec of the tokens differ in sample rate, samples per frame, levels,
                number of codebooks or weights.
        """
        stored: dict[str, Any] = asdict(self.metadata)
        expected: dict[str, Any] = asdict(Metadata.of(codec))
        for name in ("sample_rate", "samples_per_frame", "levels", "num_codebooks", "fingerprint"):
            same = stored[name] == expected[name] or (name == "fingerprint" and codec.made(stored[name]))
            if stored[name] and not same:
                raise TokenFileError(
                    f"{self.path}: the tokens were made by a codec with {name} {stored[name]}, but {codec.name} has "
                    f"{expected[name]}; pass the codec that made them as --model."
                )


class TokenStreamReader(_Sections):
    """Read a token file sequentially, for instance from a pipe.

    Args:
        file: binary file, open for reading; it need not be seekable.
        name: name of the file for messages.
        model: entropy model for a compressed file, or the path of the model (default: see `find_model`).
        remedy: advice at the end of a message about damage after the header.

    Attributes:
        metadata: metadata in the header.
        num_samples: number of samples that were encoded; None until `blocks` has reached the end of the file.

    Raises:
        TokenFileError: if the file is damaged or not a token file.
    """

    num_samples: int | None = None

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the int32 tokens [C, T] of each block as soon as the block arrives."""
        num_frames = 0
        while count := self._read_count():
            tokens, _, checksum = self._read_tokens(count, num_frames, self._checksum)
            self._add_to_outline(count, checksum)
            yield tokens
            num_frames += count
        self.num_samples = self._read_end(num_frames)


class TokenReader(_Sections):
    """Read a token file. The checksum of every section is verified before the section is used.

    Several threads and forked processes may read from one object at the same time.

    Args:
        path: the file.
        recover: whether to read a truncated or damaged file up to the damage, instead of raising an error.
        model: entropy model for a compressed file, or the path of the model (default: see `find_model`).

    Attributes:
        metadata: metadata in the header.
        version: version of the format.
        coding: coding of the blocks' payload, 0 for packed or 1 for compressed frames.
        entropy_hash: hash of the entropy model that the file was compressed with; None for an uncompressed file.
        num_samples: number of samples that were encoded; for an incomplete file, num_frames * samples_per_frame.
        complete: whether the end section was read.
        payload_bytes: total size of the blocks' payloads in bytes.

    Raises:
        TokenFileError: if the file is missing, damaged or not a token file. Damage inside a block, or a change of the
            file while it is open, is found only when the block is read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        recover: bool = False,
        model: EntropyModel | str | os.PathLike[str] | None = None,
    ) -> None:
        path = expand_home(path)
        try:
            file = open_regular(path, TokenFileError)
        except OSError as error:
            raise TokenFileError(f"{path}: {error.strerror or error}.") from error
        try:
            super().__init__(file, path, model)
            self._lock = threading.Lock()
            # Position and first frame of each block, in compact arrays: a long live recording has millions of blocks.
            self._positions, self._firsts = array("Q"), array("Q", [0])
            self._checksums = bytearray()  # CRC field of each block, to detect later changes of the file
            self.complete = True
            self.payload_bytes = 0
            self._end = 0  # position after the last block
            try:
                self.num_samples = self._read_outline(check=recover)
            except TokenFileError as error:
                if not recover or isinstance(error, EntropyModelError):
                    raise
                self.complete = False
                self.num_samples = self.num_frames * self.metadata.samples_per_frame
        except BaseException:
            file.close()
            raise

    @property
    def num_frames(self) -> int:
        """Number of frames in the file. The frames are counted when the file is opened."""
        return self._firsts[-1]

    def __enter__(self) -> "TokenReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_outline(self, check: bool) -> int:
        """Record the position of each block up to the end section, and return the number of samples.

        Args:
            check: whether to read and verify each block, so that a damaged or misplaced one raises an error.
        """
        position = self._file.tell()
        while count := self._read_count():
            if check:
                _, size, checksum = self._read_tokens(count, self.num_frames, self._checksum)
            else:
                size, _ = self._read_size(count)
                self._file.seek(size, os.SEEK_CUR)
                checksum = self._take(4)
            self._add_to_outline(count, checksum)
            self.payload_bytes += size
            self._positions.append(position)
            self._checksums += checksum
            self._firsts.append(self.num_frames + count)
            position = self._end = self._file.tell()
        return self._read_end(self.num_frames)

    def _read_blocks(self, indices: range) -> list[np.ndarray]:
        """Read blocks and verify their checksums; return their tokens [C, T]."""
        payloads = []
        for number in indices:
            first, count = self._firsts[number], self._firsts[number + 1] - self._firsts[number]
            # `data`: the CRC field of the previous section, and the block's number of frames, body and CRC field.
            begin = self._positions[number]
            end = self._positions[number + 1] if number + 1 < len(self._positions) else self._end
            data = self._read_at(begin - 4, 4 + end - begin)
            checksum = self._checksums[4 * number : 4 * number + 4]
            if len(data) != 4 + end - begin or data[4:8] != struct.pack("<I", count) or data[-4:] != checksum:
                raise TokenFileError(
                    f"{self.path}: the block at frame {first} has changed since the file was opened; read it again."
                )
            payloads.append((self._parse_payload(count, data[8:-4], data[-4:], first, data[:4]), count))
        return self._decode(payloads)

    def _read_at(self, position: int, size: int) -> bytes:
        """Read up to `size` bytes at `position`.

        Several threads or forked processes may call this method at the same time.
        """
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, position)
        with self._lock:
            self._file.seek(position)
            return self._file.read(size)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield the int32 tokens [C, T] of frames [start, stop), block by block. Other blocks are not read.

        Args:
            start: number of the first frame.
            stop: number of the frame after the last one; None, or a number above `num_frames`, for all frames.

        Raises:
            TokenFileError: if `start` or `stop` is not an integer of at least 0, or a block is damaged.
        """
        start = self._frame_number("start", start)
        stop = self.num_frames if stop is None else min(self._frame_number("stop", stop), self.num_frames)
        number = max(0, bisect_right(self._firsts, start) - 1)
        together = 1 if self.coding == CODING else BLOCKS_TOGETHER
        while number < len(self._positions) and (first := self._firsts[number]) < stop:
            last = number + 1
            while last < min(number + together, len(self._positions)) and self._firsts[last] < stop:
                last += 1
            for tokens in self._read_blocks(range(number, last)):
                yield tokens[:, max(0, start - first) : stop - first]
                first += tokens.shape[1]
            number = last

    def check_recovered(self) -> None:
        """If the file is damaged or incomplete, log a warning that says how much of it is read.

        Raises:
            TokenFileError: if the file is damaged or incomplete, and none of its blocks is intact.
        """
        if self.complete:
            return
        if not self.num_frames:
            raise TokenFileError(f"{self.path}: the file is damaged or incomplete, with no intact block to recover.")
        seconds = self.num_samples / self.metadata.sample_rate
        logger.warning("%s: the file is damaged or incomplete; its first %.2f s are read.", self.path, seconds)

    def _frame_number(self, name: str, value: Any) -> int:
        """Return a frame number as an int. If it is not valid, raise TokenFileError with the argument's `name`."""
        try:
            number = operator.index(value)
        except TypeError:
            number = -1
        if number < 0:
            raise TokenFileError(
                f"{self.path}: {name} is {shorten(repr(value))}; pass the number of a frame, an integer from 0 to "
                f"{self.num_frames}."
            )
        return number

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the int32 tokens [C, T] of frames [start, stop) (default: all frames); see `blocks`."""
        empty = np.empty((self.metadata.num_codebooks, 0), dtype=np.int32)
        return np.concatenate([empty, *self.blocks(start, stop)], axis=1)

    def samples_between(self, start: float, duration: float | None) -> tuple[int, int]:
        """Convert a segment in seconds to a range of samples [first, last).

        Args:
            start: start in seconds.
            duration: duration in seconds; None for the rest of the recording. A segment that extends beyond the end of
                the recording is shortened.

        Raises:
            TokenFileError: if `start` is outside the recording, or an argument is not a valid number.
        """
        for name, value in (("start", start), ("duration", duration)):
            if name == "duration" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TokenFileError(f"{self.path}: {name} is {shorten(repr(value))}; pass a number of seconds.")
        rate = self.metadata.sample_rate
        seconds = self.num_samples / rate
        if not 0 <= start <= seconds:
            end = math.floor(seconds * 1000) / 1000
            raise TokenFileError(
                f"{self.path}: start is {start!r}; pass a number of seconds from 0 to {end:.3f}, the duration of the "
                "recording."
            )
        if duration is not None and not 0 <= duration < math.inf:
            raise TokenFileError(f"{self.path}: duration is {duration!r}; pass a number of seconds, 0 or more.")
        first = count_samples(start, rate)
        last = self.num_samples
        if duration is not None:
            last = min(last, first + count_samples(min(duration, seconds), rate))
        return first, last
