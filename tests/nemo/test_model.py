"""Tests of the NeMo integration: construction, restoring, state dicts, the Hub and training hooks."""

import copy
import importlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("nemo", reason="needs NeMo: pip install '.[nemo]'")

import lightning.pytorch as pl
from nemo.collections.tts.models.audio_codec import AudioCodecModel as StockModel
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils.app_state import AppState
from omegaconf import OmegaConf

import nemo_lfr
from nemo_lfr import AudioCodecModel, AudioError, CheckpointError, ConfigError, MissingExtraError, NemoLfrError
from nemo_lfr.modules.encoder import HiFiGANEncoder
from tests.checkpoint.test_checkpoint import HOSTILE
from tests.hub_server import HubServer
from tests.models import MODULES, codec_config, small_config, speech_like, stock_model, write_nemo

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["cuts", "artifacts", "resume"])
def test_a_nemo_without_some_of_its_modules_is_reported_as_missing(monkeypatch, module):
    monkeypatch.delitem(sys.modules, "nemo_lfr.nemo.base")
    monkeypatch.delattr(f"nemo_lfr.nemo.{module}")
    monkeypatch.setitem(sys.modules, f"nemo_lfr.nemo.{module}", None)  # its import fails
    with pytest.raises(MissingExtraError, match="the NeMo integration needs NeMo, which cannot be imported"):
        importlib.import_module("nemo_lfr.nemo.base")


@pytest.fixture(scope="module")
def nemo_file(tmp_path_factory):
    return write_nemo(tmp_path_factory.mktemp("model") / "tiny.nemo", small_config())


@pytest.fixture(scope="module")
def loaded(nemo_file):
    """Return our model and the codec of the standalone API, which tests must not change."""
    return AudioCodecModel.restore_from(nemo_file, map_location="cpu"), nemo_lfr.load(nemo_file, device="cpu")


@pytest.fixture(scope="module")
def wavlm_folder(tmp_path_factory):
    """Write a tiny but real WavLM to a folder that `slm_model_name` may name."""
    from transformers import WavLMConfig, WavLMModel

    folder = tmp_path_factory.mktemp("wavlm")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    WavLMModel(WavLMConfig(**sizes)).save_pretrained(folder)
    return folder


def slm_config(wavlm_folder):
    discriminators = [
        {"_target_": MODULES + "MultiPeriodDiscriminator"},
        {
            "_target_": MODULES + "SLMDiscriminator",
            "slm_model_name": str(wavlm_folder),
            "slm_sr": 16000,
            "input_sr": 22050,
            "slm_hidden": 16,
            "slm_layers": 3,
            "initial_channel": 4,
        },
    ]
    return codec_config(discriminator={"_target_": MODULES + "Discriminator", "discriminators": discriminators})


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory, wavlm_folder):
    """Write a file as stock NeMo 3.0 saves it after training: with discriminators and, by mistake, WavLM."""
    folder = tmp_path_factory.mktemp("stock")
    tiny = write_nemo(folder / "tiny.nemo", codec_config())
    model = StockModel(OmegaConf.create(slm_config(wavlm_folder)))
    model.load_state_dict(stock_model(tiny).state_dict())
    path = folder / "trained.nemo"
    model.save_to(str(path))
    assert any(".ssl_model." in key for key in model.state_dict()), "stock has stopped saving WavLM: update the text"
    return path


def test_training_checkpoint_opens_in_both_apis(tmp_path, trained_file):
    """Read a file that Lightning wrote from stock NeMo: none of its code runs, and the tokens equal the model's."""
    stock = StockModel.restore_from(str(trained_file), map_location="cpu").eval()
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False)
    trainer.strategy.connect(stock)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    audio = speech_like(5000)
    with torch.no_grad():
        expected, _ = stock.encode(audio=audio[None], audio_len=torch.tensor([5000]))
    light, _ = nemo_lfr.load(path, "cpu").encode(audio)
    assert torch.equal(light, expected.int())
    model = AudioCodecModel.restore_from(path, map_location="cpu")
    tokens, _ = model.encode(audio=audio[None], audio_len=torch.tensor([5000]))
    assert torch.equal(tokens, expected)


def test_model_is_built_from_standalone_modules(nemo_file):
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu")
    assert type(model.audio_encoder) is HiFiGANEncoder
    assert isinstance(model, StockModel)
    assert nemo_lfr.LFRCodecModel is AudioCodecModel


