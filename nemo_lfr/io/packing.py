"""Pack the tokens of each frame into one little-endian number with a fixed number of bytes.

The tokens are the digits of the number in base `codebook_size`, and the token of the first codebook is the lowest
digit. Eight codebooks of 2016 entries have 2016^8 < 2^88 values, so a frame needs 11 bytes.
"""

import numpy as np

from nemo_lfr.errors import TokensError

LIMB_BITS = 32
# Up to this many frames, Python integers are faster than NumPy. Blocks of a live recording may have only one frame.
FEW_FRAMES = 16


def pack(tokens: np.ndarray, codebook_size: int, num_bytes: int) -> bytes:
    """Pack tokens into bytes.

    Args:
        tokens: ids in [0, codebook_size), shape [C, T].
        codebook_size: number of entries in each codebook.
        num_bytes: number of bytes for each frame.

    Returns:
        T * num_bytes bytes.

    Raises:
        TokensError: if a token is out of range.
    """
    check_range(tokens, codebook_size)
    if tokens.shape[1] <= FEW_FRAMES:
        return b"".join(_pack_frame(frame, codebook_size, num_bytes) for frame in tokens.T.astype(np.int64).tolist())
    num_limbs = -(-num_bytes * 8 // LIMB_BITS)
    limbs = np.zeros((tokens.shape[1], num_limbs), dtype=np.uint64)
    for codebook in tokens[::-1].astype(np.uint64):  # Horner: value = value * codebook_size + token
        carry = codebook
        for limb in range(num_limbs):
            carry = carry + limbs[:, limb] * np.uint64(codebook_size)
            limbs[:, limb] = carry & np.uint64(0xFFFFFFFF)
            carry = carry >> np.uint64(LIMB_BITS)
    return limbs.astype("<u4").view(np.uint8)[:, :num_bytes].tobytes()


def check_range(tokens: np.ndarray, codebook_size: int) -> None:
    """Check that all tokens are in [0, codebook_size).

    Raises:
        TokensError: if a token is out of range.
    """
    if tokens.size and (tokens.min() < 0 or tokens.max() >= codebook_size):
        raise TokensError(f"tokens range from {tokens.min()} to {tokens.max()}; expected [0, {codebook_size}).")


def unpack(data: bytes, codebook_size: int, num_codebooks: int, num_bytes: int) -> np.ndarray:
    """Unpack the bytes that `pack` returns.

    Args:
        data: T * num_bytes bytes.
        codebook_size: number of entries in each codebook.
        num_codebooks: number of codebooks C.
        num_bytes: number of bytes for each frame.

    Returns:
        The int32 tokens [C, T].

    Raises:
        TokensError: if the last frame is incomplete, or the number that represents a frame is too large.
    """
    if len(data) % num_bytes:
        raise TokensError(f"the data has {len(data)} bytes; expected a multiple of the frame size, {num_bytes} bytes.")
    if len(data) <= FEW_FRAMES * num_bytes:
        frames = [
            _unpack_frame(data[at : at + num_bytes], codebook_size, num_codebooks)
            for at in range(0, len(data), num_bytes)
        ]
        return np.array(frames, dtype=np.int32).reshape(len(frames), num_codebooks).T
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
        raise _too_large(codebook_size, num_codebooks)
    return tokens


def _pack_frame(frame: list[int], codebook_size: int, num_bytes: int) -> bytes:
    value = 0
    for token in reversed(frame):
        value = value * codebook_size + token
    return value.to_bytes(num_bytes, "little")


def _unpack_frame(data: bytes, codebook_size: int, num_codebooks: int) -> list[int]:
    value = int.from_bytes(data, "little")
    frame = []
    for _ in range(num_codebooks):
        value, token = divmod(value, codebook_size)
        frame.append(token)
    if value:
        raise _too_large(codebook_size, num_codebooks)
    return frame


def _too_large(codebook_size: int, num_codebooks: int) -> TokensError:
    return TokensError(
        f"a packed frame is not a number below {codebook_size}^{num_codebooks}, so it does not represent tokens."
    )
