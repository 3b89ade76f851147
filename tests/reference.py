"""Reference tokens and audio, computed for one clip alone and at once, and a comparison that permits rounding ties."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from nemo_lfr.codec.codec import Codec

# Distance from a rounding edge within which the order of additions can change a token: values are about 1, float32 has
# 7 digits, and there are a few hundred additions between audio and tokens.
TIE = 1e-4


@torch.no_grad()
def reference_encode(codec: Codec, clip: np.ndarray) -> torch.Tensor:
    """Encode one clip alone, at once and padded with zeros, to tokens [C, T]."""
    return codec.quantizer.encode(_encoded(codec, clip))[:, 0, : -(-len(clip) // codec.samples_per_frame)]


@torch.no_grad()
def reference_decode(codec: Codec, tokens: torch.Tensor) -> torch.Tensor:
    """Decode tokens [C, T] alone and at once to audio [T_audio]."""
    inputs = codec.quantizer.decode(tokens[:, None])
    padding = max(0, codec.decoder.min_frames - tokens.shape[1])
    return codec.decoder.decode_frames(F.pad(inputs, (0, padding)))[0, : tokens.shape[1] * codec.samples_per_frame]


def _encoded(codec: Codec, clip: np.ndarray) -> torch.Tensor:
    frames = max(math.ceil(len(clip) / codec.samples_per_frame), codec.encoder.min_frames)
    audio = np.zeros(frames * codec.samples_per_frame, dtype=np.float32)
    audio[: len(clip)] = clip
    return codec.encoder.encode_frames(torch.from_numpy(audio)[None])


@torch.no_grad()
def assert_same_tokens(codec: Codec, clip: np.ndarray, got: torch.Tensor, expected: torch.Tensor | None = None) -> int:
    """Assert that tokens [C, T] are equal except for rounding ties, and return the number of ties.

    A tie is a value within `TIE` of a rounding edge.
    """
    if expected is None:
        expected = reference_encode(codec, clip)
    assert got.shape == expected.shape
    differ = got.cpu() != expected.cpu()
    if not differ.any():
        return 0
    fsq = getattr(codec.quantizer, "fsqs", [codec.quantizer])[0]
    encoded = _encoded(codec, clip).reshape(codec.num_codebooks, len(codec.levels), -1)
    to_edge = ((fsq.compress(encoded) % 1) - 0.5).abs().amin(dim=1)[:, : got.shape[1]]
    wrong = differ & (to_edge > TIE)
    assert not wrong.any(), f"{int(wrong.sum())} of {got.numel()} tokens differ and are no ties: {wrong.nonzero()[:5]}"
    # Ties are rare, so a large number of them indicates a real difference.
    ties = int(differ.sum())
    assert ties <= 2 + got.numel() // 500
    return ties


def changed_frames(
    function: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    frame: int,
    items_per_frame: int,
    frames_out: int,
) -> list[int]:
    """Return the output frames that change when one input frame changes."""
    other = inputs.clone()
    where = slice(frame * items_per_frame, (frame + 1) * items_per_frame)
    other[..., where] += torch.randn(other[..., where].shape, dtype=other.dtype)
    with torch.no_grad():
        difference = (function(other) - function(inputs)).abs()
    return torch.nonzero(difference.reshape(-1, frames_out, difference.shape[-1] // frames_out).amax((0, 2)))[
        :, 0
    ].tolist()
