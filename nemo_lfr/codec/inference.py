"""Encoder and decoder at inference: the modules' arithmetic and results, with fewer passes over memory.

Activations and sums are taken by the convolutions before them or written straight into the padded input of those
after, and the branches of a residual layer share theirs. Residual layers, which are most of the work, go through a
long signal in pieces, which need little memory, with the context that a piece depends on at both sides. The examples
of a batch may end at different lengths in memory of one width: after each of them stands, at every layer, what the
layer would have padded it with, so that each comes out as if it were alone. A few widths then serve clips of every
length, and oneDNN has a kernel for them at hand.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from nemo_lfr.codec.activation import CodecActivation
from nemo_lfr.codec.conv import Conv1d, ConvTranspose1d
from nemo_lfr.codec.decoder import HiFiGANDecoder
from nemo_lfr.codec.encoder import HiFiGANEncoder
from nemo_lfr.codec.finite import to_audio
from nemo_lfr.codec.plan import plan_of, slack
from nemo_lfr.codec.residual import ResidualBlock, ResidualLayer

# Numbers of one array of a piece of a residual layer's signal: a dozen of these are in use at a time.
PIECE = 1024 * 1024
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
    way = _Way(encoder, audio.shape[0] * audio.shape[1] // rate)
    with way.plain():
        return _encode(encoder, way, audio, num_frames)


def _encode(encoder: HiFiGANEncoder, way: "_Way", audio: torch.Tensor, num_frames: Lengths) -> torch.Tensor:
    rate = encoder.samples_per_frame
    hidden = way.cast(_conv(way, encoder.pre_conv, audio.unsqueeze(1), _scaled(num_frames, rate)))
    for res_layer, activation, down_sample, down_rate in zip(
        encoder.res_layers,
        encoder.activations,
        encoder.down_sample_conv_layers,
        encoder.down_sample_rates,
        strict=True,
    ):
        at = _scaled(num_frames, rate)
        hidden = _residuals(way, cast(ResidualLayer, res_layer), hidden, at)
        hidden = _conv(way, cast(Conv1d, down_sample), hidden, at, cast(CodecActivation, activation))
        rate //= down_rate
    return _conv(way, encoder.post_conv, hidden, num_frames, encoder.post_activation)


@torch.no_grad()
def decode_frames(decoder: HiFiGANDecoder, inputs: torch.Tensor, num_frames: Lengths = None) -> torch.Tensor:
    """`HiFiGANDecoder.decode_frames`: dequantized frames [B, D, T] -> [B, T * samples_per_frame]; as above."""
    way = _Way(decoder, inputs.shape[0] * inputs.shape[2])
    with way.plain():
        return _decode(decoder, way, inputs, num_frames)


def _decode(decoder: HiFiGANDecoder, way: "_Way", inputs: torch.Tensor, num_frames: Lengths) -> torch.Tensor:
    rate = 1
    hidden = way.cast(_conv(way, decoder.pre_conv, inputs, num_frames))
    for activation, up_sample, res_layer, up_rate in zip(
        decoder.activations, decoder.up_sample_conv_layers, decoder.res_layers, decoder.up_sample_rates, strict=True
    ):
        at = _scaled(num_frames, rate)
        hidden = _upsample(way, cast(ConvTranspose1d, up_sample), hidden, at, cast(CodecActivation, activation))
        rate *= up_rate
        hidden = _residuals(way, cast(ResidualLayer, res_layer), hidden, _scaled(num_frames, rate))
    hidden = _conv(way, decoder.post_conv, hidden, _scaled(num_frames, rate), decoder.post_activation)
    return to_audio(decoder.out_activation, hidden).squeeze(1)


class _Way:
    """How convolutions are computed: by the part's plan, if it has one here, else by its modules.

    `torch.autocast("cpu", torch.bfloat16)` around it asks for a plan in bf16.
    """

    def __init__(self, part: nn.Module, num_frames: int) -> None:
        self._autocast = torch.is_autocast_enabled("cpu")
        self._dtype = torch.get_autocast_dtype("cpu") if self._autocast else torch.float32
        self._plan = plan_of(part, self._dtype)
        self._num_frames = num_frames

    def plain(self) -> AbstractContextManager[Any]:
        """Autocast would cast what the plan has cast already."""
        return torch.autocast("cpu", enabled=False) if self._plan and self._autocast else nullcontext()

    def cast(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self._plan is None else hidden.to(self._dtype)

    def convolve(
        self,
        layer: Conv1d,
        padded: torch.Tensor,
        activation: CodecActivation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The convolution, then `activation` of its output or the sum with `residual`."""
        if self._plan is not None and (slope := _slope(activation)) is not None:
            return self._plan.convolve(layer, padded, slope, residual)
        result = layer.convolve(padded) if self._plan is None else self._plan.convolve(layer, padded)
        if residual is not None:
            return result.add_(residual)
        return result if activation is None else activation(result)

    def overlap(self, layer: ConvTranspose1d, padded: torch.Tensor) -> torch.Tensor:
        return layer.overlap(padded) if self._plan is None else self._plan.overlap(layer, padded)

    def is_fast(self, layer: Conv1d) -> bool:
        return self._plan is not None and self._plan.is_fast(layer, self._num_frames)

    def fast(
        self, layers: list[Conv1d], padded: torch.Tensor, starts: list[int], activation: CodecActivation | None = None
    ) -> list[torch.Tensor]:
        assert self._plan is not None
        slope = _slope(activation)
        if slope is not None:
            return self._plan.fast(layers, padded, starts, slope)
        assert activation is not None
        return [activation(result) for result in self._plan.fast(layers, padded, starts)]


