"""Tests of the bundled codec's recipe with tiny networks: resuming, importing, exporting and user errors."""

import json
import math
import os
import re
import sys

import numpy as np
import pytest
import soundfile
import torch

from nemo_lfr.evaluation.metrics import Signal
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.pretrained import load
from recipes.bundled_codec import evaluate, export, plot, train
from recipes.bundled_codec.data import read_speech
from recipes.bundled_codec.settings import Settings, read_settings
from recipes.bundled_codec.states import import_trial, load_state, read_generator
from tests.models import RATE, synthesize
from tests.tiers import slow_after, slow_except

TINY = [
    "network.audio_encoder={encoded_dim: 8, down_sample_rates: [4, 8], base_channels: 4, "
    "resblock_kernel_sizes: [3], resblock_dilation_sizes: [1]}",
    "network.vector_quantizer.num_groups=2",
    "network.audio_decoder={input_dim: 8, up_sample_rates: [8, 4], base_channels: 16, "
    "resblock_kernel_sizes: [3], resblock_dilation_sizes: [1]}",
    "losses={windows: [256], num_mels: [20], compressed_windows: [1024]}",
    "batch_size=2",
    "segment_frames=128",
    "start_segments=2",
    "warmup_updates=2",
    "evaluate_updates=2",
    "evaluate_clips=2",
    "evaluate_seconds=1",
    "log_updates=1",
    "updates=4",
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    lines = []
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", synthesize(1.2, number), RATE)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "duration": 1.2}))
    (folder / "manifest.json").write_text("\n".join(lines))
    return folder / "manifest.json"


def settings_of(manifest, out, *overrides: str) -> Settings:
    out.mkdir(exist_ok=True)
    return read_settings(overrides=[f"train={manifest}", f"valid={manifest}", f"out={out}", *TINY, *overrides])


def run_of(settings: Settings, manifest, state=None) -> train.Run:
    clips = read_speech(manifest)
    return train.Run(settings, clips, clips[:2], state)


def command(monkeypatch, module, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def weights(run: train.Run) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in (("generator", run.generator), ("average", run.average))
        for key, value in module.state_dict().items()
    }


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


WITH_DISCRIMINATORS = ["discriminators={from_update: 1, learn_alone: 1, ramp: 2, batch_size: 1, period_channels: 2}"]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", slow_after(1, [[], WITH_DISCRIMINATORS]), ids=["spectra", "discriminators"])
@pytest.mark.parametrize("stop", slow_except([1, 2, 3], 2))
def test_resumed_run_makes_the_same_updates(manifest, tmp_path, overrides, stop):
    settings = settings_of(manifest, tmp_path / "run", *overrides)
    whole = run_of(settings, manifest)
    whole_terms = [whole.update() for _ in range(4)]
    killed = run_of(settings, manifest)
    for _ in range(stop):
        killed.update()
    killed.save()
    killed.update()  # not saved
    resumed = run_of(settings, manifest, load_state(tmp_path / "run" / "state.pt"))
    assert resumed.step == stop
    for number in range(stop, 4):
        terms = resumed.update()
        assert float(terms["log_mel"]) == float(whole_terms[number]["log_mel"])
    assert_equal(weights(whole), weights(resumed))


@pytest.mark.slow
def test_discriminators_learn_alone_then_their_score_counts_more_and_more(manifest, tmp_path):
    run = run_of(settings_of(manifest, tmp_path / "run", *WITH_DISCRIMINATORS), manifest)
    terms = [run.update() for _ in range(4)]
    assert ["discriminator" in term for term in terms] == [False, True, True, True]
    assert ["adversarial_share" in term for term in terms] == [False, False, True, True]
    assert float(run.trainer.adversary.score_weight) == 0.5  # one of the ramp's two updates is done
    assert float(run.trainer.adversary.lr) == pytest.approx(1e-3)
    full = run.settings.lr * (1 - 0.95 * 4 / 4)
    assert run.learning_rate() == pytest.approx(0.5 * full)


OWN = "tests.own_components."
WITH_COMPONENTS = [
    "discriminators={from_update: 1, learn_alone: 1, period_channels: 0, "
    f"custom: [{{_target_: {OWN}WaveDiscriminator}}]}}",
    f"losses.custom.envelope={{_target_: {OWN}EnvelopeLoss, scale: 2.0}}",
    f"metrics.snr={{_target_: {OWN}SignalToNoise}}",
]


@pytest.mark.slow
def test_custom_components_train_and_are_saved(manifest, tmp_path):
    settings = settings_of(manifest, tmp_path / "run", *WITH_COMPONENTS)
    run = run_of(settings, manifest)
    run.train()
    assert "discriminators.1.conv.weight" in run.trainer.adversary.module.state_dict()
    line = json.loads((tmp_path / "run" / "curve.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["snr"]) and line["training"]["envelope"] > 0
    again = run_of(settings, manifest, load_state(tmp_path / "run" / "state.pt"))
    assert_equal(run.trainer.adversary.module.state_dict(), again.trainer.adversary.module.state_dict())
    without = run_of(settings_of(manifest, tmp_path / "without"), manifest)
    for _ in range(4):
        without.update()
    assert not torch.equal(*(next(other.generator.audio_decoder.parameters()) for other in (run, without)))


@pytest.mark.slow
def test_losses_fall(manifest, tmp_path):
    run = run_of(settings_of(manifest, tmp_path / "run", "updates=30"), manifest)
    totals = [float(run.trainer.terms.total(run.update())) for _ in range(30)]
    assert np.mean(totals[-5:]) < 0.9 * np.mean(totals[:5])


def test_the_rate_warms_up_and_falls_by_updates_or_time(manifest, tmp_path):
    run = run_of(settings_of(manifest, tmp_path / "run", "updates=100", "minutes=10", "lr=1e-3"), manifest)
    assert run.learning_rate() == pytest.approx(0.5e-3)
    run.step = 50
    assert run.learning_rate() == pytest.approx(1e-3 * (1 - 0.95 * 0.5))
    run.seconds = 9 * 60
    assert run.learning_rate() == pytest.approx(1e-3 * (1 - 0.95 * 0.9))


@pytest.mark.slow
def test_the_command_trains_resumes_evaluates_plots_and_exports(manifest, tmp_path, monkeypatch, capsys, caplog):
    out = tmp_path / "run"
    arguments = [f"train={manifest}", f"valid={manifest}", f"out={out}", *TINY]
    command(monkeypatch, train, *arguments, "updates=3")
    (out / "curve.jsonl").open("a").write(json.dumps({"step": 9}) + "\n")  # made after the last save
    command(monkeypatch, train, *arguments)
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [2, 3, 4]
    assert set(evaluate.METRICS) | {"minutes", "seconds_per_update", "parts", "training"} <= set(curve[-1])
    assert set(curve[-1]["parts"]) == {"network", "losses", "optimizer"}
    assert "log_mel" in curve[-1]["training"] and (out / "settings.yaml").exists()

    command(monkeypatch, export, out / "state.pt", "--out", tmp_path / "small.nemo")
    codec = load(tmp_path / "small.nemo", "cpu")
    wave = synthesize(0.5)
    average, network, updates = read_generator(out / "state.pt")
    assert updates == 4 and read_generator(tmp_path / "small.nemo")[1] == network
    with torch.no_grad():
        audio = torch.from_numpy(wave)[None, : 32 * (len(wave) // 32)]
        tokens = average(audio)[2].transpose(0, 1)
    found, _ = codec.encode(audio[0].numpy())
    assert (found == tokens).float().mean() > 0.97  # weights are rounded to fp16

    command(monkeypatch, plot, out, "--out", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    command(monkeypatch, evaluate, out / "state.pt", tmp_path / "small.nemo", "--valid", manifest, "--clips", 2)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and table[0].startswith("| model | pesq | estoi |")


@pytest.mark.parametrize("value", [math.nan, 1e6])
def test_weights_that_fp16_cannot_store_are_not_exported(manifest, tmp_path, value):
    run = run_of(settings_of(manifest, tmp_path), manifest)
    with torch.no_grad():
        next(iter(run.average.parameters())).fill_(value)
    with pytest.raises(ValueError, match=r"weight \S+ has values that are NaN or outside the range of fp16"):
        export.export(run.average, run.settings.network, tmp_path / "small.nemo")


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_after(1, ["small.nemo", "state.pt"]))
def test_a_run_may_start_with_other_weights(manifest, tmp_path, monkeypatch, kind):
    first = run_of(settings_of(manifest, tmp_path / "first"), manifest)
    first.update()
    first.save()
    if kind == "small.nemo":
        command(monkeypatch, export, tmp_path / "first" / "state.pt", "--out", tmp_path / "first" / kind)
    run = run_of(settings_of(manifest, tmp_path / "second", f"init={tmp_path / 'first' / kind}"), manifest)
    assert run.step == 0
    for key, value in first.average.state_dict().items():
        found = run.generator.state_dict()[key]
        torch.testing.assert_close(found, value, rtol=2e-3, atol=2e-3)  # fp16, as direction and gain


def trial_state(run: train.Run) -> dict:
    """Return the state of a run in the form in which the older training script wrote it."""
    settings, network = run.settings, run.settings.network
    args = {
        "enc": network.audio_encoder.base_channels,
        "enc_rates": tuple(network.audio_encoder.down_sample_rates),
        "enc_kernels": tuple(network.audio_encoder.resblock_kernel_sizes),
        "enc_dil": tuple(network.audio_encoder.resblock_dilation_sizes),
        "dec": network.audio_decoder.base_channels,
        "dec_rates": tuple(network.audio_decoder.up_sample_rates),
        "dec_kernels": tuple(network.audio_decoder.resblock_kernel_sizes),
        "dec_dil": tuple(network.audio_decoder.resblock_dilation_sizes),
        "act": "lrelu",
    }
    args |= {"seed": settings.seed, "batch": settings.batch_size, "frames": settings.segment_frames}
    args |= {"lr": settings.lr, "end": settings.final_lr, "steps": settings.updates}
    args |= {"windows": tuple(settings.losses.windows), "mels": tuple(settings.losses.num_mels)}
    args |= {"comp_windows": tuple(settings.losses.compressed_windows), "w_mel": settings.losses.log_mel}
    args |= {"w_comp": 5.0, "w_pesq": 1.0, "w_wave": 0.3}
    optimizer = run.trainer.state_dict()["optimizer"]
    return {
        "args": args,
        "model": run.generator.state_dict(),
        "average": run.average.state_dict(),
        "moments": optimizer["moments"],
        "adam": optimizer["adam"],
        "step": run.step,
        "seconds": run.seconds,
        "next_eval": 1200.0,
    }


def bundled_sizes(overrides: list[str]) -> list[str]:
    """Return settings with 32 encoded dimensions, as in the older script, for two stages with few channels."""
    return [
        *overrides,
        "network.audio_encoder={encoded_dim: 32, base_channels: 16}",
        "network.vector_quantizer.num_groups=8",
        "network.audio_decoder={input_dim: 32, base_channels: 64}",
    ]


@pytest.mark.slow
def test_state_of_the_older_script_resumes_with_the_same_updates(manifest, tmp_path):
    settings = settings_of(manifest, tmp_path / "run", *bundled_sizes([]))
    run = run_of(settings, manifest)
    run.update()
    torch.save(trial_state(run), tmp_path / "trial.pt")
    imported, differences = import_trial(tmp_path / "trial.pt", settings.as_dict())
    assert not differences
    other = run_of(settings, manifest, imported)
    for _ in range(2):
        run.update(), other.update()
    assert_equal(weights(run), weights(other))


def test_a_state_of_another_format_is_refused_with_both_remedies(manifest, tmp_path):
    settings = settings_of(manifest, tmp_path / "run", *bundled_sizes([]))
    path = tmp_path / "run" / "state.pt"
    torch.save({"format": "trial"}, path)
    with pytest.raises(ValueError, match=r"set `out` to a different folder\. .* pass --import-state .*state\.pt\."):
        train._read_state(settings, None)
    with pytest.raises(ValueError, match=r"already exists; remove --import-state to resume, or set `out` to"):
        train._read_state(settings, path)


@pytest.mark.slow
def test_importing_names_the_settings_that_differ(manifest, tmp_path):
    settings = settings_of(manifest, tmp_path / "run", *bundled_sizes([]))
    torch.save(trial_state(run_of(settings, manifest)), tmp_path / "trial.pt")
    settings.lr, settings.losses.waveform = 1e-3, 1.0
    _, differences = import_trial(tmp_path / "trial.pt", settings.as_dict())
    assert differences == [
        "lr is 0.001, but was 0.002 in the imported run",
        "losses.waveform is 1.0, but was 0.3 in the imported run",
    ]
    settings.network.audio_encoder.base_channels = 32
    with pytest.raises(ValueError, match="another network"):
        import_trial(tmp_path / "trial.pt", settings.as_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["valid=x.json", "out=OUT"], "no value for train"),
        (["train=x.json", "valid=x.json", "out=OUT", "learning_rate=1"], "learning_rate"),
        (["train=x.json", "valid=x.json", "out=OUT", "updates=many"], "updates|many"),
        (["train=x.json", "valid=x.json", "out=OUT", "batch_size=0"], "batch_size is 0"),
        (["train=nowhere.json", "valid=x.json", "out=OUT"], "nowhere.json"),
        (["train=MANIFEST", "valid=MANIFEST", "out=OUT", "init=nowhere.nemo"], "nowhere.nemo"),
        (["train=MANIFEST", "valid=MANIFEST", "out=OUT", "--import-state", "nowhere.pt"], "nowhere.pt"),
        (
            ["train=MANIFEST", "valid=MANIFEST", "out=OUT", "--import-state", "MANIFEST"],
            "manifest.json: not a training state",
        ),
        (["train=EMPTY", "valid=MANIFEST", "out=OUT"], "EMPTY|empty.json"),
        (["train=x.json", "valid=x.json", "out=OUT", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["train=x.json", "valid=x.json", "out=OUT", "metrics.a={_target_: no.A}"],
            "metrics.a: .* cannot be imported",
        ),
        (
            ["train=MANIFEST", "valid=MANIFEST", "out=OUT", "discriminators.custom=[{_target_: tests.crash.ROOT}]"],
            "discriminator: .* pass a subclass",
        ),
        (
            ["train=MANIFEST", "valid=MANIFEST", "out=OUT", f"discriminators.custom=[{{_target_: {OWN}Scoreless}}]"],
            "Scoreless does not define score",
        ),
    ],
)
def test_a_user_error_is_reported_in_one_line(manifest, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty.json").write_text("")
    places = {"OUT": tmp_path, "MANIFEST": manifest, "EMPTY": tmp_path / "empty.json"}
    values = arguments
    for name, place in places.items():
        values = [text.replace(name, str(place)) for text in values]
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, train, *TINY, *values)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error.splitlines()[-1]) and "Traceback" not in error


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (plot, ["nowhere", "--out", "curve.png"], "nowhere"),
        (plot, ["empty.json", "--out", "curve.png"], "no evaluations"),
        (plot, ["bad.json", "--out", "curve.png"], "not in JSON lines"),
        (export, ["nowhere.pt", "--out", "a.nemo"], "nowhere.pt"),
        (export, ["bad.json", "--out", "a.nemo"], "not a training state"),
        (evaluate, ["nowhere.nemo", "--valid", "MANIFEST"], "nowhere.nemo"),
        (evaluate, ["bad.json", "--valid", "empty.json"], "no usable recordings"),
    ],
)
def test_a_user_error_of_another_command_is_reported_in_one_line(
    manifest, tmp_path, monkeypatch, capsys, module, arguments, message
):
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "bad.json").write_text("not JSON")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, module, *[text.replace("MANIFEST", str(manifest)) for text in arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "empty.json"]


