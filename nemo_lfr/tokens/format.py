"""The `.lfr` token file: one recording, written as a stream of blocks.

All integers are little-endian; every CRC is CRC-32 (zlib's). Version 2:

    header   4 bytes   magic, "LFRT"
             1 byte    version, 2
             3 bytes   length H of the metadata, at most 65536
             1 byte    coding of the blocks' payload, 0: packed frames; a reader refuses a coding that it does not know
             H bytes   metadata, a JSON object in UTF-8 (below)
             4 bytes   CRC of the header before this field
    block    4 bytes   number of frames N, 1 to 65536
             N * F     payload: frames, each one number as `packing.py` says; F bytes hold any frame (11 for 8 x 2016)
             4 bytes   CRC of the CRC field of the section before, followed by this block before this field
    ...      further blocks
    end      4 bytes   0
             8 bytes   number of samples that were encoded: at most frames * samples_per_frame, and more than one frame
                       less holds
             4 bytes   outline: CRC of the header's CRC field, then of N and the CRC field of each block, in order
             4 bytes   CRC of the end before this field

Metadata: `sample_rate`, `samples_per_frame`, `levels` (of one codebook), `num_codebooks`, and as information
`fingerprint` (of the codec's weights and settings), `precision`, `written_by`.

Version 1 has no outline, H takes the coding byte too, and each of its CRCs covers its own section only.

A reader rejects another magic or version, a CRC that differs, a length out of range, a frame that is no number below
codebook_size ^ num_codebooks, a file that stops before its end section, and bytes after it. No byte is ever executed.
Block lengths alone lead from one block to the next, so that a reader finds any second without reading what is before.

A block's CRC continues the one before it, which lies in the four bytes in front of the block. A block that was moved,
repeated, left out or taken from another file therefore fails its check when blocks are read in order, as from a pipe
or with `recover`. The outline finds the same when a file is opened, from the lengths and CRC fields alone, so that a
span in the middle of such a file is refused too. Nothing in a file is random: equal tokens give equal bytes.

Files are written aside, as `NAME.????????.part`, and renamed when they are whole. Each block reaches the file system
as it is written: after a crash the `.part` file can be read with `recover=True` up to its last whole block.
`docs/concepts/lfr-format.md` shows a file byte by byte.
"""

import contextlib
import json
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
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from nemo_lfr import frames
from nemo_lfr._version import __version__
from nemo_lfr.atomic import naming, open_aside
from nemo_lfr.audio import refuse_overwrite
from nemo_lfr.errors import TokenFileError, TokensError, clip
from nemo_lfr.locate import expand_home
from nemo_lfr.regular import open_regular
from nemo_lfr.spec import CodecSpec, KnownCodec, check_text
from nemo_lfr.tokens.packing import pack, unpack

MAGIC, VERSION = b"LFRT", 2
READABLE_VERSIONS = (1, 2)
CODING = 0  # packed frames
MAX_METADATA_BYTES = 65536
MAX_BLOCK_FRAMES = 65536


@dataclass(frozen=True)
class Metadata(CodecSpec):
    """What a reader must know to decode, and what it may want to know.

    Attributes:
        written_by: the program that wrote the file.
    """

    written_by: str = f"nemo_lfr {__version__}"

    @classmethod
    def of(cls, codec: KnownCodec) -> "Metadata":
        """Return the metadata of files that hold tokens of `codec`."""
        return cls(**asdict(codec.spec))

    @classmethod
    def from_json(cls, raw: bytes) -> "Metadata":
        """Read the metadata of a file.

        Raises:
            ValueError, TypeError or KeyError: for anything but what `of` makes.
        """
        values = json.loads(raw)
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["levels"] = tuple(known["levels"])
        metadata = cls(**known)
        metadata.validate()
        check_text("written_by", metadata.written_by)
        return metadata


