"""Encoder and decoder modules that load their weights from a checkpoint on first use."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm as add_weight_norm

from nemo_lfr.checkpoint import Checkpoint
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.errors import CheckpointError
from nemo_lfr.modules.weight_norm import CANONICAL, SumOrder, folded_weight, has_weight_norm
from nemo_lfr.modules.weights import current_value

M = TypeVar("M", bound=nn.Module)


class LazyModule(Generic[M]):
    """Wrapper that loads the weights of an encoder or decoder on first access.

    Copying or pickling this object loads the weights first, so the copy does not need the checkpoint.

    Args:
        module: the encoder or decoder. It must be on the meta device, without weights, if `checkpoint` is passed.
        checkpoint: source of the weights; None if `module` already has its weights.
        name: name of the module in the checkpoint, such as "audio_encoder".
        device: device of the module once its weights are loaded.
        path: file that the weights were loaded from; ignored if there is a checkpoint.

    Attributes:
        module: the module, perhaps without weights. Use it only for properties that do not need weights.
    """

    def __init__(
        self,
        module: M,
        checkpoint: Checkpoint | None = None,
        name: str = "",
        device: torch.device | None = None,
        path: Path | None = None,
    ) -> None:
        self.module = module
        self._checkpoint, self._name, self._device = checkpoint, name, device
        self._path = path if checkpoint is None else checkpoint.path.absolute()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (*_without_norm(self.get()), self._name, self._path)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyModule[M]":
        return LazyModule(copy.deepcopy(self.get(), memo), None, self._name, None, self._path)

    @property
    def is_read(self) -> bool:
        """Whether the weights are loaded."""
        return self._checkpoint is None

    @property
    def device(self) -> torch.device:
        """Device that the module is on, or will be on once its weights are loaded."""
        return self._device or next(self.module.parameters()).device

    def get(self) -> M:
        """Return the module with its weights.

        Raises:
            CheckpointError: if the weights cannot be read.
        """
        if (checkpoint := self._checkpoint) is not None:
            with building_state(torch.device("cpu")):
                checkpoint.load_module(self._name, self.device)
            self._checkpoint = None
        return self.module

    def weights(self, order: SumOrder = CANONICAL) -> Iterable[tuple[str, torch.Tensor]]:
        """Return the weights with their names, sorted by name, with weight norm folded.

        If the weights are not loaded yet, they are read from the checkpoint but not kept.

        Args:
            order: order of summation for the norms when weight norm is folded. For another order than the default, the
                checkpoint is read again. If the checkpoint has changed, the loaded weights are returned.

        Raises:
            CheckpointError: if the weights cannot be read.
        """
        if (checkpoint := self._checkpoint) is not None:
            return checkpoint.iter_weights(self._name, order)
        if order != CANONICAL and (checkpoint := self._reopened()) is not None:
            return checkpoint.iter_weights(self._name, order)
        return _plain_state(self.module, order)

    def _reopened(self) -> Checkpoint | None:
        """Reopen the file that the weights were loaded from; return None if it no longer contains these weights."""
        if self._path is None:
            return None
        try:
            with building_state(torch.device("cpu")):
                checkpoint = Checkpoint(self._path)
                pairs = zip(checkpoint.iter_weights(self._name), _plain_state(self.module), strict=True)
                same = all(
                    stored[0] == loaded[0] and torch.equal(stored[1], loaded[1].to(stored[1]))
                    for stored, loaded in pairs
                )
        except (CheckpointError, ValueError, RuntimeError):  # the file has other weights, with other names or shapes
            return None
        return checkpoint if same else None


def _without_norm(module: M) -> tuple[M, dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Return a copy without weight norm, which PyTorch cannot pickle, and the gain and direction of each weight.

    The copy and `module` share their tensors. A pickle of the copy and the NeMo model thus stores each tensor once.
    """
    plain = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    norms = {}
    for name, layer in plain.named_modules():
        hooks: Any = layer._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook.hook.__module__ == add_weight_norm.__module__]:
            del hooks[key]
        if has_weight_norm(layer):
            parametrizations: Any = layer.parametrizations
            norms[name] = parametrizations.weight.original0, parametrizations.weight.original1
            if len(parametrizations) == 1:  # otherwise, PyTorch raises an error
                layer.__class__ = parametrize.type_before_parametrizations(layer)
                del layer.parametrizations
    return plain, norms


def _unpickled(
    module: M, norms: dict[str, tuple[nn.Parameter, nn.Parameter]], name: str, path: Path | None
) -> LazyModule[M]:
    """Rebuild a `LazyModule` from the values that `__reduce__` returned."""
    for key, (gain, direction) in norms.items():
        layer: Any = module.get_submodule(key)
        layer.weight = nn.Parameter(torch.empty_like(direction, device="meta"), requires_grad=direction.requires_grad)
        add_weight_norm(layer)
        layer.parametrizations.weight.original0, layer.parametrizations.weight.original1 = gain, direction
        layer.parametrizations.train(layer.training)
    return LazyModule(module, None, name, None, path)


def _plain_state(module: nn.Module, order: SumOrder = CANONICAL) -> list[tuple[str, torch.Tensor]]:
    """Return the names and tensors of a module's state with weight norm folded, sorted by name.

    The result is the same whether the module was built with weight norm or without.
    """
    state = {name: value for name, value in module.state_dict().items() if ".parametrizations." not in name}
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv1d | nn.ConvTranspose1d):
            state[f"{name}.weight"] = folded_weight(child, order)
        if parametrize.is_parametrized(child):  # also a bias or an alpha that a caller has parametrized
            others = [key for key in child.parametrizations if key != "weight"]
            state |= {f"{name}.{key}": current_value(child, key).detach() for key in others}
    return sorted(state.items())