def _slope(activation: CodecActivation | None) -> float | None:
    """Of a leaky ReLU; 1 for no activation, None for any other."""
    match activation and activation.activation:
        case None:
            return 1.0
        case nn.LeakyReLU(negative_slope=slope):
            return float(slope)
    return None


def _scaled(lengths: Lengths, rate: int) -> Lengths:
    return None if lengths is None else [length * rate for length in lengths]


def _padded(
    hidden: torch.Tensor,
    pad: tuple[int, int],
    mode: str,
    lengths: Lengths,
    activation: CodecActivation | None = None,
    behind: int = 0,
) -> torch.Tensor:
    """The activated [B, H, T] between `pad` items of padding, channels-last; zeros for `behind` items after all."""
    (batch, channels, length), (before, after) = hidden.shape, pad
    width = before + length + after
    rows = hidden.new_empty((batch * width + behind, channels))
    rows[batch * width :].zero_()
    padded = rows[: batch * width].view(batch, width, channels).transpose(1, 2)
    inner = padded[:, :, before : before + length]
    match _slope(activation):
        case 1.0:
            inner.copy_(hidden)
        case None:
            inner.copy_(cast(CodecActivation, activation)(hidden))
        case slope:
            torch.ops.aten.leaky_relu.out(hidden, slope, out=inner)
    if before:
        padded[:, :, :before] = _beyond(inner, 0, before, mode)
    if lengths is not None:
        # A tile of a convolution may reach beyond an example's own padding: NaN there would spread.
        padded[:, :, before + length :].zero_()
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
    way: _Way,
    layer: Conv1d,
    hidden: torch.Tensor,
    lengths: Lengths,
    before: CodecActivation | None = None,
    after: CodecActivation | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Activation, convolution, then another activation or the sum with `residual`, which is not written to.

    [B, H_in, T] -> [B, H_out, T // stride].
    """
    if way.is_fast(layer):
        behind = slack(layer.conv.dilation[0], layer.conv.kernel_size[0])
        padded = _padded(hidden, layer.pad, layer.pad_mode, lengths, before, behind)
        (result,) = way.fast([layer], padded, [0], after)
        return result if residual is None else result.add_(residual)
    padded = _padded(hidden, layer.pad, layer.pad_mode, lengths, before)
    return way.convolve(layer, padded, after, residual)


def _upsample(
    way: _Way, layer: ConvTranspose1d, hidden: torch.Tensor, lengths: Lengths, activation: CodecActivation
) -> torch.Tensor:
    """Activation, then transposed convolution: [B, H_in, T] -> [B, H_out, T * stride]."""
    samples = hidden.shape[2] * layer.conv.stride[0]
    full = way.overlap(layer, _padded(hidden, (1, 1), "constant", lengths, activation))
    return full[:, :, layer.first_sample : layer.first_sample + samples]


def _residuals(way: _Way, layer: ResidualLayer, hidden: torch.Tensor, lengths: Lengths) -> torch.Tensor:
    """The mean of the branches, piece by piece: [B, H, T] -> [B, H, T]."""
    branches = [list(cast(Iterable[ResidualBlock], branch.res_blocks)) for branch in layer.res_blocks]
    batch, channels, length = hidden.shape
    before, after = layer.context
    piece = max(PIECE // (batch * channels), 8 * (before + after))
    count = -(-length // piece)
    if count < 2:
        return _mean(way, branches, hidden, lengths)
    piece = -(-length // count)
    width = before + piece + after  # of all pieces, as kernels are made for a width
    result = hidden.new_empty_strided(hidden.shape, (length * channels, 1, channels))
    for first in range(0, length, piece):
        start = min(max(first - before, 0), length - width)
        # An example that ends before the piece has no part in it.
        ends = lengths and [min(end - start, width) if end > first else width for end in lengths]
        mean = _mean(way, branches, hidden[:, :, start : start + width], ends)
        result[:, :, first : first + piece] = mean[:, :, first - start : first - start + piece]
    return result


def _mean(way: _Way, branches: list[list[ResidualBlock]], hidden: torch.Tensor, lengths: Lengths) -> torch.Tensor:
    middles = _first_convs(way, [blocks[0] for blocks in branches], hidden, lengths)
    total: torch.Tensor | None = None
    for blocks, middle in zip(branches, middles, strict=True):
        result = hidden
        for block in blocks:
            if block is not blocks[0]:
                middle = _conv(way, block.input_conv, result, lengths, block.input_activation, block.skip_activation)
            result = _conv(way, block.skip_conv, middle, lengths, residual=result)
        total = result if total is None else total.add_(result)
    assert total is not None
    return total.div_(len(branches))


def _first_convs(
    way: _Way, firsts: list[ResidualBlock], hidden: torch.Tensor, lengths: Lengths
) -> Iterator[torch.Tensor]:
    """What the branches' first convolutions, and the activations after them, make of the same input."""
    convs = [block.input_conv for block in firsts]
    if any(True for _ in firsts[0].input_activation.parameters()):
        yield from (
            _conv(way, conv, hidden, lengths, block.input_activation, block.skip_activation)
            for conv, block in zip(convs, firsts, strict=True)
        )
        return
    # The padding of a shorter kernel is the inner part of a longer one's.
    widest = max(conv.pad for conv in convs)
    fast = [number for number, conv in enumerate(convs) if way.is_fast(conv) and conv.conv.dilation[0] == 1]
    behind = slack(1, max(conv.conv.kernel_size[0] for conv in convs))
    shared = _padded(hidden, widest, convs[0].pad_mode, lengths, firsts[0].input_activation, behind)
    starts = [widest[0] - conv.pad[0] for conv in convs]
    after = firsts[0].skip_activation  # of all, as it has no parameters either
    results = (
        way.fast([convs[number] for number in fast], shared, [starts[number] for number in fast], after)
        if fast
        else []
    )
    done = dict(zip(fast, results, strict=True))
    for number, (conv, start) in enumerate(zip(convs, starts, strict=True)):
        if number in done:
            yield done.pop(number)[:, :, : hidden.shape[2]]
        else:
            yield way.convolve(conv, shared[:, :, start : shared.shape[2] - widest[1] + conv.pad[1]], after)
