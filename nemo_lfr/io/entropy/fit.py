"""Train an entropy model as a small PyTorch network, and convert it to integers.

Training has two stages: first with float weights, then with weights and hidden units that are rounded as in the
integer model (with straight-through gradients). Converting the network then hardly changes the compression.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_lfr.errors import EntropyModelError
from nemo_lfr.io.entropy.blocks import block_bits
from nemo_lfr.io.entropy.model import EntropyModel, ModelSpec
from nemo_lfr.io.entropy.network import INPUT_BITS, Network
from nemo_lfr.io.entropy.predict import block_features, tokens_to_digits

BLOCK_FRAMES = 256
BATCH = 192
WEIGHT_DECAY = 0.03
# In the short blocks of live streams, frames have few past frames. To fit such blocks too, a random block of 8 frames
# is added for every 40 frames.
START_FRAMES, START_EVERY = 8, 40


@dataclass(frozen=True)
class FitSettings:
    """Settings for fitting an entropy model.

    Attributes:
        past: number of past frames whose FSQ values are features.
        averages: time constants of running averages of the FSQ values; k means 2^k frames.
        spreads: time constants of running averages of the distance between FSQ values and middle levels; k means 2^k
            frames.
        hidden: number of units in the first and the second hidden layer.
        epochs: number of passes over the data with float weights.
        rounded_epochs: number of further passes with rounded weights.
        max_frames: number of frames to train on. Utterances are used in random order until this number is reached.
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
        levels: number of levels of each dimension of a codebook.
        num_codebooks: number of codebooks C.
        fingerprint: fingerprint of the codec that produced the tokens.
        settings: sizes of the model, and settings of the training.
        report: function that is called with progress messages.

    Returns:
        The model, and a dictionary of measurements. "utterances" and "frames" count the training data.
        "held_out_frames" is the number of held-out frames. For these frames, "bits_per_frame" and
        "uniform_bits_per_frame" are the bits per frame with the model and without a model. They do not include the
        overhead of the coder and the file.

    Raises:
        EntropyModelError: if fewer than two utterances have tokens, if a setting or the codec is not supported, or if
            the fitted weights are too large for integer arithmetic.
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = Network(spec)
        _train(network, features, digits, settings.epochs, settings.learning_rate, "float", report)
        network.round_from_here()
        _train(network, features, digits, settings.rounded_epochs, settings.learning_rate / 4, "rounded", report)
    try:
        model = network.to_model(spec)
    except ValueError as error:
        reason = f"the fitted weights are too large ({error}); fit the model on more tokens."
        raise EntropyModelError(reason) from error
    return model, {
        "utterances": len(fitted),
        "frames": sum(part.shape[1] for part in fitted),
        "held_out_frames": sum(part.shape[1] for part in held),
        "uniform_bits_per_frame": num_codebooks * math.log2(math.prod(levels)),
        "bits_per_frame": measure(model, held),
    }


def measure(model: EntropyModel, utterances: Sequence[np.ndarray], block_frames: int = BLOCK_FRAMES) -> float:
    """Return the number of bits per frame that a model needs, without the overhead of the coder and the file.

    Args:
        model: entropy model.
        utterances: tokens [C, T] of each utterance.
        block_frames: number of frames per block.
    """
    frames: int = sum(part.shape[1] for part in utterances)
    return sum(block_bits(model, block) for part in utterances for block in _blocks(part, block_frames)) / frames


def _blocks(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    return [tokens[:, start : start + size] for start in range(0, tokens.shape[1], size)]


def _split(
    utterances: list[np.ndarray], settings: FitSettings, random: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if len(utterances) < 2:
        raise EntropyModelError(
            f"fitting an entropy model needs at least 2 utterances with tokens, but there are {len(utterances)}."
        )
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
    """Return the int8 features [N, F] and the int64 FSQ values [N, D] of N frames.

    Each utterance is split into blocks of `BLOCK_FRAMES` frames. Random excerpts of `START_FRAMES` frames are used as
    additional blocks. The N frames are those of all blocks. Features never depend on frames before the block.
    """
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
            report(f"{name}: step {step + 1} of {steps}, {total / count:.2f} bits per frame, {last - started:.0f} s")
            total, count = 0.0, 0
