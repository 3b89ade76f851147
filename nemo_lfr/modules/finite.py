"""Networks that give NaN or infinity: their results are marked on the device, and refused where they are returned.

Quantization and the decoder's last activation would hide both: `tanh` of infinity is 1, and NaN as an integer is
whatever the processor makes of it.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

# In place of the tokens of a frame that is not finite.
INVALID = -1


class Quantizer(Protocol):
    """`FiniteScalarQuantizer` or `GroupFiniteScalarQuantizer`."""

    def __call__(self, inputs: torch.Tensor) -> Any: ...


def quantize(quantizer: Quantizer, encoded: torch.Tensor) -> torch.Tensor:
    """Return tokens [B, C, T] of encoded frames [B, D, T]; all tokens of a frame with NaN or infinity are INVALID."""
    tokens: torch.Tensor = quantizer(encoded)[1]
    unsound = ~encoded.isfinite().all(dim=1, keepdim=True)
    return tokens.transpose(0, 1).masked_fill(unsound, INVALID)


def to_audio(activation: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Return the decoder's last activation of `hidden`, with NaN where it is not finite."""
    return activation(hidden).masked_fill(~hidden.isfinite(), float("nan"))
