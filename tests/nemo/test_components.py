"""Tests of user-defined discriminators, losses and metrics in `LFRCodecModel`: training, files and resuming."""

import copy
import pickle
import sys

import pytest
import torch

pytest.importorskip("nemo", reason="these components train in NeMo: pip install '.[nemo]'")

import lightning.pytorch as pl
from omegaconf import OmegaConf

from nemo_lfr import AudioCodecModel, ConfigError, load
from nemo_lfr.testing import TWO_STAGES
from nemo_lfr.training import components
from tests.crash import ROOT
from tests.models import MODULES, codec_config, speech_like

OWN = "parts_of_a_test."
CONFIG = TWO_STAGES | {
    "discriminator": {
        "_target_": MODULES + "Discriminator",
        "discriminators": [
            {"_target_": OWN + "WaveDiscriminator", "channels": 3},
            {"_target_": MODULES + "MultiPeriodDiscriminator", "periods": [5], "channels": 2},
        ],
    },
    "generator_loss": {"_target_": OWN + "MeanScore"},
    "discriminator_loss": {"_target_": OWN + "ScoreGap"},
    "losses": {"envelope": {"_target_": OWN + "EnvelopeLoss", "scale": 3.0}},
    "metrics": {"snr": {"_target_": OWN + "SignalToNoise"}},
    "optim": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
}


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """Write a user's package to a folder, make it importable, and start with an empty registry."""
    monkeypatch.setattr(components, "_REGISTERED", {})
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "parts_of_a_test.py").write_text((ROOT / "tests" / "own_components.py").read_text())
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("parts_of_a_test", None)


def values(**changes):
    return OmegaConf.create(codec_config(**(CONFIG | changes)))


def loader(seed: int = 0) -> torch.utils.data.DataLoader:
    audio = torch.stack([speech_like(8 * 1024, seed + row) for row in range(2)])
    batch = {"audio": audio, "audio_lens": torch.tensor([8 * 1024, 7 * 1024])}
    return torch.utils.data.DataLoader([batch] * 2, batch_size=None)


def fit(model, epochs: int = 1, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader(), loader(9), **options)
    return trainer


def trained(seed: int = 0, epochs: int = 1):
    torch.manual_seed(seed)
    model = AudioCodecModel(values())
    return model, fit(model, epochs)


def test_components_train_and_are_logged():
    torch.manual_seed(0)
    model = AudioCodecModel(values())
    model.build_discriminator()
    before = {key: value.clone() for key, value in model.discriminator.state_dict().items()}
    logged = fit(model).logged_metrics
    assert logged["g_loss_envelope"] > 0 and logged["val_loss_envelope"] > 0
    assert torch.isfinite(logged["val_snr"]) and torch.isfinite(logged["d_loss"])
    after = model.discriminator.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before if key.startswith("discriminators.0."))
    assert model.losses.custom.terms["envelope"].calls == 2 + 2 + 2  # steps, validation, the check before training


def test_a_custom_loss_changes_the_weights():
    torch.manual_seed(0)
    without = AudioCodecModel(values(losses=None))
    fit(without)
    torch.manual_seed(0)
    own = AudioCodecModel(values())
    fit(own)
    assert not torch.equal(*(next(model.audio_decoder.parameters()) for model in (without, own)))


def test_a_run_resumes_with_the_weights_of_one_that_was_not_stopped(tmp_path):
    whole, _ = trained(epochs=2)
    _, first = trained()
    first.save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(7)
    resumed = AudioCodecModel(values())
    fit(resumed, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    expected, weights = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == weights.keys()
    learned = {key for key, _ in whole.named_parameters()}
    assert any(key.startswith("discriminator.discriminators.0.") for key in learned)
    for key in learned:
        assert torch.equal(expected[key], weights[key]), key
    # The buffer of a loss is restored too; the resumed run checks validation again.
    assert weights["_losses.custom.terms.envelope.calls"] == expected["_losses.custom.terms.envelope.calls"] + 2


def test_a_file_opens_without_the_users_package_and_names_what_training_misses(tmp_path, monkeypatch):
    model, _ = trained()
    path, audio = tmp_path / "trained.nemo", speech_like(20 * 1024)[None]
    model.save_to(path)
    expected = model.encode(audio=audio, audio_len=torch.tensor([audio.shape[1]]))[0]
    # As in a new process that could import the package, but opening a file must not do so.
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "parts_of_a_test")
        patch.setattr(components, "_REGISTERED", {})
        tokens = load(path, "cpu").encode(audio)[0]
        opened = AudioCodecModel.restore_from(path, map_location="cpu")
        assert torch.equal(opened.encode(audio=audio, audio_len=torch.tensor([audio.shape[1]]))[0], tokens)
        opened.save_to(tmp_path / "again.nemo")
        with pytest.raises(ConfigError) as raised:
            opened.build_discriminator()
        assert (
            "discriminator: _target_ 'parts_of_a_test.WaveDiscriminator' is not registered. If this is your own "
            "class, first pass it to nemo_lfr.training.components.register_component."
        ) in str(raised.value)
        assert "parts_of_a_test" not in sys.modules
    assert torch.equal(tokens, expected)
    # With registered classes, training continues with the discriminators of the file, even after saving it again.
    for name in ("trained.nemo", "again.nemo"):
        restored = AudioCodecModel.restore_from(tmp_path / name, map_location="cpu")
        restored.build_discriminator()
        weights = model.discriminator.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in restored.discriminator.state_dict().items())
        fit(restored.train())


