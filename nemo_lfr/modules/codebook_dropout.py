"""Dropout of codebooks, for training codecs that also work with fewer codebooks."""

import torch

from nemo_lfr.modules.neural_module import NeuralModule


class CodebookDropout(NeuralModule):
    """Base class of a quantizer whose last codebooks can be dropped.

    Attributes:
        num_groups: number of codebooks C.
        levels: number of levels in each dimension of one codebook.
    """

    num_groups: int
    levels: tuple[int, ...]

    @property
    def codebook_dim_per_group(self) -> int:
        """Number of dimensions of one codebook."""
        return len(self.levels)

    @property
    def codebook_dim(self) -> int:
        """Number of dimensions D of an encoded frame, for all codebooks together."""
        return self.num_groups * len(self.levels)

    def dropout_codebooks(self, encoded: torch.Tensor, num_codebooks: torch.Tensor) -> torch.Tensor:
        """Keep the first codebooks of each example, and set the dimensions of the other codebooks to zero.

        Args:
            encoded: output of the encoder, or the values after FSQ, [B, D, T].
            num_codebooks: number of codebooks to keep in each example, [B].

        Returns:
            The frames with the other codebooks set to zero, [B, D, T].
        """
        groups = torch.arange(self.codebook_dim, device=encoded.device) // self.codebook_dim_per_group
        is_dropped = groups >= num_codebooks.to(encoded.device)[:, None]
        return encoded.masked_fill(is_dropped[:, :, None], 0)

    def dropout_random_codebooks(self, encoded: torch.Tensor, rate: float) -> torch.Tensor:
        """Drop the last codebooks of randomly chosen examples.

        The number of codebooks to keep is also random, from 1 to C - 1.

        Args:
            encoded: output of the encoder, or the values after FSQ, [B, D, T].
            rate: probability that an example loses codebooks.

        Returns:
            The frames with the dropped codebooks set to zero, [B, D, T].
        """
        batch, device = [encoded.shape[0]], encoded.device
        is_reduced = torch.rand(batch, device=device) < rate
        kept = torch.randint(1, self.num_groups, batch, device=device)
        return self.dropout_codebooks(encoded, torch.where(is_reduced, kept, self.num_groups))
