"""Modules whose weights may still be in a checkpoint."""

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from nemo_lfr.checkpoint import Checkpoint
from nemo_lfr.codec.ambient import building_state

M = TypeVar("M", bound=nn.Module)


class LazyModule(Generic[M]):
    """Module of a codec whose weights are loaded on first access.

    Copies and pickles contain the weights.

    Args:
        module: with weights, or on the meta device if there is a checkpoint.
        checkpoint: source of the weights; None if the module has them.
        name: of the module in the checkpoint.
        device: device of the module once its weights are loaded.

    Attributes:
        module: the module, perhaps without weights; for properties that depend on the config only.
    """

    def __init__(
        self,
        module: M,
        checkpoint: Checkpoint | None = None,
        name: str = "",
        device: torch.device | None = None,
    ) -> None:
        self.module = module
        self._checkpoint, self._name, self._device = checkpoint, name, device

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.get(),)

    @property
    def is_read(self) -> bool:
        """Whether the weights are loaded."""
        return self._checkpoint is None

    @property
    def device(self) -> torch.device:
        """Device of the module, also before its weights are loaded."""
        return self._device or next(self.module.parameters()).device

    def get(self) -> M:
        """Return the module with its weights.

        Raises:
            CheckpointError: if they cannot be read.
        """
        if (checkpoint := self._checkpoint) is not None:
            with building_state(torch.device("cpu")):
                checkpoint.load_module(self._name, self.device)
            self._checkpoint = None
        return self.module

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Return weights by name, sorted, with weight norm folded; loaded ones are not kept.

        Raises:
            CheckpointError: if they cannot be read.
        """
        if (checkpoint := self._checkpoint) is not None:
            return checkpoint.iter_weights(self._name)
        return sorted(_plain_state(self.module).items())


def _plain_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters by name with weight norm folded, the same for a module built with or without it."""
    state = {name: value for name, value in module.state_dict().items() if ".parametrizations." not in name}
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv1d | nn.ConvTranspose1d):
            state[f"{name}.weight"] = child.weight
    return state
