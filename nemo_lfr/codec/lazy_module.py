"""Modules whose weights may still be in a checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from nemo_lfr.checkpoint import Checkpoint
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.errors import CheckpointError
from nemo_lfr.modules.weight_norm import CANONICAL, SumOrder, folded_weight

M = TypeVar("M", bound=nn.Module)


class LazyModule(Generic[M]):
    """Module of a codec whose weights are loaded on first access.

    Copies and pickles contain the weights.

    Args:
        module: with weights, or on the meta device if there is a checkpoint.
        checkpoint: source of the weights; None if the module has them.
        name: name of the module in the checkpoint.
        device: device of the module once its weights are loaded.
        path: file that the weights came from, if there is no checkpoint.

    Attributes:
        module: the module, perhaps without weights; for properties that depend on the config only.
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
        return type(self), (self.get(), None, self._name, None, self._path)

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

    def weights(self, order: SumOrder = CANONICAL) -> Iterable[tuple[str, torch.Tensor]]:
        """Return weights by name, sorted, with weight norm folded. Weights that are loaded for this are not kept.

        Args:
            order: order of summation in folding. If weight norm was folded when the weights were loaded, and `order`
                is another one, their file is read again, unless it was removed or contains other weights.

        Raises:
            CheckpointError: if they cannot be read.
        """
        if (checkpoint := self._checkpoint) is not None:
            return checkpoint.iter_weights(self._name, order)
        if order != CANONICAL and (checkpoint := self._reopened()) is not None:
            return checkpoint.iter_weights(self._name, order)
        return _plain_state(self.module, order)

    def _reopened(self) -> Checkpoint | None:
        """Open the file of loaded weights again; None if it does not contain them."""
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
        except (CheckpointError, ValueError, RuntimeError):  # other weights: fewer names, other shapes
            return None
        return checkpoint if same else None


def _plain_state(module: nn.Module, order: SumOrder = CANONICAL) -> list[tuple[str, torch.Tensor]]:
    """Return parameters by name, sorted, with weight norm folded: the same for a module built with or without it."""
    state = {name: value for name, value in module.state_dict().items() if ".parametrizations." not in name}
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv1d | nn.ConvTranspose1d):
            state[f"{name}.weight"] = folded_weight(child, order)
    return sorted(state.items())
