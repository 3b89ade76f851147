"""Recognition of the beginning of any audio file, where another file ends."""

import re
import struct

from nemo_lfr.io.containers.stream import TAGS, Window
from nemo_lfr.io.media import looks_like_media

# First 16 bytes of each format. Samples do not contain such bytes by chance.
_MAGIC = re.compile(
    rb"(?:RIFF|RIFX|RF64|BW64).{4}(?:WAVE|AVI )|fLaC[\x00\x80]\x00\x00\x22|OggS\x00[\x02\x06]"
    rb"|FORM.{4}(?:AIFF|AIFC|8SVX|16SV)"
    rb"|\.snd\x00\x00|dns\.|caff\x00\x01|riff\x2e\x91\xcf\x11|NIST_1A\n|Creative Voice|2BIT"
    rb"| paf|fap |PVF1\n|ALawSoundFile"
    rb"|Extended Instrum|MATLAB 5\.0",
    re.DOTALL,
)
_SYNC = re.compile(rb"\xff[\xe0-\xff]|\x0b\x77|\x47\x40|\x56[\xe0-\xff]", re.DOTALL)


def has_magic(window: Window, position: int) -> bool:
    """Return whether a file of a format with a unique magic begins at a position."""
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
    """Return the end of the ID3v2 tags at a position; the position if there are none."""
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
        rest = block.lstrip(b"\0")
        position += len(block) - len(rest)
        if rest or not block:
            break
    return position
