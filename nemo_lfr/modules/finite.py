"""Marking of NaN and infinity in the results of a network.

Results are marked on the device, and `Codec` raises an error before it returns them. Without marks, quantization and
the output activation would hide such values: `tanh` of infinity is 1, and converting NaN to an integer is undefined.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

# Replaces the tokens of a frame with NaN or infinite values.
INVALID = -1


class Quantizer(Protocol):
    """`FiniteScalarQuantizer` or `GroupFiniteScalarQuantizer`."""

    def __call__(self, inputs: torch.Tensor) -> Any:
        """Return codes [B, D, T] and tokens [C, B, T]."""


def quantize(quantizer: Quantizer, encoded: torch.Tensor) -> torch.Tensor:
    """Quantize encoded frames [B, D, T] to tokens [B, C, T].

    All tokens of a frame with NaN or infinity are INVALID.
    """
    tokens: torch.Tensor = quantizer(encoded)[1]
    is_bad = ~encoded.isfinite().all(dim=1, keepdim=True)
    return tokens.transpose(0, 1).masked_fill(is_bad, INVALID)


def to_audio(activation: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Apply the output activation of a decoder, with NaN where `hidden` is not finite."""
    return activation(hidden).masked_fill(~hidden.isfinite(), float("nan"))
