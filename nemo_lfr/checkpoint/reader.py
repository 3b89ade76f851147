"""Load codec modules from a checkpoint, and validate the keys, shapes and values of their weights."""

import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from nemo_lfr.checkpoint.archive import Members, check_shards, read_members
from nemo_lfr.checkpoint.config import CodecModules, build_part, build_parts, codec_values, parse_config
from nemo_lfr.checkpoint.lightning import config_text
from nemo_lfr.checkpoint.names import DIRECTION, GAIN, gain_of
from nemo_lfr.checkpoint.pair import check_pair
from nemo_lfr.checkpoint.safetensors import WEIGHTS_CHECKSUM, SafeTensors, open_files, open_shards, recorded_checksum
from nemo_lfr.checkpoint.tensors import Tensors
from nemo_lfr.errors import CheckpointError, ConfigError, shorten
from nemo_lfr.io.locate import SAFETENSORS, SAFETENSORS_CONFIG, SAFETENSORS_INDEX, VARIANT_SHARDS, index_of
from nemo_lfr.modules.empty import on_meta_device
from nemo_lfr.modules.weight_norm import CANONICAL, SumOrder, fold_weight_norm

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_SPELLINGS = ((GAIN, DIRECTION), (".weight_g", ".weight_v"))


def read_config(path: str | os.PathLike[str]) -> DictConfig:
    """Read the model config of a checkpoint, without resolving interpolations.

    Raises:
        CheckpointError: if the file is not a readable checkpoint.
    """
    path = Path(path)
    config = _parse_config(path, read_members(path))
    config.pop(WEIGHTS_CHECKSUM, None)
    return config


