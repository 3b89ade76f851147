"""What the tests share: synthetic speech, tiny codecs of every kind, and a judge of differing tokens."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nemo_lfr.checkpoint import Parts, build_parts
from nemo_lfr.codec.codec import Codec
from nemo_lfr.training.initialize import initialize_from_data

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give, and more still on a shared machine

RATE = 22050
MODULES = "nemo.collections.tts.modules.audio_codec_modules."
# How far from a rounding edge floating-point order can matter: values are about 1, float32 keeps 7 digits, and a
# few hundred sums lie between audio and tokens.
TIE = 1e-4


def synthesize(seconds: float, seed: int = 0) -> np.ndarray:
    """A harmonic tone with gliding pitch under a syllable-like envelope, and noise: [T_audio] at 22.05 kHz."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 130 + 50 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6)) + 30 * rng.uniform()
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    wave = sum((np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 20)), np.zeros_like(time))
    wave = wave * (0.6 + 0.4 * np.sin(2 * np.pi * 3.1 * time)) + 0.3 * rng.standard_normal(len(time))
    return (0.08 * wave).astype(np.float32)


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
    """The released config with few channels, as one of `KINDS`; `changes` go into the sections they name."""
    config: dict[str, Any] = {
        "sample_rate": RATE,
        "samples_per_frame": 1024,
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
                config[key] = config[key] | value if isinstance(value, dict) else value
    return config


def build_codec(kind: str = "symmetric", **changes: Any) -> Codec:
    """A codec of random weights whose encoder output fills the levels; always the same for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        parts = build_parts(codec_config(kind, **changes), weight_norm=False)
        samples = 20 * 1024 // parts.encoder.samples_per_frame * parts.encoder.samples_per_frame
        audio = np.stack([synthesize(1, seed)[:samples] for seed in (100, 101)])
        initialize_from_data(parts.encoder, parts.quantizer, parts.decoder, torch.from_numpy(audio))
    for part in parts.named().values():
        part.eval().requires_grad_(False)
    _centre_output(parts, torch.from_numpy(audio))
    return Codec(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate)


@torch.no_grad()
def _centre_output(parts: Parts, audio: torch.Tensor) -> None:
    """Audio of zero mean and 0.1 rms, as speech has, before the output activation; a saturated one would equal anything."""
    codes, _ = parts.quantizer(parts.encoder.encode_frames(audio))
    before: list[torch.Tensor] = []
    conv = parts.decoder.post_conv
    with conv.register_forward_hook(lambda module, inputs, output: before.append(output)):
        parts.decoder.decode_frames(codes)
    factor = 0.1 / before[0].std()
    conv.conv.bias.sub_(before[0].mean()).mul_(factor)
    conv.conv.weight.mul_(factor)


cached_codec = functools.cache(build_codec)


def same_parts(codec: Codec, **changes: Any) -> Codec:
    """Another codec of the same parts."""
    return Codec(codec.encoder, codec.quantizer, codec.decoder, codec.sample_rate, **changes)


@torch.no_grad()
def reference_encode(codec: Codec, clip: np.ndarray) -> torch.Tensor:
    """Tokens [C, T] of one clip by its definition: one piece, alone, completed with zeros."""
    return codec.quantizer.encode(_encoded(codec, clip))[:, 0, : -(-len(clip) // codec.samples_per_frame)]


@torch.no_grad()
def reference_decode(codec: Codec, tokens: torch.Tensor) -> torch.Tensor:
    """Audio of tokens [C, T] in one piece, alone."""
    inputs = codec.quantizer.decode(tokens[:, None])
    padding = max(0, codec.decoder.min_frames - tokens.shape[1])
    return codec.decoder.decode_frames(F.pad(inputs, (0, padding)))[0, : tokens.shape[1] * codec.samples_per_frame]


def _encoded(codec: Codec, clip: np.ndarray) -> torch.Tensor:
    frames = max(math.ceil(len(clip) / codec.samples_per_frame), codec.encoder.min_frames)
    audio = np.zeros(frames * codec.samples_per_frame, dtype=np.float32)
    audio[: len(clip)] = clip
    return codec.encoder.encode_frames(torch.from_numpy(audio)[None])


@torch.no_grad()
def assert_same_tokens(codec: Codec, clip: np.ndarray, got: torch.Tensor, expected: torch.Tensor | None = None) -> int:
    """Tokens [C, T] of a clip must be equal but for ties: values within `TIE` of a rounding edge. Returns their number."""
    if expected is None:
        expected = reference_encode(codec, clip)
    assert got.shape == expected.shape
    differ = got.cpu() != expected.cpu()
    if not differ.any():
        return 0
    fsq = getattr(codec.quantizer, "fsqs", [codec.quantizer])[0]
    encoded = _encoded(codec, clip).reshape(codec.num_codebooks, len(codec.levels), -1)
    to_edge = ((fsq.compress(encoded) % 1) - 0.5).abs().amin(dim=1)[:, : got.shape[1]]
    wrong = differ & (to_edge > TIE)
    assert not wrong.any(), f"{int(wrong.sum())} of {got.numel()} tokens differ and are no ties: {wrong.nonzero()[:5]}"
    # Ties are rare by their nature; many of them would be a difference in disguise.
    ties = int(differ.sum())
    assert ties <= 1 + got.numel() // 500
    return ties


@pytest.fixture
def one_thread():
    """Tiny models run fastest on one thread, and much faster where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread_unless_slow(request: pytest.FixtureRequest):
    if request.node.get_closest_marker("slow") is None:
        request.getfixturevalue("one_thread")


@pytest.fixture(scope="session")
def speech():
    """(seconds, seed) -> synthetic speech, float32 [T_audio] at 22.05 kHz."""
    return synthesize


@pytest.fixture(scope="session")
def make_codec():
    """(kind, **changes to the config) -> a tiny codec."""
    return build_codec


@pytest.fixture(params=list(KINDS))
def codec(request: pytest.FixtureRequest) -> Codec:
    """A tiny codec of each kind."""
    return cached_codec(request.param)


@pytest.fixture
def small() -> Codec:
    """The released layout with few channels."""
    return cached_codec("symmetric")
