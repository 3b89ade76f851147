"""Tests that copies and pickled NeMo models compute what the original computes, or that pickling raises an error."""

import copy
import io
import pickle
import tempfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("nemo", reason="these tests run NeMo's code: pip install '.[nemo]'")

from omegaconf import open_dict

from nemo_lfr import AudioCodecModel, CheckpointError, ConfigError, accelerate
from nemo_lfr.checkpoint import copying
from nemo_lfr.checkpoint.rebuilt import flags_of
from nemo_lfr.modules.weight_norm import remove_weight_norm
from nemo_lfr.nemo import copies
from tests.models import codec_config, speech_like, stock_model, write_nemo

AUDIO, LENGTHS = speech_like(4000)[None], torch.tensor([4000])
CONV, ACTIVATION = "audio_encoder.pre_conv.conv", "audio_encoder.activations.0"


@pytest.fixture(scope="module")
def nemo_file(tmp_path_factory):
    return write_nemo(tmp_path_factory.mktemp("copies") / "tiny.nemo", codec_config("two_stages"))


@pytest.fixture(scope="module")
def restored(nemo_file):
    return AudioCodecModel.restore_from(nemo_file, map_location="cpu")


@pytest.fixture
def model(restored):
    return copy.deepcopy(restored)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def results(model):
    """Return tokens and audio, computed with the same random numbers for dropout."""
    torch.manual_seed(0)
    with torch.no_grad():
        tokens, lengths = model.encode(audio=AUDIO, audio_len=LENGTHS)
        if next(model.audio_decoder.parameters()).dtype != torch.float32:  # `decode` refuses it
            return (tokens,)
        return tokens, model.decode(tokens=tokens, tokens_len=lengths)[0]


def assert_same(model, other):
    assert type(other) is type(model) and other.dtype == model.dtype
    for expected, result in zip(results(model), results(other), strict=True):
        assert torch.equal(result, expected)
    expected, state = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in expected.items())
    layers = dict(other.named_modules())
    for name, layer in model.named_modules():
        if name in layers:  # a pickled model has no wrappers
            assert layers[name].training == layer.training
            assert vars(layers[name]).get("p") == vars(layer).get("p")
            assert vars(layers[name]).get("note") == vars(layer).get("note")


def set_layer(model, path, make):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))


def set_dropout(model):
    rates = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    for index, layer in enumerate(rates):
        layer.p = 0.1 * (index % 3)
    assert len(rates) > 2
    model.train()


def convert(model):
    model.audio_decoder.double()
    model.audio_encoder.requires_grad_(False)


def remove_norm(model):
    model.freeze()
    model.audio_encoder.remove_weight_norm()
    model.audio_decoder.remove_weight_norm()


def remove_some_norm(model):
    remove_weight_norm(model.get_submodule(CONV))
    conv = model.audio_decoder.post_conv.conv
    remove_weight_norm(conv)
    weight = conv._parameters.pop("weight")
    conv.register_buffer("weight", weight.detach())  # as PyTorch's function does with frozen weights


def with_average(model):
    from nemo_lfr.training.average import Average

    model._average = Average(model._generator, 0.9)
    model._average.count = 3


def build_discriminator(model):
    with open_dict(model.cfg):
        model.cfg.discriminator = {
            "_target_": "nemo_lfr.training.discriminators.Discriminator",
            "discriminators": [{"_target_": "nemo_lfr.training.discriminators.MultiPeriodDiscriminator"}],
        }
    model.build_discriminator()
    model.discriminator.requires_grad_(False).eval()


KEPT = {
    "nothing": lambda model: None,
    "rates of dropout": set_dropout,
    "modes": lambda model: model.train().audio_encoder.eval(),
    "dtype and gradients": convert,
    "no weight norm": remove_norm,
    "no weight norm in two layers": remove_some_norm,
    "slope": lambda model: setattr(model.get_submodule(ACTIVATION).activation, "negative_slope", 0.3),
    "padding": lambda model: setattr(model.get_submodule(CONV), "padding_mode", "zeros"),
    "eps": lambda model: setattr(model.vector_quantizer.fsqs[1], "eps", 0.1),
    "attribute of a layer": lambda model: setattr(model.get_submodule(CONV), "note", [1, {"a": "b"}]),
    "attribute of the model": lambda model: setattr(model, "note", SimpleNamespace(a=1)),
    "compiled": lambda model: setattr(model, "audio_encoder", torch.compile(model.audio_encoder, backend="eager")),
    "no discriminator": lambda model: delattr(model, "discriminator"),
    "discriminator": build_discriminator,
    "losses": lambda model: model.losses,
    "average": with_average,
}


