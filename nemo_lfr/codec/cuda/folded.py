"""Folded layers for CUDA: weight norm folded, weights cast and laid out once per precision.

Signals are [B, T, H], channels innermost. The length of every example of a batch is in a tensor on the device, so
that one captured graph works for clips of all lengths. `convolution` is the reference, in plain PyTorch, for
`kernels.convolution`, which does the same in one pass.
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
    """Precision of a network.

    Attributes:
        dtype: dtype of signals and weights.
        tf32: allow TF32 in fp32 products, which drops 13 of 23 mantissa bits.
    """

    dtype: torch.dtype
    tf32: bool = False


@dataclass(frozen=True)
class Activation:
    """Folded form of a `CodecActivation`.

    Attributes:
        module: the activation; its parameters are not copied.
        kind: "lrelu", "snake" (of the first channels; leaky ReLU of the others) or "other".
        slope: slope of the leaky ReLU.
        alpha: alpha of the channels with snake, [up to H].
    """

    module: nn.Module
    kind: str = "other"
    slope: float = 0.0
    alpha: torch.Tensor | None = None

    @classmethod
    def of(cls, module: CodecActivation) -> "Activation":
        """Return the folded form of an activation."""
        match inner := module.activation:
            case nn.LeakyReLU():
                return cls(inner, "lrelu", inner.negative_slope)
            case Snake():
                return cls(inner, "snake", 0.0, inner.alpha.detach().flatten())
            case HalfSnake():
                return cls(inner, "snake", inner.lrelu.negative_slope, inner.snake_act.alpha.detach().flatten())
        return cls(inner)

    def __call__(self, signal: torch.Tensor) -> torch.Tensor:
        """Apply the activation to [B, T, H]; the sine of snake is computed in fp32."""
        if self.kind == "lrelu":
            return F.leaky_relu(signal, self.slope)
        result: torch.Tensor = self.module(signal.float().transpose(1, 2))
        return result.transpose(1, 2).to(signal.dtype)


@dataclass(frozen=True)
class Layer:
    """Folded convolution; a transposed one has two taps to all phases of each channel.

    Attributes:
        weight: [H_out * upsample_stride, H_in, 1, K], H_in innermost in memory; for grouped transposed layers
            [H_in, 1, K].
        bias: fp32 [H_out * upsample_stride].
        pad: items before and after.
        mode: "reflect", "constant" (zeros) or "replicate".
        upsample_stride: stride of a transposed layer; else 1.
        trim_start: output items of a transposed layer that are trimmed at the start.
        groups: more than 1 for a grouped transposed layer, which runs in PyTorch.
        dot_precision: Triton's name of the precision of fp32 products.
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
        """Output channels of the convolution, for all phases."""
        return self.weight.shape[0] if self.groups == 1 else self.upsample_stride * self.groups

    @property
    def inputs(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1] if self.groups == 1 else self.weight.shape[0]

    @property
    def reduction_size(self) -> int:
        """Number of products that are summed for one output."""
        return self.weight[0].numel() if self.groups == 1 else 2 * self.inputs // self.groups

    def num_out(self, num_in: int) -> int:
        """Return the outputs of the convolution, each of `upsample_stride` items."""
        return num_in + 1 if self.upsample_stride > 1 else num_in // self.stride

    def num_kept(self, num_in: int) -> int:
        """Return the items of the trimmed output."""
        return num_in * self.upsample_stride // self.stride

    @classmethod
    def of(cls, module: Conv1d | ConvTranspose1d, precision: Precision) -> "Layer":
        """Copy and fold the weights of a module for a precision."""
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
        """Convolve a padded signal in PyTorch: [B, T, H_in] -> [B, T_out, H_out]."""
        offset, up = self.bias.to(padded.dtype) if bias else None, self.upsample_stride
        if self.groups > 1:
            full = F.conv_transpose1d(padded.transpose(1, 2), self.weight, offset, stride=up, groups=self.groups)
            return full[..., self.trim_start : self.trim_start + padded.shape[1] * up].transpose(1, 2).contiguous()
        plane = padded.transpose(1, 2).unsqueeze(2)
        full = F.conv2d(plane, self.weight, offset, stride=(1, self.stride), dilation=(1, self.dilation)).squeeze(2)
        if up == 1:
            return full.transpose(1, 2)
        spread = interleave(full, up).transpose(1, 2)
        return spread[:, self.trim_start : self.trim_start + (padded.shape[1] - 2) * up]


def _plane(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rearrange [H_out, H_in, K] to [H_out, H_in, 1, K] with H_in innermost in memory.

    The strides are set explicitly, as they are ambiguous for one channel.
    """
    outputs, inputs, taps = weight.shape
    rows = weight.permute(0, 2, 1).to(dtype=dtype, memory_format=torch.contiguous_format, copy=True).contiguous()
    return rows.as_strided((outputs, inputs, 1, taps), (taps * inputs, 1, taps * inputs, inputs))


def padded(
    signal: torch.Tensor, layer: Layer, ends: torch.Tensor, activation: Activation | None = None
) -> torch.Tensor:
    """Activate a signal and pad it at both ends of each example.

    Args:
        signal: [B, T, H].
        layer: convolution whose padding is added.
        ends: items of each example, [B], at most T.
        activation: applied before padding.

    Returns:
        [B, before + T + after, H], undefined after an example's padding.
    """
    batch, length, channels = signal.shape
    before, after = layer.pad
    out = signal.new_empty(batch, before + length + after, channels)
    inner = out[:, before : before + length]
    inner.copy_(signal if activation is None else activation(signal))
    if layer.groups > 1:  # no padding, but zeros after the end
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
    """Compute after(scale * (convolution(activation(signal)) + residual + total)).

    Args:
        layer: the convolution, with its bias.
        signal: [B, T, H_in].
        ends: items of each example, [B]; values of `signal` after them are replaced by the layer's padding.
        activation: activation before the convolution.
        residual: added to the result, [B, T_out, H_out].
        total: also added, [B, T_out, H_out].
        scale: factor of the sum.
        after: activation of the result.
        dtype: dtype of the result; default: that of the signal.

    Returns:
        [B, T_out, H_out].
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
