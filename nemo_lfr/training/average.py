"""Exponential moving average of a module's weights."""

import torch

from nemo_lfr.modules.weights import checksums


class Average:
    """Exponential moving average of a module's parameters.

    Args:
        module: module whose parameters are averaged.
        decay: factor of the old average in each update. The first updates use a smaller factor, so that the initial
            weights do not dominate.

    Attributes:
        weights: the averaged weights. While `in_use` is True, the averaged weights are in the module, and this
            attribute holds the trained weights instead.
        in_use: whether the averaged weights are in the module.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.in_use = False
        self._trained: tuple[int, ...] | None = None
        self.weights = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Update the average with the module's current parameters."""
        self._trained = None
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 50))
        self._move(module)
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in module.parameters()], 1 - decay)

    def use(self, module: torch.nn.Module, averaged: bool) -> None:
        """Put the averaged weights into the module, or put the trained weights back if `averaged` is False."""
        if averaged == self.in_use:
            return
        self._move(module)
        self.in_use = averaged
        for index, parameter in enumerate(module.parameters()):
            parameter.data, self.weights[index] = self.weights[index], parameter.data

    def finish(self, module: torch.nn.Module) -> None:
        """Record checksums of the module's weights at the end of training, for `describes`."""
        self._trained = weight_checksums(module)

    @property
    def is_finished(self) -> bool:
        """Whether `finish` was called after the last update."""
        return self._trained is not None

    def describes(self, module: torch.nn.Module) -> bool:
        """Return whether the module's weights are unchanged since `finish` was called.

        If `finish` was not called after the last update, the function does not compare weights and returns True.
        """
        return self._trained is None or weight_checksums(module) == self._trained

    def convert(self, module: torch.nn.Module) -> None:
        """Convert the average to the dtypes of the module's weights, and call `finish` again."""
        pairs = zip(self.weights, module.parameters(), strict=True)
        self.weights = [weight.to(parameter.dtype) for weight, parameter in pairs]
        self.finish(module)

    def _move(self, module: torch.nn.Module) -> None:
        """Move `weights` to the device of the module.

        The devices may differ, since a checkpoint is loaded before the model is moved to its GPU.
        """
        with torch.inference_mode(False):  # the first call may be during validation
            pairs = zip(self.weights, module.parameters(), strict=True)
            self.weights = [weight.to(parameter.device) for weight, parameter in pairs]


def weight_checksums(*modules: torch.nn.Module) -> tuple[int, ...]:
    """Return checksums of the parameters of modules. The checksums do not depend on the device."""
    # Computed on the CPU, because a GPU computes other checksums.
    return checksums([parameter.detach().cpu() for module in modules for parameter in module.parameters()])
