"""Residual layers of the encoder and the decoder (HiFi-GAN's multi-receptive-field fusion)."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn

from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.altered import is_dropping
from nemo_lfr.modules.conv import Conv1d


class ResidualBlock(nn.Module):
    """Residual block: activation, dilated convolution, activation, convolution, dropout.

    The dropout has a probability of 0, as in NeMo, unless a caller sets it.

    Args:
        channels: number of channels H.
        kernel_size: kernel size of both convolutions.
        dilation: dilation of the first convolution.
        activation: "lrelu", "elu", "snake" or "half_snake".
        causal: whether the convolutions are causal.
        pad_mode: "reflect", "zeros" or "replicate"; ignored by causal convolutions.
        weight_norm: whether the convolutions have weight norm.
    """

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
        self.dropout = nn.Dropout(0.0)
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

    def forward(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Run the block: [B, H, T] -> [B, H, T]; see `Conv1d.forward` for `input_len`."""
        residual = _call(self.input_conv, self.input_activation(inputs), input_len)
        residual = _call(self.skip_conv, self.skip_activation(residual), input_len)
        if not torch.compiler.is_exporting():
            if is_dropping(self.dropout):
                residual = residual.contiguous()  # so that a seed drops the same values as in NeMo
            residual = self.dropout(residual)
        result: torch.Tensor = inputs + residual
        return result


class ResidualBranch(nn.Module):
    """Sequence of residual blocks with one kernel size, one block per dilation.

    Args:
        channels: number of channels H.
        kernel_size: kernel size of all convolutions.
        dilations: dilation of each block.
        activation: "lrelu", "elu", "snake" or "half_snake".
        causal: whether the convolutions are causal.
        pad_mode: "reflect", "zeros" or "replicate"; ignored by causal convolutions.
        weight_norm: whether the convolutions have weight norm.
    """

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

    def forward(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Run the blocks in order: [B, H, T] -> [B, H, T]; see `Conv1d.forward` for `input_len`."""
        for block in self.res_blocks:
            inputs = _call(block, inputs, input_len)
        return inputs


class ResidualLayer(nn.Module):
    """Residual layer. Its output is the mean of several residual branches, one per kernel size.

    Args:
        channels: number of channels H.
        kernel_sizes: kernel size of each branch.
        dilations: dilation of each block in a branch.
        activation: "lrelu", "elu", "snake" or "half_snake".
        causal: whether the convolutions are causal.
        pad_mode: "reflect", "zeros" or "replicate"; ignored by causal convolutions.
        weight_norm: whether the convolutions have weight norm.
    """

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
        self.res_blocks = nn.ModuleList(
            ResidualBranch(channels, kernel_size, dilations, activation, causal, pad_mode, weight_norm)
            for kernel_size in kernel_sizes
        )

    @property
    def branches(self) -> list[list[ResidualBlock]]:
        """Blocks of each branch, in order."""
        return [list(cast(Iterable[ResidualBlock], branch.res_blocks)) for branch in self.res_blocks]

    def forward(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Return the mean of the branches: [B, H, T] -> [B, H, T]; see `Conv1d.forward` for `input_len`."""
        total = _call(self.res_blocks[0], inputs, input_len)
        for branch in self.res_blocks[1:]:
            total = total + _call(branch, inputs, input_len)
        return total / len(self.res_blocks)


def _call(layer: nn.Module, inputs: torch.Tensor, input_len: torch.Tensor | None) -> torch.Tensor:
    """Call a layer. Replaced layers and hooks get no `input_len` unless a caller has passed one."""
    result: torch.Tensor = layer(inputs) if input_len is None else layer(inputs, input_len)
    return result
