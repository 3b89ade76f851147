"""Check the size of IRCAM, PAF, PVF, WVE, XI, MPC 2000, MAT 4 and 5, SDS, SoX and HTK files.

libsndfile reads truncated files in these formats without an error. IRCAM, PAF and PVF store no length, so a truncated
file is detected only if its last sample or block is incomplete.
"""

import re
import struct

from nemo_lfr.io.containers.joined import compare_end, compare_size, of_unknown_length
from nemo_lfr.io.containers.stream import (
    HEADER_CUT,
    JOINED,
    Stream,
    Window,
    cut_short,
    whole_file,
)

_IRCAM = re.compile(rb"\x64\xa3[\x01-\x04]\0|\0[\x01-\x04]\xa3\x64", re.DOTALL)
_IRCAM_HEADER, _PAF_HEADER = 1024, 2048  # sizes in bytes
_PAF_BLOCKS = {0: 2, 1: 32, 2: 1}  # bytes per channel by format; 24-bit samples are stored in blocks of ten
_PVF = re.compile(rb"PVF1\n(\d{1,9}) \d{1,9} (\d{1,2})\n")
_WVE, _WVE_HEADER = b"ALawSoundFile**\0", 32
_XI, _XI_HEADER, _XI_SAMPLE = b"Extended Instrument: ", 298, 40
_MPC, _MPC_HEADER = b"\x01\x04", 42
_MAT4_SIZES = (8, 4, 4, 2, 2, 1)  # bytes per value, indexed by the tens digit of the matrix type
_MAT4_NAME, _MAT4_MATRICES = b"samplerate", 2
_MAT5, _MAT5_HEADER = b"MATLAB 5.0 MAT-file", 128
_MAT5_MATRIX, _MAT5_LAST = 14, 18  # element types
_SDS_HEADER, _SDS_PACKET, _SDS_BYTES = 21, 127, 120  # sizes in bytes: header, packet, and the samples of a packet
_HTK_HEADER, _SOX_HEADER = 12, 32


def is_ircam(head: bytes, _: Window) -> bool:
    """Return whether a file is an IRCAM file."""
    return _IRCAM.match(head) is not None


def ircam_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an IRCAM file, after checking its size."""
    head = window.at(0, 16)
    if window.size < _IRCAM_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    channels, encoding = struct.unpack_from("<II" if head[0] else ">II", head, 8)
    return of_unknown_length(window, _IRCAM_HEADER, channels * (encoding & 15))


def is_paf(head: bytes, _: Window) -> bool:
    """Return whether a file is an Ensoniq PARIS (PAF) file."""
    return head[:4] in (b" paf", b"fap ")


def paf_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an Ensoniq PARIS file, after checking its size."""
    if window.size < _PAF_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    order = ">" if window.at(0, 1) == b" " else "<"
    encoding, channels = struct.unpack(f"{order}II", window.at(16, 8))
    return of_unknown_length(window, _PAF_HEADER, channels * _PAF_BLOCKS.get(encoding, 0))


def is_pvf(head: bytes, _: Window) -> bool:
    """Return whether a file is a Portable Voice Format (PVF) file."""
    return head.startswith(b"PVF1\n")


def pvf_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a Portable Voice Format file, after checking its size."""
    header = _PVF.match(window.at(0, 64))
    if header is None:
        return [whole_file(window.size, HEADER_CUT if b"\n" not in window.at(5, 64) else None)]
    return of_unknown_length(window, header.end(), int(header[1]) * (int(header[2]) // 8))


def is_wve(head: bytes, _: Window) -> bool:
    """Return whether a file is a Psion WVE file."""
    return head == _WVE[:12]


def wve_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a Psion WVE file, after checking its size."""
    if window.size < _WVE_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    return compare_size(window, _WVE_HEADER, int.from_bytes(window.at(18, 4), "big"))


def is_xi(head: bytes, _: Window) -> bool:
    """Return whether a file is a FastTracker 2 instrument."""
    return head == _XI[:12]


def xi_streams(window: Window) -> list[Stream]:
    """Return a FastTracker 2 instrument as one `Stream`, after checking its size."""
    if window.size < _XI_HEADER + _XI_SAMPLE:
        return [whole_file(window.size, HEADER_CUT)]
    count = int.from_bytes(window.at(_XI_HEADER - 2, 2), "little")
    start = _XI_HEADER + _XI_SAMPLE * max(count, 1)
    return compare_size(window, start, int.from_bytes(window.at(_XI_HEADER, 4), "little"))


def is_mpc(head: bytes, window: Window) -> bool:
    """Return whether a file is an Akai MPC 2000 file.

    The magic number has only two bytes, so the name, volume, tuning and channels must also be valid.
    """
    if not head.startswith(_MPC):
        return False
    header = window.at(0, _MPC_HEADER)
    name, settings = header[2:19].rstrip(b"\0"), header[19:22]
    return all(32 <= byte < 127 for byte in name) and all(
        byte <= most for byte, most in zip(settings, (200, 240, 1), strict=False)
    )


