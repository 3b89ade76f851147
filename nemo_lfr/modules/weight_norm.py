"""Fold weight norm with the same rounding on every CPU.

Folding replaces the direction and the gain of a weight by the weight itself. PyTorch's kernel sums the squares of a
row in an order that depends on the CPU's instruction set, so the last bits of folded weights differ between machines.
Fingerprints hash folded weights, so `fold_weight_norm` adds in one fixed order: the order of PyTorch's kernel for AVX2
and AVX-512. PyTorch's kernel is faster, so it is used on CPUs where it adds in this order.
"""

import functools
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from nemo_lfr.modules.weights import contiguous_values, current_value

BLOCK = 1 << 16  # number of weights whose squares are summed at once, so that they fit into the CPU cache


class SumOrder(NamedTuple):
    """Order in which the numbers in a row are added. Rows shorter than `lanes` are added from left to right.

    Attributes:
        lanes: number of partial sums; partial sum k adds the numbers at positions k, k + lanes, k + 2 * lanes, ...
        halving: whether the partial sums are added pairwise (the first half to the second half, repeatedly) instead of
            from left to right.
    """

    lanes: int
    halving: bool


CANONICAL = SumOrder(8, True)
# Order of PyTorch's kernels for fp64. Norms in fp64 always use it, whatever order is requested.
IN_FP64 = SumOrder(4, False)
# Orders of PyTorch's kernels for other CPUs: x86 without AVX2, and 128-bit NEON. Old fingerprints depend on them.
OTHERS = (SumOrder(8, False), SumOrder(4, True))


def row_norms(weight: torch.Tensor, order: SumOrder = CANONICAL) -> torch.Tensor:
    """Return the L2 norm of each slice along the first dimension, on the CPU.

    Args:
        weight: weight with at least two dimensions, on any device; fp16 and bf16 are converted to fp32.
        order: order of summation. Norms in fp64 have an order of their own.

    Returns:
        Norms with as many dimensions as `weight`; all dimensions except the first one have size 1.
    """
    values = _values(weight)
    if order == CANONICAL and values.dtype == torch.float32 and _kernel_is_canonical():
        return _kernel_norms(values)
    return _ordered_norms(values, order)


def _values(weight: torch.Tensor) -> torch.Tensor:
    return contiguous_values(weight).to("cpu", torch.promote_types(weight.dtype, torch.float32))


def _kernel_norms(values: torch.Tensor) -> torch.Tensor:
    ones = values.new_ones(len(values), *[1] * (values.dim() - 1))
    norms: torch.Tensor = torch._weight_norm_interface(values, ones, 0)[1]
    return norms.reshape(ones.shape)


@functools.cache
def _kernel_is_canonical() -> bool:
    """Test with random rows whether PyTorch's kernel adds in the canonical order on this CPU."""
    values = np.random.default_rng(0).standard_normal(500 * 64).astype(np.float32)
    sizes = (3, 8, 21, 100, 500)
    rows = (torch.from_numpy(values[: 64 * size]).reshape(64, size) for size in sizes)
    return all(torch.equal(_kernel_norms(row), _ordered_norms(row, CANONICAL)) for row in rows)


def _ordered_norms(values: torch.Tensor, order: SumOrder) -> torch.Tensor:
    rows = values.reshape(len(values), -1).numpy()
    sums = np.empty(len(rows), rows.dtype)
    order = IN_FP64 if rows.dtype == np.float64 else order
    step = max(1, BLOCK // max(1, rows.shape[1]))
    with np.errstate(all="ignore"):  # callers check that weights are finite
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            sums[start : start + step] = _sum(block * block, order)
    return torch.from_numpy(np.sqrt(sums)).reshape(-1, *[1] * (values.dim() - 1))


def _sum(rows: np.ndarray, order: SumOrder) -> np.ndarray:
    """Add the numbers in each row of [R, n] in the order `order`."""
    lanes = order.lanes
    whole = rows.shape[1] // lanes * lanes
    if not whole:
        return _in_sequence(rows)
    # Along a dimension that is not the innermost one, numpy adds from first to last.
    partial: np.ndarray = np.add.reduce(rows[:, :whole].reshape(len(rows), -1, lanes), axis=1)
    partial[:, : rows.shape[1] - whole] += rows[:, whole:]
    if not order.halving:
        return _in_sequence(partial)
    while partial.shape[1] > 1:
        half = partial.shape[1] // 2
        partial = partial[:, :half] + partial[:, half:]
    return partial[:, 0]


def _in_sequence(rows: np.ndarray) -> np.ndarray:
    return np.add.accumulate(rows, axis=1)[:, -1] if rows.shape[1] else np.zeros(len(rows), rows.dtype)


def fold_weight_norm(direction: torch.Tensor, gain: torch.Tensor, order: SumOrder = CANONICAL) -> torch.Tensor:
    """Fold weight norm: return the weight of a layer as one tensor, without gradient.

    Each row of `direction` is scaled so that its L2 norm is the corresponding `gain`.

    Args:
        direction: [N, ...].
        gain: [N, 1, ...].
        order: order of summation for the norms.

    Returns:
        New tensor with the shape, dtype and device of `direction`.
    """
    if direction.is_meta:
        return torch.empty_like(direction)
    values = _values(direction)
    return (values * (gain.detach().to(values) / row_norms(values, order))).to(direction)


def has_weight_norm(module: nn.Module) -> bool:
    """Return whether the weight of a module has weight norm along its first dimension and no other parametrization."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    weight: Any = module.parametrizations["weight"]  # type: ignore[index]
    return len(weight) == 1 and type(weight[0]).__name__ == "_WeightNorm" and weight[0].dim == 0


def folded_weight(conv: nn.Module, order: SumOrder = CANONICAL) -> torch.Tensor:
    """Return the weight of a convolution without gradient; weight norm, if the layer has it, is folded."""
    if has_weight_norm(conv):
        weight: Any = conv.parametrizations["weight"]  # type: ignore[index]
        return fold_weight_norm(weight.original1, weight.original0, order)
    plain: torch.Tensor = current_value(conv, "weight")
    return plain.detach()


def remove_weight_norm(module: nn.Module) -> None:
    """Make the weight of a layer one parameter instead of a direction and a gain. Other modules stay unchanged."""
    if not parametrize.is_parametrized(module, "weight"):
        return
    weight, layer = folded_weight(module), cast(Any, module)
    is_trained = any(value.requires_grad for value in layer.parametrizations.parameters())
    # PyTorch gives a parametrized module its own class, which deep copies share. The class is copied here, because
    # `remove_parametrizations` changes it.
    kind = type(layer)
    layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    layer.weight.data.copy_(weight)
    if (frozen := layer._buffers.pop("weight", None)) is not None:  # PyTorch makes a frozen weight a buffer
        layer.weight = nn.Parameter(frozen, requires_grad=is_trained)
