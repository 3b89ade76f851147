"""Functions that launch the Triton kernels.

This module imports Triton. It is therefore imported only on a GPU, or by tests under TRITON_INTERPRET=1.
"""

import math
from typing import Any, NamedTuple

import torch
import triton

from nemo_lfr.codec.cuda.folded import Activation, Layer
from nemo_lfr.codec.cuda.triton_kernels import convolution_kernel, pointwise_kernel

POINTWISE_TILE = 1024


class Tile(NamedTuple):
    """Sizes of the blocks into which a convolution is divided for the GPU.

    Attributes:
        time: output time steps per Triton program.
        channels: output channels per Triton program.
        sums: products per step of the reduction loop.
        warps: Triton's `num_warps`.
        stages: Triton's `num_stages`.
        pairs: whether a leaky ReLU before the convolution processes two 16-bit values at a time, on GPUs that support
            this.
    """

    time: int
    channels: int
    sums: int
    warps: int
    stages: int
    pairs: bool = False


def tiles(layer: Layer, activation: Activation | None = None) -> list[Tile]:
    """Return the tiles to try for a layer. A kernel is compiled for each tile on first use, in about a second."""
    channels = max(16, min(128, triton.next_power_of_2(layer.outputs)))
    # Prefer a power of two that divides the channels, if it is large enough.
    exact = math.gcd(layer.outputs, 128)
    if exact >= 64:
        channels = exact
    sums = max(16, min(64, triton.next_power_of_2(layer.reduction_size)))
    if layer.weight.dtype == torch.float32:  # fp32 values take twice as many bytes in shared memory
        sums = max(16, sums // 2)
    pairs = bool(_pairs(layer.weight, activation))
    return [Tile(128, channels, sums, 4, 3, pairs), Tile(64, channels, sums, 4, 4, pairs)]


def fusable(layer: Layer, *activations: Activation | None) -> bool:
    """Return whether `convolution` supports a layer with these activations."""
    return layer.groups == 1 and all(activation is None or activation.kind != "other" for activation in activations)


def convolution(
    layer: Layer,
    signal: torch.Tensor,
    ends: torch.Tensor,
    tile: Tile,
    *,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    scale: float = 1.0,
    after: Activation | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Run `folded.convolution` in one kernel.

    Args:
        layer: layer for which `fusable` is true.
        signal: [B, T, H_in].
        ends: number of valid time steps in each example, [B]. Later values are replaced by the layer's padding.
        tile: one of `tiles`.
        activation: activation before the convolution.
        residual: tensor to add to the result, [B, T_out, H_out].
        total: second tensor to add, [B, T_out, H_out], contiguous.
        scale: factor for the sum.
        after: activation to apply to the scaled sum.
        dtype: dtype of the result; default: the dtype of `signal`.

    Returns:
        [B, T_out, H_out].
    """
    signal = _rows(signal)
    batch, num_in, _ = signal.shape
    shape = batch, layer.num_kept(num_in), layer.outputs // layer.upsample_stride
    out = torch.empty(shape, dtype=dtype or signal.dtype, device=signal.device)
    if out.numel():
        _launch(layer, signal, ends, tile, out, activation, residual, total, scale, after)
    return out


def _launch(
    layer: Layer,
    signal: torch.Tensor,
    ends: torch.Tensor,
    tile: Tile,
    out: torch.Tensor,
    activation: Activation | None,
    residual: torch.Tensor | None,
    total: torch.Tensor | None,
    scale: float,
    after: Activation | None,
) -> None:
    """Launch the kernel that writes the result of `convolution` to `out`."""
    batch, num_in, _ = signal.shape
    num_out = layer.num_out(num_in)
    _, kept, channels = out.shape
    kind, alpha = _spec(activation, layer.bias)
    kind_after, alpha_after = _spec(after, layer.bias)
    residual = None if residual is None else _rows(residual)
    grid = (triton.cdiv(num_out, tile.time) * triton.cdiv(layer.outputs, tile.channels), batch)
    convolution_kernel[grid](
        signal,
        layer.weight,
        layer.bias,
        out if residual is None else residual,
        out if total is None else total,
        out,
        ends,
        alpha,
        alpha_after,
        num_in,
        num_out,
        kept * channels,
        signal.stride(0),
        0 if residual is None else residual.stride(0),
        layer.reduction_size,
        layer.stride,
        layer.dilation,
        layer.pad[0],
        layer.trim_start * channels,
        channels,
        len(alpha),
        len(alpha_after),
        scale,
        kind=kind,
        slope=0.0 if activation is None else activation.slope,
        kind_after=kind_after,
        slope_after=0.0 if after is None else after.slope,
        has_residual=residual is not None,
        has_total=total is not None,
        pairs=_pairs(signal, activation) if tile.pairs else "",
        **_constants(layer, tile),
    )


def _constants(layer: Layer, tile: Tile) -> dict[str, Any]:
    """Return those compile-time arguments of the convolution kernel that depend only on a layer and a tile."""
    return {
        "inputs": layer.inputs,
        "outputs": layer.outputs,
        "run": math.gcd(layer.inputs, tile.sums),
        "mode": layer.mode,
        "precision": layer.dot_precision,
        "tile_time": tile.time,
        "tile_channels": tile.channels,
        "tile_sums": tile.sums,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def pointwise(
    signal: torch.Tensor,
    ends: torch.Tensor,
    *,
    pad: tuple[int, int] | None = None,
    mode: str = "constant",
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    scale: float = 1.0,
    activation: Activation | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute activation(scale * (signal + bias + residual + total)) and pad the result, in one kernel.

    Args:
        signal: [B, T, H].
        ends: number of valid time steps in each example, [B]. The padding starts directly after these time steps.
        pad: numbers of time steps to add before and after each example; None for no padding.
        mode: padding mode: "constant" (zeros), "reflect" or "replicate".
        bias: tensor to add to the signal, [H].
        residual: tensor to add, [B, T, H].
        total: second tensor to add, [B, T, H], contiguous.
        scale: factor for the sum.
        activation: activation to apply to the scaled sum.
        dtype: dtype of the result; default: the dtype of `signal`.

    Returns:
        [B, before + T + after, H].
    """
    signal = _rows(signal)
    batch, num_in, channels = signal.shape
    num_out = num_in + sum(pad or ())
    out = torch.empty((batch, num_out, channels), dtype=dtype or signal.dtype, device=signal.device)
    residual = None if residual is None else _rows(residual)
    kind, alpha = _spec(activation, ends)
    pointwise_kernel[(triton.cdiv(num_out * channels, POINTWISE_TILE), batch)](
        signal,
        *(signal if value is None else value for value in (bias, residual, total)),
        out,
        ends,
        alpha,
        num_in,
        num_out,
        signal.stride(0),
        0 if residual is None else residual.stride(0),
        0 if pad is None else pad[0],
        len(alpha),
        scale,
        channels=channels,
        mode="none" if pad is None else mode,
        kind=kind,
        slope=0.0 if activation is None else activation.slope,
        has_bias=bias is not None,
        has_residual=residual is not None,
        has_total=total is not None,
        tile=POINTWISE_TILE,
        num_warps=4,
    )
    return out


def _rows(signal: torch.Tensor) -> torch.Tensor:
    """Return a signal [B, T, H], copied if necessary so that each example is contiguous in memory."""
    _, _, channels = signal.shape
    return signal if signal.stride()[1:] == (channels, 1) else signal.contiguous()


def _pairs(signal: torch.Tensor, activation: Activation | None) -> str:
    """Return PTX code for a leaky ReLU of two bf16 or fp16 values; empty if this is not supported."""
    if activation is None or activation.kind != "lrelu" or not 0 < activation.slope < 1 or not signal.is_cuda:
        return ""
    if torch.version.cuda is None or torch.cuda.get_device_capability(signal.device) < (9, 0):
        return ""  # GPUs before Hopper cannot multiply bf16 pairs
    name = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}.get(signal.dtype)
    if name is None:
        return ""
    return leaky_pairs(name, int(torch.tensor(activation.slope, dtype=signal.dtype).view(torch.int16)) & 0xFFFF)


def leaky_pairs(name: str, bits: int) -> str:
    """Return PTX code for max(x, slope * x) of two values.

    Args:
        name: PTX type of the pair, "bf16x2" or "f16x2".
        bits: the slope as a 16-bit pattern.
    """
    return (
        "{ .reg .b32 slope, scaled; "
        f"mov.b32 slope, 0x{bits:04x}{bits:04x}; mul.{name} scaled, $1, slope; max.{name} $0, $1, scaled; }}"
    )


def _spec(activation: Activation | None, unused: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return the kind and the alpha of an activation. Without an alpha, return an empty slice of `unused` instead."""
    if activation is None:
        return "none", unused[:0]
    return activation.kind, unused[:0] if activation.alpha is None else activation.alpha
