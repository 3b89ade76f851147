"""Tests of metrics against NeMo and other libraries, and of their edge cases."""

import numpy as np
import pytest
import torch

from nemo_lfr.errors import AudioError
from nemo_lfr.evaluation import metrics
from nemo_lfr.evaluation.metrics import METRICS, NotMeasured, Signal, Undefined, measure
from tests.models import RATE, synthesize


@pytest.fixture(scope="module")
def speech():
    return synthesize(1.2, seed=3)


@pytest.fixture(scope="module")
def pair(speech):
    rng = np.random.default_rng(0)
    return Signal(speech, RATE), Signal(0.7 * speech + 0.02 * rng.standard_normal(len(speech)), RATE)


@pytest.mark.nemo
def test_distances_and_si_sdr_equal_nemos(pair):
    pytest.importorskip("nemo", reason="NeMo's losses are the reference: pip install '.[nemo]'")
    from nemo.collections.tts.losses.audio_codec_loss import (
        MultiResolutionMelLoss,
        MultiResolutionSTFTLoss,
        SISDRLoss,
    )

    resolutions = [list(resolution) for resolution in metrics.RESOLUTIONS]
    mel = MultiResolutionMelLoss(RATE, resolutions, list(metrics.MEL_DIMS), log_guard=1.0)
    stft = MultiResolutionSTFTLoss(resolutions, log_guard=1.0)
    real, gen = (torch.from_numpy(signal.wave)[None] for signal in pair)
    length = torch.tensor([real.shape[1]])
    arguments = {"audio_real": real, "audio_gen": gen, "audio_len": length}
    expected = {
        "mel distance": mel(**arguments)[0].item(),
        "STFT distance": stft(**arguments).item(),
        "SI-SDR": -SISDRLoss()(**arguments).item(),
    }
    assert measure(*pair, expected) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_si_sdr_equals_torchmetrics(pair):
    torchmetrics = pytest.importorskip("torchmetrics.functional.audio", reason="comes with NeMo")
    real, gen = (torch.from_numpy(signal.wave) for signal in pair)
    expected = torchmetrics.scale_invariant_signal_distortion_ratio(gen, real, zero_mean=True).item()
    assert measure(*pair, ["SI-SDR"])["SI-SDR"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_pesq_and_stoi_equal_their_reference_libraries(pair):
    from pesq import pesq
    from pystoi import stoi

    original, output = pair
    expected = {
        "PESQ-WB": pesq(16000, original.at_16k, output.at_16k, "wb"),
        "STOI": stoi(original.wave, output.wave, RATE),
        "ESTOI": stoi(original.wave, output.wave, RATE, extended=True),
    }
    assert measure(*pair, expected) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_identical_recordings_score_as_identical(speech):
    values = measure(Signal(speech, RATE), Signal(speech.copy(), RATE))
    assert values.keys() == METRICS.keys()
    assert values["PESQ-WB"] == pytest.approx(4.64, abs=0.005)
    assert values["STOI"] == pytest.approx(1) and values["ESTOI"] == pytest.approx(1)
    assert values["SI-SDR"] > 90
    for name in ("mel distance", "STFT distance", "F0 error", "voicing error", "lag"):
        assert values[name] == 0


@pytest.mark.slow
def test_a_delay_of_one_sample_lowers_only_si_sdr(speech):
    values = measure(Signal(speech[1:], RATE), Signal(speech[:-1], RATE))
    assert values["SI-SDR"] < 40
    assert values["PESQ-WB"] > 4.3 and values["ESTOI"] > 0.99 and values["lag"] == 0
    assert values["mel distance"] < 0.01


@pytest.mark.slow
def test_a_gain_raises_only_the_distances(speech):
    values = measure(Signal(speech, RATE), Signal(0.5 * speech, RATE))
    assert values["SI-SDR"] > 90 and values["PESQ-WB"] > 4.6 and values["ESTOI"] == pytest.approx(1)
    assert values["F0 error"] == 0
    assert values["mel distance"] > 0.01 and values["STFT distance"] > 0.01


@pytest.mark.parametrize("milliseconds", [20, -35])
def test_the_lag_is_found(speech, milliseconds):
    shift = milliseconds * RATE // 1000
    late = np.roll(speech, shift)
    assert measure(Signal(speech, RATE), Signal(late, RATE), ["lag"])["lag"] == pytest.approx(milliseconds, abs=0.6)


@pytest.mark.slow
def test_pitch_is_that_of_the_tone():
    time = np.arange(2 * RATE) / RATE
    low, high = (sum(np.sin(2 * np.pi * f0 * n * time) / n for n in range(1, 8)) / 4 for f0 in (110.0, 123.47))
    values = measure(Signal(low, RATE), Signal(high, RATE), ("F0 error", "voicing error"))
    assert values["F0 error"] == pytest.approx(200, abs=15)  # a whole tone is 200 cents
    assert values["voicing error"] < 5


@pytest.mark.slow
def test_silent_original_has_only_distances(speech):
    values = measure(Signal(np.zeros_like(speech), RATE), Signal(speech, RATE))
    for name in ("PESQ-WB", "STOI", "ESTOI", "SI-SDR", "F0 error", "lag"):
        assert isinstance(values[name], Undefined) and "not measured" not in values[name], name
    assert values["mel distance"] > 0 and values["STFT distance"] > 0


@pytest.mark.slow
def test_a_silent_output_is_not_rewarded(speech):
    values = measure(Signal(speech, RATE), Signal(np.zeros_like(speech), RATE))
    for name in ("SI-SDR", "PESQ-WB", "F0 error", "lag"):
        assert isinstance(values[name], Undefined), name
    assert values["mel distance"] > 0.01 and values["voicing error"] > 20
    assert isinstance(values["ESTOI"], NotMeasured) or values["ESTOI"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 100, 1024, 3000])
