"""Encode blocks of tokens to bytes with an entropy model, and decode them.

A block consists of the tokens of consecutive frames, and is encoded independently of other blocks. The model predicts
the FSQ values of each token. An FSQ value (a digit in the code) is the index of a level in one FSQ dimension.
"""

from collections.abc import Sequence

import numpy as np

from nemo_lfr.io.entropy.coder import (
    FREQUENCY_BITS,
    LOW,
    STATE_BYTES,
    TOTAL,
    TRUNCATED,
    WRONG_END,
    Decoder,
    encode_intervals,
)
from nemo_lfr.io.entropy.model import HIDDEN_MAX, EntropyModel
from nemo_lfr.io.entropy.predict import (
    EXPONENTIALS,
    MAX_STEPS,
    History,
    block_features,
    digits_to_tokens,
    frequencies,
    hidden_sums,
    logits,
    tokens_to_digits,
)

# Minimum number of blocks for which decoding them together is faster than one after another.
SIDE_BY_SIDE = 3


def least_bytes(num_frames: int) -> int:
    """Return the minimum payload size of a block in bytes.

    Without this limit, a file of a few bytes could declare so many frames that decoding them would take hours.
    """
    return -(-num_frames // 4)


def intervals(model: EntropyModel, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval in [0, 2^15) with which the range coder represents each FSQ value of a block.

    Args:
        model: entropy model.
        digits: FSQ values [T, D], where D is the number of FSQ dimensions of a frame.

    Returns:
        Starts and lengths of the intervals, two int64 arrays [T, D].
    """
    sums = hidden_sums(model, block_features(model.spec, digits))
    rows = np.arange(len(digits))
    starts, lengths = np.empty_like(digits), np.empty_like(digits)
    for digit, values in enumerate(digits.T):
        table = frequencies(logits(model, sums, digit))
        lengths[:, digit] = table[rows, values]
        starts[:, digit] = table.cumsum(axis=1)[rows, values] - lengths[:, digit]
        sums += model.layers.digits[digit][values]
    return starts, lengths


def encode_block(model: EntropyModel, tokens: np.ndarray) -> bytes:
    """Encode the tokens of a block.

    Args:
        model: entropy model.
        tokens: integers [C, T] below the codebook size.
    """
    starts, lengths = intervals(model, tokens_to_digits(tokens, model.spec.levels))
    data = encode_intervals(starts.ravel().tolist(), lengths.ravel().tolist())
    return data.ljust(least_bytes(tokens.shape[1]), b"\0")


def block_bits(model: EntropyModel, tokens: np.ndarray) -> float:
    """Return the number of bits that the model needs for a block, without the overhead of the coder and the file.

    Args:
        model: entropy model.
        tokens: integers [C, T] below the codebook size.
    """
    lengths = intervals(model, tokens_to_digits(tokens, model.spec.levels))[1]
    return float((FREQUENCY_BITS - np.log2(lengths)).sum())


def decode_block(model: EntropyModel, data: bytes, num_frames: int) -> np.ndarray:
    """Decode a block that `encode_block` encoded.

    Args:
        model: entropy model.
        data: encoded bytes.
        num_frames: number of frames in the block.

    Returns:
        The int32 tokens [C, T].

    Raises:
        ValueError: if the bytes are not a valid encoding of `num_frames` frames.
    """
    decoder = Decoder(data)
    history = History(model.spec, 1)
    layers = model.layers
    second, third = layers.scales[1], layers.scales[2]
    exponentials = EXPONENTIALS.tolist()
    num_digits = model.spec.num_digits
    digits = np.empty((num_frames, num_digits), dtype=np.int64)
    hidden = np.ones(model.spec.hidden[1] + 1, dtype=np.float32)
    units = hidden[:-1]
    steps = list(zip(layers.outputs, layers.digits, strict=True))
    for row in digits:
        sums = hidden_sums(model, history.features)[0]
        frame = []
        for output, added in steps:
            np.multiply(sums, second, out=units)
            np.floor(units, out=units)
            np.maximum(units, 0, out=units)
            np.minimum(units, HIDDEN_MAX, out=units)
            # The same computation as in `frequencies`. The arrays are so small that Python is faster than NumPy.
            values = np.floor(hidden @ output * third).tolist()
            best = max(values)
            weights = [exponentials[min(int(best - value), MAX_STEPS)] for value in values]
            scale, room = sum(weights), TOTAL - len(weights)
            table = [1 + weight * room // scale for weight in weights]
            table[values.index(best)] += TOTAL - sum(table)
            symbol = decoder.take(table)
            frame.append(symbol)
            sums += added[symbol]
        row[:] = frame
        history.push(row[None])
    _check_rest(decoder.finish(), len(data), num_frames)
    return digits_to_tokens(digits, model.spec.levels)


def _check_rest(rest: bytes, size: int, num_frames: int) -> None:
    if rest and (size > least_bytes(num_frames) or rest.strip(b"\0")):
        raise ValueError(f"{len(rest)} unexpected bytes follow the compressed data of a block")


def decode_blocks(model: EntropyModel, blocks: Sequence[tuple[bytes, int]]) -> list[np.ndarray]:
    """Decode several blocks, in parallel where that is faster.

    Args:
        model: entropy model.
        blocks: for each block, its encoded bytes and its number of frames.

    Returns:
        The int32 tokens [C, T] of each block.

    Raises:
        ValueError: if the bytes of a block are not a valid encoding of its number of frames.
    """
    if len(blocks) < SIDE_BY_SIDE:
        return [decode_block(model, data, count) for data, count in blocks]
    order = sorted(range(len(blocks)), key=lambda number: -blocks[number][1])
    counts = [blocks[number][1] for number in order]
    tape = _Tape([blocks[number][0] for number in order])
    digits = np.zeros((counts[0], len(order), model.spec.num_digits), dtype=np.int64)
    history = History(model.spec, len(order))
    batch = len(order)
    for index, frame in enumerate(digits):
        while counts[batch - 1] <= index:
            batch -= 1
        if batch < len(history.features):
            history.keep(batch)
        frame = frame[:batch]
        sums = hidden_sums(model, history.features)
        for digit in range(model.spec.num_digits):
            values = tape.take(frequencies(logits(model, sums, digit)))
            frame[:, digit] = values
            sums += model.layers.digits[digit][values]
        history.push(frame)
    for row, count in enumerate(counts):
        _check_rest(tape.finish(row), len(blocks[order[row]][0]), count)
    result: list[np.ndarray] = [np.empty(0)] * len(order)
    for row, number in enumerate(order):
        result[number] = digits_to_tokens(digits[: counts[row], row], model.spec.levels)
    return result


class _Tape:
    """Decoder for several blocks in parallel; see `Decoder` for one block."""

    def __init__(self, data: Sequence[bytes]) -> None:
        self._states = np.array([Decoder(part).state for part in data], dtype=np.int64)
        self._data = np.frombuffer(b"".join(data) + b"\0", dtype=np.uint8).astype(np.int64)
        self._ends = np.cumsum([len(part) for part in data])
        self._positions = self._ends - [len(part) - STATE_BYTES for part in data]

    def take(self, table: np.ndarray) -> np.ndarray:
        """Return the next symbol of each of the first B blocks, shape [B].

        Args:
            table: frequencies of all possible symbols, shape [B, levels].

        Raises:
            ValueError: if the compressed data of a block is truncated.
        """
        batch = len(table)
        rows = np.arange(batch)
        states = self._states[:batch]
        rest = states & (TOTAL - 1)
        ends = table.cumsum(axis=1)
        symbols: np.ndarray = (rest[:, None] >= ends).sum(axis=1)
        lengths = table[rows, symbols]
        states = lengths * (states >> FREQUENCY_BITS) + rest - ends[rows, symbols] + lengths
        while (short := np.flatnonzero(states < LOW)).size:
            at = self._positions[short]
            if (at >= self._ends[short]).any():
                raise ValueError(TRUNCATED)
            states[short] = states[short] << 8 | self._data[at]
            self._positions[short] += 1
        self._states[:batch] = states
        return symbols

    def finish(self, row: int) -> bytes:
        """Return the bytes after the last symbol of a block; see `Decoder.finish`."""
        if self._states[row] != LOW:
            raise ValueError(WRONG_END)
        return self._data[self._positions[row] : self._ends[row]].astype(np.uint8).tobytes()
