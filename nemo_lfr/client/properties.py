"""Properties of the codec that the server reports when it accepts a stream."""

from abc import ABC, abstractmethod


class CodecProperties(ABC):
    """Base class with the properties of a stream's codec.

    Each property raises `NemoLfrError` while the stream is not open.
    """

    @abstractmethod
    def _property(self, name: str) -> int:
        """Return the value of a key in the server's first message."""

    @property
    def sample_rate(self) -> int:
        """Sample rate of the codec, Hz."""
        return self._property("sample_rate")

    @property
    def samples_per_frame(self) -> int:
        """Number of samples per frame."""
        return self._property("samples_per_frame")

    @property
    def num_codebooks(self) -> int:
        """Number of tokens per frame."""
        return self._property("num_codebooks")

    @property
    def codebook_size(self) -> int:
        """Number of entries in a codebook; 0 <= token < codebook_size."""
        return self._property("codebook_size")

    @property
    def delay_frames(self) -> int:
        """Number of later frames that must arrive before the result for a frame is returned."""
        return self._property("lookahead_frames")
