"""Layers of the codec as a GPU wants them: weight norm folded, numbers cast and laid out once for each precision.

Signals lie [B, T, H], channels innermost, and every example of a batch has its own end, in a tensor on the device, so
that one captured graph serves clips of all lengths. `convolution` is the definition, in plain PyTorch, of what
`kernels.convolution` does in one pass.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.codec.activation import CodecActivation, HalfSnake, Snake
from nemo_lfr.codec.conv import Conv1d, ConvTranspose1d


@dataclass(frozen=True)
class Precision:
    """How a network runs.

    Attributes:
        dtype: of signals and weights.
        tf32: products of fp32 numbers may drop 13 of their 23 bits.
    """

    dtype: torch.dtype
    tf32: bool = False


@dataclass(frozen=True)
class Activation:
    """A `CodecActivation`.

    Attributes:
        module: what it is; its parameters are the live ones.
        kind: "lrelu", "snake" (of the first channels; leaky ReLU of the others) or "other".
        slope: of the leaky ReLU.
        alpha: of the channels with snake, [up to H].
    """

    module: nn.Module
    kind: str = "other"
    slope: float = 0.0
    alpha: torch.Tensor | None = None

    @classmethod
    def of(cls, module: CodecActivation) -> "Activation":
        match inner := module.activation:
            case nn.LeakyReLU():
                return cls(inner, "lrelu", inner.negative_slope)
            case Snake():
                return cls(inner, "snake", 0.0, inner.alpha.detach().flatten())
            case HalfSnake():
                return cls(inner, "snake", inner.lrelu.negative_slope, inner.snake_act.alpha.detach().flatten())
        return cls(inner)

    def __call__(self, signal: torch.Tensor) -> torch.Tensor:
        """[B, T, H] activated; snake's sine is taken in fp32."""
        if self.kind == "lrelu":
            return F.leaky_relu(signal, self.slope)
        return self.module(signal.float().transpose(1, 2)).transpose(1, 2).to(signal.dtype)


@dataclass(frozen=True)
class Layer:
    """A convolution, or a transposed one as a convolution with two taps to `up` phases of each channel.

    Attributes:
        weight: [H_out * up, H_in, 1, K], H_in innermost in memory; of grouped transposed layers [H_in, 1, K].
        bias: fp32 [H_out * up].
        pad: items before and after.
        mode: "reflect", "constant" (zeros) or "replicate".
        up: stride of a transposed layer.
        first: of its output's items, the first that is kept.
        groups: more than 1 of a grouped transposed layer alone, which runs as PyTorch has it.
        dot: precision of products of fp32 numbers, as Triton names it.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    pad: tuple[int, int]
    mode: str
    stride: int = 1
    dilation: int = 1
    up: int = 1
    first: int = 0
    groups: int = 1
    dot: str = "ieee"

    @property
    def outputs(self) -> int:
        """Channels of the convolution: those of all phases."""
        return self.weight.shape[0] if self.groups == 1 else self.up * self.groups

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] if self.groups == 1 else self.weight.shape[0]

    @property
    def num_sums(self) -> int:
        """Products that one output is the sum of."""
        return self.weight[0].numel() if self.groups == 1 else 2 * self.inputs // self.groups

    def num_out(self, num_in: int) -> int:
        """Items that the convolution gives, each of `up` items of output."""
        return num_in + 1 if self.up > 1 else num_in // self.stride

    def num_kept(self, num_in: int) -> int:
        """Items of output."""
        return num_in * self.up if self.up > 1 else num_in // self.stride

    @classmethod
    def of(cls, module: Conv1d | ConvTranspose1d, precision: Precision) -> "Layer":
        conv = module.conv
        weight, bias = conv.weight.detach(), conv.bias
        assert bias is not None
        bias = bias.detach().to(torch.float32, copy=True)
        dot = "tf32" if precision.tf32 else "ieee"
        stride = conv.stride[0]
        if isinstance(module, Conv1d):
            plane = _plane(weight, precision.dtype)
            return cls(plane, bias, module.pad, module.pad_mode, stride, conv.dilation[0], dot=dot)
        if conv.groups > 1:
            weight = weight.to(precision.dtype, copy=True)
            return cls(
                weight, bias, (0, 0), "constant", up=stride, first=module.first_sample, groups=conv.groups, dot=dot
            )
        # Output item t * stride + phase sees inputs t and t - 1 alone.
        taps = weight.unflatten(2, (2, stride)).flip(2).permute(3, 1, 0, 2).flatten(0, 1)
        plane = _plane(taps, precision.dtype)
        return cls(plane, bias.repeat(stride), (1, 1), "constant", up=stride, first=module.first_sample, dot=dot)

    def convolve(self, padded: torch.Tensor, bias: bool = True) -> torch.Tensor:
        """[B, T, H_in] -> [B, T_out, H_out] by PyTorch; what is padded is the caller's."""
        own = self.bias.to(padded.dtype) if bias else None
        if self.groups > 1:
            full = F.conv_transpose1d(padded.transpose(1, 2), self.weight, own, stride=self.up, groups=self.groups)
            return full[..., self.first : self.first + padded.shape[1] * self.up].transpose(1, 2).contiguous()
        plane = padded.transpose(1, 2).unsqueeze(2)
        full = F.conv2d(plane, self.weight, own, stride=(1, self.stride), dilation=(1, self.dilation))
        rows = full.squeeze(2).transpose(1, 2)
        if self.up == 1:
            return rows
        # The phases of a channel are neighbours in time, and that is how they lie.
        spread = rows.unflatten(2, (self.up, -1)).flatten(1, 2)
        return spread[:, self.first : self.first + (padded.shape[1] - 2) * self.up]


