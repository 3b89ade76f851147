"""Coding 1 of `.lfr` files: payloads of compressed frame blocks."""

import struct
from collections.abc import Sequence

import numpy as np

from nemo_lfr.io.entropy.blocks import decode_blocks, encode_block, least_bytes
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.packing import check_range, pack, unpack

CODING = 1
MAX_BLOCK_FRAMES = 1024
BLOCK_FRAMES = 256  # for files that are not live; docs/FORMAT.md compares other sizes
LEAST_BLOCK_FRAMES = 2  # the first frame of a block saves less than the size of its length field
SIZE = struct.Struct("<I")


def payload_range(count: int, bytes_per_frame: int) -> range:
    """Return the valid payload sizes in bytes of a block of `count` frames."""
    return range(min(least_bytes(count), count * bytes_per_frame), count * bytes_per_frame + 1)


def encode_payload(model: EntropyModel, tokens: np.ndarray, bytes_per_frame: int) -> bytes:
    """Compress tokens, with the length of the result in front.

    Packed frames are used instead if they are not larger, and for very short blocks.

    Args:
        model: the entropy model.
        tokens: tokens [C, T].
        bytes_per_frame: size of a packed frame.

    Returns:
        The payload with its length field.

    Raises:
        TokensError: if a token is outside the codebook.
    """
    size = tokens.shape[1] * bytes_per_frame
    codebook_size = int(np.prod(model.spec.levels))
    check_range(tokens, codebook_size)
    data = encode_block(model, tokens) if tokens.shape[1] >= LEAST_BLOCK_FRAMES else None
    if data is None or len(data) >= size:
        data = pack(tokens, codebook_size, bytes_per_frame)
    return SIZE.pack(len(data)) + data


def decode_payloads(
    model: EntropyModel, blocks: Sequence[tuple[bytes, int]], bytes_per_frame: int
) -> list[np.ndarray]:
    """Decode the payloads of several blocks.

    Args:
        model: the entropy model.
        blocks: payload without its length field, and number of frames, of each block.
        bytes_per_frame: size of a packed frame.

    Returns:
        Tokens [C, T], int32, of each block.

    Raises:
        TokensError: if a payload contains an invalid token.
        ValueError: if a payload is not a valid encoding.
    """
    spec = model.spec
    codebook_size = int(np.prod(spec.levels))
    compressed = [number for number, (data, count) in enumerate(blocks) if len(data) != count * bytes_per_frame]
    decoded = dict(zip(compressed, decode_blocks(model, [blocks[number] for number in compressed]), strict=True))
    return [
        decoded[number] if number in decoded else unpack(data, codebook_size, spec.num_codebooks, bytes_per_frame)
        for number, (data, _) in enumerate(blocks)
    ]
