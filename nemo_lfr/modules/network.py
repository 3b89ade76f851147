"""Topology of the encoder and the decoder, written once for every backend.

`encode` and `decode` are the only code that knows the order of the layers. Each backend implements `Ops`, which
compute the layers: training and export run the modules (`ModuleOps`), the CPU uses packed weights, CUDA records a
plan, and streams use layers that keep state between pushes. `ContextOps` computes the receptive field.

A new kind of stage is a class in this folder and a change here, or a subclass of the encoder or the decoder that
overrides `run`. If it consists of the three operations below, it runs on every backend without other changes.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.residual import ResidualLayer

# Values passed between operations: tensors [B, H, T] for modules, another type for other backends.
Signal = TypeVar("Signal")


class Ops(Protocol[Signal]):
    """Operations of a backend. An activation precedes the convolution that it feeds."""

    def conv(self, layer: Conv1d, signal: Signal, activation: CodecActivation | None = None) -> Signal:
        """Convolve, dividing the length by the layer's stride."""

    def upsample(self, layer: ConvTranspose1d, signal: Signal, activation: CodecActivation) -> Signal:
        """Convolve, multiplying the length by the layer's stride."""

    def residual(self, layer: ResidualLayer, signal: Signal) -> Signal:
        """Return the mean of the layer's residual branches."""


class DownStage(NamedTuple):
    """Stage of the encoder."""

    residual: ResidualLayer
    activation: CodecActivation
    down: Conv1d


class UpStage(NamedTuple):
    """Stage of the decoder."""

    activation: CodecActivation
    up: ConvTranspose1d
    residual: ResidualLayer


class EncoderLayers(Protocol):
    """Layers of an encoder."""

    pre_conv: Conv1d
    post_activation: CodecActivation
    post_conv: Conv1d

    @property
    def stages(self) -> Sequence[DownStage]:
        """Stages in order."""


class DecoderLayers(Protocol):
    """Layers of a decoder."""

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
    """Decode frames [B, D, T_encoded] to the input of the output activation, [B, 1, T_audio]."""
    hidden = ops.conv(decoder.pre_conv, dequantized)
    for stage in decoder.stages:
        hidden = ops.residual(stage.residual, ops.upsample(stage.up, hidden, stage.activation))
    return ops.conv(decoder.post_conv, hidden, decoder.post_activation)


class ModuleOps:
    """Operations that call the modules, for training and export. Signals are [B, H, T]."""

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
