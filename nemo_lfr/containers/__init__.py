"""Where the audio lies in a file: container headers, compared with the bytes that are really there.

Decoders believe headers. Recorders that were killed, pipes and `cat` leave headers that are wrong: a length of 0, of a
quarter, or of the first of several recordings. `find_streams` looks at the container itself and describes each
recording of the file in such a way that libsndfile decodes all of it.
"""

import io
from collections.abc import Callable
from typing import BinaryIO

from nemo_lfr.containers import flac
from nemo_lfr.containers.flac import flac_streams
from nemo_lfr.containers.lengths import aiff_streams, au_streams, caf_streams, w64_streams
from nemo_lfr.containers.mpeg import is_mpeg, mpeg_streams
from nemo_lfr.containers.ogg import ogg_streams
from nemo_lfr.containers.stream import UNKNOWN_BYTES, Splice, Stream, Window, whole_file
from nemo_lfr.containers.wav import WavHeader, WavSamples, is_wav, read_wav_header, wav_streams

__all__ = [
    "UNKNOWN_BYTES",
    "Splice",
    "Stream",
    "WavHeader",
    "WavSamples",
    "find_streams",
    "is_known",
    "read_wav_header",
]

_FORMATS: tuple[tuple[Callable[[bytes, Window], bool], Callable[[Window], list[Stream]]], ...] = (
    (is_wav, wav_streams),
    (lambda head, _: head[:4] == b"OggS", ogg_streams),
    (lambda head, _: head[:8] in flac.HEADS, flac_streams),
    (lambda head, _: head[:4] in (b".snd", b"dns."), au_streams),
    (lambda head, _: head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"), aiff_streams),
    (lambda head, _: head[:4] == b"caff", caf_streams),
    (lambda head, _: head[:4] == b"riff", w64_streams),
    (is_mpeg, mpeg_streams),
)


def find_streams(file: BinaryIO) -> list[Stream]:
    """Find the recordings of an audio file, one after the other.

    Args:
        file: opened for reading, seekable.

    Returns:
        At least one stream. A format that is not known here is one stream, the file as it is.
    """
    size = file.seek(0, io.SEEK_END)
    window = Window(file, size)
    head = window.at(0, 12)
    for matches, find in _FORMATS:
        if matches(head, window):
            return find(window) or [whole_file(size)]
    return [whole_file(size)]


def is_known(head: bytes) -> bool:
    """Return whether the first bytes of a file, a few thousand, are those of a format that is known here."""
    window = Window(io.BytesIO(head), len(head))
    return any(matches(head[:12], window) for matches, _ in _FORMATS)
