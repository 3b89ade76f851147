"""Predict the frequency of each level in the next FSQ dimension, in integer arithmetic.

A batch consists of all frames of one block, or of the frames with the same index in several blocks. Features, sums
and logits are float32 with integer values. Frequencies and FSQ values (the indices of levels) are integers.
`EntropyModel` has verified that the arithmetic is exact.
"""

import numpy as np

from nemo_lfr.io.entropy.coder import TOTAL
from nemo_lfr.io.entropy.model import AVERAGE_BITS, HIDDEN_MAX, INPUT_MAX, EntropyModel, ModelSpec

STEPS = 16  # logit steps per bit
MAX_STEPS = 255
# round(2^16 * 2^(-k / 16)) for k from 0 to 15. For each further 16 steps, the value is shifted right by one bit.
ROOTS = (
    *(65536, 62757, 60097, 57549, 55109, 52773, 50535, 48393),
    *(46341, 44376, 42495, 40693, 38968, 37316, 35734, 34219),
)
EXPONENTIALS = np.array([ROOTS[step % STEPS] >> step // STEPS for step in range(MAX_STEPS + 1)], dtype=np.int64)


def tokens_to_digits(tokens: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """Split tokens [C, T] into the indices of FSQ levels, [T, C * len(levels)].

    The indices of the first codebook come first, in the order of `levels`.
    """
    digits = np.empty((tokens.shape[1], tokens.shape[0], len(levels)), dtype=np.int64)
    rest = tokens.T.astype(np.int64)
    for dimension, level in enumerate(levels):
        rest, digits[:, :, dimension] = np.divmod(rest, level)
    return digits.reshape(len(digits), -1)


def digits_to_tokens(digits: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """Join indices of FSQ levels, [T, C * len(levels)], into int32 tokens [C, T].

    This is the inverse of `tokens_to_digits`.
    """
    parts = digits.reshape(len(digits), -1, len(levels)).astype(np.int32)
    tokens = np.zeros(parts.shape[:2], dtype=np.int32)
    for dimension in reversed(range(len(levels))):
        tokens = tokens * levels[dimension] + parts[:, :, dimension]
    return tokens.T


class History:
    """Features for predicting the next frame.

    The features are the FSQ values of past frames, a flag for each past frame, and the running averages that
    `ModelSpec` describes. The flag says whether the past frame exists.

    Args:
        spec: sizes of the model.
        batch: number of blocks B that are processed in parallel.

    Attributes:
        features: float32 features [B, F + 1], which `push` updates in place. The last column is 1, for the bias.
    """

    def __init__(self, spec: ModelSpec, batch: int) -> None:
        levels = np.array(spec.digit_levels)
        self._levels, self._steps = (levels - 1).astype(np.int64), INPUT_MAX // (levels - 1)
        self._past, self._num_digits, self._times = spec.past, spec.num_digits, spec.averages + spec.spreads
        self._num_averages = len(spec.averages)
        self._averages = np.zeros((len(self._times), batch, spec.num_digits), dtype=np.int64)
        self.features = np.zeros((batch, spec.num_features + 1), dtype=np.float32)
        self.features[:, -1] = 1
        self._frames = 0

    def push(self, digits: np.ndarray) -> None:
        """Append one frame of each block, and update `features`.

        Args:
            digits: FSQ values [B, D] of the frames.
        """
        count, past, features = self._num_digits, self._past, self.features
        values = (2 * digits - self._levels) * self._steps
        features[:, count : past * count] = features[:, : (past - 1) * count].copy()
        features[:, :count] = values
        at = past * count
        if self._frames < past:
            features[:, at + self._frames] = INPUT_MAX
        self._frames += 1
        at += past
        values <<= AVERAGE_BITS
        for number, (average, time) in enumerate(zip(self._averages, self._times, strict=True)):
            if number == self._num_averages:
                np.abs(values, out=values)
            # For the first frames, the average is a plain mean, so that it adapts to the recording quickly.
            if self._frames < 1 << time:
                average += (values - average) // self._frames
            else:
                average += (values - average) >> time
            features[:, at : at + count] = average >> AVERAGE_BITS
            at += count

    def keep(self, batch: int) -> None:
        """Keep only the first `batch` blocks."""
        self.features = np.ascontiguousarray(self.features[:batch])
        self._averages = np.ascontiguousarray(self._averages[:, :batch])


def block_features(spec: ModelSpec, digits: np.ndarray) -> np.ndarray:
    """Return the features from which each frame of a block is predicted.

    Args:
        spec: sizes of the model.
        digits: FSQ values [T, D] of the block.

    Returns:
        The float32 features [T, F + 1]; see `History`. Row t depends only on the frames before t.
    """
    history = History(spec, 1)
    features = np.empty((len(digits), spec.num_features + 1), dtype=np.float32)
    for row, frame in zip(features, digits, strict=True):
        row[:] = history.features[0]
        history.push(frame[None])
    return features


def hidden_sums(model: EntropyModel, features: np.ndarray) -> np.ndarray:
    """Compute the contribution of past frames to the second hidden layer, before its activation function.

    The contributions of the current frame's FSQ values are added later.

    Args:
        model: entropy model.
        features: features [B, F + 1]; see `History`.

    Returns:
        Sums [B, H2].
    """
    layers = model.layers
    hidden = _activate(features @ layers.first, layers.scales[0])
    sums: np.ndarray = np.concatenate([hidden, features], axis=1) @ layers.second
    return sums


def _activate(sums: np.ndarray, scale: np.float32) -> np.ndarray:
    """Multiply sums by `scale`, round them down, and clip them to [0, 255], in place."""
    sums *= scale
    np.floor(sums, out=sums)
    np.maximum(sums, 0, out=sums)
    np.minimum(sums, HIDDEN_MAX, out=sums)
    return sums


def logits(model: EntropyModel, sums: np.ndarray, digit: int) -> np.ndarray:
    """Compute the logits of the levels in an FSQ dimension, in sixteenths of a bit.

    Args:
        model: entropy model.
        sums: sums of the second layer [B, H2].
        digit: index of the FSQ dimension.

    Returns:
        Logits [B, levels].
    """
    layers = model.layers
    hidden = np.ones((len(sums), sums.shape[1] + 1), dtype=np.float32)
    units = hidden[:, :-1]
    np.multiply(sums, layers.scales[1], out=units)
    np.floor(units, out=units)
    np.maximum(units, 0, out=units)
    np.minimum(units, HIDDEN_MAX, out=units)
    result: np.ndarray = hidden @ layers.outputs[digit]
    result *= layers.scales[2]
    np.floor(result, out=result)
    return result


def frequencies(steps: np.ndarray) -> np.ndarray:
    """Convert logits to positive frequencies that sum to 2^15.

    Args:
        steps: logits [B, levels] in sixteenths of a bit.

    Returns:
        The int64 frequencies [B, levels].
    """
    best = steps.argmax(axis=1)
    rows = np.arange(len(steps))
    below = np.minimum(steps[rows, best][:, None] - steps, MAX_STEPS).astype(np.int64)
    weights = EXPONENTIALS[below]
    result: np.ndarray = 1 + weights * (TOTAL - steps.shape[1]) // weights.sum(axis=1, keepdims=True)
    result[rows, best] += TOTAL - result.sum(axis=1)
    return result
