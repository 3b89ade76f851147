"""Frames of tokens as bytes: each frame is one mixed-radix number, little-endian, in as few bytes as hold any frame.

The first codebook is the lowest digit. Eight codebooks of 2016 entries make 2016^8 < 2^88 values: 11 bytes.
"""

import numpy as np

from nemo_lfr.errors import TokensError

LIMB_BITS = 32


def pack(tokens: np.ndarray, codebook_size: int, num_bytes: int) -> bytes:
    """Tokens [C, T] -> T * num_bytes bytes.

    Raises:
        TokensError: if a token is outside the codebook.
    """
    if tokens.size and (tokens.min() < 0 or tokens.max() >= codebook_size):
        raise TokensError(f"tokens reach from {tokens.min()} to {tokens.max()}; expected [0, {codebook_size}).")
    num_limbs = -(-num_bytes * 8 // LIMB_BITS)
    limbs = np.zeros((tokens.shape[1], num_limbs), dtype=np.uint64)
    for codebook in tokens[::-1].astype(np.uint64):  # Horner: value = value * codebook_size + token
        carry = codebook
        for limb in range(num_limbs):
            carry = carry + limbs[:, limb] * np.uint64(codebook_size)
            limbs[:, limb] = carry & np.uint64(0xFFFFFFFF)
            carry = carry >> np.uint64(LIMB_BITS)
    return limbs.astype("<u4").view(np.uint8)[:, :num_bytes].tobytes()


def unpack(data: bytes, codebook_size: int, num_codebooks: int, num_bytes: int) -> np.ndarray:
    """The inverse of `pack`: tokens [C, T] as int32.

    Raises:
        TokensError: if the bytes are not whole frames, or a frame is no number that `pack` writes.
    """
    if len(data) % num_bytes:
        raise TokensError(f"{len(data)} bytes are not whole frames of {num_bytes}.")
    num_limbs = -(-num_bytes * 8 // LIMB_BITS)
    padded = np.zeros((len(data) // num_bytes, num_limbs * 4), dtype=np.uint8)
    padded[:, :num_bytes] = np.frombuffer(data, dtype=np.uint8).reshape(-1, num_bytes)
    limbs = padded.view("<u4").astype(np.uint64)
    tokens = np.empty((num_codebooks, len(limbs)), dtype=np.int32)
    for codebook in tokens:
        remainder = np.zeros(len(limbs), dtype=np.uint64)
        for limb in reversed(range(num_limbs)):
            value = (remainder << np.uint64(LIMB_BITS)) | limbs[:, limb]
            limbs[:, limb] = value // np.uint64(codebook_size)
            remainder = value % np.uint64(codebook_size)
        codebook[:] = remainder
    if limbs.any():
        raise TokensError(f"a frame holds a number above {codebook_size}^{num_codebooks}.")
    return tokens
