"""Read tensors by name from a PyTorch zip file, without calling anything that its pickle names.

`torch.load(weights_only=True)` also prevents code execution, but an environment variable can disable this protection.
`torch.load` also reads every tensor in the file, and does not verify checksums.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_lfr.checkpoint.archive import ZIP_MAGIC
from nemo_lfr.checkpoint.lightning import Inert, InertNamespace
from nemo_lfr.checkpoint.names import plain_keys
from nemo_lfr.checkpoint.source import ByteSource
from nemo_lfr.errors import CheckpointError, shorten
from nemo_lfr.io.locate import WEIGHTS_MEMBER
from nemo_lfr.io.seekable import SeekableBytes

# Limits against malicious files. NVIDIA's released checkpoint has 700 tensors and a pickle of 80 kB, 20,000 opcodes.
MAX_PICKLE_BYTES = 4 << 20
MAX_PICKLE_OPCODES = 400_000
MAX_DIRECTORY_BYTES = 2 << 20
MAX_DIMENSIONS = 16
SINGLE = "the tensor"  # name of the tensor in a file that contains one tensor instead of a state dict

_PIECE = 1 << 20  # bytes to read at a time, few enough that they are still in the CPU cache for the checksum
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of name and extra field

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

# Opcodes that `torch.save` writes for state dicts. Others are refused: some create an object of
# 200 bytes from a single byte.
_OPCODES = frozenset(
    """PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID EMPTY_DICT EMPTY_LIST EMPTY_TUPLE SETITEM SETITEMS APPEND APPENDS
    TUPLE TUPLE1 TUPLE2 TUPLE3 BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT NEWTRUE NEWFALSE NONE BINPUT
    LONG_BINPUT BINGET LONG_BINGET""".split()  # noqa: SIM905  a list of 30 strings reads worse
)
_TRAINING_OPCODES = _OPCODES | {"NEWOBJ"}


@dataclass(frozen=True)
class Entry:
    """Position, dtype, shape and stride of a tensor in the file.

    Attributes:
        record: name of the zip record; empty in a safetensors file.
        dtype: dtype of the stored values.
        offset: position of the first value, in values from the start of the zip record. In a safetensors file, it is
            in bytes from the start of the file.
        shape: size of each dimension.
        stride: distance between neighbors along each dimension, in values.
        negative: whether the sign of each stored value must be flipped (PyTorch's negative bit).
    """

    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    negative: bool = False


class _RebuildTensor:
    # A class without attributes instead of a function: the pickle opcode BUILD could replace a function's defaults.
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *others: Any) -> Entry:
        record, dtype = storage
        sizes = tuple(shape), tuple(stride)
        counts = [offset, *sizes[0], *sizes[1]]
        if not all(type(count) is int and 0 <= count < 1 << 62 for count in counts):
            raise pickle.UnpicklingError("a tensor's offset, shape or strides are not valid integers")
        if len(sizes[0]) != len(sizes[1]) or len(sizes[0]) > MAX_DIMENSIONS:
            raise pickle.UnpicklingError("a tensor's shape and strides disagree")
        # The last argument of `_rebuild_tensor_v2`, if there are seven, contains PyTorch's negative bit.
        metadata = others[2] if len(others) > 2 else None
        negative = isinstance(metadata, dict) and bool(dict.get(metadata, "neg")) and dtype != torch.bool
        return Entry(record, dtype, offset, *sizes, negative)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): dtype for name, dtype in _STORAGE_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that creates only dictionaries and tensor entries.

    In the pickle of a `.nemo`, any other class is an error. In a training checkpoint, each object of another class is
    replaced by an `Inert` placeholder.
    """

    def __init__(self, raw: bytes, training: bool) -> None:
        super().__init__(io.BytesIO(raw))
        self._training = training

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class by name.

        For any other name, return `Inert` in a training checkpoint, and raise UnpicklingError in other files.
        """
        if (module, name) not in _NAMES:
            if self._training:
                return InertNamespace if (module, name) == ("argparse", "Namespace") else Inert
            raise pickle.UnpicklingError(
                f"its pickle names {shorten(module)}.{shorten(name)}, which is not allowed in a state dict"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Return the name of the record that contains a storage, and the storage's dtype."""
        kind, dtype, record, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(record, str):
            raise pickle.UnpicklingError("its pickle refers to an object that is not a tensor's storage")
        return record, dtype


def _unpickle(raw: bytes, training: bool) -> Any:
    allowed = _TRAINING_OPCODES if training else _OPCODES
    for count, (opcode, argument, _) in enumerate(pickletools.genops(raw), start=1):
        if opcode.name not in allowed:
            raise pickle.UnpicklingError(f"its pickle uses {opcode.name}, which is not allowed in a state dict")
        if count > MAX_PICKLE_OPCODES:
            raise pickle.UnpicklingError(f"its pickle has more than {MAX_PICKLE_OPCODES} opcodes")
        # The unpickler allocates memory for all memo indexes up to the largest one.
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > count:
            raise pickle.UnpicklingError(f"its pickle uses the memo index {argument} after only {count} opcodes")
    return _Unpickler(raw, training).load()


class Tensors:
    """Tensors of a checkpoint by name, read one at a time.

    Args:
        path: path of the checkpoint, for messages.
        source: bytes of `model_weights.ckpt`, of a training checkpoint, or of another file that `torch.save` wrote.
        training: whether `source` is a training checkpoint.
        single: whether `source` contains one tensor instead of a state dict. The tensor then has the name `SINGLE`.

    Attributes:
        entries: a dict from the name of each tensor to its position, dtype and shape.
        contents: the unpickled object, which contains an `Entry` in place of each tensor.
        codec_config: the part of the codec's config that inference depends on, as stored in the file. None if the
            file does not store a config.

    Raises:
        CheckpointError: if `source` is not a PyTorch zip file with a state dict (or with one tensor if `single` is
            set), or is damaged or unsafe.
    """

    codec_config: dict[str, Any] | None = None

    def __init__(self, path: Path, source: ByteSource, training: bool = False, *, single: bool = False) -> None:
        is_file = training or single
        what = f"{path}: the file" if is_file else f"{path}: {WEIGHTS_MEMBER}"
        head = bytearray(min(4, source.size))
        source.read_into(0, memoryview(head))
        if head != ZIP_MAGIC:
            raise CheckpointError(
                f"{what} is not a PyTorch zip file; it is damaged, or it is a bare pickle (the format before "
                "PyTorch 1.6). Reading such a pickle could run code. If you trust it, save it again with torch.save."
            )
        self.path = path
        self._source = source
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._verified: set[str] = set()  # records with the right checksum
        try:
            archive = zipfile.ZipFile(_SourceFile(source))
            self._records = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in self._records if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise zipfile.BadZipFile("it is not a PyTorch archive with one data.pkl")
            if len(self._records) != len(archive.infolist()):
                raise zipfile.BadZipFile("it contains two records of the same name")
            # PyTorch writes no checksums after a call of `torch.serialization.set_crc32_options(False)`.
            self._has_checksums = any(info.CRC for info in self._records.values() if info.file_size)
            self._root = pickles[0].removesuffix("data.pkl")
            if self._records[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise zipfile.BadZipFile(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
            raw = bytearray(self._records[pickles[0]].file_size)
            self._read_record(pickles[0], 0, memoryview(raw))
            self._check_byte_order()
            self.contents = state = _unpickle(bytes(raw), training)
        except CheckpointError:
            raise
        except Exception as error:  # a malicious pickle can make the unpickler raise any exception
            self._check_unchanged(error)
            reason = shorten(str(error) or type(error).__name__, 200)
            raise CheckpointError(f"{what} is damaged or unsafe ({reason}); download it again.") from error
        self._check_unchanged()
        if single and not isinstance(state, Entry):
            raise CheckpointError(f"{what} contains no tensor; save one tensor with torch.save.")
        if single:
            state = {SINGLE: state}
        # Call the methods of `dict` itself: a pickle may have replaced those of the instance.
        if isinstance(state, dict) and isinstance(dict.get(state, "state_dict"), dict):
            state = dict.get(state, "state_dict")
        if not isinstance(state, dict) or not state:
            raise CheckpointError(f"{what} contains no state dict; pass the checkpoint of a codec.")
        items = dict.items(state)
        entries = [(key, value) for key, value in items if isinstance(key, str) and isinstance(value, Entry)]
        self.entries: Mapping[str, Entry] = plain_keys(entries, str(path) if is_file else what)

    def checksum(self) -> str | dict[str, str] | None:
        """Return None; only subclasses for safetensors files return checksums.

        For one file, the checksum is the SHA-256 of the values of all tensors. For several files, the result is a dict
        from each file name to the SHA-256 of the values in this file.
        """
        return None

    def __getitem__(self, key: str) -> torch.Tensor:
        """Read one tensor into new memory and verify its checksum.

        Raises:
            CheckpointError: if the tensor is damaged, or the file has changed since it was opened.
        """
        return self._read_tensor(key, kept=True)

    def temporary(self, key: str) -> torch.Tensor:
        """Read one tensor into a buffer that the next call overwrites."""
        return self._read_tensor(key, kept=False)

    def _read_tensor(self, key: str, kept: bool) -> torch.Tensor:
        entry = self.entries[key]
        name = f"{self._root}data/{entry.record}"
        item = entry.dtype.itemsize
        available = min(self._records[name].file_size, self._source.size) // item if name in self._records else 0
        numel = math.prod(entry.shape)
        if not numel:
            return torch.empty(entry.shape, dtype=entry.dtype)
        last = entry.offset + sum((size - 1) * step for size, step in zip(entry.shape, entry.stride, strict=True))
        if name in self._records and last < available < numel:
            raise CheckpointError(
                f"{self.path}: {shorten(key)} has shape {list(entry.shape)}, but only {available} values are stored, "
                "because it was expanded; save the checkpoint again with tensor.contiguous() for this tensor."
            )
        if name in self._records and (last >= available or numel > available):
            raise CheckpointError(
                f"{self.path}: {shorten(key)} has shape {list(entry.shape)}, but its record contains {available} "
                "values; download the file again."
            )
        # Read from the first to the last value of the tensor only: other tensors may share its record.
        count = last + 1 - entry.offset
        flat = torch.empty(count, dtype=entry.dtype) if kept else self._scratch(count * item).view(entry.dtype)
        try:
            self._read_record(name, entry.offset * item, flat.view(torch.uint8).numpy().data)
        except Exception as error:
            if isinstance(error, CheckpointError):
                raise
            self._check_unchanged(error)
            reason = shorten(str(error) or type(error).__name__, 200)
            raise CheckpointError(
                f"{self.path}: the values of {shorten(key)} are damaged ({reason}); download it again."
            ) from error
        tensor = flat.as_strided(entry.shape, entry.stride)
        if entry.negative:
            return tensor.neg()
        return tensor if numel == len(flat) else tensor.clone()

    def _check_byte_order(self) -> None:
        name = f"{self._root}byteorder"  # absent in files from before PyTorch 2.1
        size = self._records[name].file_size if name in self._records else 0
        if 0 < size <= len("little"):
            raw = bytearray(size)
            self._read_record(name, 0, memoryview(raw))
            if raw == b"big":
                raise CheckpointError(
                    f"{self.path}: its values have the byte order of a big-endian computer; save it again on a "
                    "little-endian one."
                )

    def _scratch(self, num_bytes: int) -> torch.Tensor:
        if len(self._buffer) < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffer[:num_bytes]

    def _check_unchanged(self, cause: Exception | None = None) -> None:
        if self._source.changed():
            raise CheckpointError(f"{self.path}: the file was changed while it was open; load it again.") from cause

    def _read_record(self, name: str, begin: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes of a stored record from `begin`, and verify the whole record's checksum.

        Nothing is verified if the file contains no checksums, or for a part of a record that was verified before.
        """
        if name not in self._records:
            raise zipfile.BadZipFile(f"record {name} is missing")
        info = self._records[name]
        place = info.header_offset
        header = self._read(place, _LOCAL_HEADER.size + len(info.orig_filename.encode()))
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
        if signature != ZIP_MAGIC or header[_LOCAL_HEADER.size :][:name_length] != info.orig_filename.encode():
            raise zipfile.BadZipFile(f"the header of record {name} differs from the zip directory")
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not stored or info.flag_bits & 0x1:
            raise zipfile.BadZipFile(f"record {name} is compressed or encrypted; PyTorch writes neither")
        place += _LOCAL_HEADER.size + name_length + extra_length
        if place + info.file_size > self._source.size:
            raise zipfile.BadZipFile(f"record {name} extends beyond the end of the file")
        is_part = len(buffer) < info.file_size
        if not self._has_checksums or (is_part and name in self._verified):
            self._source.read_into(place + begin, buffer)
            self._check_unchanged()
            return
        checksum = self._checksum(place, begin)
        for offset in range(0, len(buffer), _PIECE):
            piece = buffer[offset : offset + _PIECE]
            self._source.read_into(place + begin + offset, piece)
            checksum = zlib.crc32(piece, checksum)
        end = begin + len(buffer)
        if self._checksum(place + end, info.file_size - end, checksum) != info.CRC:
            raise zipfile.BadZipFile(f"wrong checksum of record {name}")
        if is_part:
            self._check_unchanged()
            self._verified.add(name)

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size > self._source.size:
            raise zipfile.BadZipFile("a record begins beyond the end of the file")
        raw = bytearray(size)
        self._source.read_into(offset, memoryview(raw))
        return bytes(raw)

    def _checksum(self, offset: int, size: int, checksum: int = 0) -> int:
        """Return the CRC-32 of `size` bytes of the source from `offset` on. `checksum` is that of earlier bytes."""
        scratch = memoryview(bytearray(min(size, _PIECE)))
        for done in range(0, size, _PIECE):
            piece = scratch[: size - done]
            self._source.read_into(offset + done, piece)
            checksum = zlib.crc32(piece, checksum)
        return checksum


class _SourceFile(SeekableBytes):
    """File object through which `zipfile` reads a byte source. A read of more than MAX_DIRECTORY_BYTES is an error."""

    def __init__(self, source: ByteSource) -> None:
        super().__init__(source.size)
        self._source = source

    def read(self, size: int = -1) -> bytes:
        remaining = max(0, self._length - self._position)
        size = remaining if size < 0 else min(size, remaining)
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its zip directory is larger than {MAX_DIRECTORY_BYTES} bytes")
        raw = bytearray(size)
        self._source.read_into(self._position, memoryview(raw))
        self._position += size
        return bytes(raw)
