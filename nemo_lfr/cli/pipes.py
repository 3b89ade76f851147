"""Encode and decode from stdin to stdout while the input arrives, for `encode - -` and `decode - -`."""

import io
import logging
import os
import select
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import soundfile

from nemo_lfr.cli.interrupts import InputSignals
from nemo_lfr.cli.session import begin_work
from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader, pcm16
from nemo_lfr.io.containers import WavSamples, is_known, looks_like_media, read_wav_header
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.seekable import SeekableFile
from nemo_lfr.io.token_file import MAGIC, Metadata, TokenStreamReader, TokenStreamWriter

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec

logger = logging.getLogger(__name__)

# Number of bytes to read from stdin to detect the format. Input in a format other than WAV is then written to a
# temporary file.
SNIFFED_BYTES = 1 << 16
UNKNOWN_BYTES = 0xFFFFFFFF  # value of the length field in a WAV header if the length is not known yet


def encode_pipe(
    codec: "Codec[Any]",
    source: Path | io.BufferedReader,
    sink: IO[bytes],
    block: int,
    signals: InputSignals,
    lookahead: int | None = None,
    model: EntropyModel | None = None,
) -> AudioReader:
    """Encode a recording while it arrives.

    If stdin does not contain audio, the exit code is 2, as for a wrong argument. For all later errors, it is 1.

    Args:
        codec: codec to use.
        source: audio file, or stdin. WAV from stdin is encoded as it arrives. Other formats are encoded after the end
            of the input.
        sink: file to write the token file to, block by block.
        block: number of frames per chunk. Larger chunks are faster in total, but increase latency.
        signals: result of `watch_signals`. When a signal arrives, the reading of stdin ends.
        lookahead: frames of lookahead; see `Codec.stream_encoder`.
        model: entropy model that compresses each block; None for no compression. Longer blocks compress better.

    Returns:
        The reader of the audio, already closed. Its attributes describe the input: name, channels, number of samples.

    Raises:
        AudioError: if the input is not audio or is damaged. The token file in `sink` is then incomplete.
    """
    stream = codec.stream_encoder(lookahead)
    metadata = Metadata.of(codec)
    if not stream.exact:
        metadata = replace(metadata, precision=f"{metadata.precision}, lookahead {stream.delay_frames}")
    with _open_audio(source, codec.sample_rate, signals) as reader:
        tokens_out = TokenStreamWriter(sink, metadata, model)
        for samples in reader.blocks(block / codec.frame_rate):
            tokens_out.write(stream.push(samples))
        tokens_out.write(stream.flush())
        tokens_out.finish(reader.samples_read)
    return reader


