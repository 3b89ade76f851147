"""Stock NeMo models for parity tests: real NeMo classes, weights that use the whole range of FSQ."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from nemo_lfr.checkpoint import build_parts, split_weight_norm, write_checkpoint
from nemo_lfr.training.initialize import initialize_from_data

MODULES = "nemo.collections.tts.modules.audio_codec_modules."
LOSSES = "nemo.collections.tts.losses.audio_codec_loss."


def speech_like(num_samples: int, seed: int = 0) -> torch.Tensor:
    """Gliding harmonics under a syllable-like envelope, plus noise: [T_audio] at 22.05 kHz, about 0.1 rms."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / 22050
    pitch = 120 + 60 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6)) + 20 * rng.uniform()
    phase = 2 * np.pi * np.cumsum(pitch) / 22050
    wave = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 25))
    wave = wave * (0.55 + 0.45 * np.sin(2 * np.pi * 3.1 * time)) + 0.3 * rng.standard_normal(num_samples)
    return torch.from_numpy((0.1 * wave / wave.std()).astype(np.float32))


def config(kind: str = "lfr", encoder_channels: int = 6, decoder_channels: int = 64, **changes: Any) -> dict[str, Any]:
    """A model config under NeMo's names: "lfr" as released, or "nano" with NanoCodec's causal decoder."""
    encoder = {
        "_target_": MODULES + "HiFiGANEncoder",
        "down_sample_rates": [2, 2, 4, 8, 8],
        "encoded_dim": 32,
        "base_channels": encoder_channels,
        "activation": "lrelu",
        "resblock_dilation_sizes": [1],
    }
    decoder = {
        "_target_": MODULES + "HiFiGANDecoder",
        "up_sample_rates": [8, 8, 4, 2, 2],
        "input_dim": 32,
        "base_channels": decoder_channels,
        "activation": "lrelu",
        "output_activation": "tanh",
    }
    if kind == "nano":
        encoder["activation"] = "half_snake"
        decoder |= {
            "_target_": MODULES + "CausalHiFiGANDecoder",
            "activation": "half_snake",
            "output_activation": "clamp",
        }
    return {
        "sample_rate": 22050,
        "samples_per_frame": 1024,
        "mel_loss_l1_scale": 1.0,
        "mel_loss_l2_scale": 0.0,
        "stft_loss_scale": 20.0,
        "time_domain_loss_scale": 0.0,
        "commit_loss_scale": 0.0,
        "loss_resolutions": [[512, 128, 512], [1024, 256, 1024]],
        "mel_loss_dims": [80, 160],
        "mel_loss_log_guard": 1.0,
        "stft_loss_log_guard": 1.0,
        "feature_loss_type": "absolute",
        "audio_encoder": encoder,
        "vector_quantizer": {
            "_target_": MODULES + "GroupFiniteScalarQuantizer",
            "num_groups": 8,
            "num_levels_per_group": [8, 7, 6, 6],
        },
        "audio_decoder": decoder,
        "discriminator": None,
        "generator_loss": {"_target_": LOSSES + "GeneratorSquaredLoss"},
        "discriminator_loss": {"_target_": LOSSES + "DiscriminatorSquaredLoss"},
    } | changes


def write_nemo(path: Path, values: dict[str, Any], seed: int = 0) -> Path:
    """A `.nemo` of this config with random weights whose encoder output fills the levels."""
    torch.manual_seed(seed)
    parts = build_parts(values, weight_norm=False)
    audio = torch.stack([speech_like(20 * 1024, seed + row) for row in range(2)])
    initialize_from_data(parts.encoder, parts.quantizer, parts.decoder, audio)
    state = {f"{n}.{k}": v for n, part in parts.named().items() for k, v in split_weight_norm(part).items()}
    write_checkpoint(path, values, state)
    return path


def stock_model(path: Path):
    """NeMo's own AudioCodecModel, restored by NeMo's own reader."""
    from nemo.collections.tts.models.audio_codec import AudioCodecModel

    model = AudioCodecModel.restore_from(str(path), map_location="cpu").eval()
    assert type(model) is AudioCodecModel
    return model


def to_config(values: dict[str, Any]):
    return OmegaConf.create(values)
