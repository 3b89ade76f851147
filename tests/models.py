"""Synthetic speech, and codecs of every kind with random weights, as our classes, as files and as NeMo's model."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_lfr.checkpoint import Parts, build_parts, split_weight_norm, write_checkpoint
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.training.initialize import initialize_from_data

RATE = 22050
MODULES = "nemo.collections.tts.modules.audio_codec_modules."
LOSSES = "nemo.collections.tts.losses.audio_codec_loss."
# Arguments of `codec_config` for the released size, 112.7 M parameters.
FULL_SIZE: dict[str, Any] = {"audio_encoder": {"base_channels": 48}, "audio_decoder": {"base_channels": 1024}}


def synthesize(seconds: float, seed: int = 0) -> np.ndarray:
    """Synthesize a speech-like waveform, float32 [T_audio] at 22.05 kHz.

    It is a harmonic tone with gliding pitch and a syllable-like envelope, plus noise.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 130 + 50 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6)) + 30 * rng.uniform()
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    wave = sum((np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 20)), np.zeros_like(time))
    wave = wave * (0.6 + 0.4 * np.sin(2 * np.pi * 3.1 * time)) + 0.3 * rng.standard_normal(len(time))
    return (0.08 * wave).astype(np.float32)


def speech_like(num_samples: int, seed: int = 0) -> torch.Tensor:
    """Return `synthesize` as a tensor, float32 [T_audio]."""
    return torch.from_numpy(synthesize(num_samples / RATE, seed))


KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {},
    # NanoCodec: symmetric encoder, causal decoder whose transposed convolutions sum two channels into one.
    "nano": {
        "audio_encoder": {"activation": "half_snake", "encoded_dim": 52},
        "vector_quantizer": {"num_groups": 13},
        "audio_decoder": {
            "_target_": MODULES + "CausalHiFiGANDecoder",
            "activation": "half_snake",
            "input_dim": 52,
            "n_groups_equal_to_out_channels": True,
            "output_activation": "clamp",
        },
    },
    "causal": {
        "audio_encoder": {"_target_": MODULES + "CausalHiFiGANEncoder", "activation": "snake", "encoded_dim": 16},
        "vector_quantizer": {"num_groups": 4},
        "audio_decoder": {
            "_target_": MODULES + "CausalHiFiGANDecoder",
            "activation": "elu",
            "n_groups_equal_to_out_channels": False,
            "input_dim": 16,
        },
    },
    "single": {
        "audio_encoder": {"encoded_dim": 4},
        "vector_quantizer": {"_target_": MODULES + "FiniteScalarQuantizer", "num_levels": [8, 7, 6, 6]},
        "audio_decoder": {"input_dim": 4},
    },
    "zeros": {"audio_encoder": {"pad_mode": "zeros"}, "audio_decoder": {"pad_mode": "zeros"}},
    "clamp": {"audio_decoder": {"output_activation": "clamp", "pad_mode": "replicate"}},
    # Two stages with odd strides: 15 samples per frame.
    "two_stages": {
        "samples_per_frame": 15,
        "audio_encoder": {"down_sample_rates": [3, 5], "resblock_dilation_sizes": [1, 3]},
        "audio_decoder": {"up_sample_rates": [5, 3], "resblock_dilation_sizes": [1, 2]},
    },
}


def codec_config(kind: str = "symmetric", **changes: Any) -> dict[str, Any]:
    """Return the released config with few channels, changed to one of `KINDS`.

    Args:
        kind: key of `KINDS`.
        changes: further changes; a dict is merged into the section of its name.
    """
    config: dict[str, Any] = {
        "sample_rate": RATE,
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
        "discriminator": None,
        "generator_loss": {"_target_": LOSSES + "GeneratorSquaredLoss"},
        "discriminator_loss": {"_target_": LOSSES + "DiscriminatorSquaredLoss"},
        "audio_encoder": {
            "_target_": MODULES + "HiFiGANEncoder",
            "encoded_dim": 32,
            "down_sample_rates": [2, 2, 4, 8, 8],
            "base_channels": 4,
            "activation": "lrelu",
            "resblock_dilation_sizes": [1],
        },
        "vector_quantizer": {
            "_target_": MODULES + "GroupFiniteScalarQuantizer",
            "num_groups": 8,
            "num_levels_per_group": [8, 7, 6, 6],
        },
        "audio_decoder": {
            "_target_": MODULES + "HiFiGANDecoder",
            "input_dim": 32,
            "up_sample_rates": [8, 8, 4, 2, 2],
            "base_channels": 64,
            "activation": "lrelu",
            "output_activation": "tanh",
        },
    }
    for change in (KINDS[kind], changes):
        for key, value in change.items():
            if key == "vector_quantizer" and "_target_" in value:
                config[key] = value
            else:
                config[key] = config[key] | value if isinstance(config.get(key), dict) else value
    return config


def random_parts(config: dict[str, Any], seed: int = 7) -> Parts:
    """Build modules with random weights whose encoder output uses all levels; the result depends only on the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = build_parts(config, weight_norm=False)
        samples = 20 * 1024 // parts.encoder.samples_per_frame * parts.encoder.samples_per_frame
        audio = torch.from_numpy(np.stack([synthesize(1, seed)[:samples] for seed in (100, 101)]))
        initialize_from_data(parts.encoder, parts.quantizer, parts.decoder, audio)
    _centre_output(parts, audio)
    return parts


def build_codec(kind: str = "symmetric", **changes: Any) -> Codec:
    """Build a codec from `random_parts`; see `codec_config` for the arguments."""
    parts = random_parts(codec_config(kind, **changes))
    for part in parts.named().values():
        part.eval().requires_grad_(False)
    return Codec(TorchBackend(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate))


@torch.no_grad()
def _centre_output(parts: Parts, audio: torch.Tensor) -> None:
    """Scale the decoder's output before its activation to zero mean and an RMS of 0.1, as speech has.

    Comparisons of saturated audio would hide differences.
    """
    codes, _ = parts.quantizer(parts.encoder.encode_frames(audio))
    before: list[torch.Tensor] = []
    conv = parts.decoder.post_conv
    with conv.register_forward_hook(lambda module, inputs, output: before.append(output)):
        parts.decoder.decode_frames(codes)
    factor = 0.1 / before[0].std()
    conv.conv.bias.sub_(before[0].mean()).mul_(factor)
    conv.conv.weight.mul_(factor)


cached_codec = functools.cache(build_codec)


def same_parts(codec: Codec, *, chunk_frames: int | None = None, **changes: Any) -> Codec:
    """Build another codec with the same modules and other options."""
    backend = TorchBackend(codec.encoder, codec.quantizer, codec.decoder, codec.sample_rate, **changes)
    return Codec(backend, chunk_frames=chunk_frames)


def write_nemo(path: Path, config: dict[str, Any], seed: int = 7) -> Path:
    """Write the `.nemo` of `random_parts` and return its path."""
    parts = random_parts(config, seed)
    state = {f"{n}.{k}": v for n, part in parts.named().items() for k, v in split_weight_norm(part).items()}
    write_checkpoint(path, config, state)
    return path


def stock_model(path: Path):
    """Restore a `.nemo` as NeMo's AudioCodecModel with NeMo's reader."""
    from nemo.collections.tts.models.audio_codec import AudioCodecModel

    model = AudioCodecModel.restore_from(str(path), map_location="cpu").eval()
    assert type(model) is AudioCodecModel
    return model
