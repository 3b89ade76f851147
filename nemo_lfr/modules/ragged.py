"""Batches of different lengths, in which every example is computed independently.

NeMo masks the padding with zeros after each convolution, where a single clip would have its own reflected edge. A
clip's last tokens then depend on the rest of the batch. Here examples of equal length run together, without padding.
"""

from collections.abc import Callable

import torch


def map_by_length(
    function: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, lengths: list[int], out_lengths: list[int]
) -> torch.Tensor:
    """Apply `function` to `inputs[i, ..., :lengths[i]]` for every i, grouped by length.

    Args:
        function: [b, ..., length] -> [b, ..., at least out_length].
        inputs: [B, ..., T].
        lengths: valid items of each example, at most T.
        out_lengths: items of each result to keep.

    Returns:
        [B, ..., max(out_lengths)], zero after each example's end.
    """
    if len(set(lengths)) == 1 and lengths[0] > 0:
        return function(inputs[..., : lengths[0]])[..., : out_lengths[0]]
    out: torch.Tensor | None = None
    for length in sorted(set(lengths) - {0}):
        rows = [row for row, other in enumerate(lengths) if other == length]
        result = function(inputs[rows, ..., :length])[..., : out_lengths[rows[0]]]
        if out is None:
            out = result.new_zeros((inputs.shape[0], *result.shape[1:-1], max(out_lengths)))
        out[rows, ..., : result.shape[-1]] = result
    if out is None:
        raise AssertionError("callers handle batches in which every example is empty")
    return out
