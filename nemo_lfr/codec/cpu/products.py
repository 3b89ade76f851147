"""Convolutions of short signals on a CPU, as matrix products.

A live stream advances by a few frames at a time. For short signals, oneDNN's convolutions read all weights again for
each stream. A matrix product reads the weights once for all streams. Each row of its left matrix contains the inputs
that one output of one stream depends on.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.codec.cpu.packed import ModuleWeights, Weights, weights_of
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d, fold
from nemo_lfr.modules.weights import DerivedForms

# From this number of rows on, oneDNN's convolution is faster, because it does not copy the inputs to rows (measured on
# Zen 4 with 16 to 64 channels).
MAX_ROWS = 1024


class StreamWeights(Protocol):
    """Weights of an encoder or decoder, and methods that run convolutions of signals [B, T, H]."""

    def convolve(self, layer: Conv1d, hidden: torch.Tensor, slope: float = 1.0) -> torch.Tensor:
        """Run `Conv1d.convolve`, then a leaky ReLU: [B, T, H_in] -> [B, (T - span) // stride + 1, H_out]."""

    def overlap(self, layer: ConvTranspose1d, hidden: torch.Tensor) -> torch.Tensor:
        """Run `ConvTranspose1d.overlap`: [B, T, H_in] -> [B, (T - 1) * stride, H_out]."""


class Transposed:
    """Adapter that passes signals [B, T, H] to the methods of `Weights`, which take signals [B, H, T]."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def convolve(self, layer: Conv1d, hidden: torch.Tensor, slope: float = 1.0) -> torch.Tensor:
        """See `StreamWeights`."""
        return self._weights.convolve(layer, hidden.transpose(1, 2), slope).transpose(1, 2)

    def overlap(self, layer: ConvTranspose1d, hidden: torch.Tensor) -> torch.Tensor:
        """See `StreamWeights`."""
        return self._weights.overlap(layer, hidden.transpose(1, 2)).transpose(1, 2)


class ProductWeights(Transposed):
    """Weights in the layout for matrix products. They are converted layer by layer on first use.

    Args:
        weights: weights with which long signals and grouped transposed layers are convolved.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self._products: dict[nn.Module, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def convolve(self, layer: Conv1d, hidden: torch.Tensor, slope: float = 1.0) -> torch.Tensor:
        """See `StreamWeights`."""
        stride, dilation = layer.conv.stride[0], layer.conv.dilation[0]
        batch, length, channels = hidden.shape
        outputs, taps = (length - layer.span) // stride + 1, layer.conv.kernel_size[0]
        if batch * outputs >= MAX_ROWS:
            return super().convolve(layer, hidden, slope)
        shape = batch, outputs, taps, channels
        steps = length * channels, stride * channels, dilation * channels, 1
        result = self._product(layer, hidden.contiguous().as_strided(shape, steps))
        return result if slope == 1.0 else F.leaky_relu_(result, slope)

    def overlap(self, layer: ConvTranspose1d, hidden: torch.Tensor) -> torch.Tensor:
        """See `StreamWeights`."""
        batch, length, channels = hidden.shape
        if batch * length >= MAX_ROWS or layer.conv.groups != 1:
            return super().overlap(layer, hidden)
        shape = batch, length - 1, 2, channels
        steps = length * channels, channels, channels, 1
        phases = self._product(layer, hidden.contiguous().as_strided(shape, steps))  # [B, T - 1, stride * H_out]
        return phases.view(batch, (length - 1) * layer.conv.stride[0], -1)

    def _product(self, layer: Conv1d | ConvTranspose1d, windows: torch.Tensor) -> torch.Tensor:
        """Multiply the inputs of each output by the weights: [B, T_out, K, H_in] -> [B, T_out, H_out]."""
        if layer not in self._products:
            weight, bias = fold(layer)
            self._products[layer] = weight.transpose(1, 2).flatten(1).contiguous(), bias  # [H_out, K * H_in]
        weight, bias = self._products[layer]
        batch, outputs = windows.shape[:2]
        return F.linear(windows.reshape(batch * outputs, -1), weight, bias).view(batch, outputs, -1)


_WEIGHTS: DerivedForms[ProductWeights] = DerivedForms()


def stream_weights(network: nn.Module) -> StreamWeights:
    """Return the weights of a network for streams.

    In fp32 on a CPU, the weights are packed if possible, and convolutions of few time steps run as matrix products.
    Otherwise, the result uses the weights of the modules (`ModuleWeights`).
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if dtype == torch.float32:
        weights = weights_of(network, dtype)
        if not isinstance(weights, ModuleWeights):
            return _WEIGHTS.get(network, "products", lambda: ProductWeights(weights))
    _WEIGHTS.drop(network)
    return Transposed(ModuleWeights())