class TokenStream:
    """Writes the sections of a token file to an open binary file, each as soon as it is there.

    Args:
        file: a file or a pipe.
        metadata: what the tokens are.
    """

    def __init__(self, file: IO[bytes], metadata: Metadata) -> None:
        self._file = file
        self.metadata = metadata
        self.frames_written = 0
        self._ended = False
        text = json.dumps(asdict(metadata), separators=(",", ":")).encode()
        self._checksum = self._section(MAGIC + struct.pack("<BI", VERSION, CODING << 24 | len(text)) + text)
        self._outline = zlib.crc32(self._checksum)

    def _section(self, data: bytes, before: bytes = b"") -> bytes:
        """Write a section and its CRC, which also covers `before`; returns the CRC field."""
        checksum = struct.pack("<I", zlib.crc32(data, zlib.crc32(before)))
        self._file.write(data + checksum)
        self._file.flush()  # a killed process keeps what was written
        return checksum

    def write(self, tokens: np.ndarray) -> None:
        """Append frames, [C, T].

        Raises:
            TokensError: for values that are no integers, another number of codebooks, or after `finish`.
        """
        self._check_open()
        tokens = _integers(tokens)
        if tokens.ndim != 2 or tokens.shape[0] != self.metadata.num_codebooks:
            raise TokensError(f"tokens have shape {list(tokens.shape)}; expected [{self.metadata.num_codebooks}, T].")
        for start in range(0, tokens.shape[1], MAX_BLOCK_FRAMES):
            block = tokens[:, start : start + MAX_BLOCK_FRAMES]
            packed = pack(block, self.metadata.codebook_size, self.metadata.bytes_per_frame)
            count = struct.pack("<I", block.shape[1])
            self._checksum = self._section(count + packed, before=self._checksum)
            self._outline = zlib.crc32(count + self._checksum, self._outline)
            self.frames_written += block.shape[1]

    def finish(self, num_samples: int) -> None:
        """Say how many samples the frames stand for; without it a file is not whole.

        Raises:
            TokensError: for a count that does not belong to the frames, or if this was called before.
        """
        self._check_open()
        try:
            num_samples = operator.index(num_samples)
        except TypeError:
            raise TokensError(f"num_samples is {clip(repr(num_samples))}; pass a whole number.") from None
        if frames.num_frames(num_samples, self.metadata.samples_per_frame) != self.frames_written:
            raise TokensError(f"{num_samples} samples do not make {self.frames_written} frames.")
        self._section(struct.pack("<IQI", 0, num_samples, self._outline))
        self._ended = True

    def _check_open(self) -> None:
        if self._ended:
            raise TokensError("`finish` was called, which ends the file; write to another one.")


def _integers(tokens: Any) -> np.ndarray:
    """Return tokens as an array of integers.

    Raises:
        TokensError: if they are anything else, even if their values are whole.
    """
    if isinstance(tokens, np.ma.MaskedArray) and np.ma.is_masked(tokens):
        raise TokensError("tokens are a masked array with masked values; fill them first.")
    try:
        array = np.asarray(tokens)
    except Exception as error:  # whatever the conversion of another library raises, as for a tensor on a GPU
        raise TokensError(f"tokens are {clip(type(tokens).__name__)}, not a numpy array ({clip(error)}).") from error
    if not np.issubdtype(array.dtype, np.integer):
        raise TokensError(f"tokens are an array of {array.dtype}; pass integers.")
    return array


