"""Multi-kernel residual stacks, shared by both ends of the codec (HiFi-GAN's multi-receptive-field fusion)."""

from collections.abc import Sequence

import torch
from torch import nn

from nemo_lfr.codec.activation import CodecActivation
from nemo_lfr.codec.conv import Conv1d


class ResidualBlock(nn.Module):
    """activation, dilated convolution, activation, convolution; added to the input."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilation: int,
        activation: str,
        causal: bool,
        pad_mode: str,
        weight_norm: bool,
    ) -> None:
        super().__init__()
        self.input_activation = CodecActivation(activation, channels)
        self.skip_activation = CodecActivation(activation, channels)
        self.input_conv = Conv1d(
            channels,
            channels,
            kernel_size,
            dilation=dilation,
            causal=causal,
            pad_mode=pad_mode,
            weight_norm=weight_norm,
        )
        self.skip_conv = Conv1d(
            channels, channels, kernel_size, causal=causal, pad_mode=pad_mode, weight_norm=weight_norm
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        residual = self.input_conv(self.input_activation(hidden))
        return hidden + self.skip_conv(self.skip_activation(residual))


class ResidualBranch(nn.Module):
    """Residual blocks of one kernel size, one per dilation, in sequence."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: Sequence[int],
        activation: str,
        causal: bool,
        pad_mode: str,
        weight_norm: bool,
    ) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(
            ResidualBlock(channels, kernel_size, dilation, activation, causal, pad_mode, weight_norm)
            for dilation in dilations
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.res_blocks:
            hidden = block(hidden)
        return hidden


class ResidualLayer(nn.Module):
    """The mean of one residual branch per kernel size."""

    def __init__(
        self,
        channels: int,
        kernel_sizes: Sequence[int],
        dilations: Sequence[int],
        activation: str,
        causal: bool,
        pad_mode: str,
        weight_norm: bool,
    ) -> None:
        super().__init__()
        self.context = residual_context(kernel_sizes, dilations, causal)
        self.res_blocks = nn.ModuleList(
            ResidualBranch(channels, kernel_size, dilations, activation, causal, pad_mode, weight_norm)
            for kernel_size in kernel_sizes
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        total = self.res_blocks[0](hidden)
        for branch in self.res_blocks[1:]:
            total = total + branch(hidden)
        return total / len(self.res_blocks)


def residual_context(kernel_sizes: Sequence[int], dilations: Sequence[int], causal: bool) -> tuple[int, int]:
    """Samples before and after, at the layer's own rate, that one output of a `ResidualLayer` depends on."""
    span = sum((max(kernel_sizes) - 1) * (dilation + 1) for dilation in dilations)
    return (span, 0) if causal else (span // 2, span // 2)
