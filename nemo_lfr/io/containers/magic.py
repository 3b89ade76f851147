"""Recognize the format of an audio file by its first bytes, and skip the tags and padding around recordings."""

import re
import struct

from nemo_lfr.io.containers.stream import TAGS, Window, is_zero

# Beginnings of files, at most 16 bytes. They are long enough that samples are unlikely to contain them by chance.
_MAGIC = re.compile(
    rb"(?:RIFF|RIFX|RF64|BW64).{4}(?:WAVE|AVI )|fLaC[\x00\x80]\x00\x00\x22|OggS\x00[\x02\x06]"
    rb"|FORM.{4}(?:AIFF|AIFC|8SVX|16SV)"
    rb"|\.snd\x00\x00|dns\.|caff\x00\x01|riff\x2e\x91\xcf\x11|NIST_1A\n|Creative Voice|2BIT"
    rb"| paf|fap |PVF1\n|ALawSoundFile"
    rb"|Extended Instrum|MATLAB 5\.0",
    re.DOTALL,
)
_SYNC = re.compile(rb"\xff[\xe0-\xff]|\x0b\x77|\x47\x40|\x56[\xe0-\xff]", re.DOTALL)

# First bytes of Matroska and WebM, ASF, AMR, Flash video, MPEG transport and program streams, then of codecs with
# their own file formats.
_MEDIA = (
    *(b"\x1a\x45\xdf\xa3", b"\x30\x26\xb2\x75", b"#!AMR", b"FLV\x01", b"\x47\x40", b"\0\0\x01\xba"),
    *(b"\x0b\x77", b"\x7f\xfe\x80\x01", b"wvpk", b"TTA1", b"\x56\xe0", b"\x56\xe1", b"\x56\xe2", b".RMF"),
    *(b".SoX", b"XoS."),
)
# Formats that are refused: FFmpeg decodes them, but a truncated file looks like a complete one.
_UNCHECKED = (
    ((b"nut/multimed",), "NUT"),
    ((b"MAC ",), "Monkey's Audio"),
    ((b"MP+", b"MPCK"), "Musepack"),
    ((b"tBaK",), "TAK"),
    ((b"DSD ", b"FRM8"), "DSD audio"),
    ((b"ea3", b"EA3"), "ATRAC"),
    ((b"ajkg",), "Shorten"),
    ((b"DTSHDHDR",), "DTS-HD"),
    ((b"TTA2",), "True Audio 2"),
)


def unchecked_format(head: bytes) -> str | None:
    """Return the name of a file's format if we refuse this format; None for other formats.

    In a refused format, a truncated file looks like a complete one.

    Args:
        head: first 16 bytes of a file.
    """
    if head[4:8] in (b"\xf8\x72\x6f\xba", b"\xf8\x72\x6f\xbb"):
        return "TrueHD or MLP"
    if head[:4] == b"RIFF" and head[8:12] in (b"QLCM", b"XWMA"):
        return "QCP or XWMA"
    return next((name for magic, name in _UNCHECKED if head.startswith(magic)), None)


def looks_like_media(head: bytes) -> bool:
    """Return whether the first 16 bytes of a file match a container or codec that FFmpeg decodes."""
    return (
        head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        or head.startswith(_MEDIA)
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or head[4:6] == b"\x47\x40"  # a transport stream with time codes
        or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0)  # AAC in ADTS frames
        or unchecked_format(head) is not None
    )


def has_magic(window: Window, position: int) -> bool:
    """Return whether the bytes at `position` are a magic number that samples are unlikely to contain."""
    head = window.at(position, 16)
    return _MAGIC.match(head) is not None or (_SYNC.match(head) is None and looks_like_media(head))


def after_tags(window: Window, position: int) -> int:
    """Return the end of the tags and zero padding that begin at a position."""
    before = -1
    while before != position < window.size:
        before = position
        head = window.at(position, 32)
        if not head.startswith((b"\0", *TAGS)):
            break
        if head.startswith(b"TAG"):
            position += 227 if head.startswith(b"TAG+") else 128
        elif head.startswith(b"APETAGEX") and len(head) == 32:
            size, _, flags = struct.unpack_from("<III", head, 12)
            position += 32 if flags >> 29 & 1 == 0 else 32 + size
        elif head.startswith(b"LYRICSBEGIN"):
            end = window.find(b"LYRICS200", position)
            position = end + 9 if end >= 0 else position
        elif head.startswith(b"ID3"):
            position = after_id3(window, position)
        else:
            position = after_zeros(window, position)
    return min(position, window.size)


def after_id3(window: Window, position: int) -> int:
    """Return the end of the ID3v2 tags at a position, or the position itself if there are none."""
    while (tag := window.at(position, 10))[:3] == b"ID3":
        if len(tag) < 10 or max(tag[6:10]) > 127:
            return position + 3
        size = tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]
        position += 10 + size + (10 if tag[5] & 0x10 else 0)
    return position


def after_zeros(window: Window, position: int) -> int:
    """Return the end of the run of zeros that begins at a position."""
    while position < window.size:
        block = window.at(position, Window.BLOCK)
        rest = b"" if is_zero(block) else block.lstrip(b"\0")
        position += len(block) - len(rest)
        if rest or not block:
            break
    return position
