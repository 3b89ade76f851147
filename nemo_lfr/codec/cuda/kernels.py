"""Triton kernels: a convolution fused with its padding, activations and sums, and a pointwise kernel.

Signals are [B, T, H], channels innermost. Each example of a batch has its own length, and its padding (reflected,
zeros or the last value) is read by index, not copied, so a batch of clips of different lengths needs no mask and no
padding. Imported on a GPU only, or by tests under TRITON_INTERPRET=1.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from nemo_lfr.codec.cuda.folded import Activation, Layer


class Tile(NamedTuple):
    """Tile of a convolution: outputs in time and channels, summands per step, warps and stages.

    With `pairs`, a leaky ReLU before the convolution processes two values at a time on GPUs that can. Every value is
    activated once per tap, which would otherwise take as long as the products.
    """

    time: int
    channels: int
    sums: int
    warps: int
    stages: int
    pairs: bool = False


@triton.jit
def _inside(at, end, mode: tl.constexpr):
    """Return the row of the signal for a padded position, and whether it is not a zero."""
    if mode == "reflect":
        at = tl.where(at < 0, -at, at)  # after tl.abs the compiler no longer sees what is aligned
        at = tl.where(at >= end, 2 * end - 2 - at, at)
    there = (at >= 0) & (at < end)
    if mode != "constant":
        there = at == at
    return tl.minimum(tl.maximum(at, 0), end - 1), there


@triton.jit
def _activated(values, channel, alpha, num_snake, kind: tl.constexpr, slope: tl.constexpr, pairs: tl.constexpr):
    """Apply snake to the first channels and leaky ReLU to the others, in fp32 or by `pairs`."""
    if kind != "none":
        if pairs != "":
            values = tl.inline_asm_elementwise(pairs, "=r,r", [values], values.dtype, is_pure=True, pack=2)
        else:
            values = values.to(tl.float32)
            linear = tl.where(values > 0, values, values * slope)
            if kind == "snake":
                rate = tl.load(alpha + channel, mask=channel < num_snake, other=1.0)
                wave = tl.sin(rate * values)
                values = tl.where(channel < num_snake, values + wave * wave / (rate + 1e-9), linear)
            else:
                values = linear
    return values


# Arguments that differ between layers, but do not justify a specialized kernel.
FREE = ["ends", "num_in", "num_out", "dilation", "before", "num_snake", "num_snake_after", "alpha", "alpha_after"]


@triton.jit(do_not_specialize=FREE)
def _convolution(
    signal,  # [B, num_in, inputs], examples `signal_step` elements apart
    weight,  # [outputs, taps * inputs]
    bias,  # [outputs], fp32
    residual,  # [B, num_out * outputs] less `shift`, examples `residual_step` apart; as `out`
    total,  # as `out`
    out,  # [B, out_size]
    ends,  # [B]: rows of each example
    alpha,  # of the activation before
    alpha_after,
    num_in,
    num_out,
    out_size,  # elements of one example of `out`
    signal_step,
    residual_step,
    reduction_size,  # taps * inputs
    stride,
    dilation,
    before,  # rows of padding
    shift,  # elements that are trimmed at the start
    period,  # channels after which `alpha_after` repeats
    num_snake,
    num_snake_after,
    scale,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    run: tl.constexpr,  # the largest power of two that divides `inputs` and `tile_sums`
    mode: tl.constexpr,
    kind: tl.constexpr,
    slope: tl.constexpr,
    kind_after: tl.constexpr,
    slope_after: tl.constexpr,
    has_residual: tl.constexpr,
    has_total: tl.constexpr,
    precision: tl.constexpr,
    pairs: tl.constexpr,
    tile_time: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_sums: tl.constexpr,
):
    """Write after(scale * (conv(activation(signal)) + bias + residual + total)) to `out`.

    It is a matrix product of [time, taps * inputs] with the weight, whose left side is gathered on the fly. Most
    lines are arguments, which Triton cannot group.
    """
    tiles = tl.cdiv(outputs, tile_channels)
    time = (tl.program_id(0) // tiles) * tile_time + tl.arange(0, tile_time)
    channel = (tl.program_id(0) % tiles) * tile_channels + tl.arange(0, tile_channels)
    example = tl.program_id(1).to(tl.int64)
    end = tl.minimum(tl.load(ends + example).to(tl.int32), num_in)
    signal += example * signal_step
    sums = tl.full((tile_time, tile_channels), 0.0, tl.float32)
    for first in range(0, reduction_size, tile_sums):
        place = first + tl.arange(0, tile_sums)
        if inputs % tile_sums == 0:  # one tap at a time: a row a line
            # Without the hints loads wait for one another: the compiler cannot see that they are aligned.
            source = tl.multiple_of(first % inputs, tile_sums) + tl.arange(0, tile_sums)
            at = (time * stride + (first // inputs) * dilation - before)[:, None]
            row, there = _inside(at, end, mode)
        else:
            source = tl.multiple_of(tl.max_contiguous(place % inputs, run), run)
            at = (time * stride - before)[:, None] + (place // inputs * dilation)[None, :]
            row, there = _inside(at, end, mode)
            row = tl.max_constancy(row, [1, run])
            there = tl.max_constancy(there, [1, run])
        left = tl.load(
            signal + row * inputs + source[None, :], mask=there & (place < reduction_size)[None, :], other=0.0
        )
        left = _activated(left, source[None, :], alpha, num_snake, kind, slope, pairs)
        right = tl.load(
            weight + channel[None, :] * reduction_size + place[:, None],
            mask=(channel < outputs)[None, :] & (place < reduction_size)[:, None],
            other=0.0,
        )
        sums = tl.dot(left.to(right.dtype), right, sums, input_precision=precision)
    sums += tl.load(bias + channel, mask=channel < outputs, other=0.0)[None, :]
    place = time[:, None] * outputs + channel[None, :] - shift
    kept = (channel < outputs)[None, :] & (time < num_out)[:, None] & (place >= 0) & (place < out_size)
    if has_residual:
        sums += tl.load(residual + example * residual_step + place, mask=kept, other=0.0).to(tl.float32)
    if has_total:
        sums += tl.load(total + example * out_size + place, mask=kept, other=0.0).to(tl.float32)
    channel = channel[None, :] % period
    sums = _activated(sums * scale, channel, alpha_after, num_snake_after, kind_after, slope_after, "")
    tl.store(out + example * out_size + place, sums.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["ends", "num_in", "num_out", "before", "num_snake", "alpha"])
def _pointwise(
    signal,
    bias,
    residual,
    total,
    out,
    ends,
    alpha,
    num_in,
    num_out,
    signal_step,
    residual_step,
    before,
    num_snake,
    scale,
    channels: tl.constexpr,
    mode: tl.constexpr,
    kind: tl.constexpr,
    slope: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    has_total: tl.constexpr,
    tile: tl.constexpr,
):
    """Write the padded activation(scale * (signal + bias + residual + total)) to `out`."""
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    example = tl.program_id(1).to(tl.int64)
    end = tl.minimum(tl.load(ends + example).to(tl.int32), num_in)
    if mode == "none":
        row, there, kept = place // channels, place >= 0, place < num_out * channels
    else:
        row, there = _inside(place // channels - before, end, mode)
        kept = place < num_out * channels
    channel = place % channels
    source = row * channels + channel
    values = tl.load(signal + example * signal_step + source, mask=kept & there, other=0.0).to(tl.float32)
    if has_bias:
        values += tl.load(bias + channel, mask=kept & there, other=0.0)
    if has_residual:
        values += tl.load(residual + example * residual_step + source, mask=kept & there, other=0.0).to(tl.float32)
    if has_total:
        values += tl.load(total + example * (num_in * channels) + source, mask=kept & there, other=0.0).to(tl.float32)
    values = _activated(values * scale, channel, alpha, num_snake, kind, slope, "")
    tl.store(out + example * (num_out * channels) + place, values.to(out.dtype.element_ty), mask=kept)


def tiles(layer: Layer, activation: Activation | None = None) -> list[Tile]:
    """Return the tiles to try for a layer; compiling each takes a second on first use."""
    channels = max(16, min(128, triton.next_power_of_2(layer.outputs)))
    # Prefer a power of two that divides the channels, if it is large enough.
    exact = math.gcd(layer.outputs, 128)
    if exact >= 64:
        channels = exact
    sums = max(16, min(64, triton.next_power_of_2(layer.reduction_size)))
    if layer.weight.dtype == torch.float32:  # twice the bytes in shared memory
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
    """Compute `folded.convolution` in one kernel.

    Args:
        layer: `fusable`.
        signal: [B, T, H_in].
        ends: items of each example, [B]; values after them are ignored.
        tile: one of `tiles`.
        activation: before the convolution.
        residual: added to the result, [B, T_out, H_out].
        total: also added; contiguous.
        scale: factor of the sum.
        after: activation of the result.
        dtype: of the result; default: that of the signal.

    Returns:
        [B, T_out, H_out].
    """
    signal = _rows(signal)
    batch, num_in, _ = signal.shape
    num_out, kept = layer.num_out(num_in), layer.num_kept(num_in)
    channels = layer.outputs // layer.upsample_stride
    out = torch.empty((batch, kept, channels), dtype=dtype or signal.dtype, device=signal.device)
    if out.numel() == 0:
        return out
    before_kind, alpha = _spec(activation, layer.bias)
    after_kind, alpha_after = _spec(after, layer.bias)
    residual = None if residual is None else _rows(residual)
    grid = (triton.cdiv(num_out, tile.time) * triton.cdiv(layer.outputs, tile.channels), batch)
    _convolution[grid](
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
        inputs=layer.inputs,
        outputs=layer.outputs,
        run=math.gcd(layer.inputs, tile.sums),
        mode=layer.mode,
        has_residual=residual is not None,
        has_total=total is not None,
        precision=layer.dot_precision,
        pairs=_pairs(signal, activation) if tile.pairs else "",
        kind=before_kind,
        slope=0.0 if activation is None else activation.slope,
        kind_after=after_kind,
        slope_after=0.0 if after is None else after.slope,
        tile_time=tile.time,
        tile_channels=tile.channels,
        tile_sums=tile.sums,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


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
    """Compute bias, sums, scale, activation and padding around a convolution of another library.

    Args:
        signal: [B, T, H].
        ends: items of each example, [B], which are followed by its padding.
        pad: items before and after; None for no padding.
        mode: "constant" (zeros), "reflect" or "replicate".
        bias: added to the signal, [H].
        residual: added too, [B, T, H].
        total: added too, [B, T, H]; contiguous.
        scale: factor of the sum.
        activation: of the scaled sum.
        dtype: of the result; default: that of the signal.

    Returns:
        [B, before + T + after, H].
    """
    signal = _rows(signal)
    batch, num_in, channels = signal.shape
    num_out = num_in + (sum(pad) if pad is not None else 0)
    out = torch.empty((batch, num_out, channels), dtype=dtype or signal.dtype, device=signal.device)
    residual = None if residual is None else _rows(residual)
    kind, alpha = _spec(activation, ends)
    tile = 1024
    _pointwise[(triton.cdiv(num_out * channels, tile), batch)](
        signal,
        signal if bias is None else bias,
        signal if residual is None else residual,
        signal if total is None else total,
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
        tile=tile,
        num_warps=4,
    )
    return out


def _rows(signal: torch.Tensor) -> torch.Tensor:
    """Return the signal with contiguous rows; examples may be further apart."""
    _, _, channels = signal.shape
    return signal if signal.stride()[1:] == (channels, 1) else signal.contiguous()


def _pairs(signal: torch.Tensor, activation: Activation | None) -> str:
    """Return PTX of a leaky ReLU of two bf16 or fp16 values; empty if not supported."""
    if activation is None or activation.kind != "lrelu" or not 0 < activation.slope < 1 or not signal.is_cuda:
        return ""
    if torch.version.cuda is None or torch.cuda.get_device_capability(signal.device) < (9, 0):
        return ""  # multiplying bf16 pairs came with Hopper
    name = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}.get(signal.dtype)
    if name is None:
        return ""
    return leaky_pairs(name, int(torch.tensor(activation.slope, dtype=signal.dtype).view(torch.int16)) & 0xFFFF)


def leaky_pairs(name: str, bits: int) -> str:
    """Return PTX of max(x, slope * x) for two values of type `name`; `bits` encode the slope."""
    return (
        "{ .reg .b32 slope, scaled; "
        f"mov.b32 slope, 0x{bits:04x}{bits:04x}; mul.{name} scaled, $1, slope; max.{name} $0, $1, scaled; }}"
    )


def _spec(activation: Activation | None, unused: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return the kind of an activation and its alpha."""
    if activation is None:
        return "none", unused[:0]
    return activation.kind, unused[:0] if activation.alpha is None else activation.alpha
