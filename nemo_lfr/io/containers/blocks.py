"""Count the samples of audio that is stored in blocks, and handle a last block that is shorter than the others.

Many programs write a short last block. libsndfile drops its samples, or decodes bytes that are not in the file. We
therefore pad the block with zeros, and read only the samples that are in the file.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from nemo_lfr.io.containers.stream import Stream


@dataclass(frozen=True)
class BlockCodec:
    """A codec that stores audio in blocks of a fixed size.

    Attributes:
        size: size of a block in bytes.
        samples: number of samples per channel in a block.
        samples_in: function of a number of bytes n. It returns the number of samples per channel in the first n bytes
            of a block, and the number of bytes that these samples use.
    """

    size: int
    samples: int
    samples_in: Callable[[int], tuple[int, int]] = lambda _: (0, 0)

    def fit(self, stream: Stream, length: int) -> Stream:
        """Return a stream from which a decoder reads exactly the samples in the file.

        Args:
            stream: stream whose byte ranges end with the last block.
            length: number of bytes in all blocks, as declared. Some programs count the padding byte of the chunk, too.

        Returns:
            The unchanged stream if its last block is complete and a decoder would not read beyond it. Otherwise, a
            copy whose `num_samples` is the number of samples in the file. An incomplete last block is padded.
        """
        blocks, rest = divmod(length, self.size)
        count, used = self.samples_in(rest)
        is_padded = rest == 1 and length % 2 == 0 and not used  # `length` includes the padding byte
        if not rest and length % 2 == 0:
            return stream
        if not rest or is_padded:
            # libsndfile would decode the padding byte after the last block as another block.
            return replace(stream, num_samples=blocks * self.samples)
        ignored = f"the last block of the audio is incomplete; its last {rest - used} bytes are ignored"
        num_samples = blocks * self.samples + min(count, self.samples)
        note = stream.note or (ignored if used < rest else None)
        return replace(stream, num_samples=num_samples, padding=self.size - rest, note=note)


def wav_codec(form: bytes, order: str) -> BlockCodec | None:
    """Return the block codec of a WAV file; None if its codec does not store blocks, or libsndfile cannot decode it.

    Args:
        form: content of the `fmt ` chunk.
        order: byte order in the notation of `struct`.
    """
    if len(form) < 16:
        return None
    tag, channels, _, _, size, bits = struct.unpack_from(f"{order}HHIIHH", form)
    if tag == 0x02 and bits == 4 and size > 7 * channels > 0:
        return _ms_adpcm(channels, size)
    if tag == 0x11 and bits == 4 and size > 4 * channels > 0:
        return _ima_adpcm(channels, size)
    if tag == 0x31 and size == 65:
        return BlockCodec(65, 320, lambda n: (160, 33) if n >= 33 else (0, 0))  # two frames of 32.5 bytes
    if tag == 0x38 and size in (42, 62, 82):  # NMS
        return BlockCodec(size, 160)
    return sample_codec(4) if tag == 0x40 and channels == 1 else None


def _ms_adpcm(channels: int, size: int) -> BlockCodec:
    """Return the codec MS ADPCM with blocks of `size` bytes.

    A block begins with two samples per channel, and the state of the predictor.
    """

    def samples_in(count: int) -> tuple[int, int]:
        codes = count - 7 * channels
        return (2 + 2 * codes // channels, count) if codes >= 0 else (0, 0)

    return BlockCodec(size, samples_in(size)[0], samples_in)


def _ima_adpcm(channels: int, size: int) -> BlockCodec:
    """Return the codec IMA ADPCM with blocks of `size` bytes.

    A block begins with one sample per channel. Each following group of four bytes contains eight samples of a
    channel.
    """

    def samples_in(count: int) -> tuple[int, int]:
        groups = count // (4 * channels)
        return (8 * groups - 7, 4 * channels * groups) if groups else (0, 0)

    return BlockCodec(size, samples_in(size)[0], samples_in)


def sample_codec(bits: int) -> BlockCodec:
    """Return a block codec with `bits` bits per sample, which libsndfile decodes in blocks of 120 samples."""

    def samples_in(count: int) -> tuple[int, int]:
        return 8 * count // bits, count

    return BlockCodec(15 * bits, 120, samples_in)