class Checkpoint:
    """Codec checkpoint that is open for reading. Its modules are loaded for inference.

    The constructor validates keys and shapes, and loads the quantizer. `load_module` loads the weights of the encoder
    or the decoder. Weights that inference does not use (discriminators, WavLM, loss buffers) are neither read nor
    validated.

    Args:
        path: a `.nemo` file, a Lightning `.ckpt`, or the folder of an unpacked or exported codec.

    Attributes:
        path: path of the checkpoint.
        config: the whole model config.
        parts: encoder, quantizer and decoder, in eval mode and without weight norm. The fp32 weights of encoder and
            decoder are on the meta device until `load_module` loads them.

    Raises:
        CheckpointError: if the checkpoint is missing, is damaged or does not match its config.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path = Path(path)
        members = read_members(path)
        self.config = _parse_config(path, members)
        self.parts = _empty_parts(path, members.config_name, self.config, weight_norm=False)
        self._tensors = _tensors(path, members)
        check_pair(self._tensors, self.config)
        self.config.pop(WEIGHTS_CHECKSUM, None)  # other weights may be saved with this config
        self._sources = {
            name: _match(self._tensors, name, part, strict=True) for name, part in self.parts.named().items()
        }
        self._filled: set[str] = set()
        self._lock = threading.Lock()
        _OPEN.add(self)
        for part in self.parts.named().values():
            part.eval().requires_grad_(False)
        self.load_module("vector_quantizer")

    def load_module(self, name: str, device: str | torch.device = "cpu") -> None:
        """Load the weights of a module, unless they are already loaded.

        Args:
            name: name of the module in the checkpoint, such as "audio_encoder".
            device: device for the weights.

        Raises:
            CheckpointError: if the weights are damaged, or the file has changed since it was opened.
        """
        with self._lock:
            if name not in self._filled:
                part = self.parts.named()[name]
                _fill(self._tensors, name, part, self._sources[name], strict=True)
                part.requires_grad_(False).to(device)
                self._filled.add(name)

    def iter_weights(self, name: str, order: SumOrder = CANONICAL) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the names and folded weights of a module, sorted by name, without keeping them in memory.

        Args:
            name: name of the module in the checkpoint, such as "audio_encoder".
            order: order of summation for the norms when weight norm is folded.

        Raises:
            CheckpointError: if the weights are damaged, or the file has changed since it was opened.
        """
        expected = _expected(self.parts.named()[name])
        for key, names in sorted(self._sources[name].items()):
            yield key, _read(self._tensors, name, key, names, expected[key], order=order)[key]

    def iter_stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the full name and the tensor of each stored weight that inference uses.

        Weight norm is not folded.

        Raises:
            CheckpointError: if a tensor is damaged, or the file has changed since it was opened.
        """
        for sources in self._sources.values():
            for names in sources.values():
                for name in names:
                    yield name, self._tensors[name]


_OPEN: weakref.WeakSet[Checkpoint] = weakref.WeakSet()


def _reset_locks() -> None:
    """Replace all locks in a forked process, where the threads that hold them do not exist."""
    for checkpoint in list(_OPEN):
        checkpoint._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_locks)


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[CodecModules, DictConfig]:
    """Load all modules of a codec for inference, and its config; see `Checkpoint`."""
    checkpoint = Checkpoint(path)
    for name in checkpoint.parts.named():
        checkpoint.load_module(name)
    return checkpoint.parts, checkpoint.config


def load_parts(
    path: str | os.PathLike[str],
    config: DictConfig | None = None,
    *,
    strict: bool = True,
) -> tuple[CodecModules, Tensors]:
    """Load the modules of a codec for training, with weight norm.

    Args:
        path: a `.nemo` file, a Lightning `.ckpt`, or the folder of an unpacked or exported codec.
        config: model config (default: the one in the checkpoint).
        strict: whether to raise an error for missing and for unknown weights of the modules. Otherwise, missing
            weights are initialized at random, and unknown ones are ignored.

    Returns:
        The modules, and all tensors of the checkpoint by name. Each tensor is read when it is accessed.

    Raises:
        CheckpointError: if the checkpoint is missing, is damaged or does not match the config.
    """
    path = Path(path)
    members = read_members(path)
    name = members.config_name if config is None else "the config argument"
    own = _parse_config(path, members) if config is None or members.is_safetensors else config
    config = own if config is None else config
    parts = _empty_parts(path, name, config, weight_norm=True, meta=strict)
    tensors = _tensors(path, members)
    check_pair(tensors, own)
    for name, part in parts.named().items():
        _fill(tensors, name, part, _match(tensors, name, part, strict), strict)
    return parts, tensors


def read_weights(
    files: Sequence[str | os.PathLike[str]], config: Mapping[str, Any], shards: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """Read and validate a codec's weights from safetensors files.

    The weights are returned in the form with weight norm, even if the files contain plain weights. If `config.json` in
    the folder of the files states a SHA-256, files with the names `model.safetensors` or `model-00001-of-...` must
    match it.

    Args:
        files: paths of the safetensors files.
        config: model config.
        shards: `weight_map` of the index if there are several files, else None.

    Returns:
        fp32 weights and int32 buffers, by their names in a checkpoint.

    Raises:
        CheckpointError: if a file is damaged, or does not match the config or the index.
    """
    paths = [Path(file) for file in files]
    if shards is None:
        tensors = open_files(paths)
    else:
        tensors = open_shards(index := index_of(paths[0]), check_shards(index, shards, VARIANT_SHARDS))
    names = [path.name for path in paths]
    is_usual = names == [SAFETENSORS] or all(map(_SHARD.fullmatch, names))  # variants have other file names
    recorded = recorded_checksum(paths[0]) if is_usual else None
    check_pair(tensors, OmegaConf.create({**config, WEIGHTS_CHECKSUM: recorded}))
    parts = _empty_parts(tensors.path, SAFETENSORS_CONFIG, OmegaConf.create(dict(config)), weight_norm=True)
    for name, part in parts.named().items():
        _fill(tensors, name, part, _match(tensors, name, part, strict=True), strict=True)
    return {f"{name}.{key}": value for name, part in parts.named().items() for key, value in part.state_dict().items()}


def _tensors(path: Path, members: Members) -> Tensors:
    if isinstance(members.weights, dict):
        return open_shards(path / SAFETENSORS_INDEX, members.weights)
    if members.is_safetensors:
        return SafeTensors(path / SAFETENSORS, members.weights)
    return Tensors(path, members.weights, training=members.config is None)


def _parse_config(path: Path, members: Members) -> DictConfig:
    try:
        if members.config is None:
            tensors = _tensors(path, members)
            return parse_config(config_text(tensors.contents, tensors.entries))
        return parse_config(members.config.decode())
    except (UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path}: {members.config_name} is invalid: {error}") from error


def _empty_parts(path: Path, name: str, config: DictConfig, *, weight_norm: bool, meta: bool = True) -> CodecModules:
    """Build modules whose weights are loaded later. With `meta`, the weights use no memory until then."""
    try:
        values = codec_values(config)
        with on_meta_device() if meta else torch.device("cpu"):
            parts = build_parts(values, weight_norm=weight_norm)
        # The quantizer's buffers follow from the levels in the config.
        with torch.device("cpu"):
            parts.quantizer = build_part(values["vector_quantizer"])  # type: ignore[assignment]
        return parts
    except ConfigError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error


def _sources(tensors: Tensors, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name of each weight, such as "conv.weight", and its keys in the checkpoint (two with weight norm)."""
    keys = {key.removeprefix(prefix + ".") for key in tensors.entries if key.startswith(prefix + ".")}
    for key in keys:
        for gain, direction in _SPELLINGS:
            if key.endswith(gain) and key.removesuffix(gain) + direction in keys:
                stem = key.removesuffix(gain)
                yield stem + ".weight", (f"{prefix}.{key}", f"{prefix}.{stem}{direction}")
                break
            if key.endswith(direction) and key.removesuffix(direction) + gain in keys:
                break
        else:
            yield key, (f"{prefix}.{key}",)


