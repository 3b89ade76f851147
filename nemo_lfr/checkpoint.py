"""`.nemo` files in and out: NeMo's names and our classes, read in place, never executed.

A `.nemo` is a tar of `model_config.yaml` and `model_weights.ckpt`; the latter is a zip that holds a pickle of names
and one record of raw numbers per tensor. `read_checkpoint` reads those members where they lie, runs a pickle
interpreter that knows tensors and dictionaries and nothing else, and loads only the parts that it is asked for; a
wrong byte in what it loads is found by the zip's checksums. A plain tar is memory-mapped, so that a gigabyte of
discriminators beside the codec costs nothing.
"""

import contextlib
import io
import lzma
import math
import mmap
import os
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from nemo_lfr.codec.decoder import HiFiGANDecoder
from nemo_lfr.codec.encoder import HiFiGANEncoder
from nemo_lfr.codec.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from nemo_lfr.errors import CheckpointError, ConfigError

CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
# Bounds on what a stranger's file may make us read. The released file has 7 kB of config and 620 MB of weights.
MAX_CONFIG_BYTES = 1 << 20
MAX_PICKLE_BYTES = 64 << 20
MAX_WEIGHTS_BYTES = 8 << 30
MAX_COMPRESSED_WEIGHTS_BYTES = 2 << 30  # unpacked into memory
MAX_MEMBERS = 64

PARTS = ("audio_encoder", "vector_quantizer", "audio_decoder")
NEMO_MODEL = "nemo.collections.tts.models.audio_codec.AudioCodecModel"
_NEMO_MODULES = "nemo.collections.tts.modules.audio_codec_modules."

# NeMo's class -> (ours, what NeMo's name means beyond ours, defaults that differ from ours).
NEMO_CLASSES: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any]]] = {
    _NEMO_MODULES + "HiFiGANEncoder": (HiFiGANEncoder, {}, {}),
    _NEMO_MODULES + "CausalHiFiGANEncoder": (HiFiGANEncoder, {"causal": True}, {"pad_mode": "zeros"}),
    _NEMO_MODULES + "HiFiGANDecoder": (HiFiGANDecoder, {}, {}),
    _NEMO_MODULES + "CausalHiFiGANDecoder": (
        HiFiGANDecoder,
        {"causal": True},
        {"pad_mode": "zeros", "n_groups_equal_to_out_channels": True},
    ),
    _NEMO_MODULES + "FiniteScalarQuantizer": (FiniteScalarQuantizer, {}, {}),
    _NEMO_MODULES + "GroupFiniteScalarQuantizer": (GroupFiniteScalarQuantizer, {}, {}),
}
_OUR_CLASSES = {f"{ours.__module__}.{ours.__name__}": ours for ours, _, _ in NEMO_CLASSES.values()}


@dataclass
class Parts:
    """The three modules of a codec, and what its config says of the audio."""

    encoder: HiFiGANEncoder
    quantizer: FiniteScalarQuantizer | GroupFiniteScalarQuantizer
    decoder: HiFiGANDecoder
    sample_rate: int

    def named(self) -> dict[str, nn.Module]:
        """The modules under their names in a checkpoint."""
        return dict(zip(PARTS, (self.encoder, self.quantizer, self.decoder), strict=True))


# --- config -> modules


def our_target(target: str) -> tuple[type[nn.Module], dict[str, Any], dict[str, Any]]:
    """Our class for a config's `_target_`, the keywords it implies, and its own defaults.

    Raises:
        ConfigError: if the name is not one of this codec family's.
    """
    if target in NEMO_CLASSES:
        return NEMO_CLASSES[target]
    if target in _OUR_CLASSES:
        return _OUR_CLASSES[target], {}, {}
    known = ", ".join(sorted(name.rpartition(".")[2] for name in NEMO_CLASSES))
    raise ConfigError(f"_target_ {target!r} is not part of this codec family; known: {known}.")


