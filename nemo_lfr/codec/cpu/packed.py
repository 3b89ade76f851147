"""A derived form of an encoder's or a decoder's weights, for inference on a CPU.

Built when it is first needed, beside the module, whose parameters stay as they are; dropped when they change. It holds

- the weights of each convolution, weight norm folded, in the layout that oneDNN's kernel reads, so that no call
  computes or copies them; transposed convolutions are convolutions of two taps to all phases;
- for wide layers in fp32, their Toom-Cook form: four outputs of four taps cost 7 products instead of 16;
- in bf16, which is opt-in: each shape of each layer is compared with fp32 when it is first met, and runs in fp32, with
  a warning, where it is wrong. The layers that read or write audio, codes or encoded frames stay in fp32.
"""

import warnings
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.codec.cpu import winograd
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d, fold, interleave
from nemo_lfr.modules.weights import DerivedForms

# Fewest frames of a batch for which transformed weights, twice as large, pay.
WINOGRAD_MIN_FRAMES = 48
# Fewest products of channels and taps: below, the transforms cost more than they save (measured on Zen 4).
WINOGRAD_MIN_PRODUCTS = 1000
MAX_BF16_ERROR = 0.05  # of the output's rms; rounding to 8 bits gives 0.003 to 0.01


class Packed(NamedTuple):
    """A convolution without padding as oneDNN takes it."""

    packed: torch.Tensor
    bias: torch.Tensor | None
    stride: int
    dilation: int


