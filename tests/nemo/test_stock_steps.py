"""Compare training with stock NeMo after a caller has changed the losses and methods that NeMo's steps use."""

import copy
import functools
import logging
import pickle
from types import MethodType
from typing import Any

import pytest
import soundfile
import torch

pytest.importorskip("nemo", reason="stock NeMo is the reference here: pip install '.[nemo]'")

from hydra.utils import instantiate
from lightning.pytorch.trainer.states import TrainerFn
from nemo.collections.tts.data.vocoder_dataset import VocoderDataset
from nemo.collections.tts.losses import audio_codec_loss
from nemo.collections.tts.models.audio_codec import AudioCodecModel as StockModel
from nemo.collections.tts.modules import audio_codec_modules
from omegaconf import OmegaConf, open_dict
from torch import nn

from nemo_lfr import AudioCodecModel, accelerate
from nemo_lfr.errors import ConfigError
from nemo_lfr.training.audio_discriminator import AudioDiscriminator
from nemo_lfr.training.data import NEMO_DATASET, CodecDataset
from tests.models import RATE, speech_like
from tests.nemo.test_training_with_nemo import (
    SMALL_STFT,
    Recorder,
    batch_without_ties,
    models,
    quiet_trainer,
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
    process = type(model)._process_batch
    model._process_batch = MethodType(lambda self, batch: process(self, first_half(batch)), model)


def first_half(batch):
    return {"audio": batch["audio"][:, : batch["audio"].shape[1] // 2], "audio_lens": batch["audio_lens"] // 2}


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


def no_quantizer(model):
    model.vector_quantizer = None


CHANGES = {
    change.__name__: change
    for change in (
        own_mel, no_mel_and_twice_the_stft, a_scale_that_grows, another_log_guard, patched_stft, hooked_time_domain,
        hinged_generator, hinged_discriminator, relative_features, own_batches, hooked_discriminator,
        stock_discriminator,
        twice_the_stft_from_the_second_step,
        no_discriminator, no_quantizer,
    )
}  # fmt: skip


def twice(kind: type, name: str):
    """Return a function that patches a method of a class of NeMo, so that its result is doubled."""

    def patch(monkeypatch):
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, **arguments: 2 * method(self, **arguments))

    return patch


def with_half_batches(name: str):
    """Return a function that patches a method of NeMo's model, so that it uses the first half of each recording."""

    def patch(monkeypatch):
        method = getattr(StockModel, name)
        monkeypatch.setattr(StockModel, name, lambda self, batch, *index: method(self, first_half(batch), *index))

    return patch


PATCHES = {
    "class of the STFT loss": twice(audio_codec_loss.MultiResolutionSTFTLoss, "forward"),
    "class of a part of a loss": twice(audio_codec_loss.MaskedMAELoss, "forward"),
    "class of the feature loss": twice(audio_codec_loss.FeatureMatchingLoss, "forward"),
    "_process_batch": with_half_batches("_process_batch"),
    "training_step": with_half_batches("training_step"),
}


def config() -> dict[str, Any]:
    return training_config([SMALL_STFT], time_domain_loss_scale=1.0)


@functools.cache
def stock_model_and_batch() -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a stock model, which tests must not change, and a batch."""
    stock, _ = models(config())
    return stock, batch_without_ties(stock, frames=1, size=1)


@functools.cache
def unchanged_run(steps: int) -> Recorder:
    """Return the record of some training steps of stock NeMo without changes."""
    stock, batch = stock_model_and_batch()
    return train(twin(stock), [batch] * steps)


def twin(stock, kind=StockModel):
    """Return another model with the same weights."""
    model = kind(OmegaConf.create(config()))
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
    [*((change, "ours") for change in (*CHANGES, *PATCHES)),
     *((change, "accelerate") for change in ("own_mel", "no_discriminator", "training_step"))],
)  # fmt: skip
def test_changes_have_the_effect_that_they_have_in_nemo(change, door, monkeypatch):
    start, batch = stock_model_and_batch()
    # Without a quantizer, the gradient is so large that rounding changes the losses of the second step.
    batches = [batch] * (1 if change == "no_quantizer" else 2)
    before = unchanged_run(len(batches))
    if change in PATCHES:
        PATCHES[change](monkeypatch)  # before the models are built, when NeMo looks up the training step
    stock, ours = twin(start), twin(start, StockModel if door == "accelerate" else AudioCodecModel)
    if change in CHANGES:
        for model in (stock, ours):
            CHANGES[change](model)
    if door == "accelerate":
        ours = accelerate(ours)
    expected, mine = (train(model, batches) for model in (stock, ours))
    assert not differ(mine, expected, 2e-4)
    assert differ(before, expected, 1e-3) == (change != "stock_discriminator")


def test_a_change_that_needs_nemos_step_excludes_additions(caplog):
    _, ours = models(config())
    own_mel(ours)
    with open_dict(ours.cfg):
        ours.cfg.accumulate_grad_batches = 2
    with pytest.raises(ConfigError, match=r"mel_loss_fn of the model was changed.*accumulate_grad_batches"):
        train(ours, [stock_model_and_batch()[1]])
    ours.cfg.accumulate_grad_batches = 1
    with caplog.at_level(logging.WARNING, "nemo_lfr"):
        train(ours, [stock_model_and_batch()[1]])
    assert [record.message for record in caplog.records if "slower step" in record.message] == [
        "the model uses NeMo's own, slower step, because its mel_loss_fn changed"
    ]


@pytest.mark.parametrize(
    ("addition", "obstacle"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ({"generator_loss": {"_target_": "tests.own_components.MeanScore"}}, "the custom generator_loss"),
    ],
)
def test_validation_permits_what_training_refuses_after_a_change(addition, obstacle):
    model = built(**addition)
    own_mel(model)
    model.set_trainer(quiet_trainer())
    model.trainer.state.fn = TrainerFn.VALIDATING
    assert model.find_changes()
    model.trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(ConfigError, match=f"mel_loss_fn of the model was changed.*{obstacle}"):
        model.find_changes()


class WithOwnLoss(AudioCodecModel):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.mel_loss_fn = OwnMel()


def built(kind=AudioCodecModel, **changes):
    return kind(OmegaConf.create(config() | changes))


def with_partial_class(monkeypatch):
    """Build a model while a script changes an argument that the config does not have."""
    changed = functools.partial(audio_codec_loss.MultiResolutionSTFTLoss, sqrt_guard=1e-2)
    monkeypatch.setattr("nemo.collections.tts.models.audio_codec.MultiResolutionSTFTLoss", changed)
    return built()


def with_losses_of_the_first_config(monkeypatch):
    model = built()
    _ = model.losses
    model.cfg.stft_loss_log_guard = 0.5
    model.stft_loss_fn = built(stft_loss_log_guard=0.5).stft_loss_fn
    return model


def with_another_window(monkeypatch):
    model = built()
    assert not model.find_changes()
    model.stft_loss_fn.loss_fns[0].window.pow_(2)
    return model


def with_loaded_buffers(monkeypatch):
    """Load buffers that another version of librosa rounded in another way."""
    model = built()
    state = {key: value * 1.001 if "mel_features" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def with_named_layers(monkeypatch):
    model = built()
    for name, layer in model.named_modules():
        layer.name = name
    return model


def changed_and(copied):
    def change(monkeypatch):
        model = built()
        model.stft_loss_fn.loss_fns[0].log_guard = 5.0
        return copied(model)

    return change


def with_a_trained_scale(monkeypatch):
    model = built()
    model.stft_loss_scale = nn.Parameter(torch.tensor(1.0))
    return model


def with_a_backward_hook(monkeypatch):
    model = built()
    model.time_domain_loss_fn.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    return model


def with_patched_discriminators(monkeypatch):
    forward = AudioDiscriminator.forward
    monkeypatch.setattr(AudioDiscriminator, "forward", lambda self, **arguments: forward(self, **arguments))
    model = built()
    model.build_discriminator()
    return model


def watched_by_wandb(_):
    torch_hooks = pytest.importorskip("wandb.integration.torch.wandb_torch", reason="pip install wandb")
    model = built()
    for module in model.modules():  # as `WandbLogger.watch` does
        module.register_forward_hook(torch_hooks.TorchGraph().create_forward_hook("a name", 0))
    return model


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (lambda _: built(), []),
        (watched_by_wandb, []),
        (lambda _: built().half().float(), []),
        (lambda _: copy.deepcopy(built()), []),
        (lambda _: pickle.loads(pickle.dumps(built())), []),
        (lambda _: accelerate(StockModel(OmegaConf.create(config()))), []),
        (lambda _: built(generator_loss={"_target_": "tests.own_components.MeanScore"}), []),
        (with_loaded_buffers, []),
        (with_named_layers, []),
        (lambda _: WithOwnLoss(OmegaConf.create(config())), ["mel_loss_fn"]),
        (with_partial_class, ["stft_loss_fn"]),
        (with_losses_of_the_first_config, ["stft_loss_fn"]),
        (with_another_window, ["stft_loss_fn"]),
        (with_a_backward_hook, ["time_domain_loss_fn"]),
        (with_a_trained_scale, ["stft_loss_scale"]),
        (with_patched_discriminators, ["discriminator"]),
        (changed_and(lambda model: model), ["stft_loss_fn"]),
        (changed_and(copy.deepcopy), ["stft_loss_fn"]),
        (changed_and(copy.copy), ["stft_loss_fn"]),
        (changed_and(lambda model: pickle.loads(pickle.dumps(model))), ["stft_loss_fn"]),
    ],
)
def test_changes_are_found(make, changes, monkeypatch):
    model = make(monkeypatch)
    assert list(model._find_changes()) == changes
    assert list(model._find_changes()) == changes


class Loader(list):
    """Data loader of a patched class or method."""


def test_patched_data_loaders_are_used(monkeypatch):
    model = built()
    for name, build in (("get_dataset", model.get_dataset), ("_get_lhotse_dataloader", model._get_lhotse_dataloader)):
        with monkeypatch.context() as patch:
            patch.setattr(StockModel, name, lambda self, cfg: Loader())
            assert type(build(OmegaConf.create({"dataset": {"sample_rate": model.sample_rate}}))) is Loader


def test_a_patched_number_of_steps_is_used(monkeypatch):
    monkeypatch.setattr(StockModel, "max_steps", property(lambda self: 7))
    assert built(max_epochs=2, steps_per_epoch=3).max_steps == 7


def test_an_overridden_encode_audio_gets_the_sample_rate_as_in_nemo():
    model, rates = built(), []

    def encode_audio(self, audio, audio_len, sample_rate):
        rates.append(sample_rate)
        return AudioCodecModel.encode_audio(self, audio, audio_len)

    model.encode_audio = MethodType(encode_audio, model)
    model.reconstruct({"audio": torch.zeros(1, 4096), "audio_lens": torch.tensor([4096])})
    assert rates == [RATE]


class AugmentedDataset(VocoderDataset):
    pass


@pytest.mark.parametrize("name", ["VocoderDataset", "VocoderDataset.__getitem__"])
def test_a_patched_dataset_is_used(monkeypatch, tmp_path, name):
    soundfile.write(tmp_path / "a.wav", speech_like(RATE).numpy(), RATE)
    (tmp_path / "manifest.json").write_text('{"audio_filepath": "a.wav", "duration": 1.0}\n')
    meta = {"mine": {"manifest_path": str(tmp_path / "manifest.json"), "audio_dir": str(tmp_path)}}
    target = {"_target_": NEMO_DATASET, "dataset_meta": meta, "sample_rate": RATE, "n_samples": 8192}
    section = OmegaConf.create({"dataset": target, "dataloader_params": {"batch_size": 1}})
    model = AudioCodecModel(OmegaConf.create(config()), trainer=quiet_trainer())
    assert type(model.get_dataset(section).dataset) is CodecDataset
    replacement = AugmentedDataset if name == "VocoderDataset" else lambda self, index: {}
    monkeypatch.setattr(f"nemo.collections.tts.data.vocoder_dataset.{name}", replacement)
    kind = AugmentedDataset if name == "VocoderDataset" else VocoderDataset
    assert type(model.get_dataset(section).dataset) is kind


@pytest.mark.parametrize(
    ("owner", "name", "value", "patched"),
    [
        (audio_codec_modules, "SSLModel", audio_codec_modules.SSLModel, None),  # changes nothing
        (audio_codec_modules.FiniteScalarQuantizer, "compress", torch.relu, "FiniteScalarQuantizer.compress"),
        (audio_codec_modules, "HiFiGANEncoder", torch.nn.Identity, "HiFiGANEncoder"),
    ],
    ids=["nothing", "a method", "a class"],
)
def test_patched_modules_of_nemo_are_reported(owner, name, value, patched, monkeypatch, caplog):
    monkeypatch.setattr(owner, name, value)
    with caplog.at_level(logging.WARNING, "nemo_lfr.nemo.patches"):
        built()
    assert [record.args[0] for record in caplog.records] == ([patched] if patched else [])


def test_a_replaced_lhotse_dataset_is_used(monkeypatch):
    module = "nemo.collections.tts.models.audio_codec."
    monkeypatch.setattr(module + "AudioCodecLhotseDataset", lambda **options: "mine")
    monkeypatch.setattr(module + "get_lhotse_dataloader_from_config", lambda dataset, **options: dataset)
    section = OmegaConf.create(
        {"dataloader_params": {"use_lhotse": True, "batch_size": 1}, "dataset_args": {"segment_duration": 1.0}}
    )
    assert built()._get_lhotse_dataloader(section) == "mine"
