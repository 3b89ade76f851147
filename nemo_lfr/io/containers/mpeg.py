"""Find the recordings in MPEG audio (MP1, MP2 and MP3) by their frames.

Encoders may write a silent first frame, called the Xing header, which declares the number of frames. `mpeg_streams`
adds or corrects this frame so that libsndfile decodes the whole recording.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from nemo_lfr.io.containers.magic import after_id3, after_tags, has_magic
from nemo_lfr.io.containers.stream import FEW_BYTES, HEADER_CUT, JOINED, TAGS, Span, Stream, Window, whole_file

MAX_LEAD = 1 << 16  # maximum number of bytes before the first frame
CRC = 2  # bytes that may follow the header of a frame
# Numbers of samples that a layer 3 decoder may drop. DECODER_TRIM: its own delay plus one frame. XING_TRIM: maximum
# of the encoder's delay plus padding, which are two 12-bit fields after the Xing header.
DECODER_DELAY = 529
DECODER_TRIM, XING_TRIM = DECODER_DELAY + 1152, 2 * 4095
MAX_PADDING = 4096  # number of bytes of tags and zeros after the audio that are ignored without a warning

# Encoders may write the LAME header after the Xing header. LAME_BYTES: size of the LAME header in bytes. DELAY_AT:
# byte of the LAME header at which the encoder's delay and padding begin, two fields of 12 bits each.
LAME_BYTES, DELAY_AT = 36, 21

_BITRATES = {  # kbit/s by (is MPEG 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
Kind = tuple[int, int, int]  # layer, sample rate in Hz, bytes of side information
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version bits


@dataclass(frozen=True)
class Frame:
    """Header of an MPEG audio frame."""

    length: int  # bytes
    layer: int
    rate: int  # Hz
    side: int  # bytes of side information in layer 3
    samples: int  # samples per channel

    @property
    def kind(self) -> Kind:
        """Return the values that all frames of a recording share: layer, sample rate and size of side information.

        In layer 3, this size also distinguishes mono from stereo.
        """
        return self.layer, self.rate, self.side


def read_frame(head: bytes) -> Frame | None:
    """Parse the first four bytes of a frame; return None if they are not a header."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_index, bitrate_index = head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or layer == 4 or rate_index == 3 or bitrate_index in (0, 15):
        return None
    first = version == 3
    bitrate = _BITRATES[first, layer][bitrate_index - 1] * 1000
    rate = _RATES[version][rate_index]
    padding = head[2] >> 1 & 1
    if layer == 1:
        length = (12 * bitrate // rate + padding) * 4
    else:
        length = (144 if first or layer == 2 else 72) * bitrate // rate + padding
    mono = head[3] >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    samples = 384 if layer == 1 else 576 if layer == 3 and not first else 1152
    return Frame(length, layer, rate, side, samples)


@dataclass
class Piece:
    """Consecutive frames that one encoder wrote."""

    spans: list[Span] = field(default_factory=list)  # byte ranges of the frames, without tags between them
    count: int = 0
    promised: int | None = None  # number of audio frames that the Xing header declares
    first: bytes = b""  # header of the first frame
    first_length: int = 0  # bytes of the first frame
    problem: str | None = None  # error message
    is_certain: bool = False  # whether the problem remains even if the number of frames is as declared
    note: str | None = None  # warning about an irregularity that costs little or no audio

    def add(self, start: int, stop: int) -> None:
        """Add a frame at bytes [start, stop) of the file."""
        if self.spans and self.spans[-1][1] == start:
            start = self.spans.pop()[0]
        self.spans.append((start, stop))


def is_mpeg(head: bytes, window: Window) -> bool:
    """Return whether a file is an MPEG audio file."""
    start = after_id3(window, 0) if head.startswith(b"ID3") else 0
    if head.startswith(b"ID3") and window.at(start, 4) == b"fLaC":
        return False
    frame = read_frame(window.at(start, 4))
    return head.startswith(b"ID3") or (
        frame is not None and read_frame(window.at(start + frame.length, 4)) is not None
    )


def is_late(_: bytes, window: Window) -> bool:
    """Return whether MPEG audio begins after other data, such as an incomplete frame in a recorded stream."""
    position = 0
    while (position := window.find(b"\xff", position, MAX_LEAD)) >= 0:
        if read_frame(window.at(position, 4)) is not None and frames_follow(window, position, 8):
            return True
        position += 1
    return False


def frames_follow(window: Window, position: int, least: int = 3) -> bool:
    """Return whether MPEG audio begins at a position.

    `least` consecutive frames of one kind are required, or two if the file ends after them.
    """
    position = after_id3(window, position)
    kind: Kind | None = None
    for index in range(least):
        frame = read_frame(window.at(position, 4))
        if frame is None:
            return index > 1 and _is_end(window, position)
        if kind is not None and frame.kind != kind:
            return False
        kind = frame.kind
        position += frame.length
    return position <= window.size


def _pieces(window: Window) -> Iterator[Piece]:
    piece: Piece | None = None
    kind: Kind | None = None
    skipped: int | None = None  # start of the bytes that are not frames
    position = 0
    while position < window.size:
        head = window.at(position, 4)
        frame = read_frame(head)
        if frame is None or (frame.kind != kind and not _confirmed(window, position, frame)):
            if skipped is None and piece is not None and has_magic(window, after_tags(window, position)):
                piece.problem, piece.is_certain = JOINED, True
                break
            skipped = position if skipped is None else skipped
            if head[:3] == b"ID3":
                position = after_id3(window, position)
                kind = None
            else:  # a tag of another kind, or damage: search for the next frame
                position = _next_sync(window, position + 1)
                kind = None
            continue
        promised = _xing_frames(window.at(position, 200), frame)
        kind = frame.kind
        if position + frame.length > window.size:
            if piece is not None:
                rest = window.size - position
                piece.note = (
                    f"the audio ends within a frame, as recorded streams do; its last {rest} bytes are ignored"
                )
            skipped = None
            break
        if piece is None or promised is not None or _is_same_kind(piece, frame) is False:
            if piece is not None:
                piece.note = piece.note or _left_out(window, skipped, position)
                yield piece
            note = _before(window, position, frame) if piece is None else None
            piece = Piece(promised=promised, first=head, first_length=frame.length, note=note)
        elif skipped is not None and not window.at(skipped, 11).startswith(TAGS):
            hole = f"the audio is damaged: {position - skipped} bytes at position {skipped} are not MPEG frames"
            piece.problem = piece.problem or hole
            # Inserted bytes usually split a frame. Zeros may also be padding that the encoder wrote.
            piece.is_certain |= not window.is_zero(skipped, position)
        skipped = None
        if promised is None:
            piece.count += 1
        piece.add(position, position + frame.length)
        position += frame.length
    if piece is not None:
        piece.note = piece.note or _left_out(window, skipped, window.size)
        yield piece


def _before(window: Window, start: int, frame: Frame) -> str | None:
    """Return a warning about the bytes before the first frame, which begins at `start`.

    Tags, zeros and a part of one frame cause no warning (None).
    """
    begin = min(after_tags(window, 0), start)
    if start - begin < frame.length or window.is_zero(begin, start):
        return None
    return f"the {start - begin} bytes before the first MPEG frame are ignored"


def _left_out(window: Window, start: int | None, stop: int) -> str | None:
    """Return a warning about bytes [start, stop) that are not frames; None for tags and short padding."""
    if start is None:
        return None
    begin = min(after_tags(window, start), stop)
    if stop - begin >= FEW_BYTES:
        return f"{stop - begin} bytes at position {begin} are not MPEG audio and are ignored"
    return (
        f"the audio ends with {stop - start} bytes of padding, which are ignored"
        if stop - start > MAX_PADDING
        else None
    )


def _confirmed(window: Window, position: int, frame: Frame) -> bool:
    """Return whether another frame of the same kind, or the end of the audio, follows the frame at a position.

    Other bytes may look like a single frame by chance.
    """
    following = position + frame.length
    if following > window.size:
        return False
    other = read_frame(window.at(following, 4))
    return _is_end(window, following) if other is None else other.kind == frame.kind


def _is_end(window: Window, position: int) -> bool:
    """Return whether a position is the end of the file, or the start of a tag or of padding."""
    tagged = window.at(position, 11).startswith(TAGS)
    return tagged or window.is_zero(position, min(position + 64, window.size))


def _is_same_kind(piece: Piece, frame: Frame) -> bool:
    first = read_frame(piece.first)
    return first is not None and first.kind == frame.kind


def _next_sync(window: Window, position: int) -> int:
    while True:
        found = window.find(b"\xff", position)
        id3 = window.find(b"ID3", position, found if found >= 0 else None)
        if id3 >= 0:
            return id3
        if found < 0:
            return window.size
        if read_frame(window.at(found, 4)) is not None:
            return found
        position = found + 1


def _xing_frames(frame_bytes: bytes, frame: Frame) -> int | None:
    """Return the number of frames that a Xing or VBRI header declares.

    The result is 0 if the header declares no number, and None if there is no such header.
    """
    if frame.layer != 3:
        return None
    tag = frame_bytes[4 + frame.side : 4 + frame.side + 12]
    if len(tag) == 12 and tag[:4] in (b"Xing", b"Info"):
        flags, count = struct.unpack(">II", tag[4:12])
        return count if flags & 1 else 0
    if len(frame_bytes) >= 54 and frame_bytes[36:40] == b"VBRI":
        return int.from_bytes(frame_bytes[50:54], "big")
    return None


def mpeg_streams(window: Window) -> list[Stream]:
    """Find the recordings in MPEG audio, and add or correct Xing headers where this is needed."""
    pieces = [piece for piece in _pieces(window) if piece.count or piece.promised]
    if not pieces and window.at(0, 3) == b"ID3" and after_id3(window, 0) >= window.size:
        return [whole_file(window.size, HEADER_CUT)]
    streams = []
    for piece in pieces:
        first = read_frame(piece.first)
        is_counted = piece.count == piece.promised
        stream = Stream(piece.spans, by_name=True, note=piece.note, least_samples=_least_samples(piece))
        stream.problem = piece.problem if piece.is_certain or not is_counted else None
        if piece.promised and piece.count < piece.promised:
            stream.problem = (
                f"the audio was truncated: its header declares {piece.promised} frames, but there are {piece.count}"
            )
        if piece.promised and piece.count <= piece.promised:
            stream.is_file = len(pieces) == 1 and _is_plain(window, piece)
            if not stream.is_file:
                stream.header, stream.spans = _true_header(window, piece)
        elif piece.promised and _xing_tag(window, piece):  # more frames than the header declares
            stream.header, stream.spans = _true_header(window, piece)
        elif first is not None and first.layer == 3:
            if piece.promised is not None:  # a header without a number of frames, which is not audio
                stream.spans = _true_header(window, piece)[1]
            stream.header = _header_frames(piece.first, piece.count)
        elif first is not None:
            # libsndfile stops at a length that it estimates from the sizes of the file and of the first frame. If this
            # estimate is too short, the stream contains the frames several times. The copies are not decoded; they
            # only increase the estimate.
            stream.num_samples = piece.count * first.samples
            size = sum(stop - start for start, stop in piece.spans)
            stream.spans = piece.spans * -(-piece.count * piece.first_length // size)
        streams.append(stream)
    return streams


def _least_samples(piece: Piece) -> int:
    """Return the minimum number of samples that a decoder produces from the frames of a recording."""
    frame = read_frame(piece.first)
    if frame is None:
        return 0
    trim = 0 if frame.layer != 3 else DECODER_TRIM + (0 if piece.promised is None else XING_TRIM)
    return max(0, piece.count * frame.samples - trim)


def _is_plain(window: Window, piece: Piece) -> bool:
    """Return whether libmpg123 reads a file completely and without messages on stderr.

    Such a file consists only of frames and, optionally, ID3v2 tags and an ID3v1 tag. The side information of its first
    frame is all zeros. If its Xing header declares a size, the size is correct within 0.5%.
    """
    (start, stop), *others = piece.spans
    tag = window.size - 128
    is_end = stop == window.size or (stop == tag and window.at(tag, 3) == b"TAG")
    promised = _xing_bytes(window, piece)
    frame = read_frame(piece.first)
    return (
        not others
        and frame is not None
        and not any(window.at(start + 4 + CRC, frame.side - CRC))
        and start == after_id3(window, 0)
        and is_end
        and (promised is None or abs(promised - (stop - start)) * 200 < stop - start)
    )


def _xing_bytes(window: Window, piece: Piece) -> int | None:
    """Return the recording's size in bytes, as declared in its Xing header; None if no size is declared."""
    tag = _xing_tag(window, piece)
    return struct.unpack_from(">I", tag, 12)[0] if len(tag) >= 16 and tag[7] & 3 == 3 else None


def _xing_tag(window: Window, piece: Piece) -> bytes:
    frame = read_frame(piece.first)
    if frame is None:
        return b""
    start = piece.spans[0][0] + 4 + frame.side
    tag = window.at(start, 16)
    return tag if tag[:4] in (b"Xing", b"Info") else b""


def _true_header(window: Window, piece: Piece) -> tuple[bytes, list[Span]]:
    """Return a new Xing header, and the byte ranges of the frames after it.

    The new header states the true size and number of frames. If the old header declares too few frames, the padding at
    the end is unknown, and the new header declares no padding.
    """
    (start, stop), *others = piece.spans
    header = bytearray(window.at(start, piece.first_length))
    frame = read_frame(piece.first)
    if frame is not None:
        header[4 + CRC : 4 + frame.side] = bytes(frame.side - CRC)
    if frame is not None and _xing_bytes(window, piece) is not None:
        size = sum(stop - start for start, stop in piece.spans)
        struct.pack_into(">I", header, 4 + frame.side + 12, min(size, 0xFFFFFFFF))
    if frame is not None and piece.promised and piece.count > piece.promised:
        tag = 4 + frame.side
        struct.pack_into(">I", header, tag + 8, piece.count)
        flags = header[tag + 7]  # one bit per field: number of frames, size, table of contents, quality
        fields = sum(size for bit, size in enumerate((4, 4, 100, 4)) if flags >> bit & 1)
        padding = tag + 8 + fields + DELAY_AT + 1
        if padding + 2 <= len(header):
            header[padding] &= 0xF0
            header[padding + 1] = 0
    return bytes(header), [(start + piece.first_length, stop), *others]


def _header_frames(head: bytes, count: int) -> bytes:
    """Return a frame with a Xing header and a silent frame, to be placed before audio without a Xing header.

    Without the header, libmpg123 would estimate the number of frames from the bit rate. libmpg123 drops the declared
    delay and 529 more samples (the delay of its decoder), so the declared delay is 529 samples shorter than the silent
    frame.

    Args:
        head: first four bytes of an audio frame. The two returned frames have its sample rate and channels.
        count: number of frames that follow.

    Returns:
        The two frames; empty for layers 1 and 2, which have no Xing headers.
    """
    frame = read_frame(head)
    if frame is None or frame.layer != 3:
        return b""
    made = [bytes([head[0], head[1] | 1, index << 4 | head[2] & 0x0C, head[3]]) for index in range(1, 15)]
    for first in made:
        own = read_frame(first)
        if own is not None and own.length >= 4 + own.side + 120 + LAME_BYTES:
            tag = b"Xing" + struct.pack(">II", 1, count + 1)
            lame = b"LAME".ljust(DELAY_AT, b"\0") + struct.pack(">I", (frame.samples - DECODER_DELAY) << 20)[:3]
            silent = read_frame(made[0]) or own
            return (first + bytes(own.side) + tag + lame).ljust(own.length, b"\0") + made[0].ljust(
                silent.length, b"\0"
            )
    return b""
