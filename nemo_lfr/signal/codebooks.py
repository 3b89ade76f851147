"""Statistics of codebook use: perplexity, and the share of FSQ levels in use."""

import math
from collections.abc import Sequence

import torch


class CodebookUse:
    """Counter of the tokens in each codebook.

    Args:
        num_codebooks: number of codebooks, C.
        levels: number of FSQ levels in each dimension of a codebook.

    Attributes:
        counts: number of occurrences of each token, int64, shape [C, codebook_size].
    """

    def __init__(self, num_codebooks: int, levels: Sequence[int]) -> None:
        self.levels = tuple(levels)
        self.counts = torch.zeros(num_codebooks, math.prod(self.levels), dtype=torch.int64)

    def update(self, tokens: torch.Tensor, tokens_len: torch.Tensor) -> None:
        """Add the tokens of a batch to the counts.

        Args:
            tokens: token ids, shape [B, C, T_encoded]. Numbers outside the codebook are ignored; a model whose weights
                contain NaN may return them.
            tokens_len: number of valid frames in each example, shape [B]. Other frames are ignored.
        """
        for example, length in zip(tokens.cpu().long(), tokens_len.tolist(), strict=True):
            own = example[:, :length]
            ids = own.clamp(0, self.counts.shape[1] - 1)
            self.counts.scatter_add_(1, ids, (ids == own).long())

    def perplexity(self) -> torch.Tensor:
        """Compute the perplexity of each codebook.

        Returns:
            Perplexity, shape [C]: the number of equally frequent entries that would have the same entropy. It is
            between 1 and the codebook size.
        """
        share = self.counts / self.counts.sum(dim=1, keepdim=True).clamp_min(1)
        entropy: torch.Tensor = torch.special.entr(share).sum(dim=1)
        return entropy.exp()

    def levels_used(self) -> float:
        """Return the fraction of FSQ levels that occur in at least one token, over all dimensions and codebooks."""
        tokens = torch.arange(self.counts.shape[1])
        seen, base = [], 1
        for size in self.levels:
            digit = tokens // base % size
            seen += [self.counts[:, digit == level].any(dim=1) for level in range(size)]
            base *= size
        return float(torch.stack(seen).float().mean())
