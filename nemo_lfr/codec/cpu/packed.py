"""Packed weights of an encoder or decoder, for inference on a CPU.

Packed weights are built on first use and dropped when the parameters of the network change. There are two forms:

- For each convolution, the weights with weight norm folded, in the memory layout of oneDNN's kernel. Calls then do
  not have to fold or reorder the weights. A transposed convolution becomes an ordinary convolution with two taps. Its
  output channels include all phases (the `stride` outputs for each input step). Transposed convolutions with groups
  are not packed.
- For wide convolutions in fp32, also the weights for Winograd convolution (`nemo_lfr.codec.cpu.winograd`). With a
  kernel of four taps, this method needs 7 multiplications instead of 16 for four outputs.

In bf16, which is opt-in, the first result of each layer for each shape is compared with fp32. If the error is too
large, a warning is issued and the layer runs in fp32 for this shape. The first and the last layer of the network
always run in fp32.
"""

import warnings
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.codec.cpu import winograd
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d, fold, interleave
from nemo_lfr.modules.weights import DerivedForms

_MKLDNN: Any = torch.backends.mkldnn
# Smallest number of frames in a batch for which Winograd convolution is faster. Smaller batches spend most of their
# time reading weights, and the weights for Winograd convolution are twice as large.
WINOGRAD_MIN_FRAMES = 48
# Smallest product of channels and taps for which Winograd convolution is faster (measured on Zen 4).
WINOGRAD_MIN_PRODUCTS = 1000
MAX_BF16_ERROR = 0.05  # rms error relative to the rms of the output; bf16's 8 significant bits cause 0.003 to 0.01


class Packed(NamedTuple):
    """Convolution without padding whose weights are in oneDNN's layout.

    Attributes:
        packed: the weights.
        bias: [H_out], or None.
        stride: stride of the convolution.
        dilation: dilation of the convolution.
    """

    packed: torch.Tensor
    bias: torch.Tensor | None
    stride: int
    dilation: int


