"""`.nemo` or `.ckpt` -> modules: every key, shape and number of the codec is judged."""

import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from nemo_lfr.checkpoint.archive import Members, read_members
from nemo_lfr.checkpoint.config import Parts, build_part, build_parts, codec_values, parse_config
from nemo_lfr.checkpoint.lightning import config_text
from nemo_lfr.checkpoint.names import DIRECTION, GAIN, gain_of
from nemo_lfr.checkpoint.tensors import Tensors
from nemo_lfr.errors import CheckpointError, ConfigError, shorten
from nemo_lfr.io.locate import CONFIG_MEMBER

_SPELLINGS = ((GAIN, DIRECTION), (".weight_g", ".weight_v"))


def read_config(path: str | os.PathLike[str]) -> DictConfig:
    """The model config inside a `.nemo` or a training checkpoint, unresolved.

    Raises:
        CheckpointError: if the file is not a readable `.nemo`.
    """
    path = Path(path)
    return _parse_config(path, read_members(path))


class Checkpoint:
    """A codec for inference, opened: every key and shape is judged, the numbers are read when they are asked for.

    Discriminators, WavLM and loss buffers, which differ between NeMo versions, are neither read nor judged.

    Args:
        path: the `.nemo`, or Lightning's `.ckpt`.

    Attributes:
        config: the whole model config.
        parts: in eval mode; encoder and decoder have plain fp32 weights on the meta device until `load_module`.

    Raises:
        CheckpointError: naming the file and the member or key, what was wrong, and what to do.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        members = read_members(path)
        self.config = _parse_config(path, members)
        self.parts = _empty_parts(path, self.config, weight_norm=False)
        self._tensors = _tensors(path, members)
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
        """Read the numbers of a part, unless that has been done.

        Raises:
            CheckpointError: if they are damaged, or the file has been changed since it was opened.
        """
        with self._lock:
            if name not in self._filled:
                part = self.parts.named()[name]
                _fill(self._tensors, name, part, self._sources[name], strict=True)
                part.requires_grad_(False).to(device)
                self._filled.add(name)

    def iter_weights(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that a part would be filled with, sorted by their names, one at a time: none is kept.

        Raises:
            CheckpointError: as `load_module`.
        """
        expected = _expected(self.parts.named()[name])
        for key, names in sorted(self._sources[name].items()):
            yield key, _read(self._tensors, name, key, names, expected[key])[key]


_OPEN: weakref.WeakSet[Checkpoint] = weakref.WeakSet()


def _free_locks() -> None:
    """In a forked process, where a thread that read a checkpoint is not: the lock it held would never be free."""
    for checkpoint in list(_OPEN):
        checkpoint._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Parts, DictConfig]:
    """Load a codec for inference as `Checkpoint` does, with all numbers."""
    checkpoint = Checkpoint(path)
    for name in checkpoint.parts.named():
        checkpoint.load_module(name)
    return checkpoint.parts, checkpoint.config


def load_parts(
    path: str | os.PathLike[str],
    config: DictConfig | None = None,
    *,
    strict: bool = True,
    others: str | None = None,
) -> tuple[Parts, dict[str, torch.Tensor]]:
    """Load a codec for training: parts with weight norm, and what else lies under a prefix.

    Args:
        path: the `.nemo`, or Lightning's `.ckpt`.
        config: the model config, if it is not to be the file's.
        strict: every weight of each part must be there, and no other under its name; else what is missing is
            initialised and what is unknown ignored.
        others: prefix of further tensors to return as they are.

    Raises:
        CheckpointError: naming the file and the key, what was wrong, and what to do.
    """
    path = Path(path)
    members = read_members(path)
    config = _parse_config(path, members) if config is None else config
    parts = _empty_parts(path, config, weight_norm=True, meta=strict)
    tensors = _tensors(path, members)
    for name, part in parts.named().items():
        _fill(tensors, name, part, _match(tensors, name, part, strict), strict)
    return parts, {key: tensors[key] for key in tensors.entries if others and key.startswith(others)}


def _tensors(path: Path, members: Members) -> Tensors:
    return Tensors(path, members.weights, training=members.config is None)


def _parse_config(path: Path, members: Members) -> DictConfig:
    try:
        if members.config is None:
            return parse_config(config_text(_tensors(path, members).contents))
        return parse_config(members.config.decode())
    except (UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: {CONFIG_MEMBER if members.config else 'config'} is refused: {error}"
        ) from error


def _empty_parts(path: Path, config: DictConfig, *, weight_norm: bool, meta: bool = True) -> Parts:
    """Parts that are about to be filled: on the meta device, so that nothing is allocated or initialised."""
    try:
        values = codec_values(config)
        with torch.device("meta" if meta else "cpu"):
            parts = build_parts(values, weight_norm=weight_norm)
        # Its buffers hold the levels, which come from the config.
        with torch.device("cpu"):
            parts.quantizer = build_part(values["vector_quantizer"])  # type: ignore[assignment]
        return parts
    except ConfigError as error:
        raise CheckpointError(f"{path}: {CONFIG_MEMBER}: {error}") from error


