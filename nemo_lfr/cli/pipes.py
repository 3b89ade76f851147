"""stdin and stdout: audio in and tokens out, or back, while the other side of the pipe still writes or reads."""

import io
import os
import select
import shutil
import signal
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import soundfile

from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.containers import WavSamples, is_known, read_wav_header
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.media import looks_like_media
from nemo_lfr.io.token_file import Metadata, TokenStreamReader, TokenStreamWriter

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec

# Read of a stream before its format is known; what is none is not spooled to the disk.
SNIFFED_BYTES = 1 << 16
UNKNOWN_BYTES = 0xFFFFFFFF  # as the length of a WAV file that is still being written


def encode_pipe(
    codec: "Codec",
    source: Path | io.BufferedReader,
    sink: IO[bytes],
    block: int,
    lookahead: int | None = None,
    model: EntropyModel | None = None,
) -> AudioReader:
    """Encode a recording while it comes in; returns its reader, closed.

    Args:
        codec: encodes.
        source: an audio file, or stdin: WAV is encoded as it comes, other formats once they have come.
        sink: the token file, written block by block.
        block: frames taken at a time. More make less work, fewer wait less.
        lookahead: see `Codec.stream_encoder`.
        model: compresses each block; longer blocks are compressed better.

    Raises:
        AudioError: if it is not audio, or damaged; what `sink` got is then no whole token file.
    """
    stream = codec.stream_encoder(lookahead)
    metadata = Metadata.of(codec)
    if not stream.exact:
        metadata = replace(metadata, precision=f"{metadata.precision}, lookahead {stream.delay_frames}")
    with _open_audio(source, codec.sample_rate) as reader:
        tokens_out = TokenStreamWriter(sink, metadata, model)
        for samples in reader.blocks(block / codec.frame_rate):
            tokens_out.write(stream.push(samples))
        tokens_out.write(stream.flush())
        tokens_out.finish(reader.samples_read)
    return reader


def decode_pipe(
    codec: "Codec",
    source: io.BufferedReader,
    sink: IO[bytes],
    lookahead: int | None = None,
    model: Path | None = None,
) -> None:
    """Decode a token file while it comes in, to WAV of 16 bits.

    Its header tells an unknown length, as all programs do that write WAV into a pipe; where `sink` is a file, the
    length is put right at the end.

    Args:
        codec: decodes.
        source: the token file, read block by block.
        sink: the audio.
        lookahead: see `Codec.stream_decoder`.
        model: path of the entropy model of a compressed file, where it is not inside the package.

    Raises:
        TokenFileError: if the token file is damaged or another codec's.
    """
    reader = TokenStreamReader(source, "stdin", model)
    reader.check_codec(codec)
    stream = codec.stream_decoder(lookahead)
    start = _position(sink)
    sink.write(_wav_header(codec.sample_rate, None))
    num_samples = 0
    waiting = np.zeros(0, np.float32)  # the last frame, which the recording may end in

    def write(audio: np.ndarray) -> None:
        nonlocal num_samples
        sink.write(np.rint(audio.clip(-1, 1) * 32767).astype("<i2").tobytes())
        sink.flush()
        num_samples += len(audio)

    for tokens in reader.blocks():
        audio = np.concatenate([waiting, stream.push(tokens)])
        keep = min(len(audio), 0 if stream.delay_frames else codec.samples_per_frame)
        write(audio[: len(audio) - keep])
        waiting = audio[len(audio) - keep :]
    assert reader.num_samples is not None
    audio = np.concatenate([waiting, stream.flush(reader.num_samples)])
    write(audio[: reader.num_samples - num_samples])
    if start is not None:
        sink.seek(start)
        sink.write(_wav_header(codec.sample_rate, num_samples))
        sink.seek(0, os.SEEK_END)


@contextmanager
def _open_audio(source: Path | io.BufferedReader, sample_rate: int) -> Iterator[AudioReader]:
    if isinstance(source, Path):
        with AudioReader(source, sample_rate) as reader:
            yield reader
        return
    header, head = read_wav_header(source.read)
    if header is not None and not header.is_mpeg:
        samples = WavSamples(header, len(head))
        rest = source.read(len(source.peek()))  # what is buffered; all that comes after is read past the buffer
        # libsndfile reads WAV from a descriptor without seeking; the samples go through a pipe again.
        out, into = os.pipe()
        with _woken_by_signals() as wake:
            feeder = (header.rebuilt(None), rest, samples, source, into, wake)
            threading.Thread(target=_feed, args=feeder, daemon=True).start()
            with AudioReader("stdin", sample_rate, data=out) as reader:
                reader.problem_at_end = lambda: samples.problem
                yield reader
        return
    head += source.read(SNIFFED_BYTES)
    if not _may_be_audio(head):
        raise AudioError("stdin: not an audio file: it begins like no known format; pipe in WAV, FLAC, Ogg or MP3.")
    with tempfile.TemporaryDirectory(prefix="nemo-lfr-") as folder:
        path = Path(folder, "stdin")
        with open(path, "wb") as file:
            file.write(head)
            shutil.copyfileobj(source, file)
        with AudioReader(path, sample_rate, name="stdin") as reader:
            yield reader


def _may_be_audio(head: bytes) -> bool:
    """Return whether a stream is worth spooling, by its first bytes."""
    if is_known(head) or looks_like_media(head[:16]):
        return True
    try:
        with soundfile.SoundFile(io.BytesIO(head)):
            return True
    except soundfile.LibsndfileError:
        return False


def _feed(
    header: bytes, rest: bytes, samples: WavSamples, source: io.BufferedReader, into: int, wake: int | None
) -> None:
    """Write to a pipe a header and the samples that come, until they end or `wake` can be read."""
    read: Callable[[int], bytes]
    try:
        # Not by the buffered reader, whose lock must be free when the process ends.
        descriptor = source.fileno()
        read = partial(os.read, descriptor)
    except OSError:  # it has none
        wake, read = None, source.read1
    # OSError, ValueError: closed, as who reads was done first.
    with suppress(OSError, ValueError), os.fdopen(into, "wb", buffering=0) as pipe:
        pipe.write(header)
        piece = rest or read(65536)
        while piece:
            pipe.write(samples.push(piece))
            if wake is not None and wake in select.select([descriptor, wake], [], [])[0]:
                return
            piece = read(65536)
        pipe.write(samples.finish())


@contextmanager
def _woken_by_signals() -> Iterator[int | None]:
    """A descriptor that can be read once a signal has come, and at the end.

    Python hears of a signal when the main thread comes back to it, but libsndfile, waiting in a pipe, waits on.
    """
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield None
        return
    out, into = os.pipe()
    os.set_blocking(into, False)
    before = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    try:
        yield out
    finally:
        signal.set_wakeup_fd(before)
        os.close(into)  # which wakes who still waits; `out` stays open for them


def _position(sink: IO[bytes]) -> int | None:
    """Where a file that is written here can be written again; None of a pipe, or of a file that is appended to."""
    with suppress(OSError, ImportError):
        import fcntl

        if not fcntl.fcntl(sink.fileno(), fcntl.F_GETFL) & os.O_APPEND:
            return sink.tell()
    return None


def _wav_header(sample_rate: int, num_samples: int | None) -> bytes:
    """Of 16-bit mono PCM."""
    size = UNKNOWN_BYTES if num_samples is None else 2 * num_samples
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", min(size + 36, UNKNOWN_BYTES), b"WAVE", b"fmt ", 16),
        *(1, 1, sample_rate, 2 * sample_rate, 2, 16, b"data", min(size, UNKNOWN_BYTES)),
    )
