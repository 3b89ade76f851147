"""Exponential moving average of a module's weights."""

from collections.abc import Iterable, Mapping

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
        is_due: whether the module's weights were trained since the last update; set by the caller.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.in_use = self.is_due = False
        self._trained: WeightRecord | None = None
        self.restart(module)

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Update the average with the module's current parameters."""
        self._trained, self.is_due = None, False
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 50))
        self._move(module)
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in module.parameters()], 1 - decay)

    def restart(self, module: torch.nn.Module) -> None:
        """Set the average to the module's current parameters, as at the start of training."""
        self.count = 0
        with torch.inference_mode(False):  # the trainer's `validate` calls this in inference mode
            self.weights = [parameter.detach().clone() for parameter in module.parameters()]

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
        self._trained = WeightRecord(module)

    @property
    def is_finished(self) -> bool:
        """Whether `finish` was called after the last update."""
        return self._trained is not None

    def describes(self, module: torch.nn.Module) -> bool:
        """Return whether the module's weights are unchanged since `finish` was called, except for their dtype.

        If `finish` was not called after the last update, the function does not compare weights and returns True.
        """
        return self._trained is None or self._trained.describes(module)

    def _move(self, module: torch.nn.Module) -> None:
        """Convert `weights` to the devices and dtypes of the module."""
        with torch.inference_mode(False):  # the first call may be during validation
            pairs = zip(self.weights, module.parameters(), strict=True)
            self.weights = [weight.to(parameter.device, parameter.dtype) for weight, parameter in pairs]


class WeightRecord:
    """Checksums of parameters, to find out later whether the parameters changed.

    Weights that were only moved to another device, or converted to fp16 or bf16, do not count as changed.

    Args:
        *modules: modules with the parameters.
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        self._checksums = [
            {dtype: checksums([weight.to(dtype)]) for dtype in (weight.dtype, torch.float16, torch.bfloat16)}
            for weight in _weights(modules)
        ]

    def describes(self, *modules: torch.nn.Module) -> bool:
        """Return whether the parameters of `modules` have the recorded values, perhaps rounded to 16 bits."""
        weights = _weights(modules)
        return len(weights) == len(self._checksums) and all(map(_is_converted, weights, self._checksums))


def is_finite(weights: Iterable[torch.Tensor]) -> bool:
    """Return whether tensors contain neither NaN nor infinity."""
    return all(bool(weight.isfinite().all()) for weight in weights)


def _weights(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    weights = [parameter.detach() for module in modules for parameter in module.parameters()]
    # Checksums are computed on the CPU, because a GPU computes other checksums.
    return [weight if weight.is_meta else weight.cpu() for weight in weights]


def _is_converted(weight: torch.Tensor, recorded: Mapping[torch.dtype, tuple[int, ...]]) -> bool:
    """Return whether a weight has its recorded values, perhaps rounded to 16 bits.

    `recorded` maps a dtype, such as bf16, to the checksum of the recorded weight in this dtype.
    """
    return not weight.is_meta and any(
        checksums([weight.to(dtype)]) == expected and torch.equal(weight.to(dtype).to(weight.dtype), weight)
        for dtype, expected in recorded.items()
    )