def _match(tensors: Tensors, prefix: str, part: nn.Module, strict: bool) -> dict[str, tuple[str, ...]]:
    """Map each weight of a module to the keys in the checkpoint that define it, and check the shapes and dtypes.

    Args:
        tensors: tensors of the checkpoint.
        prefix: name of the module in the checkpoint, such as "audio_encoder".
        part: the module.
        strict: whether missing and unknown weights are errors. A wrong shape or dtype is always an error.
    """
    path, expected = tensors.path, _expected(part)
    sources: dict[str, tuple[str, ...]] = {}
    for key, names in _sources(tensors, prefix):
        if key in sources:
            raise CheckpointError(f"{path}: {shorten(prefix + '.' + key)} is stored under two names; keep one.")
        sources[key] = names
    missing = sorted(expected.keys() - sources.keys())
    unexpected = sorted(sources.keys() - expected.keys())
    if missing and strict:
        raise CheckpointError(
            f"{path}: {prefix} lacks {len(missing)} of {len(expected)} weights, for example {missing[:5]}; the "
            "weights belong to another config, or the file is incomplete and must be downloaded again."
        )
    if unexpected and strict:
        raise CheckpointError(
            f"{path}: {prefix} has {len(unexpected)} weights that are not in its config, for example "
            f"{[shorten(key) for key in unexpected[:5]]}; use the config and the weights of one model."
        )
    matched = {key: sources[key] for key in expected if key in sources}
    for key, names in matched.items():
        for name, shape in zip(names, _shapes(expected[key], len(names)), strict=True):
            _check_entry(tensors, name, expected[key], shape)
    return matched


