"""The interface of audio decoders, and the decoder that uses libsndfile."""

from typing import Any, Protocol

import numpy as np
import soundfile

from nemo_lfr.io.containers import UNKNOWN_BYTES
from nemo_lfr.io.seekable import SeekableBytes, SeekableFile

# libsndfile's error codes for files whose format it does not recognize. The message of the second one, "File does not
# exist or is not a regular file (possibly a pipe?)", is wrong for a file that was just opened.
_NO_FORMAT = (1, 7)


class Decoder(Protocol):
    """Interface of a decoder for one stream of an audio file.

    Attributes:
        rate: sample rate in Hz.
        channels: number of channels.
        num_frames: number of samples per channel; None if it is not known before decoding.
        slack: number of samples by which undamaged audio may be shorter than `num_frames`.
    """

    rate: int
    channels: int
    num_frames: int | None
    slack: int

    @property
    def note(self) -> str | None:
        """Return a warning about audio that is ignored, such as a second track; None if there is none.

        The warning may change until the end of the file has been read.
        """

    def read(self, count: int) -> np.ndarray:
        """Return up to `count` float32 samples, shape [n, channels]; n is 0 at the end."""

    def seek(self, position: int) -> None:
        """Seek to the sample with index `position`, from which `read` then continues."""

    def close(self) -> None:
        """Close the files that this decoder opened."""


# Number of seconds that are decoded before the position of a seek, by libsndfile's name of the codec. After a seek,
# libsndfile itself decodes too few frames before the position, so that the first samples are wrong.
# MPEG_LAYER_III: at the lowest bit rates, a frame needs data of up to 25 frames before it (0.6 s).
# OPUS: in speech, the initial state of the decoder may affect the samples of several seconds. 60 excerpts of speech at
# 24 and 48 kHz were compared with the same samples of the completely decoded files. With 2 s decoded before each
# excerpt, 15 excerpts differed; with 8 s, 4 differed; with 20 s (60 ms of CPU time), none.
_LEAD = {"MPEG_LAYER_I": 1, "MPEG_LAYER_II": 1, "MPEG_LAYER_III": 1, "OPUS": 20, "VORBIS": 0}
# To reach a position at most this many seconds ahead, the samples before it are decoded. In Vorbis audio, a seek of
# libsndfile to such a position would only skip blocks, and the next samples would be wrong.
_AHEAD = 2.5
_VORBIS_BLOCK = 8192  # maximum number of samples in a block


class _Sequential(soundfile.SoundFile):  # type: ignore[misc]  # soundfile declares no types
    """Sound file that declares itself not seekable, because soundfile seeks in a seekable file after every read.

    In MPEG audio, such a seek changes the samples that are read next.
    """

    def seekable(self) -> bool:
        """Return False; see `can_seek`."""
        return False

    def can_seek(self) -> bool:
        """Return whether libsndfile can seek in the file."""
        # In DWVW, a codec for AIFF files, libsndfile can seek only to the beginning, but reports the file as seekable.
        return bool(super().seekable()) and not self.subtype.startswith("DWVW")


