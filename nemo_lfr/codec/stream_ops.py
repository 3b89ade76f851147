"""Streaming operations of the network.

Every layer keeps the inputs that its next output still needs. Each sample is convolved once, and the results equal
those of the whole recording for any chunk size. A frame is returned as soon as its lookahead is complete.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.residual import ResidualBlock, ResidualLayer


@dataclass(frozen=True)
class LayerState:
    """State of a layer: the inputs [B, H, n] it still needs, and whether it has started."""

    items: torch.Tensor
    started: bool = False


# The state of a whole network, by layer. Tensors in it are replaced, never changed, so that a copy is a snapshot.
State = dict[Hashable, LayerState]


class StreamOps:
    """Operations on one chunk, which read and update the state of each layer.

    Signals are tensors [B, H, n], n >= 0: the items that have become available.

    Args:
        state: state of the layers; changed in place.
        last: the recording ends with this chunk.
    """

    def __init__(self, state: State, last: bool) -> None:
        self.state, self.last = state, last

    def conv(self, layer: Conv1d, signal: torch.Tensor, activation: CodecActivation | None = None) -> torch.Tensor:
        """Return the outputs whose inputs are complete."""
        new = signal if activation is None else activation(signal)
        hidden, started = self._join(layer, new)
        stride = layer.conv.stride[0]
        if not started and (self.last or hidden.shape[2] >= layer.min_length):
            started = hidden.shape[2] > 0
            hidden = layer.pad_ends(hidden, last=False) if started else hidden
        if started and self.last:
            hidden = layer.pad_ends(hidden, first=False)
        num_outputs = (hidden.shape[2] - layer.span) // stride + 1 if started and hidden.shape[2] >= layer.span else 0
        self.state[layer] = LayerState(hidden[:, :, num_outputs * stride :], started)
        if not num_outputs:
            return new.new_zeros(new.shape[0], layer.conv.out_channels, 0)
        return layer.convolve(hidden[:, :, : (num_outputs - 1) * stride + layer.span])

    def upsample(self, layer: ConvTranspose1d, signal: torch.Tensor, activation: CodecActivation) -> torch.Tensor:
        """Return the outputs between available inputs, which later inputs do not change."""
        new: torch.Tensor = activation(signal)
        hidden, started = self._join(layer, new)
        if not started:
            if not hidden.shape[2]:
                return new.new_zeros(new.shape[0], layer.conv.out_channels, 0)
            hidden = F.pad(hidden, (1, 0))
        if self.last:
            hidden = F.pad(hidden, (0, 1))
        self.state[layer] = LayerState(hidden[:, :, -1:], True)
        if hidden.shape[2] < 2:
            return new.new_zeros(new.shape[0], layer.conv.out_channels, 0)
        out = layer.overlap(hidden)
        # The first and the last `stride` samples together are cut to `stride`: `first_sample` before, the rest after.
        stop = out.shape[2] - (layer.conv.stride[0] - layer.first_sample) * self.last
        return out[:, :, layer.first_sample * (not started) : stop]

    def residual(self, layer: ResidualLayer, signal: torch.Tensor) -> torch.Tensor:
        """Return the mean of the branches, as far as all of them are available."""
        results = []
        for blocks in layer.branches:
            hidden = signal
            for block in blocks:
                hidden = self._block(block, hidden)
            results.append(hidden)
        total = self._add_available(layer, results)
        return total / len(results)

    def _block(self, block: ResidualBlock, signal: torch.Tensor) -> torch.Tensor:
        """Return the block's result; its input is kept until the convolutions catch up."""
        hidden = self.conv(block.input_conv, signal, block.input_activation)
        added = self.conv(block.skip_conv, hidden, block.skip_activation)
        return self._add_available(block, [signal, added])

    def _add_available(self, key: Hashable, terms: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of the items that all terms have; keep the others."""
        joined = [self._join((key, number), term)[0] for number, term in enumerate(terms)]
        ready = min(term.shape[2] for term in joined)
        for number, term in enumerate(joined):
            self.state[key, number] = LayerState(term[:, :, ready:])
        total = joined[0][:, :, :ready]
        for term in joined[1:]:
            total = total + term[:, :, :ready]
        return total

    def _join(self, key: Hashable, new: torch.Tensor) -> tuple[torch.Tensor, bool]:
        kept = self.state.get(key)
        return (new, False) if kept is None else (torch.cat([kept.items, new], dim=2), kept.started)


# One step of a network on a batch of streams: state (changed in place), new inputs [B, ..., n] and whether the
# recordings end with them -> outputs [B, ..., k].
Step = Callable[[State, torch.Tensor, bool], torch.Tensor]


def run_batched(states: Sequence[State], inputs: Sequence[torch.Tensor], last: bool, step: Step) -> list[torch.Tensor]:
    """Apply `step` to each stream, batching streams with equal shapes.

    Args:
        states: state of each stream; changed in place.
        inputs: inputs of each stream, [1, ..., n].
        last: the recordings end with these inputs.
        step: computes a batch.

    Returns:
        Outputs of each stream, [..., k].
    """
    groups: dict[Hashable, list[int]] = {}
    for number, (state, new) in enumerate(zip(states, inputs, strict=True)):
        shape = tuple((key, kept.items.shape[2], kept.started) for key, kept in state.items())
        groups.setdefault((shape, new.shape[-1]), []).append(number)
    results: list[torch.Tensor] = [torch.empty(0)] * len(states)
    for numbers in groups.values():
        joined = {
            key: LayerState(torch.cat([states[number][key].items for number in numbers]), kept.started)
            for key, kept in states[numbers[0]].items()
        }
        result = step(joined, torch.cat([inputs[number] for number in numbers]), last)
        for row, number in enumerate(numbers):
            states[number].update(
                {key: LayerState(kept.items[row : row + 1].clone(), kept.started) for key, kept in joined.items()}
            )
            results[number] = result[row]
    return results
