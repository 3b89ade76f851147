"""Where the audio lies in a file: container headers, compared with the bytes that are really there.

Decoders believe headers. Recorders that were killed, pipes and `cat` leave headers that are wrong: a length of 0, of a
quarter, or of the first of several recordings. `find_streams` looks at the container itself and describes each
recording of the file in such a way that libsndfile decodes all of it.
"""

import io
from collections.abc import Callable
from typing import BinaryIO

from nemo_lfr.io.containers import boxes, flac, older, parts, rare
from nemo_lfr.io.containers.flac import flac_streams
from nemo_lfr.io.containers.lengths import aiff_streams, au_streams, caf_streams, w64_streams
from nemo_lfr.io.containers.magic import after_id3
from nemo_lfr.io.containers.mpeg import is_late, is_mpeg, mpeg_streams
from nemo_lfr.io.containers.ogg import ogg_streams
from nemo_lfr.io.containers.stream import UNKNOWN_BYTES, Splice, Stream, Window, moved, whole_file
from nemo_lfr.io.containers.wav import WavHeader, WavSamples, is_wav, read_wav_header, wav_streams
from nemo_lfr.io.media import looks_like_media

__all__ = [
    "UNKNOWN_BYTES",
    "Splice",
    "Stream",
    "WavHeader",
    "WavSamples",
    "find_mpeg",
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
    (older.is_sphere, older.sphere_streams),
    (older.is_voc, older.voc_streams),
    (older.is_svx, older.svx_streams),
    (older.is_avr, older.avr_streams),
    (rare.is_ircam, rare.ircam_streams),
    (rare.is_paf, rare.paf_streams),
    (rare.is_pvf, rare.pvf_streams),
    (rare.is_wve, rare.wve_streams),
    (rare.is_xi, rare.xi_streams),
    (rare.is_mpc, rare.mpc_streams),
    (rare.is_mat4, rare.mat4_streams),
    (rare.is_mat5, rare.mat5_streams),
    (rare.is_sds, rare.sds_streams),
    (rare.is_sox, rare.sox_streams),
    (rare.is_htk, rare.htk_streams),
    (boxes.is_matroska, boxes.matroska_streams),
    (boxes.is_mp4, boxes.mp4_streams),
    (boxes.is_transport, boxes.transport_streams),
    (parts.is_avi, parts.avi_streams),
    (parts.is_asf, parts.asf_streams),
    (parts.is_flv, parts.flv_streams),
    (parts.is_amr, parts.amr_streams),
    (parts.is_wavpack, parts.wavpack_streams),
    (parts.is_tta, parts.tta_streams),
    (parts.is_adts, parts.adts_streams),
    (is_mpeg, mpeg_streams),
    (is_late, mpeg_streams),
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
    if skip := _tag_before(window):
        # An ID3 tag, which some put in front of any format.
        inner = Window(Splice(file, Stream([(skip, size)])), size - skip)
        return [moved(stream, [(skip, size)]) for stream in _find(inner)]
    return _find(window)


def _tag_before(window: Window) -> int:
    """Return the bytes of an ID3 tag before audio that is not MPEG audio; 0 if there is none."""
    skip = after_id3(window, 0)
    head = window.at(skip, 12)
    if not skip or len(head) < 12 or head[:3] == b"ID3":
        return 0
    rest = Window(Splice(window.file, Stream([(skip, window.size)])), window.size - skip)
    is_other = any(matches(head, rest) for matches, find in _FORMATS if find is not mpeg_streams)
    return skip if is_other or looks_like_media(window.at(skip, 16)) else 0


def _find(window: Window) -> list[Stream]:
    size, head = window.size, window.at(0, 12)
    for matches, find in _FORMATS:
        if matches(head, window):
            return find(window) or [whole_file(size)]
    return [whole_file(size)]


def find_mpeg(file: BinaryIO) -> list[Stream]:
    """Find the recordings of MPEG audio that begins with something else: what is no frame is passed by.

    Returns:
        None of them if there is no such audio.
    """
    return mpeg_streams(Window(file, file.seek(0, io.SEEK_END)))


def is_known(head: bytes) -> bool:
    """Return whether the first bytes of a file, a few thousand, are those of a format that is known here."""
    window = Window(io.BytesIO(head), len(head))
    return any(matches(head[:12], window) for matches, _ in _FORMATS)
