"""Read tensors from safetensors files through the interface of `Tensors`, and write safetensors files.

A safetensors file consists of the length of a header (8 bytes, little-endian), the header, and the values of all
tensors. The header is a JSON object with the dtype, the shape and the byte range of each tensor. The format has no
checksum. When this package writes a file, it therefore adds entries to the header's metadata: the SHA-256 of the
values, the SHA-256 of the list of tensors and, for an exported codec, the config. These entries are verified when a
file is read. The `config.json` of an exported codec also contains the SHA-256 of the values, so weights from another
export are detected.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_lfr.checkpoint.names import plain_keys
from nemo_lfr.checkpoint.source import ByteSource, FileSource, file_state
from nemo_lfr.checkpoint.tensors import MAX_DIMENSIONS, MAX_PICKLE_BYTES, Entry, Tensors
from nemo_lfr.errors import CheckpointError, shorten
from nemo_lfr.io.atomic import replacing
from nemo_lfr.io.locate import SAFETENSORS_CONFIG
from nemo_lfr.io.regular import open_regular
from nemo_lfr.modules.weights import contiguous_values

LENGTH_BYTES = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CHECKSUM = "sha256_of_values"  # keys in the metadata of the header
LIST_CHECKSUM, CONFIG = "sha256_of_tensor_list", "config"
# Key in config.json. Its value is the CHECKSUM of the weights file, or a dict from each shard to its CHECKSUM.
WEIGHTS_CHECKSUM = "weights_sha256"
PIECE = 1 << 20  # bytes to read at a time for the checksum
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafeTensors(Tensors):
    """Tensors of a safetensors file by name, read one at a time.

    Args:
        path: path of the file, for messages.
        source: bytes of the file.

    Raises:
        CheckpointError: if `source` is damaged, is not a safetensors file, or contains no tensors.
    """

    def __init__(self, path: Path, source: ByteSource) -> None:
        self.path = path
        self.contents = None
        self._source = source
        self._buffer = torch.empty(0, dtype=torch.uint8)
        try:
            header = self._header()
            entries = [(name, self._entry(value)) for name, value in header.items() if name != "__metadata__"]
            self._check_layout([entry for _, entry in entries])
            metadata = header.pop("__metadata__", None)
            metadata = metadata if isinstance(metadata, dict) else {}
            self._check_values(metadata.get(CHECKSUM))
            self._values_checksum: str | None = metadata.get(CHECKSUM)
            if metadata.get(LIST_CHECKSUM, expected := _list_digest(header)) != expected:
                raise ValueError("the SHA-256 of its list of tensors differs from the one in its header")
            self.codec_config = dict(json.loads(metadata[CONFIG])) if CONFIG in metadata else None
        except CheckpointError:
            raise
        except Exception as error:  # wrong types and values in the header raise various exceptions
            reason = shorten(str(error) or type(error).__name__, 200)
            raise CheckpointError(
                f"{path}: the file is damaged, or not a safetensors file ({reason}); download it again."
            ) from error
        self._check_unchanged()
        if not entries:
            raise CheckpointError(f"{path}: the file contains no tensors; pass a file with the weights of a codec.")
        self.entries: Mapping[str, Entry] = plain_keys(entries, str(path))

    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self._bytes(0, LENGTH_BYTES), "little")
        if length > MAX_PICKLE_BYTES:
            raise ValueError(f"its header claims a size of {length} bytes; at most {MAX_PICKLE_BYTES} are allowed")
        self._begin = LENGTH_BYTES + length
        header = json.loads(self._bytes(LENGTH_BYTES, length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        return header

    def _check_layout(self, entries: list[Entry]) -> None:
        """Check that the tensors fill the file without gaps and do not overlap, as the format requires."""
        position = self._begin
        for entry in sorted(entries, key=lambda entry: (entry.offset, math.prod(entry.shape))):
            if entry.offset != position:
                raise ValueError(f"its tensors overlap or leave a gap at byte {min(entry.offset, position)}")
            position += math.prod(entry.shape) * entry.dtype.itemsize
        if position != self._source.size:
            raise ValueError(f"it has {self._source.size} bytes, but its header describes a file of {position} bytes")

    def _check_values(self, expected: Any) -> None:
        if expected is not None and self._hash_values() != expected:
            raise ValueError("the SHA-256 of its values differs from the one in its header")

    def checksum(self) -> str:
        """Return the SHA-256, in hex, of the values of all tensors in the order of the file."""
        if self._values_checksum is None:
            self._values_checksum = self._hash_values()
        return self._values_checksum

    def _hash_values(self) -> str:
        found, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
        for offset in range(self._begin, self._source.size, PIECE):
            piece = buffer[: min(PIECE, self._source.size - offset)]
            self._source.read_into(offset, piece)
            found.update(piece)
        return found.hexdigest()

    def _bytes(self, offset: int, size: int) -> bytes:
        if offset + size > self._source.size:
            raise ValueError(f"it has only {self._source.size} bytes, but its header needs {offset + size}")
        raw = bytearray(size)
        self._source.read_into(offset, memoryview(raw))
        return bytes(raw)

    def _entry(self, value: Any) -> Entry:
        dtype, shape, (first, end) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
        if not all(type(count) is int and 0 <= count < 1 << 62 for count in (first, end, *shape)):
            raise ValueError("a size or an offset of a tensor is not a whole number from 0 to 2**62 - 1")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
        if end - first != (size := math.prod(shape) * dtype.itemsize):
            raise ValueError(
                f"its header states {end - first} bytes for a {value['dtype']} tensor of shape {shorten(shape)}; "
                f"expected {size}"
            )
        if self._begin + end > self._source.size:
            raise ValueError(f"it has only {self._source.size} bytes, but its tensors need {self._begin + end}")
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return Entry("", dtype, self._begin + first, tuple(shape), stride)

    def _read_tensor(self, key: str, kept: bool) -> torch.Tensor:
        entry = self.entries[key]
        count = math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = torch.empty(count, dtype=entry.dtype) if kept else self._scratch(count * entry.dtype.itemsize)
        self._source.read_into(entry.offset, flat.view(torch.uint8).numpy().data)
        self._check_unchanged()
        return flat.view(entry.dtype).reshape(entry.shape)


class _Joined(Tensors):
    """Tensors of several safetensors files."""

    def __init__(self, files: Sequence[SafeTensors]) -> None:
        self.path = files[0].path.parent
        self.contents = None
        self._files = {key: file for file in files for key in file.entries}
        entries = [item for file in files for item in file.entries.items()]
        self.entries = plain_keys(entries, str(self.path))

    def checksum(self) -> dict[str, str]:
        """Return a dict from the name of each file to the SHA-256, in hex, of the values in this file."""
        return {file.path.name: file.checksum() for file in dict.fromkeys(self._files.values())}

    def names_of_files(self) -> dict[str, str]:
        """Return a dict from the name of each tensor to the name of its file."""
        return {key: file.path.name for key, file in self._files.items()}

    def _read_tensor(self, key: str, kept: bool) -> torch.Tensor:
        return self._files[key]._read_tensor(key, kept)


def open_files(paths: Sequence[Path]) -> Tensors:
    """Open safetensors files as one set of tensors.

    Raises:
        CheckpointError: if a file cannot be read or is damaged, or two files have a tensor of the same name.
    """
    files = [_open_file(path) for path in paths]
    return files[0] if len(files) == 1 else _Joined(files)


def open_shards(index: Path, shards: Mapping[str, str]) -> Tensors:
    """Open the safetensors files that an index lists.

    Args:
        index: path of the index, which is in the folder of the files.
        shards: a dict from the name of each tensor to the name of its file, as `read_index` returns.

    Raises:
        CheckpointError: if a file is missing, cannot be read or is damaged, or if its tensors are not those that
            `shards` lists for it.
    """
    paths = [index.with_name(name) for name in sorted(set(shards.values()))]
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file, but {index.name} lists it; download it again.")
    tensors = _Joined([_open_file(path) for path in paths])
    expected = plain_keys(shards.items(), str(index))
    stored = tensors.names_of_files()
    if different := sorted(key for key in {*stored, *expected} if stored.get(key) != expected.get(key)):
        key = different[0]
        raise CheckpointError(
            f"{index}: the tensor {shorten(key)} should be in {expected.get(key, 'no file')}, but is in "
            f"{stored.get(key, 'no file')}; download or save the folder again."
        )
    return tensors


def recorded_checksum(weights: Path) -> Any:
    """Return the SHA-256 that `config.json` in the same folder states for a weights file; None if it states none.

    If the weights are in several files, the result is a dict from file name to SHA-256.
    """
    try:
        return json.loads(weights.with_name(SAFETENSORS_CONFIG).read_text(encoding="utf-8")).get(WEIGHTS_CHECKSUM)
    except (OSError, ValueError, AttributeError):  # transformers has its own errors for such a config
        return None


def _open_file(path: Path) -> SafeTensors:
    try:
        with open_regular(path, CheckpointError) as file:
            state = file_state(file.fileno())
            return SafeTensors(path, FileSource(path, file, 0, state[0], state))
    except OSError as error:
        raise CheckpointError(
            f"{path}: the file cannot be opened ({error.strerror}); check the path and its permissions."
        ) from error


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> str:
    """Write a safetensors file atomically, with the tensors sorted by name.

    Args:
        path: output file.
        tensors: tensors by name, on any device.
        metadata: additional entries for the metadata of the header.
        overwrite: whether an existing file may be replaced.

    Returns:
        SHA-256 of the values of all tensors, in hex.

    Raises:
        OutputExistsError: if `path` exists and `overwrite` is not set.
        OSError: if the file cannot be written, for instance on a full disk; the error names `path`.
    """
    entries, offset = {}, 0
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    checksum = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        checksum.update(_values(tensor))
    # transformers requires the entry "format". Spaces after the header align the values to 8 bytes.
    details = {"format": "pt", CHECKSUM: checksum.hexdigest(), LIST_CHECKSUM: _list_digest(entries)}
    details |= dict(metadata or {})
    header = json.dumps({"__metadata__": details} | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    with replacing(path, overwrite) as file:
        file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        for _, tensor in sorted(tensors.items()):
            file.write(_values(tensor))
    return checksum.hexdigest()


def _list_digest(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _values(tensor: torch.Tensor) -> Any:
    return contiguous_values(tensor).cpu().flatten().view(torch.uint8).numpy().data
