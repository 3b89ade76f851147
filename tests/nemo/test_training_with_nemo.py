"""Tests that training steps equal those of stock NeMo: same weights and batch, same losses and updates."""

import argparse
import copy
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nemo", reason="stock NeMo is the reference here: pip install '.[nemo]'")

import lightning.pytorch as pl
from nemo.collections.common.callbacks import EMA
from nemo.collections.tts.models.audio_codec import AudioCodecModel as StockModel
from omegaconf import OmegaConf, open_dict

import nemo_lfr
from nemo_lfr import AudioCodecModel, CheckpointError, ConfigError, accelerate
from nemo_lfr.checkpoint import split_weight_norm
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from nemo_lfr.nemo.config import check_training
from nemo_lfr.nemo.run_lock import lock_run
from nemo_lfr.pretrained import bundled_checkpoint
from nemo_lfr.signal import spectra
from nemo_lfr.training.average import Average
from tests.crash import ROOT
from tests.models import FULL_SIZE, LOSSES, MODULES, RATE, codec_config, random_parts, speech_like, write_nemo

ENCODEC = "nemo.collections.tts.modules.encodec_modules."
STFT = {
    "_target_": ENCODEC + "MultiResolutionDiscriminatorSTFT",
    "resolutions": [[256, 64, 256], [1024, 256, 1024]],
}
ALL_STFT = STFT | {"resolutions": [[size, size // 4, size] for size in (128, 256, 512, 1024, 2048)]}
BANDS = {
    "_target_": MODULES + "MultiResolutionDiscriminatorSTFT",
    "resolutions": [[256, 64, 256], [1024, 256, 1024]],
    "stft_bands": [[0.0, 0.25], [0.25, 1.0]],
}
PERIOD = {"_target_": MODULES + "MultiPeriodDiscriminator", "periods": [2, 5]}
# Cheaper discriminators, for tests that need any: a network for one period has 8 M parameters in stock NeMo.
ONE_PERIOD = PERIOD | {"periods": [5]}
SMALL_PERIOD = ONE_PERIOD | {"channels": 2}  # a key of ours
SMALL_STFT = STFT | {"resolutions": [[256, 64, 256]]}


@pytest.fixture(scope="session")
def wavlm(tmp_path_factory):
    """Write a small but real WavLM to a folder that `slm_model_name` may name; return the discriminator's config."""
    from transformers import WavLMConfig, WavLMModel

    folder = tmp_path_factory.mktemp("wavlm")
    sizes: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, conv_dim=[16] * 7
    )
    torch.manual_seed(5)
    WavLMModel(WavLMConfig(num_conv_pos_embedding_groups=4, **sizes)).save_pretrained(folder)
    return {
        "_target_": MODULES + "SLMDiscriminator",
        "slm_model_name": str(folder),
        "slm_sr": 16000,
        "input_sr": RATE,
        "slm_hidden": 32,
        "slm_layers": 4,
        "initial_channel": 8,
    }


# A codec that trains in a few milliseconds, with two codebooks and few layers.
TINY: dict[str, Any] = {
    "samples_per_frame": 16,
    "audio_encoder": {"down_sample_rates": [2, 8], "encoded_dim": 8},
    "vector_quantizer": {"num_groups": 2},
    "audio_decoder": {
        "up_sample_rates": [8, 2],
        "input_dim": 8,
        "base_channels": 16,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [1],
    },
    "loss_resolutions": [[64, 16, 64], [128, 32, 128]],
    "mel_loss_dims": [5, 10],
}


def released_config(discriminators: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return a training config with the released layout and few channels."""
    union = {"_target_": MODULES + "Discriminator", "discriminators": discriminators}
    optim = {"_target_": "torch.optim.SGD", "lr": 1e-3}
    return codec_config(**{"discriminator": union if discriminators else None, "optim": optim} | changes)


def training_config(discriminators: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return a training config of the codec `TINY`."""
    return released_config(discriminators, **TINY | changes)


def batch(size: int = 2, frames: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    audio = torch.stack([speech_like(frames * 1024 + 7, seed + row)[: frames * 1024] for row in range(size)])
    return {"audio": audio, "audio_lens": torch.full((size,), frames * 1024)}


def batch_without_ties(model, frames: int, size: int = 2) -> dict[str, torch.Tensor]:
    """Return the first batch in which no encoded value is within 1e-3 of the edge between two levels.

    Rounding errors in an encoder then cannot change the tokens of the batch.
    """
    for seed in range(0, 100 * size, size):
        found = batch(size, frames, seed)
        with torch.no_grad():
            encoded, _ = model.audio_encoder(audio=found["audio"], audio_len=found["audio_lens"])
            quantizer = FiniteScalarQuantizer(model.vector_quantizer.fsqs[0].num_levels.flatten().tolist())
            compressed = quantizer.compress(encoded.unflatten(1, (-1, quantizer.dim)).flatten(0, 1))
        if float(((compressed - compressed.floor()) - 0.5).abs().min()) > 1e-3:
            return found
    raise AssertionError("every batch has a tie")


FROZEN = {"_target_": "torch.optim.SGD", "lr": 0.0}


class Recorder(pl.Callback):
    """Record of the values that each step logs, and of the gradients of each update.

    WavLM is set to evaluation mode, because stock NeMo leaves it in training mode, which masks its input at random.
    """

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, model, *_):
        for module in model.modules():
            if type(module).__name__ == "WavLMModel":
                module.eval()

    def on_before_optimizer_step(self, trainer, model, optimizer):
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        named = {key: value.grad for key, value in model.named_parameters() if id(value) in own}
        self.gradients.append({key: grad.clone() for key, grad in named.items() if grad is not None})

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({key: float(value) for key, value in trainer.logged_metrics.items()})


def quiet_trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def train(model, batches, validate=None, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
        log_every_n_steps=1,
        **options,
    )
    if not isinstance(batches, torch.utils.data.DataLoader):
        batches = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(model, batches, None if validate is None else torch.utils.data.DataLoader(validate, batch_size=None))
    return recorder


FULL = "full size"
CASES: dict[str, dict[str, Any]] = {
    "generator alone": {"use": []},
    "multi-period": {"use": ["period"]},
    "multi-resolution STFT": {"use": ["stft"]},
    "bands of STFTs, as NanoCodec": {"use": ["bands"]},
    "WavLM": {"use": ["slm"]},
    "all three, discriminators every second step": {"use": ["stft", "one period", "slm"], "disc_update_period": 2},
    "hinged, relative features": {
        "use": ["stft"],
        "feature_loss_type": "relative",
        "generator_loss": {"_target_": LOSSES + "GeneratorHingedLoss"},
        "discriminator_loss": {"_target_": LOSSES + "DiscriminatorHingedLoss"},
    },
    "every reconstruction term": {
        "use": [],
        "mel_loss_l2_scale": 0.7,
        "time_domain_loss_scale": 3.0,
        "si_sdr_loss_scale": 0.1,
        "mel_loss_log_guard": 1e-2,
        "stft_loss_log_guard": 1e-2,
        "loss_resolutions": [[size, size // 4, size] for size in (32, 64, 128, 256, 512, 1024, 2048)],
        "mel_loss_dims": [5, 10, 20, 40, 80, 160, 320],
    },
    "gradients clipped": {"use": ["stft"], "clip_grad_norm": 0.01},
    "nothing but the discriminators' opinion": {
        "use": ["stft"], "mel_loss_l1_scale": 0.0, "stft_loss_scale": 0.0, "gen_loss_scale": 2.0,
    },
    FULL: {
        "use": ["all stft", "all periods", "slm"],
        "disc_update_period": 2,
        # The gradients are large: a larger step would move values of the second batch across rounding edges.
        "optim": {"_target_": "torch.optim.SGD", "lr": 1e-6},
        "batch size": 1,
        **FULL_SIZE,
    },
    "all layers, smooth activation": {
        "use": [],
        "batch size": 1,
        "steps": 1,
        "audio_encoder": {"base_channels": 12, "activation": "elu"},
        "audio_decoder": FULL_SIZE["audio_decoder"] | {"base_channels": 256, "activation": "elu"},
    },
}  # fmt: skip


@functools.cache
def random_state(sections: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a codec from `random_parts`."""
    parts = random_parts(json.loads(sections)).named()
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in split_weight_norm(part).items()}


def models(config: dict[str, Any], path: Path | None = None) -> tuple[Any, Any]:
    """Return a stock model and our model with the same weights, those of a checkpoint or random ones."""
    if path is None:
        keys = ("sample_rate", "samples_per_frame", "audio_encoder", "vector_quantizer", "audio_decoder")
        state = random_state(json.dumps({key: config[key] for key in keys}))
    else:
        state = AudioCodecModel.restore_from(path, map_location="cpu").state_dict()
    torch.manual_seed(3)
    stock = StockModel(OmegaConf.create(config))
    with torch.no_grad():
        for key, weight in stock.named_parameters():
            if not key.startswith("discriminator."):
                weight.copy_(state[key])
    ours = AudioCodecModel(OmegaConf.create(config))
    ours.load_state_dict({key: value.clone() for key, value in stock.state_dict().items()})
    return stock, ours


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if FULL in c else ()) for c in CASES])
def test_steps_are_stock_steps(request, wavlm, case):
    changes = dict(CASES[case])
    known = {"stft": STFT, "bands": BANDS, "period": PERIOD, "slm": wavlm, "all stft": ALL_STFT}
    known["one period"] = ONE_PERIOD
    known["all periods"] = {"_target_": MODULES + "MultiPeriodDiscriminator"}
    size, steps = changes.pop("batch size", 2), changes.pop("steps", 2)
    config = released_config([known[name] for name in changes.pop("use")], **changes)
    stock, ours = models(config, request.getfixturevalue("full_size") if case == FULL else None)
    batches = [batch_without_ties(stock, frames=4, size=size)] * steps
    expected, mine = (train(model, batches) for model in (stock, ours))
    for step, (theirs, own) in enumerate(zip(expected.logged, mine.logged, strict=True)):
        names = {key for key in theirs if "loss" in key}
        assert names == {key for key in own if "loss" in key} and len(names) >= 2
        for name in sorted(names):
            # After an update, the weights differ by rounding, which also changes the losses.
            assert own[name] == pytest.approx(theirs[name], rel=1e-5 if step == 0 else 1e-4, abs=1e-7), name
    assert len(expected.gradients) == len(mine.gradients)
    # Some activations are so close to zero that rounding, which depends on the CPU, changes their sign, and with it
    # the slope of the leaky ReLU. At full size, one in a million changes the gradient by 0.1 %. The smooth case rules
    # this out.
    tolerance = 5e-3 if case == FULL else 1e-4 if "smooth" in case else 1e-3
    # Compare the updates of the first batch: those of the discriminators, if any, and of the generator.
    for theirs, own in list(zip(expected.gradients, mine.gradients, strict=True))[
        : 2 if config["discriminator"] else 1
    ]:
        assert theirs.keys() == own.keys()
        for part in {key.partition(".")[0] for key in theirs}:
            keys = [key for key in theirs if key.startswith(part + ".")]
            gradient = torch.cat([theirs[key].flatten() for key in keys])
            difference = gradient - torch.cat([own[key].flatten() for key in keys])
            assert difference.norm() < tolerance * gradient.norm(), part


def test_validation_losses_are_stocks_for_clips_of_unequal_length():
    config = released_config([])
    stock, ours = models(config)
    audio = batch(3, 20)["audio"]
    lengths = torch.tensor([20 * 1024, 15 * 1024 - 300, 9000])
    for row, length in zip(audio, lengths, strict=True):
        row[length:] = 0
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    batches = [{"audio": audio[i : i + 1], "audio_lens": lengths[i : i + 1]} for i in range(3)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    (expected,) = trainer.validate(stock, loader, verbose=False)
    (mine,) = trainer.validate(ours, loader, verbose=False)
    assert mine.keys() - expected.keys() == {"val_perplexity", "val_levels_used"}
    assert {key: mine[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_fine_tuning_starts_where_a_stock_file_ends_discriminators_included(tmp_path):
    config = released_config([STFT, SMALL_STFT])
    start, _ = models(config)
    start.save_to(str(tmp_path / "source.nemo"))
    torch.manual_seed(9)
    other = released_config([STFT, SMALL_STFT], loss_resolutions=[[256, 64, 256]], mel_loss_dims=[20])
    for values in (config, other):  # the losses are the new config's
        model = AudioCodecModel(OmegaConf.create(values))
        model.maybe_init_from_pretrained_checkpoint(
            OmegaConf.create({"init_from_nemo_model": str(tmp_path / "source.nemo")})
        )
        model.build_discriminator()
        expected = start.state_dict()
        learned = [key for key, _ in start.named_parameters()]
        assert any(key.startswith("discriminator.") for key in learned)
        assert all(torch.equal(model.state_dict()[key], expected[key]) for key in learned)
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        loader = torch.utils.data.DataLoader([batch(frames=4)], batch_size=None)
        stock = StockModel(OmegaConf.create(values | {"discriminator": None}))
        stock.load_state_dict({key: expected[key] for key, _ in stock.named_parameters()}, strict=False)
        (theirs,) = trainer.validate(stock, loader, verbose=False)
        (mine,) = trainer.validate(model, loader, verbose=False)
        assert {key: mine[key] for key in theirs} == pytest.approx(theirs, rel=1e-5)


def test_loading_some_weights_keeps_those_of_the_discriminators():
    start, model = models(training_config([SMALL_STFT]))
    state = {key: value.clone() for key, value in start.state_dict().items()}
    model.load_state_dict(state)
    for key in [key for key in state if key.startswith("discriminator.")]:
        state.pop(key).zero_()  # the model has a copy
    model.load_state_dict(state, strict=False)
    parents = [torch.nn.ModuleDict({"codec": each}) for each in (model, AudioCodecModel(model.cfg))]
    parents[1].load_state_dict(parents[0].state_dict())
    for parent in parents:
        parent["codec"].build_discriminator()
        assert all(torch.equal(parent["codec"].state_dict()[key], value) for key, value in start.named_parameters())


def test_a_cpu_updates_with_fused_adam_unless_the_config_says_otherwise():
    """The updates differ only by rounding."""
    ends = []
    for fused in (None, False):
        optim = {"_target_": "torch.optim.Adam", "lr": 1e-3} | ({} if fused is None else {"fused": fused})
        torch.manual_seed(0)
        model = AudioCodecModel(OmegaConf.create(training_config([SMALL_STFT], optim=optim)))
        train(model, [batch(frames=8)] * 2)
        assert all(group["fused"] is (fused is None) for o in model.optimizers() for group in o.param_groups)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


def test_a_saved_model_is_validated_and_trained_without_its_logged_clips(tmp_path, caplog):
    nemo = "nemo.collections.tts."
    log = {
        "log_dir": str(tmp_path),
        "log_epochs": [1],
        "epoch_frequency": 1,
        "log_tensorboard": False,
        "log_wandb": False,
        "generators": [{"_target_": nemo + "parts.utils.callbacks.AudioCodecArtifactGenerator"}],
        "dataset": {
            "_target_": nemo + "data.vocoder_dataset.VocoderDataset",
            "dataset_meta": {"mine": {"manifest_path": "gone.json", "audio_dir": "gone"}},
            "sample_rate": RATE,
        },
        "dataloader_params": {"batch_size": 1},
    }
    model = AudioCodecModel(OmegaConf.create(training_config([], log_config=log)))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (metrics,) = trainer.validate(
        model, torch.utils.data.DataLoader([batch(frames=8)], batch_size=None), verbose=False
    )
    assert metrics["val_loss"] > 0
    with pytest.raises(ConfigError, match=r"gone\.json"):
        train(model, [batch(frames=8)])
    model.save_to(tmp_path / "codec.nemo")
    restored = AudioCodecModel.restore_from(tmp_path / "codec.nemo")
    train(restored, [batch(frames=8)])
    assert "no clips are decoded during the training, because log_config in" in caplog.text
    restored.log_config = OmegaConf.create(log)  # set by the user, so it is an error
    with pytest.raises(ConfigError, match=r"gone\.json"):
        train(restored, [batch(frames=8)])


def test_wavlm_is_neither_loaded_before_a_step_nor_trained_nor_saved(wavlm):
    config = training_config([wavlm])
    model = AudioCodecModel(OmegaConf.create(config))
    model.build_discriminator()
    slm = model.discriminator.discriminators[0].slm
    assert slm._model is None
    train(model, [batch(frames=8)])
    assert not slm._model.training and not any(p.requires_grad for p in slm._model.parameters())
    assert all("ssl_model" not in key and "slm_model" not in key for key in model.state_dict())


def test_the_copy_of_wavlm_in_a_stock_checkpoint_is_used_where_its_name_leads_nowhere(tmp_path, wavlm, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stock = StockModel(OmegaConf.create(training_config([wavlm])))
    path = tmp_path / "trained.nemo"
    stock.cfg.discriminator.discriminators[0].slm_model_name = "nobody/no-such-model"
    stock.save_to(str(path))
    model = AudioCodecModel.restore_from(path, map_location="cpu")
    model.build_discriminator()
    audio = batch()["audio"]
    with torch.no_grad():
        expected, *_ = stock.eval().discriminator(audio_real=audio, audio_gen=audio)
        scores, *_ = model.discriminator(audio_real=audio, audio_gen=audio)
    torch.testing.assert_close(scores[0], expected[0], rtol=0, atol=1e-5)
    config = training_config([wavlm | {"slm_model_name": "nobody/no-such-model"}])
    started = AudioCodecModel(OmegaConf.create(config))
    started.maybe_init_from_pretrained_checkpoint(OmegaConf.create({"init_from_nemo_model": str(path)}))
    started.build_discriminator()
    with torch.no_grad():
        scores, *_ = started.discriminator(audio_real=audio, audio_gen=audio)
    torch.testing.assert_close(scores[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-model", r"nobody/no-such-model' could not be loaded from the Hub.*slm_model_name"),
        ("empty", r"empty' could not be loaded \(.*slm_model_name"),
        ("absent", r"absent' could not be loaded \(.*no such file or folder.*slm_model_name"),
    ],
)
def test_missing_wavlm_is_named_at_the_first_step(wavlm, monkeypatch, tmp_path, name, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    config = training_config([wavlm | {"slm_model_name": name if "/" in name else str(tmp_path / name)}])
    model = AudioCodecModel(OmegaConf.create(config))
    with pytest.raises(ConfigError, match=message):
        train(model, [batch()])


def test_wavlm_of_another_size_is_refused(wavlm):
    model = AudioCodecModel(OmegaConf.create(training_config([wavlm | {"slm_layers": 13}])))
    with pytest.raises(ConfigError, match="slm_layers 13 do not match"):
        train(model, [batch()])


def test_an_unknown_discriminator_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'os\.system' is the function system; pass a subclass"):
        AudioCodecModel(OmegaConf.create(training_config([{"_target_": "os.system"}])))


def generator_weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model._generator.parameters()])


def test_accumulated_batches_make_the_update_of_one_large_batch():
    # A smooth activation, because rounding may change the sign of the input of a leaky ReLU.
    smooth = {part: {"activation": "elu"} for part in ("audio_encoder", "audio_decoder")}
    config = released_config([], accumulate_grad_batches=2, **smooth)
    _, model = models(config)
    whole = batch_without_ties(model, frames=4, size=4)
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
    recorder = train(model, parts)
    _, large = models(config | {"accumulate_grad_batches": 1})
    expected = train(large, [whole])
    (own,), (theirs,) = recorder.gradients, expected.gradients
    for key, gradient in theirs.items():
        assert (own[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key
    # A validation between the two batches must not discard the gradients of the first one.
    _, model = models(config)
    (again,) = train(model, parts, parts[:1], val_check_interval=1, num_sanity_val_steps=0).gradients
    for key, gradient in own.items():
        assert torch.equal(again[key], gradient), key


def test_a_schedule_counts_updates_not_batches():
    config = training_config([], accumulate_grad_batches=4, max_epochs=3, steps_per_epoch=10)
    model = AudioCodecModel(OmegaConf.create(config))
    assert model.max_steps == 9
    with open_dict(model.cfg):
        model.cfg.steps_per_epoch = None
        model._train_dl = range(13)
    assert model.max_steps == 12


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_epochs": None}, "neither max_steps nor max_epochs is set"),
        ({"max_epochs": 0}, "max_epochs is 0, so"),
        ({"max_epochs": 1}, "steps_per_epoch must be set, because the config has no train_ds"),
    ],
)
def test_a_schedule_without_length_is_refused(changes, match):
    model = AudioCodecModel(OmegaConf.create(training_config([])))
    with open_dict(model.cfg):
        model.cfg.pop("max_steps", None)
        model.cfg.update({"steps_per_epoch": None} | changes)
    with pytest.raises(ConfigError, match=match):
        _ = model.max_steps


def test_averaged_weights_move_with_the_module():
    module = torch.nn.Linear(2, 2)
    average = Average(module, 0.9)  # as a checkpoint is read, before the module goes to its GPU
    module.to("meta")
    average.update(module)
    average.use(module, averaged=True)
    assert (
        {weight.device.type for weight in average.weights} == {"meta"} == {p.device.type for p in module.parameters()}
    )


def test_the_average_of_the_weights_is_validated_exported_and_resumed(tmp_path):
    config = training_config([], ema_decay=0.9, optim={"_target_": "torch.optim.SGD", "lr": 0.01})
    _, model = models(config)
    batches = torch.utils.data.DataLoader([batch(frames=8)] * 3, batch_size=None)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    before = generator_weights(model)
    trainer.fit(model, batches, batches)
    last, average = generator_weights(model), torch.cat([value.flatten() for value in model._average.weights])
    # The average lies between the first and the last weights, which differ.
    assert 0 < (average - before).norm() < (last - before).norm()
    validated = float(trainer.callback_metrics["val_loss"])
    model.save_to(tmp_path / "saved.nemo")
    assert torch.equal(generator_weights(model), last)
    saved = AudioCodecModel.restore_from(tmp_path / "saved.nemo", map_location="cpu")
    torch.testing.assert_close(generator_weights(saved), average)
    plain = AudioCodecModel(OmegaConf.create(config | {"ema_decay": None}))
    plain.load_state_dict(saved.state_dict())
    (metrics,) = trainer.validate(plain, batches, verbose=False)
    assert metrics["val_loss"] == pytest.approx(validated, rel=1e-5)
    trainer.strategy.connect(model)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    for name, weights in opened(path, config).items():
        assert torch.equal(weights, average), name
    codecs = [nemo_lfr.load(file, device="cpu") for file in (path, tmp_path / "saved.nemo")]
    assert codecs[0].fingerprint == codecs[1].fingerprint
    resumed = Resumed(path, config)
    assert torch.equal(resumed.trained, last) and torch.equal(resumed.average, average) and resumed.count == 3
    resumed = Resumed(path, config | {"ema_decay": None})
    assert torch.equal(resumed.trained, last) and resumed.average is None

    def develop(checkpoint):  # the layout of development versions
        state, trained = checkpoint["state_dict"], checkpoint["average"].pop("trained")
        checkpoint["average"]["weights"] = [state[name] for name in trained]
        state.update(trained)
        return checkpoint

    rewritten(path, tmp_path / "old.ckpt", develop)
    resumed = Resumed(tmp_path / "old.ckpt", config)
    assert torch.equal(resumed.trained, last) and torch.equal(resumed.average, average)


def load_the_first_weights(model, first):
    model.load_state_dict(first)
    return model


def edit_without_a_count(model, first):
    model.audio_decoder.post_conv.conv.bias.data.add_(1.0)
    return model


def fold_the_weight_norm(model, first):
    model.audio_encoder.remove_weight_norm()
    return model


def convert_a_part(model, first):
    model.audio_decoder.double()
    return model


def copy_and_edit(model, first):
    return edit_without_a_count(copy.deepcopy(model), first)


class Unreadable(torch.utils.data.Dataset):
    def __len__(self):
        raise RuntimeError("unreadable")


def load_before_a_failed_validation(model, first):
    model.load_state_dict(first)
    with pytest.raises(RuntimeError, match="unreadable"):
        quiet_trainer().validate(model, torch.utils.data.DataLoader(Unreadable()), verbose=False)
    return model


def resume_a_complete_run(model, first):
    with tempfile.TemporaryDirectory() as folder:
        model.trainer.save_checkpoint(Path(folder, "last.ckpt"))
        other = AudioCodecModel(model.cfg)
        quiet_trainer(max_epochs=1).fit(other, model.batches, ckpt_path=Path(folder, "last.ckpt"))
    return load_the_first_weights(other, first)


@pytest.mark.parametrize(
    ("change", "is_averaged"),
    [
        (load_before_a_failed_validation, False),
        (resume_a_complete_run, False),
        (lambda model, first: model, True),
        (lambda model, first: copy.deepcopy(model), True),
        (lambda model, first: model.double(), True),
        (lambda model, first: copy.deepcopy(model.double()).float(), True),
        (lambda model, first: model.bfloat16().float(), True),
        (convert_a_part, True),
        (lambda model, first: pickle.loads(pickle.dumps(model)), True),
        (load_the_first_weights, False),
        (edit_without_a_count, False),
        (fold_the_weight_norm, False),
        (copy_and_edit, False),
    ],
)
def test_weights_that_are_changed_after_the_training_are_saved(tmp_path, change, is_averaged):
    config = training_config([], ema_decay=0.9, optim={"_target_": "torch.optim.SGD", "lr": 0.01})
    _, model = models(config)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    batches = torch.utils.data.DataLoader([batch(frames=8)] * 2, batch_size=None)
    quiet_trainer(max_epochs=1).fit(model, batches)
    average = torch.cat([value.flatten() for value in model._average.weights])
    model.batches = batches
    model = change(model, first)
    model._trainer = None
    held = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("audio_")}
    model.save_to(tmp_path / "saved.nemo")
    saved = AudioCodecModel.restore_from(tmp_path / "saved.nemo", map_location="cpu")
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items() if key in held)
    if is_averaged:
        torch.testing.assert_close(generator_weights(saved), average)
    else:
        assert all(torch.equal(value, held[key]) for key, value in saved.state_dict().items() if key in held)
        quiet_trainer(max_epochs=1).fit(model, batches)
        assert model._average.count == 2


def opened(path: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the encoder's and decoder's weights that each way of opening a training checkpoint reads."""
    first, validated, stock = (AudioCodecModel(OmegaConf.create(config)) for _ in range(3))
    first.maybe_init_from_pretrained_checkpoint(OmegaConf.create({"init_from_ptl_ckpt": str(path)}))
    loader = torch.utils.data.DataLoader([batch(frames=8)], batch_size=None)
    quiet_trainer().validate(validated, loader, ckpt_path=str(path), verbose=False)
    stock.load_state_dict(torch.load(path, weights_only=False)["state_dict"], strict=False)
    ways = {
        "restore_from": AudioCodecModel.restore_from(path, map_location="cpu"),
        "load_from_checkpoint": AudioCodecModel.load_from_checkpoint(path, map_location="cpu"),
        "init_from_ptl_ckpt": first,
        "validate": validated,
        "state dict": stock,
    }
    return {name: generator_weights(model) for name, model in ways.items()}


class Resumed(pl.Callback):
    """Weights and moving average with which a resumed run begins."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        model = AudioCodecModel(OmegaConf.create(config))
        loader = torch.utils.data.DataLoader([batch(frames=8)], batch_size=None)
        quiet_trainer(max_epochs=2, callbacks=[self]).fit(model, loader, ckpt_path=str(path))

    def on_train_start(self, trainer, model):
        self.trained, average = generator_weights(model), model._average
        self.average = average and torch.cat([value.flatten() for value in average.weights])
        self.count = average and average.count


class Fails(pl.Callback):
    """Callback that saves a checkpoint in a validation batch, as on a Slurm signal, and then fails."""

    def __init__(self, error: BaseException, folder: Any) -> None:
        self.error, self.folder = error, folder

    def on_validation_batch_end(self, trainer, pl_module, *args):
        if not trainer.sanity_checking:
            self.validated = generator_weights(pl_module)
            trainer.save_checkpoint(self.folder / "during.ckpt")
            raise self.error

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.folder / "after.ckpt")


@pytest.mark.parametrize("error", [ValueError("a clip"), SystemExit(143)])
def test_a_failed_validation_leaves_and_saves_the_trained_weights(tmp_path, error):
    config = training_config([], ema_decay=0.9, optim={"_target_": "torch.optim.SGD", "lr": 0.01})
    _, model = models(config)
    before = generator_weights(model)
    failing = Fails(error, tmp_path)
    batches = torch.utils.data.DataLoader([batch(frames=8)] * 2, batch_size=None)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, callbacks=[failing])  # fmt: skip
    with pytest.raises(type(error)):
        trainer.fit(model, batches, batches)
    trained, average = generator_weights(model), torch.cat([value.flatten() for value in model._average.weights])
    assert torch.equal(failing.validated, average)
    assert not torch.equal(trained, average)
    assert not torch.equal(trained, before)
    for name in ("during.ckpt", "after.ckpt"):
        resumed = Resumed(tmp_path / name, config)
        assert torch.equal(resumed.trained, trained)
        assert torch.equal(resumed.average, average)
        assert torch.equal(generator_weights(AudioCodecModel.restore_from(tmp_path / name)), average)
    model.save_to(tmp_path / "saved.nemo")
    assert torch.equal(generator_weights(model), trained)


def test_loaded_weights_are_not_scaled_and_unknown_terms_are_refused():
    optim = {"_target_": "torch.optim.SGD", "lr": 0.0}
    _, model = models(training_config([], initialize_from_data=True, optim=optim))
    before = generator_weights(model)
    train(model, [batch()])
    assert torch.equal(generator_weights(model), before)
    stock_only = AudioCodecModel(OmegaConf.create(training_config([])))
    with open_dict(stock_only.cfg):
        stock_only.cfg.mmd_loss = {"_target_": LOSSES + "MMDCodebookLoss"}
    with pytest.raises(ConfigError, match="mmd_loss"):
        train(stock_only, [batch()])


def test_random_weights_are_scaled_by_the_training_speech_when_asked():
    torch.manual_seed(0)
    spread = {}
    for wanted in (False, True):
        values = training_config([], initialize_from_data=wanted, optim={"_target_": "torch.optim.SGD", "lr": 0.0})
        model = AudioCodecModel(OmegaConf.create(values))
        loader = torch.utils.data.DataLoader([batch(4, 12)] * 2, batch_size=None)
        model._train_dl = loader
        train(model, [batch(4, 12)] * 2)
        with torch.no_grad():
            encoded = model.audio_encoder.encode_frames(batch(4, 12)["audio"])
        spread[wanted] = float(encoded.std(dim=(0, 2)).mean())
    assert spread[False] < 0.2 and spread[True] == pytest.approx(0.9, abs=0.05)
    # A second `fit` continues from the state of the first.
    before = generator_weights(model)
    model.audio_encoder.pre_conv.conv.bias.data += 1.0
    moved = generator_weights(model)
    train(model, [batch(4, 12)] * 2)
    assert torch.equal(generator_weights(model), moved) and not torch.equal(moved, before)


class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {key: value[0] for key, value in batch(1, 8, row).items()}


class OwnStep(AudioCodecModel):
    """A model with steps of a user, which do not call ours, and with optimizers that are used in several trainings."""

    optimizer = None

    def configure_optimizers(self):
        self.optimizer = self.optimizer or super().configure_optimizers()
        return self.optimizer

    def test_step(self, batch, batch_idx):
        self.tested = generator_weights(self)

    def predict_step(self, batch, batch_idx):
        self.predicted = generator_weights(self)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        audio, _, audio_gen, _, _ = self.reconstruct(batch)
        optimizer.zero_grad()
        self.manual_backward((audio - audio_gen).square().mean())
        optimizer.step()


def test_the_average_follows_a_training_step_of_a_user():
    model = OwnStep(OmegaConf.create(training_config([], ema_decay=0.5)))
    start = generator_weights(model).clone()
    train(model, [batch()] * 3)
    trained = generator_weights(model).clone()
    with model.averaged():
        average = generator_weights(model).clone()
    assert not torch.equal(average, start)
    assert (average - trained).norm() < (start - trained).norm()
    loader = torch.utils.data.DataLoader([batch()], batch_size=None)
    quiet_trainer().test(model, loader, verbose=False)
    quiet_trainer().predict(model, loader)
    assert torch.equal(model.tested, average) and torch.equal(model.predicted, average)
    assert torch.equal(generator_weights(model), trained)
    train(model, [batch()])
    assert model._average.count == 4


class NewOptimizers(pl.Callback):
    """Callback that replaces the optimizers, as scripts do that train more of the model later."""

    def on_train_batch_start(self, trainer, model, *_):
        trainer.optimizers = [torch.optim.SGD(model.gen_params, lr=0.01)]


def test_the_average_follows_optimizers_that_a_callback_replaces():
    model = AudioCodecModel(OmegaConf.create(training_config([], ema_decay=0.5)))
    loader = torch.utils.data.DataLoader([batch(frames=1)] * 3, batch_size=None)
    quiet_trainer(max_epochs=2, callbacks=[NewOptimizers()]).fit(model, loader)
    assert model._average.count == 6


class TwoOptimizers(AudioCodecModel):
    """A model with one optimizer for the encoder and one for the decoder."""

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.audio_encoder, self.audio_decoder)]

    def training_step(self, batch, batch_idx):
        audio, _, audio_gen, _, _ = self.reconstruct(batch)
        self.manual_backward((audio - audio_gen).square().mean())
        for optimizer in self.optimizers():
            optimizer.step()
        self.weights.append(generator_weights(self).clone())


def test_two_optimizers_update_the_average_once_per_batch():
    model = TwoOptimizers(OmegaConf.create(training_config([], ema_decay=0.99)))
    model.weights = [generator_weights(model).clone()]
    train(model, [batch(frames=1)] * 2)
    start, first, second = model.weights
    with model.averaged():
        torch.testing.assert_close(generator_weights(model), start.lerp(first, 50 / 51).lerp(second, 50 / 52))


class LateEncoder(TwoOptimizers):
    """A model whose encoder, which has the last optimizer, is not trained yet."""

    def training_step(self, batch, batch_idx):
        audio, _, audio_gen, _, _ = self.reconstruct(batch)
        self.manual_backward((audio - audio_gen).square().mean())
        self.optimizers()[1].step()

    def configure_optimizers(self):
        return super().configure_optimizers()[::-1]

    def optimizers(self, *args, **kwargs):
        return super().optimizers(*args, **kwargs)[::-1]


def test_the_average_follows_one_of_two_optimizers():
    model = LateEncoder(OmegaConf.create(training_config([], ema_decay=0.99)))
    train(model, [batch(frames=1)] * 2)
    assert model._average.count == 2


def test_weights_that_a_callback_loads_at_the_end_of_the_training_are_saved(tmp_path):
    model = AudioCodecModel(OmegaConf.create(training_config([], ema_decay=0.5)))
    best = {name: weight / 2 for name, weight in model.state_dict().items() if name.startswith("audio_")}
    load = pl.callbacks.LambdaCallback(on_train_end=lambda *_: model.load_state_dict(best, strict=False))
    loader = torch.utils.data.DataLoader([batch(frames=1)] * 2, batch_size=None)
    quiet_trainer(max_epochs=1, callbacks=[load]).fit(model, loader)
    model.save_to(tmp_path / "a.nemo")
    assert torch.equal(generator_weights(AudioCodecModel.restore_from(tmp_path / "a.nemo")), generator_weights(model))


class Rollback(pl.Callback):
    """Callback that loads good weights after a batch that makes the weights NaN."""

    def on_train_start(self, trainer, model):
        self.good = {name: value.clone() for name, value in model.state_dict().items()}

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if batch_idx == 1:
            model.load_state_dict(self.good)

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if batch_idx == 0:
            torch.nn.init.constant_(next(model.audio_decoder.parameters()), torch.nan)


def saved_and_read(model, loader, folder):
    model.save_to(folder / "a.nemo")
    return AudioCodecModel.restore_from(folder / "a.nemo")


def validated_and_trained(model, loader, folder):
    quiet_trainer().validate(model, loader, verbose=False)
    quiet_trainer(max_epochs=1).fit(model, loader)
    return saved_and_read(model, loader, folder)


def checkpointed_and_read(model, loader, folder):
    model.trainer.save_checkpoint(folder / "a.ckpt")
    return AudioCodecModel.load_from_checkpoint(folder / "a.ckpt")


@pytest.mark.parametrize("use", [saved_and_read, validated_and_trained, checkpointed_and_read])
def test_an_average_of_nan_restarts_when_the_weights_are_finite_again(use, tmp_path):
    model = AudioCodecModel(OmegaConf.create(training_config([], ema_decay=0.5, optim=FROZEN)))
    loader = torch.utils.data.DataLoader([batch(frames=1)] * 3, batch_size=None)
    quiet_trainer(max_epochs=1, callbacks=[Rollback()]).fit(model, loader)
    found = use(model, loader, tmp_path)
    assert torch.equal(generator_weights(found), generator_weights(model))
    assert generator_weights(found).isfinite().all()


def test_accelerate_refuses_a_model_that_is_being_trained():
    stock, _ = models(training_config([]))
    loader = torch.utils.data.DataLoader([batch(frames=1)], batch_size=None)
    late = pl.callbacks.LambdaCallback(on_fit_start=lambda *_: accelerate(stock))
    with pytest.raises(ConfigError, match="call accelerate before"):
        quiet_trainer(max_epochs=1, callbacks=[late]).fit(stock, loader)
    assert not isinstance(stock, AudioCodecModel)
    assert isinstance(accelerate(stock), AudioCodecModel)


class Surrounding(pl.LightningModule):
    """A model that is trained on the tokens of a frozen codec, which it accelerates when the training starts."""

    def __init__(self, codec: StockModel) -> None:
        super().__init__()
        self.codec = codec.freeze() or codec
        self.scale = torch.nn.Parameter(torch.ones(()))

    def on_fit_start(self):
        accelerate(self.codec)

    def training_step(self, batch, batch_idx):
        tokens, _ = self.codec.encode(audio=batch["audio"], audio_len=batch["audio_lens"])
        return self.scale * tokens.float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([self.scale], lr=0.1)


def test_a_frozen_codec_in_a_model_that_is_being_trained_can_be_accelerated():
    outer = Surrounding(models(training_config([]))[0])
    loader = torch.utils.data.DataLoader([batch(frames=1)], batch_size=None)
    quiet_trainer(max_epochs=1).fit(outer, loader)
    assert isinstance(outer.codec, AudioCodecModel) and outer.scale != 1


class Skipping(AudioCodecModel):
    """A model that skips batches without audio."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch["audio"].any() else None


def test_a_skipped_batch_leaves_no_gradients_of_the_update_before():
    silent = batch(frames=1) | {"audio": torch.zeros(2, 1024)}
    found = []
    for batches in (
        [batch(frames=1), batch(frames=1, seed=2), silent, batch(frames=1, seed=4)],
        [batch(frames=1, seed=4)],
    ):
        model = Skipping(OmegaConf.create(training_config([], accumulate_grad_batches=2, optim=FROZEN)))
        model.load_state_dict(found[0][0] if found else model.state_dict(), strict=False)
        found.append((model.state_dict(), train(model, batches).gradients[-1]))
    (_, expected), (_, alone) = found
    for name, gradient in alone.items():
        torch.testing.assert_close(expected[name], gradient)


class OwnDecoderTraining(AudioCodecModel):
    """A model whose decoder a user trains through the public methods, with Lightning's automatic optimization."""

    def __init__(self, cfg, call):
        super().__init__(cfg)
        self.automatic_optimization, self.call = True, call

    def configure_optimizers(self):
        return torch.optim.SGD(self.audio_decoder.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        return self.call(self, batch["audio"], batch["audio_lens"])[0].square().mean()


@pytest.mark.parametrize(
    "call",
    [
        lambda model, audio, audio_len: model(audio=audio, audio_len=audio_len),
        lambda model, audio, audio_len: model.decode(*model.encode(audio, audio_len)),
    ],
)
def test_a_user_trains_the_decoder_with_automatic_optimization(call):
    model = OwnDecoderTraining(OmegaConf.create(training_config([])), call)
    start = generator_weights(model).clone()
    train(model, [batch(frames=1)] * 2, accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert not torch.equal(generator_weights(model), start)
    assert not call(model, *batch(frames=1).values())[0].requires_grad


SMALLEST = training_config([STFT | {"resolutions": [[64, 32, 64]]}], ema_decay=0.5)
# Hooks that a subclass overrides without calling those of the base class
OWN_HOOKS = [
    ["configure_callbacks"],
    ["configure_callbacks", "setup", "on_load_checkpoint"],
    ["setup", "on_fit_start", "on_fit_end", "on_train_start", "on_validation_start", "on_validation_end",
     "on_validation_epoch_end", "on_save_checkpoint", "on_load_checkpoint"],
]  # fmt: skip


def train_twice(kind: type, folder: Path) -> dict[str, Any]:
    """Train a model with an average, resume the run, and return what was logged, trained and saved."""
    folder.mkdir()
    callback = Recorder()
    short = {"audio": batch()["audio"][:1, :1024], "audio_lens": torch.tensor([1024])}
    loader = torch.utils.data.DataLoader([short] * 2, batch_size=None)
    result: dict[str, Any] = {}
    for epochs, path in ((1, None), (2, folder / "1.ckpt")):
        torch.manual_seed(0)
        model = kind(OmegaConf.create(SMALLEST))
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback], num_sanity_val_steps=0)
        trainer.fit(model, loader, loader, ckpt_path=path)
        trainer.save_checkpoint(folder / f"{epochs}.ckpt")
        model.save_to(folder / f"{epochs}.nemo")
        result[f"val_loss {epochs}"] = quiet_trainer().validate(model, loader, verbose=False)[0]["val_loss"]
        result |= {f"trained {epochs}": generator_weights(model)} | {
            f"{name} {epochs}": generator_weights(AudioCodecModel.restore_from(folder / f"{epochs}.{name}"))
            for name in ("ckpt", "nemo")
        }
    result["losses"] = [{key: value for key, value in step.items() if "loss" in key} for step in callback.logged]
    return result


def test_hooks_of_a_user_do_not_replace_ours(tmp_path):
    expected = train_twice(AudioCodecModel, tmp_path / "reference")
    for trained, average in (("trained 1", "ckpt 1"), ("trained 2", "nemo 2")):
        assert not torch.equal(expected[trained], expected[average])
    for number, hooks in enumerate(OWN_HOOKS):
        kind = type("OwnHooks", (AudioCodecModel,), {name: lambda self, *args, **kwargs: None for name in hooks})
        own = train_twice(kind, tmp_path / str(number))
        for name, value in expected.items():
            torch.testing.assert_close(own[name], value, msg=f"{name} with own {hooks}")


def test_a_trainer_is_used_with_models_of_nemo_too():
    stock, ours = models(released_config([]))
    trainer, loader = quiet_trainer(), torch.utils.data.DataLoader([batch(frames=8)], batch_size=None)
    (expected,), (mine,) = (trainer.validate(model, loader, verbose=False) for model in (ours, stock))
    assert mine["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)


def test_initialization_names_batches_of_another_form():
    model = AudioCodecModel(OmegaConf.create(training_config([]) | {"initialize_from_data": True}))
    with pytest.raises(ConfigError, match="needs batches with a tensor 'audio', but the loader returns a list"):
        train(model, [list(batch().values())])


def weights_of_a_part(model, other):
    model.audio_encoder.load_state_dict(other.audio_encoder.state_dict())


def a_replaced_part(model, other):
    model.audio_decoder = other.audio_decoder


def weights_through_data(model, other):
    for weight, source in zip(model.audio_encoder.parameters(), other.audio_encoder.parameters(), strict=True):
        weight.data.copy_(source)


def test_converted_weights_are_still_random():
    model = AudioCodecModel(OmegaConf.create(training_config([])))
    for convert in (model.double, model.audio_encoder.float, model.float, model.half, model.float):
        convert()
        assert model._is_random
    model.audio_encoder.pre_conv.conv.bias.data[0] += 1
    assert not model._is_random


def test_a_trained_model_forgets_its_weights_and_their_average_on_the_meta_device():
    _, model = models(training_config([], ema_decay=0.9, optim=FROZEN))
    state = {key: 2 * value for key, value in model.state_dict().items() if "audio_" in key}
    train(model, [batch(frames=8)])
    model.to("meta").to_empty(device="cpu").load_state_dict(state, strict=False)
    with model.averaged():
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in state)
    assert model._average is None


@pytest.mark.parametrize("change", [weights_of_a_part, a_replaced_part, weights_through_data])
def test_weights_that_a_script_loads_into_a_part_are_not_scaled(change):
    config = OmegaConf.create(training_config([], optim=FROZEN) | {"initialize_from_data": True})
    model, other = AudioCodecModel(config), AudioCodecModel(config)
    change(model, other)
    before = generator_weights(model).clone()
    train(model, [batch()])
    assert torch.equal(generator_weights(model), before)


def test_a_search_for_the_learning_rate_does_not_prevent_the_initialization():
    encoders = []
    finder = pl.callbacks.LearningRateFinder(num_training_steps=2, update_attr=False)
    for callbacks in ([], [finder]):
        torch.manual_seed(0)
        model = AudioCodecModel(OmegaConf.create(training_config([], optim=FROZEN) | {"initialize_from_data": True}))
        model.lr = 0.0
        loader = torch.utils.data.DataLoader([batch(frames=8)] * 4, batch_size=None)
        quiet_trainer(max_steps=1, callbacks=callbacks).fit(model, loader)
        encoders.append(generator_weights(model))
    torch.testing.assert_close(*encoders)


def test_initialization_uses_the_loader_that_a_script_passes_to_fit():
    config = training_config([]) | {"initialize_from_data": True}
    model = AudioCodecModel(OmegaConf.create(config))
    before = model.audio_encoder.pre_conv.conv.bias.clone()
    train(model, [batch()])
    assert not torch.equal(model.audio_encoder.pre_conv.conv.bias, before)


def test_initialization_takes_no_batch_from_persistent_workers():
    model = AudioCodecModel(OmegaConf.create(training_config([], initialize_from_data=True)))
    loader = torch.utils.data.DataLoader(Clips(), batch_size=2, num_workers=1, persistent_workers=True)
    model._train_dl = loader
    assert len(train(model, loader).logged) == 4
    assert not model._is_random


# Importing NeMo takes longer than this training, so one process imports it and forks a child for each process of both
# runs, with the environment variables that torchrun sets.
DISTRIBUTED = """
import os, socket, sys
import pytest, torch, lightning.pytorch as pl
from omegaconf import OmegaConf
from nemo_lfr import AudioCodecModel, ConfigError
from tests.nemo.test_training_with_nemo import batch

def refused(processes):
    # Check that a strategy with which DDP would fail is refused in all processes
    model = AudioCodecModel(OmegaConf.load("config.yaml"))
    loader = torch.utils.data.DataLoader([batch(2, 8)], batch_size=None)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=processes, strategy="ddp", max_epochs=1, **options)
    with pytest.raises(ConfigError, match="pass trainer.strategy=ddp_find_unused_parameters_true"):
        trainer.fit(model, loader)

def run(processes, rank):
    if processes > 1:
        refused(processes)
    torch.manual_seed(0)
    model = AudioCodecModel(OmegaConf.load("config.yaml"))
    if rank == 0:  # weights are read in the first process, for all
        model._random_weights = None
    rows = batch(4, 8)
    split = [{key: value[i : i + 4 // processes] for key, value in rows.items()} for i in range(0, 4, 4 // processes)]
    trainer = pl.Trainer(
        accelerator="cpu", devices=processes, max_epochs=2, logger=False, enable_checkpointing=False,
        strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto", enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = lambda: torch.utils.data.DataLoader(split, batch_size=None)
    trainer.fit(model, loader(), loader())
    assert trainer.world_size == processes and trainer.global_rank == rank
    if trainer.is_global_zero:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if "per_second" not in key}
        metrics["batch_duration"] *= processes  # the mean of the processes
        torch.save({"state": model.state_dict(), "metrics": metrics}, f"{processes}.pt")

torch.set_num_threads(1)
children = []
for processes in (1, 2):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for rank in range(processes):
        children.append(os.fork())
        if not children[-1]:
            if processes > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            run(processes, rank)
            os._exit(0)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one_with_a_doubled_batch(tmp_path):
    optim = {"_target_": "torch.optim.SGD", "lr": 1e-2}
    config = training_config([SMALL_STFT, SMALL_PERIOD], optim=optim, initialize_from_data=True)
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DISTRIBUTED]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    assert {"val_loss", "g_loss_mel_l1", "d_loss", "t_loss"} <= one["metrics"].keys()
    # After two updates, the training metrics differ by rounding. The loss of one half of the batch differs by 1 %.
    for key, value in one["metrics"].items():
        assert two["metrics"][key] == pytest.approx(value, rel=1e-5 if key.startswith("val") else 3e-4), key
    torch.manual_seed(0)
    start = AudioCodecModel(OmegaConf.load(tmp_path / "config.yaml"))
    start.build_discriminator()
    before = start.state_dict()
    for part in ("audio_encoder", "audio_decoder", "discriminator"):
        keys = [key for key in before if key.startswith(part + ".") and before[key].is_floating_point()]
        moved = torch.cat([(one["state"][key] - before[key]).flatten() for key in keys])
        differs = torch.cat([(one["state"][key] - two["state"][key]).flatten() for key in keys])
        assert 0 < differs.norm() < 0.01 * moved.norm() or differs.norm() == 0 < moved.norm(), part


def test_a_validation_before_the_first_step_leaves_nothing_that_training_cannot_use():
    spectra.hann.cache_clear()
    fitted()  # Lightning's sanity check validates in inference mode


@pytest.mark.skipif(os.name == "nt", reason="folders have no locks")
def test_a_second_training_in_a_folder_of_checkpoints_is_refused(tmp_path):
    """A notebook may train several times in one folder, and another process when the notebook has finished."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    options = {"enable_checkpointing": True, "callbacks": [pl.callbacks.ModelCheckpoint(folder)]}
    with exclusive(folder), pytest.raises(ConfigError, match=f"{folder}: another run is writing to this folder"):
        fitted(**options)
    assert not list(folder.iterdir())
    lock_run(folder)
    for _ in range(2):
        fitted(**options)
        with exclusive(folder):
            pass


def fitted(config: dict[str, Any] | None = None, **trainer_options: Any) -> tuple[Any, pl.Trainer]:
    """Return our model after two steps and a validation."""
    _, model = models(config or training_config([SMALL_STFT]))
    options = {"enable_checkpointing": False, **trainer_options}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, **options,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader([batch(frames=8)] * 2, batch_size=None)
    trainer.fit(model, batches, batches)
    return model, trainer


def test_a_model_is_copied_and_loaded_from_a_checkpoint_strictly_or_not(tmp_path):
    """In stock NeMo, `copy.deepcopy` and `load_from_checkpoint(strict=False)` fail."""
    model, trainer = fitted()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = generator_weights(model)
    for other in (
        copy.deepcopy(model),
        AudioCodecModel.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu"),
        AudioCodecModel.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu", strict=False),
    ):
        assert torch.equal(generator_weights(other), before)
        next(other.audio_encoder.parameters()).data.zero_()
        assert torch.equal(generator_weights(model), before)


@pytest.fixture(scope="module")
def training_checkpoint(tmp_path_factory):
    """Return a checkpoint that Lightning wrote before the first step, and the .nemo file that it started from."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_nemo(folder / "a.nemo", codec_config("two_stages"))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    trainer.strategy.connect(AudioCodecModel.restore_from(str(folder / "a.nemo"), map_location="cpu"))
    trainer.save_checkpoint(folder / "good.ckpt")
    return folder / "good.ckpt"


def rewritten(path: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    torch.save(edit(torch.load(path, weights_only=False)), target)


def without_decoder(values: dict[str, Any]) -> dict[str, Any]:
    state = {key: value for key, value in values["state_dict"].items() if not key.startswith("audio_decoder.")}
    return values | {"state_dict": state}


def with_namespace(values: dict[str, Any]) -> dict[str, Any]:
    cfg = argparse.Namespace(**values["hyper_parameters"]["cfg"])
    return values | {"hyper_parameters": {"cfg": cfg}}


ASR_CONFIG = {"target": "nemo.collections.asr.models.EncDecCTCModel", "sample_rate": 16000, "encoder": {"layers": 2}}
# How a file is made from a good checkpoint, and the error when it is loaded.
BAD_TRAINING_CHECKPOINTS = {
    "missing": (lambda path, target: None, "no such file"),
    "folder": (lambda path, target: target.mkdir(), "this is a folder; pass a .ckpt file"),
    "nemo": (
        lambda path, target: shutil.copy(path.with_name("a.nemo"), target),
        "this is a .nemo file, not a training checkpoint; use restore_from",
    ),
    "cut": (lambda path, target: target.write_bytes(path.read_bytes()[:-1000]), "the file is damaged"),
    "empty": (lambda path, target: target.write_bytes(b""), "the file is empty"),
    "text": (lambda path, target: target.write_text("hello"), "the file is damaged or not"),
    "plain": (lambda path, target: rewritten(path, target, lambda v: v["state_dict"]), "no hyper_parameters"),
    "list": (lambda path, target: rewritten(path, target, lambda values: [1, 2]), "no state dict"),
    "asr": (
        lambda path, target: rewritten(
            path, target, lambda values: values | {"hyper_parameters": {"cfg": OmegaConf.create(ASR_CONFIG)}}
        ),
        "pass a checkpoint of the LFR codec family",
    ),
    "half": (lambda path, target: rewritten(path, target, without_decoder), "lacks weights .*audio_decoder"),
    "unconfigured": (
        lambda path, target: rewritten(path, target, lambda v: v | {"hyper_parameters": OmegaConf.create({})}),
        "no 'sample_rate'",
    ),
    "namespace": (
        lambda path, target: rewritten(path, target, with_namespace),
        "no DictConfig named cfg, which NeMo needs; use restore_from",
    ),
    "flat": (
        lambda path, target: rewritten(path, target, lambda v: v | {"hyper_parameters": v["hyper_parameters"]["cfg"]}),
        "no DictConfig named cfg, which NeMo needs; use restore_from",
    ),
}


@pytest.mark.parametrize("name", BAD_TRAINING_CHECKPOINTS)
def test_a_file_that_is_no_training_checkpoint_of_the_codec_is_named(name, training_checkpoint, tmp_path):
    make, message = BAD_TRAINING_CHECKPOINTS[name]
    make(training_checkpoint, tmp_path / f"{name}.ckpt")
    with pytest.raises(CheckpointError, match=rf"/{name}\.ckpt: .*{message}") as error:
        AudioCodecModel.load_from_checkpoint(tmp_path / f"{name}.ckpt", map_location="cpu")
    assert "\n" not in str(error.value)


def test_bf16_mixed_learns_like_fp32_and_quantizes_in_fp32(monkeypatch):
    codes = []
    forward = GroupFiniteScalarQuantizer.forward

    def watched(self, inputs, input_len=None):
        result = forward(self, inputs, input_len)
        codes.append(result[0].detach())
        return result

    monkeypatch.setattr(GroupFiniteScalarQuantizer, "forward", watched)
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        optim = {"_target_": "torch.optim.SGD", "lr": 1e-4}  # larger steps amplify rounding errors
        _, trainer = fitted(released_config([SMALL_STFT], optim=optim), precision=precision)
        losses[precision] = float(trainer.callback_metrics["val_loss"])
    for values in codes:
        assert values.dtype == torch.float32 and torch.allclose((values * 12).round(), values * 12)
    assert losses["bf16-mixed"] != losses["32-true"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.1)


def test_speed_perplexity_and_levels_are_logged():
    _, trainer = fitted()
    assert trainer.callback_metrics["samples_per_second"] > 0
    model = AudioCodecModel.restore_from(bundled_checkpoint(), map_location="cpu")
    clips = [batch(1, frames=20), batch(1, frames=12)]
    (metrics,) = trainer.validate(model, torch.utils.data.DataLoader(clips, batch_size=None), verbose=False)
    tokens = torch.cat([model.encode(clip["audio"], clip["audio_lens"])[0] for clip in clips], dim=2)[0]
    shares = [codebook.unique(return_counts=True)[1] / 32 for codebook in tokens]
    expected = torch.stack([torch.special.entr(share).sum().exp() for share in shares]).mean()
    assert expected > 2 and metrics["val_perplexity"] == pytest.approx(float(expected), rel=1e-4)
    assert 0.1 < metrics["val_levels_used"] <= 1


def test_gradients_are_clipped_to_the_norm_that_the_config_names():
    _, model = models(training_config([SMALL_STFT], clip_grad_norm=0.01))
    recorder = train(model, [batch(frames=8)])
    assert len(recorder.gradients) == 2  # of the discriminators and of the generator
    for gradients in recorder.gradients:
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_non_finite_step_changes_nothing():
    _, model = models(training_config([SMALL_STFT], skip_nan_gradients=True))
    bad = batch(frames=8)
    bad["audio"][0, 100] = float("nan")
    before = generator_weights(model)
    train(model, [bad])
    assert torch.equal(generator_weights(model), before)
    train(model, [batch(frames=8)])
    after = generator_weights(model)
    assert after.isfinite().all() and not torch.equal(after, before)


def test_compiled_parts_learn_the_same():
    recorders = []
    for compiler in (None, "aot_eager"):  # the default, "inductor", runs a C++ compiler for minutes
        _, model = models(training_config([], compile=compiler))
        recorders.append(train(model, [batch(frames=8)]))
        assert (compiler is not None) == (model.audio_encoder._compiled_call_impl is not None)
    plain, compiled = recorders
    assert compiled.logged[0]["g_loss_mel_l1"] == pytest.approx(plain.logged[0]["g_loss_mel_l1"], rel=1e-5)
    for key, gradient in plain.gradients[0].items():
        assert (compiled.gradients[0][key] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, key


# Codebook dropout, with the key of NeMo after 3.0.0, which this test's NeMo does not know.


def test_without_codebook_dropout_no_random_number_is_drawn():
    for changes in ({}, {"codebook_dropout_rate": 0.0}, {"codebook_dropout_rate": None}):
        _, model = models(training_config([], **changes))
        model.train()
        torch.manual_seed(0)
        model.reconstruct(batch())
        expected = torch.manual_seed(0).get_state()
        torch.manual_seed(0)
        model.reconstruct(batch())
        assert torch.equal(torch.get_rng_state(), expected)


def test_codebook_dropout_reaches_the_decoder_in_training_only():
    stock, model = models(released_config([], codebook_dropout_rate=1.0))
    plain = model.eval().reconstruct(batch())
    model.train()
    torch.manual_seed(3)
    _, _, audio, encoded, tokens = model.reconstruct(batch())
    # NeMo draws which examples lose codebooks, and then how many codebooks each example keeps.
    torch.manual_seed(3)
    torch.rand(2)
    kept = torch.randint(1, 8, [2])
    codes, _ = stock.vector_quantizer(inputs=encoded, input_len=torch.full((2,), 12))
    for row, number in enumerate(kept.tolist()):
        codes[row, 4 * number :] = 0
    expected, _ = model.audio_decoder(inputs=codes, input_len=torch.full((2,), 12))
    torch.testing.assert_close(audio, expected, rtol=0, atol=1e-5)
    assert torch.equal(tokens, plain[4]) and not torch.allclose(audio, plain[2])
    # Dimensions that are dropped get no gradient.
    encoded.retain_grad()
    audio.sum().backward()
    for row, number in enumerate(kept.tolist()):
        assert encoded.grad[row, : 4 * number].any() and not encoded.grad[row, 4 * number :].any()


def test_a_model_trains_with_codebook_dropout():
    _, model = models(training_config([SMALL_STFT], codebook_dropout_rate=0.5))
    before = generator_weights(model)
    train(model, [batch(4)] * 2)
    assert generator_weights(model).isfinite().all() and not torch.equal(generator_weights(model), before)


def test_codebook_dropout_needs_several_codebooks():
    config = OmegaConf.create(training_config([], codebook_dropout_rate=0.1))
    check_training(config, 2)
    with pytest.raises(ConfigError, match="has only one codebook"):
        check_training(config, 1)


# Invalid values of a training config


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        *(({"codebook_dropout_rate": rate}, "pass a number from 0 to 1") for rate in (1.5, -0.1, True, "often")),
        ({"max_epochs": 1.5}, r"max_epochs is 1\.5"),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0; pass a whole number from 1"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0"),
        ({"disc_update_period": 0}, "disc_update_period is 0"),
        ({"disc_updates_per_period": 3, "disc_update_period": 2}, "disc_updates_per_period is 3, but"),
        ({"mel_loss_l1_scale": float("nan")}, "mel_loss_l1_scale is nan"),
        ({"stft_loss_scale": -1}, "stft_loss_scale is -1"),
        ({"gen_loss_scale": "much"}, "gen_loss_scale is 'much'"),
        ({"mel_loss_log_guard": 0}, "mel_loss_log_guard is 0"),
        ({"clip_grad_norm": 0}, "clip_grad_norm is 0"),
        ({"ema_decay": 2}, "ema_decay is 2"),
        ({"loss_resolutions": [[0, 1, 1]], "mel_loss_dims": [5]}, r"loss_resolutions contains \[0, 1, 1\]"),
        ({"loss_resolutions": [[64, 16, 65]], "mel_loss_dims": [5]}, "not longer than the FFT size"),
        ({"loss_resolutions": None}, "loss_resolutions is None"),
        ({"mel_loss_dims": [0]}, r"mel_loss_dims is \[0\]"),
        ({"mel_loss_dims": [5]}, "loss_resolutions has . items, but mel_loss_dims has 1"),
        ({"optim": {"_target_": "torch.optim.SGD", "lr": -1}}, r"optim\.lr is -1"),
        ({"optim": {"_target_": "torch.optim.SGD", "lr": 1, "sched": {"gamma": "x"}}}, r"optim\.sched\.gamma is 'x'"),
    ],
)
def test_an_invalid_number_of_the_config_is_named(changes, match):
    with pytest.raises(ConfigError, match=match):
        AudioCodecModel(OmegaConf.create(training_config([]) | changes))


@pytest.mark.parametrize(
    ("discriminator", "optim", "match"),
    [
        (PERIOD | {"periods": [0]}, {}, r"periods is \[0\]"),
        (PERIOD | {"channels": 0}, {}, "channels is 0"),
        (STFT | {"resolutions": [[64, 16]]}, {}, r"resolutions contains \[64, 16\]"),
        (STFT | {"resolutions": [[16, 4, 16]]}, {}, "has 9 frequency bins; the discriminator needs at least 17"),
        (BANDS | {"stft_bands": [[0.5, 0.25]]}, {}, "stft_bands"),
        (BANDS | {"stft_bands": [[0.0, 0.01]]}, {}, "frequency bins"),
        (PERIOD, {"momentum": "x"}, "optim: the optimizer or its schedule cannot be built"),
        (PERIOD, {"betas": [2, 3]}, "optim: the optimizer or its schedule cannot be built"),
        (PERIOD, {"sched": {"name": "Nope"}}, "optim: the optimizer or its schedule cannot be built"),
    ],
)
def test_an_invalid_discriminator_or_optimizer_is_named(discriminator, optim, match):
    optim = {"_target_": "torch.optim.SGD", "lr": 1e-3} | optim
    model = AudioCodecModel(OmegaConf.create(training_config([discriminator], optim=optim, max_steps=9)))
    with pytest.raises(ConfigError, match=match):
        train(model, [batch()])


# Options of the trainer or changes of the config -> message.
REFUSED = {
    "accumulation": (
        {"accumulate_grad_batches": 4},
        {},
        r"accumulate_grad_batches is 4, .*set accumulate_grad_batches: 4",
    ),
    "clipping": (
        {"gradient_clip_val": 0.5},
        {},
        r"gradient_clip_val is 0\.5, .*set clip_grad_norm: 0\.5 in the model",
    ),
    "no optimizer": ({}, {"optim": None}, r"no section optim, .*model\.cfg\.optim = "),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_options_without_effect_on_two_optimizers_are_refused(kind):
    options, changes, message = REFUSED[kind]
    model = AudioCodecModel(OmegaConf.create(training_config([]) | changes))
    with pytest.raises(ConfigError, match=message):
        train(model, [batch()], **options)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_changes_the_weights_is_refused(precision):
    model = AudioCodecModel(OmegaConf.create(training_config([])))
    with pytest.raises(ConfigError, match=f"precision is {precision}, .*use one of 32-true, bf16-mixed"):
        train(model, [batch()], precision=precision)


def test_short_clips_are_padded_for_losses_and_discriminators():
    model = AudioCodecModel(OmegaConf.create(training_config([STFT | {"resolutions": [[4096, 1024, 4096]]}, PERIOD])))
    short = {"audio": batch()["audio"][:, :700], "audio_lens": torch.tensor([700, 300])}
    logged = train(model, [short], [short]).logged[0]
    assert torch.isfinite(torch.tensor([logged[key] for key in logged if "loss" in key])).all()


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"dataset": {"n_samples": 1024}}, r"train_ds\.dataset\.n_samples is 1024, .*set it to 3073 or more"),
        (
            {"dataset_args": {"segment_duration": 0.1}, "dataloader_params": {"use_lhotse": True}},
            r"train_ds\.dataset_args\.segment_duration is 0\.1, .*at least 3073 samples; set it to 0\.14 or more",
        ),
    ],
)
def test_segments_too_short_for_a_discriminator_are_refused(section, match):
    config = released_config([STFT | {"resolutions": [[4096, 1024, 4096]]}])
    model = AudioCodecModel(OmegaConf.create(config))
    with open_dict(model.cfg):
        model.cfg.train_ds = section
    with pytest.raises(ConfigError, match=match):
        train(model, [batch()])


def test_a_run_that_is_complete_or_that_nemo_cannot_resume_is_reported(tmp_path, caplog):
    loader = torch.utils.data.DataLoader([batch(frames=8)], batch_size=None)
    first, complete, averaged = (AudioCodecModel(OmegaConf.create(training_config([]))) for _ in range(3))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(first, loader)
    assert "no step was trained" not in caplog.text
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    quiet_trainer(max_epochs=1).fit(complete, loader, ckpt_path=str(tmp_path / "last.ckpt"))
    assert "no step was trained, because the run to resume is complete" in caplog.text
    with pytest.raises(ConfigError, match=r"remove exp_manager\.ema, and set model\.ema_decay"):
        trainer = quiet_trainer(max_epochs=2, callbacks=[EMA(0.9)])
        trainer.fit(averaged, loader, ckpt_path=str(tmp_path / "last.ckpt"))


def test_a_restored_model_is_trained_in_training_mode(tmp_path):
    """Frozen parts stay in evaluation mode. Stock NeMo restores models in training mode."""
    AudioCodecModel(OmegaConf.create(training_config([]))).save_to(tmp_path / "codec.nemo")
    model = AudioCodecModel.restore_from(tmp_path / "codec.nemo")
    model.audio_encoder.freeze()
    modes = {}

    class Modes(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            modes.update((name, part.training) for name, part in module.named_modules())

    loader = torch.utils.data.DataLoader([batch(frames=8)], batch_size=None)
    quiet_trainer(max_epochs=1, callbacks=[Modes()]).fit(model, loader)
    assert modes[""] and modes["audio_decoder"] and modes["audio_decoder.pre_conv"] and modes["vector_quantizer"]
    assert not any(mode for name, mode in modes.items() if name.startswith("audio_encoder"))


@pytest.mark.parametrize(
    ("trained", "tuned", "warned"),
    [
        ([SMALL_STFT], [SMALL_STFT], ""),
        ([SMALL_STFT], [SMALL_STFT, SMALL_PERIOD], "18 of 37"),
        ([SMALL_STFT], [], ""),
        ([], [SMALL_STFT], ""),
        ([SMALL_PERIOD], [SMALL_PERIOD | {"channels": 4}], "16 of 18"),
    ],
)
def test_discriminators_without_weights_in_the_checkpoint_are_reported(trained, tuned, warned, tmp_path, caplog):
    before, after = (AudioCodecModel(OmegaConf.create(training_config(parts))) for parts in (trained, tuned))
    before.build_discriminator()
    assert "random initial values" not in caplog.text
    before.save_to(tmp_path / "codec.nemo")
    start = OmegaConf.create({"init_from_nemo_model": str(tmp_path / "codec.nemo")})
    after.maybe_init_from_pretrained_checkpoint(start)
    after.build_discriminator()
    reports = [record.getMessage() for record in caplog.records if "random initial values" in record.getMessage()]
    assert len(reports) == bool(warned) and all(report.startswith(warned) for report in reports)
    saved = before.state_dict()
    for key, value in after.state_dict().items():
        if key.startswith("discriminator.") and key in saved and value.shape == saved[key].shape:
            assert torch.equal(value, saved[key])


def test_discriminator_weights_are_dropped_if_the_config_has_no_discriminators():
    trained = AudioCodecModel(OmegaConf.create(training_config([SMALL_STFT])))
    trained.build_discriminator()
    config = OmegaConf.create(training_config([]) | {"discriminator": None})
    for model in (AudioCodecModel(config), StockModel(config)):
        model.load_state_dict(trained.state_dict(), strict=False)
        assert not any(key.startswith("discriminator.") for key in model.state_dict())


FREEZING = {
    "freeze": lambda model: model.freeze(),
    "freeze and unfreeze": lambda model: (model.freeze(), model.unfreeze()),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "freeze and requires_grad_": lambda model: (model.freeze(), model.requires_grad_(True)),
    "parts": lambda model: (
        model.audio_encoder.freeze(),
        model.audio_decoder.freeze(),
        model.vector_quantizer.freeze(),
    ),
}


@pytest.mark.parametrize("kind", FREEZING)
def test_discriminators_are_frozen_if_those_of_stock_are(kind):
    config = OmegaConf.create(training_config([SMALL_STFT]))
    states = []
    for model in (AudioCodecModel(config), StockModel(config)):
        FREEZING[kind](model)
        if isinstance(model, AudioCodecModel):
            model.build_discriminator()
        states.append({name: value.requires_grad for name, value in model.discriminator.named_parameters()})
    assert states[0] == states[1] and any(states[0].values()) == (kind not in ("freeze", "requires_grad_"))


def test_a_training_checkpoint_without_hyper_parameters_gives_the_initial_weights(tmp_path):
    config, path = OmegaConf.create(training_config([])), tmp_path / "weights.ckpt"
    first, ours, stock = AudioCodecModel(config), AudioCodecModel(config), StockModel(config)
    torch.save({"state_dict": first.state_dict(), "epoch": 3}, path)
    for model in (ours, stock):
        model.maybe_init_from_pretrained_checkpoint(OmegaConf.create({"init_from_ptl_ckpt": str(path)}))
        assert all(torch.equal(model.state_dict()[key], value) for key, value in first.state_dict().items())


def test_a_section_of_initial_weights_names_the_file_that_pytorch_refuses(tmp_path):
    config, path = OmegaConf.create(training_config([])), tmp_path / "weights.ckpt"
    model = AudioCodecModel(config)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": {"cfg": config}}, path)
    section = OmegaConf.create({"init_from_ptl_ckpt": {"first": {"path": str(path)}}})
    with pytest.raises(CheckpointError, match=r"init_from_ptl_ckpt: a file of this section \(.*weights\.ckpt\)"):
        model.maybe_init_from_pretrained_checkpoint(section)


def test_only_one_file_may_give_the_initial_weights():
    model = AudioCodecModel(OmegaConf.create(training_config([])))
    files = {"init_from_ptl_ckpt": "a.ckpt", "init_from_nemo_model": "b.nemo"}
    with pytest.raises(ConfigError, match="init_from_ptl_ckpt and init_from_nemo_model are both set"):
        model.maybe_init_from_pretrained_checkpoint(OmegaConf.create(files))


ADAM = {"_target_": "torch.optim.Adam", "lr": 1e-3}
ANOTHER_PERIOD = SMALL_PERIOD | {"periods": [3]}


@pytest.mark.parametrize(
    ("discriminators", "optim", "match"),
    [
        ([ANOTHER_PERIOD, SMALL_STFT], None, None),  # as before
        (
            [SMALL_PERIOD | {"periods": [2, 5]}, SMALL_STFT],
            None,
            "section discriminator of the config does not match the checkpoint: discriminator",
        ),
        ([ANOTHER_PERIOD], None, "section discriminator .* in the checkpoint, but is missing in the model"),
        ([], None, "section discriminator"),
        (
            [ANOTHER_PERIOD, SMALL_STFT],
            ADAM,
            "section optim .*: the optimizer in the checkpoint is not Adam: its settings ",
        ),
    ],
)
def test_a_run_is_resumed_only_with_its_discriminators_and_optimizer(tmp_path, discriminators, optim, match):
    model = AudioCodecModel(OmegaConf.create(training_config([ANOTHER_PERIOD, SMALL_STFT])))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, torch.utils.data.DataLoader([batch(frames=8)], batch_size=None))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    config = training_config(discriminators, **({"optim": optim} if optim else {}))
    resumed = AudioCodecModel(OmegaConf.create(config))
    loader = torch.utils.data.DataLoader([batch(frames=8)], batch_size=None)
    if match is None:
        quiet_trainer(max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "last.ckpt")
        assert resumed._resumed is None
        return
    with pytest.raises(ConfigError, match=rf"last\.ckpt: .*{match}.*init_from_ptl_ckpt"):
        quiet_trainer(max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "last.ckpt")


def add_a_name(group):
    group["name"] = "generator"


def remove_a_newer_setting(group):
    del group["decoupled_weight_decay"]  # unknown to PyTorch 2.6


@pytest.mark.parametrize("change", [add_a_name, remove_a_newer_setting])
def test_a_run_is_resumed_with_the_settings_of_another_version_or_script(tmp_path, change):
    config = OmegaConf.create(training_config([], optim=ADAM))
    loader = torch.utils.data.DataLoader([batch(frames=8)], batch_size=None)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(AudioCodecModel(config), loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    change(checkpoint["optimizer_states"][0]["param_groups"][0])
    torch.save(checkpoint, tmp_path / "last.ckpt")
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(AudioCodecModel(config), loader, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.current_epoch == 2


class OwnHead(AudioCodecModel):
    """A model to which a user adds a layer with its own group of parameters."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.head = torch.nn.Linear(2, 2)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.add_param_group({"params": list(self.head.parameters())})
        return optimizer


def test_a_run_of_a_subclass_with_more_parameters_is_resumed(tmp_path):
    config = OmegaConf.create(training_config([], optim=ADAM))
    loader = torch.utils.data.DataLoader([batch(frames=1)], batch_size=None)
    for epochs, path in ((1, None), (2, tmp_path / "1.ckpt")):
        trainer = quiet_trainer(max_epochs=epochs)
        trainer.fit(OwnHead(config), loader, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
    assert trainer.current_epoch == 2
