"""rANS: symbols with integer frequencies as bytes, and back (Duda, arXiv 1311.2540).

The state is an integer in [2^23, 2^31); frequencies of one symbol's alternatives sum to 2^15. The encoder takes the
symbols from last to first, so that the decoder, which mirrors it step by step, gives them from first to last.
"""

import struct
from collections.abc import Iterable

FREQUENCY_BITS = 15
TOTAL = 1 << FREQUENCY_BITS
LOW = 1 << 23  # the state's lowest value, and its first
STATE_BYTES = 4


def encode_intervals(starts: list[int], frequencies: list[int]) -> bytes:
    """Encode symbols, each given as its interval of [0, 2^15).

    Args:
        starts: first value of each interval, in the order in which they are to be decoded.
        frequencies: length of each interval, at least 1.
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
    """Decode what `encode_intervals` wrote.

    Args:
        data: the bytes.

    Raises:
        ValueError: if they begin with no state.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        if len(data) < STATE_BYTES:
            raise ValueError("it has no room for the coder's state")
        self.state = int.from_bytes(data[:STATE_BYTES], "little")
        if not LOW <= self.state < LOW << 8:
            raise ValueError(f"the coder's state {self.state:#x} is out of range")
        self._position = STATE_BYTES

    def take(self, frequencies: Iterable[int]) -> int:
        """Return the next symbol, one of as many as there are frequencies.

        Raises:
            ValueError: if the bytes end too early.
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
                raise ValueError("its coded digits end too early")
            state = state << 8 | self._data[self._position]
            self._position += 1
        self.state = state
        return symbol

    def finish(self) -> bytes:
        """Return the bytes behind the last symbol.

        Raises:
            ValueError: if the state is not the encoder's first one, so that something else was decoded.
        """
        if self.state != LOW:
            raise ValueError("its coded digits do not end where they should")
        return self._data[self._position :]
