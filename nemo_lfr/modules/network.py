"""The order of the layers in the encoder and the decoder, defined once for all implementations.

`encode` and `decode` call three operations: a convolution, a transposed convolution and a residual layer. Each class
that implements `Ops` runs them differently: `ModuleOps` calls the modules, for training and export; the CPU uses
packed weights; CUDA records a plan; streams keep state between chunks; and `ContextOps` returns the receptive field.

To add a new kind of stage, write its class in this folder. Then change `encode` or `decode`, or override `run` in a
subclass of the encoder or decoder. A stage that only uses the three operations needs no change in the implementations.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.residual import ResidualLayer

# Type of the signals between operations: tensors [B, H, T] with `ModuleOps`, other types with other classes.
Signal = TypeVar("Signal")


class Ops(Protocol[Signal]):
    """Operations that an encoder or decoder consists of."""

    def conv(self, layer: Conv1d, signal: Signal, activation: CodecActivation | None = None) -> Signal:
        """Apply the activation (if any) and the convolution, which divides the length by its stride."""

    def upsample(self, layer: ConvTranspose1d, signal: Signal, activation: CodecActivation) -> Signal:
        """Apply the activation and the transposed convolution, which multiplies the length by its stride."""

    def residual(self, layer: ResidualLayer, signal: Signal) -> Signal:
        """Return the mean of the layer's residual branches."""


class DownStage(NamedTuple):
    """Layers of one encoder stage, in the order in which they run."""

    residual: ResidualLayer
    activation: CodecActivation
    down: Conv1d


class UpStage(NamedTuple):
    """Layers of one decoder stage, in the order in which they run."""

    activation: CodecActivation
    up: ConvTranspose1d
    residual: ResidualLayer


class EncoderLayers(Protocol):
    """Layers that `encode` needs."""

    pre_conv: Conv1d
    post_activation: CodecActivation
    post_conv: Conv1d

    @property
    def stages(self) -> Sequence[DownStage]:
        """Stages in order."""


class DecoderLayers(Protocol):
    """Layers that `decode` needs."""

    pre_conv: Conv1d
    post_activation: CodecActivation
    post_conv: Conv1d

    @property
    def stages(self) -> Sequence[UpStage]:
        """Stages in order."""


def encode(encoder: EncoderLayers, ops: Ops[Signal], audio: Signal) -> Signal:
    """Encode audio [B, 1, T_audio] to frames [B, D, T_encoded] with the operations of a backend."""
    hidden = ops.conv(encoder.pre_conv, audio)
    for stage in encoder.stages:
        hidden = ops.conv(stage.down, ops.residual(stage.residual, hidden), stage.activation)
    return ops.conv(encoder.post_conv, hidden, encoder.post_activation)


def decode(decoder: DecoderLayers, ops: Ops[Signal], dequantized: Signal) -> Signal:
    """Decode frames [B, D, T_encoded] with the operations of a backend.

    Returns:
        Audio before the output activation, [B, 1, T_audio].
    """
    hidden = ops.conv(decoder.pre_conv, dequantized)
    for stage in decoder.stages:
        hidden = ops.residual(stage.residual, ops.upsample(stage.up, hidden, stage.activation))
    return ops.conv(decoder.post_conv, hidden, decoder.post_activation)


class ModuleOps:
    """Implementation of `Ops` that calls the modules, for training and export. Signals are tensors [B, H, T]."""

    def conv(self, layer: Conv1d, signal: torch.Tensor, activation: CodecActivation | None = None) -> torch.Tensor:
        """Return `layer(activation(signal))`."""
        result: torch.Tensor = layer(signal if activation is None else activation(signal))
        return result

    def upsample(self, layer: ConvTranspose1d, signal: torch.Tensor, activation: CodecActivation) -> torch.Tensor:
        """Return `layer(activation(signal))`."""
        result: torch.Tensor = layer(activation(signal))
        return result

    def residual(self, layer: ResidualLayer, signal: torch.Tensor) -> torch.Tensor:
        """Return `layer(signal)`."""
        result: torch.Tensor = layer(signal)
        return result
