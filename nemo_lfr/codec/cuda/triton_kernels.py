"""Triton kernels: a convolution fused with its padding, activations and sums, and a pointwise kernel.

Signals are [B, T, H], channels innermost. Each example in a batch has its own length. The padding of an example
(reflected values, zeros or the last value) is not stored in memory; the kernels derive it from the signal.
"""

import triton
import triton.language as tl


@triton.jit
def _inside(at, end, mode: tl.constexpr):
    """Return the row of the signal to read for each position `at`, and whether to read it.

    Positions below 0 or from `end` on are padding. With zero padding, nothing is read for them.
    """
    if mode == "reflect":
        at = tl.where(at < 0, -at, at)  # tl.abs would hide the alignment from the compiler
        at = tl.where(at >= end, 2 * end - 2 - at, at)
    there = (at >= 0) & (at < end)
    if mode != "constant":
        there = at == at
    return tl.minimum(tl.maximum(at, 0), end - 1), there


@triton.jit
def _activated(values, channel, alpha, num_snake, kind: tl.constexpr, slope: tl.constexpr, pairs: tl.constexpr):
    """Apply snake to the first `num_snake` channels and leaky ReLU to the others, in fp32.

    If `pairs` is not empty, this PTX code is run instead, on pairs of 16-bit values.
    """
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


# Arguments that differ between layers. Triton should not compile a separate kernel for each of their values.
FREE = ["ends", "num_in", "num_out", "dilation", "before", "num_snake", "num_snake_after", "alpha", "alpha_after"]


@triton.jit(do_not_specialize=FREE)
def convolution_kernel(
    signal,  # [B, num_in, inputs], examples `signal_step` elements apart
    weight,  # [outputs, taps * inputs]
    bias,  # [outputs], fp32
    residual,  # same elements as `out`, examples `residual_step` elements apart
    total,  # same shape as `out`
    out,  # [B, out_size]
    ends,  # [B], valid rows in each example
    alpha,  # alpha of the activation before the convolution
    alpha_after,  # alpha of the activation after it
    num_in,
    num_out,
    out_size,  # elements in one example of `out`
    signal_step,
    residual_step,
    reduction_size,  # taps * inputs
    stride,
    dilation,
    before,  # rows of padding before each example
    shift,  # elements to trim at the start of the output
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
    """Write `activation_after(scale * (conv(activation(signal)) + bias + residual + total))` to `out`.

    The convolution is a matrix product of the inputs, [time, taps * inputs], and the weight. The matrix of inputs is
    not stored.
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
        if inputs % tile_sums == 0:  # one tap at a time, so each line of the tile is from one row of the signal
            # The compiler cannot see that these loads are aligned; without `multiple_of`, they wait for one another.
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
def pointwise_kernel(
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
