"""Find the config and the weights in a `.nemo` tar archive without extracting it."""

import bz2
import contextlib
import gzip
import itertools
import json
import lzma
import os
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, cast

from nemo_lfr.checkpoint.source import ByteSource, FileSource, MemorySource, file_state
from nemo_lfr.errors import CheckpointError, quoted
from nemo_lfr.io.locate import (
    CONFIG_MEMBER,
    FOLDERS,
    SAFETENSORS,
    SAFETENSORS_CONFIG,
    SAFETENSORS_INDEX,
    SHARDS,
    WEIGHTS_MEMBER,
    folder_files,
)
from nemo_lfr.io.regular import open_regular

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # PyTorch's magic number as a pickle
# Limits against malicious archives. NVIDIA's released checkpoint has 7 kB of config and 620 MB of weights.
MAX_MEMBERS = 64
MAX_SHARDS = 10_000
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 8 << 30
MAX_READ = 4 << 20
# Weights hardly compress, so an archive that expands by more than this factor is treated as a decompression bomb.
MAX_EXPANSION = 20

_DECOMPRESSORS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


@dataclass(frozen=True)
class Members:
    """Config and weights of a checkpoint.

    Attributes:
        config: text of the config; None for a training checkpoint, in which the config is a pickled object.
        weights: file or member with the weights; for a training checkpoint, the whole file. If the weights are in
            several safetensors files, a dict from the name of each tensor to the name of its file.
        is_safetensors: whether the checkpoint is a folder with `config.json` and one or more safetensors files.
    """

    config: bytes | None
    weights: ByteSource | dict[str, str]
    is_safetensors: bool = False

    @property
    def config_name(self) -> str:
        """Name of the config file for messages; "the config" for a training checkpoint, which has no such file."""
        if self.is_safetensors:
            return SAFETENSORS_CONFIG
        return "the config" if self.config is None else CONFIG_MEMBER


def read_members(path: Path) -> Members:
    """Find the config and the weights of a checkpoint.

    Weights in an uncompressed tar archive are read only when they are used.

    Args:
        path: a `.nemo` file, a `.ckpt` file, or a folder. A folder contains the files of an unpacked `.nemo`, or
            `config.json` and safetensors files.

    Raises:
        CheckpointError: if the file is missing, damaged or not a checkpoint.
    """
    with _damage_named(path):
        if path.is_dir():
            return _read_folder(path)
        with open_regular(path, CheckpointError) as file:
            return _read_members(path, file)


def unpack_files(path: Path, names: Collection[str], folder: Path) -> None:
    """Extract files from the top level of a `.nemo` archive.

    Names that contain a folder, or that the archive does not contain, are ignored.

    Args:
        path: a `.nemo` file. From a `.ckpt` file, nothing is extracted.
        names: names of the files.
        folder: folder to write the files to.

    Raises:
        CheckpointError: if the archive is damaged.
    """
    wanted = set(filter(is_plain_name, names))
    with _damage_named(path), open_regular(path, CheckpointError) as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            return
        stream, _ = _open_stream(file)
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as archive:
            for member in itertools.islice(archive, MAX_MEMBERS):
                name = member.name.removeprefix("./")
                if name in wanted and member.isreg() and not member.issparse():
                    wanted.remove(name)
                    with open(folder / name, "xb") as target:
                        target.writelines(_pieces(stream, member))


def is_plain_name(name: str) -> bool:
    """Return whether a name, joined to the path of a folder, is a path directly in this folder."""
    return name == os.path.basename(name) and name not in ("", ".", "..") and not {"\\", "\0"} & set(name)


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Convert the errors of reading a damaged or missing checkpoint to CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except PermissionError:
        raise CheckpointError(f"{path}: permission denied; make the file readable.") from None
    except Exception as error:  # damaged headers make tarfile and the decompressors fail in many ways
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path}: the file is damaged or not a .nemo archive ({reason}); download it again."
        ) from error


def _read_folder(folder: Path) -> Members:
    """Return the config and the weights in a folder: an unpacked `.nemo`, or `config.json` and safetensors files."""
    names = folder_files(os.listdir(folder)) or FOLDERS[0]
    config, weights = (folder / name for name in names)
    for name in names:
        if not os.path.exists(folder / name):
            raise CheckpointError(f"{folder}: the folder has no {name}; pass a .nemo or .ckpt file.")
    text = _read_text(config)
    if weights.name == SAFETENSORS_INDEX:
        return Members(text, read_index(weights), is_safetensors=True)
    with open_regular(weights, CheckpointError) as file:
        state = file_state(file.fileno())
        if not state[0]:
            raise CheckpointError(f"{weights}: the file is empty; download it again.")
        return Members(text, FileSource(weights, file, 0, state[0], state), is_safetensors=weights.name == SAFETENSORS)


def _read_text(path: Path) -> bytes:
    with open_regular(path, CheckpointError) as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{path}: the file is larger than {MAX_CONFIG_BYTES} bytes, the limit for a config; check the path."
        )
    return text


def read_index(index: Path, pattern: str = SHARDS) -> dict[str, str]:
    """Return a dict from the name of each tensor to the name of its safetensors file, read from an index file.

    Args:
        index: path of `model.safetensors.index.json`, the index that transformers writes.
        pattern: glob pattern of the file names, such as "model-*-of-*.safetensors".

    Raises:
        CheckpointError: if the file is not a valid index; see `check_shards`.
    """
    text = _read_text(index)
    try:
        shards = json.loads(text)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: the file is not an index of safetensors files; download it again.") from error
    return check_shards(index, shards, pattern)


