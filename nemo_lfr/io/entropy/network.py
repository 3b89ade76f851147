"""The entropy model as a PyTorch network for training, with float weights or weights rounded as in `EntropyModel`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from nemo_lfr.io.entropy.model import HIDDEN_MAX, EntropyModel, ModelSpec
from nemo_lfr.io.entropy.predict import STEPS

HIDDEN_BITS = 5  # fractional bits of a hidden unit: the maximum 255 is slightly less than 8
INPUT_BITS = 7  # fractional bits of a feature: the maximum 127 is slightly less than 1


class _Chain(torch.autograd.Function):
    """Compute the second hidden layer and the logits, one FSQ dimension after the other.

    D is the number of FSQ dimensions of a frame, L the largest number of levels, and H2 the number of units in the
    second hidden layer. Each operation processes one FSQ dimension, so its tensors [B, H2] fit in the CPU cache. The
    same computation with PyTorch's own operations on tensors [B, D, H2], which do not fit, takes three times as long.
    """

    @staticmethod
    def forward(
        ctx: Any, sums: torch.Tensor, digit: torch.Tensor, output: torch.Tensor, ones: torch.Tensor, rounded: bool
    ) -> torch.Tensor:
        """Compute the logits [B, D, L].

        The logits of an FSQ dimension depend on `sums` and on the values of the FSQ dimensions before it.

        Args:
            ctx: context of autograd.
            sums: second hidden layer before the activation, without the contributions of the frame's own FSQ values,
                [B, H2].
            digit: contribution of each level of each FSQ dimension, which is added to `sums`, [D, L, H2].
            output: weights of the output layer, [D, H2, L].
            ones: one-hot encoded FSQ values, [B, D, L].
            rounded: whether to round the hidden units as in the integer model.
        """
        running = sums.clone()
        logits = torch.empty_like(ones)
        units = []
        for number in range(len(digit)):
            unit = running.clamp(0, HIDDEN_MAX * 2.0**-HIDDEN_BITS)
            if rounded:
                unit = unit.mul_(2.0**HIDDEN_BITS).round_().mul_(2.0**-HIDDEN_BITS)
            units.append(unit)
            logits[:, number] = unit @ output[number]
            running.addmm_(ones[:, number], digit[number])
        ctx.save_for_backward(digit, output, ones, *units)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of the arguments of `forward`."""
        digit, output, ones, *units = ctx.saved_tensors
        (gradient,) = gradients
        running = torch.zeros_like(units[0])
        for_digit, for_output = torch.empty_like(digit), torch.empty_like(output)
        for number in reversed(range(len(digit))):
            unit, part = units[number], gradient[:, number]
            torch.mm(ones[:, number].T, running, out=for_digit[number])
            torch.mm(unit.T, part, out=for_output[number])
            inside = (unit > 0) & (unit < HIDDEN_MAX * 2.0**-HIDDEN_BITS)
            running.addcmul_(part @ output[number].T, inside.to(unit.dtype))
        return running, for_digit, for_output, None, None


class _Ordinal(nn.Module):
    """Weights [D, L, H] for the levels of each FSQ dimension: a parabola over the levels plus a residual.

    With the parabola, training on one level also changes the weights of the other levels, so fewer training tokens are
    needed.

    Args:
        levels: number of levels in each FSQ dimension.
        width: size H of the layer.
    """

    values: torch.Tensor  # [D, L, 1], the positions of the levels, from -1 to 1

    def __init__(self, levels: Sequence[int], width: int) -> None:
        super().__init__()
        values = torch.zeros(len(levels), max(levels), 1)
        for row, level in zip(values, levels, strict=True):
            row[:level, 0] = torch.linspace(-1, 1, level)
        self.register_buffer("values", values)
        self.slope = nn.Parameter(torch.randn(len(levels), 1, width) * 0.1)
        self.bend = nn.Parameter(torch.zeros(len(levels), 1, width))
        self.rest = nn.Parameter(torch.zeros(len(levels), max(levels), width))

    def forward(self) -> torch.Tensor:
        """Return the weights [D, L, H]."""
        return self.rest + self.values * self.slope + (self.values**2 - 0.4) * self.bend


