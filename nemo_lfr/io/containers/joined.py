"""Detect another audio file after the end of the first one, as in files that were joined with `cat`."""

import re
from collections.abc import Callable

from nemo_lfr.io.containers.magic import after_tags, has_magic
from nemo_lfr.io.containers.mpeg import frames_follow
from nemo_lfr.io.containers.sizes import codec_frames_follow
from nemo_lfr.io.containers.stream import (
    FEW_BYTES,
    JOINED,
    UNKNOWN_BYTES,
    Stream,
    Window,
    cut_short,
    goes_on,
    longer,
    whole_file,
    without_tags,
)

_NO_LENGTH = "its header declares no length, so it is unknown whether the file is complete"
# Number of bytes that suffice to recognize MPEG audio and AAC: they hold three frames of the maximum size.
LOOK_BYTES = 1 << 15
# Beginnings of files with at least eight constant bytes, which samples are unlikely to contain by chance.
_HEADERS = re.compile(
    rb"(?:RIFF|RIFX).{4}WAVE(?:fmt |bext|JUNK|LIST|fact)|R[FW]64.{4}WAVEds64"
    rb"|FORM.{4}AIF[FC](?:COMM|FVER|COMT|ANNO|NAME|AUTH|MARK|INST|APPL|CHAN|SSND)"
    rb"|fLaC[\x00\x80]\0\0\x22|OggS\0\x02.{8}.{4}\0\0\0\0|caff\0\x01\0\0desc|riff\x2e\x91\xcf\x11|NIST_1A\n   1024"
    rb"|\.snd\0\0\0[\x18-\x40].{4}\0\0\0|\0\0\0.ftyp[a-zA-Z0-9 ]{4}|Creative Voice File",
    re.DOTALL,
)
HEADER_BYTES = 32  # no match of `_HEADERS` is longer


def next_file(window: Window, position: int) -> int | None:
    """Find another audio file that follows the first one.

    Args:
        window: the file.
        position: end of the first audio file. A padding byte, or tags and zeros, may precede the next file.

    Returns:
        The start of the next audio file; None if no audio file follows.
    """
    if position >= window.size:
        return None
    for start in (position, position + 1, after_tags(window, position)):
        if has_magic(window, start) or frames_follow(window, start) or codec_frames_follow(window, start):
            return start
    return None


def header_in(data: bytes) -> int | None:
    """Search `data` for the header of an audio file. Return the position of the header; None if there is none."""
    match = _HEADERS.search(data)
    return None if match is None else match.start()


def find_pattern(window: Window, pattern: re.Pattern[bytes], position: int, longest: int = HEADER_BYTES) -> int | None:
    """Search a file for a match of a regular expression.

    Args:
        window: the file.
        pattern: regular expression.
        position: start of the search.
        longest: maximum length of a match in bytes.

    Returns:
        The position of the first match; None if there is none.
    """
    while position < window.size:
        block = window.at(position, Window.BLOCK)
        if (match := pattern.search(block)) is not None:
            return position + match.start()
        if len(block) <= longest:
            break
        position += len(block) - longest
    return None


def find_header(window: Window, position: int) -> int | None:
    """Return the position of the first header of an audio file from `position` on; None if there is none.

    This search is for files that do not declare the length of their samples.
    """
    return find_pattern(window, _HEADERS, position)


def until_end(window: Window, position: int) -> int | None:
    """Return the end of the samples of a file that does not declare their length.

    Args:
        window: the file.
        position: start of the samples.

    Returns:
        The end of the file, or the start of the tags at its end; None if the file contains the header of another audio
        file.
    """
    return None if find_header(window, position) is not None else without_tags(window, position, window.size)


def compare_end(window: Window, end: int) -> list[Stream]:
    """Return one `Stream` for a file whose audio ends at a position.

    Args:
        window: the file.
        end: position after the last sample.

    Returns:
        A list with the stream. If another audio file follows, the stream has a `problem`. If other bytes follow, it
        has a `note`. Tags and padding are ignored.
    """
    end = min(end, window.size)
    if next_file(window, end) is not None:
        return [whole_file(window.size, JOINED)]
    return [Stream([(0, end)], is_file=end == window.size, note=note_after(window, end))]


def damage_after(window: Window, end: int, section: re.Pattern[bytes]) -> str | None:
    """Return an error message if the audio continues after bytes that are not audio.

    This check is for formats that consist of sections, such as packets, and do not state their number.

    Args:
        window: the file.
        end: end of the last section before the other bytes.
        section: pattern that matches the beginning of a section, and is unlikely to match other bytes.

    Returns:
        The message. None if another file follows, if only tags and padding follow, or if no section follows.
    """
    if next_file(window, end) is not None or note_after(window, end) is None:
        return None
    start = after_tags(window, end)
    if find_pattern(window, section, start) is None:
        return None
    return f"the audio is damaged: the {window.size - start} bytes from byte {start} on do not match the file format"


def note_after(window: Window, end: int) -> str | None:
    """Return a warning if other data follows the audio; None otherwise.

    Tags, zeros and fewer than `FEW_BYTES` other bytes are accepted without a warning.
    """
    start = after_tags(window, end)
    if window.size - start < FEW_BYTES:
        return None
    return f"{window.size - start} bytes at position {start} follow the audio and are ignored"


def samples_follow(window: Window, end: int) -> bool:
    """Return whether a file contains more samples than its header declares.

    The result is False if another file, chunks, tags or padding follow the declared samples.

    Args:
        window: the file.
        end: end of the declared samples.
    """
    is_more = goes_on(window.at(end, 256)) and not window.is_zero(end, window.size)
    return is_more and next_file(window, end) is None


def compare_size(
    window: Window, start: int, promised: int, header_for: Callable[[int], bytes] | None = None
) -> list[Stream]:
    """Return a list with one `Stream` for a file, after comparing the declared number of bytes with its size.

    Args:
        window: the file.
        start: position of the first sample.
        promised: number of bytes of samples that the header declares.
        header_for: function that returns the header for another number of bytes; None if samples behind the declared
            ones are ignored.

    Returns:
        The file up to the end of the samples. The stream has a `problem` if the file is truncated or if another file
        follows. It has a `note` if the header declares no length, or if other bytes follow the audio.
    """
    available, end = max(0, window.size - start), start + promised
    if available < promised < UNKNOWN_BYTES:
        return [whole_file(window.size, cut_short(promised, available))]
    if header_for and 0 < promised < available and samples_follow(window, end):
        stop = without_tags(window, end, window.size)
        return [Stream([(start, stop)], header_for(stop - start), note=longer(promised, available))]
    return compare_end(window, end) if 0 < promised < UNKNOWN_BYTES else of_unknown_length(window, start, 1)


def of_unknown_length(window: Window, start: int, block: int) -> list[Stream]:
    """Return one `Stream` for a file whose header stores no length.

    The stream has a `problem` if the last block is incomplete or if another file follows. A file that looks complete
    has a `note`, since it may have been truncated between two blocks. The stream does not include tags at the end.

    Args:
        window: the file.
        start: position of the first block.
        block: size of a block in bytes. A block contains one or more samples of each channel.
    """
    if start >= window.size:
        return [whole_file(window.size)]
    end = until_end(window, start)
    if end is None or window.find(window.at(0, 16), start) >= 0:
        return [whole_file(window.size, JOINED)]
    rest = (end - start) % block if 0 < block < UNKNOWN_BYTES else 0
    problem = "the audio was truncated: its last sample is incomplete" if rest else None
    return [Stream([(0, end)], is_file=end == window.size, problem=problem, note=_NO_LENGTH)]
