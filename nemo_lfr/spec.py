"""`CodecSpec`, the description of tokens that codecs, token files, corpora and exported models share."""

import math
from dataclasses import dataclass
from typing import Protocol

from nemo_lfr import frames
from nemo_lfr.errors import shorten

MAX_TEXT = 200  # maximum number of characters in a text field of a file
# Version 3 of the bundled codec has several fingerprints, because at first, they depended on the CPU; see
# docs/model-card.md.
VERSION_3 = frozenset(("5b64da27f63acf8e", "c0f0d7d8b4576f2b", "54c43a1d06a541eb"))


@dataclass(frozen=True)
class CodecSpec:
    """Description of tokens and of the codec that produced them.

    The order of the fields is the order of the values in `.lfr` files and `tokens.json`.

    Attributes:
        sample_rate: sample rate of the audio, Hz.
        samples_per_frame: number of samples per frame.
        levels: number of FSQ levels in each dimension of one codebook.
        num_codebooks: number of codebooks C, which is also the number of tokens in one frame.
        fingerprint: hash of the codec's weights and settings, 16 hex digits; empty if unknown.
        precision: precision in which the encoder ran, such as "fp32"; empty if unknown.
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
        """Number of entries in one codebook; 0 <= token < codebook_size."""
        return math.prod(self.levels)

    @property
    def zero_token(self) -> int:
        """Token whose code is zero in every dimension. Decoding uses this token for codebooks that are left out."""
        return sum(level // 2 * math.prod(self.levels[:place]) for place, level in enumerate(self.levels))

    @property
    def bit_rate(self) -> float:
        """Bits per second: frame_rate * num_codebooks * log2(codebook_size)."""
        return self.frame_rate * frames.bits_per_frame(self.levels, self.num_codebooks)

    @property
    def bytes_per_frame(self) -> int:
        """Number of bytes in a packed frame; see `frames.bytes_per_frame`."""
        return frames.bytes_per_frame(self.levels, self.num_codebooks)

    def validate(self) -> None:
        """Validate values that were read from a file.

        Raises:
            ValueError: for the first invalid value.
            TypeError: if `levels` is not a sequence.
        """
        for name, high in (("sample_rate", 1_000_000), ("samples_per_frame", 1_000_000), ("num_codebooks", 256)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= high:
                raise ValueError(f"{name} is {value!r}; expected an integer from 1 to {high}")
        if not 1 <= len(self.levels) <= 16 or not all(
            type(level) is int and 2 <= level <= 4096 for level in self.levels
        ):
            raise ValueError(f"levels are {shorten(self.levels)}; expected 1 to 16 integers from 2 to 4096")
        for name in ("fingerprint", "precision"):
            check_text(name, getattr(self, name))
        if self.codebook_size > 2**31:
            raise ValueError(
                f"levels {self.levels!r} give {self.codebook_size} codebook entries; the limit is {2**31}"
            )


class KnownCodec(Protocol):
    """Interface of a codec, with the members that readers and writers of token files need."""

    @property
    def name(self) -> str:
        """Name of the codec for messages: usually the path or Hub name of its checkpoint."""

    @property
    def spec(self) -> CodecSpec:
        """Description of the tokens: sample rate, frame size, levels and codebooks."""

    def made(self, fingerprint: str) -> bool:
        """Return whether tokens with this fingerprint were made by this codec."""


def same_fingerprint(first: str, second: str) -> bool:
    """Return whether two fingerprints are equal, or both belong to version 3 of the bundled codec; see `VERSION_3`."""
    return first == second or {first, second} <= VERSION_3


def check_text(name: str, value: object) -> None:
    """Validate a text field that was read from a file.

    Args:
        name: name of the field, for the message.
        value: value of the field.

    Raises:
        ValueError: if the value is not a string of at most `MAX_TEXT` printable characters.
    """
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(
            f"{name} is {shorten(repr(value))}; expected a string of at most {MAX_TEXT} printable characters"
        )
