"""Run encoders and decoders on a CPU, with the same results as their modules but fewer passes over memory.

- An activation or an addition after a convolution is fused into the convolution where oneDNN supports it. A leaky ReLU
  before a convolution writes its result directly into the convolution's padded input.
- The branches of a residual layer share one padded input.
- Residual layers do most of the work. They process long signals in pieces with context on both sides, which limits
  memory.
- The examples in a batch may have different lengths, and the batch may be wider than its longest example. Every layer
  writes its padding directly after the end of each example, so each example gets the same result as alone. Callers can
  therefore round up the widths of batches. This saves time, because oneDNN compiles kernels for each width.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from nemo_lfr.codec.cpu.packed import ModuleWeights, weights_of
from nemo_lfr.codec.cpu.winograd import slack
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.context import residual_context
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.finite import to_audio
from nemo_lfr.modules.padding import fill_padding
from nemo_lfr.modules.residual import ResidualBlock, ResidualLayer

# Elements in one piece of a residual layer's input; about a dozen arrays of this size are in use at a time.
PIECE = 1024 * 1024


@torch.no_grad()
def encode_frames(encoder: HiFiGANEncoder, audio: torch.Tensor, num_frames: list[int] | None = None) -> torch.Tensor:
    """Run `HiFiGANEncoder.encode_frames` for a batch of clips that may have different lengths.

    Args:
        encoder: the encoder; training and evaluation mode give the same results.
        audio: finite samples, [B, T * samples_per_frame].
        num_frames: valid frames in each clip, at least `encoder.min_frames`; default: T for all clips.

    Returns:
        Encoded frames [B, D, T]; values after the end of a clip are undefined.
    """
    rate = encoder.samples_per_frame
    ops = PackedOps(encoder, audio.shape[0] * audio.shape[1] // rate)
    with ops.without_autocast():
        return encoder.run(ops, Batch(audio.unsqueeze(1), _scaled(num_frames, rate))).hidden


@torch.no_grad()
def decode_frames(decoder: HiFiGANDecoder, inputs: torch.Tensor, num_frames: list[int] | None = None) -> torch.Tensor:
    """Run `HiFiGANDecoder.decode_frames` for a batch of utterances that may have different lengths.

    Args:
        decoder: the decoder; training and evaluation mode give the same results.
        inputs: dequantized frames, [B, D, T].
        num_frames: valid frames in each utterance, at least `decoder.min_frames`; default: T for all utterances.

    Returns:
        Audio [B, T * samples_per_frame]; samples after the end of an utterance are undefined.
    """
    ops = PackedOps(decoder, inputs.shape[0] * inputs.shape[2])
    with ops.without_autocast():
        hidden = decoder.run(ops, Batch(inputs, num_frames)).hidden
        return to_audio(decoder.out_activation, hidden).squeeze(1)


class Batch(NamedTuple):
    """Batch of signals, which may have different lengths, in one tensor.

    Attributes:
        hidden: the signals, [B, H, T].
        ends: number of valid time steps in each example; None if all T steps of every example are valid.
    """

    hidden: torch.Tensor
    ends: list[int] | None


class PackedOps:
    """Implementation of `nemo_lfr.modules.network.Ops` for CPUs.

    It uses packed weights, or `ModuleWeights` if the weights cannot be packed. Within
    `torch.autocast("cpu", torch.bfloat16)`, packed weights are bf16.

    Args:
        network: encoder or decoder.
        num_frames: total number of frames in the batch; it decides where Winograd convolution is used.
    """

    def __init__(self, network: nn.Module, num_frames: int) -> None:
        self._autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if self._autocast else torch.float32
        self._weights = weights_of(network, dtype)
        self._num_frames = num_frames

    def without_autocast(self) -> AbstractContextManager[Any]:
        """Return a context manager that disables autocast if the weights are packed."""
        is_packed = not isinstance(self._weights, ModuleWeights)
        return torch.autocast("cpu", enabled=False) if is_packed and self._autocast else nullcontext()

    def conv(self, layer: Conv1d, signal: Batch, activation: CodecActivation | None = None) -> Batch:
        """Apply an activation and a convolution: [B, H_in, T] -> [B, H_out, T // stride]."""
        hidden = self._weights.cast(signal.hidden, layer)
        ends = None if signal.ends is None else [end // layer.conv.stride[0] for end in signal.ends]
        return Batch(self._conv(layer, Batch(hidden, signal.ends), before=activation), ends)

    def upsample(self, layer: ConvTranspose1d, signal: Batch, activation: CodecActivation) -> Batch:
        """Apply an activation and a transposed convolution: [B, H_in, T] -> [B, H_out, T * stride]."""
        hidden, ends = self._weights.cast(signal.hidden), signal.ends
        stride = layer.conv.stride[0]
        full = self._weights.overlap(layer, _padded(Batch(hidden, ends), (1, 1), "constant", activation))
        kept = full[:, :, layer.first_sample : layer.first_sample + hidden.shape[2] * stride]
        return Batch(kept, _scaled(ends, stride))

    def residual(self, layer: ResidualLayer, signal: Batch) -> Batch:
        """Return the mean of the residual branches: [B, H, T] -> [B, H, T]. Long signals are processed in pieces."""
        hidden, ends = self._weights.cast(signal.hidden), signal.ends
        batch, channels, length = hidden.shape
        if length <= PIECE // (batch * channels):
            return Batch(self._mean(layer.branches, Batch(hidden, ends)), ends)
        before, after = residual_context(layer)
        count = -(-length // max(PIECE // (batch * channels), 8 * (before + after)))
        piece = -(-length // count)
        width = min(before + piece + after, length)  # the same for all pieces, because kernels are compiled per width
        result = hidden.new_empty_strided(hidden.shape, (length * channels, 1, channels))
        for first in range(0, length, piece):
            start = min(max(first - before, 0), length - width)
            # If an example ends before the piece, its results are not used, so it may have any number of valid steps.
            piece_ends = ends and [min(end - start, width) if end > first else width for end in ends]
            mean = self._mean(layer.branches, Batch(hidden[:, :, start : start + width], piece_ends))
            result[:, :, first : first + piece] = mean[:, :, first - start : first - start + piece]
        return Batch(result, ends)

    def _mean(self, branches: list[list[ResidualBlock]], signal: Batch) -> torch.Tensor:
        middles = self._first_convs([blocks[0] for blocks in branches], signal)
        total: torch.Tensor | None = None
        for blocks, middle in zip(branches, middles, strict=True):
            result = self._branch(blocks, signal, middle)
            total = result if total is None else total.add_(result)
        assert total is not None
        return total.div_(len(branches))

    def _branch(self, blocks: list[ResidualBlock], signal: Batch, middle: torch.Tensor) -> torch.Tensor:
        """Run the blocks of one branch.

        `middle` is the output of the first block's first convolution, with the next activation applied.
        """
        hidden, ends = signal
        for block in blocks:
            if block is not blocks[0]:
                middle = self._conv(
                    block.input_conv, Batch(hidden, ends), block.input_activation, block.skip_activation
                )
            hidden = self._conv(block.skip_conv, Batch(middle, ends), residual=hidden)
        return hidden

    def _first_convs(self, blocks: list[ResidualBlock], signal: Batch) -> Iterator[torch.Tensor]:
        """For each branch, run the first convolution and the activation that follows it, and yield the result."""
        if not _can_share(blocks):
            for block in blocks:
                yield self._conv(block.input_conv, signal, block.input_activation, block.skip_activation)
            return
        convs = [block.input_conv for block in blocks]
        # All branches share an input that is padded for the longest kernel; shorter kernels read an inner part of it.
        pad = max(conv.pad for conv in convs)
        behind = slack(1, max(conv.conv.kernel_size[0] for conv in convs))
        shared = _padded(signal, pad, convs[0].pad_mode, blocks[0].input_activation, behind)
        starts = [pad[0] - conv.pad[0] for conv in convs]
        after = blocks[0].skip_activation  # the same for all branches, as `_can_share` has checked
        done = self._shared_winograd(convs, shared, starts, after)
        for number, (conv, start) in enumerate(zip(convs, starts, strict=True)):
            if number in done:
                yield done.pop(number)[:, :, : signal.hidden.shape[2]]
            else:
                yield self._convolve(conv, shared[:, :, start : shared.shape[2] - pad[1] + conv.pad[1]], after)

    def _shared_winograd(
        self, convs: list[Conv1d], shared: torch.Tensor, starts: list[int], after: CodecActivation
    ) -> dict[int, torch.Tensor]:
        """Run those layers that use Winograd convolution without dilation.

        The input is transformed only once.

        Args:
            convs: first convolution of each branch.
            shared: padded input of all layers, [B, H_in, T].
            starts: for each layer, the index of the first time step in `shared` that its first output depends on.
            after: activation after the convolutions.

        Returns:
            A dict from the index of each of these layers in `convs` to its output.
        """
        numbers = [n for n, conv in enumerate(convs) if self._use_winograd(conv) and conv.conv.dilation[0] == 1]
        if not numbers:
            return {}
        results = self._winograd([convs[n] for n in numbers], shared, [starts[n] for n in numbers], after)
        return dict(zip(numbers, results, strict=True))

    def _conv(
        self,
        layer: Conv1d,
        signal: Batch,
        before: CodecActivation | None = None,
        after: CodecActivation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply an activation and a convolution, and then an activation or the addition of `residual`.

        Args:
            layer: the convolution.
            signal: input, [B, H_in, T].
            before: activation before the convolution, or None.
            after: activation after the convolution, or None.
            residual: tensor to add to the result, [B, H_out, T // stride]; not changed. Must be None if `after` is
                set.

        Returns:
            [B, H_out, T // stride].
        """
        if self._use_winograd(layer):
            behind = slack(layer.conv.dilation[0], layer.conv.kernel_size[0])
            padded = _padded(signal, layer.pad, layer.pad_mode, before, behind)
            (result,) = self._winograd([layer], padded, [0], after)
            return result if residual is None else result.add_(residual)
        return self._convolve(layer, _padded(signal, layer.pad, layer.pad_mode, before), after, residual)

    def _convolve(
        self,
        layer: Conv1d,
        padded: torch.Tensor,
        after: CodecActivation | None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if (slope := slope_of(after)) is not None:
            return self._weights.convolve(layer, padded, slope, residual)
        assert after is not None
        result: torch.Tensor = after(self._weights.convolve(layer, padded))
        return result

    def _use_winograd(self, layer: Conv1d) -> bool:
        return self._weights.use_winograd(layer, self._num_frames)

    def _winograd(
        self, layers: list[Conv1d], padded: torch.Tensor, starts: list[int], after: CodecActivation | None
    ) -> list[torch.Tensor]:
        if (slope := slope_of(after)) is not None:
            return self._weights.winograd(layers, padded, starts, slope)
        assert after is not None
        return [after(result) for result in self._weights.winograd(layers, padded, starts)]


def _can_share(blocks: list[ResidualBlock]) -> bool:
    """Return whether blocks have the same padding mode and the same activations, and no activation has weights."""

    def settings(block: ResidualBlock) -> tuple[object, ...]:
        kinds = [block.input_activation.activation, block.skip_activation.activation]
        values = [getattr(kind, "negative_slope", getattr(kind, "alpha", None)) for kind in kinds]
        return (block.input_conv.pad_mode, *map(type, kinds), *values)

    known = all(
        type(kind.activation) in (nn.LeakyReLU, nn.ELU)
        for block in blocks
        for kind in (block.input_activation, block.skip_activation)
    )
    return known and len({settings(block) for block in blocks}) == 1


def _scaled(ends: list[int] | None, factor: int) -> list[int] | None:
    return None if ends is None else [end * factor for end in ends]


def slope_of(activation: CodecActivation | None) -> float | None:
    """Return the slope of a leaky ReLU; 1 if there is no activation; None for any other activation."""
    inner = activation and activation.activation
    if inner is None:
        return 1.0
    # `isinstance` would also accept a user's subclass, which may compute something else.
    return float(inner.negative_slope) if type(inner) is nn.LeakyReLU else None


def _padded(
    signal: Batch,
    pad: tuple[int, int],
    mode: str,
    activation: CodecActivation | None = None,
    behind: int = 0,
) -> torch.Tensor:
    """Apply an activation and pad each example.

    Args:
        signal: [B, H, T].
        pad: numbers of time steps to add before and after each example.
        mode: padding mode of the layer.
        activation: activation before padding, or None.
        behind: number of time steps of zeros to append in memory after the last example.

    Returns:
        [B, H, before + T + after], channels innermost in memory.
    """
    (batch, channels, length), (before, after) = signal.hidden.shape, pad
    width = before + length + after
    rows = signal.hidden.new_empty((batch * width + behind, channels))
    rows[batch * width :].zero_()
    padded = rows[: batch * width].view(batch, width, channels).transpose(1, 2)
    inner = padded[:, :, before : before + length]
    if activation is None:
        inner.copy_(signal.hidden)
    elif (slope := slope_of(activation)) is None:
        inner.copy_(activation(signal.hidden))
    else:  # directly into the padded buffer
        torch.ops.aten.leaky_relu.out(signal.hidden, slope, out=inner)
    if signal.ends is not None:
        # A convolution may read past an example's padding, and uninitialized memory there might contain NaN.
        padded[:, :, before + length :].zero_()
    fill_padding(padded, pad, mode, signal.ends)
    return padded