def nemo_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of one part's config under NeMo's class name, so that a NeMo without this package can build it."""
    config = dict(config)
    target = str(config["_target_"])
    if target in NEMO_CLASSES:
        return config
    ours, _, _ = our_target(target)
    causal = bool(config.pop("causal", False))
    for name, (candidate, implied, _) in NEMO_CLASSES.items():
        if candidate is ours and implied.get("causal", False) == causal:
            config["_target_"] = name
            return config
    raise ConfigError(f"{target} has no counterpart in NeMo.")


def build_part(config: Mapping[str, Any], *, weight_norm: bool = True) -> nn.Module:
    """Build the encoder, quantizer or decoder that one section of a model config describes.

    Args:
        config: `_target_` (NeMo's name or ours) and the constructor's arguments.
        weight_norm: False builds plain weights, for inference.

    Raises:
        ConfigError: for an unknown name or argument, or a value of the wrong type.
    """
    arguments = {key: value for key, value in config.items() if not str(key).startswith("_")}
    ours, implied, defaults = our_target(str(config.get("_target_", "")))
    if ours in (HiFiGANEncoder, HiFiGANDecoder):
        implied = implied | {"weight_norm": weight_norm}
    arguments = defaults | arguments | implied
    _check_sizes(arguments)
    try:
        return ours(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"{ours.__name__} cannot be built from {arguments}: {error}") from error


def _check_sizes(arguments: Mapping[str, Any]) -> None:
    """Refuse sizes that would make a constructor allocate without bound."""
    for key, value in arguments.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int | float) and not isinstance(item, bool) and not 0 <= item <= 16384:
                raise ConfigError(f"{key} {value!r} is out of range; numbers must lie between 0 and 16384.")


def build_parts(config: Mapping[str, Any], *, weight_norm: bool = True) -> Parts:
    """Build the three parts of a model config and check that they fit together.

    Raises:
        ConfigError: naming the key, what it holds and what it must agree with.
    """
    for key in ("sample_rate", "samples_per_frame", *PARTS):
        if config.get(key) is None:
            raise ConfigError(f"the config has no {key!r}; it is not a codec of this family.")
    sections = {}
    for name in PARTS:
        try:
            sections[name] = build_part(config[name], weight_norm=weight_norm)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    encoder, quantizer, decoder = (sections[name] for name in PARTS)
    if not (
        isinstance(encoder, HiFiGANEncoder)
        and isinstance(quantizer, FiniteScalarQuantizer | GroupFiniteScalarQuantizer)
        and isinstance(decoder, HiFiGANDecoder)
    ):
        raise ConfigError(f"the parts {list(PARTS)} are {[type(part).__name__ for part in sections.values()]}.")
    sample_rate, samples_per_frame = config["sample_rate"], config["samples_per_frame"]
    if not isinstance(sample_rate, int) or not 1000 <= sample_rate <= 192_000:
        raise ConfigError(f"sample_rate {sample_rate!r} is not a rate in Hz between 1000 and 192000.")
    if config.get("output_sample_rate", sample_rate) != sample_rate:
        raise ConfigError("codecs whose output_sample_rate differs from sample_rate are not supported.")
    for part in (encoder, decoder):
        if part.samples_per_frame != samples_per_frame:
            raise ConfigError(
                f"the rates of {type(part).__name__} multiply to {part.samples_per_frame}, but samples_per_frame is "
                f"{samples_per_frame}; make the two agree."
            )
    if encoder.encoded_dim != quantizer.codebook_dim:
        raise ConfigError(f"encoded_dim {encoder.encoded_dim} differs from the quantizer's {quantizer.codebook_dim}.")
    return Parts(encoder, quantizer, decoder, sample_rate)


# --- the tar


@dataclass
class _Members:
    config: bytes
    weights: memoryview


@contextlib.contextmanager
def _open_members(path: Path) -> Iterator[_Members]:
    """The two members of a `.nemo`, read in place; other members are not looked at."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            head = file.read(64)
            if head.startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{path}: this is a Git LFS pointer, not the file itself; run `git lfs pull`.")
            if head.lstrip().startswith(b"<"):
                raise CheckpointError(f"{path}: this is a web page, not a checkpoint; download the file itself.")
            file.seek(0)
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:*"))
            found: dict[str, tarfile.TarInfo] = {}
            for count, member in enumerate(archive, start=1):
                if count > MAX_MEMBERS:
                    raise CheckpointError(f"{path}: more than {MAX_MEMBERS} members; a .nemo has two.")
                name = member.name.removeprefix("./")
                if name not in (CONFIG_MEMBER, WEIGHTS_MEMBER):
                    continue
                if name in found:
                    raise CheckpointError(f"{path}: {name} is there twice; which one is meant cannot be known.")
                if not member.isreg() or member.issparse():
                    raise CheckpointError(f"{path}: {name} is not a plain file.")
                plain = archive.fileobj is file
                most = MAX_WEIGHTS_BYTES if plain else MAX_COMPRESSED_WEIGHTS_BYTES
                limit = MAX_CONFIG_BYTES if name == CONFIG_MEMBER else most
                if member.size > limit:
                    raise CheckpointError(f"{path}: {name} claims {member.size} bytes, more than {limit}.")
                found[name] = member
            for name in (CONFIG_MEMBER, WEIGHTS_MEMBER):
                if name not in found:
                    raise CheckpointError(f"{path}: no {name} in the archive; it is not a .nemo checkpoint.")
            yield _Members(_contents(archive, found[CONFIG_MEMBER]), _view(archive, found[WEIGHTS_MEMBER], file))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file.") from None
        except IsADirectoryError:
            raise CheckpointError(f"{path}: is a folder; give the .nemo file in it.") from None
        except (tarfile.TarError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError) as error:
            reason = "not a tar file" if "could not be opened" in str(error) else error
            raise CheckpointError(f"{path}: damaged or not a .nemo archive ({reason}); download it again.") from error


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    contents = file.read()
    if len(contents) != member.size:
        raise EOFError(f"{member.name} ends after {len(contents)} of {member.size} bytes")
    return contents


def _view(archive: tarfile.TarFile, member: tarfile.TarInfo, file: IO[bytes]) -> memoryview:
    """A member's bytes: mapped where they lie in a plain tar, else unpacked into memory."""
    if archive.fileobj is not file:
        return memoryview(bytearray(_contents(archive, member)))
    begin, end = member.offset_data, member.offset_data + member.size
    available = os.fstat(file.fileno()).st_size
    if end > available:
        raise EOFError(f"{member.name} ends after {available - begin} of {member.size} bytes")
    # Private pages: tensors made of them may be written to, and nothing reaches the file.
    return memoryview(mmap.mmap(file.fileno(), end, access=mmap.ACCESS_COPY))[begin:end]


def _parse_config(path: Path, raw: bytes) -> DictConfig:
    try:
        config = OmegaConf.create(raw.decode())
        if not isinstance(config, DictConfig):
            raise CheckpointError(f"{path}: {CONFIG_MEMBER} is a list, not a mapping.")
        # Interpolations between keys are NeMo's habit; resolvers would read the environment of whoever opens it.
        if b"${oc." in raw or b"${env:" in raw:
            raise CheckpointError(f"{path}: {CONFIG_MEMBER} asks for an OmegaConf resolver (`${{oc.…}}`); refused.")
        return config
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: {CONFIG_MEMBER} is not valid YAML: {reason[:200]}") from error


def read_config(path: str | os.PathLike[str]) -> DictConfig:
    """The model config inside a `.nemo`, unresolved.

    Raises:
        CheckpointError: if the file is not a readable `.nemo`.
    """
    path = Path(path)
    with _open_members(path) as members:
        return _parse_config(path, members.config)


# --- the weights

_GAIN, _DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in the zip; nothing is read until it is asked for."""

    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    record_items: int


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


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    record, dtype, items = storage
    sizes = tuple(shape), tuple(stride)
    if not all(isinstance(size, int) and size >= 0 for part in sizes for size in part) or not isinstance(offset, int):
        raise pickle.UnpicklingError("a tensor's shape is not a list of sizes")
    return _Tensor(record, dtype, offset, *sizes, items)


class _WeightsUnpickler(pickle.Unpickler):
    """Knows dictionaries and tensors; any other name in the pickle is refused before anything of it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no state dict needs")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, record, _, items = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return str(record), dtype, items


class _ViewFile(io.RawIOBase):
    """A memoryview as a file, for `zipfile`, without a copy."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._view)}[whence]
        if base + offset < 0:
            raise OSError("seek before the first byte")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of name and extra field


@dataclass
class _Weights:
    """The tensors of a checkpoint by name, read one at a time."""

    path: Path
    view: memoryview
    records: dict[str, zipfile.ZipInfo]
    root: str
    entries: dict[str, _Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, view: memoryview) -> "_Weights":
        if view[:4] != b"PK\x03\x04":
            raise CheckpointError(
                f"{path}: {WEIGHTS_MEMBER} is not a PyTorch zip file; files from before PyTorch 1.6 are pickles "
                "that could run code when read, and are refused."
            )
        try:
            archive = zipfile.ZipFile(_ViewFile(view))
            records = {info.filename: info for info in archive.infolist()}
            pickles = [info for name, info in records.items() if name.endswith("/data.pkl")]
            if len(pickles) != 1 or len(records) != len(archive.namelist()):
                raise CheckpointError(f"{path}: {WEIGHTS_MEMBER} is not a single PyTorch archive.")
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path}: the pickle in {WEIGHTS_MEMBER} is larger than {MAX_PICKLE_BYTES} bytes."
                )
            state = _WeightsUnpickler(io.BytesIO(archive.read(pickles[0]))).load()
        except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: {WEIGHTS_MEMBER} is refused: {error}.") from error
        except CheckpointError:
            raise
        except Exception as error:  # a pickle can make the interpreter fail in any way it likes
            raise CheckpointError(f"{path}: {WEIGHTS_MEMBER} is damaged: {type(error).__name__} {error}.") from error
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not state:
            raise CheckpointError(f"{path}: {WEIGHTS_MEMBER} holds no state dict.")
        entries = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, _Tensor)}
        return cls(path, view, records, pickles[0].filename.removesuffix("data.pkl"), entries)

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, its checksum verified. It lies in the mapped file: copy what outlives the reading."""
        entry = self.entries[key]
        last = entry.offset + sum((size - 1) * step for size, step in zip(entry.shape, entry.stride, strict=True))
        try:
            raw = self._record(f"{self.root}data/{entry.record}")
        except (KeyError, struct.error, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.path}: the numbers of {key} are damaged ({error}).") from error
        if not math.prod(entry.shape):
            return torch.empty(entry.shape, dtype=entry.dtype)
        if (last + 1) * entry.dtype.itemsize > len(raw):
            raise CheckpointError(f"{self.path}: {key} has shape {list(entry.shape)}, but its record is shorter.")
        flat = torch.frombuffer(raw, dtype=entry.dtype, count=len(raw) // entry.dtype.itemsize)
        return flat.as_strided(entry.shape, entry.stride, entry.offset)

    def _record(self, name: str) -> memoryview:
        """The bytes of a stored record of the zip, where they lie."""
        info = self.records[name]
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(self.view, info.header_offset)
        begin = info.header_offset + _LOCAL_HEADER.size
        stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 0x1
        if signature != b"PK\x03\x04" or self.view[begin : begin + name_length] != info.orig_filename.encode():
            raise zipfile.BadZipFile(f"the zip's directory and record {name} disagree")
        if not stored or info.file_size != info.compress_size:
            raise zipfile.BadZipFile(f"record {name} is compressed or encrypted, which PyTorch never does")
        begin += name_length + extra_length
        raw = self.view[begin : begin + info.file_size]
        if len(raw) != info.file_size or zlib.crc32(raw) != info.CRC:
            raise zipfile.BadZipFile(f"wrong checksum of record {name}")
        return raw


def _plain_keys(weights: _Weights, prefix: str) -> dict[str, tuple[str, ...]]:
    """The part's own state-dict keys -> the checkpoint's keys that they come from.

    Weight norm has been spelled two ways: `weight_g`/`weight_v` (NeMo 2.0) and
    `parametrizations.weight.original0`/`original1` (since 2.4). Either folds into one plain `weight`.
    """
    keys: dict[str, tuple[str, ...]] = {}
    for key in weights.entries:
        if not key.startswith(prefix + "."):
            continue
        own = key.removeprefix(prefix + ".")
        for gain, direction in (
            (_GAIN, _DIRECTION),
            (".weight_g", ".weight_v"),
        ):
            if own.endswith(gain):
                stem = own.removesuffix(gain)
                keys[stem + ".weight"] = (key, f"{prefix}.{stem}{direction}")
                break
            if own.endswith(direction):
                break
        else:
            keys[own] = (key,)
    return keys


def _load_part(weights: _Weights, prefix: str, part: nn.Module, strict: bool = True) -> None:
    """Fill a part, built with weight norm or without. Every key, shape and number is judged.

    `strict=False` leaves a missing weight as it is and ignores an unknown one; a wrong one is an error still.
    """
    path = weights.path
    own, sources = part.state_dict(), _plain_keys(weights, prefix)
    # The part's weights under their plain names, whichever way it was built.
    expected = {key.replace(_DIRECTION, ".weight"): value for key, value in own.items() if not key.endswith(_GAIN)}
    missing = sorted(
        key for key in expected if key not in sources or any(name not in weights.entries for name in sources[key])
    )
    unexpected = sorted(sources.keys() - expected.keys())
    if missing and strict:
        raise CheckpointError(
            f"{path}: {prefix} lacks {len(missing)} of {len(expected)} weights, first {missing[:5]}; "
            "the config and the weights do not belong together, or the file is incomplete."
        )
    if unexpected and strict:
        raise CheckpointError(
            f"{path}: {prefix} has {len(unexpected)} weights that its config does not know, first {unexpected[:5]}."
        )
    state = {}
    for key, want in expected.items():
        if key in missing:
            continue
        values = [_judged(weights, name, want) for name in sources[key]]
        gain_shape = (want.shape[0], *[1] * (want.dim() - 1))
        for name, value, shape in zip(
            reversed(sources[key]), reversed(values), (tuple(want.shape), gain_shape), strict=False
        ):
            if tuple(value.shape) != shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(value.shape)}, the config asks for {list(shape)}."
                )
        # FSQ's buffers follow from the config; other numbers there would give other tokens.
        if not want.is_floating_point() and not torch.equal(values[0], want):
            raise CheckpointError(
                f"{path}: {prefix}.{key} is {values[0].flatten().tolist()}, the config says otherwise."
            )
        stem = key.removesuffix(".weight")
        if stem + _GAIN in own:
            direction = values[-1]
            state[stem + _GAIN] = values[0].clone() if len(values) == 2 else _norm(direction)
            state[stem + _DIRECTION] = direction.clone()
        else:
            state[key] = torch._weight_norm(values[1], values[0], 0) if len(values) == 2 else values[0].clone()
            if not _is_finite(state[key]):
                raise CheckpointError(f"{path}: {prefix}.{key} is not finite: a row of its direction is all zeros.")
    part.load_state_dict(state, assign=True, strict=strict)


