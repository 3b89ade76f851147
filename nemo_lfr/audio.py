"""Audio files in and out, block by block: any format and rate that libsndfile reads, mixed to mono, resampled."""

import contextlib
import io
import math
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import soundfile

from nemo_lfr.errors import AudioError, NemoLfrError

BLOCK_SECONDS = 10
MIN_RATE, MAX_RATE = 100, 1_000_000  # Hz
# Floating-point recordings overshoot 1 a little; 16-bit numbers that were not divided go far beyond.
MAX_PEAK = 64.0
# What programs write as the length of a WAV file before they know it is this or more.
UNKNOWN_BYTES = 0x7FFF0000
# Numbers read at once, over all channels: a header that tells a million Hz and channels must not take the memory.
MAX_BLOCK = 1 << 24


def resample(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample float32 samples [T] with soxr's highest quality.

    Raises:
        AudioError: if a rate is not a number of Hz that audio has.
    """
    check_rate(from_rate)
    import soxr

    return soxr.resample(wave, from_rate, to_rate, quality="VHQ").astype(np.float32)


def check_rate(rate: object) -> None:
    """Raise AudioError unless `rate` is a number of Hz that audio has."""
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"sample_rate {rate!r} is not a number of Hz between {MIN_RATE} and {MAX_RATE}.")


def check_peak(peak: float, what: str) -> None:
    """Raise AudioError for a peak of samples that no microphone gives, naming `what` they are."""
    if not math.isfinite(peak):
        raise AudioError(f"{what} holds NaN or infinite samples; clean it first.")
    if peak > MAX_PEAK:
        raise AudioError(
            f"{what} reaches {peak:.6g}, but audio lies in [-1, 1]; if these are 16-bit numbers, divide by 32768."
        )


class AudioReader:
    """An audio file as mono float32 blocks at `sample_rate`.

    Args:
        path: the file.
        sample_rate: Hz of what is read.
        data: the file's bytes where it lies in a container, or the descriptor of a pipe that WAV comes through, which
            this reader then owns; `path` is then a name for messages.

    Raises:
        AudioError: if the file is missing, is not audio, or holds NaN.
    """

    def __init__(self, path: str | os.PathLike[str], sample_rate: int, data: bytes | int | None = None) -> None:
        self.path = Path(path)
        self.sample_rate = sample_rate
        self.samples_read = 0
        if data is None and not self.path.is_file():
            raise AudioError(f"{path}: {_not_a_file(self.path)}.")
        try:
            source = _name(self.path) if data is None else io.BytesIO(data) if isinstance(data, bytes) else data
            self._file = soundfile.SoundFile(source)
        except (soundfile.LibsndfileError, TypeError) as error:
            raise AudioError(f"{path}: not an audio file that libsndfile reads ({_reason(error)}).") from error
        self.native_rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        try:
            check_rate(self.native_rate)
            self._check_whole()
        except AudioError as error:
            self._file.close()
            raise AudioError(f"{path}: {error}") from None

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _check_whole(self) -> None:
        """Refuse a file that holds less than its header promises, which libsndfile only notes in its log."""
        for promised, there in re.findall(r"(\d+) \(should be (\d+)\)", self._file.extra_info):
            if int(there) < int(promised) < UNKNOWN_BYTES:
                raise AudioError(f"was cut short: its header promises {promised} bytes, {there} are there.")

    @property
    def duration(self) -> float:
        """Seconds, as the file's header says."""
        return self._file.frames / self.native_rate

    def segment(self, start: float, duration: float) -> np.ndarray:
        """The samples [any] from second `start` on, for `duration` seconds or up to the end.

        Raises:
            AudioError: if it is damaged, or not finite.
        """
        try:
            self._file.seek(min(int(start * self.native_rate), self._file.frames))
            block = self._file.read(math.ceil(duration * self.native_rate), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{self.path}: damaged audio ({_reason(error)}).") from error
        wave = block.mean(axis=1)
        check_peak(float(np.abs(wave).max(initial=0.0)), f"{self.path}:")
        if self.native_rate != self.sample_rate and len(wave):
            wave = resample(wave, self.native_rate, self.sample_rate)
        return wave

    def blocks(self, seconds: float = BLOCK_SECONDS) -> Iterator[np.ndarray]:
        """Consecutive samples [any], read `seconds` at a time; `samples_read` counts them."""
        stream = None
        if self.native_rate != self.sample_rate:
            import soxr

            stream = soxr.ResampleStream(self.native_rate, self.sample_rate, 1, dtype="float32", quality="VHQ")
        size, num_read = max(1, min(round(seconds * self.native_rate), MAX_BLOCK // self.channels)), 0
        while True:
            try:
                block = self._file.read(size, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise AudioError(f"{self.path}: damaged audio ({_reason(error)}).") from error
            wave = block.mean(axis=1)
            check_peak(float(np.abs(wave).max(initial=0.0)), f"{self.path}:")
            last = len(block) == 0
            num_read += len(block)
            # In files it is MP3 whose header may promise more than is there; a hundredth is allowed for estimates.
            if (
                last
                and num_read < (0.99 if self._file.seekable() else 1.0) * self._file.frames
                and self._file.frames < UNKNOWN_BYTES // (8 * self.channels)
            ):
                raise AudioError(f"{self.path}: was cut short after {num_read} of {self._file.frames} samples.")
            if stream is not None:
                wave = stream.resample_chunk(wave, last=last)
            if len(wave):
                self.samples_read += len(wave)
                yield wave
            if last:
                return


class AudioWriter:
    """16-bit mono audio written aside and renamed into place; the format follows the file's suffix.

    Raises:
        NemoLfrError: if the file exists and `overwrite` is not set, or its format is unknown.
    """

    def __init__(self, path: str | os.PathLike[str], sample_rate: int, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        refuse_overwrite(self.path, overwrite)
        kind = self.path.suffix[1:].upper()
        if kind not in soundfile.available_formats():
            raise NemoLfrError(
                f"{path}: {self.path.suffix!r} is not a format that libsndfile writes; use .wav or .flac."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._raw = open_aside(self.path)
        self._sink = _Sink(self._raw)
        try:
            self._file = soundfile.SoundFile(self._sink, "w", sample_rate, 1, format=kind)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            self._raw.close()
            os.unlink(self._raw.name)
            raise AudioError(f"{path}: cannot be written as {kind} at {sample_rate} Hz ({_reason(error)}).") from error

    def __enter__(self) -> "AudioWriter":
        return self

    def write(self, wave: np.ndarray) -> None:
        """Append samples [T]; raises OSError if the disk is full."""
        try:
            self._file.write(wave)
        except (AssertionError, soundfile.LibsndfileError) as error:  # soundfile's words for a failed callback
            self._sink.check(self.path)
            raise AudioError(f"{self.path}: could not be written; what is there of it is removed.") from error
        self._sink.check(self.path)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        aside = Path(self._raw.name)
        try:
            with self._raw:
                self._file.close()
                self._sink.check(self.path)
                self._raw.flush()
                os.fsync(self._raw.fileno())
            if kind is None:
                aside.replace(self.path)
        finally:
            aside.unlink(missing_ok=True)


class _Sink:
    """A file that remembers why it could not be written, since libsndfile's callbacks swallow exceptions."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: BaseException | None = None
        self.read, self.seek, self.tell = file.read, file.seek, file.tell

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except BaseException as error:  # an interrupt too, which would be lost here
            self._error = self._error or error
            return 0

    def check(self, path: Path) -> None:
        if isinstance(self._error, OSError):
            raise OSError(self._error.errno, self._error.strerror, str(path)) from self._error
        if self._error is not None:
            raise self._error


def refuse_overwrite(path: Path, overwrite: bool) -> None:
    """Raise unless `path` is free, or is a file that may be replaced."""
    if path.is_dir():
        raise NemoLfrError(f"{path} is a folder, where a file is to be written; choose another name.")
    if path.exists() and not overwrite:
        raise NemoLfrError(f"{path} exists; pass --overwrite (overwrite=True) to replace it.")


def refuse_itself(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raise if a result would replace what it is made from, by whatever name."""
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise NemoLfrError(f"{source} would be replaced by its own result; choose another target than {target}.")


def open_aside(path: Path) -> IO[bytes]:
    """A new file beside `path`, to be renamed to it, with the permissions of any new file, which `tempfile`'s lack."""
    while True:
        with contextlib.suppress(FileExistsError):
            return open(path.with_name(f"{path.name[:60]}.{secrets.token_hex(4)}.part"), "x+b")


def _name(path: Path) -> Path | bytes:
    """The path for libsndfile; its bytes where it may be one that Python cannot write as text."""
    return path if os.name == "nt" else os.fsencode(path)


def _not_a_file(path: Path) -> str:
    if path.is_dir():
        return "is a folder"
    return "is not a file; give a pipe to stdin: nemo-lfr encode - -" if path.exists() else "no such file"


def _reason(error: Exception) -> str:
    return str(error).rpartition(": ")[2].rstrip(".")