class SndfileDecoder:
    """Decoder that uses libsndfile.

    Args:
        source: path as text or bytes, file object, or file descriptor. The decoder closes a file descriptor.
        tail: number of samples at the end to which libsndfile cannot seek; see `Stream.tail`.

    Attributes:
        is_headerless: whether libsndfile found no header and chose the encoding by the file's suffix (.gsm, .vox).
            See `Decoder` for the other attributes.
    """

    note: str | None = None

    def __init__(self, source: Any, tail: int = 0) -> None:
        is_file_object = hasattr(source, "readinto") and not isinstance(source, SeekableBytes)
        self._source = SeekableFile(source) if is_file_object else source
        self._open()
        self.rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        unknown = self._file.frames >= UNKNOWN_BYTES // (8 * self.channels)
        self.num_frames: int | None = None if unknown else self._file.frames
        self.is_mpeg: bool = self._file.format == "MP3"
        # The length of MPEG audio is an estimate. `find_streams` has already compared it with the frames. In Vorbis
        # that was copied from WebM, the last time stamp is up to one block late.
        is_vorbis = self._file.subtype == "VORBIS"
        self.slack: int = (self.num_frames or 0) // 100 if self.is_mpeg else _VORBIS_BLOCK if is_vorbis else 0
        self.is_headerless = self._file.format == "RAW"
        # libFLAC reports tags and padding after the last sample as damage, so reading stops before them.
        self._stops_at_end = self._file.format == "FLAC"
        lead = _LEAD.get(self._file.subtype)
        self._lead = 0 if lead is None else lead * self.rate
        self._ahead = 0 if lead is None else round(_AHEAD * self.rate)
        self._last_seek = None if self.num_frames is None else max(0, self.num_frames - tail)

    def _open(self) -> None:
        self._file = _Sequential(self._source)
        self._position = 0
        # If the time stamps of Opus audio do not begin at 0, libsndfile drops the padding before the first sample only
        # after a seek.
        if self._file.subtype == "OPUS" and self._file.can_seek():
            self._file.seek(0)

    def read(self, count: int) -> np.ndarray:
        """Return up to `count` float32 samples, shape [n, channels]; n is 0 at the end."""
        if self._stops_at_end and self.num_frames is not None:
            count = min(count, self.num_frames - self._position)
        # `out`, since soundfile would otherwise return at most the number of samples that the header declares.
        samples: np.ndarray = self._file.read(out=np.empty((count, self.channels), np.float32))
        self._position += len(samples)
        return samples

    def seek(self, position: int) -> None:
        """Continue reading at the sample with index `position`.

        `read` then returns the samples that decoding from the beginning gives (in Opus audio almost always; see
        `_LEAD`).
        """
        start = position - self._lead
        if self._last_seek is not None:
            start = min(start, self._last_seek)
        if position < self._position or (self._file.can_seek() and self._position + self._ahead < start):
            self._seek_before(max(0, start))
        while self._position < position and len(self.read(min(position - self._position, 1 << 16))):
            pass

    def _seek_before(self, start: int) -> None:
        """Seek to the sample with index `start`, or to the first one if libsndfile cannot seek."""
        # A seek to the first sample of Opus audio skips the padding before it, which the decoder needs.
        if self._file.can_seek() and (start > 0 or not self._lead):
            self._position = self._file.seek(start)
            return
        self._file.close()
        if hasattr(self._source, "seek"):
            self._source.seek(0)
        self._open()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _WrappedDecoder:
    """Base class of decoders that change the samples of another decoder. See `Decoder` for the attributes."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.rate, self.channels = decoder.rate, decoder.channels
        self.num_frames, self.slack = decoder.num_frames, decoder.slack

    @property
    def note(self) -> str | None:
        """Return `note` of the inner decoder."""
        return self._decoder.note

    def seek(self, position: int) -> None:
        """Seek to the sample with index `position`, from which `read` then continues."""
        self._decoder.seek(position)

    def close(self) -> None:
        """Close the inner decoder."""
        self._decoder.close()


class ScaledDecoder(_WrappedDecoder):
    """Decoder that multiplies the samples of another decoder by a factor.

    Args:
        decoder: the inner decoder.
        gain: the factor.
    """

    def __init__(self, decoder: Decoder, gain: float) -> None:
        super().__init__(decoder)
        self._gain = np.float32(gain)

    def read(self, count: int) -> np.ndarray:
        """Return up to `count` float32 samples, shape [n, channels]; n is 0 at the end."""
        samples: np.ndarray = self._decoder.read(count) * self._gain
        return samples


class LimitedDecoder(_WrappedDecoder):
    """Decoder that stops after a number of samples.

    Args:
        decoder: the inner decoder, which may return more samples.
        num_frames: number of samples per channel.
    """

    def __init__(self, decoder: Decoder, num_frames: int) -> None:
        super().__init__(decoder)
        self.num_frames, self.slack = num_frames, 0
        self._position, self._end = 0, num_frames

    def read(self, count: int) -> np.ndarray:
        """Return up to `count` float32 samples, shape [n, channels]; n is 0 at the end."""
        samples = self._decoder.read(max(0, min(count, self._end - self._position)))
        self._position += len(samples)
        return samples

    def seek(self, position: int) -> None:
        """Seek to the sample with index `position`, from which `read` then continues."""
        super().seek(position)
        self._position = position


def sndfile_reason(error: Exception) -> str:
    """Return why soundfile cannot read a file, without the file name, such as "unknown format"."""
    if getattr(error, "code", None) in _NO_FORMAT:
        return "unknown format"
    return str(error).rpartition(": ")[2].rstrip(".")