class Weights(Protocol):
    """Weights of an encoder or a decoder, and the convolutions with them."""

    def cast(self, hidden: torch.Tensor, layer: Conv1d | None = None) -> torch.Tensor:
        """Return an input of `layer` in the type that it is computed in; without it, of any inner layer."""

    def convolve(
        self, layer: Conv1d, padded: torch.Tensor, slope: float = 1.0, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute `Conv1d.convolve` and what comes after it, while the output is in the cache.

        Args:
            layer: whose padding is there already.
            padded: [B, H_in, T].
            slope: of a leaky ReLU of the output; 1 is none.
            residual: [B, H_out, T_out] to add, where there is no slope.

        Returns:
            [B, H_out, T_out], T_out = (T - span) // stride + 1.
        """

    def overlap(self, layer: ConvTranspose1d, padded: torch.Tensor) -> torch.Tensor:
        """Compute `ConvTranspose1d.overlap`: [B, H_in, T] -> [B, H_out, (T - 1) * stride]."""

    def use_winograd(self, layer: Conv1d, num_frames: int) -> bool:
        """Return whether `winograd` is faster than `convolve` for a batch of `num_frames` frames."""

    def winograd(
        self, layers: list[Conv1d], padded: torch.Tensor, starts: list[int], slope: float = 1.0
    ) -> list[torch.Tensor]:
        """Convolve one input with several layers of one dilation by Toom-Cook.

        Args:
            layers: for which `use_winograd`; their dilation is 1 where one of `starts` is not 0.
            padded: [B, H_in, T], channels innermost, and `winograd.slack` rows of finite numbers in memory after it.
            starts: of each layer, the first item of `padded` that its first output sees.
            slope: of a leaky ReLU of the outputs; 1 is none.

        Returns:
            Of each layer [B, H_out, T - start - span + 1] at least.
        """


class ModuleWeights:
    """The weights as the modules hold them, where they cannot be packed."""

    def cast(self, hidden: torch.Tensor, layer: Conv1d | None = None) -> torch.Tensor:
        """Leave it to the caller's autocast."""
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
        """Return False: there are no transformed weights."""
        return False

    def winograd(
        self, layers: list[Conv1d], padded: torch.Tensor, starts: list[int], slope: float = 1.0
    ) -> list[torch.Tensor]:
        """Raise, as `use_winograd` is False."""
        raise AssertionError("module weights are not transformed")


class PackedWeights:
    """Weights packed for oneDNN; see the head of this file.

    Args:
        network: encoder or decoder on a CPU.
        dtype: float32 or bfloat16.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # They read or write audio, codes and encoded frames: cheap, and what is lost here is lost for all.
        self._ends = {network.pre_conv, network.post_conv}
        self._packed: dict[nn.Module, Packed] = {}
        self._transformed: dict[nn.Module, winograd.Transformed] = {}
        self._checked: dict[tuple[nn.Module, torch.Size], bool] = {}

    def cast(self, hidden: torch.Tensor, layer: Conv1d | None = None) -> torch.Tensor:
        """See `Weights`: the first and the last layer take what they are passed."""
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
        """See `Weights`: for wide layers and long signals in fp32."""
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
        """A convolution at the plan's precision, if that is right for this shape."""
        way = self._get(layer, self.dtype)
        shape = layer, padded.shape
        if self.dtype == torch.bfloat16 and shape not in self._checked:
            error = _error(layer, padded, _convolve(padded, way))
            self._checked[shape] = error < MAX_BF16_ERROR
            if not self._checked[shape]:
                warnings.warn(
                    f"a convolution of {list(padded.shape)} with {list(layer.conv.weight.shape)} is wrong in bf16 on "
                    f"this machine (error {error:.2g} of its rms); it is computed in fp32, which is slower.",
                    stacklevel=2,
                )
        if self.dtype == torch.float32 or self._checked[shape]:
            return _convolve(padded, way, slope, residual)
        result = F.leaky_relu(_exact(layer, padded), slope)
        return (result if residual is None else result + residual).to(self.dtype)


_WEIGHTS: DerivedForms[PackedWeights] = DerivedForms()


def weights_of(network: nn.Module, dtype: torch.dtype) -> Weights:
    """Return the packed weights of an encoder or a decoder, or its modules' own where there can be none.

    There can be none in training, on a GPU, in another precision than fp32 and bf16, and without oneDNN.
    """
    first = next(network.parameters())
    usable = first.device.type == "cpu" and first.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if network.training or not usable or dtype not in (torch.float32, torch.bfloat16):
        _WEIGHTS.drop(network)
        return ModuleWeights()
    return _WEIGHTS.get(network, dtype, lambda: PackedWeights(network, dtype))


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers: AMX or AVX512-bf16, or what oneDNN knows on other kinds."""
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _pack(weight: torch.Tensor, stride: int, dilation: int) -> torch.Tensor:
    """[H_out, H_in, 1, K] in the layout of oneDNN's kernel.

    It is the same for every length from about 100 on, for more than one tap (measured): else oneDNN may pack anew in
    each call.
    """
    span = (weight.shape[3] - 1) * dilation + 1
    shape = [1, weight.shape[1], 1, span + 1023 * stride]
    return torch.ops.mkldnn._reorder_convolution_weight(weight, [0, 0], [1, stride], [1, dilation], 1, shape)


def _convolve(
    padded: torch.Tensor, way: Packed, slope: float = 1.0, residual: torch.Tensor | None = None
) -> torch.Tensor:
    plane = padded.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    geometry = [0, 0], [1, way.stride], [1, way.dilation], 1
    if residual is not None:
        assert slope == 1.0
        other = residual.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            plane, other, way.packed, way.bias, *geometry, "add", 1.0, None, [], None
        ).squeeze(2)
    after = ("none", [], "") if slope == 1.0 else ("leaky_relu", [slope], "")
    return torch.ops.mkldnn._convolution_pointwise(plane, way.packed, way.bias, *geometry, *after).squeeze(2)


def _exact(layer: Conv1d | ConvTranspose1d, padded: torch.Tensor) -> torch.Tensor:
    weight, bias = fold(layer)
    stride = layer.conv.stride[0] if isinstance(layer, Conv1d) else 1
    return F.conv1d(padded.float(), weight, bias, stride, 0, layer.conv.dilation[0])


def _error(layer: Conv1d | ConvTranspose1d, padded: torch.Tensor, result: torch.Tensor) -> float:
    """The rms difference to fp32 of 16 items spread over the output, as a share of their rms."""
    weight, _ = fold(layer)
    stride = layer.conv.stride[0] if isinstance(layer, Conv1d) else 1
    span = (weight.shape[2] - 1) * layer.conv.dilation[0] + 1
    places = torch.linspace(0, result.shape[2] - 1, 16, dtype=torch.float64).long().tolist()
    seen = torch.stack([padded[0, :, place * stride : place * stride + span] for place in places])
    exact = _exact(layer, seen)[:, :, 0]
    found = result[0, :, places].T.float()
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-9))
