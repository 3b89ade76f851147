"""FFmpeg decoder for containers that libsndfile does not read (MP4, WebM ...)."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from nemo_lfr.errors import AudioError, install_command, shorten
from nemo_lfr.io.shortage import missing_extra

# FFmpeg names of the allowed demuxers. Playlists, which refer to other files, are excluded.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,asf,aac,amr,mp3,ogg,wav,w64,flac,aiff,au,caf,mpegts,avi,flv,mpeg,"
    "ac3,eac3,dts,dtshd,wv,tta,ape,mpc,mpc8,tak,truehd,mlp,loas,rm,nut,dsf,iff,qcp,sox,nistsphere,shn,xwma,oma,voc"
)

# Demuxers of raw frames, whose duration FFmpeg estimates from the bit rate of the first frames.
_ESTIMATED = {"aac", "ac3", "eac3", "dts", "dtshd", "loas", "mp3", "truehd", "mlp", "amr"}
# Matroska and WebM, ASF, AMR, Flash video, MPEG transport and program streams, then codecs with their own file
# formats.
_MAGIC = (
    *(b"\x1a\x45\xdf\xa3", b"\x30\x26\xb2\x75", b"#!AMR", b"FLV\x01", b"\x47\x40", b"\0\0\x01\xba"),
    *(b"\x0b\x77", b"\x7f\xfe\x80\x01", b"DTSHDHDR", b"wvpk", b"TTA1", b"TTA2", b"MAC ", b"MP+", b"MPCK", b"tBaK"),
    *(b"\x56\xe0", b"\x56\xe1", b"\x56\xe2", b".RMF", b"nut/multimed", b"DSD ", b"FRM8", b".SoX", b"XoS.", b"ajkg"),
    *(b"ea3", b"EA3"),
)


def looks_like_media(head: bytes) -> bool:
    """Return whether the first 16 bytes of a file are those of a supported container."""
    return (
        head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        or head.startswith(_MAGIC)
        or (head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"QLCM", b"XWMA"))
        or head[4:8] in (b"\xf8\x72\x6f\xba", b"\xf8\x72\x6f\xbb")  # TrueHD, MLP
        or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0)  # AAC in ADTS frames
    )


class MediaDecoder:
    """Decoder of the first audio track of a file.

    Args:
        source: the file, seekable; the decoder does not close it.

    Attributes:
        rate: sample rate in Hz.
        channels: number of channels.
        num_frames: always None, since the durations in containers are approximate.

    Raises:
        MissingExtraError: if PyAV is not installed.
        AudioError: if FFmpeg cannot read the file, or the file has no audio track.
    """

    num_frames: int | None = None
    is_exact = True

    def __init__(self, source: BinaryIO) -> None:
        try:
            import av
        except Exception as error:  # importing PyAV may raise anything
            raise missing_extra(error, "PyAV", f"PyAV is not installed: {install_command('av')}") from error
        self._av: Any = av
        self._source = source
        self._container: Any = None
        self._open()

    def _open(self) -> None:
        self._source.seek(0)
        options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "pipe"}
        try:
            # Pass a file object: FFmpeg would interpret a name as a protocol and open other resources.
            self._container = self._av.open(self._source, metadata_errors="ignore", container_options=options)
            tracks = self._container.streams.audio
            if not tracks:
                raise AudioError("it has no audio track")
            track = tracks[0]
            if track.codec_context is None:
                raise AudioError("nothing decodes its audio track")
            track.thread_type = "NONE"
            self.rate, self.channels = int(track.rate or 0), int(track.channels or 0)
            if not self.rate or not self.channels:
                raise AudioError("its audio track has no sample rate")
            layout = track.layout.name
            self._resampler = self._av.AudioResampler(format="flt", layout=layout, rate=self.rate)
        except (self._av.FFmpegError, ValueError, OSError, MemoryError) as error:
            self.close()
            if isinstance(error, AudioError):
                raise
            raise AudioError(_reason(error)) from error
        is_known = self._container.format.name not in _ESTIMATED
        self._expected = self._container.duration if is_known else None  # microseconds
        self._blocks = self._decode(track)
        self._waiting = np.zeros((0, self.channels), np.float32)
        self._position = 0

    def _decode(self, track: Any) -> Iterator[np.ndarray]:
        total = 0
        try:
            for frame in self._container.decode(track):
                for part in self._resampler.resample(frame):
                    total += part.samples
                    yield part.to_ndarray().reshape(-1, self.channels)
            for part in self._resampler.resample(None):
                total += part.samples
                yield part.to_ndarray().reshape(-1, self.channels)
        except (self._av.FFmpegError, ValueError, OSError) as error:
            raise AudioError(f"damaged audio ({_reason(error)})") from error
        # The duration of a container is approximately that of its longest track.
        if self._expected and len(self._container.streams) == 1:
            seconds = self._expected / 1e6
            if total / self.rate < 0.97 * seconds - 0.5:
                raise AudioError(f"was cut short after {total / self.rate:.1f} of {seconds:.1f} s")

    def read(self, count: int) -> np.ndarray:
        """Return the next samples, float32 [up to count, channels]; empty at the end."""
        pieces, size = [self._waiting], len(self._waiting)
        while size < count and (block := next(self._blocks, None)) is not None:
            pieces.append(block)
            size += len(block)
        joined = np.concatenate(pieces) if len(pieces) > 1 else self._waiting
        self._waiting = joined[count:]
        self._position += min(count, len(joined))
        return np.ascontiguousarray(joined[:count], dtype=np.float32)

    def seek(self, position: int) -> None:
        """Seek to a sample by decoding everything before it.

        No other method is exact in every container.
        """
        if position < self._position:
            self.close()
            self._open()
        while self._position < position and len(self.read(min(1 << 16, position - self._position))):
            pass

    def close(self) -> None:
        """Close the decoder, but not the source."""
        if self._container is not None:
            self._container.close()


def _reason(error: Exception) -> str:
    """Return FFmpeg's error message without the file name."""
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)
