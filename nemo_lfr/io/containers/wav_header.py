"""Parse and rebuild the header of a WAV file, which consists of the chunks before the samples."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from nemo_lfr.io.containers.stream import UNKNOWN_BYTES, Window
from nemo_lfr.io.containers.wide import is_wide

# Tags in the `fmt ` chunk of formats with a fixed size per sample: integers, floats, A-law, mu-law, and the extended
# description of such a format.
_PLAIN_TAGS = (0x01, 0x03, 0x06, 0x07, 0xFFFE)
# Tags in the `fmt ` chunk for MPEG audio: layers 1 and 2, and layer 3.
MPEG_TAGS = (b"\x50\0", b"\x55\0")


def is_wav(head: bytes, _: Window) -> bool:
    """Return whether a file is a WAV file."""
    return head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE"


@dataclass
class WavHeader:
    """Content of the chunks before the samples of a WAV file.

    Attributes:
        start: the first twelve bytes of the file.
        format: content of the `fmt ` chunk.
        data_size: size of the samples in bytes, as declared in the `data` chunk.
        long_size: size of the samples in bytes, as declared in the `ds64` chunk; None without this chunk.
        long_total: size of the RIFF chunk in bytes, as declared in the `ds64` chunk; None without this chunk.
        is_completed: whether the bits per sample were added to `format`, because the `fmt ` chunk lacks them.
    """

    start: bytes
    format: bytes = b""
    data_size: int = 0
    long_size: int | None = None
    long_total: int | None = None
    is_completed: bool = False

    @property
    def magic(self) -> bytes:
        """Return the first four bytes of the file."""
        return self.start[:4]

    @property
    def order(self) -> str:
        """Return the byte order in the notation of `struct`."""
        return ">" if self.magic == b"RIFX" else "<"

    @property
    def declared(self) -> int:
        """Return the declared size of the samples in bytes."""
        if self.data_size in (0, 0xFFFFFFFF) and self.long_size is not None:
            return self.long_size
        return self.data_size

    @property
    def is_changed(self) -> bool:
        """Return whether libsndfile would read the samples in another way than this header says.

        For RF64, libsndfile uses the size in the `ds64` chunk even if the `data` chunk declares a size.
        """
        has_two_sizes = self.long_size not in (None, self.data_size) and self.data_size != 0xFFFFFFFF
        return self.is_completed or has_two_sizes

    def includes_header(self, begin: int, available: int) -> bool:
        """Return whether the declared size of the samples includes the header, as in files of some recorders.

        If the RIFF chunk is declared larger than the file, the file is truncated, and the result is False.

        Args:
            begin: position of the first sample.
            available: number of bytes from the first sample to the end of the file.
        """
        total = self.long_total
        if total is None:
            total = struct.unpack_from(f"{self.order}I", self.start.ljust(8, b"\0"), 4)[0]
        size = begin + available
        return self.declared in (size, size - 8) and 0 < total <= size

    @property
    def is_plain(self) -> bool:
        """Return whether all samples have one size, and the header says which of their bytes contain the value."""
        is_known = len(self.format) >= 2 and struct.unpack_from(f"{self.order}H", self.format)[0] in _PLAIN_TAGS
        return is_known and not is_wide(self.format, self.order)

    @property
    def is_mpeg(self) -> bool:
        """Return whether the samples are frames of MPEG audio."""
        return self.order == "<" and self.format[:2] in MPEG_TAGS

    def note(self, name: bytes, body: bytes) -> None:
        """Store the content of a `fmt ` or `ds64` chunk; other chunks are ignored.

        Args:
            name: name of the chunk.
            body: content of the chunk.
        """
        if name == b"fmt " and not self.format:
            self.format = _with_bits(body, self.order)
            self.is_completed = self.format != body
        elif name == b"ds64" and len(body) >= 16:
            self.long_total, self.long_size = struct.unpack_from("<QQ", body)

    def is_unknown(self, available: int | None) -> bool:
        """Return whether the header does not state the length of the samples.

        Args:
            available: number of bytes after the header; None if unknown.
        """
        declared = self.declared
        if declared == 0 and self.magic in (b"RF64", b"BW64") and self.data_size == 0xFFFFFFFF:
            return True
        return declared >= UNKNOWN_BYTES and (available is None or declared > available)

    def rebuilt(self, size: int | None) -> bytes:
        """Return a header for `size` bytes of samples. If `size` is None, the header declares an unknown size."""
        magic, order, long = (b"RIFX", ">", b"") if self.magic == b"RIFX" else (b"RIFF", "<", b"")
        pad = b"\0" * (len(self.format) % 2)
        chunk = struct.pack(f"{order}4sI", b"fmt ", len(self.format)) + self.format + pad
        total = 4 + len(chunk) + 8 + (size or 0)
        if size is None:
            total = size = 0xFFFFFFFF
        elif total >= 0xFFFFFFF0:
            magic, order = b"RF64", "<"
            long = struct.pack("<4sIQQQI", b"ds64", 28, total + 36, size, 0, 0)
            total = size = 0xFFFFFFFF
        start = struct.pack(f"{order}4sI4s", magic, total, b"WAVE")
        return start + long + chunk + struct.pack(f"{order}4sI", b"data", size)


def _with_bits(form: bytes, order: str) -> bytes:
    """Add the number of bits per sample to the content of a `fmt ` chunk that ends at byte 14, before this field.

    FFmpeg would assume 8 bits.
    """
    if not 14 <= len(form) < 16:
        return form
    tag, channels, _, _, size = struct.unpack_from(f"{order}HHIIH", form)
    if tag not in _PLAIN_TAGS or not channels or not size or size % channels:
        return form
    return form[:14] + struct.pack(f"{order}H", 8 * (size // channels) & 0xFFFF)


def read_wav_header(read: Callable[[int], bytes]) -> tuple[WavHeader | None, bytes]:
    """Read a WAV file up to its first sample.

    Args:
        read: function that returns the requested number of bytes, or fewer at the end of the file.

    Returns:
        The header, and all bytes that were read. The header is None if it is invalid, or if there is no `data` chunk
        near the beginning.
    """
    taken = bytearray(read(12))
    header = WavHeader(bytes(taken))
    if not is_wav(bytes(taken), None):  # type: ignore[arg-type]  # `is_wav` uses only the first bytes
        return None, bytes(taken)
    while len(taken) < 1 << 26:
        start = read(8)
        taken += start
        if len(start) < 8:
            break
        name, size = start[:4], struct.unpack(f"{header.order}I", start[4:])[0]
        if name == b"data":
            header.data_size = size
            return (header if header.format else None), bytes(taken)
        if size > 1 << 26:
            break
        body = read(size + size % 2)
        taken += body
        header.note(name, body[:size])
    return None, bytes(taken)
