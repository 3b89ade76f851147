"""Training of an entropy model: a small PyTorch network that is then quantized.

The network is trained twice: first with float weights, then with weights and activations rounded as in the integer
model, with straight-through gradients. The second stage makes the loss from rounding negligible.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from nemo_lfr.errors import EntropyModelError
from nemo_lfr.io.entropy.blocks import block_bits
from nemo_lfr.io.entropy.model import HIDDEN_MAX, EntropyModel, ModelSpec
from nemo_lfr.io.entropy.predict import STEPS, block_features, tokens_to_digits

HIDDEN_BITS = 5  # fractional bits of a hidden unit: the maximum 255 is slightly less than 8
INPUT_BITS = 7  # fractional bits of a feature: the maximum 127 is slightly less than 1
BLOCK_FRAMES = 256
BATCH = 192
WEIGHT_DECAY = 0.03
# Live streams have short blocks. For every 40 frames, one more block of 8 frames is fitted to match them.
START_FRAMES, START_EVERY = 8, 40


@dataclass(frozen=True)
class FitSettings:
    """Settings for fitting a model.

    Attributes:
        past: number of past frames, see `ModelSpec`.
        averages: time constants of running averages, see `ModelSpec`.
        spreads: time constants of running distances, see `ModelSpec`.
        hidden: units of the two hidden layers.
        epochs: passes over the data with float weights.
        rounded_epochs: further passes with rounded weights.
        max_frames: maximum number of frames to fit; of more frames, a random subset is used.
        valid_share: fraction of the utterances that are held out for validation.
        learning_rate: peak learning rate of Adam.
        seed: random seed.
    """

    past: int = 3
    averages: tuple[int, ...] = (3, 6)
    spreads: tuple[int, ...] = (5,)
    hidden: tuple[int, int] = (128, 256)
    epochs: float = 12
    rounded_epochs: float = 3
    max_frames: int = 250_000
    valid_share: float = 0.04
    learning_rate: float = 3e-3
    seed: int = 0


class _Chain(torch.autograd.Function):
    """The second hidden layer and the logits of each digit, computed sequentially.

    Autograd would compute the same on tensors of [B, D, H2], which exceed the cache, and take three times as long.
    """

    @staticmethod
    def forward(
        ctx: Any, sums: torch.Tensor, digit: torch.Tensor, output: torch.Tensor, ones: torch.Tensor, rounded: bool
    ) -> torch.Tensor:
        """Compute the logits [B, D, L].

        The arguments are sums [B, H2], digit weights [D, L, H2], output weights [D, H2, L] and digits [B, D, L].
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
    """A weight for each level of each digit, [D, L, H]: a parabola plus a residual.

    The levels are steps of one scale. With the parabola, what is learned for one level also applies to its neighbors,
    which requires fewer tokens.

    Args:
        levels: number of levels of each digit.
        width: H.
    """

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
        values: Any = self.values
        return self.rest + values * self.slope + (values**2 - 0.4) * self.bend


