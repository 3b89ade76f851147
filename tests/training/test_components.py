"""Tests of user-defined discriminators, losses and metrics: how they are found, built and checked."""

import sys

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from nemo_lfr.checkpoint.config import parse_config
from nemo_lfr.errors import ConfigError
from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training import components, discriminators, losses
from nemo_lfr.training.audio_discriminator import AudioDiscriminator
from nemo_lfr.training.components import AudioTerms, import_components, register_component, registered_components
from nemo_lfr.training.discriminators import build_discriminator
from nemo_lfr.training.losses import CodecLosses
from tests.models import MODULES, codec_config, speech_like
from tests.own_components import EnvelopeLoss, SignalToNoise, WaveDiscriminator

OWN = "tests.own_components."
BUILT_IN = {*discriminators.BUILT_IN, *losses.BUILT_IN}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Start each test with an empty registry."""
    monkeypatch.setattr(components, "_REGISTERED", {})
    return components._REGISTERED


def config_with(kind: str, target: str, **arguments):
    """Return a model config that uses one component."""
    section = {"_target_": target, **arguments}
    return codec_config(**{kind: {"mine": section} if kind in ("losses", "metrics") else section})


def imported(values):
    import_components(OmegaConf.create(values), BUILT_IN)
    return values


def audio(requires_grad: bool = False) -> Spectra:
    return Spectra(speech_like(2 * 4096).reshape(2, -1).requires_grad_(requires_grad))


def other_audio() -> Spectra:
    return Spectra(speech_like(2 * 4096, seed=1).reshape(2, -1).requires_grad_())


def losses_of(values) -> CodecLosses:
    built_in = {"_target_": "nemo.collections.tts.losses.audio_codec_loss.GeneratorSquaredLoss"}
    return CodecLosses({"generator_loss": built_in} | values)


def use(kind: str, values):
    """Build a component and use it once, as in training."""
    scores = [torch.ones(2, 3)]
    if kind == "discriminator":
        return build_discriminator(values["discriminator"])(audio().audio, other_audio().audio)
    if kind == "losses":
        return losses_of(values).terms(audio(), other_audio(), None, torch.zeros(1, 32, 8))["mine"]
    if kind == "metrics":
        with torch.no_grad():
            return AudioTerms(values["metrics"], "metrics", ())(audio(), other_audio(), None)["mine"]
    if kind == "generator_loss":
        return losses_of(values).generator(scores)
    return losses_of(values).discriminator(scores, scores)


KINDS = {
    "discriminator": "WaveDiscriminator",
    "losses": "EnvelopeLoss",
    "metrics": "SignalToNoise",
    "generator_loss": "MeanScore",
    "discriminator_loss": "ScoreGap",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_config_imports_what_it_names(kind, tmp_path, monkeypatch):
    (tmp_path / "parts_of_a_test.py").write_text(f"from tests.own_components import {KINDS[kind]} as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = config_with(kind, "parts_of_a_test.Mine")
    with pytest.raises(ConfigError, match=r"'parts_of_a_test\.Mine' is not registered.*register_component"):
        use(kind, values)
    assert "parts_of_a_test" not in sys.modules
    use(kind, imported(values))
    assert registered_components(values) == {"parts_of_a_test.Mine": sys.modules.pop("parts_of_a_test").Mine}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_was_read_from_a_file_imports_nothing(kind, tmp_path, monkeypatch):
    (tmp_path / "stranger_of_a_test.py").write_text("raise SystemExit('was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = config_with(kind, "stranger_of_a_test.Part")
    config = parse_config(OmegaConf.to_yaml(OmegaConf.create(values)))
    section = config[kind]
    moved = OmegaConf.create(codec_config())
    moved[kind] = section
    nested = OmegaConf.create(config_with("discriminator", MODULES + "Discriminator"))
    nested.discriminator.discriminators = [section]
    for case in (config, OmegaConf.create(config), OmegaConf.merge(config, {"lr": 1}), moved, nested):
        import_components(case, BUILT_IN)
    assert "stranger_of_a_test" not in sys.modules
    with pytest.raises(ConfigError, match="is not registered"):
        use(kind, OmegaConf.to_container(config))


@pytest.mark.parametrize("kind", KINDS)
def test_a_registered_class_is_built_wherever_its_name_comes_from(kind):
    import tests.own_components

    own = getattr(tests.own_components, KINDS[kind])
    register_component(own, name="mine")
    assert register_component(own) is own
    for name in ("mine", OWN + KINDS[kind]):
        config = parse_config(OmegaConf.to_yaml(OmegaConf.create(config_with(kind, name))))
        use(kind, OmegaConf.to_container(config))


def test_registering_works_as_a_decorator_and_the_last_registration_wins():
    first = register_component(name="mine")(type("First", (EnvelopeLoss,), {}))
    second = register_component(name="mine")(type("Second", (EnvelopeLoss,), {}))
    assert first is not second
    assert registered_components(config_with("losses", "mine")) == {"mine": second}
    components.unregister_component("mine")
    assert not registered_components(config_with("losses", "mine"))


def test_custom_discriminators_can_be_combined_with_built_in_ones():
    union = {
        "_target_": MODULES + "Discriminator",
        "discriminators": [
            {"_target_": OWN + "PairDiscriminator"},
            {"_target_": MODULES + "MultiPeriodDiscriminator", "periods": [5], "channels": 2},
            {"_target_": OWN + "WaveDiscriminator", "channels": 3},
        ],
    }
    imported({"discriminator": union})
    discriminator = build_discriminator(union)
    assert discriminator.num_networks == 4
    scores_real, scores_gen, maps_real, maps_gen = discriminator(audio().audio, other_audio().audio)
    assert len(scores_real) == len(scores_gen) == len(maps_real) == len(maps_gen) == 4
    assert maps_real[3][0].shape[1] == 3


def test_custom_losses_are_scaled_and_frozen():
    register_component(EnvelopeLoss, name="envelope")
    sections = {
        "short": {"_target_": "envelope", "window": 16, "scale": 0.5},
        "long": {"_target_": "envelope", "window": 256},
        "off": {"_target_": "envelope", "scale": 0},
    }
    codec_losses = losses_of(codec_config(losses=sections, mel_loss_l1_scale=0.0, stft_loss_scale=0.0))
    codec_losses.weights.pop("time_domain", None)
    gen = other_audio()
    terms = codec_losses.terms(audio(), gen, None, torch.zeros(1, 32, 8))
    assert terms.keys() == {"short", "long"}
    assert terms["short"].item() != terms["long"].item()
    torch.testing.assert_close(codec_losses.total(terms), 0.5 * terms["short"] + terms["long"])
    codec_losses.total(terms).backward()
    assert gen.audio.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in codec_losses.parameters())


def test_metrics_may_return_numbers():
    class Number(nn.Module):
        def forward(self, audio_real, audio_gen, audio_len):
            return float(audio_len.sum())

    register_component(Number, name="number")
    register_component(SignalToNoise, name="snr")
    metrics = AudioTerms({"a": {"_target_": "number"}, "b": {"_target_": "snr"}}, "metrics", ())
    values = metrics(audio(), audio(), torch.tensor([4096, 1000]))
    assert float(values["a"]) == 5096
    assert values["b"].isinf()


WRONG = {
    "no such package": ("losses", "no_such_package.Loss", {}, "'no_such_package.Loss' cannot be imported"),
    "no such class": ("losses", OWN + "Absent", {}, "cannot be imported .*has no attribute 'Absent'.*PYTHONPATH"),
    "no path": ("metrics", "Loss", {}, "'Loss' is not registered"),
    "function": ("losses", OWN + "a_function", {}, "is the function a_function; pass a subclass of torch.nn"),
    "program": ("discriminator", "os.system", {}, "is the function system; pass a subclass"),
    "no module": ("metrics", OWN + "NotAModule", {}, "is the class NotAModule; pass a subclass"),
    "constructor's arguments": ("losses", OWN + "EnvelopeLoss", {"size": 3}, "losses.mine.*unexpected.*'size'"),
    "constructor": (
        "losses",
        OWN + "Broken",
        {},
        r"tests.own_components.Broken cannot be built with the arguments \{\}: .*assign",
    ),
    "loss's arguments": (
        "losses",
        OWN + "OtherArguments",
        {},
        r"losses.mine: .*OtherArguments cannot be called as forward\(audio_real=, audio_gen=, audio_len=\)",
    ),
    "metric's arguments": ("metrics", OWN + "OtherArguments", {}, "metrics.mine.* cannot be called as forward"),
    "score's arguments": ("generator_loss", OWN + "ScoreGap", {}, r"generator_loss.*forward\(disc_scores_gen=\)"),
    "loss per example": ("losses", OWN + "PerExample", {}, r"losses.mine.*returned a tensor of shape \[2\]; return a"),
    "loss without gradient": ("losses", OWN + "Detached", {}, "losses.mine.*no gradient with respect to audio_gen"),
    "discriminator of another base": (
        "discriminator",
        OWN + "EnvelopeLoss",
        {},
        "EnvelopeLoss is not a subclass of nemo_lfr.training.audio_discriminator.AudioDiscriminator",
    ),
    "no score": ("discriminator", OWN + "Scoreless", {}, r"Scoreless does not define score\(views\)"),
    "no weights": ("discriminator", OWN + "Weightless", {}, "Weightless has no trainable parameters"),
    "two signals": ("discriminator", OWN + "ScoresTwoSignals", {}, r"cannot be called as score\(views\): .*'gen'"),
    "scores only": ("discriminator", OWN + "ScoresOnly", {}, "ScoresOnly.score returned a list of a tensor.*a tuple"),
    "one number": (
        "discriminator",
        OWN + "OneNumber",
        {},
        r"OneNumber.score returned a tensor of shape \[\] as scores; expected tensors \[B, ...\]",
    ),
    "flat feature maps": (
        "discriminator",
        OWN + "FlatMaps",
        {},
        r"FlatMaps.score returned a tensor of .* as the feature maps",
    ),
    "two views": (
        "discriminator",
        OWN + "TwoViews",
        {},
        "TwoViews.preprocess returned a list of .*a list of 1 tensor",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_component_is_named_in_one_line(case):
    kind, target, arguments, message = WRONG[case]
    values = config_with(kind, target, **arguments)
    with pytest.raises(ConfigError, match=message) as raised:
        use(kind, imported(values))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        ("losses", {"mel_l1": {"_target_": "envelope"}}, "losses: the name 'mel_l1' is reserved"),
        ("losses", {"gen": {"_target_": "envelope"}}, "losses: the name 'gen' is reserved"),
        ("losses", {"a.b": {"_target_": "envelope"}}, "losses: the name 'a.b'"),
        ("losses", {"keys": {"_target_": "envelope"}}, "losses: the name 'keys'"),
        (
            "losses",
            {"mine": {"_target_": "envelope", "scale": "1.0"}},
            r"losses\.mine\.scale is '1\.0'; pass a number",
        ),
        ("losses", {"mine": "envelope"}, "losses.mine is 'envelope'; pass a mapping with the key _target_"),
        ("losses", {"mine": {"window": 3}}, "losses.mine is .*window.*the key _target_"),
        ("losses", ["envelope"], "losses is .*; pass a mapping from names"),
        ("generator_loss", "envelope", "generator_loss is 'envelope'; pass a mapping with the key _target_"),
    ],
)
def test_a_malformed_section_is_named(kind, sections, message):
    register_component(EnvelopeLoss, name="envelope")
    values = codec_config() | {kind: sections}
    import_components(OmegaConf.create(values), {*BUILT_IN, "envelope"})
    with pytest.raises(ConfigError, match=message):
        losses_of(values)


def test_only_modules_are_registered():
    with pytest.raises(ConfigError, match="function a_function; pass a subclass of torch"):
        from tests.own_components import a_function

        register_component(a_function)  # type: ignore[call-overload]


def test_the_smallest_discriminator_scores_the_waveform():
    discriminator = WaveDiscriminator()
    assert isinstance(discriminator, AudioDiscriminator)
    scores, _, maps, _ = discriminator(audio().audio, audio().audio)
    assert [score.shape[0] for score in scores] == [2]
    assert [len(layers) for layers in maps] == [1]
