"""Write 16-bit mono audio files atomically."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import soundfile

from nemo_lfr.errors import AudioError, NemoLfrError, quoted
from nemo_lfr.io.atomic import check_overwrite, naming, open_temporary, publish, sync
from nemo_lfr.io.decoders import sndfile_reason
from nemo_lfr.io.folders import WRITABLE_FORMATS, WRITABLE_SUFFIXES

# Without samples, libsndfile writes a FLAC file of 0 bytes, or an Opus file that lacks its last page.
NO_EMPTY = "the recording has no samples, and {} files cannot be empty"


def pcm16(wave: np.ndarray) -> bytes:
    """Return samples [T] as little-endian 16-bit PCM, rounded; values outside [-1, 1) are clipped."""
    return to_int16(wave).tobytes()


def to_int16(wave: np.ndarray) -> np.ndarray:
    """Return samples [T] as little-endian 16-bit integers, rounded; values outside [-1, 1) are clipped."""
    samples: np.ndarray = np.rint(wave * np.float32(32768)).clip(-32768, 32767).astype("<i2")
    return samples


class AudioWriter:
    """Write a 16-bit mono audio file under a temporary name, and rename the complete file.

    Args:
        path: output file; its suffix, one of `WRITABLE_SUFFIXES`, determines the format. Missing folders are created.
        sample_rate: sample rate in Hz.
        overwrite: whether to replace an existing file.

    Raises:
        OutputExistsError: if the file exists when writing starts or ends, and `overwrite` is not set.
        NemoLfrError: if the suffix of `path` is not in `WRITABLE_SUFFIXES`.
        AudioError: if the format does not support the sample rate. Also at the end of the `with` block, if a FLAC file
            would contain no samples.
    """

    def __init__(self, path: str | os.PathLike[str], sample_rate: int, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        check_overwrite(self.path, overwrite)
        self._num_samples = 0
        kind = self.path.suffix[1:]
        if kind.lower() not in WRITABLE_FORMATS:
            # Lossy formats would change the audio, and some of them the number of samples.
            formats = " or ".join(WRITABLE_SUFFIXES)
            raise NemoLfrError(
                f"{path}: audio cannot be written as {quoted(self.path.suffix)}; use {formats}, and convert "
                "the result with another program."
                if self.path.suffix
                else f"{path}: the name has no suffix, but the suffix selects the format; use {formats}."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._raw = open_temporary(self.path)
        self._sink = SinkFile(self._raw)
        try:
            self._file = soundfile.SoundFile(self._sink, "w", sample_rate, 1, format=kind.upper())
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            with contextlib.suppress(OSError):  # a full disk makes closing fail too
                self._raw.close()
            os.unlink(self._raw.name)
            self._sink.check(self.path)
            raise AudioError(
                f"{path}: the audio cannot be written as {kind.upper()} at {sample_rate} Hz ({sndfile_reason(error)})."
            ) from error

    def __enter__(self) -> "AudioWriter":
        return self

    def write(self, wave: np.ndarray) -> None:
        """Append samples [T].

        Raises:
            OSError: if the file cannot be written, for instance on a full disk.
            AudioError: if libsndfile cannot write the samples.
        """
        try:
            with self._sink.raising(self.path):
                self._file.write(to_int16(wave))  # libsndfile would round toward negative infinity
        except (AssertionError, soundfile.LibsndfileError) as error:
            raise AudioError(
                f"{self.path}: the file could not be written; the incomplete file was removed."
            ) from error
        self._num_samples += len(wave)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        temporary = Path(self._raw.name)
        try:
            with naming(self.path, temporary):
                with self._raw:
                    with self._sink.raising(self.path):
                        self._file.close()
                    self._raw.flush()
                    sync(self._raw.fileno())
                if kind is None:
                    if not self._num_samples and self.path.suffix.lower() == ".flac":
                        raise AudioError(f"{self.path}: {NO_EMPTY.format('FLAC')}; write .wav instead.")
                    publish(temporary, self.path, self._overwrite)
        finally:
            temporary.unlink(missing_ok=True)


class SinkFile:
    """File wrapper that stores the first exception, since exceptions in libsndfile's callbacks are lost.

    Args:
        file: file that libsndfile writes to.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: BaseException | None = None

    def write(self, data: bytes) -> int:
        """Write bytes. If this or an earlier call fails, return 0."""
        return self._try(lambda: self._file.write(data))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position, and return it. If this or an earlier call fails, return 0."""
        return self._try(lambda: self._file.seek(offset, whence))  # seeking flushes the buffer, which may fail

    def tell(self) -> int:
        """Return the position, or 0 if this or an earlier call fails."""
        return self._try(lambda: self._file.tell())

    def read(self, size: int) -> bytes:
        """Read bytes. If an earlier call failed, return no bytes."""
        return self._file.read(size) if self._error is None else b""

    def _try(self, act: Callable[[], int]) -> int:
        try:
            return act() if self._error is None else 0
        except BaseException as error:  # also KeyboardInterrupt, which would be lost too
            self._error = error
            return 0

    @contextlib.contextmanager
    def raising(self, path: Path | None = None) -> Iterator[None]:
        """Raise the stored exception when the `with` block ends; see `check`.

        The stored exception replaces the error that soundfile raises if a callback fails.
        """
        try:
            yield
        except (AssertionError, soundfile.LibsndfileError):
            self.check(path)
            raise
        self.check(path)

    def check(self, path: Path | None = None) -> None:
        """Raise the exception that was stored, if any. An OSError gets the file name `path`, if it is passed."""
        if isinstance(self._error, OSError) and path is not None:
            raise OSError(self._error.errno, self._error.strerror, str(path)) from self._error
        if self._error is not None:
            raise self._error
