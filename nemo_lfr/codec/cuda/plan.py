"""Execution plan of an encoder or decoder on CUDA: the list of its layers, each with the fastest implementation.

A layer has several implementations, called candidates: a cuDNN convolution between two pointwise Triton kernels, and
one fused Triton kernel for each tile size. In fp32, the only candidate is the one with cuDNN. Without Triton, all
layers run in plain PyTorch. The first and the last layer of the network always run in fp32, because their errors
affect tokens and audio directly.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from nemo_lfr.codec.cuda import folded
from nemo_lfr.codec.cuda.autotuner import Autotuner, Candidate, gpu_seconds
from nemo_lfr.codec.cuda.folded import Activation, Layer, Precision
from nemo_lfr.errors import shorten
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.finite import to_audio
from nemo_lfr.modules.residual import ResidualBlock, ResidualLayer

logger = logging.getLogger("nemo_lfr")

PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
}
# Maximum number of channels for which fused kernels are tried. Fusion saves little in wide layers, but cuDNN sometimes
# chooses slow kernels for them: decoding 10 s of audio on an H100 took 75 ms with a maximum of 256, 5 ms with 1024.
FUSED_CHANNELS = 1024
# Shared by the whole process: the fastest candidate depends on the device and on shapes, not on the weights.
AUTOTUNER = Autotuner(gpu_seconds)


@dataclass(frozen=True)
class Block:
    """Folded form of a `ResidualBlock`: activation, convolution, activation, convolution.

    Attributes:
        first: the first convolution.
        second: the second convolution.
        before: activation before the first convolution.
        between: activation between the convolutions.
    """

    first: Layer
    second: Layer
    before: Activation
    between: Activation

    @classmethod
    def of(cls, block: ResidualBlock, precision: Precision) -> "Block":
        """Copy and prepare the weights of a block for a precision."""
        return cls(
            Layer.of(block.input_conv, precision),
            Layer.of(block.skip_conv, precision),
            Activation.of(block.input_activation),
            Activation.of(block.skip_activation),
        )


@dataclass(frozen=True)
class Step:
    """Step of a plan: one layer or one residual layer, which can be run and timed separately.

    Attributes:
        name: name in reports.
        run: function that takes a signal [B, T, H_in] and the number of valid time steps in each example [B], and
            returns [B, T_out, H_out].
        layers: folded layers of the step.
        rate: number of input time steps per frame.
    """

    name: str
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    layers: tuple[Layer, ...]
    rate: int


class Plan:
    """Plan of an encoder or decoder at one precision, made from its current weights.

    Args:
        network: encoder or decoder. The weights of its convolutions are copied.
        precision: precision of all layers except the first and the last one, which stay in fp32.
        kernels: the module `nemo_lfr.codec.cuda.kernels`, or None for plain PyTorch.
        autotuner: autotuner that chooses among the candidates for each layer.
    """

    def __init__(
        self,
        network: HiFiGANEncoder | HiFiGANDecoder,
        precision: Precision,
        kernels: ModuleType | None,
        autotuner: Autotuner = AUTOTUNER,
    ) -> None:
        self.precision = precision
        ops = CudaOps(network, precision, LayerRunner(precision, kernels, autotuner))
        rate = network.samples_per_frame if isinstance(network, HiFiGANEncoder) else 1
        self.steps = network.run(ops, Recording((), rate)).steps
        self._output = network.out_activation if isinstance(network, HiFiGANDecoder) else None

    def __call__(self, signal: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Run all steps in order.

        Args:
            signal: fp32 [B, T, H_in].
            frames: valid frames in each example, [B].

        Returns:
            fp32 [B, T_out, H_out].
        """
        for step in self.steps:
            signal = step.run(signal, frames * step.rate)
        return signal if self._output is None else to_audio(self._output, signal)


class Recording(NamedTuple):
    """Placeholder for a signal while a plan is made.

    Attributes:
        steps: steps of the plan that together compute the signal.
        rate: number of time steps per frame in the signal.
    """

    steps: tuple[Step, ...]
    rate: int