class TokenWriter(TokenStream):
    """Writes a token file aside and renames it into place when it is whole.

    Args:
        path: the file; missing folders are made.
        metadata: what the tokens are.
        overwrite: replace a file that exists.

    Raises:
        NemoLfrError: if the file exists and `overwrite` is not set.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Metadata, overwrite: bool = False) -> None:
        self.path = expand_home(path)
        refuse_overwrite(self.path, overwrite)
        self._finished = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._aside = open_aside(self.path)
        try:
            with naming(self.path):
                super().__init__(self._aside, metadata)
        except BaseException:
            with contextlib.suppress(OSError):  # of a full disk, again
                self._aside.close()
            os.unlink(self._aside.name)
            raise

    @classmethod
    def for_codec(cls, path: str | os.PathLike[str], codec: KnownCodec, overwrite: bool = False) -> "TokenWriter":
        return cls(path, Metadata.of(codec), overwrite)

    def __enter__(self) -> "TokenWriter":
        return self

    def write(self, tokens: np.ndarray) -> None:
        with naming(self.path):
            super().write(tokens)

    def finish(self, num_samples: int) -> None:
        with naming(self.path):
            super().finish(num_samples)
        self._finished = True

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        aside = Path(self._aside.name)
        try:
            with naming(self.path, aside):
                with self._aside as file:
                    file.flush()
                    os.fsync(file.fileno())
                if kind is None and not self._finished:
                    raise TokensError(f"{self.path}: `finish` was not called, so that the file is not whole.")
                if kind is None:
                    aside.replace(self.path)
        finally:
            aside.unlink(missing_ok=True)


class _Sections:
    """The sections of a token file, read one after the other and checked.

    Args:
        file: open for reading.
        name: for messages.

    Attributes:
        metadata: the header's.
        version: of the format.
    """

    def __init__(self, file: IO[bytes], name: str | os.PathLike[str]) -> None:
        self._file = file
        self.path = Path(name)
        self._header_is_sound = False
        self._outline = 0
        self.version, self.metadata = self._read_header()
        self._bytes_per_frame = self.metadata.bytes_per_frame
        self._header_is_sound = True

    def _fail(self, reason: str) -> TokenFileError:
        hint = " What is whole can be read with --recover (recover=True)." if self._header_is_sound else ""
        return TokenFileError(f"{self.path}: {reason}; the file is damaged or was cut short.{hint}")

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise self._fail("it ends too early")
        return data

    def _check(self, section: bytes, what: str, before: bytes = b"") -> bytes:
        """Read the CRC field of a section, which also covers `before`, and compare; returns the field."""
        return self._compare(self._take(4), section, what, before)

    def _compare(self, checksum: bytes, section: bytes, what: str, before: bytes) -> bytes:
        if checksum != struct.pack("<I", zlib.crc32(section, zlib.crc32(before))):
            raise self._fail(f"the checksum of {what} is wrong")
        return checksum

    def _read_header(self) -> tuple[int, Metadata]:
        head = self._file.read(5)
        if head[:4] != MAGIC:
            raise TokenFileError(f"{self.path}: not a .lfr token file.")
        if len(head) < 5:
            raise self._fail("it ends too early")
        version = head[4]
        if version not in READABLE_VERSIONS:
            raise TokenFileError(
                f"{self.path}: format version {version}; this nemo_lfr reads versions "
                f"{' and '.join(map(str, READABLE_VERSIONS))}; install a newer one."
            )
        head += self._take(4)
        length = int.from_bytes(head[5:], "little")
        coding = CODING
        if version > 1:
            coding, length = length >> 24, length & 0xFFFFFF
        if length > MAX_METADATA_BYTES:
            raise self._fail(f"its metadata claims {length} bytes")
        text = self._take(length)
        self._checksum = self._check(head + text, "the header")
        if coding != CODING:
            raise TokenFileError(
                f"{self.path}: its blocks have coding {coding}; this nemo_lfr reads coding {CODING}; "
                "install a newer one."
            )
        self._outline = zlib.crc32(self._checksum)
        try:
            return version, Metadata.from_json(text)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise TokenFileError(f"{self.path}: its metadata is invalid ({clip(error, 200)}).") from error

    def _read_count(self) -> int:
        """Frames of the section that begins here; 0 is the end's."""
        count: int = struct.unpack("<I", self._take(4))[0]
        if count > MAX_BLOCK_FRAMES:
            raise self._fail(f"a block claims {count} frames")
        return count

    def _read_tokens(self, count: int, first: int, before: bytes) -> tuple[np.ndarray, bytes]:
        """Read a block behind its count; see `_parse_tokens`."""
        body = self._take(count * self._bytes_per_frame)
        return self._parse_tokens(count, body, self._take(4), first, before)

    def _parse_tokens(
        self, count: int, packed: bytes, checksum: bytes, first: int, before: bytes
    ) -> tuple[np.ndarray, bytes]:
        """Check and unpack a block.

        Args:
            count: its frames.
            packed: its payload.
            checksum: its CRC field.
            first: its first frame, for messages.
            before: CRC field of the section in front of it.

        Returns:
            Tokens [C, count], and the block's CRC field, which agrees with them.
        """
        section = struct.pack("<I", count) + packed
        self._compare(checksum, section, f"the block at frame {first}", before if self.version > 1 else b"")
        meta = self.metadata
        try:
            return unpack(packed, meta.codebook_size, meta.num_codebooks, self._bytes_per_frame), checksum
        except TokensError as error:
            raise self._fail(str(error).rstrip(".")) from error

    def _pass_block(self, count: int, checksum: bytes) -> None:
        """Add a block to the outline."""
        self._checksum = checksum
        self._outline = zlib.crc32(struct.pack("<I", count) + checksum, self._outline)

    def _read_end(self, num_frames: int) -> int:
        """The samples that the end section tells, behind its zero."""
        rest = self._take(8 if self.version == 1 else 12)
        self._check(bytes(4) + rest, "the end")
        if self._file.read(1):
            raise self._fail("there are bytes after its end")
        if self.version > 1 and rest[8:] != struct.pack("<I", self._outline):
            raise self._fail("its blocks are not the ones that were written, or in another order")
        num_samples: int = struct.unpack("<Q", rest[:8])[0]
        if frames.num_frames(num_samples, self.metadata.samples_per_frame) != num_frames:
            raise self._fail(f"{num_samples} samples do not make its {num_frames} frames")
        return num_samples

    def check_codec(self, codec: KnownCodec) -> None:
        """Raise unless these tokens mean the same to `codec`.

        Raises:
            TokenFileError: if the layout or the weights differ.
        """
        mine: dict[str, Any] = asdict(self.metadata)
        theirs: dict[str, Any] = asdict(Metadata.of(codec))
        for name in ("sample_rate", "samples_per_frame", "levels", "num_codebooks", "fingerprint"):
            same = mine[name] == theirs[name] or (name == "fingerprint" and codec.made(mine[name]))
            if mine[name] and not same:
                raise TokenFileError(
                    f"{self.path}: made by a codec with {name} {mine[name]}, but {codec.name} has {theirs[name]}; "
                    "give the checkpoint that encoded it with --model."
                )