class Network(nn.Module):
    """The network in float; its logits are in bits.

    Args:
        spec: sizes.
    """

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
        self.exponents: dict[str, int] | None = None

    def weight(self, name: str) -> torch.Tensor:
        """Return a weight, rounded as in the integer model after `round_from_here`."""
        module: nn.Module = getattr(self, name)
        value: Any = module() if isinstance(module, _Ordinal) else module.weight
        value = value.transpose(1, 2) if name == "output" else value
        if self.exponents is None:
            return value
        exponent = self.exponents[name]
        limit = 32767 if name == "digit" else 127
        rounded = (value * 2.0**exponent).round().clamp(-limit, limit) * 2.0**-exponent
        return value + (rounded - value).detach()

    def activate(self, sums: torch.Tensor) -> torch.Tensor:
        """Apply the activation function, with rounding after `round_from_here`."""
        hidden = sums.clamp(0, HIDDEN_MAX * 2.0**-HIDDEN_BITS)
        if self.exponents is None:
            return hidden
        rounded = (hidden * 2.0**HIDDEN_BITS).round() * 2.0**-HIDDEN_BITS
        return hidden + (rounded - hidden).detach()

    def forward(self, features: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
        """Compute the code length of each digit in bits.

        Args:
            features: features [B, F].
            digits: digits [B, D].

        Returns:
            Code lengths [B, D].
        """
        hidden = self.activate(nn.functional.linear(features, self.weight("input"), self.input.bias))
        sums = nn.functional.linear(hidden, self.weight("hidden"), self.hidden.bias)
        sums = sums + nn.functional.linear(features, self.weight("skip"))
        ones = nn.functional.one_hot(digits, self.most).to(sums.dtype)
        rounded = self.exponents is not None
        logits = _Chain.apply(sums, self.weight("digit"), self.weight("output"), ones, rounded) + self.bias + self.mask
        bits = nn.functional.cross_entropy((logits * math.log(2)).transpose(1, 2), digits, reduction="none")
        return bits / math.log(2)

    def round_from_here(self) -> None:
        """Choose the exponents of the integer weights; `forward` rounds from then on."""

        def exponent(*values: torch.Tensor) -> int:
            """Return the largest exponent for which most weights fit in 8 bits."""
            # A few outliers are clipped, which allows a finer resolution for all other weights.
            largest = max(float(value.detach().abs().flatten().kthvalue(_rank(value)).values) for value in values)
            return math.floor(math.log2(127 / max(largest, 1e-3)))

        # Both terms of the second layer are summed in the same unit, though features have two more fractional bits.
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
        """Convert the network to an integer model.

        Args:
            spec: sizes.

        Raises:
            ValueError: if float32 arithmetic would not be exact.
        """
        assert self.exponents is not None
        scale = self.exponents
        rows = [slice(0, level) for level in spec.digit_levels]

        def integers(name: str, dtype: str) -> np.ndarray:
            """Return a weight in integers."""
            return np.rint(self.weight(name).numpy().astype(np.float64) * 2.0 ** scale[name]).astype(dtype)

        def bias(values: torch.Tensor, unit: int, shift: int) -> np.ndarray:
            # Adding half a unit makes the right shift, which rounds down, round to nearest.
            """Return a bias in integers."""
            half = (1 << shift) >> 1
            return (np.rint(values.numpy().astype(np.float64) * 2.0**unit) + half).astype("<i4")

        shifts = (
            scale["input"] + INPUT_BITS - HIDDEN_BITS,
            scale["hidden"],
            scale["output"] + HIDDEN_BITS - round(math.log2(STEPS)),
        )
        if min(shifts) < 0:
            raise ValueError(f"weights so large that shifts are {shifts}")
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


def fit(
    utterances: Sequence[np.ndarray],
    levels: tuple[int, ...],
    num_codebooks: int,
    fingerprint: str = "",
    settings: FitSettings = FitSettings(),
    report: Callable[[str], None] = lambda line: None,
) -> tuple[EntropyModel, dict[str, float]]:
    """Fit an entropy model.

    Args:
        utterances: tokens [C, T] of each utterance.
        levels: levels of one codebook.
        num_codebooks: C.
        fingerprint: fingerprint of the codec that produced the tokens.
        settings: sizes and number of epochs.
        report: called with progress messages.

    Returns:
        The model, and measurements: number of frames, and bits per frame on the held-out utterances.

    Raises:
        EntropyModelError: if there are too few tokens, or the codec has more levels than models support.
    """
    try:
        spec = ModelSpec(
            tuple(levels),
            num_codebooks,
            settings.past,
            settings.averages,
            settings.spreads,
            settings.hidden,
            (0, 0, 0),
            fingerprint,
        )
        spec.check()
    except ValueError as error:
        raise EntropyModelError(f"no entropy model can be fitted to these tokens: {error}.") from error
    random = np.random.default_rng(settings.seed)
    fitted, held = _split([part for part in utterances if part.shape[1]], settings, random)
    features, digits = _examples(spec, fitted, random)
    network = Network(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = Network(spec)
        _train(network, features, digits, settings.epochs, settings.learning_rate, "float", report)
        network.round_from_here()
        _train(network, features, digits, settings.rounded_epochs, settings.learning_rate / 4, "rounded", report)
    try:
        model = network.to_model(spec)
    except ValueError as error:
        raise EntropyModelError(f"the fitted weights are too large ({error}); fit more tokens.") from error
    return model, {
        "utterances": len(fitted),
        "frames": sum(part.shape[1] for part in fitted),
        "held out frames": sum(part.shape[1] for part in held),
        "uniform bits a frame": num_codebooks * math.log2(math.prod(levels)),
        "bits a frame": measure(model, held),
    }


def measure(model: EntropyModel, utterances: Sequence[np.ndarray], block_frames: int = BLOCK_FRAMES) -> float:
    """Return the code length in bits per frame, without the overhead of blocks.

    Args:
        model: the entropy model.
        utterances: tokens [C, T] of each utterance.
        block_frames: frames per block.
    """
    frames = sum(part.shape[1] for part in utterances)
    return sum(block_bits(model, block) for part in utterances for block in _blocks(part, block_frames)) / frames


def _blocks(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    return [tokens[:, start : start + size] for start in range(0, tokens.shape[1], size)]


def _split(
    utterances: list[np.ndarray], settings: FitSettings, random: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if len(utterances) < 2:
        raise EntropyModelError(f"{len(utterances)} utterances with frames; fitting needs at least 2.")
    order = random.permutation(len(utterances))
    num_held = min(len(order) - 1, max(1, round(settings.valid_share * len(order))))
    held = [utterances[number] for number in order[:num_held]]
    fitted: list[np.ndarray] = []
    frames = 0
    for number in order[num_held:]:
        fitted.append(utterances[number])
        frames += utterances[number].shape[1]
        if frames >= settings.max_frames:
            break
    return fitted, held


def _examples(
    spec: ModelSpec, utterances: list[np.ndarray], random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features [N, F] as int8 and digits [N, D] as int64 of all frames."""
    features, digits = [], []
    for tokens in utterances:
        blocks = _blocks(tokens, BLOCK_FRAMES)
        for _ in range(tokens.shape[1] // START_EVERY):
            start = int(random.integers(tokens.shape[1] - START_FRAMES + 1))
            blocks.append(tokens[:, start : start + START_FRAMES])
        for block in blocks:
            values = tokens_to_digits(block, spec.levels)
            features.append(block_features(spec, values)[:, :-1].astype(np.int8))
            digits.append(values)
    return torch.from_numpy(np.concatenate(features)), torch.from_numpy(np.concatenate(digits))


def _train(
    network: Network,
    features: torch.Tensor,
    digits: torch.Tensor,
    epochs: float,
    rate: float,
    name: str,
    report: Callable[[str], None],
) -> None:
    steps = max(1, round(epochs * len(features) / BATCH))
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    started = last = time.monotonic()
    total, count = 0.0, 0
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(features))])
        chosen, order = order[:BATCH], order[BATCH:]
        loss = network(features[chosen].float() * 2.0**-INPUT_BITS, digits[chosen]).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total, count = total + float(loss.detach()), count + 1
        if time.monotonic() - last > 30 or step + 1 == steps:
            last = time.monotonic()
            report(f"{name}: step {step + 1} of {steps}, {total / count:.2f} bits a frame, {last - started:.0f} s")
            total, count = 0.0, 0
