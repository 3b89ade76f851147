"""Operations of the encoder and the decoder for streams.

Every layer keeps the inputs that its next outputs still need, so no input is processed twice. The results are the same
as for the whole recording, whatever the chunk size. The result for a frame is returned as soon as the later frames
that it depends on have arrived.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nemo_lfr.codec.cpu.network import slope_of
from nemo_lfr.codec.cpu.products import StreamWeights
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.residual import ResidualBlock, ResidualLayer


class LayerState(NamedTuple):
    """State of a layer between two chunks.

    Attributes:
        items: inputs that the layer still needs, [B, n, H].
        started: whether the padding before the first input was added.
    """

    items: torch.Tensor
    started: bool = False


class Slot(NamedTuple):
    """Description of one `LayerState` that is stored in a `State`.

    Attributes:
        layer: key of the layer.
        num_items: number of inputs that the layer keeps, n.
        channels: number of values in each input, H.
        started: whether the padding before the first input was added.
    """

    layer: Hashable
    num_items: int
    channels: int
    started: bool


class State(NamedTuple):
    """State of an encoder or decoder for one stream.

    Each layer keeps the inputs that its next outputs depend on. The tensor `values` is never changed in place.

    Attributes:
        slots: description of the part of `values` that belongs to each layer, in order.
        values: kept inputs of all layers, [N].
    """

    slots: tuple[Slot, ...] = ()
    values: torch.Tensor = torch.empty(0, dtype=torch.float32, device="cpu")


class StreamOps:
    """Implementation of `nemo_lfr.modules.network.Ops` that processes one chunk and updates each layer's state.

    Signals are tensors [B, n, H] with the n time steps that have become available; n may be 0.

    Args:
        state: state of each layer; changed in place.
        last: whether the recordings end with this chunk.
        weights: weights of the layers, with methods that run the convolutions.
    """

    def __init__(self, state: dict[Hashable, LayerState], last: bool, weights: StreamWeights) -> None:
        self.state, self.last, self.weights = state, last, weights

    def conv(
        self, layer: Conv1d, signal: torch.Tensor, activation: CodecActivation | None = None, slope: float = 1.0
    ) -> torch.Tensor:
        """Apply an activation, a convolution and a leaky ReLU, and return the outputs whose inputs are all known."""
        hidden, started = self._join(layer, signal if activation is None else _activate(activation, signal))
        stride = layer.conv.stride[0]
        if not started and (self.last or hidden.shape[1] >= layer.min_length):
            started = hidden.shape[1] > 0
            hidden = _pad_ends(layer, hidden, last=False) if started else hidden
        if started and self.last:
            hidden = _pad_ends(layer, hidden, first=False)
        num_outputs = (hidden.shape[1] - layer.span) // stride + 1 if started and hidden.shape[1] >= layer.span else 0
        self.state[layer] = LayerState(hidden[:, num_outputs * stride :], started)
        if not num_outputs:
            return signal.new_zeros(signal.shape[0], 0, layer.conv.out_channels)
        return self.weights.convolve(layer, hidden[:, : (num_outputs - 1) * stride + layer.span], slope)

    def upsample(self, layer: ConvTranspose1d, signal: torch.Tensor, activation: CodecActivation) -> torch.Tensor:
        """Apply an activation and a transposed convolution; return the outputs that do not depend on later inputs."""
        hidden, started = self._join(layer, _activate(activation, signal))
        if not started:
            if not hidden.shape[1]:
                return signal.new_zeros(signal.shape[0], 0, layer.conv.out_channels)
            hidden = F.pad(hidden, (0, 0, 1, 0))
        if self.last:
            hidden = F.pad(hidden, (0, 0, 0, 1))
        self.state[layer] = LayerState(hidden[:, -1:], True)
        if hidden.shape[1] < 2:
            return signal.new_zeros(signal.shape[0], 0, layer.conv.out_channels)
        out = self.weights.overlap(layer, hidden)
        # `stride` outputs are removed in total: `first_sample` of them at the start, the rest at the end.
        stop = out.shape[1] - (layer.conv.stride[0] - layer.first_sample) * self.last
        return out[:, layer.first_sample * (not started) : stop]

    def residual(self, layer: ResidualLayer, signal: torch.Tensor) -> torch.Tensor:
        """Return the mean of the residual branches, for the time steps that all branches have produced."""
        results = []
        for blocks in layer.branches:
            hidden = signal
            for block in blocks:
                hidden = self._block(block, hidden)
            results.append(hidden)
        total = self._add_available(layer, results)
        return total / len(results)

    def _block(self, block: ResidualBlock, signal: torch.Tensor) -> torch.Tensor:
        """Run a residual block.

        Each input is kept until the convolutions' output for the same time step is known.
        """
        slope = slope_of(block.skip_activation)  # a leaky ReLU is fused into the convolution before it
        hidden = self.conv(block.input_conv, signal, block.input_activation, 1.0 if slope is None else slope)
        added = self.conv(block.skip_conv, hidden, block.skip_activation if slope is None else None)
        return self._add_available(block, [signal, added])

    def _add_available(self, key: Hashable, terms: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add the terms at the time steps that all of them have; keep later time steps for the next chunk."""
        joined = [self._join((key, number), term)[0] for number, term in enumerate(terms)]
        ready = min(term.shape[1] for term in joined)
        for number, term in enumerate(joined):
            self.state[key, number] = LayerState(term[:, ready:])
        total = joined[0][:, :ready]
        for term in joined[1:]:
            total = total + term[:, :ready]
        return total

    def _join(self, key: Hashable, new: torch.Tensor) -> tuple[torch.Tensor, bool]:
        kept = self.state.get(key)
        if kept is None:
            return new, False
        return (torch.cat([kept.items, new], dim=1) if kept.items.shape[1] else new), kept.started


