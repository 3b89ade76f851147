"""Base class of the encoder, decoder and quantizer, with the methods of NeMo's `NeuralModule` but without NeMo."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from nemo_lfr.modules.weight_norm import remove_weight_norm

# Function that returns the neural types of a module's inputs or outputs. `nemo_lfr.nemo.neural_types` sets it, so that
# this file does not import NeMo.
type_lookup: Callable[[nn.Module, str], dict[str, Any]] | None = None


class NeuralModule(nn.Module):
    """PyTorch module with the methods of NeMo's class of the same name.

    Attributes:
        input_names: names of the arguments of `forward`.
        output_names: names of the results of `forward`.
    """

    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()

    _frozen_grad_map: dict[str, bool]

    @property
    def input_types(self) -> dict[str, Any]:
        """Dict from each argument of `forward` to its NeMo neural type.

        The values are None unless `nemo_lfr.nemo` was imported.
        """
        return type_lookup(self, "input_types") if type_lookup else dict.fromkeys(self.input_names)

    @property
    def output_types(self) -> dict[str, Any]:
        """Dict from each result of `forward` to its NeMo neural type.

        The values are None unless `nemo_lfr.nemo` was imported.
        """
        return type_lookup(self, "output_types") if type_lookup else dict.fromkeys(self.output_names)

    @property
    def num_weights(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def input_example(self, max_batch: int | None = None, max_dim: int | None = None) -> None:
        """Return None, as NeMo's codec modules do."""
        return None

    def freeze(self) -> None:
        """Switch to evaluation mode, and disable gradients.

        After that, `unfreeze(partial=True)` enables only the gradients that were enabled before.
        """
        grad_map = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        self._frozen_grad_map = {**getattr(self, "_frozen_grad_map", {}), **grad_map}
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self, partial: bool = False) -> None:
        """Switch to training mode with gradients.

        Args:
            partial: whether to enable gradients only for parameters that required gradients before `freeze`.

        Raises:
            ValueError: if `partial` is set and the module was not frozen.
        """
        if partial and not hasattr(self, "_frozen_grad_map"):
            raise ValueError(f"{type(self).__name__} is not frozen; call freeze() before unfreeze(partial=True).")
        grad_map = getattr(self, "_frozen_grad_map", {}) if partial else {}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(grad_map.get(name, True))
        if hasattr(self, "_frozen_grad_map"):
            del self._frozen_grad_map
        self.train()

    @contextlib.contextmanager
    def as_frozen(self) -> Iterator[None]:
        """Freeze the module inside a `with` block; restore its mode and its `requires_grad` flags afterwards."""
        training = self.training
        self.freeze()
        try:
            yield
        finally:
            self.unfreeze(partial=True)
            self.train(training)

    def remove_weight_norm(self) -> None:
        """Remove weight norm, so that each weight is one parameter again instead of a direction and a gain."""
        for module in self.modules():
            remove_weight_norm(module)