def test_a_file_with_wavlm_inside_restores_without_building_or_fetching_it(trained_file, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("inference must not build WavLM")

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", refuse)
    model = AudioCodecModel.restore_from(trained_file, map_location="cpu")
    assert model.discriminator is None
    stock_tokens, _ = AudioCodecModel.restore_from(trained_file, map_location="cpu").encode(
        speech_like(9000)[None], torch.tensor([9000])
    )
    assert torch.equal(model.encode(speech_like(9000)[None], torch.tensor([9000]))[0], stock_tokens)


def test_saving_keeps_discriminators_that_were_never_built_and_drops_wavlm(trained_file, tmp_path):
    model = AudioCodecModel.restore_from(trained_file, map_location="cpu")
    saved = tmp_path / "again.nemo"
    model.save_to(saved)
    before, after = stock_model(trained_file).state_dict(), stock_model(saved).state_dict()
    kept = [key for key in before if ".ssl_model." not in key]
    assert sum(key.startswith("discriminator.") for key in kept) > 50
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert not any(".ssl_model." in key for key in AudioCodecModel.restore_from(saved).state_dict())


def test_building_the_discriminator_gives_it_the_weights_of_the_file(trained_file):
    model = AudioCodecModel.restore_from(trained_file, map_location="cpu")
    stock = stock_model(trained_file).discriminator.state_dict()
    expected = {key: value for key, value in stock.items() if ".ssl_model." not in key}
    model.build_discriminator()
    state = model.discriminator.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_a_nemo_with_our_targets_builds_in_stock_once_ours_is_imported():
    values = codec_config()
    values["audio_encoder"]["_target_"] = "nemo_lfr.modules.encoder.HiFiGANEncoder"
    values["audio_decoder"]["_target_"] = "nemo_lfr.modules.decoder.HiFiGANDecoder"
    values["vector_quantizer"]["_target_"] = "nemo_lfr.modules.quantizer.GroupFiniteScalarQuantizer"
    model = StockModel(OmegaConf.create(values)).eval()
    with torch.no_grad():
        tokens, _ = model.encode(audio=speech_like(8192)[None], audio_len=torch.tensor([8192]))
    assert tokens.shape == (1, 8, 8)


def test_return_config_gives_the_files_own_config(nemo_file):
    values = AudioCodecModel.restore_from(nemo_file, return_config=True)
    assert values.sample_rate == 22050
    assert values.audio_encoder._target_ == MODULES + "HiFiGANEncoder"


# Each form in which the override may be passed, as a function of the config and the path of its file.
OVERRIDES = {
    "path": lambda config, path: path,
    "name of the file": lambda config, path: str(path),
    "open file": lambda config, path: io.StringIO(path.read_text()),
    "config": lambda config, path: config,
    "config with an unset value that nothing reads": lambda config, path: OmegaConf.merge(config, {"note": "???"}),
    "config with a model section": lambda config, path: OmegaConf.create({"model": config, "trainer": {"devices": 1}}),
}


@pytest.mark.parametrize("form", OVERRIDES)
@pytest.mark.parametrize("model_class", [AudioCodecModel, StockModel])
def test_override_config_path_replaces_the_config(form, model_class, nemo_file, tmp_path):
    """Stock NeMo is the reference for the forms that are accepted."""
    config = AudioCodecModel.restore_from(nemo_file, return_config=True)
    config.mel_loss_l1_scale = 7.0
    OmegaConf.save(config, tmp_path / "other.yaml")
    override = OVERRIDES[form](config, tmp_path / "other.yaml")
    assert model_class.restore_from(str(nemo_file), override_config_path=override).mel_loss_l1_scale == 7.0


def connector(folder):
    """Return a connector that restores a model from a folder."""
    connector = SaveRestoreConnector()
    connector.model_extracted_dir = folder
    return connector


class Doubled(SaveRestoreConnector):
    """Connector that changes the weights of the models it restores."""

    def modify_state_dict(self, conf, state_dict):
        state_dict = super().modify_state_dict(conf, state_dict)
        return {key: 2 * value if value.is_floating_point() else value for key, value in state_dict.items()}


def renamed():
    """Return a connector for files whose config has another name than `model_config.yaml`."""
    connector = SaveRestoreConnector()
    connector.model_config_yaml = "other.yaml"
    return connector


def patched():
    """Return a connector with a replaced method."""
    connector = SaveRestoreConnector()
    connector.modify_state_dict = Doubled().modify_state_dict
    return connector


@pytest.mark.parametrize(
    ("connector", "factor"),
    [(SaveRestoreConnector, 1), (type("Same", (SaveRestoreConnector,), {}), 1), (Doubled, 2), (patched, 2)],
)
def test_a_custom_connector_restores_the_model(connector, factor, nemo_file):
    """Stock NeMo is the reference."""
    plain, expected, model = (
        model_class.restore_from(str(nemo_file), save_restore_connector=own).audio_encoder.state_dict()
        for model_class, own in ((StockModel, None), (StockModel, connector()), (AudioCodecModel, connector()))
    )
    for name, value in plain.items():
        assert torch.equal(expected[name], factor * value) and torch.equal(model[name], expected[name]), name


def test_a_connector_may_save_a_folder(nemo_file, tmp_path):
    connector = SaveRestoreConnector()
    connector.pack_nemo_file = False
    model = AudioCodecModel.restore_from(nemo_file)
    model._save_restore_connector = connector
    model.save_to(tmp_path / "m.nemo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_config.yaml", "model_weights.ckpt"]
    assert len(nemo_lfr.load(tmp_path).fingerprint) == 16


def test_a_connector_may_read_a_config_of_another_name(nemo_file, tmp_path):
    with tarfile.open(nemo_file) as tar:
        tar.extractall(tmp_path / "parts", filter="data")
    (tmp_path / "parts/model_config.yaml").rename(tmp_path / "parts/other.yaml")
    with tarfile.open(tmp_path / "renamed.nemo", "w") as tar:
        tar.add(tmp_path / "parts", ".")
    options = {"return_config": True, "save_restore_connector": renamed()}
    assert AudioCodecModel.restore_from(str(tmp_path / "renamed.nemo"), **options).sample_rate == 22050


# Name of an argument, a bad value, and a part of the message. Text in braces is the content of a YAML file.
BAD_ARGUMENTS = [
    *(
        ("override_config_path", value, f"override_config_path is {re.escape(repr(value))}; pass the path")
        for value in ("", 5, True, False, [], {"sample_rate": 1}, b"a.yaml", OmegaConf)
    ),
    ("override_config_path", "a\0b", "contains a NUL character"),
    ("override_config_path", "nope.yaml", r"nope\.yaml: the file cannot be read \(No such file"),
    ("override_config_path", "folder", r"folder: the file cannot be read \(Is a directory"),
    ("override_config_path", "tiny.nemo", r"tiny\.nemo: the file is not a YAML config: 'utf-8'"),
    ("override_config_path", "{a: [1,\nb: }}", "is not a YAML config: while parsing"),
    ("override_config_path", "{a: 1\na: 2}", "is not a YAML config: .* duplicate key a"),
    ("override_config_path", "{5}", "is not a YAML config: .*int"),
    ("override_config_path", "{- 1}", r"the config is \[1\]; pass a mapping"),
    ("override_config_path", "{model:}", "the section 'model' is None; pass a mapping"),
    ("override_config_path", "{model: [1]}", r"the section 'model' is \[1\]; pass a mapping"),
    ("override_config_path", "{a: ${nope}}", "cannot be resolved: .*nope"),
    ("override_config_path", OmegaConf.create([1]), r"the config is \[1\]; pass a mapping"),
    ("override_config_path", OmegaConf.create({"model": None}), "the section 'model' is None"),
    ("override_config_path", OmegaConf.create({"model": {"a": "${nope}"}}), "cannot be resolved: .*nope"),
    *(("map_location", value, "device (is )?'?5.5|device (is )?True|device 'nope'") for value in (5.5, True, "nope")),
    ("map_location", {"cuda:0": "cpu"}, "device is {'cuda:0': 'cpu'}; use a name"),
    ("map_location", "meta", "device 'meta' stores no values"),
    *(("trainer", value, "trainer is .*; pass a lightning.pytorch.Trainer") for value in (5, "x", False, pl.Trainer)),
    ("save_restore_connector", 5, "save_restore_connector is 5; pass an instance"),
    ("save_restore_connector", SaveRestoreConnector, "save_restore_connector is <class .*; pass an instance"),
    ("save_restore_connector", connector("nope"), "nope: no such folder; set model_extracted_dir"),
    ("save_restore_connector", connector(""), "the path '' is empty"),
    ("save_restore_connector", connector(5), "5 is not a path"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_by_restore_from_and_from_pretrained(
    name, value, message, nemo_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if value == "tiny.nemo":
        value = nemo_file
    elif isinstance(value, str) and value.startswith("{"):
        (tmp_path / "a.yaml").write_text(value[1:-1])
        value, message = "a.yaml", rf"override_config_path a\.yaml: .*{message}"
    for restore in (AudioCodecModel.restore_from, AudioCodecModel.from_pretrained):
        with pytest.raises(NemoLfrError, match=message) as caught:
            restore(str(nemo_file), **{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [5, "", None, b"x", [], True, "\0", "nope.nemo"])
def test_a_name_or_path_that_is_none_is_an_error_of_this_package(value):
    for restore in (AudioCodecModel.restore_from, AudioCodecModel.from_pretrained):
        with pytest.raises(CheckpointError):
            restore(value)


@pytest.mark.parametrize(
    "value",
    [
        *(5, "", None, [], {}, "x.yaml", OmegaConf.create([1]), OmegaConf.create({"a": "${b}"})),
        OmegaConf.create(codec_config() | {"generator_loss": "???"}),
    ],
)
def test_a_config_that_is_none_is_named_by_the_constructor(value):
    message = r"^cfg is .*; pass a DictConfig|the config cannot be resolved|^generator_loss is '\?\?\?'"
    with pytest.raises(ConfigError, match=message):
        AudioCodecModel(value)


def test_strict_names_the_missing_weight_and_not_strict_loads_the_rest(nemo_file):
    state = AudioCodecModel.restore_from(nemo_file).state_dict()
    key = "audio_encoder.pre_conv.conv.bias"
    del state[key]
    model = AudioCodecModel(OmegaConf.create(small_config()))
    with pytest.raises(CheckpointError, match=key):
        model.load_state_dict(state)
    result = model.load_state_dict(state, strict=False)
    assert key in result.missing_keys


def test_a_failed_restore_leaves_nemos_state_clean(nemo_file, tmp_path):
    broken = tmp_path / "broken.nemo"
    broken.write_bytes(nemo_file.read_bytes()[:50_000])
    with pytest.raises(CheckpointError, match=r"broken\.nemo"):
        AudioCodecModel.restore_from(broken)
    values = AudioCodecModel.restore_from(nemo_file, return_config=True)
    values.audio_encoder.bogus = 1
    with pytest.raises(CheckpointError, match="bogus"):
        AudioCodecModel.restore_from(nemo_file, override_config_path=values)
    assert AppState().is_model_being_restored is False


# NeMo's methods read files with the function that the tests of `HOSTILE` call, so one case of each message is enough.
@pytest.mark.parametrize("case", {match: case for case, (_, match) in HOSTILE.items()}.values())
@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_restore_from_refuses_hostile_file(case, tmp_path):
    make, match = HOSTILE[case]
    path = tmp_path / "stranger.nemo"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=match):
        AudioCodecModel.restore_from(path, map_location="cpu")
    assert AppState().is_model_being_restored is False


@pytest.mark.parametrize("key", ["semantic_codec_path", "use_scl_loss"])
def test_configs_that_would_open_paths_or_the_network_are_refused(key):
    with pytest.raises(ConfigError, match=key):
        AudioCodecModel(OmegaConf.create(codec_config(**{key: "somewhere"})))


def test_the_cards_alias_is_listed_with_its_hub_location():
    found = {info.pretrained_model_name: info for info in AudioCodecModel.list_available_models()}
    assert "nvidia/low-frame-rate-speech-codec-22khz" in found["audio_codec_low_frame_rate_22khz"].location
    assert len(found) > 1, "NeMo's own names must stay"


def test_forward_gives_back_the_length_that_came_in(nemo_file):
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu")
    audio, audio_len = model(speech_like(5000)[None], torch.tensor([5000]))
    assert audio.shape == (1, 5000)
    assert audio_len.tolist() == [5000]


@pytest.mark.parametrize("rate", [8000, 16000, 22049, 22050, 24000, 44100, 48000.0, np.int64(16000)])
def test_other_sample_rates_give_the_tokens_of_the_standalone_api(loaded, rate):
    """Both models use the same resampler for all rates; NeMo's own resampler takes minutes for 22,049 Hz."""
    audio, lengths = torch.stack([speech_like(16000), speech_like(16000, 1)]), torch.tensor([16000, 9000])
    model, codec = loaded
    expected, expected_len = codec.encode(audio, lengths, rate)
    tokens, tokens_len = model.encode(audio=audio, audio_len=lengths, sample_rate=rate)
    assert torch.equal(tokens, expected) and torch.equal(tokens_len, expected_len)
    assert tokens_len.tolist() == [-(-math.ceil(count * 22050 / rate) // 1024) for count in (16000, 9000)]
    with torch.no_grad():
        encoded, encoded_len = model.encode_audio(audio=audio, audio_len=lengths, sample_rate=rate)
    assert torch.equal(model.quantize(encoded=encoded, encoded_len=encoded_len), expected)
    decoded, decoded_len = model(audio=audio, audio_len=lengths, sample_rate=rate)
    assert decoded_len.tolist() == [math.ceil(count * 22050 / rate) for count in (16000, 9000)]
    assert decoded.shape == (2, max(decoded_len))


def test_resampling_audio_that_requires_grad_raises(nemo_file):
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu")
    audio = speech_like(8000)[None].requires_grad_()
    with pytest.raises(AudioError, match="16000 Hz requires a gradient"):
        model.encode_audio(audio=audio, audio_len=torch.tensor([8000]), sample_rate=16000)
    encoded, _ = model.encode_audio(audio=audio, audio_len=torch.tensor([8000]), sample_rate=22050)
    encoded.sum().backward()
    assert audio.grad is not None


def test_gradients_flow_through_the_steps_that_training_uses(nemo_file):
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu").train()
    batch = {"audio": speech_like(16 * 1024)[None], "audio_lens": torch.tensor([16 * 1024])}
    audio, audio_len, audio_gen, *_ = model._process_batch(batch)
    loss, _ = model.mel_loss_fn(audio_real=audio, audio_gen=audio_gen, audio_len=audio_len)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.audio_encoder.parameters())


def test_training_forward_equals_stock(nemo_file):
    batch = {"audio": speech_like(2 * 16 * 1024).reshape(2, -1), "audio_lens": torch.tensor([16 * 1024] * 2)}
    losses = []
    for model in (stock_model(nemo_file), AudioCodecModel.restore_from(nemo_file, map_location="cpu")):
        audio, audio_len, audio_gen, *_ = model.train()._process_batch(batch)
        losses.append(model.mel_loss_fn(audio_real=audio, audio_gen=audio_gen, audio_len=audio_len)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # fp32 sums in another order


def test_weights_load_beside_other_loss_resolutions_and_not_into_another_codec(nemo_file):
    source = AudioCodecModel.restore_from(nemo_file, map_location="cpu")
    values = OmegaConf.to_container(source.cfg, resolve=True)
    values |= {"loss_resolutions": [[128, 32, 128], [512, 128, 512]], "mel_loss_dims": [10, 40]}
    model = AudioCodecModel(OmegaConf.create(values))
    model.load_state_dict(source.state_dict())
    audio, length = speech_like(5000)[None], torch.tensor([5000])
    assert torch.equal(model.encode(audio, length)[0], source.encode(audio, length)[0])
    values["audio_encoder"]["base_channels"] *= 2
    with pytest.raises(CheckpointError, match=r"belongs to another codec: .* instead of "):
        AudioCodecModel(OmegaConf.create(values)).load_state_dict(source.state_dict(), strict=False)


def test_accelerate_changes_a_stock_model_in_place_and_keeps_its_mode(nemo_file):
    model = stock_model(nemo_file)
    assert nemo_lfr.accelerate(model) is model
    assert isinstance(model, AudioCodecModel)
    assert not model.audio_encoder.training
    assert nemo_lfr.accelerate(model) is model


@pytest.mark.parametrize("what", [None, "codec.nemo", torch.nn.Identity(), AudioCodecModel])
def test_accelerate_names_the_expected_type(what):
    with pytest.raises(ConfigError, match=f"{type(what).__name__} is not NeMo's AudioCodecModel"):
        nemo_lfr.accelerate(what)


@pytest.mark.parametrize("rate", [0, -5, "16000", float("nan"), float("inf"), True, 99, 10**7])
@pytest.mark.parametrize("method", ["encode", "encode_audio", "forward", "standalone"])
def test_invalid_sample_rate_is_named(loaded, rate, method):
    model, codec = loaded
    call = codec.encode if method == "standalone" else getattr(model, method)
    with pytest.raises(AudioError, match=f"sample_rate is {rate!r}; expected a number"):
        call(audio=torch.zeros(1, 2000), audio_len=torch.tensor([2000]), sample_rate=rate)


def test_accelerate_of_a_subclass_replaces_the_parts_only(nemo_file):
    class Mine(StockModel):
        pass

    model = Mine.restore_from(str(nemo_file), map_location="cpu").eval()
    model.__class__ = Mine
    expected, _ = model.encode(audio=speech_like(8192)[None], audio_len=torch.tensor([8192]))
    nemo_lfr.accelerate(model)
    assert type(model) is Mine
    assert type(model.audio_encoder) is HiFiGANEncoder
    tokens, _ = model.encode(audio=speech_like(8192)[None], audio_len=torch.tensor([8192]))
    assert torch.equal(tokens, expected)


def test_usage_patterns_of_magpie_work(nemo_file):
    """Magpie-TTS deletes the discriminator and freezes the codec; a duplex model encodes under autocast."""
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu")
    del model.discriminator
    model.freeze()
    audio = speech_like(8192)[None]
    tokens, _ = model.encode(audio=audio, audio_len=torch.tensor([8192]))
    assert tokens.shape == (1, 8, 8)
    assert model.num_codebooks == 8
    assert model.codebook_size == 2016


def test_tokens_can_be_saved_and_loaded_with_weights_only(nemo_file, tmp_path):
    # Tensors of stock NeMo carry a NeuralType, which `weights_only` refuses.
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu")
    tokens, _ = model.encode(speech_like(8192)[None], torch.tensor([8192]))
    torch.save(tokens, tmp_path / "tokens.pt")
    assert torch.equal(torch.load(tmp_path / "tokens.pt", weights_only=True), tokens)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_save_to_never_replaces_a_pipe(nemo_file, tmp_path):
    os.mkfifo(tmp_path / "a.nemo")
    with pytest.raises(CheckpointError, match=r"a\.nemo: not a regular file but a pipe"):
        AudioCodecModel.restore_from(nemo_file, map_location="cpu").save_to(tmp_path / "a.nemo")
    assert (tmp_path / "a.nemo").is_fifo()


def test_a_model_on_the_meta_device_is_refused(nemo_file):
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu").to("meta")
    with pytest.raises(NemoLfrError, match="device 'meta' and has no weights"):
        model.encode(audio=torch.zeros(1, 4000), audio_len=torch.tensor([4000]))


def test_save_to_leaves_the_old_file_when_it_fails(nemo_file, tmp_path, monkeypatch):
    path = tmp_path / "model.nemo"
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu")
    model.save_to(path)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(StockModel, "save_to", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        model.save_to(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.nemo"]


def test_the_config_of_the_caller_is_not_changed():
    values = OmegaConf.create(codec_config())
    before = copy.deepcopy(values)
    AudioCodecModel(values)
    assert values == before


CARD = """
import json, sys
import librosa
import torch
from nemo_lfr import AudioCodecModel  # on the card: from nemo.collections.tts.models import AudioCodecModel
model_name = "nvidia/low-frame-rate-speech-codec-22khz"
path_to_input_audio = sys.argv[1]
nemo_codec_model = AudioCodecModel.from_pretrained(model_name).eval()
audio, _ = librosa.load(path_to_input_audio, sr=nemo_codec_model.sample_rate)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
audio_tensor = torch.from_numpy(audio).unsqueeze(dim=0).to(device)
audio_len = torch.tensor([audio_tensor[0].shape[0]]).to(device)
with torch.no_grad():
    encoded_tokens, encoded_len = nemo_codec_model.encode(audio=audio_tensor, audio_len=audio_len)
    reconstructed_audio, _ = nemo_codec_model.decode(tokens=encoded_tokens, tokens_len=encoded_len)
output_audio = reconstructed_audio.cpu().numpy()
print(json.dumps(encoded_tokens.tolist()))
"""

START = """
from omegaconf import OmegaConf
source = AudioCodecModel.restore_from(sys.argv[2], map_location="cpu")
model = AudioCodecModel(source.cfg)
differ = lambda: [key for key, value in source.state_dict().items() if not torch.equal(value, model.state_dict()[key])]
assert differ()
name = "nvidia/low-frame-rate-speech-codec-22khz"
model.maybe_init_from_pretrained_checkpoint(OmegaConf.create({"init_from_pretrained_model": name}))
assert not differ()
"""


# Importing NeMo takes longer than the rest, so one process imports it and forks a child for each script. Each line of
# its input is a script and the path of its output.
FORK = """
import json, os, sys
import librosa, torch
from nemo_lfr import AudioCodecModel
for line in sys.stdin:
    script, output = json.loads(line)
    child = os.fork()
    if not child:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        exec(script)
        sys.stdout.flush()
        os._exit(0)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""


def test_the_cards_snippet_runs_from_the_hub_cold_then_cached_then_offline(nemo_file, tmp_path):
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, speech_like(12_000).numpy(), 22050, subtype="FLOAT")
    name = "nvidia/low-frame-rate-speech-codec-22khz"
    expected, _ = nemo_lfr.load(nemo_file, device="cpu").encode(speech_like(12_000))
    output = tmp_path / "output.txt"
    # A new model starts from the same download by its name, as NeMo's configs may ask.
    online, offline = (({}, [(CARD, True), (CARD, False)]), ({"HF_HUB_OFFLINE": "1"}, [(CARD + START, False)]))
    with HubServer({name: {"low-frame-rate-speech-codec-22khz.nemo": nemo_file}}) as hub:
        for more, scripts in (online, offline):
            with subprocess.Popen(
                [sys.executable, "-c", FORK, clip, nemo_file],
                env=hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT), **more),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
            ) as process:
                assert process.stdin is not None and process.stdout is not None
                for script, downloads in scripts:
                    hub.requests.clear()
                    process.stdin.write(json.dumps([script, str(output)]) + "\n")
                    process.stdin.flush()
                    status = next((line for line in process.stdout if line.startswith("status ")), None)
                    assert status == "status 0\n", output.read_text()[-2000:]
                    lines = output.read_text().splitlines()
                    tokens = next(line for line in lines if line.startswith("[[["))
                    assert json.loads(tokens) == expected.tolist()
                    assert any(request.startswith("GET") for request in hub.requests) == downloads
                    assert any("non-commercial" in line for line in lines) == downloads


def test_unused_codebooks_hold_the_token_of_zero_as_in_nemo(nemo_file):
    """NeMo after 3.0.0 sets the encoded dimensions of the other codebooks to zero before it quantizes."""
    model = AudioCodecModel.restore_from(str(nemo_file), map_location="cpu").eval()
    stock = stock_model(nemo_file)
    audio = torch.stack([speech_like(9 * 1024), speech_like(9 * 1024, 1)])
    audio_len = torch.tensor([9 * 1024, 6 * 1024])
    with torch.no_grad():
        encoded, encoded_len = model.encode_audio(audio=audio, audio_len=audio_len)
        encoded[:, 4 * 3 :] = 0
        expected = stock.quantize(encoded=encoded, encoded_len=encoded_len)
    tokens, tokens_len = model.encode(audio=audio, audio_len=audio_len, num_codebooks=3)
    assert tokens.shape == (2, 8, 9) and torch.equal(tokens_len, encoded_len)
    assert torch.equal(tokens[:, 3:], expected[:, 3:])
    assert torch.equal(tokens[:, :3], model.encode(audio, audio_len)[0][:, :3])
    decoded, _ = model.decode(tokens=tokens, tokens_len=tokens_len)
    for passed in (tokens, tokens[:, :3]):
        assert torch.equal(model.decode(passed, tokens_len, num_codebooks=3)[0], decoded)


def _scaling_hook(model):
    model.audio_encoder.pre_conv.register_forward_hook(lambda module, inputs, output: output * 0.5)


def _other_slope(model):
    model.audio_decoder.activations[0].activation.negative_slope = 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [(_scaling_hook, "has forward hooks, patched methods"), (_other_slope, "differs from the codec's config")],
)
def test_a_model_with_hooks_or_other_settings_is_not_saved(tmp_path, change, message):
    model = AudioCodecModel.restore_from(write_nemo(tmp_path / "tiny.nemo"), map_location="cpu")
    change(model)
    with pytest.raises(NemoLfrError, match=message):
        model.save_to(tmp_path / "out.nemo")
    assert not (tmp_path / "out.nemo").exists()
    model.set_trainer(pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
    model.save_to(tmp_path / "out.nemo")  # a warning: a run must not lose its weights
    assert (tmp_path / "out.nemo").exists()


class _OtherEncoder(torch.nn.Module):
    """Encoder that a user writes for an experiment."""

    def forward(self, audio, audio_len):
        frames = audio.reshape(len(audio), 1, -1, 1024).mean(3)
        return frames.expand(-1, 32, -1), audio_len // 1024


class _OtherDecoder(torch.nn.Module):
    def forward(self, inputs, input_len):
        return inputs.mean(1).repeat_interleave(1024, 1), input_len * 1024


def _other_encoder(model):
    model.audio_encoder = _OtherEncoder()


def _other_decoder(model):
    model.audio_decoder = _OtherDecoder()


def _next_token(indices):
    return (indices + 1) % 2016


def _other_quantizer(model):
    encode = model.vector_quantizer.encode
    model.vector_quantizer.encode = lambda inputs, input_len: _next_token(encode(inputs=inputs, input_len=input_len))


def _subclass(**steps):
    """Return a change that makes a model's class a subclass whose methods change the results of the given steps."""

    def method(name, edit):
        def overriding(self, **inputs):
            return edit(getattr(type(self).__mro__[1], name)(self, **inputs))

        return overriding

    def change(model):
        overriding = {name: method(name, edit) for name, edit in steps.items()}
        model.__class__ = type("Model", (type(model),), overriding)

    return change


def _quantize_of_the_instance(model):
    quantize = model.quantize
    model.quantize = lambda encoded, encoded_len: _next_token(quantize(encoded=encoded, encoded_len=encoded_len))


def _subclassed_quantizer(model):
    kind = type(model.vector_quantizer)

    def encode(self, inputs, input_len):
        return _next_token(kind.encode(self, inputs=inputs, input_len=input_len))

    model.vector_quantizer.__class__ = type("NextToken", (kind,), {"encode": encode})


def _halved(result):
    return result[0] * 0.5, *result[1:]


_ALTERATIONS = {
    "audio_encoder is _OtherEncoder, not a module of nemo": _other_encoder,
    "audio_decoder is _OtherDecoder, not a module of nemo": _other_decoder,
    "vector_quantizer has hooks, replaced layers or overridden methods": _other_quantizer,
    "method encode_audio is overridden": _subclass(encode_audio=_halved),
    "method quantize is overridden": _subclass(quantize=_next_token),
    "method dequantize is overridden": _subclass(dequantize=lambda codes: codes * 0.5),
    "method decode_audio is overridden": _subclass(decode_audio=_halved),
    "method quantize is overridden, in the instance": _quantize_of_the_instance,
    "method preprocess_audio is overridden": _subclass(preprocess_audio=_halved),
    "vector_quantizer has hooks, replaced layers or overridden methods, in a subclass": _subclassed_quantizer,
}


@pytest.mark.parametrize("rate", [None, 16000])
@pytest.mark.parametrize("reason", _ALTERATIONS)
def test_what_a_user_altered_is_called_as_in_nemo(nemo_file, reason, rate):
    ours, stock = AudioCodecModel.restore_from(nemo_file, map_location="cpu").eval(), stock_model(nemo_file)
    inputs = {"audio": speech_like(8192)[None], "audio_len": torch.tensor([8192])}
    before = ours.encode(**inputs)
    before += ours.decode(tokens=before[0], tokens_len=before[1])
    results = []
    for model in (ours, stock):
        _ALTERATIONS[reason](model)
        with torch.no_grad():
            tokens, tokens_len = model.encode(**inputs, sample_rate=rate)
            results.append([tokens, tokens_len, *model.decode(tokens=tokens, tokens_len=tokens_len)])
            results[-1] += model(**inputs, sample_rate=rate)
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)  # fp32 sums in another order
    if rate is None:
        assert not all(torch.equal(first, second) for first, second in zip(before, results[0], strict=False))
    with pytest.raises(ConfigError, match=f"the model's {reason.partition(',')[0]}"):
        ours.encode(**inputs, num_codebooks=2)


def test_a_quantizer_that_was_removed_is_named_as_in_nemo(nemo_file):
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu")
    model.vector_quantizer = None
    with pytest.raises(ValueError, match="Cannot quantize without quantizer"):
        model.encode(audio=speech_like(8192)[None], audio_len=torch.tensor([8192]))
    with pytest.raises(ConfigError, match="vector_quantizer is NoneType"):
        model.codec  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_lengths_of_frames_are_int64_as_in_nemo(nemo_file, dtype):
    inputs = {"audio": speech_like(8192)[None], "audio_len": torch.tensor([8000], dtype=dtype)}
    for model in (AudioCodecModel.restore_from(nemo_file, map_location="cpu"), stock_model(nemo_file)):
        with torch.no_grad():
            _, encoded_len = model.encode_audio(**inputs)
        assert (encoded_len.dtype, encoded_len.tolist()) == (torch.int64, [8])


def test_weights_cached_by_parametrize_do_not_outlive_their_context(nemo_file):
    model = AudioCodecModel.restore_from(nemo_file, map_location="cpu").eval()
    audio, audio_len = speech_like(5000)[None], torch.tensor([5000])
    with torch.nn.utils.parametrize.cached():
        model.audio_encoder(audio=audio, audio_len=audio_len)  # fills the cache
        with torch.no_grad():
            for value in model.audio_encoder.parameters():
                value.mul_(1.2)
        model.encode(audio=audio, audio_len=audio_len)
    tokens, _ = model.encode(audio=audio, audio_len=audio_len)
    fresh = AudioCodecModel(model.cfg).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(tokens, fresh.encode(audio=audio, audio_len=audio_len)[0])
