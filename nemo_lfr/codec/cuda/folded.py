"""Layers of the codec as a GPU wants them: weight norm folded, numbers cast and laid out once for each precision.

Signals lie [B, T, H], channels innermost, and every example of a batch has its own end, in a tensor on the device, so
that one captured graph serves clips of all lengths. `convolution` is the definition, in plain PyTorch, of what
`kernels.convolution` does in one pass.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.modules.activation import CodecActivation, HalfSnake, Snake
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d, fold, interleave
from nemo_lfr.modules.padding import fill_padding


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
    """A convolution, or a transposed one as a convolution with two taps to all phases of each channel.

    Attributes:
        weight: [H_out * upsample_stride, H_in, 1, K], H_in innermost in memory; of grouped transposed layers
            [H_in, 1, K].
        bias: fp32 [H_out * upsample_stride].
        pad: items before and after.
        mode: "reflect", "constant" (zeros) or "replicate".
        upsample_stride: of a transposed layer.
        trim_start: of its output's items, the first that is kept.
        groups: more than 1 of a grouped transposed layer alone, which runs as PyTorch has it.
        dot_precision: precision of products of fp32 numbers, as Triton names it.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    pad: tuple[int, int]
    mode: str
    stride: int = 1
    dilation: int = 1
    upsample_stride: int = 1
    trim_start: int = 0
    groups: int = 1
    dot_precision: str = "ieee"

    @property
    def outputs(self) -> int:
        """Channels of the convolution: those of all phases."""
        return self.weight.shape[0] if self.groups == 1 else self.upsample_stride * self.groups

    @property
    def inputs(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1] if self.groups == 1 else self.weight.shape[0]

    @property
    def reduction_size(self) -> int:
        """Products that one output is the sum of."""
        return self.weight[0].numel() if self.groups == 1 else 2 * self.inputs // self.groups

    def num_out(self, num_in: int) -> int:
        """Items that the convolution gives, each of `upsample_stride` items of output."""
        return num_in + 1 if self.upsample_stride > 1 else num_in // self.stride

    def num_kept(self, num_in: int) -> int:
        """Items of output."""
        return num_in * self.upsample_stride // self.stride

    @classmethod
    def of(cls, module: Conv1d | ConvTranspose1d, precision: Precision) -> "Layer":
        """Return a copy of a module's weights, folded and laid out for a precision."""
        weight, bias = fold(module)
        assert bias is not None
        bias = bias.to(torch.float32, copy=True)
        dot = "tf32" if precision.tf32 else "ieee"
        stride = module.conv.stride[0]
        if isinstance(module, Conv1d):
            plane, dilation = _plane(weight, precision.dtype), module.conv.dilation[0]
            return cls(plane, bias, module.pad, module.pad_mode, stride, dilation, dot_precision=dot)
        is_grouped = module.conv.groups > 1
        return cls(
            weight.to(precision.dtype, copy=True) if is_grouped else _plane(weight, precision.dtype),
            bias,
            pad=(0, 0) if is_grouped else (1, 1),
            mode="constant",
            upsample_stride=stride,
            trim_start=module.first_sample,
            groups=module.conv.groups,
            dot_precision=dot,
        )

    def convolve(self, padded: torch.Tensor, bias: bool = True) -> torch.Tensor:
        """[B, T, H_in] -> [B, T_out, H_out] by PyTorch; what is padded is the caller's."""
        own, up = self.bias.to(padded.dtype) if bias else None, self.upsample_stride
        if self.groups > 1:
            full = F.conv_transpose1d(padded.transpose(1, 2), self.weight, own, stride=up, groups=self.groups)
            return full[..., self.trim_start : self.trim_start + padded.shape[1] * up].transpose(1, 2).contiguous()
        plane = padded.transpose(1, 2).unsqueeze(2)
        full = F.conv2d(plane, self.weight, own, stride=(1, self.stride), dilation=(1, self.dilation)).squeeze(2)
        if up == 1:
            return full.transpose(1, 2)
        spread = interleave(full, up).transpose(1, 2)
        return spread[:, self.trim_start : self.trim_start + (padded.shape[1] - 2) * up]


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
    out = signal.new_empty(batch, before + length + after, channels)
    inner = out[:, before : before + length]
    inner.copy_(signal if activation is None else activation(signal))
    if layer.groups > 1:  # no padding, but an end that cuts off
        beyond = torch.arange(length, device=signal.device) >= ends[:, None]
        return inner.masked_fill_(beyond[..., None], 0)
    fill_padding(out.transpose(1, 2), layer.pad, layer.mode, ends)
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
