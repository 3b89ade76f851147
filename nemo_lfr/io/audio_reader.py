"""Read audio files block by block as mono float32 samples at any sample rate."""

import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from nemo_lfr.errors import AudioError, MissingExtraError, install_command
from nemo_lfr.io.containers import Splice, Stream, find_mpeg, looks_like_media, unchecked_format
from nemo_lfr.io.containers.cache import cached_streams
from nemo_lfr.io.decoders import Decoder, LimitedDecoder, ScaledDecoder, SndfileDecoder, sndfile_reason
from nemo_lfr.io.media import MediaDecoder
from nemo_lfr.io.regular import POINTER, POINTER_PROBLEM, not_a_file
from nemo_lfr.io.resampling import Resampler, check_peak, check_rate, count_samples, resample

logger = logging.getLogger(__name__)

BLOCK_SECONDS = 10
# First bytes of formats that libsndfile reads. If libsndfile fails, FFmpeg is tried, since it supports more codecs.
FFMPEG_FALLBACK_MAGIC = (b"OggS", b"fLaC", b"RIFF", b"FORM", b".snd", b"caff", b"riff", b"NIST")
PIPE_LENGTH = "the length of a pipe is not known in advance; write the audio to a file"
TO_WAV = "convert it to WAV, for example with ffmpeg"
_TOO_FEW = f"libsndfile decodes only {{1}} of at least {{0}} samples (damage or a variable bit rate); {TO_WAV}"
# Maximum number of values (samples x channels) to read at a time. A header may declare thousands of channels.
MAX_BLOCK = 1 << 24


