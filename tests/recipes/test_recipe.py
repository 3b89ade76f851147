"""Tests of the parts of the bundled codec's recipe: losses, initialization, batches and optimizers."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from nemo_lfr.signal.spectra import Spectra
from recipes.bundled_codec.data import AugmentConfig, SpeechSegments
from recipes.bundled_codec.losses import (
    PITCH_LAGS,
    PITCH_WINDOW,
    IntelligibilityDistance,
    LogMelDistance,
    LossConfig,
    PerceptualDistance,
    ReconstructionTerms,
    compressed_distance,
    normalized_difference,
    periodicity_distance,
    waveform_distance,
)
from recipes.bundled_codec.model import DecoderConfig, EncoderConfig, Generator, NetworkConfig, QuantizerConfig
from recipes.bundled_codec.optimizer import GeneratorOptimizer, Muon
from recipes.bundled_codec.precision import compute_dtype
from recipes.bundled_codec.start import (
    inverse_filters,
    looks_linear_,
    mdct_basis,
    signal_channels,
    stage_filters,
    transform_start_,
)
from tests.models import RATE, speech_like


def tiny_network() -> NetworkConfig:
    """Return a network like the recipe's with two stages and few channels: 8 dimensions at 689 Hz, a 2,756 Hz band."""
    return NetworkConfig(
        EncoderConfig(8, [4, 8], 4, [3], [1]), QuantizerConfig(2), DecoderConfig(8, [8, 4], 16, [3], [1])
    )


SPEECH = torch.stack([speech_like(8192, seed) for seed in range(2)])
log_mel_distance = functools.cache(lambda: LogMelDistance([256, 512], [20, 40]))  # imports librosa
perceptual_distance = functools.cache(PerceptualDistance)