@pytest.mark.slow
def test_finished_run_is_reported_and_unchanged(manifest, tmp_path, caplog):
    settings = settings_of(manifest, tmp_path / "run", "updates=1")
    run = run_of(settings, manifest)
    run.update()
    before = weights(run)
    with caplog.at_level("INFO"):
        run.train()
    assert "complete at update 1" in caplog.text and run.step == 1
    assert_equal(before, weights(run))


@pytest.mark.skipif(os.name == "nt", reason="folders have no locks")
def test_a_second_run_in_the_same_folder_is_refused(manifest, tmp_path, monkeypatch, capsys):
    with exclusive(tmp_path), pytest.raises(SystemExit):
        command(monkeypatch, train, *TINY, f"train={manifest}", f"valid={manifest}", f"out={tmp_path}")
    assert f"{tmp_path}: another run is writing to this folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_of_another_network_is_not_continued(manifest, tmp_path, monkeypatch, capsys):
    run_of(settings_of(manifest, tmp_path), manifest).save()
    with pytest.raises(SystemExit):
        command(
            monkeypatch, train, f"train={manifest}", f"valid={manifest}", f"out={tmp_path}", *TINY,
            "network.audio_decoder.base_channels=32",
        )  # fmt: skip
    assert "another network" in capsys.readouterr().err


@pytest.mark.slow
def test_pitch_within_50_cents_is_counted_over_the_originals_voiced_frames():
    time = np.arange(RATE) / RATE

    def tone(hertz: float, until: float = 1.0) -> Signal:
        wave = sum(np.sin(2 * np.pi * k * hertz * time) / k for k in range(1, 8)) * 0.1
        return Signal((wave * (time < until)).astype(np.float32), RATE)

    original = tone(150)
    assert evaluate.within_cents(original, tone(150 * 2 ** (30 / 1200))) > 95
    assert evaluate.within_cents(original, tone(150 * 2 ** (80 / 1200))) < 5
    assert 35 < evaluate.within_cents(original, tone(150, until=0.5)) < 65
    assert np.isnan(evaluate.within_cents(Signal(np.zeros(RATE, np.float32), RATE), original))
