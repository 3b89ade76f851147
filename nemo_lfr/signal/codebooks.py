"""How much of its codebooks a codec uses."""

import math
from collections.abc import Sequence

import torch


class CodebookUse:
    """Counts of each token of each codebook.

    Args:
        num_codebooks: C.
        levels: of each dimension of a codebook.
    """

    def __init__(self, num_codebooks: int, levels: Sequence[int]) -> None:
        self.levels = tuple(levels)
        self.counts = torch.zeros(num_codebooks, math.prod(self.levels), dtype=torch.int64)

    def update(self, tokens: torch.Tensor, tokens_len: torch.Tensor) -> None:
        """Count tokens [B, C, T] up to each example's length [B]."""
        for example, length in zip(tokens.cpu().long(), tokens_len.tolist(), strict=True):
            own = example[:, :length]
            self.counts.scatter_add_(1, own, torch.ones_like(own))

    def perplexity(self) -> torch.Tensor:
        """Of each codebook [C]: how many equally frequent entries would carry as much; between 1 and its size."""
        share = self.counts / self.counts.sum(dim=1, keepdim=True).clamp_min(1)
        return torch.special.entr(share).sum(dim=1).exp()

    def levels_used(self) -> float:
        """Of all levels of all dimensions, the share that occurs."""
        tokens = torch.arange(self.counts.shape[1])
        seen, base = [], 1
        for size in self.levels:
            digit = tokens // base % size
            seen += [self.counts[:, digit == level].any(dim=1) for level in range(size)]
            base *= size
        return float(torch.stack(seen).float().mean())
