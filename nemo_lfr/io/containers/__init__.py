"""Find the audio in a file, and correct wrong headers.

The length in a header is wrong if the recorder was killed, if the file was written to a pipe, or if files were
concatenated with `cat`. `find_streams` compares the header with the bytes in the file, and returns a `Stream` for each
recording, from which a decoder reads the whole recording.

Each module handles some formats. Functions `is_FORMAT` recognize a format, and functions `FORMAT_streams` return the
recordings in a file. If a recording is truncated or damaged, `Stream.problem` contains a message.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from nemo_lfr.io.containers import avi, boxes, flac, frames, older, parts, program, rare
from nemo_lfr.io.containers.flac import flac_streams
from nemo_lfr.io.containers.lengths import aiff_streams, au_streams, caf_streams, w64_streams
from nemo_lfr.io.containers.magic import after_id3, looks_like_media, unchecked_format
from nemo_lfr.io.containers.mpeg import is_late, is_mpeg, mpeg_streams, read_frame
from nemo_lfr.io.containers.ogg import ogg_streams
from nemo_lfr.io.containers.sizes import FRAME_HEAD, FRAME_SIZES, FrameSize
from nemo_lfr.io.containers.stream import UNKNOWN_BYTES, Splice, Stream, Window, moved, several_tracks, whole_file
from nemo_lfr.io.containers.wav import WavSamples, wav_streams
from nemo_lfr.io.containers.wav_header import WavHeader, is_wav, read_wav_header

__all__ = [
    "FRAME_HEAD",
    "PACKET_SIZES",
    "UNKNOWN_BYTES",
    "FrameSize",
    "Splice",
    "Stream",
    "WavHeader",
    "WavSamples",
    "find_mpeg",
    "find_streams",
    "is_known",
    "looks_like_media",
    "read_wav_header",
    "several_tracks",
    "unchecked_format",
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
    (program.is_transport, program.transport_streams),
    (program.is_program, program.program_streams),
    (avi.is_avi, avi.avi_streams),
    (parts.is_asf, parts.asf_streams),
    (parts.is_flv, parts.flv_streams),
    (parts.is_amr, parts.amr_streams),
    (parts.is_wavpack, parts.wavpack_streams),
    (parts.is_tta, parts.tta_streams),
    (parts.is_real, parts.real_streams),
    (frames.is_frames, frames.frames_streams),
    (frames.is_gsm, frames.gsm_streams),
    (is_mpeg, mpeg_streams),
    (is_late, mpeg_streams),
)


def _mpeg_size(head: bytes) -> int | None:
    frame = read_frame(head[:4])
    return None if frame is None else frame.length


# A dict from the name of a decoder in FFmpeg to the function that returns the size of its frames.
PACKET_SIZES: dict[str, FrameSize] = {
    **FRAME_SIZES,
    "eac3": FRAME_SIZES["ac3"],
    "dca": FRAME_SIZES["dts"],
    **dict.fromkeys(("mp1", "mp1float", "mp2", "mp2float", "mp3", "mp3float"), _mpeg_size),
}


def find_streams(file: BinaryIO) -> list[Stream]:
    """Find the recordings in an audio file, in order.

    Args:
        file: seekable file, open for reading.

    Returns:
        At least one stream. A file in an unknown format becomes one stream whose `is_checked` is False.
    """
    size = file.seek(0, io.SEEK_END)
    window = Window(file, size)
    if skip := _tag_before(window):
        # Some programs write an ID3 tag before audio of any format.
        inner = Window(Splice(file, Stream([(skip, size)])), size - skip)
        return [moved(stream, [(skip, size)]) for stream in _find(inner)]
    return _find(window)


def _tag_before(window: Window) -> int:
    """Return the size in bytes of an ID3 tag that precedes audio other than MPEG; 0 for any other file."""
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
    return [replace(whole_file(size), is_checked=False)]


def find_mpeg(file: BinaryIO) -> list[Stream]:
    """Find the recordings in a file that has other data before its MPEG audio.

    Bytes that are not part of a frame are skipped.

    Args:
        file: seekable file, open for reading.

    Returns:
        The streams; empty if the file has no MPEG audio.
    """
    return mpeg_streams(Window(file, file.seek(0, io.SEEK_END)))


def is_known(head: bytes) -> bool:
    """Return whether a file has a supported format.

    Args:
        head: first few thousand bytes of the file.
    """
    window = Window(io.BytesIO(head), len(head))
    return any(matches(head[:12], window) for matches, _ in _FORMATS)
