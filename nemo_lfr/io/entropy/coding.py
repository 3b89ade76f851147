"""Coding 1 of `.lfr` files: what a block of frames is in the file when an entropy model compresses it."""

import struct
from collections.abc import Sequence

import numpy as np

from nemo_lfr.io.entropy.blocks import decode_blocks, encode_block, least_bytes
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.packing import check_range, pack, unpack

CODING = 1
MAX_BLOCK_FRAMES = 1024
BLOCK_FRAMES = 256  # of a file that is not live; see docs/FORMAT.md for what other sizes cost
LEAST_BLOCK_FRAMES = 2  # a frame without a past saves less than its length field costs
SIZE = struct.Struct("<I")


def payload_range(count: int, bytes_per_frame: int) -> range:
    """Lengths that the payload of a block of `count` frames may have."""
    return range(min(least_bytes(count), count * bytes_per_frame), count * bytes_per_frame + 1)


def encode_payload(model: EntropyModel, tokens: np.ndarray, bytes_per_frame: int) -> bytes:
    """Compress tokens [C, T], behind the length of the result; packed frames are taken where they are no longer.

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
    """Tokens [C, T] as int32 of blocks, each given as its payload without the length, and its frames.

    Raises:
        TokensError, ValueError: if a payload is not what `encode_payload` writes.
    """
    spec = model.spec
    codebook_size = int(np.prod(spec.levels))
    compressed = [number for number, (data, count) in enumerate(blocks) if len(data) != count * bytes_per_frame]
    decoded = dict(zip(compressed, decode_blocks(model, [blocks[number] for number in compressed]), strict=True))
    return [
        decoded[number] if number in decoded else unpack(data, codebook_size, spec.num_codebooks, bytes_per_frame)
        for number, (data, _) in enumerate(blocks)
    ]