def mpc_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for an Akai MPC 2000 file, after checking its size."""
    header = window.at(0, _MPC_HEADER)
    if len(header) < _MPC_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    block = 4 if header[21] else 2
    return compare_size(window, _MPC_HEADER, block * int.from_bytes(header[30:34], "little"))


def is_mat4(_: bytes, window: Window) -> bool:
    """Return whether a file is a MATLAB 4 audio file, whose first matrix is named `samplerate`."""
    return window.at(20, 10) == _MAT4_NAME


def mat4_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a MATLAB 4 file, after checking its rate and the size of its samples."""
    position = 0
    order = "<" if window.at(0, 4) == bytes(4) else ">"
    for _ in range(_MAT4_MATRICES):
        head = window.at(position, 20)
        if len(head) < 20:
            return [whole_file(window.size, HEADER_CUT)]
        kind, rows, columns, is_complex, name = struct.unpack(f"{order}5I", head)
        if kind % 1000 >= 60:
            break
        size = rows * columns * _MAT4_SIZES[kind % 100 // 10] * (2 if is_complex else 1)
        start = position + 20 + name
        if size > window.size - start:
            return [whole_file(window.size, cut_short(size, max(0, window.size - start)))]
        position = start + size
    if window.at(position + 20, 10) == _MAT4_NAME:
        return [whole_file(window.size, JOINED)]
    return compare_end(window, position)


def is_mat5(head: bytes, _: Window) -> bool:
    """Return whether a file is a MATLAB 5 file."""
    return head == _MAT5[:12]


def mat5_streams(window: Window) -> list[Stream]:
    """Return a list with one `Stream` for a MATLAB 5 file, after checking the sizes of its elements."""
    if window.size < _MAT5_HEADER + 8:
        return [whole_file(window.size, HEADER_CUT)]
    order = "<" if window.at(126, 2) == b"IM" else ">"
    position = end = _MAT5_HEADER
    while position + 8 <= window.size:
        kind, size = struct.unpack(f"{order}II", window.at(position, 8))
        # libsndfile writes the size 8 bytes too large. Flags, dimensions and name precede the values.
        if kind == _MAT5_MATRIX:
            position += 8
            for _ in range(3):
                position += _mat5_element(window, position, order)
            continue
        if not 0 < kind & 0xFFFF <= _MAT5_LAST:
            break
        if kind >> 16:
            position += 8
            continue
        if size > window.size - position - 8:
            return [whole_file(window.size, cut_short(size, window.size - position - 8))]
        end = position + 8 + size
        position += _mat5_element(window, position, order)
    return compare_end(window, end)


def _mat5_element(window: Window, position: int, order: str) -> int:
    """Return the size of an element in bytes, with its header and padding.

    In an element with up to four bytes of data, one word contains both size and type.
    """
    head = window.at(position, 8)
    if len(head) < 8:
        return 8
    kind, size = struct.unpack(f"{order}II", head)
    return 8 if kind >> 16 else 8 + size + -size % 8


def is_sds(head: bytes, _: Window) -> bool:
    """Return whether a file is a MIDI sample dump."""
    return head[:2] == b"\xf0\x7e" and head[3:4] == b"\x01"


def sds_streams(window: Window) -> list[Stream]:
    """Return a MIDI sample dump as one `Stream`, after checking its number of packets."""
    header = window.at(0, _SDS_HEADER)
    if len(header) < _SDS_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    width = (header[6] + 6) // 7  # bytes per sample; each byte holds seven bits
    count = header[10] | header[11] << 7 | header[12] << 14
    if not 1 <= width <= 4:
        return [whole_file(window.size)]
    if not count and window.size > _SDS_HEADER:
        return [whole_file(window.size, "the audio is damaged: its header declares no samples")]
    packets = -(-count // (_SDS_BYTES // width))
    return compare_size(window, _SDS_HEADER, packets * _SDS_PACKET)


def is_sox(head: bytes, _: Window) -> bool:
    """Return whether a file is in SoX's native format."""
    return head[:4] in (b".SoX", b"XoS.")


def sox_streams(window: Window) -> list[Stream]:
    """Return a file in SoX's native format as one `Stream`, after checking its size."""
    order = "<" if window.at(0, 1) == b"." else ">"
    if window.size < _SOX_HEADER:
        return [whole_file(window.size, HEADER_CUT)]
    size, count = struct.unpack(f"{order}IQ", window.at(4, 12))
    return compare_size(window, 4 + size, 4 * count)


def is_htk(head: bytes, _: Window) -> bool:
    """Return whether a file is an HTK waveform.

    The format has no magic number. The header must declare 2-byte samples, and 1 microsecond to 10 ms per sample.
    """
    return head[8:12] == b"\0\x02\0\0" and 10 <= int.from_bytes(head[4:8], "big") <= 100_000


def htk_streams(window: Window) -> list[Stream]:
    """Return an HTK waveform as one `Stream`, after checking its size."""
    return compare_size(window, _HTK_HEADER, 2 * int.from_bytes(window.at(0, 4), "big"))