@pytest.mark.parametrize("change", KEPT)
def test_copies_compute_the_same(model, change):
    KEPT[change](model)
    flags = flags_of(model)
    for copied in (pickled, copy.deepcopy, copy.copy):
        other = copied(model)
        assert flags_of(other) == flags
        assert (other._average and other._average.count) == (model._average and model._average.count)
        assert hasattr(other, "discriminator") == hasattr(model, "discriminator")
        assert_same(model, other)


@pytest.mark.parametrize("change", ["nothing", "dtype and gradients", "no weight norm", "compiled", "average"])
def test_a_pickled_optimizer_changes_the_weights_of_the_model_in_the_same_pickle(model, change):
    KEPT[change](model.float())
    model.requires_grad_(True)
    other, optimizer = pickled((model, torch.optim.SGD(model.parameters(), 0.1)))
    trained = optimizer.param_groups[0]["params"]
    assert len(trained) > 10 and list(map(id, trained)) == list(map(id, other.parameters()))


@pytest.mark.parametrize("change", ["nothing", "no weight norm", "no weight norm in two layers"])
def test_a_pickled_codec_shares_the_weights_of_the_model_in_the_same_pickle(model, change):
    KEPT[change](model)
    codec, other, copied = *pickled((model.codec, model)), copy.deepcopy(model.codec)
    encoder = codec.backend.encoder
    assert flags_of(encoder) == flags_of(model.audio_encoder)
    assert list(map(id, encoder.parameters())) == list(map(id, other.audio_encoder.parameters()))
    expected = model.codec.encode(AUDIO, LENGTHS, 22050)[0]
    for each in (codec, copied):
        assert torch.equal(each.encode(AUDIO, LENGTHS, 22050)[0], expected)
        assert each.fingerprint == model.codec.fingerprint


@pytest.mark.parametrize("rebuild", [copying.unpickled, copies._unpickled, AudioCodecModel.__new__])
def test_pickles_of_another_version_are_refused(model, rebuild):
    """The first pickle has another form, the second one calls an earlier function, the third one sets attributes."""
    _, (content,), *_ = model.__reduce__()
    arguments = {copying.unpickled: ({**content, "form": 0},), copies._unpickled: (AudioCodecModel, model.cfg)}
    pickled = Reduced(rebuild, arguments.get(rebuild, (AudioCodecModel,)), {"_average": None})
    with pytest.raises(CheckpointError, match="another version of nemo_lfr pickled this model"):
        pickle.loads(pickle.dumps(pickled))


class Reduced:
    """Object whose pickle has given content."""

    def __init__(self, *content):
        self.content = content

    def __reduce__(self):
        return self.content


def test_the_content_of_pickles_changes_only_with_their_form(model):
    with_average(model)
    _, (content,), *_ = model.__reduce__()
    names = [sorted(part) for part in (content, content["recipe"], content["kept"], vars(model._average))]
    assert names == [
        ["class", "flags", "form", "kept", "recipe", "state"],
        ["built", "cfg", "components", "has_discriminator", "restored_from"],
        ["_average", "_is_without_gan", "_random_weights", "_restored_from"],
        ["_trained", "count", "decay", "in_use", "is_due", "weights"],
    ]
    assert content["form"] == 3, "raise the form when a list above changes"


def test_torch_save_and_a_copy_of_a_copy(nemo_file):
    model = accelerate(stock_model(nemo_file))
    set_dropout(model)
    assert_same(model, saved(pickled(copy.deepcopy(model))))