class CudaOps:
    """Implementation of `nemo_lfr.modules.network.Ops` that records layers as steps instead of running them.

    Each operation copies and prepares the weights of its layer.

    Args:
        network: encoder or decoder. Its first and last layer stay in fp32.
        precision: precision of all other layers.
        runner: object that will run the recorded layers.
    """

    def __init__(self, network: HiFiGANEncoder | HiFiGANDecoder, precision: Precision, runner: "LayerRunner") -> None:
        self._first, self._last = network.pre_conv, network.post_conv
        self._precision, self._runner = precision, runner

    def conv(self, layer: Conv1d, signal: Recording, activation: CodecActivation | None = None) -> Recording:
        """Record a convolution."""
        is_exact = layer is self._first or layer is self._last
        folded_layer = Layer.of(layer, Precision(torch.float32) if is_exact else self._precision)
        dtype = torch.float32 if layer is self._last else self._precision.dtype
        name = {self._first: "in", self._last: "out"}.get(layer, "down" if layer.conv.stride[0] > 1 else "conv")
        return self._add_layer(name, folded_layer, signal, activation, dtype)

    def upsample(self, layer: ConvTranspose1d, signal: Recording, activation: CodecActivation) -> Recording:
        """Record a transposed convolution."""
        folded_layer = Layer.of(layer, self._precision)
        return self._add_layer("up", folded_layer, signal, activation, self._precision.dtype)

    def residual(self, layer: ResidualLayer, signal: Recording) -> Recording:
        """Record a residual layer with all its branches as one step."""
        branches = [[Block.of(block, self._precision) for block in blocks] for blocks in layer.branches]
        layers = tuple(layer for blocks in branches for block in blocks for layer in (block.first, block.second))
        run = functools.partial(self._runner.run_residuals, branches)
        step = Step(f"residual {layers[0].inputs}", run, layers, signal.rate)
        return Recording((*signal.steps, step), signal.rate)

    def _add_layer(
        self,
        name: str,
        layer: Layer,
        signal: Recording,
        activation: CodecActivation | None,
        dtype: torch.dtype,
    ) -> Recording:
        before = None if activation is None else Activation.of(activation)
        run = functools.partial(self._runner.run_layer, layer, before, dtype)
        channels = f"{layer.inputs} to {layer.outputs // layer.upsample_stride}"
        step = Step(f"{name} {channels}", run, (layer,), signal.rate)
        return Recording((*signal.steps, step), signal.rate * layer.upsample_stride // layer.stride)


class LayerRunner:
    """Object that runs folded layers, each with its fastest candidate.

    Args:
        precision: precision of the network.
        kernels: the module `nemo_lfr.codec.cuda.kernels`, or None for plain PyTorch.
        autotuner: autotuner that chooses among the candidates for each layer.
    """

    def __init__(self, precision: Precision, kernels: ModuleType | None, autotuner: Autotuner) -> None:
        self.precision = precision
        self._kernels, self._autotuner = kernels, autotuner

    def run_layer(
        self,
        layer: Layer,
        activation: Activation | None,
        dtype: torch.dtype,
        signal: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """Apply an activation and a layer.

        Args:
            layer: the folded layer.
            activation: activation before the layer, or None.
            dtype: dtype of the result.
            signal: [B, T, H_in].
            ends: number of valid time steps in each example, [B].

        Returns:
            [B, T_out, H_out].
        """
        candidates: dict[str, Candidate] = {
            "library": lambda: self._by_library(layer, signal, ends, activation=activation, dtype=dtype)
        }
        kernels = self._kernels
        if kernels is not None and self._may_fuse(layer) and kernels.fusable(layer, activation):
            for tile in kernels.tiles(layer, activation):
                candidates[f"fused {tuple(tile)}"] = functools.partial(
                    kernels.convolution, layer, signal, ends, tile, activation=activation, dtype=dtype
                )
        key = ("layer", *_shape(layer), _kind(activation), *_size(signal))
        return self._autotuner.run(key, candidates, ends * layer.upsample_stride // layer.stride)

    def run_residuals(self, branches: list[list[Block]], signal: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Run the branches of a residual layer, and return the mean of their outputs, [B, T, H].

        Args:
            branches: residual blocks of each branch, in order.
            signal: input of all branches, [B, T, H].
            ends: number of valid time steps in each example, [B].
        """
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
        """Return scale * (signal + output of the block's second convolution + total)."""
        first, second = block.first, block.second
        candidates: dict[str, Candidate] = {
            "library": lambda: self._block_by_library(block, signal, ends, total, scale)
        }
        kernels = self._kernels
        if kernels is not None and self._may_fuse(first) and kernels.fusable(first, block.before, block.between):

            def fused(tile: Any) -> torch.Tensor:
                middle = kernels.convolution(first, signal, ends, tile, activation=block.before, after=block.between)
                result: torch.Tensor = kernels.convolution(
                    second, middle, ends, tile, residual=signal, total=total, scale=scale
                )
                return result

            for tile in kernels.tiles(first, block.before):
                candidates[f"fused {tuple(tile)}"] = functools.partial(fused, tile)
        key = ("block", *_shape(first), _kind(block.before), *_size(signal))
        return self._autotuner.run(key, candidates, ends)

    def _may_fuse(self, layer: Layer) -> bool:
        """Return whether fused kernels are candidates for a layer.

        In fp32 without TF32, they never are: reference tokens must not depend on which candidate is the fastest. At
        other precisions, they are candidates for layers of at most `FUSED_CHANNELS` channels.
        """
        return (self.precision.dtype, self.precision.tf32) != (torch.float32, False) and (
            max(layer.inputs, layer.outputs // layer.upsample_stride) <= FUSED_CHANNELS
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
        output: torch.Tensor = kernels.pointwise(result, ends, bias=bias, dtype=dtype or signal.dtype)
        return output

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
        output: torch.Tensor = kernels.pointwise(
            result, ends, bias=second.bias, residual=signal, total=total, scale=scale
        )
        return output

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
        result: torch.Tensor = self._kernels.pointwise(
            signal,
            ends,
            pad=layer.pad,
            mode=layer.mode,
            bias=bias,
            activation=activation,
            dtype=layer.weight.dtype,
        )
        return result


def _shape(layer: Layer) -> tuple[Any, ...]:
    taps = layer.reduction_size // layer.inputs
    return layer.inputs, layer.outputs, taps, layer.stride, layer.dilation, layer.weight.dtype, layer.dot_precision


def _kind(activation: Activation | None) -> str:
    return "none" if activation is None else activation.kind


def _size(signal: torch.Tensor) -> tuple[int, Any]:
    """Return two parts of the autotuner's key: log2 of the batch's total time steps (rounded up), and the device."""
    return (signal.shape[0] * signal.shape[1] - 1).bit_length(), signal.device


@functools.cache
def find_kernels(device: torch.device) -> ModuleType | None:
    """Return the module `nemo_lfr.codec.cuda.kernels` if a small Triton kernel works on a device, else None."""
    if device.type != "cuda":
        return None
    try:
        from nemo_lfr.codec.cuda import kernels

        signal = torch.randn(2, 40, 16, device=device, dtype=torch.float32)
        ends = torch.tensor([40, 33], device=device)
        with torch.cuda.device(device):
            result = kernels.pointwise(signal, ends, pad=(3, 3), mode="reflect", scale=2.0)
        expected = torch.cat([signal[:, 1:4].flip(1), signal, signal[:, -4:-1].flip(1)], 1) * 2
        if not torch.equal(result[0], expected[0]):
            raise RuntimeError("a test kernel returned a wrong result")
    except Exception as reason:  # no Triton, no C compiler, or no suitable driver
        logger.warning(
            "Triton kernels cannot be used on %s (%s: %s); convolutions run in plain PyTorch, which is slower.",
            device,
            type(reason).__name__,
            shorten(reason),
        )
        return None
    return kernels
