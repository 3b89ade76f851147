"""Winograd convolution, also known as Toom-Cook convolution (Lavin and Gray, arXiv 1509.09308).

Seven samples of the input and four taps of the kernel are treated as polynomials and evaluated at 7 points. The
products at these points are transformed back to four outputs, so four outputs need 7 multiplications instead of 16. A
longer kernel is split into groups of four taps whose results are added. All groups, and all layers with the same
input, share the transformed input. In fp32 the rounding error is 1e-6 of the output's rms, 4 times as large as for an
ordinary convolution.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nemo_lfr.modules.conv import Conv1d, fold

# Elements per thread in one array of a block. A block needs 7 such arrays and their products, and fits into the cache.
BLOCK = 192 * 1024
TILE, POINTS = 4, 7
# Points: three pairs (a, -a), and infinity. Each row contains the value a of one pair, b^2 + c^2, and b^2 * c^2, where
# b and c are the values of the other two pairs. The sum and the product are coefficients of (x^2 - b^2)(x^2 - c^2).
PAIRS = ((0.5, 5.0, 4.0), (1.0, 4.25, 1.0), (2.0, 1.25, 0.25))


def slack(dilation: int, kernel_size: int = 11) -> int:
    """Return how many time steps past the end of the padded input the last tiles may read.

    The values there must be finite. They cancel out of the outputs that are kept, except for rounding errors.
    """
    return TILE * dilation * (-(-kernel_size // TILE) + 3)


class Transformed(NamedTuple):
    """Weights of a layer for Winograd convolution, evaluated at each point (see the module's docstring).

    Attributes:
        bank: weights, [POINTS, num_pieces, H_out, H_in]. A piece is a group of four taps.
        bias: [H_out], or None.
        span: number of input time steps from the first to the last one that an output depends on.
        dilation: dilation of the layer.
    """

    bank: torch.Tensor
    bias: torch.Tensor | None
    span: int
    dilation: int

    @property
    def num_pieces(self) -> int:
        """Number of groups of four taps."""
        return self.bank.shape[1]

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self.bank.shape[2]


def transform(layer: Conv1d) -> Transformed:
    """Transform the weights of a layer with stride 1 for Winograd convolution."""
    weight, bias = fold(layer)
    weight = torch.unflatten(F.pad(weight, (0, -weight.shape[2] % TILE)), 2, (-1, TILE))
    points = [weight @ taps for taps in _kernel_transform(weight)]  # [H_out, H_in, pieces] each
    bank = torch.stack(points).permute(0, 3, 1, 2).contiguous()
    return Transformed(bank, bias, layer.span, layer.conv.dilation[0])


def convolve(
    layers: Sequence[Transformed], padded: torch.Tensor, starts: Sequence[int], slope: float = 1.0
) -> list[torch.Tensor]:
    """Convolve one input with several layers of equal dilation.

    Args:
        layers: weights of the layers. The dilation must be 1 if any of `starts` is not 0.
        padded: input [B, H_in, T], stored in memory as [B, T, H_in]. In memory, at least `slack` time steps of finite
            values must follow the input.
        starts: for each layer, the index of the first time step in `padded` that its first output depends on.
        slope: slope of a leaky ReLU after the convolution; 1 if there is none.

    Returns:
        For each layer, the output [B, H_out, T - start - span + 1].
    """
    batch, channels, width = padded.shape
    dilation = layers[0].dilation
    step = TILE * dilation  # time steps from one tile to the next; the rows of a tile are `dilation` steps apart
    tiles = -(-batch * width // step)
    # Number of later tiles that the outputs of a tile depend on.
    ahead = max(start // step + layer.num_pieces - 1 for start, layer in zip(starts, layers, strict=True))
    rows = padded.as_strided((tiles + ahead + 1, TILE, dilation * channels), (step * channels, dilation * channels, 1))
    outputs = [padded.new_empty((tiles, TILE, dilation * layer.out_channels)) for layer in layers]
    block = max(256, BLOCK * torch.get_num_threads() // channels) // dilation
    for first in range(0, tiles, block):
        size = min(block, tiles - first)
        values = _evaluate(rows[first : first + size + ahead + 1])
        for layer, start, output in zip(layers, starts, outputs, strict=True):
            skip = start // step
            seen = values[:, skip : skip + size + layer.num_pieces - 1].view(POINTS, -1, channels)
            _multiply(layer, seen, output[first : first + size])
            if slope != 1.0:
                F.leaky_relu_(output[first : first + size], slope)
    return [
        output.as_strided(
            (batch, layer.out_channels, width - start - layer.span + 1),
            (width * layer.out_channels, 1, layer.out_channels),
            start % step * layer.out_channels,
        )
        for layer, start, output in zip(layers, starts, outputs, strict=True)
    ]


def _multiply(layer: Transformed, seen: torch.Tensor, out: torch.Tensor) -> None:
    """Convolve a transformed input, and write the result to `out`.

    Args:
        layer: weights of the layer.
        seen: transformed input, [POINTS, (tiles + layer.num_pieces - 1) * dilation, H_in].
        out: tensor for the result, [tiles, 4, dilation * H_out].
    """
    products = [
        # The bias is added at the point 1 only. Because 1 ** n = 1, every output then contains it once.
        _sum_of_products(seen[point], layer.bank[point], layer.bias if point == 2 else None, layer.dilation)
        for point in range(POINTS)
    ]
    _interpolate([product.view(out.shape[0], -1) for product in products], out)


def _sum_of_products(
    seen: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None, dilation: int
) -> torch.Tensor:
    """Convolve by matrix products: [n, H_in] -> [n - (K - 1) * dilation, H_out].

    oneDNN's convolution is slow with few rows or only one tap: 3 to 25 GFLOP/s instead of 100 (measured).

    Args:
        seen: input, [n, H_in].
        weights: kernel with K taps, [K, H_out, H_in].
        bias: [H_out], or None.
        dilation: distance of the taps in time steps.
    """
    count = seen.shape[0] - (len(weights) - 1) * dilation
    result = F.linear(seen[:count], weights[0], bias)
    for piece in range(1, len(weights)):
        result.addmm_(seen[piece * dilation : piece * dilation + count], weights[piece].T)
    return result


def _kernel_transform(like: torch.Tensor) -> torch.Tensor:
    """Return the kernel transform [POINTS, 4] in the dtype of `like`, divided by the scale of the input transform."""
    rows = []
    for a, total, product in PAIRS:
        scale = 2 * a * (a**4 - total * a**2 + product)
        rows += [[sign * (sign * a) ** power / scale for power in range(TILE)] for sign in (1, -1)]
    return like.new_tensor([*rows, [0.0, 0.0, 0.0, 1.0]])


def _evaluate(rows: torch.Tensor) -> torch.Tensor:
    """Evaluate the polynomials of n tiles at all points: [n + 1, 4, W] -> [POINTS, n, W].

    A polynomial has seven coefficients: the four samples of a tile, and the first three of the next tile.
    """
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
    """Convert the products [n, W] at all points to tiles of four outputs, and write these to `out`, [n, 4, W].

    The products are overwritten.
    """
    halves, ones, twos = (products[at : at + 2] for at in (0, 2, 4))
    odd = [torch.sub(plus, minus) for plus, minus in (halves, ones, twos)]
    even = [plus.add_(minus) for plus, minus in (halves, ones, twos)]
    torch.add(even[1], even[0], out=out[:, 0]).add_(even[2])
    torch.add(odd[1], odd[0], alpha=0.5, out=out[:, 1]).add_(odd[2], alpha=2)
    torch.add(even[1], even[0], alpha=0.25, out=out[:, 2]).add_(even[2], alpha=4)
    torch.add(odd[1], odd[0], alpha=0.125, out=out[:, 3]).add_(odd[2], alpha=8).add_(products[6])