class Weights(Protocol):
    """Weights of an encoder or decoder, and methods that run convolutions with these weights."""

    def cast(self, hidden: torch.Tensor, layer: Conv1d | None = None) -> torch.Tensor:
        """Convert the input of a layer to the dtype of the layer's weights.

        Args:
            hidden: the input.
            layer: the layer; None stands for any layer except the first and the last one of the network.
        """

    def convolve(
        self, layer: Conv1d, padded: torch.Tensor, slope: float = 1.0, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run `Conv1d.convolve` and a leaky ReLU or an addition in one pass.

        Args:
            layer: the convolution.
            padded: the padded input of the convolution, [B, H_in, T].
            slope: slope of a leaky ReLU after the convolution; 1 if there is none.
            residual: tensor to add to the output, [B, H_out, T_out]; only with slope 1.

        Returns:
            [B, H_out, T_out], T_out = (T - layer.span) // layer.stride + 1.
        """

    def overlap(self, layer: ConvTranspose1d, padded: torch.Tensor) -> torch.Tensor:
        """Run `ConvTranspose1d.overlap`: [B, H_in, T] -> [B, H_out, (T - 1) * stride]."""

    def use_winograd(self, layer: Conv1d, num_frames: int) -> bool:
        """Return whether `winograd` is faster than `convolve` for a batch of `num_frames` frames."""

    def winograd(
        self, layers: list[Conv1d], padded: torch.Tensor, starts: list[int], slope: float = 1.0
    ) -> list[torch.Tensor]:
        """Convolve one input with several layers of equal dilation, by Winograd convolution.

        Args:
            layers: layers for which `use_winograd` is true. The dilation must be 1 if any of `starts` is not 0.
            padded: input [B, H_in, T], stored in memory as [B, T, H_in]. In memory, at least
                `winograd.slack(dilation)` time steps of finite values must follow the input.
            starts: for each layer, the index of the first time step in `padded` that its first output depends on.
            slope: slope of a leaky ReLU after the convolution; 1 if there is none.

        Returns:
            For each layer, the output [B, H_out, n] with n >= T - start - layer.span + 1.
        """


class ModuleWeights:
    """Implementation of `Weights` with the weights of the modules; used if the weights cannot be packed."""

    def cast(self, hidden: torch.Tensor, layer: Conv1d | None = None) -> torch.Tensor:
        """Return the input unchanged, since PyTorch's autocast converts it where needed."""
        return hidden

    def convolve(
        self, layer: Conv1d, padded: torch.Tensor, slope: float = 1.0, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Weights`."""
        result = layer.convolve(padded)
        if slope != 1.0:
            result = F.leaky_relu(result, slope)
        return result if residual is None else result.add_(residual)

    def overlap(self, layer: ConvTranspose1d, padded: torch.Tensor) -> torch.Tensor:
        """See `Weights`."""
        return layer.overlap(padded)

    def use_winograd(self, layer: Conv1d, num_frames: int) -> bool:
        """Return False, since modules have no weights for Winograd convolution."""
        return False

    def winograd(
        self, layers: list[Conv1d], padded: torch.Tensor, starts: list[int], slope: float = 1.0
    ) -> list[torch.Tensor]:
        """Raise an error, because these weights do not support Winograd convolution."""
        raise AssertionError("modules have no weights for Winograd convolution")


class PackedWeights:
    """Implementation of `Weights` with weights packed for oneDNN; see the module's docstring.

    Args:
        network: encoder or decoder on a CPU.
        dtype: float32 or bfloat16.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # The first and the last layer stay in fp32: they are cheap, and their errors affect tokens and audio directly.
        self._ends = {network.pre_conv, network.post_conv}
        self._packed: dict[nn.Module, Packed] = {}
        self._transformed: dict[nn.Module, winograd.Transformed] = {}
        self._checked: dict[tuple[nn.Module, torch.Size], bool] = {}

    def cast(self, hidden: torch.Tensor, layer: Conv1d | None = None) -> torch.Tensor:
        """See `Weights`. Inputs of the first and last layer stay unchanged, because these layers accept any dtype."""
        return hidden if layer in self._ends else hidden.to(self.dtype)

    def convolve(
        self, layer: Conv1d, padded: torch.Tensor, slope: float = 1.0, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Weights`."""
        if layer in self._ends:
            return _convolve(padded.float(), self._get(layer, torch.float32), slope, residual)
        return self._run(layer, padded, slope, residual)

    def overlap(self, layer: ConvTranspose1d, padded: torch.Tensor) -> torch.Tensor:
        """See `Weights`."""
        stride = layer.conv.stride[0]
        if layer.conv.groups != 1:
            return layer.overlap(padded.float()).to(self.dtype)
        return interleave(self._run(layer, padded), stride)

    def use_winograd(self, layer: Conv1d, num_frames: int) -> bool:
        """Return whether to use Winograd convolution for a layer, in a batch of `num_frames` frames in total.

        It is used in fp32 for large batches, if the layer is wide and has stride 1 and at least 3 taps.
        """
        conv = layer.conv
        size = conv.kernel_size[0]
        return (
            self.dtype == torch.float32
            and num_frames >= WINOGRAD_MIN_FRAMES
            and min(conv.in_channels, conv.out_channels) * size >= WINOGRAD_MIN_PRODUCTS
            and conv.stride[0] == 1
            and size > 2
        )

    def winograd(
        self, layers: list[Conv1d], padded: torch.Tensor, starts: list[int], slope: float = 1.0
    ) -> list[torch.Tensor]:
        """See `Weights`."""
        for layer in layers:
            if layer not in self._transformed:
                self._transformed[layer] = winograd.transform(layer)
        return winograd.convolve([self._transformed[layer] for layer in layers], padded, starts, slope)

    def _get(self, layer: Conv1d | ConvTranspose1d, dtype: torch.dtype) -> Packed:
        if layer not in self._packed:
            weight, bias = fold(layer)
            stride = layer.conv.stride[0] if isinstance(layer, Conv1d) else 1
            dilation = layer.conv.dilation[0]
            packed = _pack(weight.to(dtype).unsqueeze(2), stride, dilation)
            self._packed[layer] = Packed(packed, bias if bias is None else bias.to(dtype), stride, dilation)
        return self._packed[layer]

    def _run(
        self,
        layer: Conv1d | ConvTranspose1d,
        padded: torch.Tensor,
        slope: float = 1.0,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Convolve at the precision of the weights, or in fp32 if bf16 is too inaccurate for this shape.

        For `slope` and `residual`, see `Weights.convolve`.
        """
        packed = self._get(layer, self.dtype)
        shape = layer, padded.shape
        if self.dtype == torch.bfloat16 and shape not in self._checked:
            error = _error(layer, padded, _convolve(padded, packed))
            self._checked[shape] = error < MAX_BF16_ERROR
            if not self._checked[shape]:
                warnings.warn(
                    f"the convolution of an input {list(padded.shape)} with weights {list(layer.conv.weight.shape)} "
                    f"is inaccurate in bf16 on this CPU (relative rms error {error:.2g}); it runs in fp32, which is "
                    "slower.",
                    stacklevel=2,
                )
        if self.dtype == torch.float32 or self._checked[shape]:
            return _convolve(padded, packed, slope, residual)
        result = F.leaky_relu(_exact(layer, padded), slope)
        return (result if residual is None else result + residual).to(self.dtype)


_WEIGHTS: DerivedForms[PackedWeights] = DerivedForms()


def weights_of(network: nn.Module, dtype: torch.dtype) -> Weights:
    """Return the packed weights of a network, or `ModuleWeights` if its weights cannot be packed.

    Weights are packed only if the network is on a CPU in evaluation mode, `dtype` is fp32 or bf16, and PyTorch has
    oneDNN.
    """
    first = next(network.parameters())
    usable = first.device.type == "cpu" and first.dtype == torch.float32 and _MKLDNN.is_available()
    if network.training or not usable or dtype not in (torch.float32, torch.bfloat16):
        _WEIGHTS.drop(network)
        return ModuleWeights()
    return _WEIGHTS.get(network, dtype, lambda: PackedWeights(network, dtype))


def has_bf16() -> bool:
    """Return whether this CPU has bf16 instructions.

    On x86, these are AMX or AVX512-bf16. On other CPUs, oneDNN reports whether it can use bf16.
    """
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return bool(_MKLDNN.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(weight: torch.Tensor, stride: int, dilation: int) -> torch.Tensor:
    """Reorder weights [H_out, H_in, 1, K] to the layout of oneDNN's kernel.

    oneDNN's layout depends on the length of the input. For kernels with more than one tap, it is the same for all
    inputs of about 100 time steps or more (measured). In other cases, oneDNN may reorder the weights in each call.
    """
    span = (weight.shape[3] - 1) * dilation + 1
    shape = [1, weight.shape[1], 1, span + 1023 * stride]
    packed: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, [0, 0], [1, stride], [1, dilation], 1, shape
    )
    return packed


def _convolve(
    padded: torch.Tensor, weights: Packed, slope: float = 1.0, residual: torch.Tensor | None = None
) -> torch.Tensor:
    plane = padded.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    geometry = [0, 0], [1, weights.stride], [1, weights.dilation], 1
    convolution: Any = torch.ops.mkldnn._convolution_pointwise
    result: torch.Tensor
    if residual is not None:
        assert slope == 1.0
        other = residual.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        addition: tuple[Any, ...] = ("add", 1.0, None, [], None)
        result = convolution.binary(plane, other, weights.packed, weights.bias, *geometry, *addition)
    else:
        after = ("none", [], "") if slope == 1.0 else ("leaky_relu", [slope], "")
        result = convolution(plane, weights.packed, weights.bias, *geometry, *after)
    return result.squeeze(2)


def _exact(layer: Conv1d | ConvTranspose1d, padded: torch.Tensor) -> torch.Tensor:
    weight, bias = fold(layer)
    stride = layer.conv.stride[0] if isinstance(layer, Conv1d) else 1
    return F.conv1d(padded.float(), weight, bias, stride, 0, layer.conv.dilation[0])


def _error(layer: Conv1d | ConvTranspose1d, padded: torch.Tensor, result: torch.Tensor) -> float:
    """Return the rms error of a result relative to fp32, at 16 time steps of the first example."""
    weight, _ = fold(layer)
    stride = layer.conv.stride[0] if isinstance(layer, Conv1d) else 1
    span = (weight.shape[2] - 1) * layer.conv.dilation[0] + 1
    places = torch.linspace(0, result.shape[2] - 1, 16, dtype=torch.float64).long().tolist()
    seen = torch.stack([padded[0, :, place * stride : place * stride + span] for place in places])
    exact = _exact(layer, seen)[:, :, 0]
    actual = result[0, :, places].T.float()
    return float((actual - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-9))
