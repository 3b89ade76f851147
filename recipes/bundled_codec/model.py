"""Network of the bundled codec: encoder, FSQ and decoder.

The convolutions have no weight norm, and pad with zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.quantizer import GroupFiniteScalarQuantizer

SAMPLE_RATE = 22050


@dataclass
class EncoderConfig:
    """Arguments of `HiFiGANEncoder`."""

    encoded_dim: int = 32
    down_sample_rates: list[int] = field(default_factory=lambda: [4, 4, 8, 8])
    base_channels: int = 32
    resblock_kernel_sizes: list[int] = field(default_factory=lambda: [3, 7])
    resblock_dilation_sizes: list[int] = field(default_factory=lambda: [1])
    activation: str = "lrelu"


@dataclass
class QuantizerConfig:
    """Arguments of `GroupFiniteScalarQuantizer`."""

    num_groups: int = 8
    num_levels_per_group: list[int] = field(default_factory=lambda: [8, 7, 6, 6])


@dataclass
class DecoderConfig:
    """Arguments of `HiFiGANDecoder`."""

    input_dim: int = 32
    up_sample_rates: list[int] = field(default_factory=lambda: [8, 8, 4, 4])
    base_channels: int = 256
    resblock_kernel_sizes: list[int] = field(default_factory=lambda: [3, 7])
    resblock_dilation_sizes: list[int] = field(default_factory=lambda: [1, 3])
    activation: str = "lrelu"


@dataclass
class NetworkConfig:
    """Sizes of the encoder, quantizer and decoder, with the same keys as in a codec's config."""

    audio_encoder: EncoderConfig = field(default_factory=EncoderConfig)
    vector_quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    audio_decoder: DecoderConfig = field(default_factory=DecoderConfig)


class Generator(nn.Module):
    """Encoder, FSQ and decoder for training.

    The network has no weight norm, which would double the cost of small convolutions on a CPU. It pads with zeros,
    because a convolution does this for free, whereas reflection padding copies the signal in every layer.

    Args:
        config: sizes of the network.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        plain: dict[str, Any] = {"pad_mode": "zeros", "weight_norm": False}
        self.audio_encoder = HiFiGANEncoder(**vars(config.audio_encoder), **plain)
        self.vector_quantizer = GroupFiniteScalarQuantizer(**vars(config.vector_quantizer))
        self.audio_decoder = HiFiGANDecoder(**vars(config.audio_decoder), **plain)

    @property
    def samples_per_frame(self) -> int:
        """Return the number of samples per encoded frame."""
        return self.audio_encoder.samples_per_frame

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode and decode audio.

        Args:
            audio: audio in complete frames, shape [B, T_encoded * samples_per_frame].

        Returns:
            The reconstruction [B, T_audio], the encoder output [B, D, T_encoded] and the tokens [C, B, T_encoded].
        """
        encoded = self.audio_encoder.encode_frames(audio).float()
        codes, tokens = self.vector_quantizer(encoded)
        return self.audio_decoder.decode_frames(codes.to(audio.dtype)).float(), encoded, tokens


def num_parameters(modules: Sequence[nn.Module]) -> int:
    """Return the number of parameters in all modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
