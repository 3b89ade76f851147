"""Encode and decode the payloads of compressed blocks (coding 1 of `.lfr` files)."""

import struct
from collections.abc import Sequence

import numpy as np

from nemo_lfr.io.entropy.blocks import decode_blocks, encode_block, least_bytes
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.packing import check_range, pack, unpack

CODING = 1
MAX_BLOCK_FRAMES = 1024
BLOCK_FRAMES = 256  # for files that are not written live; `docs/concepts/lfr-compressed.md` compares other sizes
LEAST_BLOCK_FRAMES = 2  # compressing a single frame would save less than the length field costs
SIZE = struct.Struct("<I")


def payload_range(count: int, bytes_per_frame: int) -> range:
    """Return the valid payload sizes of a block in bytes.

    Args:
        count: number of frames in the block.
        bytes_per_frame: size of a packed frame in bytes.
    """
    return range(min(least_bytes(count), count * bytes_per_frame), count * bytes_per_frame + 1)


def encode_payload(model: EntropyModel, tokens: np.ndarray, bytes_per_frame: int) -> bytes:
    """Compress the tokens of a block.

    The payload contains packed frames (see `nemo_lfr.io.packing`) if compression would not make it smaller, or if the
    block has only one frame.

    Args:
        model: entropy model.
        tokens: tokens [C, T].
        bytes_per_frame: size of a packed frame in bytes.

    Returns:
        The length of the payload, followed by the payload.

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
        model: entropy model.
        blocks: for each block, its payload (without the length field) and its number of frames.
        bytes_per_frame: size of a packed frame in bytes.

    Returns:
        The int32 tokens [C, T] of each block.

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
