"""HiFi-GAN decoder: dequantized frames [B, D, T_encoded] -> audio [B, T_audio]."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.errors import ConfigError
from nemo_lfr.frames import Context, num_frames
from nemo_lfr.modules.activation import CodecActivation, output_activation
from nemo_lfr.modules.context import Field, network_field
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.network import ModuleOps, Ops, Signal, UpStage, decode
from nemo_lfr.modules.neural_module import NeuralModule
from nemo_lfr.modules.ragged import map_by_length
from nemo_lfr.modules.residual import ResidualLayer


class HiFiGANDecoder(NeuralModule):
    """HiFi-GAN decoder with the arguments and state-dict keys of NeMo's class.

    With `causal=True` it corresponds to NeMo's `CausalHiFiGANDecoder` (NanoCodec).

    Args:
        input_dim: number of dimensions D of a dequantized frame.
        up_sample_rates: stride of each stage; the product of the strides is the number of samples per frame.
        base_channels: number of channels before the first stage; each stage halves it.
        in_kernel_size: kernel size of the first convolution.
        out_kernel_size: kernel size of the last convolution.
        resblock_kernel_sizes: kernel size of each residual branch.
        resblock_dilation_sizes: dilation of each residual block in a branch.
        activation: "lrelu", "elu", "snake" or "half_snake".
        output_activation: "tanh" or "clamp".
        pad_mode: "reflect", "zeros" or "replicate"; ignored by causal convolutions, which pad with zeros, as in NeMo.
        n_groups_equal_to_out_channels: whether each transposed convolution has one group per output channel
            (NanoCodec).
        causal: whether outputs depend only on current and past frames.
        weight_norm: whether convolutions have weight norm, for training; plain weights are enough for inference.

    Raises:
        ConfigError: for an unknown activation or padding mode, an even kernel size unless the decoder is causal, or a
            `base_channels` that cannot be halved at every stage.
    """

    input_names = ("inputs", "input_len")
    output_names = ("audio", "audio_len")

    def __init__(
        self,
        input_dim: int,
        up_sample_rates: Sequence[int] = (8, 8, 2, 2),
        base_channels: int = 512,
        in_kernel_size: int = 7,
        out_kernel_size: int = 3,
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11),
        resblock_dilation_sizes: Sequence[int] = (1, 3, 5),
        activation: str = "lrelu",
        output_activation: str = "tanh",
        pad_mode: str = "reflect",
        n_groups_equal_to_out_channels: bool = False,
        *,
        causal: bool = False,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        if base_channels % 2 ** len(up_sample_rates):
            raise ConfigError(
                f"base_channels {base_channels} cannot be halved {len(up_sample_rates)} times; "
                f"make it a multiple of {2 ** len(up_sample_rates)}."
            )
        self.up_sample_rates = tuple(up_sample_rates)
        self.samples_per_frame = math.prod(self.up_sample_rates)
        self.causal = causal

        def conv(in_channels: int, out_channels: int, kernel_size: int) -> Conv1d:
            return Conv1d(
                in_channels, out_channels, kernel_size, causal=causal, pad_mode=pad_mode, weight_norm=weight_norm
            )

        self.pre_conv = conv(input_dim, base_channels, in_kernel_size)
        self.activations = nn.ModuleList()
        self.up_sample_conv_layers = nn.ModuleList()
        self.res_layers = nn.ModuleList()
        channels = base_channels
        for rate in self.up_sample_rates:
            self.activations.append(CodecActivation(activation, channels))
            groups = channels // 2 if n_groups_equal_to_out_channels else 1
            self.up_sample_conv_layers.append(
                ConvTranspose1d(
                    channels, channels // 2, stride=rate, groups=groups, causal=causal, weight_norm=weight_norm
                )
            )
            channels //= 2
            self.res_layers.append(
                ResidualLayer(
                    channels,
                    resblock_kernel_sizes,
                    resblock_dilation_sizes,
                    activation,
                    causal,
                    pad_mode,
                    weight_norm,
                )
            )
        self.post_activation = CodecActivation(activation, channels)
        self.post_conv = conv(channels, 1, out_kernel_size)
        self.out_activation = _output_activation(output_activation)

    @property
    def stages(self) -> list[UpStage]:
        """Stages with their layers, in order."""
        layers = zip(self.activations, self.up_sample_conv_layers, self.res_layers, strict=True)
        return [UpStage._make(stage) for stage in layers]

    def run(self, ops: Ops[Signal], dequantized: Signal) -> Signal:
        """Run all layers except the output activation, with the operations of a backend.

        A subclass with other layers, or layers in another order, overrides this method.

        Args:
            ops: operations of a backend, such as `ModuleOps`.
            dequantized: dequantized frames, in the form that `ops` uses.

        Returns:
            Audio before the output activation, in the form that `ops` uses.
        """
        return decode(self, ops, dequantized)

    @functools.cached_property
    def _field(self) -> Field:
        return network_field(self)

    @property
    def context(self) -> Context:
        """Numbers of earlier and later frames that the audio of a frame depends on; both are 13 in NVIDIA's codec."""
        return Context(
            num_frames(self._field.past, self.samples_per_frame),
            num_frames(self._field.future, self.samples_per_frame),
        )

    @property
    def min_frames(self) -> int:
        """Shortest input of `decode_frames`, in frames; `forward` zero-pads shorter input.

        The value is 4 in NVIDIA's codec.
        """
        return self._field.shortest

    def decode_frames(self, inputs: torch.Tensor) -> torch.Tensor:
        """Decode utterances of equal length.

        Args:
            inputs: dequantized frames [B, D, T], T >= `min_frames`.

        Returns:
            Audio [B, T * samples_per_frame].
        """
        audio: torch.Tensor = self.out_activation(self.hidden_frames(inputs))
        return audio.squeeze(1)

    def hidden_frames(self, inputs: torch.Tensor) -> torch.Tensor:
        """Decode without the output activation: [B, D, T] -> [B, 1, T * samples_per_frame]."""
        return self.run(ModuleOps(), inputs)

    def forward(self, inputs: torch.Tensor, input_len: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode each utterance independently of the others in the batch.

        Args:
            inputs: dequantized frames [B, D, T_encoded]; values after the end of an utterance are ignored.
            input_len: frames in each utterance, [B].

        Returns:
            Audio [B, T_audio] in [-1, 1], which is zero after the end of an utterance, and the number of samples in
            each utterance [B], a multiple of `samples_per_frame`.
        """
        frames = input_len.tolist()
        samples = [length * self.samples_per_frame for length in frames]
        audio_len = input_len * self.samples_per_frame
        if max(frames) == 0:
            return inputs.new_zeros(len(frames), 0), audio_len

        def decode(clips: torch.Tensor) -> torch.Tensor:
            return self.decode_frames(F.pad(clips, (0, max(0, self.min_frames - clips.shape[-1]))))

        return map_by_length(decode, inputs, frames, samples), audio_len


_output_activation = output_activation