def _expected(part: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's weights by their names without weight norm; with weight norm, the direction only."""
    state = part.state_dict()
    return {key.replace(DIRECTION, ".weight"): value for key, value in state.items() if not key.endswith(GAIN)}


def _fill(tensors: Tensors, prefix: str, part: nn.Module, sources: dict[str, tuple[str, ...]], strict: bool) -> None:
    """Load weights into a module, whether or not it was built with weight norm."""
    current, expected = part.state_dict(), _expected(part)
    state: dict[str, torch.Tensor] = {}
    for key, names in sources.items():
        state |= _read(tensors, prefix, key, names, expected[key], key.removesuffix(".weight") + GAIN in current)
    part.load_state_dict(state, assign=True, strict=strict)


def _read(
    tensors: Tensors,
    prefix: str,
    key: str,
    names: tuple[str, ...],
    want: torch.Tensor,
    has_norm: bool = False,
    order: SumOrder = CANONICAL,
) -> dict[str, torch.Tensor]:
    """Read one weight, or its gain and direction if `has_norm` is set, and validate every value.

    Args:
        tensors: tensors of the checkpoint.
        prefix: name of the module in the checkpoint, such as "audio_encoder".
        key: name of the weight in the module.
        names: keys in the checkpoint: the weight itself, or its gain and direction.
        want: tensor with the expected dtype and shape and, for FSQ's buffers, the expected values.
        has_norm: whether to return the gain and the direction.
        order: order of summation for the norms when weight norm is folded.

    Returns:
        The tensors by their names in the module.
    """
    kept = has_norm or len(names) == 1
    *gains, direction = (_finite(tensors, name, want, kept or name != names[-1]) for name in names)
    # FSQ's buffers follow from the config; other values would produce other tokens.
    if not want.is_floating_point() and not torch.equal(direction, want):
        raise CheckpointError(
            f"{tensors.path}: {prefix}.{key} is {shorten(direction.flatten().tolist())}, but the config requires "
            f"{shorten(want.flatten().tolist())}; use the config and the weights of one model."
        )
    if has_norm:
        stem, norm = key.removesuffix(".weight"), gain_of(direction)
        is_valid = bool(norm.all())
        weights = {stem + GAIN: gains[0] if gains else norm, stem + DIRECTION: direction}
    elif gains:
        weights = {key: fold_weight_norm(direction, gains[0], order)}
        is_valid = _is_finite(weights[key])
    else:
        weights, is_valid = {key: direction}, True
    if not is_valid:
        raise CheckpointError(
            f"{tensors.path}: {prefix}.{key} is not finite: a row of its direction (weight norm) is all zeros, or its "
            "values are too small to be squared; use another checkpoint."
        )
    return weights


def _shapes(want: torch.Tensor, count: int) -> list[tuple[int, ...]]:
    """Return the shapes of the `count` tensors from which a weight is computed.

    If `count` is 1, the tensor is the weight itself. If it is 2, the tensors are the gain and the direction of weight
    norm.
    """
    shape = tuple(want.shape)
    return [shape] if count == 1 else [(shape[0], *[1] * (len(shape) - 1)), shape]


def _check_entry(tensors: Tensors, name: str, want: torch.Tensor, shape: tuple[int, ...]) -> None:
    entry = tensors.entries[name]
    if entry.shape != shape:
        raise CheckpointError(
            f"{tensors.path}: {name} has shape {shorten(list(entry.shape))}, but the config requires {list(shape)}; "
            "use the config and the weights of one model."
        )
    if entry.dtype.is_floating_point != want.is_floating_point() or entry.dtype.is_complex:
        raise CheckpointError(
            f"{tensors.path}: {name} has dtype {entry.dtype}, but the config requires {want.dtype}; use the config "
            "and the weights of one model."
        )


def _finite(tensors: Tensors, name: str, want: torch.Tensor, kept: bool) -> torch.Tensor:
    """Read a tensor, convert it to the dtype of `want` (from fp16, for instance), and check that it is finite.

    If `kept` is false, the result is only valid until the next tensor is read.
    """
    value = (tensors[name] if kept else tensors.temporary(name)).to(want.dtype)
    if not _is_finite(value):
        raise CheckpointError(f"{tensors.path}: {name} contains NaN or infinite values; use another checkpoint.")
    return value


def _is_finite(value: torch.Tensor) -> bool:
    """Return whether all values are finite.

    If the sum is finite, so are all values, and computing the sum is 6x faster than checking each value.
    """
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())
