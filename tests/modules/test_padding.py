"""Tests that padding in place equals PyTorch's padding of each example alone."""

import pytest
import torch
import torch.nn.functional as F

from nemo_lfr.modules.padding import PAD_MODES, fill_padding, pad_signal


@pytest.mark.parametrize("pad", [(0, 0), (3, 0), (0, 2), (4, 5)])
@pytest.mark.parametrize("mode", sorted(PAD_MODES.values()))
@pytest.mark.parametrize("ends", [None, [9, 6, 7], torch.tensor([9, 6, 7])], ids=["full", "numbers", "tensor"])
def test_each_example_is_padded_at_its_own_end(mode, pad, ends):
    hidden, (before, after) = torch.randn(3, 2, 9), pad
    padded = torch.full((3, 2, before + 9 + after), float("nan"))
    padded[:, :, before : before + 9] = hidden
    fill_padding(padded, pad, mode, ends)
    for row, end in enumerate([9, 9, 9] if ends is None else list(ends)):
        expected = F.pad(hidden[row, :, :end], pad, mode=mode)
        assert torch.equal(padded[row, :, : before + end + after], expected)
        assert torch.equal(pad_signal(hidden[row : row + 1, :, :end], pad, mode)[0], expected)