def _judged(weights: _Weights, name: str, want: torch.Tensor) -> torch.Tensor:
    """One tensor of the file in the dtype that the part has (fp16 files are widened), if it is sound."""
    value = weights.tensor(name)
    if value.is_floating_point() != want.is_floating_point() or value.is_complex():
        raise CheckpointError(f"{weights.path}: {name} is {value.dtype}, expected {want.dtype}.")
    if not _is_finite(value):
        raise CheckpointError(f"{weights.path}: {name} holds NaN or infinite numbers.")
    return value.to(want.dtype)


def _is_finite(value: torch.Tensor) -> bool:
    """Whether every number is finite; a sum, which NaN and infinity survive, is six times faster to look at."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def _norm(weight: torch.Tensor) -> torch.Tensor:
    """The gain of weight norm: the norm of each slice along the first dimension, kept broadcastable."""
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))


def load_parts(
    path: str | os.PathLike[str], parts: Mapping[str, nn.Module], strict: bool = True, others: str | None = None
) -> dict[str, torch.Tensor]:
    """Fill parts, by their names in the checkpoint, and read what else lies under a prefix.

    Args:
        path: the `.nemo`.
        parts: modules with the right shapes, with weight norm or without.
        strict: every weight of each part must be there, and no other under its name.
        others: prefix of further tensors to return as they are.

    Raises:
        CheckpointError: naming the file and the key, what was wrong, and what to do.
    """
    path = Path(path)
    with _open_members(path) as members:
        weights = _Weights.open(path, members.weights)
        for name, part in parts.items():
            _load_part(weights, name, part, strict)
        return {key: weights.tensor(key).clone() for key in weights.entries if others and key.startswith(others)}


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Parts, DictConfig]:
    """Load a codec for inference: parts with plain fp32 weights, in eval mode, and the whole config.

    Discriminators, WavLM and loss buffers, which differ between NeMo versions, are neither read nor judged.

    Raises:
        CheckpointError: naming the file and the member or key, what was wrong, and what to do.
    """
    path = Path(path)
    with _open_members(path) as members:
        config = _parse_config(path, members.config)
        try:
            values = {key: _resolved(config, key) for key in _CODEC_KEYS if key in config}
            with torch.device("meta"):
                parts = build_parts(values, weight_norm=False)
        except (ConfigError, OmegaConfBaseException) as error:
            raise CheckpointError(f"{path}: {CONFIG_MEMBER}: {error}") from error
        # Buffers hold the levels; on the meta device they would be without values.
        parts.quantizer = build_part(values["vector_quantizer"])  # type: ignore[assignment]
        weights = _Weights.open(path, members.weights)
        for name, part in parts.named().items():
            _load_part(weights, name, part)
            part.eval().requires_grad_(False)
    return parts, config


_CODEC_KEYS = ("sample_rate", "output_sample_rate", "samples_per_frame", *PARTS)


def _resolved(config: DictConfig, key: str) -> Any:
    value = config[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


# --- writing


def split_weight_norm(part: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a part built with plain weights, spelled as NeMo's weight-normed convolutions."""
    state = {}
    for key, value in part.state_dict().items():
        if key.endswith(".conv.weight"):
            stem = key.removesuffix(".weight")
            state[stem + _GAIN], state[stem + _DIRECTION] = _norm(value), value
        else:
            state[key] = value
    return state


def write_checkpoint(
    path: str | os.PathLike[str], config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Write a `.nemo` aside and rename it into place, so that `path` is never half a file.

    Args:
        path: where to write.
        config: the model config; its parts are named by NeMo's classes, so that any NeMo 3.0 opens the file.
        state_dict: tensors by NeMo's keys.
    """
    path = Path(path)
    config = dict(config) | {"target": NEMO_MODEL}
    config |= {name: nemo_config(config[name]) for name in PARTS}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        members = {name: Path(folder, name) for name in (CONFIG_MEMBER, WEIGHTS_MEMBER)}
        OmegaConf.save(OmegaConf.create(config), members[CONFIG_MEMBER])
        torch.save(dict(state_dict), members[WEIGHTS_MEMBER])
        aside = Path(folder, "model.nemo")
        with open(aside, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                for name, member in members.items():
                    archive.add(member, arcname=name, filter=_anonymous)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same weights give the same bytes, whoever wrote them."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info
