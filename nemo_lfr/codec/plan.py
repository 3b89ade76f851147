"""A derived form of an encoder's or a decoder's weights, for inference on a CPU.

Built when it is first needed, beside the module, whose parameters stay as they are; dropped when they change. It holds

- the weights of each convolution, weight norm folded, in the layout that oneDNN's kernel reads, so that no call
  computes or copies them; transposed convolutions are convolutions of two taps to all phases;
- for wide layers in fp32, their Toom-Cook form: four outputs of four taps cost 7 products instead of 16 (below);
- in bf16, which is opt-in: each shape of each layer is compared with fp32 when it is first met, and runs in fp32, with
  a warning, where it is wrong. The layers that read or write audio, codes or encoded frames stay in fp32.

Toom-Cook, also known as Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308): seven samples of the input
are evaluated as a polynomial at 7 points, four taps of the kernel too; their products, transformed back, are four
outputs. Longer kernels are sums of such pieces, four samples apart, so that pieces and branches share what was
transformed. In fp32 its rounding is 4 times that of a sum in order, 1e-6 of the output's rms.
"""

import warnings
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.codec.conv import Conv1d, ConvTranspose1d, fold, interleave
from nemo_lfr.codec.weights import DerivedForms

# Fewest frames of a batch for which transformed weights, twice as large, pay.
FAST_FRAMES = 48
# Fewest products of channels and taps: below, the transforms cost more than they save (measured on Zen 4).
FAST_SIZE = 1000
# Numbers of one array of a block, per thread: 7 of these and what they give stay in the cache.
BLOCK = 192 * 1024
TILE, POINTS = 4, 7
# Pairs of points -a and a, each with the coefficients of the other two pairs: (x^2 - b^2)(x^2 - c^2); then infinity.
PAIRS = ((0.5, 5.0, 4.0), (1.0, 4.25, 1.0), (2.0, 1.25, 0.25))
WORST_BF16 = 0.05  # of the output's rms; rounding to 8 bits gives 0.003 to 0.01


