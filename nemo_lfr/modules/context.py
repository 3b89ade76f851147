"""Receptive field and shortest valid input of a network.

`ContextOps` implements the same operations as a backend, so `network.run(ContextOps(), Field())` goes through the same
layers as inference, but returns the receptive field instead of a signal.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from nemo_lfr.errors import ConfigError
from nemo_lfr.frames import num_frames
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.residual import ResidualBlock, ResidualLayer


@dataclass(frozen=True)
class Field:
    """Receptive field of a signal inside a network, in time steps of the network's input.

    Time step t of the signal depends on the inputs from floor((t * stride - past) / split) to floor((t * stride +
    future) / split).

    Attributes:
        stride: number of inputs per time step of the signal; more than 1 after down-sampling.
        split: number of time steps of the signal per input; more than 1 after up-sampling.
        past: number of earlier inputs that a time step depends on, multiplied by `split`.
        future: number of later inputs that a time step depends on, multiplied by `split`.
        shortest: length of the shortest network input that is long enough for the padding of every layer.
    """

    stride: int = 1
    split: int = 1
    past: int = 0
    future: int = 0
    shortest: int = 1


class ContextOps:
    """Implementation of `nemo_lfr.modules.network.Ops` that computes receptive fields instead of signals."""

    def conv(self, layer: Conv1d, signal: Field, activation: CodecActivation | None = None) -> Field:
        """Widen the receptive field by the span of a convolution."""
        before = layer.pad[0]
        return replace(
            signal,
            stride=signal.stride * layer.stride,
            past=signal.past + before * signal.stride,
            future=signal.future + (layer.span - 1 - before) * signal.stride,
            shortest=max(signal.shortest, num_frames(layer.min_length * signal.stride, signal.split)),
        )

    def upsample(self, layer: ConvTranspose1d, signal: Field, activation: CodecActivation) -> Field:
        """Return the receptive field after a transposed convolution.

        Output t depends on input (t + first_sample) // stride and the input before it.
        """
        assert signal.stride == 1
        stride, shift = layer.stride, layer.first_sample
        return replace(
            signal,
            split=signal.split * stride,
            past=(signal.past + 1) * stride - shift,
            future=signal.future * stride + shift,
        )

    def residual(self, layer: ResidualLayer, signal: Field) -> Field:
        """Return the widest receptive field among the branches."""
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


def network_field(network: Any) -> Field:
    """Return the receptive field of an encoder or decoder.

    Raises:
        ConfigError: if a layer was replaced by a module that lacks an attribute of the original layer.
    """
    try:
        field: Field = network.run(ContextOps(), Field())
    except AttributeError as error:  # in a property of a module, this error would name the property instead
        raise ConfigError(
            f"a layer of the {type(network).__name__} was replaced by a module that lacks its attributes ({error}); "
            "use a subclass of the layer's class, or replace the convolution inside the layer."
        ) from error
    return field


def residual_context(layer: ResidualLayer) -> tuple[int, int]:
    """Return the numbers of earlier and later time steps that an output of a residual layer depends on."""
    field = ContextOps().residual(layer, Field())
    return field.past, field.future