def _activate(activation: CodecActivation, signal: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = activation(signal.transpose(1, 2)).transpose(1, 2)
    return result


def _pad_ends(layer: Conv1d, hidden: torch.Tensor, first: bool = True, last: bool = True) -> torch.Tensor:
    return layer.pad_ends(hidden.transpose(1, 2), first, last).transpose(1, 2)


# Function that runs a network on the new inputs of several streams and returns outputs [B, ..., k]. Its arguments are
# the state of each layer, which is changed in place; the inputs [B, ..., n]; and whether the recordings end here.
Step = Callable[[dict[Hashable, LayerState], torch.Tensor, bool], torch.Tensor]


def run_batched(
    states: Sequence[State], inputs: Sequence[torch.Tensor], last: bool, step: Step
) -> tuple[list[State], list[torch.Tensor]]:
    """Apply `step` to each stream, batching streams with equal shapes.

    Args:
        states: state of each stream.
        inputs: inputs of each stream, [1, ..., n].
        last: whether the recordings end with these inputs.
        step: function that runs a batch.

    Returns:
        New state of each stream, and its outputs [..., k].
    """
    groups: dict[Hashable, list[int]] = {}
    for number, (state, new) in enumerate(zip(states, inputs, strict=True)):
        groups.setdefault((state.slots, new.shape[-1]), []).append(number)
    after = list(states)
    results: list[torch.Tensor] = [torch.empty(0)] * len(states)
    for numbers in groups.values():
        joined = _split(states[numbers[0]].slots, torch.stack([states[number].values for number in numbers]))
        result = step(joined, torch.cat([inputs[number] for number in numbers]), last)
        slots, values = _merge(joined, len(numbers))
        for row, number in enumerate(numbers):
            # Copy the row: a view would keep the states of all streams of the batch in memory.
            after[number] = State(slots, values[row].clone() if len(numbers) > 1 else values[0])
            results[number] = result[row]
    return after, results


def _split(slots: tuple[Slot, ...], values: torch.Tensor) -> dict[Hashable, LayerState]:
    """Split `values` [B, N] into the state of each layer, without copying."""
    sizes = [slot.num_items * slot.channels for slot in slots]
    return {
        slot.layer: LayerState(part.view(len(part), slot.num_items, slot.channels), slot.started)
        for slot, part in zip(slots, torch.split(values, sizes, dim=1), strict=True)
    }


def _merge(layers: dict[Hashable, LayerState], batch: int) -> tuple[tuple[Slot, ...], torch.Tensor]:
    """Copy the states of all layers to one tensor [B, N]; return a `Slot` for each layer, and the tensor."""
    slots = tuple(Slot(key, kept.items.shape[1], kept.items.shape[2], kept.started) for key, kept in layers.items())
    sizes = [slot.num_items * slot.channels for slot in slots]
    first = next(iter(layers.values())).items
    values = first.new_empty(batch, sum(sizes), dtype=torch.float32)  # with autocast, dtypes differ between layers
    for kept, part in zip(layers.values(), torch.split(values, sizes, dim=1), strict=True):
        part.view(kept.items.shape).copy_(kept.items)
    return slots, values
