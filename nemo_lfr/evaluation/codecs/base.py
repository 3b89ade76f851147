"""Base class for the codecs that an evaluation compares, and helpers for subclasses."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.audio import resample


@dataclass
class RoundTrip:
    """Result of encoding and decoding one recording.

    Attributes:
        audio: reconstruction, float32, shape [T], with the rate and length of the recording.
        num_bytes: size of the encoded data in bytes, without a container.
        file_bytes: size in bytes of a file in the codec's usual format, including the container.
        encode_seconds: wall-clock time of encoding, including the start of external programs.
        decode_seconds: wall-clock time of decoding, including the start of external programs.
        tokens: token ids, shape [C, T_encoded]; None if the codec has no tokens.
        compressed_bytes: size of the encoded data after compression with an entropy model; None without a model.
        compressed_file_bytes: size of a file with the compressed data; None without an entropy model.
    """

    audio: np.ndarray
    num_bytes: float
    file_bytes: float
    encode_seconds: float
    decode_seconds: float
    tokens: np.ndarray | None = field(default=None, repr=False)
    compressed_bytes: float | None = None
    compressed_file_bytes: float | None = None


class ComparedCodec(ABC):
    """Base class for codecs that an evaluation compares. Each instance has one fixed setting, such as a bit rate.

    Attributes:
        kind: prefix of the codec in `--codec`.
        usage: form of the `--codec` value, such as "opus:KBIT", for the help text.
        name: name of the codec in tables.
        identity: text that identifies the weights, or the version of the program. Stored results are reused only if
            this text is unchanged.
        delay: delay of the codec's output in seconds. `round_trip` compensates for it.
        levels: number of FSQ levels in each dimension of a codebook. If the codec does not use FSQ, the value is (size
            of a codebook,). If the codec has no tokens, the value is ().

    Args:
        options: text after the colon in `--codec`. It must be empty unless a subclass reads it.
        device: PyTorch device; chosen automatically if None.

    Raises:
        NemoLfrError: if the options are invalid, or if a program, a package or weights are missing.
    """

    kind: ClassVar[str]
    usage: ClassVar[str]
    name: str
    identity: str
    delay: float = 0.0
    levels: tuple[int, ...] = ()

    def __init__(self, options: str = "", device: str | None = None) -> None:
        if options:
            raise NemoLfrError(f"--codec {self.kind}:{options}: {self.kind} has no options; use {self.usage}.")

    @abstractmethod
    def round_trip(self, audio: np.ndarray, rate: int) -> RoundTrip:
        """Encode and decode one recording.

        Args:
            audio: mono samples in [-1, 1], shape [T].
            rate: sample rate of the audio in Hz.

        Returns:
            The result. The reconstruction has the sample rate and length of `audio`.
        """


def resample_to(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample audio [T]. If the rates are equal, return the audio unchanged."""
    return wave if from_rate == to_rate else resample(wave, from_rate, to_rate)


def fit(wave: np.ndarray, length: int) -> np.ndarray:
    """Trim or zero-pad audio [T] to `length` samples, and convert it to float32."""
    return np.pad(wave[:length], (0, max(length - len(wave), 0))).astype(np.float32)


def parse_number(text: str, kind: str, low: float, high: float, unit: str) -> float:
    """Parse the options of a codec as a number.

    Args:
        text: the options.
        kind: `kind` of the codec, for the error message.
        low: smallest valid value.
        high: largest valid value.
        unit: unit of the number, for the error message.

    Raises:
        NemoLfrError: if `text` is not a number in this range.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise NemoLfrError(
            f"--codec {kind}{text and f':{text}'}: pass a number of {unit} from {low:g} to {high:g}, for example "
            f"{kind}:6."
        )
    return value
