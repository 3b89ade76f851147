"""Codebook use statistics: perplexity and levels used."""

import math
from collections.abc import Sequence

import torch


class CodebookUse:
    """Counter of the tokens of each codebook.

    Args:
        num_codebooks: number of codebooks, C.
        levels: number of FSQ levels of each dimension of a codebook.
    """

    def __init__(self, num_codebooks: int, levels: Sequence[int]) -> None:
        self.levels = tuple(levels)
        self.counts = torch.zeros(num_codebooks, math.prod(self.levels), dtype=torch.int64)

    def update(self, tokens: torch.Tensor, tokens_len: torch.Tensor) -> None:
        """Add the tokens of a batch to the counts.

        Args:
            tokens: token ids, shape [B, C, T_encoded].
            tokens_len: valid frames of each example, shape [B]; frames after them are ignored.
        """
        for example, length in zip(tokens.cpu().long(), tokens_len.tolist(), strict=True):
            own = example[:, :length]
            self.counts.scatter_add_(1, own, torch.ones_like(own))

    def perplexity(self) -> torch.Tensor:
        """Compute the perplexity of each codebook.

        Returns:
            Number of equally frequent entries with the same entropy, from 1 to the codebook size, shape [C].
        """
        share = self.counts / self.counts.sum(dim=1, keepdim=True).clamp_min(1)
        entropy: torch.Tensor = torch.special.entr(share).sum(dim=1)
        return entropy.exp()

    def levels_used(self) -> float:
        """Return the fraction of the FSQ levels of all dimensions that occur."""
        tokens = torch.arange(self.counts.shape[1])
        seen, base = [], 1
        for size in self.levels:
            digit = tokens // base % size
            seen += [self.counts[:, digit == level].any(dim=1) for level in range(size)]
            base *= size
        return float(torch.stack(seen).float().mean())