def _plane(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[H_out, H_in, K] -> [H_out, H_in, 1, K] with H_in innermost; also where PyTorch cannot tell, of one channel."""
    outputs, inputs, taps = weight.shape
    rows = weight.permute(0, 2, 1).to(dtype=dtype, memory_format=torch.contiguous_format, copy=True).contiguous()
    return rows.as_strided((outputs, inputs, 1, taps), (taps * inputs, 1, taps * inputs, inputs))


def padded(
    signal: torch.Tensor, layer: Layer, ends: torch.Tensor, activation: Activation | None = None
) -> torch.Tensor:
    """[B, T, H] activated, with what `layer` pads before its first item and after each example's last.

    Args:
        signal: [B, T, H].
        ends: items of each example, [B], at most T.

    Returns:
        [B, before + T + after, H], meaningless after an example's padding.
    """
    batch, length, channels = signal.shape
    before, after = layer.pad
    if layer.groups > 1:
        after = 0  # no padding, but an end that cuts off
    out = signal.new_empty(batch, before + length + after, channels)
    inner = out[:, before : before + length]
    inner.copy_(signal if activation is None else activation(signal))
    if layer.groups > 1:
        beyond = torch.arange(length, device=signal.device) >= ends[:, None]
        return inner.masked_fill_(beyond[..., None], 0)
    if before and layer.mode == "constant":
        out[:, :before] = 0
    elif before:
        out[:, :before] = inner[:, :1] if layer.mode == "replicate" else inner[:, 1 : before + 1].flip(1)
    if after:
        beyond = torch.arange(after, device=signal.device)
        rows = torch.arange(batch, device=signal.device)[:, None]
        last = ends[:, None] - 1
        target = (rows, before + last + 1 + beyond)
        if layer.mode == "constant":
            out[target] = torch.zeros((), dtype=out.dtype, device=out.device)
        else:
            out[target] = inner[rows, last - (1 + beyond if layer.mode == "reflect" else 0 * beyond)]
    return out


def convolution(
    layer: Layer,
    signal: torch.Tensor,
    ends: torch.Tensor,
    *,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    scale: float = 1.0,
    after: Activation | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """after(scale * (convolution(activation(signal)) + residual + total)), [B, T, H_in] -> [B, T_out, H_out].

    Args:
        layer: the convolution, with its bias.
        signal: [B, T, H_in].
        ends: items of each example, [B]; what comes after them is the layer's padding, whatever `signal` holds.
        activation: before the convolution.
        residual: added to the result, [B, T_out, H_out].
        total: added too.
        scale: factor of the sum.
        after: activation of the result.
        dtype: of the result; the signal's if not given.
    """
    result = layer.convolve(padded(signal, layer, ends, activation).to(layer.weight.dtype))
    for other in (residual, total):
        if other is not None:
            result = result + other
    if scale != 1.0:
        result = result * scale
    if after is not None:
        result = after(result)
    return result.to(dtype or signal.dtype)
