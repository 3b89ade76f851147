"""Tests of losses, spectra and initialization; `test_training_with_nemo.py` compares whole steps with stock NeMo."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from nemo_lfr.checkpoint import build_parts
from nemo_lfr.errors import ConfigError
from nemo_lfr.signal.distances import ReconstructionLoss, si_sdr
from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training import losses
from nemo_lfr.training.discriminators import (
    Conv2d,
    Discriminator,
    MultiBandDiscriminatorSTFT,
    MultiPeriodDiscriminator,
    MultiResolutionDiscriminatorSTFT,
)
from nemo_lfr.training.initialize import initialize_from_data
from nemo_lfr.training.losses import CodecLosses
from tests.models import build_codec, codec_config, synthesize
from tests.packages import require
from tests.tiers import slow_after

require("librosa", reason="spectral losses need the [train] extra")

TERMS = ReconstructionLoss.TERMS

DISCRIMINATORS = {
    "periods": MultiPeriodDiscriminator((2, 3)),
    "a long period": MultiPeriodDiscriminator((97,)),
    "resolutions": MultiResolutionDiscriminatorSTFT([[64, 16, 64], [128, 128, 100]]),
    "bands": MultiBandDiscriminatorSTFT([256, 64, 256], [[0.0, 0.5], [0.5, 1.0]]),
}


@pytest.fixture(scope="module")
def loss():
    return ReconstructionLoss(22050, [(256, 64, 256), (1024, 256, 1024)], [20, 80])


def speech(seconds: float = 0.5, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(synthesize(seconds, seed))[None]


def distances(loss, real, gen, *args):
    return loss(Spectra(real), Spectra(gen), *args)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_no_shorter_audio_than_declared_can_be_scored(name):
    discriminator = Discriminator([DISCRIMINATORS[name]])
    least = discriminator.min_samples
    audio = speech(2)
    scores, *_ = discriminator(audio[:, :least], audio[:, :least])
    assert len(scores) == discriminator.num_networks
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        discriminator(audio[:, : least - 1], audio[:, : least - 1])


def test_no_shorter_audio_than_declared_has_spectral_losses(loss):
    least = loss.min_samples
    assert math.isfinite(distances(loss, speech()[:, :least], speech(seed=1)[:, :least])["stft"])
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        distances(loss, speech()[:, : least - 1], speech(seed=1)[:, : least - 1])


@pytest.mark.parametrize("samples", [1024, 1000, 700, 513, 24576])
@pytest.mark.parametrize("resolution", [(32, 8, 32), (256, 64, 200), (512, 100, 512), (1024, 256, 1024)])
def test_mel_magnitudes_see_zeros_beyond_the_ends(samples, resolution):
    """Compare with an STFT of the zero-padded audio, since `Spectra` recomputes only the edges."""
    n_fft, hop, window = resolution
    audio, filters = speech(1.2)[:, :samples], torch.rand(7, n_fft // 2 + 1)
    stft = torch.stft(
        audio, n_fft, hop, window, torch.hann_window(window, periodic=False), pad_mode="constant", return_complex=True
    )
    expected = filters @ torch.sqrt(stft.real**2 + stft.imag**2 + 1e-5)
    torch.testing.assert_close(Spectra(audio).mel(resolution, filters), expected, rtol=1e-5, atol=1e-5)


def test_mel_magnitudes_are_in_fp32_under_autocast():
    """NeMo also uses fp32. In bf16, values that are much smaller than the log guard would be lost."""
    resolution, audio, filters = (256, 64, 256), speech(), torch.rand(7, 129)
    with torch.autocast("cpu", torch.bfloat16):
        found = Spectra(audio).mel(resolution, filters)
    assert torch.equal(found, Spectra(audio).mel(resolution, filters))


@pytest.mark.slow
def test_each_stft_is_computed_once(loss, monkeypatch):
    lengths = []
    stft = torch.stft
    monkeypatch.setattr(
        torch, "stft", lambda audio, *args, **kw: (lengths.append(audio.shape[-1]), stft(audio, *args, **kw))[1]
    )
    real, gen = Spectra(speech()), Spectra(speech(seed=1))
    for _ in range(2):
        loss(real, gen, None, TERMS)
        real.stft((1024, 256, 1024))
    assert lengths.count(speech().shape[-1]) == 4  # two signals, two resolutions; edges are shorter


def test_losses_of_equal_signals_are_zero(loss):
    values = distances(loss, speech(), speech(), None, TERMS)
    assert all(values[name] == 0 for name in TERMS if name != "si_sdr") and values["si_sdr"] < -80


@pytest.mark.parametrize("term", TERMS)
def test_losses_of_different_signals_are_differentiable(loss, term):
    gen = speech(seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(distances(loss, speech(), gen, None, [term])[term], gen)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_losses_have_finite_gradients_at_silence(loss):
    gen = torch.zeros(1, 8192, requires_grad=True)
    terms = distances(loss, speech()[:, :8192], gen, None, TERMS)
    sum(terms.values()).backward()
    assert gen.grad is not None and torch.isfinite(gen.grad).all()


def test_closer_signal_has_a_smaller_loss(loss):
    noise = torch.randn(speech().shape, generator=torch.Generator().manual_seed(0))
    near, far = (distances(loss, speech(), speech() + size * noise, None, TERMS) for size in (0.001, 0.1))
    assert all(near[name] < far[name] for name in TERMS)


def test_samples_after_a_clips_end_are_ignored(loss):
    real, gen = F.pad(speech(), (0, 4000)), F.pad(speech(seed=1), (0, 4000))
    noisy = gen.clone()
    noisy[:, speech().shape[-1] + 1100 :] = 1  # farther away than the length of the longest window
    length = torch.tensor([speech().shape[-1]])
    first, second = (distances(loss, real, other, length, TERMS) for other in (gen, noisy))
    assert all(torch.equal(first[name], second[name]) for name in TERMS)


def test_si_sdr_equals_a_known_value():
    real = speech()
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean()
    real = real - real.mean()
    noise -= real * (noise @ real.T) / (real @ real.T)  # orthogonal: the ratio is that of the energies
    expected = 10 * math.log10(float(real.square().sum() / (0.01 * noise).square().sum()))
    assert si_sdr(real, 3 * (real + 0.01 * noise)) == pytest.approx(expected, abs=1e-3)


def test_adversarial_losses_equal_their_formulas():
    real, gen = [torch.tensor([1.5, 0.5])], [torch.tensor([0.0, 3.0])]
    assert losses.generator_squared(gen) == pytest.approx((1 + 4) / 2)
    assert losses.generator_hinged(gen) == pytest.approx(0.5)
    assert losses.discriminator_squared(real, gen) == pytest.approx((0.25 + 4.5) / 2)
    assert losses.discriminator_hinged(real, gen) == pytest.approx((0.25 + 2.5) / 2)
    assert losses.feature_matching([real], [gen]) == pytest.approx(2.0)
    assert losses.relative_feature_matching([real], [gen], guard=0) == pytest.approx(2.0)


def test_terms_without_weight_are_not_computed():
    values = codec_config(mel_loss_l1_scale=0.0, stft_loss_scale=2.0, time_domain_loss_scale=3.0)
    terms = CodecLosses(values).terms(Spectra(speech()), Spectra(speech(seed=1)), None, torch.zeros(1, 32, 8))
    assert terms.keys() == {"stft", "time_domain"}
    total = CodecLosses(values).total(terms)
    assert total == pytest.approx(2 * float(terms["stft"]) + 3 * float(terms["time_domain"]))


@pytest.mark.parametrize(
    ("key", "value"), [("generator_loss", {"_target_": "os.system"}), ("feature_loss_type", "other")]
)
def test_unknown_losses_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        CodecLosses(codec_config() | {key: value})


@pytest.mark.slow
@pytest.mark.parametrize("weight_norm", slow_after(1, [False, True]))
def test_initialization_from_data_centers_and_spreads_the_encoder_and_fills_the_codebooks(weight_norm):
    parts = build_parts(codec_config(), weight_norm=weight_norm)
    audio = torch.stack([torch.from_numpy(synthesize(1.86, seed)[: 40 * 1024]) for seed in range(6)])
    initialize_from_data(parts.encoder, parts.quantizer, parts.decoder, audio, encoded_spread=0.9)
    with torch.no_grad():
        encoded = parts.encoder.encode_frames(audio)
        _, tokens = parts.quantizer(encoded)
    # Both were set on this batch, so they differ only by the rounding of float32 sums over 240 frames.
    torch.testing.assert_close(encoded.std(dim=(0, 2)), torch.full((32,), 0.9), rtol=0, atol=1e-3)
    torch.testing.assert_close(encoded.mean(dim=(0, 2)), torch.zeros(32), rtol=0, atol=1e-3)
    # 240 frames use many of the 2016 entries at a spread of 0.9; a collapsed FSQ would use one.
    assert min(len(codebook.unique()) for codebook in tokens) >= 100


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
def test_initialization_from_data_keeps_frozen_weights(frozen):
    parts = build_parts(codec_config("two_stages"))
    parts.named()[f"audio_{frozen}"].requires_grad_(False)
    first = {name: copy.deepcopy(part.state_dict()) for name, part in parts.named().items()}
    initialize_from_data(*parts.named().values(), torch.from_numpy(synthesize(1.0)[: 16 * 1024])[None])
    for name in ("audio_encoder", "audio_decoder"):
        state = parts.named()[name].state_dict()
        assert all(torch.equal(state[key], first[name][key]) for key in state) == (name == f"audio_{frozen}")


def test_initialization_leaves_no_hook_behind():
    codec = build_codec()
    for part in (codec.encoder, codec.decoder):
        assert not any(module._forward_hooks for module in part.modules())


def test_spread_loss_penalizes_constant_or_uncentered_dimensions():
    wide = torch.randn(2, 3, 400, generator=torch.Generator().manual_seed(0))
    wide = (wide - wide.mean(dim=(0, 2), keepdim=True)) / wide.std(dim=(0, 2), keepdim=True)
    assert losses.spread(wide) == pytest.approx(0, abs=1e-5)
    assert losses.spread(wide * 0.3) == pytest.approx(0.5, abs=1e-5)
    assert losses.spread(wide + 2) == pytest.approx(4, abs=1e-4)


@pytest.mark.parametrize(("kernel_size", "stride"), [((5, 1), (3, 1)), ((3, 9), (1, 2))])
@pytest.mark.parametrize("pad_mode", ["reflect", "zeros"])
def test_discriminator_convolutions_pad_as_configured(kernel_size, stride, pad_mode):
    torch.manual_seed(0)
    layer = Conv2d(4, 6, kernel_size, stride, pad_mode=pad_mode).double()
    view = torch.randn(2, 4, 21, 14, dtype=torch.float64)
    rows, columns = layer.conv.padding
    padded = F.pad(view, (columns, columns, rows, rows), mode={"zeros": "constant"}.get(pad_mode, pad_mode))
    expected = F.conv2d(padded, layer.conv.weight, layer.conv.bias, stride)
    torch.testing.assert_close(layer(view), expected, rtol=1e-10, atol=1e-10)


def test_discriminators_refuse_other_paddings():
    with pytest.raises(ConfigError, match="circular"):
        MultiPeriodDiscriminator(pad_mode="circular")