class AudioReader:
    """Read an audio file as mono float32 blocks at `sample_rate`.

    All samples in the file are read, including recordings that were appended with `cat`. Small faults, such as an
    incomplete last frame or a gap in the time stamps, are logged as warnings.

    Args:
        path: the file.
        sample_rate: sample rate of the result in Hz; None for the file's own rate.
        data: bytes of an audio file in memory, or the file descriptor of a pipe that supplies a WAV file with PCM
            samples. The reader closes the descriptor. If `data` is passed, `path` is only a name for messages.
        name: name of the file for messages (default: `path`).

    Attributes:
        native_rate: sample rate in Hz of the first recording in the file.
        channels: number of channels in the first recording.
        sample_rate: sample rate in Hz of the samples that `blocks` and `segment` return.
        samples_read: number of samples that `blocks` has yielded.
        problem_at_end: function that returns an error message or None. `blocks` calls it at the end of the audio, and
            raises AudioError with the message. Set it to check the data from a pipe.

    Raises:
        AudioError: if the file is missing, is not audio, is truncated or damaged, or has an invalid peak (see
            `check_peak`). Some faults are found only when samples are read.
        MissingExtraError: if the format needs PyAV, which is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sample_rate: int | None,
        data: bytes | int | None = None,
        name: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = str(path) if name is None else name
        self.problem_at_end: Callable[[], str | None] = lambda: None
        self.samples_read = 0
        if data is None and (problem := not_a_file(self.path)):
            raise AudioError(f"{self.name}: {problem}.")
        self._source: BinaryIO | None = None
        self._decoder: Decoder | None = None
        self._spooled: tempfile.TemporaryDirectory[str] | None = None
        self._index = 0
        self._extents: dict[int, tuple[int, int]] = {}  # cache: from stream to number of samples and sample rate
        self._notes: dict[int, str | None] = {}  # from stream to warning, for streams whose samples were counted
        try:
            if isinstance(data, int):
                self._pipe: int | None = data
                self._streams = [Stream([], is_file=True)]
            else:
                self._pipe = None
                self._source = io.BytesIO(data) if data is not None else self.path.open("rb")
                self._streams = cached_streams(self._source)
            if problem := next((stream.problem for stream in self._streams if stream.problem), None):
                raise AudioError(f"{problem}.")
            first = self._open(0)
            if isinstance(first, SndfileDecoder) and first.is_mpeg and not self._streams[0].by_name:
                first = self._open_mpeg(first)
            self.native_rate, self.channels = first.rate, first.channels
            check_rate(self.native_rate)
            self.sample_rate = self.native_rate if sample_rate is None else sample_rate
        except BaseException as error:
            self.close()
            if not isinstance(error, AudioError | MissingExtraError | OSError):
                raise
            reason = (error.strerror or str(error)) + "." if isinstance(error, OSError) else str(error)
            kind = MissingExtraError if isinstance(error, MissingExtraError) else AudioError
            raise kind(f"{self.name}: {reason}") from error

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing it again has no effect."""
        for opened in (self._decoder, self._source):
            if opened is not None:
                opened.close()
        if self._spooled is not None:
            self._spooled.cleanup()
        self._decoder = self._source = self._spooled = None

    @property
    def _file_name(self) -> Path | bytes:
        """Path to pass to libsndfile. It is bytes on POSIX systems, where a file name need not be valid UTF-8."""
        return self.path if os.name == "nt" else os.fsencode(self.path)

    def _open(self, index: int) -> Decoder:
        """Open a decoder at the first sample of a stream.

        Raises:
            AudioError: if neither libsndfile nor FFmpeg can decode the stream, or if samples are missing.
        """
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        stream = self._streams[index]
        if self._pipe is not None:
            source: Any = self._pipe
        elif stream.is_file and not isinstance(self._source, io.BytesIO) and not self._is_misnamed(stream):
            source = self._file_name
        else:
            assert self._source is not None
            source = self._source if stream.is_file else Splice(self._source, stream)
            source.seek(0)
            if stream.by_name:
                source = self._spool(source)
        try:
            self._decoder = SndfileDecoder(source, stream.tail)
        except (soundfile.LibsndfileError, TypeError) as error:
            self._decoder = self._open_with_ffmpeg(error, stream)
        if isinstance(self._decoder, SndfileDecoder) and self._decoder.is_headerless:
            raise AudioError(
                f"not an audio file: it has no header, and its suffix alone does not define an encoding; {TO_WAV}."
            )
        count = self._decoder.num_frames
        if count is not None and count < stream.least_samples:
            raise AudioError(f"{_TOO_FEW.format(stream.least_samples, count)}.")
        if stream.gain is not None and stream.gain != 1:
            self._decoder = ScaledDecoder(self._decoder, stream.gain)
        if stream.num_samples is not None:
            self._decoder = LimitedDecoder(self._decoder, stream.num_samples)
        self._index = index
        return self._decoder

    def _is_misnamed(self, stream: Stream) -> bool:
        """Return whether the suffix of a file would mislead the decoder.

        If a file in another format is named .mp3, libmpg123 searches it for MPEG frames and prints messages to stderr.
        For a file named .raw, soundfile requires a sample rate.
        """
        suffix = self.path.suffix.lower()
        return suffix == ".raw" or (suffix == ".mp3" and not stream.is_checked)

    def _open_mpeg(self, first: SndfileDecoder) -> Decoder:
        """Open MPEG audio that follows other bytes.

        If there are no frames, return `first`, libsndfile's decoder for the file, which only estimates the number of
        samples.
        """
        if self._source is None or not (streams := find_mpeg(self._source)):
            return first
        self._streams = streams
        if problem := next((stream.problem for stream in streams if stream.problem), None):
            raise AudioError(f"{problem}.")
        return self._open(0)

    def _spool(self, source: BinaryIO | Splice) -> str:
        """Copy a stream to a temporary file and return its name."""
        if self._spooled is not None:
            self._spooled.cleanup()
        # A temporary folder, since libsndfile on Windows cannot open a NamedTemporaryFile that is still open.
        self._spooled = tempfile.TemporaryDirectory(prefix="nemo-lfr-")
        path = os.path.join(self._spooled.name, "audio")
        with open(path, "wb") as file:
            while piece := source.read(1 << 20):
                file.write(piece)
        return path

    def _open_with_ffmpeg(self, error: Exception, stream: Stream) -> Decoder:
        """Open a stream with FFmpeg. `error` is the exception that libsndfile raised for the same stream."""
        reason = sndfile_reason(error)
        refused = AudioError(f"not an audio file that libsndfile reads ({reason}); if it is audio, {TO_WAV}.")
        if self._source is None:
            raise refused from error
        source: Any = self._source if stream.is_file else Splice(self._source, stream)
        source.seek(0)
        head = source.read(max(16, len(POINTER)))
        if not head or head.startswith(POINTER):
            problem = POINTER_PROBLEM if head else "the file is empty; copy or record it again"
            raise AudioError(f"{problem}.") from error
        if name := unchecked_format(head := head[:16]):
            problem = f"the format {name} is not supported because truncated files cannot be detected; {TO_WAV}."
            raise AudioError(problem) from error
        if not stream.is_checked or not (looks_like_media(head) or head[:4] in FFMPEG_FALLBACK_MAGIC):
            raise refused from error
        try:
            return MediaDecoder(source)
        except MissingExtraError as missing:
            if not looks_like_media(head):
                raise refused from error
            if not isinstance(missing.__cause__, ModuleNotFoundError):
                raise MissingExtraError(f"libsndfile does not read this file ({reason}), and {missing}") from missing
            raise MissingExtraError(
                f"libsndfile does not read this file ({reason}); MP4, WebM, AAC, WMA and AMR need "
                f"PyAV: {install_command('av')}"
            ) from missing
        except AudioError as other:
            raise AudioError(f"not an audio file that libsndfile or FFmpeg reads ({other}).") from error

    @property
    def duration(self) -> float:
        """Duration in seconds. If the headers do not state it, the file is decoded."""
        return sum(count / rate for count, rate in map(self._extent, range(len(self._streams))))

    def _extent(self, index: int) -> tuple[int, int]:
        """Return the number of samples in a stream and its sample rate in Hz; the result is cached."""
        if index not in self._extents:
            if self._decoder is None or index != self._index:
                if self._pipe is not None:
                    raise AudioError(f"{self.name}: {PIPE_LENGTH}.")
                self._reopened(index)
            decoder = self._decoder
            assert decoder is not None
            count = decoder.num_frames
            if count is None:
                if self._pipe is not None:
                    raise AudioError(f"{self.name}: {PIPE_LENGTH}.")
                decoder = self._reopened(index)
                count, self._notes[index] = self._count(decoder), decoder.note
                self._reopened(0)
            self._extents[index] = count, decoder.rate
        return self._extents[index]

    def _reopened(self, index: int) -> Decoder:
        try:
            return self._open(index)
        except AudioError as error:
            raise type(error)(f"{self.name}: {error}") from error

    def _count(self, decoder: Decoder) -> int:
        count = 0
        while block := len(self._decode(decoder, MAX_BLOCK // decoder.channels // 16)):
            count += block
        return count

    def _decode(self, decoder: Decoder, count: int) -> np.ndarray:
        """Decode up to `count` samples [n, channels]. Error messages begin with the name of the file."""
        try:
            return decoder.read(count)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{self.name}: the audio is damaged ({sndfile_reason(error)}).") from error
        except AudioError as error:
            raise AudioError(f"{self.name}: {error}.") from error

    def segment(self, start: float, duration: float) -> np.ndarray:
        """Read a segment of the file as mono samples.

        Args:
            start: start in seconds.
            duration: duration in seconds. A segment that extends beyond the end of the file is shortened.

        Returns:
            Samples [T_audio] at `sample_rate`.

        Raises:
            AudioError: if the audio is damaged or truncated, or its peak is not valid (see `check_peak`).
        """
        pieces = [np.zeros(0, np.float32)]
        for rate, block in self._read_seconds(start, duration):
            wave = self._mix(block)
            pieces.append(resample(wave, rate, self.sample_rate) if rate != self.sample_rate and len(wave) else wave)
        return np.concatenate(pieces)

    def channels_of(self, start: float, duration: float) -> np.ndarray:
        """Read a segment of the file without mixing or resampling.

        Args:
            start: start in seconds.
            duration: duration in seconds. A segment that extends beyond the end of the file is shortened.

        Returns:
            Samples [channels, T_audio] at `native_rate`.

        Raises:
            AudioError: if the audio is damaged or its peak is not valid (see `check_peak`), or if the recordings in
                the file differ in sample rate or number of channels.
        """
        blocks = [np.zeros((0, self.channels), np.float32)]
        for rate, block in self._read_seconds(start, duration):
            if (rate, block.shape[1]) != (self.native_rate, self.channels):
                raise AudioError(
                    f"{self.name}: the file consists of several recordings that differ in sample rate or number of "
                    f"channels; {TO_WAV}."
                )
            check_peak(float(np.abs(block).max(initial=0.0)), f"{self.name}: the audio")
            blocks.append(block)
        return np.concatenate(blocks).T

    def _read_seconds(self, start: float, duration: float) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the sample rate and the samples [n, channels] of a segment, one pair per joined recording in it."""
        for index in range(len(self._streams)):
            count, rate = self._extent(index)
            first = min(count_samples(start, rate), count) if start > 0 else 0
            wanted = min(count_samples(duration, rate), count - first) if duration > 0 else 0
            if wanted > 0:
                yield rate, self._read_stream(index, first, wanted)
                if first + wanted == count:
                    for note in filter(None, (self._streams[index].note, self._notes.get(index))):
                        logger.warning("%s: %s.", self.name, note)
                duration -= (count - first) / rate
            start -= count / rate
            if duration <= 0:
                break

    def _read_stream(self, index: int, first: int, count: int) -> np.ndarray:
        decoder = self._decoder if index == self._index and self._decoder is not None else self._reopened(index)
        try:
            decoder.seek(first)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{self.name}: the audio is damaged ({sndfile_reason(error)}).") from error
        block = self._decode(decoder, count)
        if isinstance(decoder, LimitedDecoder) and len(block) < count:
            self._check_count(decoder, first + len(block))
        return block

    def _mix(self, block: np.ndarray) -> np.ndarray:
        """Mix samples [n, channels] down to mono [n] and check their peak."""
        wave: np.ndarray = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        check_peak(float(np.abs(wave).max(initial=0.0)), f"{self.name}: the audio")
        return wave

    def blocks(self, seconds: float = BLOCK_SECONDS) -> Iterator[np.ndarray]:
        """Yield the whole file as consecutive blocks of mono samples [n] at `sample_rate`.

        The attribute `samples_read` counts the samples that were yielded.

        Args:
            seconds: number of seconds to decode at a time. If the audio is resampled, the blocks vary in length.

        Raises:
            AudioError: if the audio is damaged, `check_peak` rejects it, or `problem_at_end` returns a message.
        """
        resampler: Resampler | None = None
        rate = self.sample_rate
        for index in range(len(self._streams)):
            if index != self._index or self._decoder is None:
                self._reopened(index)
            decoder = self._decoder
            assert decoder is not None
            decoder.seek(0)  # a segment may have been read before
            if note := self._streams[index].note:
                logger.warning("%s: %s.", self.name, note)
            if decoder.rate != rate:  # concatenated recordings of the same rate are resampled as one signal
                yield from self._counted(resampler.push(np.zeros(0, np.float32), last=True) if resampler else None)
                rate = decoder.rate
                resampler = Resampler(rate, self.sample_rate) if rate != self.sample_rate else None
            size, num_read = max(1, min(round(seconds * rate), MAX_BLOCK // decoder.channels)), 0
            while len(block := self._decode(decoder, size)):
                num_read += len(block)
                wave = self._mix(block)
                yield from self._counted(resampler.push(wave) if resampler else wave)
            self._check_count(decoder, num_read)
            if decoder.note:
                logger.warning("%s: %s.", self.name, decoder.note)
        if problem := self.problem_at_end():
            raise AudioError(f"{self.name}: {problem}.")
        yield from self._counted(resampler.push(np.zeros(0, np.float32), last=True) if resampler else None)

    def _counted(self, wave: np.ndarray | None) -> Iterator[np.ndarray]:
        if wave is not None and len(wave):
            self.samples_read += len(wave)
            yield wave

    def _check_count(self, decoder: Decoder, num_read: int) -> None:
        """Raise AudioError if fewer samples were read than the header declares, or than `Stream.least_samples`.

        The header may declare up to `decoder.slack` samples too many.
        """
        expected = decoder.num_frames
        if expected is not None and num_read < expected - decoder.slack:
            raise AudioError(f"{self.name}: the audio was truncated after {num_read} of {expected} samples.")
        if num_read < (least := self._streams[self._index].least_samples):
            raise AudioError(f"{self.name}: {_TOO_FEW.format(least, num_read)}.")
