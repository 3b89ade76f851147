"""What the tokens of a codec are: the record that codecs, token files, corpora and exported models share."""

import math
from dataclasses import dataclass
from typing import Protocol

from nemo_lfr import frames
from nemo_lfr.errors import shorten

MAX_TEXT = 200  # characters of a text in a file


@dataclass(frozen=True)
class CodecSpec:
    """What tokens stand for, and which codec made them.

    The order of the fields is that of the values in `.lfr` files and `tokens.json`.

    Attributes:
        sample_rate: Hz.
        samples_per_frame: samples that one frame stands for.
        levels: FSQ levels of each dimension of one codebook.
        num_codebooks: C, the tokens of one frame.
        fingerprint: hash of the codec's weights and settings, 16 hex digits; empty if it is not known.
        precision: of the network that made the tokens; "fp32" gives the reference tokens.
    """

    sample_rate: int
    samples_per_frame: int
    levels: tuple[int, ...]
    num_codebooks: int
    fingerprint: str = ""
    precision: str = "fp32"

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.samples_per_frame

    @property
    def codebook_size(self) -> int:
        """Entries of one codebook; 0 <= token < codebook_size."""
        return math.prod(self.levels)

    @property
    def bit_rate(self) -> float:
        """Bits per second: frame_rate * num_codebooks * log2(codebook_size)."""
        return self.frame_rate * frames.bits_per_frame(self.levels, self.num_codebooks)

    @property
    def bytes_per_frame(self) -> int:
        """Bytes that hold any frame as one mixed-radix number."""
        return frames.bytes_per_frame(self.levels, self.num_codebooks)

    def validate(self) -> None:
        """Check values that came from a file.

        Raises:
            ValueError: naming the first value that no codec has.
            TypeError: if `levels` is not a sequence.
        """
        for name, high in (("sample_rate", 1_000_000), ("samples_per_frame", 1_000_000), ("num_codebooks", 256)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= high:
                raise ValueError(f"{name} is {value!r}")
        if not 1 <= len(self.levels) <= 16 or not all(
            type(level) is int and 2 <= level <= 4096 for level in self.levels
        ):
            raise ValueError(f"levels are {self.levels!r}")
        for name in ("fingerprint", "precision"):
            check_text(name, getattr(self, name))
        if self.codebook_size > 2**31:
            raise ValueError(f"a codebook of {self.codebook_size} entries")


class KnownCodec(Protocol):
    """A codec as far as files need to know it."""

    @property
    def name(self) -> str:
        """Where its weights came from, for messages."""

    @property
    def spec(self) -> CodecSpec:
        """What its tokens are."""

    def made(self, fingerprint: str) -> bool:
        """Return whether tokens with this fingerprint are this codec's."""


def check_text(name: str, value: object) -> None:
    """Check a text that came from a file.

    Raises:
        ValueError: if it is not one short printable text.
    """
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(f"{name} is {shorten(repr(value))}")