@pytest.mark.parametrize("how", ["restore_from", "config of the file", "override", "override by path", "load_from"])
def test_only_a_config_of_the_user_imports_components(how, tmp_path, monkeypatch):
    model, trainer = trained()
    path = tmp_path / "trained.nemo"
    model.save_to(path)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    sys.modules.pop("parts_of_a_test")
    components._REGISTERED.clear()
    if how == "restore_from":
        AudioCodecModel.restore_from(path, map_location="cpu")
    elif how == "load_from":
        AudioCodecModel.load_from_checkpoint(tmp_path / "trained.ckpt", map_location="cpu", weights_only=False)
    elif how == "config of the file":
        config = AudioCodecModel.restore_from(path, return_config=True)
        config.sample_rate = 22050
        AudioCodecModel(config)
        AudioCodecModel.restore_from(path, override_config_path=config, map_location="cpu")
        AudioCodecModel(AudioCodecModel.restore_from(path, map_location="cpu").cfg)
    elif how == "override":
        AudioCodecModel.restore_from(path, override_config_path=values(), map_location="cpu").build_discriminator()
    else:
        OmegaConf.save(OmegaConf.create({"model": values()}), tmp_path / "mine.yaml")
        AudioCodecModel.restore_from(
            path, override_config_path=tmp_path / "mine.yaml", map_location="cpu"
        ).build_discriminator()
    assert ("parts_of_a_test" in sys.modules) == how.startswith("override")


def test_copies_and_pickles_train(tmp_path):
    model, _ = trained()
    next(model.discriminator.parameters()).requires_grad_(False)
    copied, pickled = copy.deepcopy(model), pickle.dumps(model)
    components._REGISTERED.clear()
    loaded = pickle.loads(pickled)
    assert components._REGISTERED.keys() == {OWN + name for name in (
        "WaveDiscriminator", "MeanScore", "ScoreGap", "EnvelopeLoss", "SignalToNoise"
    )}  # fmt: skip
    expected = model.state_dict()
    assert "_losses.custom.terms.envelope.calls" in expected
    for other in (copied, loaded):
        assert not next(other.discriminator.parameters()).requires_grad
        assert expected.keys() == other.state_dict().keys()
        assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
        fit(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminator": {"_target_": "no_such_package.Discriminator"}}, "discriminator: .* cannot be imported"),
        ({"losses": {"a": {"_target_": OWN + "Absent"}}}, "losses.a: .* cannot be imported"),
        ({"metrics": {"a": {"_target_": OWN + "NotAModule"}}}, "metrics.a: .* is the class NotAModule"),
    ],
)
def test_what_cannot_be_imported_is_named_when_the_model_is_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        AudioCodecModel(values(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"a": {"_target_": OWN + "OtherArguments"}}}, "losses.a: .* cannot be called as forward"),
        ({"metrics": {"a": {"_target_": OWN + "EnvelopeLoss", "size": 1}}}, "metrics.a: .* cannot be built"),
        (
            {"metrics": {"perplexity": {"_target_": OWN + "SignalToNoise"}}},
            "metrics: the name 'perplexity' is reserved",
        ),
        ({"discriminator": {"_target_": OWN + "Scoreless"}}, "Scoreless does not define score"),
        ({"losses": {"a": {"_target_": OWN + "PerExample"}}}, "losses.a: .* returned a tensor of shape"),
        ({"discriminator": {"_target_": OWN + "ScoresOnly"}}, "ScoresOnly.score returned"),
    ],
)
def test_what_cannot_be_used_is_named_when_training_starts(changes, message):
    config = values()
    for key, value in changes.items():
        config[key] = value
    with pytest.raises(ConfigError, match=message):
        fit(AudioCodecModel(config))


def test_a_model_that_trained_with_components_encodes_in_the_standalone_api(tmp_path):
    model, _ = trained()
    model.save_to(tmp_path / "trained.nemo")
    audio = speech_like(10 * 1024)
    assert torch.equal(load(tmp_path / "trained.nemo", "cpu").encode(audio)[0], model.codec.encode(audio)[0])
