"""Tests of codebook statistics for known tokens: perplexity and levels in use."""

import pytest
import torch

from nemo_lfr.modules.quantizer import GroupFiniteScalarQuantizer
from nemo_lfr.signal.codebooks import CodebookUse


def test_perplexity_counts_equally_frequent_tokens_and_nothing_after_the_end():
    use = CodebookUse(2, (4, 3))
    tokens = torch.tensor([[[0, 1, 2, 3, 11], [5, 5, 5, 5, 7]]])
    use.update(tokens, torch.tensor([4]))
    assert use.perplexity().tolist() == pytest.approx([4, 1])
    use.update(tokens, torch.tensor([0]))
    assert use.counts.sum(dim=1).tolist() == [4, 4]


def test_numbers_outside_the_codebook_are_ignored():
    use = CodebookUse(1, (4, 3))
    use.update(torch.tensor([[[-(2**31), 5, 12]]], dtype=torch.int32), torch.tensor([3]))
    assert use.counts.nonzero().tolist() == [[0, 5]]


def test_levels_are_counted_over_all_dimensions_of_all_codebooks():
    use = CodebookUse(2, (4, 3))
    assert use.levels_used() == 0
    # Token 4 * b + a has level a in the first dimension and level b in the second.
    use.update(torch.tensor([[[0, 1, 2, 3], [0, 4, 8, 0]]]), torch.tensor([4]))
    assert use.levels_used() == pytest.approx((4 + 1 + 1 + 3) / 14)


def test_every_token_of_a_quantizer_uses_every_level():
    quantizer = GroupFiniteScalarQuantizer(3, (4, 3))
    use = CodebookUse(quantizer.num_codebooks, quantizer.levels)
    tokens = torch.arange(12).expand(1, 3, 12)
    use.update(tokens, torch.tensor([12]))
    assert use.levels_used() == 1 and use.perplexity().tolist() == pytest.approx([12] * 3)
