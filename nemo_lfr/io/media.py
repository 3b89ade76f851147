"""Decode files that libsndfile does not read (MP4, WebM and others) with FFmpeg."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from nemo_lfr.errors import AudioError, counted, install_command, shorten
from nemo_lfr.io.containers import FRAME_HEAD, PACKET_SIZES, FrameSize, several_tracks
from nemo_lfr.io.containers.opus import OpusTimes
from nemo_lfr.io.shortage import missing_extra

# FFmpeg's names of the allowed demuxers. Playlists are excluded, since they refer to other files. Formats that
# `containers` does not check are excluded too: FFmpeg reads a truncated file as if it were complete.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,asf,aac,amr,mp3,ogg,wav,w64,flac,aiff,au,caf,mpegts,avi,flv,mpeg,"
    "ac3,eac3,dts,wv,tta,loas,rm,iff,sox,nistsphere,voc"
)
# Demuxers for frames without a container. FFmpeg estimates their duration from the bit rate of the first frames.
_ESTIMATED = {"aac", "ac3", "eac3", "dts", "loas", "mp3", "amr"}
# Decoders of frames with checksums. By default, FFmpeg ignores wrong checksums, or replaces such frames by silence.
_CHECKED = {"ac3", "eac3", "dca", "flac", "mlp", "truehd", "tta", "wavpack"}
# Demuxers of streams whose time stamps need not begin at 0. FFmpeg determines their duration from the time stamps.
_RELATIVE = {"mpegts", "mpeg"}
# Gaps up to these lengths in seconds are not reported: between two frames, whose time stamps may be rounded to
# milliseconds; before the first packet; and after the last frame.
_LEAST_GAP, _LEAST_START, _LEAST_END = 0.008, 0.1, 0.03
# Demuxers whose durations may include the padding of the last frame.
_PADDED = {"caf"}
# Demuxers whose durations may be wrong. `containers` compares their chunks with the size of the file.
_UNTIMED = {"avi"}
# Codecs for which each packet of an MP4 file contains one frame. The frame count in the header then counts packets.
_PACKETED = {"aac", "alac", "mp3", "mp3float", "opus", "libopus", "ac3", "eac3", "flac"}
# If time stamps jump back by more seconds than this, another recording begins.
_RESTART = 1.0
# Maximum number of packets at the end of a recorded stream that may be incomplete.
_MAX_SUSPECTS = 32
# A dict from the name of an exception class of PyAV to the reason for the error. The messages of these exceptions say
# nothing about the file.
_REASONS = {
    "InvalidDataError": "invalid data",
    "PermissionError": "invalid data",
    "ArgumentError": "invalid data",
    "BugError": "invalid data",
    "UnknownError": "invalid data",
    "ExternalError": "invalid data",
    "PatchWelcomeError": "data that FFmpeg does not support",
    "NotImplementedError": "data that FFmpeg does not support",
}


class _Gaps:
    """Sum of the gaps between consecutive frames, according to their time stamps.

    Attributes:
        seconds: sum of the gaps in seconds. Overlapping frames reduce the sum, so that jitter cancels out.
        end: end of the last frame in seconds; 0 before the first frame.
    """

    def __init__(self) -> None:
        self.seconds = self.end = 0.0
        self._last: float | None = None  # duration of the last frame

    def begin(self, start: float) -> None:
        """Add the gap before the first packet, whose time stamp is `start` in seconds.

        The time stamp of the first frame is not used, because some decoders yield no frame for the first packet.
        """
        if start > _LEAST_START:
            self.seconds = start

    def add(self, start: float | None, duration: float) -> None:
        """Add a frame.

        Args:
            start: time stamp in seconds. If it is None, the frame starts where the previous one ends.
            duration: duration of the samples in seconds.
        """
        if start is not None and self._last is not None:
            gap = start - self.end
            if abs(gap) > max(_LEAST_GAP, 0.75 * min(duration, self._last)) and gap > -_RESTART:
                self.seconds = max(0.0, self.seconds + gap)
        self.end = (self.end if start is None else start) + duration
        self._last = duration


class MediaDecoder:
    """Decoder that uses FFmpeg to read the first audio track in a file.

    Args:
        source: seekable file; the decoder does not close it.

    Attributes:
        rate: sample rate in Hz.
        channels: number of channels.
        num_frames: always None, since the durations in containers are approximate.
        note: warning about audio that is not read, or None. It may change until the end of the file has been read.

    Raises:
        MissingExtraError: if PyAV is not installed or cannot be imported.
        AudioError: if FFmpeg cannot read the file, or the file has no audio track. `read` also raises it for damaged,
            truncated or empty audio.
    """

    num_frames: int | None = None
    slack = 0

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
                raise AudioError("the file has no audio track")
            track = tracks[0]
            # The tracks of an Ogg file were already counted by `find_streams`.
            self.note = None if self._container.format.name == "ogg" else several_tracks(len(tracks))
            if track.codec_context is None:
                raise AudioError(
                    "FFmpeg has no decoder for the audio track; convert the file to WAV with another program"
                )
            track.thread_type = "NONE"
            if track.codec_context.name in _CHECKED:
                track.codec_context.options = {"err_detect": "crccheck+explode"}
            self.rate, self.channels = int(track.rate or 0), int(track.channels or 0)
            if not self.rate or not self.channels:
                raise AudioError("the audio track declares no sample rate, or no channels")
            layout = track.layout.name
            self._resampler = self._av.AudioResampler(format="flt", layout=layout, rate=self.rate)
        except (self._av.FFmpegError, ValueError, OSError, MemoryError) as error:
            self.close()
            if isinstance(error, AudioError):
                raise
            raise AudioError(_reason(error)) from error
        name, is_single = self._container.format.name, len(self._container.streams) == 1
        # The container states a duration in microseconds, approximately that of its longest track.
        self._expected = self._container.duration if is_single and name not in _ESTIMATED | _UNTIMED else None
        self._starts_at_zero = is_single and name not in _ESTIMATED | _RELATIVE
        is_listed = name.startswith("mov") and track.codec_context.name in _PACKETED
        self._num_listed, self._num_packets = int(track.frames) if is_listed else 0, 0
        self._gaps = _Gaps()
        is_opus = track.codec_context.name in ("opus", "libopus") and name.startswith(("mov", "caf", "matroska"))
        self._opus = OpusTimes() if is_opus else None
        self._end: float | None = None  # end of the last packet in seconds, if the container states its duration
        self._blocks = self._decode(track)
        self._waiting = np.zeros((0, self.channels), np.float32)
        self._position = self._surplus = 0

    def _decode(self, track: Any) -> Iterator[np.ndarray]:
        # Number of samples, end of these samples according to the time stamps, and number of damaged frames.
        total, end, num_corrupt = 0, 0.0, 0
        try:
            for frame in self._frames(track):
                if (frame.sample_rate, frame.layout.nb_channels) != (self.rate, self.channels):
                    raise AudioError(
                        "the audio changes its sample rate or number of channels; convert it to WAV with ffmpeg"
                    )
                self._gaps.add(frame.time, frame.samples / self.rate)
                end = max(end, self._gaps.end)
                num_corrupt += frame.is_corrupt
                for block in self._samples(frame):
                    total += len(block)
                    yield block
            for block in self._samples(None):
                total += len(block)
                yield block
        except (self._av.FFmpegError, ValueError, OSError) as error:
            if isinstance(error, AudioError):
                raise
            raise AudioError(f"the audio is damaged ({_reason(error)})") from error
        if not total:
            raise AudioError("the file is damaged or empty: FFmpeg finds an audio track, but no samples in it")
        end_stated = self._end if self._end is not None or not self._expected else self._expected / 1e6
        if self._opus is not None and (problem := self._opus.problem(end_stated)):
            raise AudioError(problem)
        if num_corrupt:
            self._warn(f"the audio is damaged: FFmpeg reports errors in {counted(num_corrupt, 'frame')}")
        if self._num_packets < self._num_listed:
            self._warn(
                f"only {self._num_packets} of the {self._num_listed} packets of the audio are read; the file was "
                "edited or is damaged"
            )
        if (missing := self._gaps.seconds) > _LEAST_GAP:
            self._warn(
                f"the time stamps of the audio have gaps of {missing:.2f} s in total, which are not filled; the "
                "recording was paused, or the file is damaged"
            )
        # The duration counts from time 0, but the audio may begin later and have pauses.
        if self._expected:
            name, seconds = self._container.format.name, self._expected / 1e6
            reached = max(total / self.rate, 0.0 if name in _RELATIVE else end)
            if reached < 0.97 * seconds - 0.5:
                raise AudioError(f"the audio was truncated after {reached:.1f} of {seconds:.1f} s")
            if name not in _PADDED and reached < (1 - 1e-3) * seconds - _LEAST_END:
                self._warn(f"the audio ends after {reached:.2f} s, but the header declares {seconds:.2f} s")

    def _samples(self, frame: Any) -> Iterator[np.ndarray]:
        """Yield the samples [n, channels] of a frame. If the frame is None, flush the resampler."""
        for part in self._resampler.resample(frame):
            block = part.to_ndarray().reshape(-1, self.channels)
            skipped = min(self._surplus, len(block))
            self._surplus -= skipped
            yield block[skipped:]

    def _frames(self, track: Any) -> Iterator[Any]:
        """Yield the frames of a track.

        An incomplete frame at the end of a transport stream is not decoded, since FFmpeg would invent the missing
        bytes.

        Raises:
            AudioError: if packets other than the last ones are incomplete.
        """
        size_of: FrameSize = PACKET_SIZES.get(track.codec_context.name, lambda _: None)
        suspects: list[Any] = []  # the first incomplete packet and those after it
        time_base = float(track.time_base)
        # In Matroska, FFmpeg takes the duration of a packet from its Opus header.
        states_duration = not self._container.format.name.startswith("matroska")
        for packet in self._container.demux(track):
            if self._starts_at_zero and packet.pts is not None:
                self._gaps.begin(float(packet.pts * packet.time_base))
                self._starts_at_zero = False
            self._num_packets += packet.size > 0
            if self._opus is not None and packet.size and packet.pts is not None:
                self._opus.add(bytes(memoryview(packet)[:2]), packet.pts * time_base)
                if states_duration:
                    self._end = (packet.pts + (packet.duration or 0)) * time_base
            size = size_of(bytes(memoryview(packet)[:FRAME_HEAD])) if packet.size else None
            packet_is_cut = size is not None and packet.size < size
            self._surplus += self._pre_skip(track, packet)
            if not packet.size or (not suspects and not packet.is_corrupt and not packet_is_cut):
                yield from self._tail(suspects, size_of) if not packet.size else ()
                yield from packet.decode()
                continue
            suspects.append(packet)
            if len(suspects) > _MAX_SUSPECTS:
                raise AudioError("the audio is damaged: a packet is incomplete")

    def _pre_skip(self, track: Any, packet: Any) -> int:
        """Return how many more samples must be skipped at the start of Opus audio in Matroska, counted at 48 kHz.

        FFmpeg 8 skips too few samples if the header declares a sample rate below 48 kHz.
        """
        codec = track.codec_context
        if codec.name not in ("opus", "libopus") or not self._container.format.name.startswith("matroska"):
            return 0
        head = codec.extradata or b""
        if not head.startswith(b"OpusHead") or not hasattr(packet, "iter_sidedata"):
            return 0
        skips = [bytes(data)[:4] for data in packet.iter_sidedata() if data.data_type == "skip_samples"]
        skip = int.from_bytes(skips[0], "little") if skips else 0
        return max(0, int.from_bytes(head[10:12], "little") - skip) if skip else 0

    def _tail(self, suspects: list[Any], size_of: FrameSize) -> Iterator[Any]:
        """Yield the frames of the complete packets in `suspects`, the last packets of a file.

        The header of a packet states its size. If packets are incomplete, a warning is stored in `note`.
        """
        lost = 0
        for packet in suspects:
            size = size_of(bytes(memoryview(packet)[:FRAME_HEAD]))
            if size is None or packet.size < size:
                lost += packet.size
            else:
                yield from packet.decode()
        if lost:
            self._warn(f"the audio ends within a frame, as recorded streams do; its last {lost} bytes are ignored")

    def _warn(self, text: str) -> None:
        """Add a warning to `note`."""
        self.note = f"{self.note}; {text}" if self.note else text

    def read(self, count: int) -> np.ndarray:
        """Return up to `count` float32 samples, shape [n, channels]; n is 0 at the end."""
        pieces, size = [self._waiting], len(self._waiting)
        while size < count and (block := next(self._blocks, None)) is not None:
            pieces.append(block)
            size += len(block)
        joined = np.concatenate(pieces) if len(pieces) > 1 else self._waiting
        self._waiting = joined[count:]
        self._position += min(count, len(joined))
        return np.ascontiguousarray(joined[:count], dtype=np.float32)

    def seek(self, position: int) -> None:
        """Seek to the sample with index `position` by decoding all samples before it.

        FFmpeg's own seeking is not exact in every container.
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
    """Return the reason for an error without the file name.

    FFmpeg may report damaged data as an error of the operating system, such as "permission denied".
    """
    if type(error).__module__.startswith("av.") and (reason := _REASONS.get(type(error).__name__)):
        return reason
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)
