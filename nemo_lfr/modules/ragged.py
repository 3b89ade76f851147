"""Run a batch of examples with different lengths so that no example depends on the others.

In NeMo, the last tokens of a clip depend on whether its batch contains longer clips, because the clip is then padded
with zeros instead of by reflection. Here, only examples of the same length run together, so each example gets the same
result as alone.
"""

from collections.abc import Callable

import torch

from nemo_lfr.errors import NemoLfrError


def map_by_length(
    function: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, lengths: list[int], out_lengths: list[int]
) -> torch.Tensor:
    """Apply `function` to `inputs[i, ..., :lengths[i]]` for every i, grouped by length.

    Args:
        function: network to run, [b, ..., length] -> [b, ..., out_length or more].
        inputs: [B, ..., T].
        lengths: number of valid values on the last axis of each example, at most T. At least one is not 0.
        out_lengths: number of values to keep on the last axis of each result.

    Returns:
        [B, ..., max(out_lengths)], zero after the end of each example.

    Raises:
        NemoLfrError: within `torch.jit.trace`, whose graph would contain the lengths as constants.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise NemoLfrError(
            "the encoder and the decoder cannot run within torch.jit.trace, because the graph would shorten longer "
            "inputs to the lengths of the example; to get a graph of the codec, run nemo-lfr export onnx."
        )
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
