"""Range coder (rANS) for symbols with integer frequencies (Duda, arXiv 1311.2540).

The state of the coder is an integer in [2^23, 2^31). A symbol is represented by an interval in [0, 2^15), whose length
is the frequency of the symbol. The encoder processes the symbols from last to first, so that the decoder returns them
from first to last.
"""

import struct
from collections.abc import Iterable

FREQUENCY_BITS = 15
TOTAL = 1 << FREQUENCY_BITS
LOW = 1 << 23  # minimum and initial value of the state
STATE_BYTES = 4
TRUNCATED = "the compressed data ends too early"
WRONG_END = "the compressed data is wrong: after decoding, the coder is not in its initial state"


def encode_intervals(starts: list[int], frequencies: list[int]) -> bytes:
    """Encode symbols, each represented by its interval of [0, 2^15).

    Args:
        starts: first value of each interval, in decoding order.
        frequencies: length of each interval, at least 1.

    Returns:
        The encoded bytes.
    """
    state = LOW
    out = bytearray()
    for start, frequency in zip(reversed(starts), reversed(frequencies), strict=True):
        limit = frequency << 16
        while state >= limit:
            out.append(state & 255)
            state >>= 8
        state = (state // frequency << FREQUENCY_BITS) + state % frequency + start
    out.reverse()
    return struct.pack("<I", state) + bytes(out)


class Decoder:
    """Decoder for the output of `encode_intervals`.

    Args:
        data: the encoded bytes.

    Raises:
        ValueError: if the bytes do not begin with a valid state.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        if len(data) < STATE_BYTES:
            raise ValueError("the compressed data is too short for the state of the coder")
        self.state = int.from_bytes(data[:STATE_BYTES], "little")
        if not LOW <= self.state < LOW << 8:
            raise ValueError(f"the state of the coder is {self.state:#x}, which is out of range")
        self._position = STATE_BYTES

    def take(self, frequencies: Iterable[int]) -> int:
        """Return the next symbol.

        Args:
            frequencies: frequency of each possible symbol.

        Raises:
            ValueError: if the compressed data is truncated.
        """
        state = self.state
        rest = state & (TOTAL - 1)
        symbol = 0
        for frequency in frequencies:
            if rest < frequency:
                break
            rest -= frequency
            symbol += 1
        state = frequency * (state >> FREQUENCY_BITS) + rest
        while state < LOW:
            if self._position == len(self._data):
                raise ValueError(TRUNCATED)
            state = state << 8 | self._data[self._position]
            self._position += 1
        self.state = state
        return symbol

    def finish(self) -> bytes:
        """Return the bytes after the last symbol.

        Raises:
            ValueError: if the state is not the initial state of the encoder. The decoded symbols are then wrong.
        """
        if self.state != LOW:
            raise ValueError(WRONG_END)
        return self._data[self._position :]
