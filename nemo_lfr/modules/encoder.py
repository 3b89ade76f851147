"""HiFi-GAN encoder: audio [B, T_audio] -> encoded frames [B, D, T_encoded]."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.errors import ConfigError
from nemo_lfr.frames import Context, num_frames
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.context import Field, network_field
from nemo_lfr.modules.conv import Conv1d
from nemo_lfr.modules.network import DownStage, ModuleOps, Ops, Signal, encode
from nemo_lfr.modules.neural_module import NeuralModule
from nemo_lfr.modules.ragged import map_by_length
from nemo_lfr.modules.residual import ResidualLayer


class HiFiGANEncoder(NeuralModule):
    """HiFi-GAN encoder with the arguments and state-dict keys of NeMo's class.

    With `causal=True` it corresponds to NeMo's `CausalHiFiGANEncoder`.

    Args:
        encoded_dim: number of dimensions D of an encoded frame.
        down_sample_rates: stride of each stage; the product of the strides is the number of samples per frame.
        base_channels: number of channels before the first stage; each stage doubles it.
        in_kernel_size: kernel size of the first convolution.
        out_kernel_size: kernel size of the last convolution.
        resblock_kernel_sizes: kernel size of each residual branch.
        resblock_dilation_sizes: dilation of each residual block in a branch.
        activation: "lrelu", "elu", "snake" or "half_snake".
        pad_mode: "reflect", "zeros" or "replicate"; ignored by causal convolutions, which pad with zeros, as in NeMo.
        causal: whether a frame depends only on its own and earlier samples.
        weight_norm: whether convolutions have weight norm, for training; plain weights are enough for inference.

    Raises:
        ConfigError: for an unknown activation or padding mode, an even kernel size, or a stride of 1. Causal encoders
            may have even kernel sizes and strides of 1.
    """

    input_names = ("audio", "audio_len")
    output_names = ("encoded", "encoded_len")

    def __init__(
        self,
        encoded_dim: int,
        down_sample_rates: Sequence[int] = (2, 2, 8, 8),
        base_channels: int = 32,
        in_kernel_size: int = 7,
        out_kernel_size: int = 7,
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11),
        resblock_dilation_sizes: Sequence[int] = (1, 3, 5),
        activation: str = "lrelu",
        pad_mode: str = "reflect",
        *,
        causal: bool = False,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        if min(down_sample_rates) < 2 and not causal:
            raise ConfigError(f"down_sample_rates is {list(down_sample_rates)}; each rate must be 2 or more.")
        self.encoded_dim = encoded_dim
        self.down_sample_rates = tuple(down_sample_rates)
        self.samples_per_frame = math.prod(self.down_sample_rates)
        self.causal = causal

        def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> Conv1d:
            return Conv1d(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                causal=causal,
                pad_mode=pad_mode,
                weight_norm=weight_norm,
            )

        self.pre_conv = conv(1, base_channels, in_kernel_size)
        self.activations = nn.ModuleList()
        self.down_sample_conv_layers = nn.ModuleList()
        self.res_layers = nn.ModuleList()
        channels = base_channels
        for rate in self.down_sample_rates:
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
            self.activations.append(CodecActivation(activation, channels))
            self.down_sample_conv_layers.append(conv(channels, 2 * channels, 2 * rate, stride=rate))
            channels *= 2
        self.post_activation = CodecActivation(activation, channels)
        self.post_conv = conv(channels, encoded_dim, out_kernel_size)

    @property
    def stages(self) -> list[DownStage]:
        """Stages with their layers, in order."""
        layers = zip(self.res_layers, self.activations, self.down_sample_conv_layers, strict=True)
        return [DownStage._make(stage) for stage in layers]

    def run(self, ops: Ops[Signal], audio: Signal) -> Signal:
        """Run all layers with the operations of a backend.

        A subclass with other layers, or layers in another order, overrides this method.

        Args:
            ops: operations of a backend, such as `ModuleOps`.
            audio: audio, in the form that `ops` uses.

        Returns:
            Encoded frames, in the form that `ops` uses.
        """
        return encode(self, ops, audio)

    @functools.cached_property
    def _field(self) -> Field:
        return network_field(self)

    @property
    def context(self) -> Context:
        """Numbers of earlier and later frames that an encoded frame depends on; both are 6 in NVIDIA's codec."""
        # `field` counts from the first sample of a frame, so the rest of the frame is part of `field.future`.
        rate, field = self.samples_per_frame, self._field
        return Context(num_frames(field.past, rate), num_frames(max(0, field.future - (rate - 1)), rate))

    @property
    def min_frames(self) -> int:
        """Shortest input of `encode_frames`, in frames; `forward` zero-pads shorter input.

        The value is 4 in NVIDIA's codec.
        """
        return num_frames(self._field.shortest, self.samples_per_frame)

    def encode_frames(self, audio: torch.Tensor) -> torch.Tensor:
        """Encode clips of equal length that consist of whole frames.

        Args:
            audio: [B, T * samples_per_frame], T >= `min_frames`.

        Returns:
            Encoded frames [B, D, T].
        """
        return self.run(ModuleOps(), audio.unsqueeze(1))

    def forward(self, audio: torch.Tensor, audio_len: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode each clip independently of the others in the batch.

        A partial last frame is zero-padded. A clip shorter than `min_frames` is zero-padded to that length, but only
        the frames that contain its samples are returned.

        Args:
            audio: [B, T_audio]; samples after the end of a clip are ignored.
            audio_len: samples in each clip, [B].

        Returns:
            Encoded frames [B, D, T_encoded], which are zero after the end of a clip, and the number of frames in each
            clip as int64, [B].
        """
        lengths = audio_len.tolist()
        frames = [num_frames(length, self.samples_per_frame) for length in lengths]
        encoded_len = torch.tensor(frames, dtype=torch.int64, device=audio_len.device)  # int64 as in NeMo
        if max(frames) == 0:
            return audio.new_zeros(len(frames), self.encoded_dim, 0), encoded_len

        def encode(clips: torch.Tensor) -> torch.Tensor:
            whole = max(num_frames(clips.shape[-1], self.samples_per_frame), self.min_frames)
            return self.encode_frames(F.pad(clips, (0, whole * self.samples_per_frame - clips.shape[-1])))

        return map_by_length(encode, audio, lengths, frames), encoded_len
