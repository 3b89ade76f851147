"""Receptive field and shortest input of a network, computed by the same walk as its output."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from nemo_lfr.frames import num_frames
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.residual import ResidualBlock, ResidualLayer


@dataclass(frozen=True)
class Field:
    """Receptive field of a signal in the network's input, and the shortest valid input.

    Item t depends on the inputs from floor((t * stride - past) / split) to floor((t * stride + future) / split).

    Attributes:
        stride: inputs for each item; more than 1 after down-sampling.
        split: items for each input; more than 1 after up-sampling.
        past: inputs before the current one, times `split`.
        future: inputs after the current one, times `split`.
        shortest: fewest inputs that are long enough for the padding of every layer.
    """

    stride: int = 1
    split: int = 1
    past: int = 0
    future: int = 0
    shortest: int = 1


class ContextOps:
    """Operations that compute the receptive field of a signal instead of its values."""

    def conv(self, layer: Conv1d, signal: Field, activation: CodecActivation | None = None) -> Field:
        """Widen the field by the layer's span."""
        before = layer.pad[0]
        return replace(
            signal,
            stride=signal.stride * layer.stride,
            past=signal.past + before * signal.stride,
            future=signal.future + (layer.span - 1 - before) * signal.stride,
            shortest=max(signal.shortest, num_frames(layer.min_length * signal.stride, signal.split)),
        )

    def upsample(self, layer: ConvTranspose1d, signal: Field, activation: CodecActivation) -> Field:
        """Split the items: output t depends on input (t + first_sample) // stride and the one before."""
        assert signal.stride == 1
        stride, shift = layer.stride, layer.first_sample
        return replace(
            signal,
            split=signal.split * stride,
            past=(signal.past + 1) * stride - shift,
            future=signal.future * stride + shift,
        )

    def residual(self, layer: ResidualLayer, signal: Field) -> Field:
        """Return the widest field of the branches."""
        fields = [self._branch(blocks, signal) for blocks in layer.branches]
        return replace(
            signal,
            past=max(field.past for field in fields),
            future=max(field.future for field in fields),
            shortest=max(field.shortest for field in fields),
        )

    def _branch(self, blocks: Iterable[ResidualBlock], signal: Field) -> Field:
        for block in blocks:
            signal = self.conv(block.skip_conv, self.conv(block.input_conv, signal))
        return signal


def residual_context(layer: ResidualLayer) -> tuple[int, int]:
    """Return the items before and after that an output of a residual layer depends on."""
    field = ContextOps().residual(layer, Field())
    return field.past, field.future
