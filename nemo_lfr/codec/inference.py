"""Encoder and decoder at inference: the modules' arithmetic and results, with fewer passes over memory.

Activations are written straight into the padded input of the convolution that reads them, the branches of a residual
layer share theirs, and sums are taken in place. The examples of a batch may end at different lengths in memory of one
width: after each of them stands, at every layer, what the layer would have padded it with, so that each comes out as
if it were alone. A few widths then serve clips of every length, and oneDNN has a kernel for them at hand.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from nemo_lfr.codec.activation import CodecActivation
from nemo_lfr.codec.conv import Conv1d, ConvTranspose1d
from nemo_lfr.codec.decoder import HiFiGANDecoder
from nemo_lfr.codec.encoder import HiFiGANEncoder
from nemo_lfr.codec.residual import ResidualBlock, ResidualLayer

# Items of each example of a batch, at the rate of a layer; None if all of them are full.
Lengths = list[int] | None


@torch.no_grad()
def encode_frames(encoder: HiFiGANEncoder, audio: torch.Tensor, num_frames: Lengths = None) -> torch.Tensor:
    """`HiFiGANEncoder.encode_frames` of clips that may be shorter than the memory they lie in.

    Args:
        encoder: in eval mode or not: it has no dropout.
        audio: finite samples [B, T * samples_per_frame].
        num_frames: of each clip, at least `encoder.min_frames`; T if not given.

    Returns:
        Encoded frames [B, D, T]; what comes after a clip's own means nothing.
    """
    rate = encoder.samples_per_frame
    hidden = _conv(encoder.pre_conv, audio.unsqueeze(1), _scaled(num_frames, rate))
    for res_layer, activation, down_sample, down_rate in zip(
        encoder.res_layers,
        encoder.activations,
        encoder.down_sample_conv_layers,
        encoder.down_sample_rates,
        strict=True,
    ):
        at = _scaled(num_frames, rate)
        hidden = _residuals(cast(ResidualLayer, res_layer), hidden, at)
        hidden = _conv(cast(Conv1d, down_sample), hidden, at, cast(CodecActivation, activation))
        rate //= down_rate
    return _conv(encoder.post_conv, hidden, num_frames, encoder.post_activation)


@torch.no_grad()
def decode_frames(decoder: HiFiGANDecoder, inputs: torch.Tensor, num_frames: Lengths = None) -> torch.Tensor:
    """`HiFiGANDecoder.decode_frames`: dequantized frames [B, D, T] -> [B, T * samples_per_frame]; as above."""
    rate = 1
    hidden = _conv(decoder.pre_conv, inputs, num_frames)
    for activation, up_sample, res_layer, up_rate in zip(
        decoder.activations, decoder.up_sample_conv_layers, decoder.res_layers, decoder.up_sample_rates, strict=True
    ):
        at = _scaled(num_frames, rate)
        hidden = _upsample(cast(ConvTranspose1d, up_sample), hidden, at, cast(CodecActivation, activation))
        rate *= up_rate
        hidden = _residuals(cast(ResidualLayer, res_layer), hidden, _scaled(num_frames, rate))
    hidden = _conv(decoder.post_conv, hidden, _scaled(num_frames, rate), decoder.post_activation)
    return decoder.out_activation(hidden).squeeze(1)


def _scaled(lengths: Lengths, rate: int) -> Lengths:
    return None if lengths is None else [length * rate for length in lengths]


def _padded(
    hidden: torch.Tensor,
    pad: tuple[int, int],
    mode: str,
    lengths: Lengths,
    activation: CodecActivation | None = None,
) -> torch.Tensor:
    """The activated [B, H, T] between `pad` items of padding, channels-last."""
    (batch, channels, length), (before, after) = hidden.shape, pad
    padded = torch.empty(
        (batch, channels, 1, before + length + after),
        dtype=hidden.dtype,
        device=hidden.device,
        memory_format=torch.channels_last,
    ).squeeze(2)
    inner = padded[:, :, before : before + length]
    match activation and activation.activation:
        case None:
            inner.copy_(hidden)
        case nn.LeakyReLU(negative_slope=slope):
            torch.ops.aten.leaky_relu.out(hidden, slope, out=inner)
        case function:
            inner.copy_(cast(nn.Module, function)(hidden))
    if before:
        padded[:, :, :before] = _beyond(inner, 0, before, mode)
    for row, end in zip(padded, lengths, strict=True) if lengths is not None and after else ():
        row[:, before + end : before + end + after] = _beyond(row[None, :, before:], end, after, mode)[0]
    if lengths is None and after:
        padded[:, :, before + length :] = _beyond(inner, length, after, mode)
    return padded


def _beyond(hidden: torch.Tensor, edge: int, count: int, mode: str) -> torch.Tensor:
    """What is padded to [B, H, T] before its first item (`edge` 0) or after item `edge` - 1."""
    if mode == "constant":
        return hidden.new_zeros(1).expand(hidden.shape[0], 1, 1)
    if mode == "replicate":
        at = max(edge - 1, 0)
        return hidden[:, :, at : at + 1]
    mirrored = hidden[:, :, 1 : count + 1] if edge == 0 else hidden[:, :, edge - 1 - count : edge - 1]
    return mirrored.flip(2)


def _conv(
    layer: Conv1d, hidden: torch.Tensor, lengths: Lengths, activation: CodecActivation | None = None
) -> torch.Tensor:
    """Activation, then convolution: [B, H_in, T] -> [B, H_out, T // stride]."""
    return layer.convolve(_padded(hidden, layer.pad, layer.pad_mode, lengths, activation))


def _upsample(
    layer: ConvTranspose1d, hidden: torch.Tensor, lengths: Lengths, activation: CodecActivation
) -> torch.Tensor:
    """Activation, then transposed convolution: [B, H_in, T] -> [B, H_out, T * stride]."""
    samples = hidden.shape[2] * layer.conv.stride[0]
    full = layer.overlap(_padded(hidden, (1, 1), "constant", lengths, activation))
    return full[:, :, layer.first_sample : layer.first_sample + samples]


def _residuals(layer: ResidualLayer, hidden: torch.Tensor, lengths: Lengths) -> torch.Tensor:
    """The mean of the branches."""
    branches = [list(cast(Iterable[ResidualBlock], branch.res_blocks)) for branch in layer.res_blocks]
    firsts = [blocks[0] for blocks in branches]
    widest = max(block.input_conv.pad for block in firsts)
    mode = firsts[0].input_conv.pad_mode
    shared = None
    if not any(True for _ in firsts[0].input_activation.parameters()):
        # The padding of a shorter kernel is the inner part of a longer one's.
        shared = _padded(hidden, widest, mode, lengths, firsts[0].input_activation)
    total: torch.Tensor | None = None
    for blocks in branches:
        result = hidden
        for block in blocks:
            conv = block.input_conv
            if shared is not None and block is blocks[0]:
                before, after = (most - own for most, own in zip(widest, conv.pad, strict=True))
                middle = conv.convolve(shared[:, :, before : shared.shape[2] - after])
            else:
                middle = _conv(conv, result, lengths, block.input_activation)
            result = _conv(block.skip_conv, middle, lengths, block.skip_activation).add_(result)
        total = result if total is None else total.add_(result)
    assert total is not None
    return total.div_(len(branches))