def _sources(tensors: Tensors, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The part's keys under their plain names, each with the checkpoint's keys that it comes from."""
    keys = {key.removeprefix(prefix + ".") for key in tensors.entries if key.startswith(prefix + ".")}
    for own in keys:
        for gain, direction in _SPELLINGS:
            if own.endswith(gain) and own.removesuffix(gain) + direction in keys:
                stem = own.removesuffix(gain)
                yield stem + ".weight", (f"{prefix}.{own}", f"{prefix}.{stem}{direction}")
                break
            if own.endswith(direction) and own.removesuffix(direction) + gain in keys:
                break
        else:
            yield own, (f"{prefix}.{own}",)


def _match(tensors: Tensors, prefix: str, part: nn.Module, strict: bool) -> dict[str, tuple[str, ...]]:
    """Each weight of a part under its plain name, with the tensors that it comes from, which have the right shapes.

    `strict=False` leaves out a missing weight and ignores an unknown one; a wrong one is an error still.
    """
    path, expected = tensors.path, _expected(part)
    sources: dict[str, tuple[str, ...]] = {}
    for key, names in _sources(tensors, prefix):
        if key in sources:
            raise CheckpointError(f"{path}: {shorten(prefix + '.' + key)} is there in two spellings; keep one.")
        sources[key] = names
    missing = sorted(expected.keys() - sources.keys())
    unexpected = sorted(sources.keys() - expected.keys())
    if missing and strict:
        raise CheckpointError(
            f"{path}: {prefix} lacks {len(missing)} of {len(expected)} weights, first {missing[:5]}; "
            "the config and the weights do not belong together, or the file is incomplete."
        )
    if unexpected and strict:
        raise CheckpointError(
            f"{path}: {prefix} has {len(unexpected)} weights that its config does not know, first "
            f"{[shorten(key) for key in unexpected[:5]]}."
        )
    matched = {key: sources[key] for key in expected if key in sources}
    for key, names in matched.items():
        for name, shape in zip(names, _shapes(expected[key], len(names)), strict=True):
            _check_entry(tensors, name, expected[key], shape)
    return matched


def _expected(part: nn.Module) -> dict[str, torch.Tensor]:
    """The part's weights under their plain names, whichever way it was built."""
    state = part.state_dict()
    return {key.replace(DIRECTION, ".weight"): value for key, value in state.items() if not key.endswith(GAIN)}


def _fill(tensors: Tensors, prefix: str, part: nn.Module, sources: dict[str, tuple[str, ...]], strict: bool) -> None:
    """Fill a part, built with weight norm or without."""
    own, expected = part.state_dict(), _expected(part)
    state: dict[str, torch.Tensor] = {}
    for key, names in sources.items():
        state |= _read(tensors, prefix, key, names, expected[key], key.removesuffix(".weight") + GAIN in own)
    part.load_state_dict(state, assign=True, strict=strict)


def _read(
    tensors: Tensors, prefix: str, key: str, names: tuple[str, ...], want: torch.Tensor, has_norm: bool = False
) -> dict[str, torch.Tensor]:
    """One weight by its plain name, or its gain and direction; every number is judged."""
    kept = has_norm or len(names) == 1
    *gains, direction = (_finite(tensors, name, want, kept or name != names[-1]) for name in names)
    # FSQ's buffers follow from the config; other numbers there would give other tokens.
    if not want.is_floating_point() and not torch.equal(direction, want):
        raise CheckpointError(
            f"{tensors.path}: {prefix}.{key} is {shorten(direction.flatten().tolist())}, the config says otherwise."
        )
    if has_norm:
        stem, norm = key.removesuffix(".weight"), gain_of(direction)
        sound = bool(norm.all())
        found = {stem + GAIN: gains[0] if gains else norm, stem + DIRECTION: direction}
    elif gains:
        found = {key: torch._weight_norm(direction, gains[0], 0)}
        sound = _is_finite(found[key])
    else:
        found, sound = {key: direction}, True
    if not sound:
        raise CheckpointError(f"{tensors.path}: {prefix}.{key} is not finite: a row of its direction is all zeros.")
    return found


def _shapes(want: torch.Tensor, count: int) -> list[tuple[int, ...]]:
    """Shapes of a weight's sources: itself, or gain and direction."""
    shape = tuple(want.shape)
    return [shape] if count == 1 else [(shape[0], *[1] * (len(shape) - 1)), shape]


def _check_entry(tensors: Tensors, name: str, want: torch.Tensor, shape: tuple[int, ...]) -> None:
    entry = tensors.entries[name]
    if entry.shape != shape:
        raise CheckpointError(
            f"{tensors.path}: {name} has shape {shorten(list(entry.shape))}, the config asks for {list(shape)}."
        )
    if entry.dtype.is_floating_point != want.is_floating_point() or entry.dtype.is_complex:
        raise CheckpointError(f"{tensors.path}: {name} is {entry.dtype}, expected {want.dtype}.")


def _finite(tensors: Tensors, name: str, want: torch.Tensor, kept: bool) -> torch.Tensor:
    """One tensor of the file in the dtype that the part has (fp16 files are widened), if it is sound."""
    value = (tensors[name] if kept else tensors.temporary(name)).to(want.dtype)
    if not _is_finite(value):
        raise CheckpointError(f"{tensors.path}: {name} holds NaN or infinite numbers.")
    return value


def _is_finite(value: torch.Tensor) -> bool:
    """Whether every number is finite; a sum, which NaN and infinity survive, is six times faster to look at."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())