def test_pickling_uses_no_random_numbers_and_keeps_references_to_the_model(model):
    model.note = {"model": model}
    state = torch.random.get_rng_state()
    content = pickle.dumps(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = pickle.loads(content)
    assert other.note["model"] is other


def test_a_model_that_was_loaded_in_inference_mode_is_pickled(nemo_file):
    with torch.inference_mode():
        model = AudioCodecModel.restore_from(nemo_file, map_location="cpu")
    assert_same(model, pickled(model))


class Adapter(nn.Module):
    """Wrapper like those of LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs) * self.scale


def hook(*args, **kwargs):
    return None


def halve(_layer, _inputs, result):
    return result * 0.5


def register_deleted_file(model):
    with tempfile.NamedTemporaryFile() as file, open_dict(model.cfg):
        model.cfg.speakers = model.register_artifact("speakers", file.name)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks")
REFUSED = {
    "head is a Linear that": lambda model: model.add_module("head", nn.Linear(3, 3)),
    "audio_encoder.extra is a Identity that": lambda model: model.audio_encoder.add_module("extra", nn.Identity()),
    "scale is a tensor that": lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(1))),
    f"{CONV}.scale is a tensor that": lambda model: model.get_submodule(CONV).register_buffer("scale", torch.ones(1)),
    "audio_encoder.scale is a tensor that": lambda model: model.audio_encoder.register_buffer(
        "scale", torch.ones(1), persistent=False
    ),
    f"{CONV} is a Adapter, not the configured Conv1d": lambda model: set_layer(model, CONV, Adapter),
    f"{ACTIVATION}.activation is a Tanh, not": lambda model: set_layer(
        model, f"{ACTIVATION}.activation", lambda _: nn.Tanh()
    ),
    "mel_loss_fn is a Identity, not": lambda model: setattr(model, "mel_loss_fn", nn.Identity()),
    "discriminator is a Identity that": lambda model: setattr(model, "discriminator", nn.Identity()),
    f"{CONV}.bias was removed": lambda model: setattr(model.get_submodule(CONV), "bias", None),
    f"{CONV} has a forward hook": lambda model: model.get_submodule(CONV).register_forward_hook(halve),
    "the model has a forward hook": lambda model: model.register_forward_hook(hook),
    "audio_decoder has a forward pre-hook": lambda model: model.audio_decoder.register_forward_pre_hook(hook),
    "the model has a state dict pre-hook": lambda model: model.register_state_dict_pre_hook(hook),
    f"{CONV}.bias has a gradient hook": lambda model: model.get_submodule(CONV).bias.register_hook(hook),
    "method encode is overridden": lambda model: setattr(model, "encode", model.encode),
    "method training_step is overridden": lambda model: setattr(model, "training_step", hook),
    "num_levels is \\[5, 5, 5, 5\\].* model.state_dict\\(\\) instead": lambda model: model.vector_quantizer.fsqs[
        0
    ].num_levels.fill_(5),
    "the file of speakers does not exist": register_deleted_file,
    "is a meta tensor, which has no values": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_pickling_refuses_what_it_would_drop(model, message):
    REFUSED[message](model)
    with pytest.raises(ConfigError, match=message) as error:
        pickle.dumps(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [key for key in REFUSED if "num_levels" not in key and "meta" not in key])
def test_copies_keep_what_pickling_refuses(model, message):
    REFUSED[message](model)
    for other in (copy.deepcopy(model), copy.copy(model)):
        assert "training_step" not in message or other.training_step is hook
        hooks = [[len(getattr(layer, kind)) for kind in HOOKS] for layer in model.modules()]
        assert [[len(getattr(layer, kind)) for kind in HOOKS] for layer in other.modules()] == hooks
        assert [type(layer) for layer in other.modules()] == [type(layer) for layer in model.modules()]
        if "state dict" not in message:
            assert_same(model, other)


def test_a_copy_shares_no_hooks_and_no_names_of_buffers(model):
    other = copy.copy(model)
    other.register_forward_hook(hook, prepend=True)
    other.register_buffer("scale", torch.ones(1), persistent=False)
    assert not model._forward_hooks and not model._non_persistent_buffers_set


def test_a_deep_copy_loses_weight_norm_alone(model):
    other = copy.deepcopy(model)
    remove_norm(other)
    assert len(list(other.buffers())) == len(list(model.buffers()))
    assert_same(other.train(), model.train())


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, copy.copy])
def test_a_copy_of_a_compiled_model_runs_its_own_modules(model, copied):
    model.compile(backend="eager")
    other = copied(model)
    other.forward = lambda: "the copy"
    assert other() == "the copy"


class WithHead(AudioCodecModel):
    """Model with changes that its constructor makes."""

    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.head = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.size = float(next(self.audio_encoder.parameters()).detach().abs().sum())  # needs values
        set_layer(self, CONV, Adapter)
        self.audio_encoder.register_forward_hook(lambda _, inputs, result: (result[0] * 0.5, result[1]))


class WithArgument(AudioCodecModel):
    def __init__(self, cfg, size, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)


def test_changes_of_a_subclass_constructor_are_kept(nemo_file):
    model = WithHead(AudioCodecModel.restore_from(nemo_file, return_config=True)).eval()
    model.head[1].p, model.table, model.size = 0.3, torch.ones(3), 5.0
    other = pickled(model)
    assert_same(model, other)
    assert torch.equal(other.table, torch.ones(3)) and other.size == 5.0
    model.audio_encoder.register_forward_hook(hook)
    with pytest.raises(ConfigError, match="audio_encoder has a forward hook"):
        pickle.dumps(model)


def test_a_subclass_that_needs_further_arguments_is_not_pickled(restored):
    with pytest.raises(ConfigError, match=r"this WithArgument cannot be pickled.* missing 1 required .*'size'"):
        pickle.dumps(WithArgument(restored.cfg, 3))
