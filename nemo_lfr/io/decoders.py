"""Interface of audio decoders, and the decoder that uses libsndfile."""

from typing import Any, Protocol

import numpy as np
import soundfile

from nemo_lfr.io.containers import UNKNOWN_BYTES


class Decoder(Protocol):
    """What decodes one stream of a file."""

    rate: int
    channels: int
    num_frames: int | None  # samples of a channel; None where only decoding tells
    is_exact: bool  # whether that is all it must give; else about as many

    def read(self, count: int) -> np.ndarray:
        """Return the next samples, [up to count, channels] float32; none at the end."""

    def seek(self, position: int) -> None:
        """Go to a sample."""

    def close(self) -> None:
        """Close what this decoder opened."""


class SndfileDecoder:
    """Decoder of what libsndfile reads.

    Args:
        source: a path, its bytes, a file object or a descriptor, which is then owned.
    """

    def __init__(self, source: Any) -> None:
        self._file = soundfile.SoundFile(source)
        self.rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        unknown = self._file.frames >= UNKNOWN_BYTES // (8 * self.channels)
        self.num_frames: int | None = None if unknown else self._file.frames
        # Encoders of MPEG audio estimate; what its frames say was compared before.
        self.is_exact = self._file.format != "MP3"
        # Beyond the samples of FLAC, which were counted before, libFLAC takes tags and padding for damage.
        self._stops = self._file.format == "FLAC"

    def read(self, count: int) -> np.ndarray:
        if self._stops and self.num_frames is not None:
            count = min(count, self.num_frames - self._file.tell())
        # Into a buffer: without one, soundfile reads no more than the header promises.
        return self._file.read(out=np.empty((count, self.channels), np.float32))

    def seek(self, position: int) -> None:
        self._file.seek(position)

    def close(self) -> None:
        self._file.close()


def sndfile_reason(error: Exception) -> str:
    """Return the reason that an exception of soundfile reports, without the file name in front of it."""
    return str(error).rpartition(": ")[2].rstrip(".")