class TokenStreamReader(_Sections):
    """Reads a token file from first to last, as it comes through a pipe.

    Args:
        file: open for reading; nothing is sought in it.
        name: for messages.

    Attributes:
        num_samples: samples that were encoded, once `blocks` has come to the end.

    Raises:
        TokenFileError: as `TokenReader` does.
    """

    num_samples: int | None = None

    def blocks(self) -> Iterator[np.ndarray]:
        """Tokens [C, T] as int32, each block as it comes in."""
        num_frames = 0
        while count := self._read_count():
            tokens, checksum = self._read_tokens(count, num_frames, self._checksum)
            self._pass_block(count, checksum)
            yield tokens
            num_frames += count
        self.num_samples = self._read_end(num_frames)


class TokenReader(_Sections):
    """Reads a token file; every section is checked before it is used.

    Threads and forked processes may read from one object at the same time.

    Args:
        path: the file.
        recover: take what is whole of a file that was cut short or damaged, rather than refuse it.

    Attributes:
        metadata: the header's.
        version: of the format.
        num_frames: frames in the file, counted on opening.
        num_samples: samples that were encoded; of a recovered file, what its frames hold.
        complete: whether the end section was there.

    Raises:
        TokenFileError: naming the file, what is wrong with it, and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], recover: bool = False) -> None:
        path = expand_home(path)
        try:
            file = open_regular(path, TokenFileError)
        except OSError as error:
            raise TokenFileError(f"{path}: {error.strerror or error}.") from error
        try:
            super().__init__(file, path)
            self._lock = threading.Lock()
            # Where each block lies, and its first frame; as numbers, since a long live recording has millions.
            self._positions, self._firsts = array("Q"), array("Q", [0])
            self.complete = True
            try:
                self.num_samples = self._read_outline(check=recover)
            except TokenFileError:
                if not recover:
                    raise
                self.complete = False
                self.num_samples = self.num_frames * self.metadata.samples_per_frame
        except BaseException:
            file.close()
            raise

    @property
    def num_frames(self) -> int:
        return self._firsts[-1]

    def __enter__(self) -> "TokenReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_outline(self, check: bool) -> int:
        """Note where each block lies, on the way to the end section; returns the samples that it tells.

        Args:
            check: read the blocks themselves too, and stop at the first that is damaged or out of place.
        """
        position = self._file.tell()
        while count := self._read_count():
            if check:
                _, checksum = self._read_tokens(count, self.num_frames, self._checksum)
            else:
                self._file.seek(count * self._bytes_per_frame, os.SEEK_CUR)
                checksum = self._take(4)
            self._pass_block(count, checksum)
            self._positions.append(position)
            self._firsts.append(self.num_frames + count)
            position += 4 + count * self._bytes_per_frame + 4
        return self._read_end(self.num_frames)

    def _read_block(self, number: int) -> np.ndarray:
        """Tokens [C, T] of a block, its checksum verified."""
        first, count = self._firsts[number], self._firsts[number + 1] - self._firsts[number]
        # The CRC field of the section before, the count, the payload, the CRC field.
        data = self._read_at(self._positions[number] - 4, 4 + 4 + count * self._bytes_per_frame + 4)
        if data[4:8] != struct.pack("<I", count):
            raise self._fail(f"the block at frame {first} has changed since the file was opened")
        return self._parse_tokens(count, data[8:-4], data[-4:], first, data[:4])[0]

    def _read_at(self, position: int, size: int) -> bytes:
        """Read bytes without the file's position, which threads and forked processes share."""
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), size, position)
        else:
            with self._lock:
                self._file.seek(position)
                data = self._file.read(size)
        if len(data) != size:
            raise self._fail("it ends too early")
        return data

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Tokens [C, T] as int32 of frames [start, stop), block by block; only their blocks are read."""
        stop = self.num_frames if stop is None else stop
        for number in range(max(0, bisect_right(self._firsts, start) - 1), len(self._positions)):
            first = self._firsts[number]
            if first >= stop:
                return
            yield self._read_block(number)[:, max(0, start - first) : stop - first]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [C, T] of frames [start, stop): all of them if not given."""
        empty = np.empty((self.metadata.num_codebooks, 0), dtype=np.int32)
        return np.concatenate([empty, *self.blocks(start, stop)], axis=1)

    def samples_between(self, start: float, duration: float | None) -> tuple[int, int]:
        """Seconds to samples [first, last), cut at the end of the recording.

        Raises:
            TokenFileError: if there is nothing there.
        """
        for name, value in (("start", start), ("duration", duration)):
            if name == "duration" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TokenFileError(f"{self.path}: {name} is {clip(repr(value))}; pass a number of seconds.")
        rate = self.metadata.sample_rate
        seconds = self.num_samples / rate
        if not 0 <= start <= seconds or not (duration is None or 0 <= duration < math.inf):
            raise TokenFileError(
                f"{self.path}: start {start!r} and duration {duration!r} are not a part of its {seconds:.3f} s."
            )
        first = round(start * rate)
        last = self.num_samples
        if duration is not None:
            last = min(last, first + round(min(duration, seconds) * rate))
        return first, last
