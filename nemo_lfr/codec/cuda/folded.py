"""Folded layers for CUDA: convolutions whose weights are prepared in advance instead of in every call.

Signals are [B, T, H], channels innermost. The lengths of the examples in a batch are in a tensor on the GPU, so that
one CUDA graph works for clips of all lengths. `convolution` is the reference in plain PyTorch; `kernels.convolution`
does the same in one Triton kernel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.modules.activation import CodecActivation, HalfSnake, Snake
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d, fold, interleave
from nemo_lfr.modules.padding import fill_padding
from nemo_lfr.modules.weights import contiguous_values, current_value


@dataclass(frozen=True)
class Precision:
    """Precision of a network.

    Attributes:
        dtype: dtype of signals and weights.
        tf32: whether fp32 products may use TF32, which drops 13 of 23 mantissa bits.
    """

    dtype: torch.dtype
    tf32: bool = False


@dataclass(frozen=True)
class Activation:
    """Activation in a form that kernels can use, made from a `CodecActivation`.

    Attributes:
        module: the activation module, whose parameters are not copied.
        kind: "lrelu" (leaky ReLU); "snake" (snake for the first `len(alpha)` channels, leaky ReLU for the others); or
            "other", which only PyTorch can run.
        slope: slope of the leaky ReLU.
        alpha: alpha of each snake channel, [n] with n <= H; None for the other kinds.
    """

    module: nn.Module
    kind: str = "other"
    slope: float = 0.0
    alpha: torch.Tensor | None = None

    @classmethod
    def of(cls, module: CodecActivation) -> "Activation":
        """Convert an activation module."""
        inner = module.activation
        known = type(inner) in (nn.LeakyReLU, Snake, HalfSnake)  # a user's subclass may compute something else
        match inner:
            case nn.LeakyReLU() if known:
                return cls(inner, "lrelu", inner.negative_slope)
            case Snake() if known:
                return cls(inner, "snake", 0.0, contiguous_values(current_value(inner, "alpha")).flatten())
            case HalfSnake() if known:
                return cls(
                    inner,
                    "snake",
                    inner.lrelu.negative_slope,
                    contiguous_values(current_value(inner.snake_act, "alpha")).flatten(),
                )
        return cls(inner)

    def __call__(self, signal: torch.Tensor) -> torch.Tensor:
        """Apply the activation to [B, T, H]; all kinds except leaky ReLU run in fp32."""
        if self.kind == "lrelu":
            return F.leaky_relu(signal, self.slope)
        result: torch.Tensor = self.module(signal.float().transpose(1, 2))
        return result.transpose(1, 2).to(signal.dtype)


@dataclass(frozen=True)
class Layer:
    """Folded convolution or transposed convolution.

    A transposed convolution without groups becomes an ordinary convolution with two taps. Its output channels include
    all phases of each channel (the `upsample_stride` outputs for each input step).

    Attributes:
        weight: [H_out * upsample_stride, H_in, 1, K], H_in innermost in memory; for grouped transposed layers
            [H_in, 1, K].
        bias: fp32, [H_out * upsample_stride]; for grouped transposed layers [H_out].
        pad: numbers of time steps to add before and after each example.
        mode: padding mode: "reflect", "constant" (zeros) or "replicate".
        stride: stride of an ordinary convolution; else 1.
        dilation: dilation of an ordinary convolution; else 1.
        upsample_stride: stride of a transposed convolution; else 1.
        trim_start: number of outputs to remove at the start; only for transposed convolutions.
        groups: number of groups. More than 1 only for grouped transposed layers, which run in PyTorch.
        dot_precision: Triton's name for the precision of fp32 products.
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
        """Number of output channels of the convolution, including all phases (see the class)."""
        return self.weight.shape[0] if self.groups == 1 else self.upsample_stride * self.groups

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.weight.shape[1] if self.groups == 1 else self.weight.shape[0]

    @property
    def reduction_size(self) -> int:
        """Number of products that are summed for one output."""
        return self.weight[0].numel() if self.groups == 1 else 2 * self.inputs // self.groups

    def num_out(self, num_in: int) -> int:
        """Return the number of output time steps of the convolution for `num_in` input time steps.

        If the layer upsamples, each output time step contains `upsample_stride` phases, which are not interleaved yet.
        """
        return num_in + 1 if self.upsample_stride > 1 else num_in // self.stride

    def num_kept(self, num_in: int) -> int:
        """Return the number of output time steps of the layer, after interleaving of the phases and trimming."""
        return num_in * self.upsample_stride // self.stride

    @classmethod
    def of(cls, module: Conv1d | ConvTranspose1d, precision: Precision) -> "Layer":
        """Copy and prepare the weights of a module for a precision."""
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
        """Convolve a padded signal with PyTorch: [B, T, H_in] -> [B, T_out, H_out]."""
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

    The strides are set explicitly, because PyTorch might choose other strides if there is only one channel.
    """
    outputs, inputs, taps = weight.shape
    rows = weight.permute(0, 2, 1).to(dtype=dtype, memory_format=torch.contiguous_format, copy=True).contiguous()
    return rows.as_strided((outputs, inputs, 1, taps), (taps * inputs, 1, taps * inputs, inputs))


def padded(
    signal: torch.Tensor, layer: Layer, ends: torch.Tensor, activation: Activation | None = None
) -> torch.Tensor:
    """Apply an activation and pad each example at both ends.

    Args:
        signal: [B, T, H].
        layer: convolution that needs the padding.
        ends: number of valid time steps in each example, [B], at most T.
        activation: activation before padding, or None.

    Returns:
        [B, before + T + after, H]; values after the padding of an example are undefined.
    """
    batch, length, channels = signal.shape
    before, after = layer.pad
    out = signal.new_empty(batch, before + length + after, channels)
    inner = out[:, before : before + length]
    inner.copy_(signal if activation is None else activation(signal))
    if layer.groups > 1:  # no padding, but zeros after the end of each example
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
    """Return after(scale * (convolution(activation(signal)) + residual + total)).

    Args:
        layer: the convolution, with its bias.
        signal: [B, T, H_in].
        ends: number of valid time steps in each example, [B]. Later values are replaced by the layer's padding.
        activation: activation before the convolution.
        residual: tensor to add to the result, [B, T_out, H_out].
        total: second tensor to add, [B, T_out, H_out].
        scale: factor for the sum.
        after: activation to apply to the scaled sum.
        dtype: dtype of the result; default: the dtype of `signal`.

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
