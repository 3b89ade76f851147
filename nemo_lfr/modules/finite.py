"""Mark NaN and infinite values in the results of a network.

`quantize` and `to_audio` mark such values as invalid tokens or NaN samples, and `Codec` raises an error when it finds
a mark. Without marks, the quantizer and the output activation would hide the values: `tanh` of infinity is 1, and
converting NaN to an integer is undefined. Marking runs on the device, without synchronizing a GPU.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

# Token that stands for "the encoder returned NaN or infinite values for this frame".
INVALID = -1


class Quantizer(Protocol):
    """Interface of `FiniteScalarQuantizer` and `GroupFiniteScalarQuantizer` that `quantize` needs."""

    def __call__(self, inputs: torch.Tensor) -> Any:
        """Return codes [B, D, T] and tokens [C, B, T]."""


def quantize(quantizer: Quantizer, encoded: torch.Tensor) -> torch.Tensor:
    """Quantize encoded frames [B, D, T] to tokens [B, C, T].

    If a frame has NaN or infinite values, all of its tokens are `INVALID`.
    """
    tokens: torch.Tensor = quantizer(encoded)[1]
    is_bad = ~encoded.isfinite().all(dim=1, keepdim=True)
    return tokens.transpose(0, 1).masked_fill(is_bad, INVALID)


def to_audio(activation: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Apply the output activation of a decoder; the result is NaN where `hidden` is NaN or infinite."""
    return activation(hidden).masked_fill(~hidden.isfinite(), float("nan"))