def decode_pipe(
    codec: "Codec[Any]",
    source: io.BufferedReader,
    sink: IO[bytes],
    lookahead: int | None = None,
    model: Path | None = None,
) -> None:
    """Decode a token file to 16-bit WAV while it arrives.

    The length in the WAV header is first set to "unknown", as usual for WAV in a pipe. If `sink` is a regular file,
    the length is corrected at the end.

    If the input is not a token file, the exit code is 2, as for a wrong argument. For all later errors, it is 1.

    Args:
        codec: codec to use.
        source: token file, which is read block by block.
        sink: file to write the audio to.
        lookahead: frames of lookahead; see `Codec.stream_decoder`.
        model: path of the entropy model that the file was compressed with; None to search for it by its hash.

    Raises:
        TokenFileError: if the token file is damaged or belongs to another codec.
    """
    stream = codec.stream_decoder(lookahead)
    start_of_file = source.peek(len(MAGIC))[: len(MAGIC)]
    if start_of_file and MAGIC.startswith(start_of_file):
        begin_work()
    reader = TokenStreamReader(source, "stdin", model)
    reader.check_codec(codec)
    start = _position(sink)
    sink.write(_wav_header(codec.sample_rate, None))
    num_samples = 0
    # The last decoded frame is held back, because only the end of the token file says how many of its samples to keep.
    waiting = np.zeros(0, np.float32)

    def write(audio: np.ndarray) -> None:
        nonlocal num_samples
        sink.write(pcm16(audio))
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
def _open_audio(source: Path | io.BufferedReader, sample_rate: int, signals: InputSignals) -> Iterator[AudioReader]:
    if isinstance(source, Path):
        begin_work()
        with AudioReader(source, sample_rate) as reader:
            yield reader
        return
    header, head = read_wav_header(source.read)
    if header is not None and header.is_plain:
        begin_work()
        samples = WavSamples(header, len(head))
        rest = source.read(len(source.peek()))  # empties the buffer: `_feed` reads from the descriptor directly
        # libsndfile needs a descriptor, so a thread copies the header and the samples into a second pipe.
        out, into = os.pipe()
        feeder = (header.rebuilt(None), rest, samples, source, into, signals.stopped)
        threading.Thread(target=_feed, args=feeder, daemon=True).start()
        with AudioReader("stdin", sample_rate, data=out) as reader:
            reader.problem_at_end = lambda: samples.problem
            yield reader
        if samples.note:
            logger.warning("stdin: %s.", samples.note)
        return
    head += source.read(SNIFFED_BYTES)
    if not head:
        raise AudioError("stdin: the input is empty; check the program that writes to this pipe.")
    if not _may_be_audio(head):
        raise AudioError("stdin: not an audio file of a known format; pipe in WAV, FLAC, Ogg or MP3.")
    begin_work()
    with tempfile.TemporaryDirectory(prefix="nemo-lfr-") as folder:
        path = Path(folder, "stdin")
        with open(path, "wb") as file:
            file.write(head)
            shutil.copyfileobj(source, file)
        signals.end_input()
        with AudioReader(path, sample_rate, name="stdin") as reader:
            yield reader


def _may_be_audio(head: bytes) -> bool:
    """Return whether a stream that starts with these bytes may be an audio file."""
    if is_known(head) or looks_like_media(head[:16]):
        return True
    try:
        with soundfile.SoundFile(SeekableFile(io.BytesIO(head))):
            return True
    except soundfile.LibsndfileError:
        return False


def _feed(
    header: bytes, rest: bytes, samples: WavSamples, source: io.BufferedReader, into: int, stopped: int | None
) -> None:
    """Copy a WAV header and the samples of stdin into a pipe.

    Args:
        header: bytes to write first.
        rest: samples that were already read from `source`.
        samples: object that counts the sample data and finds its end.
        source: stdin.
        into: write end of the pipe; this function closes it.
        stopped: descriptor that becomes readable when copying must stop; None if copying is never stopped.
    """
    read: Callable[[int], bytes]
    try:
        # Read from the descriptor and not from the buffered reader, whose lock the interpreter needs to shut down.
        descriptor = source.fileno()
        read = partial(os.read, descriptor)
    except OSError:  # `source` has no descriptor
        stopped, read = None, source.read1
    # OSError and ValueError mean that the other side has closed the pipe or the stream.
    with suppress(OSError, ValueError), os.fdopen(into, "wb", buffering=0) as pipe:
        pipe.write(header)
        piece = rest or read(65536)
        while piece:
            pipe.write(samples.push(piece))
            if stopped is not None and stopped in select.select([descriptor, stopped], [], [])[0]:
                return
            piece = read(65536)
        pipe.write(samples.finish())


def _position(sink: IO[bytes]) -> int | None:
    """Return the current position in a seekable file; None for a pipe or a file in append mode."""
    with suppress(OSError, ImportError):
        import fcntl

        if not fcntl.fcntl(sink.fileno(), fcntl.F_GETFL) & os.O_APPEND:
            return sink.tell()
    return None


def _wav_header(sample_rate: int, num_samples: int | None) -> bytes:
    """Return a WAV header for 16-bit mono PCM; `num_samples` is None if the length is unknown."""
    size = UNKNOWN_BYTES if num_samples is None else 2 * num_samples
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", min(size + 36, UNKNOWN_BYTES), b"WAVE", b"fmt ", 16),
        *(1, 1, sample_rate, 2 * sample_rate, 2, 16, b"data", min(size, UNKNOWN_BYTES)),
    )