def test_clip_that_is_too_short_is_reported_as_not_measured(speech, samples):
    clip = Signal(speech[5000 : 5000 + samples], RATE)
    values = measure(clip, clip)
    assert isinstance(values["PESQ-WB"], Undefined) and isinstance(values["ESTOI"], Undefined)
    assert isinstance(values["mel distance"], Undefined) == (samples < 1025)


@pytest.mark.parametrize(
    ("wave", "text"),
    [
        (np.array([0.1, np.nan]), "NaN"),
        (np.array([0.1, np.inf]), "infinite"),
        (np.zeros(0), "one sample or more"),
        (np.zeros((2, 5)), "mono audio \\[T\\]"),
        (np.full(5, 20000.0), "divide by 32768"),
    ],
)
def test_invalid_audio_is_refused(wave, text):
    with pytest.raises(AudioError, match=text):
        Signal(wave, RATE)


def test_recordings_of_other_length_or_rate_are_refused(speech):
    for other in (Signal(speech[:-1], RATE), Signal(speech, 16000)):
        with pytest.raises(AudioError, match="but the output has"):
            measure(Signal(speech, RATE), other)


def test_a_missing_package_is_named_and_does_not_stop_the_evaluation(pair, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pesq", None)
    values = measure(*pair, ("PESQ-WB", "STOI"))
    assert "pesq" in values["PESQ-WB"] and "pip install" in values["PESQ-WB"]
    assert not isinstance(values["PESQ-WB"], Undefined) and isinstance(values["STOI"], float)


@pytest.mark.parametrize("value", [None, "good", b"x", 1j, np.zeros(2), [1.0], {}])
def test_a_metric_that_returns_no_number_is_not_measured(value):
    result = metrics.checked(value)
    assert isinstance(result, NotMeasured) and result.startswith("not measured: the metric returned ")


@pytest.mark.parametrize("value", [1, np.float32(0.5), torch.tensor(2.0), True])
def test_a_metric_may_return_any_real_number(value):
    assert type(metrics.checked(value)) is float
