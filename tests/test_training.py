import pytest
import torch

from nemo_lfr.checkpoint import build_parts
from nemo_lfr.training.initialize import initialize_from_data
from tests.models import build_codec, codec_config, synthesize

pytest.importorskip("librosa", reason="spectral losses need the [train] extra")
from nemo_lfr.training.losses import SpectralLoss


@pytest.fixture(scope="module")
def loss():
    return SpectralLoss(22050, [256, 1024], [20, 80])


def test_spectral_losses_of_equal_signals_are_zero(loss):
    audio = torch.from_numpy(synthesize(0.5))[None]
    assert {name: float(value) for name, value in loss(audio, audio).items()} == {"stft": 0, "mel": 0, "log_mel": 0}


def test_spectral_losses_of_different_signals_are_positive_and_differentiable(loss):
    real = torch.from_numpy(synthesize(0.5, 0))[None]
    gen = torch.from_numpy(synthesize(0.5, 1))[None].requires_grad_()
    for name, value in loss(real, gen).items():
        assert value > 0, name
        (gradient,) = torch.autograd.grad(value, gen, retain_graph=True)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name


def test_spectral_losses_have_finite_gradients_at_silence(loss):
    gen = torch.zeros(1, 8192, requires_grad=True)
    sum(loss(torch.from_numpy(synthesize(0.5))[None, :8192], gen).values()).backward()
    assert torch.isfinite(gen.grad).all()


def test_a_closer_signal_costs_less(loss):
    real = torch.from_numpy(synthesize(0.5))[None]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    near, far = loss(real, real + 0.001 * noise), loss(real, real + 0.1 * noise)
    assert all(near[name] < far[name] for name in near)


def test_initialisation_from_data_centres_and_spreads_the_encoder_and_fills_the_codebooks():
    parts = build_parts(codec_config(), weight_norm=False)
    audio = torch.stack([torch.from_numpy(synthesize(1.86, seed)[: 40 * 1024]) for seed in range(6)])
    initialize_from_data(parts.encoder, parts.quantizer, parts.decoder, audio, encoded_spread=0.9)
    with torch.no_grad():
        encoded = parts.encoder.encode_frames(audio)
        _, tokens = parts.quantizer(encoded)
    # Both are set on this very batch, so only float32 sums over 240 frames separate them.
    torch.testing.assert_close(encoded.std(dim=(0, 2)), torch.full((32,), 0.9), rtol=0, atol=1e-3)
    torch.testing.assert_close(encoded.mean(dim=(0, 2)), torch.zeros(32), rtol=0, atol=1e-3)
    # 240 frames in 2016 entries of which a spread of 0.9 reaches most; a collapsed FSQ gives 1.
    assert min(len(codebook.unique()) for codebook in tokens) >= 100


def test_initialisation_leaves_no_hook_behind():
    codec = build_codec()
    for part in (codec.encoder, codec.decoder):
        assert not any(module._forward_hooks for module in part.modules())
