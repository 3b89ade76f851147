"""Exponential moving average of weights."""

import torch


class Average:
    """Exponential moving average of a module's parameters.

    Args:
        module: module whose parameters are averaged.
        decay: fraction of the old average that each update keeps. The first updates keep less, so that the initial
            weights do not dominate.

    Attributes:
        in_use: whether the module holds the averaged weights, and `weights` those of the module.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.in_use = False
        self.weights = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Update the average with the module's current parameters."""
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 50))
        self._move(module)
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in module.parameters()], 1 - decay)

    def use(self, module: torch.nn.Module, averaged: bool) -> None:
        """Give the module the averaged weights, or its own again; no effect if it holds them already."""
        if averaged == self.in_use:
            return
        self._move(module)
        self.in_use = averaged
        for index, parameter in enumerate(module.parameters()):
            parameter.data, self.weights[index] = self.weights[index], parameter.data

    def _move(self, module: torch.nn.Module) -> None:
        """Move the averaged weights to the device of the module.

        A checkpoint is loaded before the model moves to its GPU.
        """
        with torch.inference_mode(False):  # the first call may be during validation
            pairs = zip(self.weights, module.parameters(), strict=True)
            self.weights = [weight.to(parameter.device) for weight, parameter in pairs]
