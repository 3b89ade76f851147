"""The network as a GPU runs it: a list of steps over folded layers, each by the way that was measured fastest.

A layer can run as the library's convolution (cuDNN) between two passes of a small kernel, or as one kernel of ours;
without Triton, as plain PyTorch. The first and the last layer run in fp32 whatever the precision: they cost nothing,
and tokens and audio depend on them directly.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch

from nemo_lfr.codec.activation import CodecActivation
from nemo_lfr.codec.conv import Conv1d, ConvTranspose1d
from nemo_lfr.codec.decoder import HiFiGANDecoder
from nemo_lfr.codec.encoder import HiFiGANEncoder
from nemo_lfr.codec.finite import to_audio
from nemo_lfr.codec.gpu import folded
from nemo_lfr.codec.gpu.choice import Choices, Way, gpu_seconds
from nemo_lfr.codec.gpu.folded import Activation, Layer, Precision
from nemo_lfr.codec.residual import ResidualBlock, ResidualLayer
from nemo_lfr.errors import clip

logger = logging.getLogger("nemo_lfr")

PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
}
# Channels up to which our kernels are tried. Wide layers wait for products, but there too the library's worst choices
# need a rival: a clip of 10 s took 75 ms to decode on an H100 with 256 here, and 5 with 1024.
FUSED_CHANNELS = 1024
# Of the whole process: what is fastest depends on the device and on shapes, not on the weights.
CHOICES = Choices(gpu_seconds)


@dataclass(frozen=True)
class Block:
    """A `ResidualBlock`, folded."""

    first: Layer
    second: Layer
    before: Activation
    between: Activation

    @classmethod
    def of(cls, block: ResidualBlock, precision: Precision) -> "Block":
        return cls(
            Layer.of(block.input_conv, precision),
            Layer.of(block.skip_conv, precision),
            Activation.of(block.input_activation),
            Activation.of(block.skip_activation),
        )


@dataclass(frozen=True)
class Step:
    """A part of the network that can be run and timed alone.

    Attributes:
        name: for reports.
        run: signal [B, T, H_in] and the ends of its examples [B] -> [B, T_out, H_out].
        layers: that it runs.
        rate: items of its input for each frame.
    """

    name: str
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    layers: tuple[Layer, ...]
    rate: int


class Plan:
    """Encoder or decoder at one precision, derived from a part's numbers as they are now.

    Args:
        part: copied, not held.
        precision: of all but the first and last layer.
        kernels: `nemo_lfr.codec.gpu.kernels`, or None for plain PyTorch.
        choices: of ways to run a layer.
    """

    def __init__(
        self,
        part: HiFiGANEncoder | HiFiGANDecoder,
        precision: Precision,
        kernels: ModuleType | None,
        choices: Choices = CHOICES,
    ) -> None:
        self.precision = precision
        self.steps: list[Step] = []
        self._kernels, self._choices = kernels, choices
        exact = Precision(torch.float32)
        if isinstance(part, HiFiGANEncoder):
            self._encoder(part, exact)
        else:
            self._decoder(part, exact)

    def __call__(self, signal: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Signal [B, T, H_in] in fp32, frames of each example [B] -> [B, T_out, H_out] in fp32."""
        for step in self.steps:
            signal = step.run(signal, frames * step.rate)
        return signal

    def _encoder(self, encoder: HiFiGANEncoder, exact: Precision) -> None:
        rate = encoder.samples_per_frame
        self._add_layer("in", encoder.pre_conv, exact, rate, dtype=self.precision.dtype)
        for residuals, activation, down, down_rate in zip(
            encoder.res_layers,
            encoder.activations,
            encoder.down_sample_conv_layers,
            encoder.down_sample_rates,
            strict=True,
        ):
            self._add_residuals(cast(ResidualLayer, residuals), rate)
            self._add_layer("down", cast(Conv1d, down), self.precision, rate, cast(CodecActivation, activation))
            rate //= down_rate
        self._add_layer("out", encoder.post_conv, exact, rate, encoder.post_activation, torch.float32)

    def _decoder(self, decoder: HiFiGANDecoder, exact: Precision) -> None:
        rate = 1
        self._add_layer("in", decoder.pre_conv, exact, rate, dtype=self.precision.dtype)
        for activation, up, residuals, up_rate in zip(
            decoder.activations,
            decoder.up_sample_conv_layers,
            decoder.res_layers,
            decoder.up_sample_rates,
            strict=True,
        ):
            layer = cast(ConvTranspose1d, up)
            self._add_layer("up", layer, self.precision, rate, cast(CodecActivation, activation))
            rate *= up_rate
            self._add_residuals(cast(ResidualLayer, residuals), rate)
        self._add_layer("out", decoder.post_conv, exact, rate, decoder.post_activation, torch.float32)
        squash = decoder.out_activation
        last = self.steps[-1]
        self.steps[-1] = dataclasses.replace(last, run=lambda signal, ends: to_audio(squash, last.run(signal, ends)))

    def _add_layer(
        self,
        name: str,
        module: Conv1d | ConvTranspose1d,
        precision: Precision,
        rate: int,
        activation: CodecActivation | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = Layer.of(module, precision)
        run = functools.partial(
            self._run_layer, layer, None if activation is None else Activation.of(activation), dtype
        )
        channels = f"{layer.inputs} to {layer.outputs // layer.up}"
        self.steps.append(Step(f"{name} {channels}", run, (layer,), rate))

    def _add_residuals(self, module: ResidualLayer, rate: int) -> None:
        branches = [
            [Block.of(block, self.precision) for block in cast(Iterable[ResidualBlock], branch.res_blocks)]
            for branch in module.res_blocks
        ]
        layers = tuple(layer for blocks in branches for block in blocks for layer in (block.first, block.second))
        run = functools.partial(self._run_residuals, branches)
        self.steps.append(Step(f"residual {layers[0].inputs}", run, layers, rate))

    def _run_layer(
        self,
        layer: Layer,
        activation: Activation | None,
        dtype: torch.dtype | None,
        signal: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        ways: dict[str, Way] = {
            "library": lambda: self._by_library(layer, signal, ends, activation=activation, dtype=dtype)
        }
        kernels = self._kernels
        if kernels is not None and self._may_fuse(layer) and kernels.fusable(layer, activation):
            for tile in kernels.tiles(layer, activation):
                ways[f"fused {tuple(tile)}"] = functools.partial(
                    kernels.convolution, layer, signal, ends, tile, activation=activation, dtype=dtype
                )
        key = ("layer", *_shape(layer), _kind(activation), *_size(signal))
        return self._choices.run(key, ways, ends * layer.up // layer.stride)

    def _run_residuals(self, branches: list[list[Block]], signal: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The mean of the branches, gathered as they end."""
        total: torch.Tensor | None = None
        for branch, blocks in enumerate(branches):
            result = signal
            for block in blocks[:-1]:
                result = self._run_block(block, result, ends)
            scale = 1 / len(branches) if branch == len(branches) - 1 else 1.0
            total = self._run_block(blocks[-1], result, ends, total, scale)
        assert total is not None
        return total

    def _run_block(
        self,
        block: Block,
        signal: torch.Tensor,
        ends: torch.Tensor,
        total: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """scale * (signal + block(signal) + total)."""
        first, second = block.first, block.second
        ways: dict[str, Way] = {"library": lambda: self._block_by_library(block, signal, ends, total, scale)}
        kernels = self._kernels
        if kernels is not None and self._may_fuse(first) and kernels.fusable(first, block.before, block.between):

            def fused(tile: Any) -> torch.Tensor:
                middle = kernels.convolution(first, signal, ends, tile, activation=block.before, after=block.between)
                return kernels.convolution(second, middle, ends, tile, residual=signal, total=total, scale=scale)

            for tile in kernels.tiles(first, block.before):
                ways[f"fused {tuple(tile)}"] = functools.partial(fused, tile)
        key = ("block", *_shape(first), _kind(block.before), *_size(signal))
        return self._choices.run(key, ways, ends)

    def _may_fuse(self, layer: Layer) -> bool:
        """fp32 gives the tokens of record: they must not depend on what a measurement found fastest."""
        return (self.precision.dtype, self.precision.tf32) != (torch.float32, False) and (
            max(layer.inputs, layer.outputs // layer.up) <= FUSED_CHANNELS
        )

    def _by_library(
        self,
        layer: Layer,
        signal: torch.Tensor,
        ends: torch.Tensor,
        *,
        activation: Activation | None,
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        kernels = self._kernels
        if kernels is None or layer.groups > 1:
            return folded.convolution(layer, signal, ends, activation=activation, dtype=dtype)
        result = layer.convolve(self._padded(layer, signal, ends, activation), bias=False)
        bias = layer.bias[: result.shape[2]]
        return kernels.pointwise(result, ends, bias=bias, dtype=dtype or signal.dtype)

    def _block_by_library(
        self,
        block: Block,
        signal: torch.Tensor,
        ends: torch.Tensor,
        total: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        first, second, kernels = block.first, block.second, self._kernels
        if kernels is None:
            middle = folded.convolution(first, signal, ends, activation=block.before)
            return folded.convolution(
                second, middle, ends, activation=block.between, residual=signal, total=total, scale=scale
            )
        middle = first.convolve(self._padded(first, signal, ends, block.before), bias=False)
        result = second.convolve(self._padded(second, middle, ends, block.between, first.bias), bias=False)
        return kernels.pointwise(result, ends, bias=second.bias, residual=signal, total=total, scale=scale)

    def _padded(
        self,
        layer: Layer,
        signal: torch.Tensor,
        ends: torch.Tensor,
        activation: Activation | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert self._kernels is not None
        if activation is not None and activation.kind == "other":
            signal = activation(signal if bias is None else signal + bias.to(signal.dtype))
            activation = bias = None
        return self._kernels.pointwise(
            signal,
            ends,
            pad=layer.pad,
            mode=layer.mode,
            bias=bias,
            activation=activation,
            dtype=layer.weight.dtype,
        )


def _shape(layer: Layer) -> tuple[Any, ...]:
    taps = layer.num_sums // layer.inputs
    return layer.inputs, layer.outputs, taps, layer.stride, layer.dilation, layer.weight.dtype, layer.dot


def _kind(activation: Activation | None) -> str:
    return "none" if activation is None else activation.kind


def _size(signal: torch.Tensor) -> tuple[int, Any]:
    """Items to the next power of two, and the device: what is fastest changes no faster."""
    return (signal.shape[0] * signal.shape[1] - 1).bit_length(), signal.device


@functools.cache
def find_kernels(device: torch.device) -> ModuleType | None:
    """`nemo_lfr.codec.gpu.kernels` where Triton compiles them for this device, and they give what PyTorch gives."""
    if device.type != "cuda":
        return None
    try:
        from nemo_lfr.codec.gpu import kernels

        signal = torch.randn(2, 40, 16, device=device, dtype=torch.float32)
        ends = torch.tensor([40, 33], device=device)
        with torch.cuda.device(device):
            found = kernels.pointwise(signal, ends, pad=(3, 3), mode="reflect", scale=2.0)
        expected = torch.cat([signal[:, 1:4].flip(1), signal, signal[:, -4:-1].flip(1)], 1) * 2
        if not torch.equal(found[0], expected[0]):
            raise RuntimeError("its result is wrong")
    except Exception as reason:  # no Triton, no C compiler, no driver for it
        logger.warning(
            "Triton's kernels cannot be used on %s (%s: %s); convolutions run as plain PyTorch.",
            device,
            type(reason).__name__,
            clip(reason),
        )
        return None
    return kernels
