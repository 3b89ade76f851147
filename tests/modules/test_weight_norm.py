"""Tests that folded weight norm is rounded in the same way on every CPU."""

import numpy as np
import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from nemo_lfr.modules import weight_norm as folding
from nemo_lfr.modules.weight_norm import CANONICAL, OTHERS, SumOrder, fold_weight_norm, folded_weight, row_norms


def norm_of(row: np.ndarray, order: SumOrder) -> np.float32:
    """Compute the norm of a row of float32, one operation at a time."""
    squares = [value * value for value in row]
    lanes = order.lanes if len(squares) >= order.lanes else len(squares)
    sums = squares[:lanes]
    for place in range(lanes, len(squares)):
        sums[place % lanes] = sums[place % lanes] + squares[place]
    while order.halving and lanes == order.lanes and len(sums) > 1:
        half = len(sums) // 2
        sums = [sums[lane] + sums[half + lane] for lane in range(half)]
    total = sums[0]
    for value in sums[1:]:
        total = total + value
    return np.sqrt(total)


@pytest.mark.parametrize("order", [CANONICAL, *OTHERS])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 9, 21, 64, 100, 333])
@pytest.mark.parametrize("uses_kernel", [True, False])
def test_squares_are_added_in_the_given_order(order, size, uses_kernel, monkeypatch):
    if not uses_kernel:
        monkeypatch.setattr(folding, "_kernel_is_canonical", lambda: False)
    monkeypatch.setattr(folding, "BLOCK", 300)
    rows = np.random.default_rng(size).standard_normal((30, size)).astype(np.float32)
    expected = np.array([norm_of(row, order) for row in rows])
    assert np.array_equal(row_norms(torch.from_numpy(rows)[:, :, None], order)[:, 0, 0].numpy(), expected)


def test_a_layer_has_one_weight_with_weight_norm_or_without():
    torch.manual_seed(0)
    normed = weight_norm(torch.nn.Conv1d(13, 7, 5))
    torch.nn.init.uniform_(normed.parametrizations.weight.original0, 0.5, 2)
    weight = folded_weight(normed)
    torch.testing.assert_close(weight, normed.weight.detach(), rtol=1e-6, atol=0)
    plain = torch.nn.Conv1d(13, 7, 5)
    assert folded_weight(plain).data_ptr() == plain.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_kept(dtype):
    direction = torch.randn(3, 4, 5).to(dtype)
    gain = row_norms(direction).to(dtype)
    folded = fold_weight_norm(direction, gain)
    assert folded.dtype == dtype
    torch.testing.assert_close(folded, direction, rtol=0.02, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e30, float("nan")])
def test_degenerate_rows_are_not_finite_and_cause_no_warning(value):
    folded = fold_weight_norm(torch.full((2, 3, 4), value), torch.ones(2, 1, 1))
    assert not folded.isfinite().any() or (value == 1e30 and not folded.any())
