"""Compare training with stock NeMo after a caller has changed the losses and methods that NeMo's steps use."""

import logging
from types import MethodType
from typing import Any

import pytest
import torch

pytest.importorskip("nemo", reason="stock NeMo is the reference here: pip install '.[nemo]'")

from hydra.utils import instantiate
from nemo.collections.tts.losses import audio_codec_loss
from omegaconf import OmegaConf, open_dict
from torch import nn

from nemo_lfr import AudioCodecModel, accelerate
from nemo_lfr.errors import ConfigError
from tests.nemo.test_training_with_nemo import (
    SMALL_STFT,
    batch_without_ties,
    models,
    train,
    training_config,
)


class OwnMel(nn.Module):
    """Replacement for the mel loss, which is called with the arguments of NeMo's."""

    def forward(self, audio_real, audio_gen, audio_len):
        difference = audio_real - audio_gen
        return difference.abs().mean() * 3, difference.square().mean()


def own_mel(model):
    model.mel_loss_fn = OwnMel()


def no_mel_and_twice_the_stft(model):
    model.mel_loss_l1_scale, model.stft_loss_scale = 0.0, 2.0


def a_scale_that_grows(model):
    """Raise a scale before each step, as a callback would."""
    step = type(model).should_update_disc

    def raise_scale(self, batch_idx):
        self.time_domain_loss_scale = 1.0 + 20 * batch_idx
        return step(self, batch_idx)

    model.should_update_disc = MethodType(raise_scale, model)


def another_log_guard(model):
    model.mel_loss_fn = audio_codec_loss.MultiResolutionMelLoss(
        sample_rate=model.sample_rate,
        mel_dims=model.cfg.mel_loss_dims,
        resolutions=model.cfg.loss_resolutions,
        log_guard=0.5,
    )


def patched_stft(model):
    forward = model.stft_loss_fn.forward
    model.stft_loss_fn.forward = lambda **arguments: 3 * forward(**arguments)


def hooked_time_domain(model):
    model.time_domain_loss_fn.register_forward_hook(lambda module, args, output: output / 2)


def hinged_generator(model):
    model.gen_loss_fn = audio_codec_loss.GeneratorHingedLoss()


def hinged_discriminator(model):
    model.disc_loss_fn = audio_codec_loss.DiscriminatorHingedLoss()


def relative_features(model):
    model.feature_loss_fn = audio_codec_loss.RelativeFeatureMatchingLoss()


def own_batches(model):
    """Train on the first half of each recording."""
    process = type(model)._process_batch

    def shortened(self, batch):
        return process(self, {"audio": batch["audio"][:, :4096], "audio_lens": batch["audio_lens"] // 2})

    model._process_batch = MethodType(shortened, model)


def hooked_discriminator(model):
    if isinstance(model, AudioCodecModel):
        model.build_discriminator()
    model.discriminator.register_forward_hook(lambda module, args, output: ([s + 1 for s in output[0]], *output[1:]))


def stock_discriminator(model):
    """Replace our discriminators with NeMo's, which have no `preprocess` and `score`."""
    if isinstance(model, AudioCodecModel):
        model.build_discriminator()
    weights = {key: value.clone() for key, value in model.discriminator.state_dict().items()}
    model.discriminator = instantiate(config()["discriminator"])
    model.discriminator.load_state_dict(weights)


def twice_the_stft_from_the_second_step(model):
    """Replace a loss during training, as a callback would."""

    def replace_loss(batch, batch_idx):
        if batch_idx == 1:
            model.stft_loss_fn = TwiceTheStft(model.stft_loss_fn)

    model.on_train_batch_start = replace_loss


class TwiceTheStft(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, **arguments):
        return 2 * self.loss(**arguments)


def no_discriminator(model):
    model.discriminator = None


CHANGES = {
    change.__name__: change
    for change in (
        own_mel, no_mel_and_twice_the_stft, a_scale_that_grows, another_log_guard, patched_stft, hooked_time_domain,
        hinged_generator, hinged_discriminator, relative_features, own_batches, hooked_discriminator,
        stock_discriminator,
        twice_the_stft_from_the_second_step,
        no_discriminator,
    )
}  # fmt: skip


def config() -> dict[str, Any]:
    return training_config([SMALL_STFT], time_domain_loss_scale=1.0)


def twin(stock):
    """Return another stock model with the same weights."""
    model = type(stock)(stock.cfg)
    model.load_state_dict({key: value.clone() for key, value in stock.state_dict().items()})
    return model


def last_gradient(run) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in run.gradients[-1].values()])


def differ(run, other, tolerance: float) -> bool:
    """Return whether a loss of two trainings, or the last gradient, differs by more than a relative tolerance."""
    if any(("d_loss" in own) != ("d_loss" in theirs) for own, theirs in zip(run.logged, other.logged, strict=True)):
        return True
    gradients = [last_gradient(run), last_gradient(other)]
    return bool((gradients[0] - gradients[1]).norm() > 10 * tolerance * gradients[0].norm()) or any(
        own[name] != pytest.approx(theirs[name], rel=tolerance, abs=1e-7)
        for own, theirs in zip(run.logged, other.logged, strict=True)
        for name in own.keys() & theirs.keys()
        if "loss" in name
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "door"),
    [*((change, "ours") for change in CHANGES), ("own_mel", "accelerate"), ("no_discriminator", "accelerate")],
)
def test_changes_have_the_effect_that_they_have_in_nemo(tmp_path, change, door):
    stock, ours = models(tmp_path, config())
    unchanged = twin(stock)
    if door == "accelerate":
        ours = twin(stock)
    for model in (stock, ours):
        CHANGES[change](model)
    if door == "accelerate":
        ours = accelerate(ours)
    batches = [batch_without_ties(stock, frames=8)] * 2
    before, expected, mine = (train(model, batches) for model in (unchanged, stock, ours))
    assert not differ(mine, expected, 2e-4)
    assert differ(before, expected, 1e-3) == (change != "stock_discriminator")


def test_a_change_that_needs_nemos_step_excludes_additions(tmp_path, caplog):
    _, ours = models(tmp_path, config())
    own_mel(ours)
    with open_dict(ours.cfg):
        ours.cfg.accumulate_grad_batches = 2
    with pytest.raises(ConfigError, match=r"mel_loss_fn of the model was changed.*accumulate_grad_batches"):
        train(ours, [batch_without_ties(ours, frames=8)])
    ours.cfg.accumulate_grad_batches = 1
    with caplog.at_level(logging.WARNING, "nemo_lfr"):
        train(ours, [batch_without_ties(ours, frames=8)])
    assert [record.message for record in caplog.records if "slower step" in record.message] == [
        "training uses NeMo's own, slower step, because the model's mel_loss_fn changed"
    ]


def test_a_custom_loss_of_the_config_excludes_nemos_step(tmp_path):
    loss = {"_target_": "tests.own_components.MeanScore"}
    ours = AudioCodecModel(OmegaConf.create(config() | {"generator_loss": loss}))
    own_mel(ours)
    with pytest.raises(ConfigError, match=r"mel_loss_fn of the model was changed.*the custom generator_loss"):
        train(ours, [batch_without_ties(ours, frames=8)])


def test_rounded_buffers_of_losses_are_no_change(tmp_path):
    _, ours = models(tmp_path, config())
    ours.half().float()
    ours.find_changes()
    assert ours._changes == ()
    ours.stft_loss_fn.loss_fns[0].log_guard = 5.0
    assert ours.find_changes()