def slack(dilation: int, kernel_size: int = 11) -> int:
    """Rows behind a layer's padded input that its last tiles may read; what is there changes nothing but rounding."""
    return TILE * dilation * (-(-kernel_size // TILE) + 3)


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
            padded: [B, H_in, T], channels innermost, in memory that goes on for `slack` rows of finite numbers.
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
        self._banks: dict[nn.Module, torch.Tensor] = {}
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
            and num_frames >= FAST_FRAMES
            and min(conv.in_channels, conv.out_channels) * size >= FAST_SIZE
            and conv.stride[0] == 1
            and size > 2
        )

    def winograd(
        self, layers: list[Conv1d], padded: torch.Tensor, starts: list[int], slope: float = 1.0
    ) -> list[torch.Tensor]:
        """See `Weights`."""
        batch, channels, width = padded.shape
        dilation = layers[0].conv.dilation[0]
        count, step = batch * width, TILE * dilation
        tiles = -(-count // step)
        banks = [self._transformed(layer) for layer in layers]
        ahead = max(
            start // step + bank.shape[1] - 1 for start, bank in zip(starts, banks, strict=True)
        )  # tiles that the outputs of one tile see beyond it
        rows = padded.as_strided(
            (tiles + ahead + 1, TILE, dilation * channels), (step * channels, dilation * channels, 1)
        )
        outputs = [padded.new_empty((tiles, TILE, dilation * layer.conv.out_channels)) for layer in layers]
        block = max(256, BLOCK * torch.get_num_threads() // channels) // dilation
        for first in range(0, tiles, block):
            size = min(block, tiles - first)
            values = _evaluate(rows[first : first + size + ahead + 1])
            for layer, start, bank, output in zip(layers, starts, banks, outputs, strict=True):
                skip = start // step
                seen = values[:, skip : skip + size + bank.shape[1] - 1].view(POINTS, -1, channels)
                products = [
                    # 1 ^ n = 1: the bias comes back in every output.
                    _sum_of_products(seen[point], bank[point], layer.conv.bias if point == 2 else None, dilation)
                    for point in range(POINTS)
                ]
                _interpolate([product.view(size, -1) for product in products], output[first : first + size])
                if slope != 1.0:
                    F.leaky_relu_(output[first : first + size], slope)
        return [
            output.as_strided(
                (batch, layer.conv.out_channels, width - start - layer.span + 1),
                (width * layer.conv.out_channels, 1, layer.conv.out_channels),
                start % step * layer.conv.out_channels,
            )
            for layer, start, output in zip(layers, starts, outputs, strict=True)
        ]

    def _transformed(self, layer: Conv1d) -> torch.Tensor:
        """Weights at each point, [POINTS, pieces, H_out, H_in]."""
        if layer not in self._banks:
            weight = layer.conv.weight.detach()
            weight = F.pad(weight, (0, -weight.shape[2] % TILE)).unflatten(2, (-1, TILE))
            points = [weight @ taps for taps in _kernel_transform(weight)]  # [H_out, H_in, pieces] each
            self._banks[layer] = torch.stack(points).permute(0, 3, 1, 2).contiguous()
        return self._banks[layer]

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
            self._checked[shape] = error < WORST_BF16
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


def _sum_of_products(
    seen: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None, dilation: int
) -> torch.Tensor:
    """A convolution of [n, H_in] with [pieces, H_out, H_in] -> [n - (pieces - 1) * dilation, H_out].

    Not oneDNN's, which packs the weights anew in each call for few rows, and for one tap for many numbers of them:
    3 to 25 GFLOP/s instead of 100 (measured).
    """
    count = seen.shape[0] - (len(weights) - 1) * dilation
    result = F.linear(seen[:count], weights[0], bias)
    for piece in range(1, len(weights)):
        result.addmm_(seen[piece * dilation : piece * dilation + count], weights[piece].T)
    return result


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


def _kernel_transform(like: torch.Tensor) -> torch.Tensor:
    """[POINTS, 4]: four taps as a polynomial at each point, divided by what the input's transform multiplies with."""
    rows = []
    for a, total, product in PAIRS:
        scale = 2 * a * (a**4 - total * a**2 + product)
        rows += [[sign * (sign * a) ** power / scale for power in range(TILE)] for sign in (1, -1)]
    return like.new_tensor([*rows, [0.0, 0.0, 0.0, 1.0]])


def _evaluate(rows: torch.Tensor) -> torch.Tensor:
    """Tiles [n + 1, 4, W] -> values at each point of a tile and three samples of the next: [POINTS, n, W]."""
    count = rows.shape[0] - 1
    sample = [rows[:count, number] for number in range(TILE)] + [rows[1:, number] for number in range(TILE - 1)]
    values = rows.new_empty((POINTS, count, rows.shape[2]))
    even, odd = rows.new_empty((2, count, rows.shape[2]))
    for number, (a, total, product) in enumerate(PAIRS):
        torch.sub(sample[4], sample[2], alpha=total, out=even)
        even.add_(sample[0], alpha=product)
        torch.sub(sample[5], sample[3], alpha=total, out=odd)
        odd.add_(sample[1], alpha=product)
        torch.add(odd, even, alpha=a, out=values[2 * number])
        torch.sub(odd, even, alpha=a, out=values[2 * number + 1])
    # (x^2 - 1/4)(x^2 - 1)(x^2 - 4)
    torch.sub(sample[6], sample[0], out=values[6])
    values[6].add_(sample[2], alpha=5.25).sub_(sample[4], alpha=5.25)
    return values


def _interpolate(products: list[torch.Tensor], out: torch.Tensor) -> None:
    """Products at each point, [n, W] each, which are overwritten -> tiles of four outputs [n, 4, W]."""
    halves, ones, twos = (products[at : at + 2] for at in (0, 2, 4))
    odd = [torch.sub(plus, minus) for plus, minus in (halves, ones, twos)]
    even = [plus.add_(minus) for plus, minus in (halves, ones, twos)]
    torch.add(even[1], even[0], out=out[:, 0]).add_(even[2])
    torch.add(odd[1], odd[0], alpha=0.5, out=out[:, 1]).add_(odd[2], alpha=2)
    torch.add(even[1], even[0], alpha=0.25, out=out[:, 2]).add_(even[2], alpha=4)
    torch.add(odd[1], odd[0], alpha=0.125, out=out[:, 3]).add_(odd[2], alpha=8).add_(products[6])