def check_shards(index: Path, shards: Any, pattern: str = SHARDS) -> dict[str, str]:
    """Check the `weight_map` of an index file, and return it: a dict from tensor names to file names.

    Args:
        index: path of the index, for messages.
        shards: value to check.
        pattern: glob pattern of the file names, such as "model-*-of-*.safetensors".

    Raises:
        CheckpointError: if `shards` is not a dict, lists no files or more than MAX_SHARDS, or lists a file that is in
            another folder or does not match `pattern`.
    """
    try:
        names = set(shards.values())
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: the file is not an index of safetensors files; download it again.") from error
    for name in names:
        # A path would lead out of the folder.
        if not isinstance(name, str) or not fnmatchcase(name, pattern) or not is_plain_name(name):
            raise CheckpointError(
                f"{index}: the file lists {quoted(name)}, but the weights must be in files of the same folder, with "
                f"names like {pattern}; save the model again."
            )
    if not names or len(names) > MAX_SHARDS:
        raise CheckpointError(f"{index}: the file lists {len(names)} files; from 1 to {MAX_SHARDS} are allowed.")
    return dict(shards)


def _read_members(path: Path, file: IO[bytes]) -> Members:
    state = file_state(file.fileno())
    size, _ = state
    head = file.read(64)
    file.seek(0)
    if not head:
        raise CheckpointError(f"{path}: the file is empty; download it again.")
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path}: this is a web page, not a checkpoint; download the file itself.")
    if head.startswith(ZIP_MAGIC):
        return Members(None, FileSource(path, file, 0, size, state))
    if head.startswith(LEGACY_MAGIC):
        raise CheckpointError(
            f"{path}: this is a bare pickle, the format before PyTorch 1.6, and reading it could run code; if you "
            "trust it, load it with PyTorch and save it again."
        )
    stream, is_compressed = _open_stream(file)
    found = _find_members(path, stream)
    config = _contents(stream, found[CONFIG_MEMBER])
    weights = found[WEIGHTS_MEMBER]
    if is_compressed:
        return Members(bytes(config), MemorySource(_contents(stream, weights)))
    begin, end = weights.offset_data, weights.offset_data + weights.size
    if end > size:
        raise EOFError(f"{WEIGHTS_MEMBER} ends after {max(0, size - begin)} of {weights.size} bytes")
    return Members(bytes(config), FileSource(path, file, begin, weights.size, state))


def _open_stream(file: IO[bytes]) -> tuple["_Bounded", bool]:
    """Return the tar archive in a file, and whether the file is compressed."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(8)
    file.seek(0)
    for magic, unpack in _DECOMPRESSORS.items():
        if head.startswith(magic):
            return _Bounded(unpack(file), (64 << 20) + MAX_EXPANSION * size), True
    return _Bounded(file, None), False


def _find_members(path: Path, stream: "_Bounded") -> dict[str, tarfile.TarInfo]:
    found: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as archive:
        for count, member in enumerate(archive, start=1):
            if count > MAX_MEMBERS:
                raise CheckpointError(
                    f"{path}: the archive has more than {MAX_MEMBERS} members, so this is not a .nemo checkpoint; "
                    "pass a .nemo file."
                )
            name = member.name.removeprefix("./")
            if name not in (CONFIG_MEMBER, WEIGHTS_MEMBER):
                continue
            if name in found:
                raise CheckpointError(f"{path}: {name} occurs twice in the archive; remove one of them.")
            if not member.isreg() or member.issparse():
                raise CheckpointError(f"{path}: {name} is not a regular file in the archive; download it again.")
            limit = MAX_CONFIG_BYTES if name == CONFIG_MEMBER else MAX_WEIGHTS_BYTES
            if not 0 <= member.size <= limit:
                raise CheckpointError(
                    f"{path}: {name} claims a size of {member.size} bytes, but at most {limit} are allowed; download "
                    "the file again."
                )
            found[name] = member
    for name in (CONFIG_MEMBER, WEIGHTS_MEMBER):
        if name not in found:
            raise CheckpointError(
                f"{path}: no {name} in the archive, so this is not a .nemo checkpoint; pass a .nemo file."
            )
    return found


def _contents(stream: "_Bounded", member: tarfile.TarInfo) -> bytearray:
    contents = bytearray()
    for piece in _pieces(stream, member):
        contents += piece
    return contents


def _pieces(stream: "_Bounded", member: tarfile.TarInfo) -> Iterator[bytes]:
    """Yield the content of a member in pieces of at most 1 MiB."""
    stream.seek(member.offset_data)
    count = 0
    while count < member.size:
        piece = stream.read(min(1 << 20, member.size - count))
        if not piece:
            raise EOFError(f"{member.name} ends after {count} of {member.size} bytes")
        count += len(piece)
        yield piece


class _Bounded:
    """File wrapper that limits the size of each read and the position in the file.

    The limits protect against false sizes in headers and against decompression bombs.
    """

    def __init__(self, file: Any, limit: int | None) -> None:
        self._file = file
        self._limit = limit

    def tell(self) -> int:
        """Return the position."""
        return int(self._file.tell())

    def seek(self, offset: int) -> None:
        """Set the position."""
        self._check_limit(offset)
        self._file.seek(offset)

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        if not 0 <= size <= MAX_READ:
            raise tarfile.ReadError(f"a header claims a size of {size} bytes; at most {MAX_READ} are allowed")
        self._check_limit(self.tell() + size)
        return bytes(self._file.read(size))

    def _check_limit(self, position: int) -> None:
        if self._limit is not None and position > self._limit:
            raise tarfile.ReadError(f"it unpacks to more than {self._limit} bytes, the limit for its compressed size")
