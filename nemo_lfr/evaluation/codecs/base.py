"""Common interface of the codecs that an evaluation compares, and helpers for their implementations."""

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
        num_bytes: size of the payload without a container.
        file_bytes: size of a file in the codec's usual format, including the container.
        encode_seconds: wall-clock time of encoding; for external programs including their startup.
        decode_seconds: wall-clock time of decoding, likewise.
        tokens: token ids, shape [C, T_encoded], or None if the codec has no tokens.
        compressed_bytes: as `num_bytes` with the tokens compressed by an entropy model, or None without a model.
        compressed_file_bytes: as `file_bytes` with the tokens compressed by an entropy model, or None without a model.
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
    """Base class of the compared codecs, each at one setting.

    Attributes:
        kind: prefix of the codec in `--codec`.
        usage: form of its `--codec` value, for the help text, such as "opus:KBIT".
        name: name in tables.
        identity: string that identifies the weights or the version of the program, and thus the results.
        delay: delay of the output in seconds, which `round_trip` compensates.
        levels: FSQ levels of each dimension of a codebook; (size,) for codebooks other than FSQ; () without tokens.

    Args:
        options: text after the colon in `--codec`. Unless a subclass reads it, any text is an error.
        device: PyTorch device; chosen automatically if None.

    Raises:
        NemoLfrError: if the options are invalid, or a program, package or weights are missing.
    """

    kind: ClassVar[str]
    usage: ClassVar[str]
    name: str
    identity: str
    delay: float = 0.0
    levels: tuple[int, ...] = ()

    def __init__(self, options: str = "", device: str | None = None) -> None:
        if options:
            raise NemoLfrError(f"{self.kind}:{options}: {self.kind} has no options; use {self.usage}.")

    @abstractmethod
    def round_trip(self, audio: np.ndarray, rate: int) -> RoundTrip:
        """Encode and decode one recording.

        Args:
            audio: mono samples in [-1, 1], shape [T].
            rate: sample rate of the audio in Hz.

        Returns:
            The reconstruction at the same rate and of the same length, with its sizes in bytes and times in seconds.
        """


def resample_to(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample audio [T]; equal rates return it unchanged."""
    return wave if from_rate == to_rate else resample(wave, from_rate, to_rate)


def fit(wave: np.ndarray, length: int) -> np.ndarray:
    """Trim or zero-pad audio [T] to `length` samples, as float32."""
    return np.pad(wave[:length], (0, max(length - len(wave), 0))).astype(np.float32)


def parse_number(text: str, kind: str, low: float, high: float, unit: str) -> float:
    """Return the number in the options of a codec.

    Args:
        text: the options.
        kind: `kind` of the codec, for the error message.
        low: smallest accepted value.
        high: largest accepted value.
        unit: unit of the number, for the error message.

    Raises:
        NemoLfrError: if `text` is not a number in this range.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise NemoLfrError(f"{kind}:{text}: pass a number of {unit} from {low:g} to {high:g}, as in {kind}:6.")
    return value
