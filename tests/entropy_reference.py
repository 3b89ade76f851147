"""Slow decoder of compressed `.lfr` files, written from docs/concepts/lfr-compressed.md alone.

It uses Python's integers, does not import `nemo_lfr`, and validates only what it needs.
"""

import json

ROOTS = [
    65536,
    62757,
    60097,
    57549,
    55109,
    52773,
    50535,
    48393,
    46341,
    44376,
    42495,
    40693,
    38968,
    37316,
    35734,
    34219,
]


class Model:
    """Entropy model read from a `.lfrm` file."""

    def __init__(self, data: bytes) -> None:
        assert data[:5] == b"LFRM\x01"
        length = int.from_bytes(data[5:8], "little")
        self.meta = json.loads(data[8 : 8 + length])
        self._data, self._at = data, 8 + length
        self.levels = self.meta["levels"] * self.meta["num_codebooks"]  # number of levels in each FSQ dimension
        first, second = self.meta["hidden"]
        self.past = self.meta["past"]
        self.times = self.meta["averages"] + self.meta["spreads"]
        features = self.past * (len(self.levels) + 1) + len(self.times) * len(self.levels)
        rows = sum(self.levels)
        self.w1, self.b1 = self._take(1, first, features), self._take(4, 1, first)[0]
        self.w2, self.b2 = self._take(1, second, first + features), self._take(4, 1, second)[0]
        self.e = self._by_digit(self._take(2, rows, second))
        self.v, self.c = self._by_digit(self._take(1, rows, second)), self._by_digit(self._take(4, rows, 1))

    def _take(self, size: int, rows: int, columns: int) -> list[list[int]]:
        tensor = []
        for _ in range(rows):
            ends = [self._at + size * column for column in range(columns + 1)]
            tensor.append([int.from_bytes(self._data[a : a + size], "little", signed=True) for a in ends[:-1]])
            self._at = ends[-1]
        return tensor

    def _by_digit(self, rows: list[list[int]]) -> list[list[list[int]]]:
        parts = iter(rows)
        return [[next(parts) for _ in range(level)] for level in self.levels]


def dot(row: list[int], values: list[int]) -> int:
    """Return the dot product of two vectors."""
    return sum(weight * value for weight, value in zip(row, values, strict=True))


def clip(value: int) -> int:
    """Clip a value to [0, 255]."""
    return min(max(value, 0), 255)


def decode_payload(model: Model, payload: bytes, num_frames: int) -> list[list[int]]:
    """Decode the payload of a block to the FSQ values of each frame."""
    shift1, shift2, shift3 = model.meta["shifts"]
    digits: list[list[int]] = []
    inputs: list[list[int]] = []  # u of the previous frames
    averages = [[0] * len(model.levels) for _ in model.times]
    state, at = int.from_bytes(payload[:4], "little"), 4
    assert 1 << 23 <= state < 1 << 31
    for number in range(1, num_frames + 1):
        x = []
        for back in range(1, model.past + 1):
            x += inputs[-back] if back <= len(inputs) else [0] * len(model.levels)
        x += [127 if back <= len(inputs) else 0 for back in range(1, model.past + 1)]
        x += [value >> 8 for average in averages for value in average]
        h = [clip((dot(row, x) + bias) >> shift1) for row, bias in zip(model.w1, model.b1, strict=True)]
        a = [dot(row, h + x) + bias for row, bias in zip(model.w2, model.b2, strict=True)]
        frame = []
        for e, v, c in zip(model.e, model.v, model.c, strict=True):
            g = [clip(value >> shift2) for value in a]
            q = [(dot(row, g) + bias) >> shift3 for row, (bias,) in zip(v, c, strict=True)]
            best = max(q)
            steps = [min(best - value, 255) for value in q]
            weights = [ROOTS[step % 16] >> step // 16 for step in steps]
            f = [1 + weight * (32768 - len(q)) // sum(weights) for weight in weights]
            f[q.index(best)] += 32768 - sum(f)
            rest, digit = state % 32768, 0
            while rest >= f[digit]:
                rest -= f[digit]
                digit += 1
            state = f[digit] * (state >> 15) + rest
            while state < 1 << 23:
                state = state << 8 | payload[at]
                at += 1
            frame.append(digit)
            a = [value + added for value, added in zip(a, e[digit], strict=True)]
        digits.append(frame)
        inputs.append([(2 * d - (n - 1)) * (127 // (n - 1)) for d, n in zip(frame, model.levels, strict=True)])
        for index, (average, time) in enumerate(zip(averages, model.times, strict=True)):
            values = inputs[-1] if index < len(model.meta["averages"]) else [abs(u) for u in inputs[-1]]
            average[:] = [m + (u * 256 - m) // min(number, 1 << time) for m, u in zip(average, values, strict=True)]
    assert state == 1 << 23
    assert at == len(payload) or (not any(payload[at:]) and len(payload) == -(-num_frames // 4))
    return digits


def decode_file(data: bytes, model: Model | None = None) -> list[list[int]]:
    """Decode a file of coding 1 to the tokens of each frame.

    Args:
        data: contents of the file.
        model: entropy model; only files whose blocks are all packed need none.
    """
    length = int.from_bytes(data[5:8], "little")
    assert data[:5] == b"LFRT\x02" and data[8] == 1
    meta = json.loads(data[9 : 9 + length])
    levels, num_codebooks = meta[2:4]
    size = 1
    for level in levels:
        size *= level
    bytes_per_frame = ((size**num_codebooks - 1).bit_length() + 7) // 8
    at = 9 + length + 4
    frames = []
    while count := int.from_bytes(data[at : at + 4], "little"):
        num_bytes = int.from_bytes(data[at + 4 : at + 8], "little")
        payload = data[at + 8 : at + 8 + num_bytes]
        at += 8 + num_bytes + 4
        if num_bytes == count * bytes_per_frame:
            numbers = [
                int.from_bytes(payload[b : b + bytes_per_frame], "little")
                for b in range(0, num_bytes, bytes_per_frame)
            ]
            frames += [[number // size**c % size for c in range(num_codebooks)] for number in numbers]
            continue
        assert model is not None
        for frame in decode_payload(model, payload, count):
            tokens = []
            for start in range(0, len(frame), len(levels)):
                token = 0
                for digit, level in reversed(list(zip(frame[start:], levels, strict=False))):
                    token = token * level + digit
                tokens.append(token)
            frames.append(tokens)
    return frames
