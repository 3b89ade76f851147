"""Mark NaN and infinite values in the results of a network.

`quantize` marks such values with the token `INVALID`, and `to_audio` with NaN. `Codec` raises an error when it finds a
mark. Without marks, the quantizer and the output activation would hide the values; `tanh` of infinity is 1.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

# Token that stands for "the encoder returned NaN or infinite values for this frame".
INVALID = -1


class Quantizer(Protocol):
    """Interface of `FiniteScalarQuantizer` and `GroupFiniteScalarQuantizer` that this file needs."""

    @property
    def is_plain(self) -> Any:
        """Whether no caller has added hooks to the quantizer, or changed its methods, buffers or groups."""

    def __call__(self, inputs: torch.Tensor) -> Any:
        """Return codes [B, D, T] and tokens [C, B, T]."""

    def encode(self, inputs: torch.Tensor, input_len: torch.Tensor | None) -> torch.Tensor:
        """Quantize as NeMo's model does: [B, D, T] -> [C, B, T]."""

    def decode(self, indices: torch.Tensor, input_len: torch.Tensor | None) -> torch.Tensor:
        """Dequantize as NeMo's model does: [C, B, T] -> [B, D, T]."""

    def decode_unchecked(self, indices: torch.Tensor, input_len: torch.Tensor | None) -> torch.Tensor:
        """Dequantize tokens without checking them, [C, B, T] -> [B, D, T]."""


def quantize(quantizer: Quantizer, encoded: torch.Tensor, num_frames: list[int] | None = None) -> torch.Tensor:
    """Quantize encoded frames [B, D, T] to tokens [B, C, T].

    If a frame has NaN or infinite values, all of its tokens are `INVALID`.

    Args:
        quantizer: the quantizer. If a caller has changed it, its method `encode` is called, as in NeMo, except under
            `torch.compile`.
        encoded: output of the encoder.
        num_frames: valid frames in each example; default: all.
    """
    is_bad = ~encoded.isfinite().all(dim=1, keepdim=True)
    if torch.compiler.is_compiling() or quantizer.is_plain:
        tokens: torch.Tensor = quantizer(encoded)[1]
    else:
        tokens = quantizer.encode(inputs=encoded.masked_fill(is_bad, 0), input_len=_lengths(encoded, num_frames))
    return tokens.transpose(0, 1).masked_fill(is_bad, INVALID)


def dequantize(quantizer: Quantizer, tokens: torch.Tensor, num_frames: list[int] | None = None) -> torch.Tensor:
    """Dequantize valid tokens [B, C, T] to codes [B, D, T], which are zero after the end of each example.

    Args:
        quantizer: the quantizer. If a caller has changed it, its method `decode` is called, as in NeMo, except under
            `torch.compile`.
        tokens: the tokens.
        num_frames: valid frames in each example; default: all.
    """
    indices, width = tokens.transpose(0, 1), tokens.shape[2]
    if torch.compiler.is_compiling() or quantizer.is_plain:
        is_partial = num_frames is not None and min(num_frames) < width
        return quantizer.decode_unchecked(indices, _lengths(tokens, num_frames) if is_partial else None)
    return quantizer.decode(indices=indices, input_len=_lengths(tokens, num_frames))


def _lengths(values: torch.Tensor, num_frames: list[int] | None) -> torch.Tensor:
    return torch.tensor(num_frames or [values.shape[2]] * len(values), device=values.device)


def to_audio(activation: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Apply the output activation of a decoder; the result is NaN where `hidden` is NaN or infinite."""
    return activation(hidden).masked_fill(~hidden.isfinite(), float("nan"))