def log_mel(real: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    return log_mel_distance()(Spectra(real), Spectra(gen))


def compressed(real: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    return compressed_distance(Spectra(real), Spectra(gen), [1024, 2048])


def symmetric(real: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    return perceptual_distance()(Spectra(real), Spectra(gen))[0]


def asymmetric(real: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    return perceptual_distance()(Spectra(real), Spectra(gen))[1]


def intelligibility(real: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    return IntelligibilityDistance()(Spectra(real), Spectra(gen))


DISTANCES = [log_mel, compressed, symmetric, asymmetric, waveform_distance, periodicity_distance, intelligibility]


def noise(scale: float) -> torch.Tensor:
    return scale * torch.randn(SPEECH.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_distance_is_least_for_equal_signals_and_grows_with_noise(distance):
    values = [float(distance(SPEECH, SPEECH + noise(scale))) for scale in (0, 0.01, 0.1)]
    assert values[0] < 0.02  # not 0: the P.862-like distance adds a constant before its square root
    assert values == sorted(values) and values[2] > values[0] + 0.1


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("gen", [torch.zeros_like(SPEECH), SPEECH, noise(1.0)], ids=["silence", "equal", "noise"])
@pytest.mark.parametrize("real", [torch.zeros_like(SPEECH), SPEECH], ids=["silence", "speech"])
def test_a_distances_gradient_is_finite(distance, real, gen):
    gen = gen.clone().requires_grad_()
    value = distance(real, gen)
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, gen)
    assert gradient.isfinite().all()


def test_the_waveform_distance_alone_sees_a_phase_that_is_wrong():
    time = torch.arange(8192)[None] / RATE
    fade = 0.3 * torch.hann_window(8192)  # the STFT reflects the ends, where phase would matter
    real, shifted = (fade * torch.sin(2 * torch.pi * 200 * time + phase) for phase in (0.0, torch.pi / 2))
    assert float(waveform_distance(real, shifted)) > 0.5
    assert float(log_mel(real, shifted)) < 0.05 and float(compressed(real, shifted)) < 0.02


def test_the_waveform_distance_does_not_look_above_its_bands():
    time = torch.arange(8192)[None] / RATE
    fade = 0.3 * torch.hann_window(8192)  # the abrupt end of a tone would contain all frequencies
    real, high = (fade * torch.sin(2 * torch.pi * hertz * time) for hertz in (200.0, 5000.0))
    assert float(waveform_distance(real, real + high)) < 0.02


def voice(f0: float, harmonics: int = 20) -> torch.Tensor:
    time = torch.arange(16384)[None] / RATE
    return sum(torch.sin(2 * torch.pi * f0 * k * time + k * k) for k in range(1, harmonics)) / 20


def test_the_periodicity_distance_depends_on_pitch_and_noise_but_not_on_phase_or_level():
    real = voice(150.0)
    shifted = voice(150.0).roll(40, 1) * 0.3
    noisy = real + 0.5 * real.std() * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    values = [float(periodicity_distance(real, gen)) for gen in (shifted, voice(151.0), voice(180.0), noisy)]
    assert values[0] < 0.02 < values[1] < values[2]
    assert values[3] > 0.1


def test_the_periodicity_is_that_of_yin():
    low, high = PITCH_LAGS
    audio = voice(150.0)[:, : PITCH_WINDOW + high]
    frame = audio[0].double()
    window = frame[:PITCH_WINDOW]
    differences = [float((window - frame[lag : lag + PITCH_WINDOW]).square().sum()) for lag in range(1, high + 1)]
    expected = [value * lag / sum(differences[:lag]) for lag, value in enumerate(differences, start=1)]
    found, energies = normalized_difference(audio)
    np.testing.assert_allclose(found[0, 0], expected[low - 1 :], atol=2e-3)
    assert float(energies) == pytest.approx(float(window.square().sum()), rel=1e-4)


def test_the_compressed_distance_sees_harmonics_that_mel_bands_do_not():
    # 40 mel bands up to 11 kHz are 500 Hz wide at 5 kHz, so harmonics of 150 Hz look like noise of the same energy.
    time = torch.arange(16384)[None] / RATE
    harmonics = sum(torch.sin(2 * torch.pi * 150 * k * time + k * k) for k in range(30, 38)) / 30
    spectrum = torch.fft.rfft(torch.randn(harmonics.shape, generator=torch.Generator().manual_seed(1)))
    hertz = torch.fft.rfftfreq(16384, 1 / RATE)
    band = torch.fft.irfft(spectrum * ((hertz > 4425) & (hertz < 5625)))
    band = band * harmonics.norm() / band.norm()
    shifted = sum(torch.sin(2 * torch.pi * 150 * k * time + 2 * k * k) for k in range(30, 38)) / 30
    assert float(compressed(harmonics, band)) > 4 * float(compressed(harmonics, shifted))


def test_the_log_mel_floor_hides_what_is_below_it():
    assert (
        float(log_mel(torch.zeros_like(SPEECH), noise(1e-6)))
        < 1e-4
        < float(log_mel(torch.zeros_like(SPEECH), noise(1e-3)))
    )


def test_the_perceptual_distance_does_not_depend_on_level():
    gen = SPEECH + noise(0.05)
    for distance in (symmetric, asymmetric):
        assert float(distance(0.1 * SPEECH, 0.1 * gen)) == pytest.approx(float(distance(SPEECH, gen)), rel=1e-3)


def test_the_asymmetric_disturbance_is_of_what_was_added():
    spectrum, hertz = torch.fft.rfft(SPEECH), torch.fft.rfftfreq(SPEECH.shape[1], 1 / RATE)
    muffled = torch.fft.irfft(spectrum * (hertz < 1500))
    assert float(asymmetric(muffled, SPEECH)) > 10 * float(asymmetric(SPEECH, muffled))


def test_terms_add_up_by_their_weights():
    names = ("log_mel", "compressed", "symmetric", "asymmetric", "waveform", "periodicity", "intelligibility")
    config = LossConfig([256], [20], [1024], **{name: weight for weight, name in enumerate(names, start=1)})
    terms = ReconstructionTerms(config)
    values = terms(Spectra(SPEECH), Spectra(SPEECH + noise(0.1)))
    expected = sum(weight * float(values[name]) for weight, name in enumerate(names, start=1))
    assert float(terms.total(values)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_the_mdct_is_orthonormal_when_lapped(stride):
    basis = mdct_basis(stride)
    assert torch.allclose(basis @ basis.T, torch.eye(stride), atol=1e-5)
    shifted = basis[:, stride:] @ basis[:, :stride].T  # with the basis of the next frame
    assert shifted.abs().max() < 1e-5


@pytest.mark.parametrize(("before", "after", "stride"), [(1, 8, 8), (4, 32, 8), (1, 4, 4)])
def test_a_stage_that_keeps_every_band_is_undone_exactly(before, after, stride):
    signal = torch.randn(1, before, 20 * stride)
    analysis, synthesis = stage_filters(stride, before, after), inverse_filters(stride, after, before)
    hidden = nn.functional.conv1d(signal, analysis, stride=stride, padding=stride // 2)
    output = nn.functional.conv_transpose1d(hidden, synthesis.transpose(0, 1), stride=stride, padding=stride // 2)
    inner = slice(2 * stride, -2 * stride)
    assert torch.allclose(output[..., inner], signal[..., inner], atol=1e-5)


@pytest.mark.parametrize(
    ("rates", "encoded_dim", "expected"),
    [((4, 4, 8, 8), 32, [1, 1, 1, 4, 32]), ((2, 2, 4, 8, 8), 32, [1, 1, 1, 1, 4, 32]), ((4, 8), 8, [1, 1, 8])],
)
def test_the_number_of_signal_channels_follows_from_the_bandwidth(rates, encoded_dim, expected):
    assert signal_channels(rates, encoded_dim) == expected


@torch.no_grad()
def test_looks_linear_makes_the_network_linear():
    torch.manual_seed(0)
    generator = Generator(tiny_network())
    looks_linear_(generator)
    first, second = SPEECH[:1, :2048], SPEECH[1:, :2048]
    encode = generator.audio_encoder.encode_frames
    assert encode(first).abs().max() > 1e-3
    torch.testing.assert_close(encode(2 * first - 3 * second), 2 * encode(first) - 3 * encode(second))
    encoded = [encode(first), encode(second)]

    def decode(hidden):
        return torch.atanh(generator.audio_decoder.decode_frames(hidden))  # inverse of the tanh at the output

    small = [1e-2 * hidden for hidden in encoded]
    torch.testing.assert_close(decode(small[0] + small[1]), decode(small[0]) + decode(small[1]), rtol=1e-3, atol=1e-6)


def test_the_transform_start_sends_a_waveform_through_the_tokens():
    torch.manual_seed(0)
    generator = Generator(tiny_network())
    snr = transform_start_(generator, SPEECH)
    # Most of the energy of the signal is in the band. Energy above the band and the rounding to tokens are errors.
    assert snr > 1
    with torch.no_grad():
        output, encoded, tokens = generator(SPEECH)
    error = (output - SPEECH).square().sum() / SPEECH.square().sum()
    assert -10 * torch.log10(error).item() == pytest.approx(snr, abs=0.01)
    assert encoded.mean(dim=(0, 2)).abs().max() < 0.01 and (encoded.std(dim=(0, 2)) - 0.9).abs().max() < 0.01
    assert min(codebook.unique().numel() for codebook in tokens) > 100


@pytest.mark.slow
def test_the_bundled_network_can_hold_the_transform_start():
    torch.manual_seed(0)
    assert transform_start_(Generator(NetworkConfig()), SPEECH) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_encoder": {"down_sample_rates": [8, 3]}, "audio_decoder": {"up_sample_rates": [3, 8]}}, "strides"),
        ({"audio_decoder": {"up_sample_rates": [4, 8]}}, "reversed"),
        ({"audio_encoder": {"base_channels": 2}}, "base_channels"),
    ],
)
def test_a_network_that_cannot_hold_the_filter_bank_is_refused(change, message):
    network = tiny_network()
    for module, values in change.items():
        vars(getattr(network, module)).update(values)
    with pytest.raises(ValueError, match=message):
        transform_start_(Generator(network), SPEECH)


@pytest.mark.parametrize("augment", [None, AugmentConfig()], ids=["plain", "augmented"])
def test_a_batch_depends_on_its_seed_alone_and_never_clips(augment):
    clips = [(30000 * np.sin(np.arange(length) / 7)).astype(np.int16) for length in (3000, 9000, 500)]
    segments = SpeechSegments(clips, 1024, torch.device("cpu"), augment)
    batches = [segments.batch(64, seed) for seed in ([0, 1], [0, 2], [0, 1])]
    assert torch.equal(batches[0], batches[2]) and not torch.equal(batches[0], batches[1])
    assert batches[0].shape == (64, 1024) and 0.9 < batches[0].abs().max() <= 0.981
    shares = np.bincount(segments.draw(2000, [5]).utterances) / 2000
    assert shares == pytest.approx([3000 / 12500, 9000 / 12500, 500 / 12500], abs=0.04)


def test_a_plain_segment_is_the_recording_times_a_gain():
    clip = np.random.default_rng(0).integers(-9999, 9999, 5000).astype(np.int16)
    segments = SpeechSegments([clip], 1024, torch.device("cpu"))
    draw = segments.draw(8, [3])
    for start, segment in zip(draw.starts, segments.cut(draw), strict=True):
        recorded = torch.from_numpy(clip[start : start + 1024] / 32768).float()
        gain = segment.norm() / recorded.norm()
        torch.testing.assert_close(segment, gain * recorded)


def test_augmentation_changes_the_pitch_and_the_level_of_a_tone():
    hertz = 1000.0
    clip = (3000 * np.sin(2 * np.pi * hertz * np.arange(3 * RATE) / RATE)).astype(np.int16)
    segments = SpeechSegments([clip], 8192, torch.device("cpu"), AugmentConfig(speed=1.3, equalizer_db=6.0))
    draw = segments.draw(20, [0])
    speeds = draw.sizes / segments.full_length
    assert speeds.min() < 0.85 and speeds.max() > 1.15 and draw.gains.min() < 0 < draw.gains.max()
    time = np.arange(8192) / RATE
    levels = []
    for speed, gain, segment in zip(speeds, draw.gains, segments.cut(draw).numpy(), strict=True):
        tone = np.exp(2j * np.pi * hertz * speed * time)
        # Half of the amplitude in each half of the segment, so that its ends do not differ from its middle.
        halves = [2 * abs((segment * tone)[part].mean()) for part in (slice(None, 4096), slice(4096, None))]
        assert halves[0] == pytest.approx(halves[1], rel=0.02)
        remainder = segment - 2 * ((segment * tone.conj()).mean() * tone).real
        assert np.abs(remainder).max() < 0.03 * halves[0]  # no other frequency, and no step at an end
        levels.append(20 * np.log10(halves[0] / abs(gain) / (3000 / 32768)))
    assert -6 <= min(levels) < -1 and 1 < max(levels) <= 6


def test_a_recording_shorter_than_a_segment_is_padded():
    segments = SpeechSegments([np.full(100, 9999, np.int16)], 1024, torch.device("cpu"), AugmentConfig())
    assert segments.batch(4, [0])[:, 300:].abs().max() < 0.1 * segments.batch(4, [0]).abs().max()


def test_the_intelligibility_distance_agrees_with_estoi():
    stoi = pytest.importorskip("pystoi").stoi
    real = speech_like(3 * RATE, 0)
    for scale in (0.02, 0.1, 0.3):
        gen = real + scale * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
        expected = stoi(real.numpy(), gen.numpy(), RATE, extended=True)
        assert 1 - float(intelligibility(real[None], gen[None])) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "expected"),
    [
        ("auto", "cpu", False, torch.float32),
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cuda", False, torch.bfloat16),
        ("fp32", "cpu", True, torch.float32),
        ("fp32", "cuda", False, torch.float32),
        ("bf16", "cpu", False, torch.bfloat16),
    ],
)
def test_auto_computes_in_bf16_only_where_the_device_has_instructions_for_it(
    monkeypatch, precision, device, has_bf16, expected
):
    monkeypatch.setattr("recipes.bundled_codec.precision.has_bf16", lambda: has_bf16)
    assert compute_dtype(precision, torch.device(device)) == expected


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'fp16'; pass auto, bf16 or fp32"):
        compute_dtype("fp16", torch.device("cpu"))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch older than 2.9 has no Muon to compare with")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_updates_as_torchs_does(dtype):
    torch.manual_seed(0)
    ours = [torch.randn(shape) for shape in ((8, 24), (8, 24), (24, 6), (5, 5))]
    theirs = [nn.Parameter(matrix.clone()) for matrix in ours]
    reference = torch.optim.Muon(theirs, lr=0.1, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    muon = Muon(ours, dtype=dtype)
    for _ in range(3):
        before = [matrix.clone() for matrix in ours]
        grads = [torch.randn_like(matrix) for matrix in ours]
        for matrix, grad in zip(theirs, grads, strict=True):
            matrix.grad = grad.clone()
        reference.step()
        muon.step(grads, torch.tensor(0.1))
        for matrix, old, expected in zip(ours, before, theirs, strict=True):
            moved = (matrix - old).norm()
            assert (matrix - expected.detach()).norm() < 0.05 * moved  # torch computes in bf16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_move_no_parameter(bad):
    generator = Generator(tiny_network())
    optimizer = GeneratorOptimizer(list(generator.parameters()))
    before = [parameter.detach().clone() for parameter in generator.parameters()]
    grads = [torch.ones_like(parameter) for parameter in generator.parameters()]
    grads[3][0] = bad
    optimizer.set_rate(0.1)
    optimizer.step(grads)
    assert all(torch.equal(old, new) for old, new in zip(before, generator.parameters(), strict=True))
    optimizer.set_rate(0.1)
    optimizer.step([torch.ones_like(grad) for grad in grads])
    assert all(new.isfinite().all() for new in generator.parameters())
    assert not torch.equal(before[0], next(generator.parameters()))