class Network(nn.Module):
    """Entropy model with float weights, for training. The logits are logarithms to the base 2.

    Args:
        spec: sizes of the model.
    """

    mask: torch.Tensor  # [D, L], -1e4 for levels that an FSQ dimension does not have

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        first, second = spec.hidden
        num_digits = spec.num_digits
        self.most = most = max(spec.digit_levels)
        self.input = nn.Linear(spec.num_features, first)
        self.hidden = nn.Linear(first, second)
        self.skip = nn.Linear(spec.num_features, second, bias=False)
        self.digit = _Ordinal(spec.digit_levels, second)
        self.output = _Ordinal(spec.digit_levels, second)
        self.bias = nn.Parameter(torch.zeros(num_digits, most))
        allowed = torch.arange(most)[None] < torch.tensor(spec.digit_levels)[:, None]
        self.register_buffer("mask", torch.where(allowed, 0.0, -1e4))
        self.exponents: dict[str, int] | None = None  # set by `round_from_here`

    def weight(self, name: str) -> torch.Tensor:
        """Return a weight. After `round_from_here`, the weight is rounded as in the integer model."""
        module: _Ordinal | nn.Linear = getattr(self, name)
        value: torch.Tensor = module() if isinstance(module, _Ordinal) else module.weight
        value = value.transpose(1, 2) if name == "output" else value
        if self.exponents is None:
            return value
        exponent = self.exponents[name]
        limit = 32767 if name == "digit" else 127
        rounded = (value * 2.0**exponent).round().clamp(-limit, limit) * 2.0**-exponent
        return value + (rounded - value).detach()

    def activate(self, sums: torch.Tensor) -> torch.Tensor:
        """Apply the activation function. After `round_from_here`, the result is rounded as in the integer model."""
        hidden = sums.clamp(0, HIDDEN_MAX * 2.0**-HIDDEN_BITS)
        if self.exponents is None:
            return hidden
        rounded = (hidden * 2.0**HIDDEN_BITS).round() * 2.0**-HIDDEN_BITS
        return hidden + (rounded - hidden).detach()

    def forward(self, features: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
        """Compute the number of bits that the model needs for each FSQ value.

        Args:
            features: features [B, F].
            digits: FSQ values [B, D].

        Returns:
            Numbers of bits [B, D].
        """
        hidden = self.activate(nn.functional.linear(features, self.weight("input"), self.input.bias))
        sums = nn.functional.linear(hidden, self.weight("hidden"), self.hidden.bias)
        sums = sums + nn.functional.linear(features, self.weight("skip"))
        ones = nn.functional.one_hot(digits, self.most).to(sums.dtype)
        rounded = self.exponents is not None
        chain = cast(Callable[..., torch.Tensor], _Chain.apply)  # torch declares no types for it
        logits = chain(sums, self.weight("digit"), self.weight("output"), ones, rounded) + self.bias + self.mask
        bits = nn.functional.cross_entropy((logits * math.log(2)).transpose(1, 2), digits, reduction="none")
        return bits / math.log(2)

    def round_from_here(self) -> None:
        """From now on, round weights and hidden units to integers, after they are multiplied by powers of two."""

        def exponent(*values: torch.Tensor) -> int:
            """Return the largest e <= 16 for which 99.95 % of each tensor's values, times 2^e, are in [-127, 127]."""
            # A few outliers are clipped, which allows a finer resolution for all other weights.
            largest = max(float(value.detach().abs().flatten().kthvalue(_rank(value)).values) for value in values)
            return math.floor(math.log2(127 / max(largest, 1e-3)))

        # The sums of the second layer need the same scale for hidden units and features, but features have two more
        # fractional bits.
        extra = INPUT_BITS - HIDDEN_BITS
        hidden = min(exponent(self.hidden.weight), exponent(self.skip.weight) + extra)
        self.exponents = {
            "input": exponent(self.input.weight),
            "hidden": hidden,
            "skip": hidden - extra,
            "digit": hidden + HIDDEN_BITS,
            "output": exponent(self.output()),
        }

    @torch.no_grad()
    def to_model(self, spec: ModelSpec) -> EntropyModel:
        """Convert the network to an integer model. `round_from_here` must have been called before.

        Args:
            spec: sizes of the model.

        Raises:
            ValueError: if a right shift would be negative, or float32 arithmetic would not be exact.
        """
        assert self.exponents is not None
        scale = self.exponents
        rows = [slice(0, level) for level in spec.digit_levels]

        def integers(name: str, dtype: str) -> np.ndarray:
            """Return a weight multiplied by 2 ** scale[name] and rounded to integers."""
            return np.rint(self.weight(name).numpy().astype(np.float64) * 2.0 ** scale[name]).astype(dtype)

        def bias(values: torch.Tensor, unit: int, shift: int) -> np.ndarray:
            """Return `values` times 2^`unit` as integers, plus half of 2^`shift` for rounding."""
            # A right shift by `shift` bits rounds down. With this half, it rounds to the nearest integer.
            half = (1 << shift) >> 1
            return (np.rint(values.numpy().astype(np.float64) * 2.0**unit) + half).astype("<i4")

        shifts = (
            scale["input"] + INPUT_BITS - HIDDEN_BITS,
            scale["hidden"],
            scale["output"] + HIDDEN_BITS - round(math.log2(STEPS)),
        )
        if min(shifts) < 0:
            raise ValueError(f"right shifts are {shifts}, but must not be negative")
        digit, output = integers("digit", "<i2"), integers("output", "<i1").swapaxes(1, 2)
        out_bias = bias(self.bias, scale["output"] + HIDDEN_BITS, shifts[2])
        weights = {
            "input_weight": integers("input", "<i1"),
            "input_bias": bias(self.input.bias, scale["input"] + INPUT_BITS, shifts[0]),
            "hidden_weight": np.hstack([integers("hidden", "<i1"), integers("skip", "<i1")]),
            "hidden_bias": bias(self.hidden.bias, scale["hidden"] + HIDDEN_BITS, shifts[1]),
            "digit_weight": np.concatenate([part[row] for part, row in zip(digit, rows, strict=True)]),
            "output_weight": np.concatenate([part[row] for part, row in zip(output, rows, strict=True)]),
            "output_bias": np.concatenate([part[row] for part, row in zip(out_bias, rows, strict=True)]),
        }
        return EntropyModel(replace(spec, shifts=shifts), weights)


def _rank(value: torch.Tensor) -> int:
    return max(1, math.ceil(value.numel() * 0.9995))
