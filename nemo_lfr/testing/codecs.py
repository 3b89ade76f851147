"""Synthetic speech, and small codecs with random weights."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_lfr.codec.codec import Codec

if TYPE_CHECKING:
    import torch

    from nemo_lfr.checkpoint import CodecModules

SAMPLE_RATE = 22050
MODULES = "nemo.collections.tts.modules.audio_codec_modules."
LOSSES = "nemo.collections.tts.losses.audio_codec_loss."
# Changes to `codec_config` for the fastest test codec: two stages with strides 3 and 5, and thus 15 samples per frame.
TWO_STAGES: dict[str, Any] = {
    "samples_per_frame": 15,
    "audio_encoder": {"down_sample_rates": [3, 5], "resblock_dilation_sizes": [1, 3]},
    "audio_decoder": {"up_sample_rates": [5, 3], "resblock_dilation_sizes": [1, 2]},
}


def synthesize(seconds: float, seed: int = 0) -> np.ndarray:
    """Synthesize a speech-like waveform at 22.05 kHz.

    The waveform is a harmonic tone with gliding pitch and a syllable-like envelope, plus noise.

    Args:
        seconds: duration in seconds.
        seed: seed of the noise, the phases and the pitch.

    Returns:
        Samples, float32, shape [T_audio].
    """
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 130 + 50 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6)) + 30 * rng.uniform()
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    wave = sum((np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 20)), np.zeros_like(time))
    wave = wave * (0.6 + 0.4 * np.sin(2 * np.pi * 3.1 * time)) + 0.3 * rng.standard_normal(len(time))
    return (0.08 * wave).astype(np.float32)


def codec_config(**changes: Any) -> dict[str, Any]:
    """Return the config of a small codec without a discriminator.

    The config has the same form as that of NVIDIA's Low Frame-rate Speech Codec, but the networks are much smaller.
    `codec_config(**TWO_STAGES)` is the config of the fastest test codec.

    Args:
        **changes: keys to change. A dict is merged into the section of the same name. A `vector_quantizer` that has a
            `_target_` replaces the whole section.

    Returns:
        The model config, with the same keys as in a `.nemo` file.
    """
    config: dict[str, Any] = {
        "sample_rate": SAMPLE_RATE,
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
    for key, value in changes.items():
        replaces = key == "vector_quantizer" and "_target_" in value
        merges = isinstance(config.get(key), dict) and not replaces
        config[key] = config[key] | value if merges else value
    return config


def random_parts(config: dict[str, Any], seed: int = 7) -> "CodecModules":
    """Build the modules of a codec with reproducible random weights.

    The encoder's output uses all FSQ levels, and the decoder's output is as loud as speech.

    Args:
        config: model config, see `codec_config`.
        seed: seed of the weights.

    Returns:
        The modules in training mode, on the CPU, without weight norm.
    """
    import torch

    from nemo_lfr.checkpoint import build_parts
    from nemo_lfr.training.initialize import initialize_from_data

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = build_parts(config, weight_norm=False)
        samples = 20 * 1024 // parts.encoder.samples_per_frame * parts.encoder.samples_per_frame
        audio = torch.from_numpy(np.stack([synthesize(1, seed)[:samples] for seed in (100, 101)]))
        initialize_from_data(parts.encoder, parts.quantizer, parts.decoder, audio)
    with torch.no_grad():
        _center_output(parts, audio)
    return parts


def _center_output(parts: "CodecModules", audio: "torch.Tensor") -> None:
    """Change the decoder's last convolution so that its output has zero mean and an RMS of 0.1.

    Args:
        parts: modules, which are changed in place.
        audio: speech [B, T_audio] that consists of complete frames.
    """
    codes, _ = parts.quantizer(parts.encoder.encode_frames(audio))
    before: list[torch.Tensor] = []
    conv = parts.decoder.post_conv
    with conv.register_forward_hook(lambda module, inputs, output: before.append(output)):
        parts.decoder.decode_frames(codes)
    factor = 0.1 / before[0].std()
    assert conv.conv.bias is not None
    conv.conv.bias.sub_(before[0].mean()).mul_(factor)
    conv.conv.weight.mul_(factor)


def build_codec(config: dict[str, Any] | None = None, seed: int = 7) -> Codec[Any]:
    """Build a codec with random weights, on the CPU.

    Args:
        config: model config, see `codec_config`. The default is `codec_config(**TWO_STAGES)`, with which a second of
            audio takes only a few milliseconds.
        seed: seed of the weights.
    """
    from nemo_lfr.codec.torch_backend import TorchBackend

    parts = random_parts(config or codec_config(**TWO_STAGES), seed)
    for part in parts.named().values():
        part.eval().requires_grad_(False)
    return Codec(TorchBackend(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate))


def write_checkpoint(path: str | os.PathLike[str], config: dict[str, Any] | None = None, seed: int = 7) -> Path:
    """Write `build_codec(config, seed)` to a `.nemo` file and return its path."""
    from nemo_lfr.checkpoint import split_weight_norm
    from nemo_lfr.checkpoint import write_checkpoint as write

    config = config or codec_config(**TWO_STAGES)
    parts = random_parts(config, seed)
    state = {f"{n}.{k}": v for n, part in parts.named().items() for k, v in split_weight_norm(part).items()}
    write(path, config, state)
    return Path(path)
