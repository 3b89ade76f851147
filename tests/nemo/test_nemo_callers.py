"""Tests that the code of NeMo's models runs on our model and on an accelerated stock model, with equal results."""

import contextlib
import copy
import functools
import inspect
import io
import os
import pickle
import tarfile
import tempfile
import textwrap
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("nemo", reason="these tests run NeMo's code: pip install '.[nemo]'")

from nemo.collections.tts.models.audio_codec import AudioCodecModel as StockModel
from nemo.collections.tts.modules.audio_codec_modules import GroupFiniteScalarQuantizer, VectorQuantizerIndexConverter
from nemo.collections.tts.modules.audio_codec_modules import HiFiGANEncoder as StockEncoder
from omegaconf import OmegaConf, open_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.nn.utils import parametrize

import nemo_lfr
from nemo_lfr import AudioCodecModel, CheckpointError, ConfigError, NemoLfrError, TokensError, accelerate
from nemo_lfr.checkpoint import build_part
from nemo_lfr.checkpoint.names import WRAPPERS
from nemo_lfr.codec import Codec
from nemo_lfr.codec.streaming import push_encoders
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.modules.encoder import HiFiGANEncoder
from tests.models import KINDS, MODULES, small_config, speech_like, stock_model, write_nemo

AUDIO, LENGTHS = torch.stack([speech_like(9000), speech_like(9000, 1)]), torch.tensor([9000, 9000])
DISCRIMINATOR = {
    "_target_": MODULES + "Discriminator",
    "discriminators": [{"_target_": MODULES + "MultiPeriodDiscriminator"}],
}


@pytest.fixture(scope="module")
def nemo_file(tmp_path_factory):
    return write_nemo(tmp_path_factory.mktemp("callers") / "tiny.nemo", small_config())


@pytest.fixture(scope="module")
def trained_file(nemo_file, tmp_path_factory):
    """Write the codec of `nemo_file` with discriminators, as stock saves it."""
    stock = StockModel(OmegaConf.create(small_config() | {"discriminator": DISCRIMINATOR}))
    stock.load_state_dict(
        stock_model(nemo_file).state_dict() | stock.discriminator.state_dict(prefix="discriminator.")
    )
    path = tmp_path_factory.mktemp("trained") / "trained.nemo"
    stock.save_to(str(path))
    return path


@pytest.fixture(scope="module")
def expected(nemo_file):
    """Return the tokens of stock NeMo."""
    with torch.no_grad():
        return stock_model(nemo_file).encode(audio=AUDIO, audio_len=LENGTHS)[0]


def tokens_of(model):
    with torch.no_grad():
        return model.encode(audio=AUDIO, audio_len=LENGTHS)[0]


def ours(path):
    return AudioCodecModel.restore_from(path, map_location="cpu")


def deleted(model):
    del model.discriminator
    return model


def compiled(model, *names):
    for name in names:
        setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
    return model


MODELS = {
    "ours": ours,
    "accelerated": lambda path: accelerate(stock_model(path)),
    "accelerated after del": lambda path: accelerate(deleted(stock_model(path))),
    "accelerated before del": lambda path: deleted(accelerate(stock_model(path))),
    "accelerated, compiled before": lambda path: accelerate(
        compiled(stock_model(path), "audio_encoder", "audio_decoder", "vector_quantizer")
    ),
    "accelerated through torch.compile": lambda path: accelerate(torch.compile(stock_model(path), backend="eager")),
    "ours, compiled": lambda path: compiled(ours(path), "audio_encoder", "audio_decoder"),
    "ours, plain weights": lambda path: without_norm(ours(path)),
    "copy": lambda path: copy.copy(ours(path)),
    "deep copy": lambda path: copy.deepcopy(accelerate(stock_model(path))),
    "pickled": lambda path: pickle.loads(pickle.dumps(ours(path))),
    "torch.save": lambda path: saved(accelerate(stock_model(path))),
    "torch.save after del": lambda path: saved(deleted(ours(path))),
}


def without_norm(model):
    model.audio_encoder.remove_weight_norm()
    model.audio_decoder.remove_weight_norm()
    return model


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_has_stocks_tokens_and_saves_what_stock_opens(nemo_file, expected, tmp_path, kind):
    model = MODELS[kind](nemo_file)
    assert torch.equal(tokens_of(model), expected)
    names = set(getattr(model, "_orig_mod", model).state_dict())
    assert names == set(stock_model(nemo_file).state_dict())
    model.save_to(str(tmp_path / "saved.nemo"))
    assert b"_orig_mod" not in (tmp_path / "saved.nemo").read_bytes()
    assert torch.equal(tokens_of(stock_model(tmp_path / "saved.nemo")), expected)
    assert torch.equal(tokens_of(ours(tmp_path / "saved.nemo")), expected)


WRAPPINGS = {
    "DDP": lambda key: f"module.{key}",
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"_orig_mod.module.{key}",
    "parts": lambda key: key.replace("audio_encoder.", "audio_encoder._orig_mod."),
    "layers": lambda key: key.replace(".pre_conv.", ".pre_conv.module."),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("target", ["ours", "ours, compiled", "ours, plain weights", "accelerated"])
def test_wrapped_names_load_into_every_model(nemo_file, expected, wrapping, target):
    model = MODELS[target](nemo_file)
    state = {WRAPPINGS[wrapping](key): value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    assert torch.equal(tokens_of(model), expected)


@pytest.mark.parametrize("target", ["ours", "ours, compiled"])
def test_submodule_saves_and_loads_plain_names(nemo_file, expected, target):
    state = torch.nn.ModuleDict({"codec": MODELS["ours, compiled"](nemo_file)}).state_dict()
    assert "_orig_mod" not in str(list(state)) + str(state._metadata)
    assert all(key.startswith("codec.") for key in state)
    model = MODELS[target](nemo_file)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.nn.ModuleDict({"codec": model}).load_state_dict(state)
    assert torch.equal(tokens_of(model), expected)


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}])
@pytest.mark.parametrize("kind", ["ours", "accelerated", "torch.save after del"])
def test_distributed_checkpoints_contain_the_names_of_stock(trained_file, expected, kind, options):
    """The discriminators of a restored model are not built, but its state dict contains their weights."""
    model, other = (torch.nn.ModuleDict({"codec": MODELS[kind](trained_file)}) for _ in range(2))
    state = get_model_state_dict(model, options=StateDictOptions(**options))
    is_kept = "del" not in kind
    names = [f"codec.{key}" for key in stock_model(trained_file).state_dict() if is_kept or "discriminator" not in key]
    assert sorted(state) == sorted(names)
    saved = {key: value.clone() for key, value in state.items()}
    for value in other.state_dict().values():
        if value.is_floating_point():
            value.zero_()
    set_model_state_dict(other, state, options=StateDictOptions(**options))
    assert all(torch.equal(saved[key], value) for key, value in other.state_dict().items())
    assert torch.equal(tokens_of(other.codec), expected)


def test_distributed_checkpoints_refuse_wrapped_modules(nemo_file):
    """Stock NeMo's names contain `_orig_mod`, which PyTorch expects in the names of a compiled module."""
    model = torch.nn.ModuleDict({"codec": MODELS["ours, compiled"](nemo_file)})
    with pytest.raises(ConfigError, match=r"audio_encoder is wrapped in OptimizedModule.*call audio_encoder\.compile"):
        get_model_state_dict(model)


RESIDUAL = "audio_encoder.res_layers.0"
LAYERS = {  # by name: the factor by which the layer shortens a signal
    "audio_encoder.pre_conv": 1,
    "audio_encoder.down_sample_conv_layers.0": 32,
    "audio_decoder.up_sample_conv_layers.0": 1,
    RESIDUAL: 1,
    f"{RESIDUAL}.res_blocks.1": 1,
    f"{RESIDUAL}.res_blocks.1.res_blocks.0": 1,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_arguments_of_stock(nemo_file, name):
    layers = [model.get_submodule(name) for model in (stock_model(nemo_file), ours(nemo_file))]
    conv = next(module for module in layers[0].modules() if hasattr(module, "in_channels"))
    torch.manual_seed(0)
    inputs, lengths = torch.randn(2, conv.in_channels, 96), torch.tensor([96, 56]) // LAYERS[name]
    with torch.no_grad():
        expected, result = (layer(inputs=inputs, input_len=lengths) for layer in layers)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


# Changes to single layers, beside stock NeMo.


class Beside(torch.nn.Module):
    """Adapter that adds the output of an own layer to that of a convolution."""

    def __init__(self, conv):
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv
        self.own = torch.nn.Conv1d(conv.in_channels, conv.out_channels, 1, conv.stride)

    def forward(self, inputs):
        result = self.conv(inputs)
        return result + 0.1 * self.own(inputs)[..., : result.shape[-1]]


class NextToken(torch.nn.Module):
    """Quantizer of a group whose tokens are higher by 1."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def encode(self, inputs, input_len):
        return (self.inner.encode(inputs=inputs, input_len=input_len) + 1) % 2016

    def decode(self, indices, input_len):
        return self.inner.decode(indices=(indices + 1) % 2016, input_len=input_len)


def on_conv(change, *layers):
    def changed(model):
        for part in (model.audio_encoder, model.audio_decoder):
            for layer in layers or (part.pre_conv, part.post_conv):
                layer = layer(part) if callable(layer) and not isinstance(layer, torch.nn.Module) else layer
                change(layer)

    return changed


def adapter(layer):
    layer.conv = Beside(layer.conv)


def shifted_input(layer):
    layer.conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.3,))


def fresh_conv(layer):
    old = layer.conv
    torch.manual_seed(0)
    layer.conv = torch.nn.Conv1d(old.in_channels, old.out_channels, old.kernel_size, padding=old.padding)


def padding_mode(layer):
    layer.conv.padding_mode = "replicate"


def halved_resampling(model):
    for layer in (model.audio_encoder.down_sample_conv_layers[0], model.audio_decoder.up_sample_conv_layers[0]):
        layer.conv.register_forward_hook(lambda module, inputs, output: output * 0.5)


def tanh_after(layer):
    layer.activation = torch.nn.Tanh()


def block_of(part):
    return part.res_layers[0].res_blocks[0].res_blocks[0]


def smaller(block):
    block.dropout.register_forward_hook(lambda module, inputs, output: output * 0.5)


def group_hook(model):
    model.vector_quantizer.fsqs[1].register_forward_hook(lambda module, inputs, out: (out[0], (out[1] + 1) % 2016))


def group_pre_hook(model):
    model.vector_quantizer.fsqs[1].register_forward_pre_hook(
        lambda module, inputs, named: (inputs, named | {"inputs": named["inputs"] * 0.5}), with_kwargs=True
    )


def group_methods(model):
    group = model.vector_quantizer.fsqs[1]
    encode, decode = group.encode, group.decode
    group.encode = lambda **named: (encode(**named) + 1) % 2016
    group.decode = lambda **named: decode(**named) * 0.5


def replaced_group(model):
    model.vector_quantizer.fsqs[1] = NextToken(model.vector_quantizer.fsqs[1])


def group_eps(model):
    model.vector_quantizer.fsqs[1].eps = 0.2


def quantizer_hook(model):
    model.vector_quantizer.register_forward_hook(lambda module, inputs, out: (out[0], (out[1] + 1) % 2016))


def group_step(name, change):
    """Return a change that wraps one method of a group; `change` is applied to its result."""

    def changed(model):
        group = model.vector_quantizer.fsqs[1]
        step = getattr(group, name)
        setattr(group, name, lambda *values, **named: change(step(*values, **named)))

    return changed


def subclassed_group(model):
    group = model.vector_quantizer.fsqs[1]
    step = type(group).codes_to_indices
    methods = {"codes_to_indices": lambda self, codes: (step(self, codes=codes) + 1) % 2016}
    group.__class__ = type("Shifted", (type(group),), methods)


def group_levels(model):
    model.vector_quantizer.fsqs[1].num_levels[0, 0, 0] = 5


def levels_through_data(model):
    tokens_of(model)  # the buffers were compared once
    model.vector_quantizer.fsqs[1].num_levels.data[0, 0, 0] = 5


def more_levels(model):
    model.vector_quantizer.fsqs[0].num_levels = torch.tensor([9, 7, 6, 8], dtype=torch.int32).reshape(1, 4, 1)


def group_bases(model):
    model.vector_quantizer.fsqs[1].dim_base_index = torch.tensor([252, 36, 6, 1]).reshape(1, 4, 1)


SURGERY = {
    "adapter": on_conv(adapter),
    "pre-hook": on_conv(shifted_input),
    "fresh convolution": on_conv(fresh_conv),
    "padding mode": on_conv(padding_mode),
    "resampling": halved_resampling,
    "activation": on_conv(tanh_after),
    "dropout": on_conv(smaller, block_of),
    "hook of a group": group_hook,
    "pre-hook of a group": group_pre_hook,
    "methods of a group": group_methods,
    "replaced group": replaced_group,
    "eps of a group": group_eps,
    "hook of the quantizer": quantizer_hook,
    "inputs_to_codes of a group": group_step("inputs_to_codes", lambda codes: codes * 0.8),
    "codes_to_indices of a group": group_step("codes_to_indices", lambda tokens: (tokens + 1) % 2016),
    "compress of a group": group_step("compress", lambda values: values * 0.6),
    "round of a group": group_step("round", lambda values: values * 0.7),
    "codes_to_nonnegative of a group": group_step("codes_to_nonnegative", lambda values: values * 0.5),
    "encode of a group": group_step("encode", lambda tokens: (tokens + 1) % 2016),
    "nonnegative_to_codes of a group": lambda model: (
        group_step("nonnegative_to_codes", lambda codes: codes * 0.5)(model),
        group_hook(model),
    ),
    "subclass of a group": subclassed_group,
    "levels of a group": group_levels,
    "levels of a group, through data": levels_through_data,
    "more levels": more_levels,
    "bases of a group": group_bases,
}


# `Codec` refuses tokens outside the codebook that it was built for.
STOCK_ONLY = {"more levels"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surgery")
    return {kind: write_nemo(folder / f"{kind}.nemo", small_config(kind)) for kind in ("symmetric", "nano")}


@functools.cache
def unchanged_tokens(path):
    return tokens_of(stock_model(path))


@pytest.mark.parametrize("kind", ["symmetric", "nano"])
@pytest.mark.parametrize("surgery", SURGERY)
def test_changed_layers_give_what_stock_gives(files, kind, surgery):
    results = []
    for model in (stock_model(files[kind]), ours(files[kind]), accelerate(stock_model(files[kind]))):
        SURGERY[surgery](model)
        model.eval()
        tokens = torch.arange(9).tile(1, model.num_codebooks, 1) * 7
        with torch.no_grad():
            results.append((tokens_of(model), model.decode(tokens=tokens, tokens_len=torch.tensor([9]))[0]))
    if surgery not in STOCK_ONLY:
        codec = Codec(TorchBackend(model.audio_encoder, model.vector_quantizer, model.audio_decoder, 22050))
        results.append((codec.encode(AUDIO, LENGTHS)[0], codec.decode(tokens)[0]))
    for tokens, audio in results[1:]:
        assert torch.equal(tokens, results[0][0])
        torch.testing.assert_close(audio, results[0][1], rtol=1e-4, atol=1e-5)
    if surgery != "hook of the quantizer":  # stock NeMo does not call it
        assert not torch.equal(results[0][0], unchanged_tokens(files[kind]))


@pytest.mark.parametrize("name", ["inputs_to_codes", "codes_to_indices", "encode", "forward"])
def test_methods_patched_in_the_class_give_what_stock_gives(nemo_file, expected, monkeypatch, name):
    models = stock_model(nemo_file), ours(nemo_file), accelerate(stock_model(nemo_file))
    for kind in {type(model.vector_quantizer.fsqs[0]) for model in models}:
        step = getattr(kind, name)
        scale = 0.8 if name == "inputs_to_codes" else 1

        def changed(self, step=step, scale=scale, **named):
            result = step(self, **named)
            return result * scale if name == "inputs_to_codes" else next_tokens(result)

        monkeypatch.setattr(kind, name, changed)
    stock, *others = map(tokens_of, models)
    assert all(torch.equal(tokens, stock) for tokens in others) and not torch.equal(stock, expected)


@pytest.mark.parametrize("name", ["codes_to_indices", "round"])  # the second one is a static method
def test_accelerate_refuses_methods_patched_in_the_class(nemo_file, monkeypatch, name):
    model = stock_model(nemo_file)
    kind = type(model.vector_quantizer.fsqs[0])
    monkeypatch.setattr(kind, name, functools.wraps(getattr(kind, name))(lambda *_, **named: named))
    message = rf"vector_quantizer\.fsqs\.0: the method FiniteScalarQuantizer\.{name} of NeMo is patched"
    with pytest.raises(ConfigError, match=message):
        accelerate(model)
    assert type(model) is StockModel


def next_tokens(result):
    return (result[0], (result[1] + 1) % 2016) if isinstance(result, tuple) else (result + 1) % 2016


STEPS = {
    "quantize": next_tokens,
    "encode": lambda result: (next_tokens(result[0]), result[1]),
    "encode_audio": lambda result: (0.8 * result[0], result[1]),
}


@pytest.mark.parametrize("name", STEPS)
def test_methods_patched_in_nemos_model_give_what_stock_gives(nemo_file, expected, monkeypatch, name):
    models = stock_model(nemo_file), ours(nemo_file), accelerate(stock_model(nemo_file))
    method = getattr(StockModel, name)
    monkeypatch.setattr(StockModel, name, lambda self, **named: STEPS[name](method(self, **named)))
    stock, *others = map(tokens_of, models)
    assert all(torch.equal(tokens, stock) for tokens in others) and not torch.equal(stock, expected)


def test_a_removed_group_gives_what_stock_gives(nemo_file, expected):
    models = stock_model(nemo_file), ours(nemo_file), accelerate(stock_model(nemo_file))
    for model in models:
        del model.vector_quantizer.fsqs[-1]
        assert torch.equal(tokens_of(model), expected[:, :-1])
        with pytest.raises(RuntimeError):
            model.decode(tokens=expected, tokens_len=torch.tensor([9, 9]))
    model = models[1]
    codec = Codec(TorchBackend(model.audio_encoder, model.vector_quantizer, model.audio_decoder, 22050))
    with pytest.raises(NemoLfrError, match="shape"):
        codec.encode(AUDIO, LENGTHS)


def test_dropout_is_applied_in_training_as_in_stock(nemo_file):
    results = []
    for model in (stock_model(nemo_file), ours(nemo_file), accelerate(stock_model(nemo_file))):
        model.train()
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        for layer in layers:
            layer.p = 0.5
        torch.manual_seed(1)
        results.append((len(layers), model.encode_audio(audio=AUDIO, audio_len=LENGTHS)[0].detach()))
    for count, encoded in results[1:]:
        assert count == results[0][0]
        torch.testing.assert_close(encoded, results[0][1], rtol=1e-3, atol=1e-4)


def test_weights_load_after_to_empty(nemo_file, expected):
    model = ours(nemo_file)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.to_empty(device="meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(tokens_of(model), expected)


# accelerate


def test_accelerate_takes_a_model_that_was_loaded_in_inference_mode(nemo_file, expected):
    with torch.inference_mode():
        models = [stock_model(nemo_file), stock_model(nemo_file)]
    gradients = [value.requires_grad for value in models[0].parameters()]
    assert torch.equal(tokens_of(accelerate(models[0])), expected)
    other_channels(models[1])
    with pytest.raises(ConfigError):
        accelerate(models[1])
    for model in models:
        assert [value.requires_grad for value in model.parameters()] == gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_accelerate_keeps_parameters_dtype_mode_and_gradients(nemo_file, dtype, training):
    model = stock_model(nemo_file).to(dtype).train(training)
    model.audio_encoder.requires_grad_(False)
    before = {name: (id(value), value.requires_grad) for name, value in model.named_parameters()}
    accelerate(model)
    after = {name: (id(value), value.requires_grad) for name, value in model.named_parameters()}
    assert after == before  # an existing optimizer still updates the same parameters
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert all(module.training == training for module in model.audio_encoder.modules())


def other_channels(model):
    model.cfg.audio_encoder.base_channels = 8


def other_levels(model):
    model.cfg.vector_quantizer.num_levels_per_group = [6, 7, 8, 6]


def unknown_class(model):
    model.cfg.audio_decoder._target_ = MODULES + "ResNetDecoder"


def another_decoder(model):
    model.audio_decoder = torch.nn.Linear(2, 2)


def speaker_loss(model):
    with open_dict(model.cfg):
        model.cfg.use_scl_loss = True


@pytest.mark.parametrize("spoil", [other_channels, other_levels, unknown_class, another_decoder, speaker_loss])
@pytest.mark.parametrize("has_discriminator", [True, False])
def test_a_refused_accelerate_leaves_the_object_as_it_was(nemo_file, expected, spoil, has_discriminator):
    model = stock_model(nemo_file)
    model.audio_encoder.requires_grad_(False)
    if not has_discriminator:
        del model.discriminator
    spoil(model)

    def picture():
        gradients = [(id(value), value.requires_grad) for value in model.parameters()]
        return type(model), set(vars(model)), [id(module) for module in model.modules()], gradients

    before = picture()
    for _ in range(2):
        with pytest.raises(ConfigError):
            accelerate(model)
        assert picture() == before
    assert torch.equal(tokens_of(model), expected)
    model.state_dict()


def on_meta(model):
    return model.to("meta")


def no_encoder(model):
    model.audio_encoder = None
    return model


def deleted_quantizer(model):
    del model.vector_quantizer
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(on_meta, "meta device"), (no_encoder, "audio_encoder is None"), (deleted_quantizer, "vector_quantizer is None")],
)
def test_accelerate_names_the_fault_of_an_unusable_model(nemo_file, spoil, message):
    model = spoil(stock_model(nemo_file))
    with pytest.raises(ConfigError, match=message):
        accelerate(model)
    assert type(model) is StockModel


def copied(model):
    del model.training_step  # NeMo's proxy cannot be copied
    return copy.deepcopy(model)


def with_its_own_step(model):
    model.training_step = lambda *_: "the caller's"
    return model


@pytest.mark.parametrize("prepare", [copied, with_its_own_step])
def test_accelerate_takes_a_model_whatever_its_training_step_is(nemo_file, expected, prepare):
    model = accelerate(prepare(stock_model(nemo_file)))
    assert type(model) is AudioCodecModel
    assert torch.equal(tokens_of(model), expected)
    assert prepare is copied or model.training_step() == "the caller's"


def test_an_accelerated_model_trains_with_the_step_of_its_new_class(nemo_file):
    model = stock_model(nemo_file)
    assert model.training_step.__wrapped__.__func__ is StockModel.training_step
    assert accelerate(model).training_step.__wrapped__.__func__ is AudioCodecModel.training_step


def test_accelerate_keeps_the_mode_of_every_layer(nemo_file):
    model = stock_model(nemo_file).train()
    model.audio_decoder.res_layers[0].eval()
    model.audio_encoder.eval()
    accelerate(model)
    assert model.training and model.audio_decoder.training and model.audio_decoder.res_layers[1].training
    assert not model.audio_decoder.res_layers[0].training
    assert not any(module.training for module in model.audio_encoder.modules())


class Halved(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module  # the name that DistributedDataParallel uses too

    def forward(self, *args, **kwargs):
        result = self.module(*args, **kwargs)
        return result * 0.5 if torch.is_tensor(result) else (result[0] * 0.5, *result[1:])


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


class OtherEncoder(StockEncoder):
    def forward(self, audio, audio_len):
        return super().forward(audio=audio * 0.5, audio_len=audio_len)


def replaced(model, path, make):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))


def overridden(model, path, method):
    layer = model.get_submodule(path)
    original = getattr(layer, method)
    setattr(layer, method, lambda *args, **kwargs: original(*args, **kwargs))


def changed(model, path, **settings):
    for key, value in settings.items():
        assert getattr(model.get_submodule(path), key) != value
        setattr(model.get_submodule(path), key, value)


def of_another_class(model, path, kind):
    model.get_submodule(path).__class__ = kind


def parametrized(model, path):
    parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())


def compiled_with_hook(model):
    compiled(model, "audio_encoder").audio_encoder.register_forward_hook(lambda *_: None)


CONV, BLOCK = "audio_encoder.pre_conv.conv", "audio_decoder.res_layers.0.res_blocks.0.res_blocks.0"
HOOKS = {
    "forward hook": "register_forward_hook",
    "forward pre-hook": "register_forward_pre_hook",
    "backward hook": "register_full_backward_hook",
    "backward pre-hook": "register_full_backward_pre_hook",
    "state dict hook": "register_state_dict_post_hook",
    "load_state_dict pre-hook": "register_load_state_dict_pre_hook",
}
ALTERATIONS = {
    f"{path} has a {kind}": lambda model, path=path, method=method: getattr(model.get_submodule(path), method)(
        lambda *_: None
    )
    for path in ("audio_encoder", CONV, "vector_quantizer.fsqs.1", BLOCK + ".dropout")
    for kind, method in HOOKS.items()
} | {
    "audio_decoder has a backward hook": lambda model: model.audio_decoder.register_backward_hook(lambda *_: None),
    "audio_encoder has a forward hook": compiled_with_hook,
    "audio_encoder.forward is overridden": lambda model: overridden(model, "audio_encoder", "forward"),
    "vector_quantizer.encode is overridden": lambda model: overridden(model, "vector_quantizer", "encode"),
    "vector_quantizer.fsqs.0.decode is overridden": lambda model: overridden(
        model, "vector_quantizer.fsqs.0", "decode"
    ),
    f"{CONV}.forward is overridden": lambda model: overridden(model, CONV, "forward"),
    f"{BLOCK}.dropout.forward is overridden": lambda model: overridden(model, BLOCK + ".dropout", "forward"),
    "audio_encoder is a Halved, not the stock HiFiGANEncoder": lambda model: replaced(model, "audio_encoder", Halved),
    "audio_encoder is a OtherEncoder": lambda model: of_another_class(model, "audio_encoder", OtherEncoder),
    "audio_encoder.pre_conv is a Halved, not": lambda model: replaced(model, "audio_encoder.pre_conv", Halved),
    f"{CONV} is a Halved, not the stock Conv1d": lambda model: replaced(model, CONV, Halved),
    "audio_encoder.activations.0.activation is a Tanh, not the stock LeakyReLU": lambda model: replaced(
        model, "audio_encoder.activations.0.activation", lambda _: torch.nn.Tanh()
    ),
    "audio_decoder.pre_conv.activation is a ReLU, not the stock Identity": lambda model: replaced(
        model, "audio_decoder.pre_conv.activation", lambda _: torch.nn.ReLU()
    ),
    f"{BLOCK}.dropout is a AlphaDropout, not the stock Dropout": lambda model: replaced(
        model, BLOCK + ".dropout", lambda _: torch.nn.AlphaDropout(0.1)
    ),
    f"{CONV}.parametrizations.weight.1 is a Doubled that": lambda model: parametrized(model, CONV),
    "vector_quantizer.extra is a Identity that": lambda model: model.vector_quantizer.add_module(
        "extra", torch.nn.Identity()
    ),
    "audio_encoder.activations.0.activation.negative_slope is 0.3 instead of 0.01": lambda model: changed(
        model, "audio_encoder.activations.0.activation", negative_slope=0.3
    ),
    f"{CONV}.padding is \\(0,\\) instead of": lambda model: changed(model, CONV, padding=(0,)),
    f"{CONV}.stride is": lambda model: changed(model, CONV, stride=(2,)),
    f"{CONV}.dilation is": lambda model: changed(model, CONV, dilation=(2,)),
    f"{CONV}.padding_mode is 'circular'": lambda model: changed(model, CONV, padding_mode="circular"),
    "vector_quantizer.fsqs.2.eps is 0.1 instead of": lambda model: changed(model, "vector_quantizer.fsqs.2", eps=0.1),
    "audio_encoder.down_sample_rates is": lambda model: changed(
        model, "audio_encoder", down_sample_rates=[2, 2, 2, 2]
    ),
}


@pytest.mark.parametrize("message", ALTERATIONS)
def test_accelerate_refuses_altered_modules(nemo_file, message):
    model = stock_model(nemo_file)
    ALTERATIONS[message](model)
    before = list(model.modules())
    hooks = [len(module._forward_hooks) for module in before]
    with pytest.raises(ConfigError, match=message) as error:
        accelerate(model)
    assert "before accelerate(), and " in str(error.value) and "\n" not in str(error.value)
    assert type(model) is StockModel
    assert list(model.modules()) == before and [len(module._forward_hooks) for module in before] == hooks


def with_other_weights(model):
    for value in model.parameters():
        value.data.mul_(1.01)


def with_old_weight_norm(model):
    removed_norm(model)
    for module in list(model.modules()):
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            torch.nn.utils.weight_norm(module)


def removed_norm(model):
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


def our_encoder(model):
    encoder = build_part(OmegaConf.to_container(model.cfg.audio_encoder))
    encoder.load_state_dict(model.audio_encoder.state_dict())
    return encoder.eval()


def compiled_layers(model):
    replaced(model, "audio_encoder.pre_conv", lambda layer: torch.compile(layer, backend="eager"))
    model.audio_decoder.compile(backend="eager")


UNALTERED = {
    "weights": with_other_weights,
    "no weight norm": removed_norm,
    "old weight norm": with_old_weight_norm,
    "frozen": lambda model: model.freeze(),
    "compiled layers": compiled_layers,
    "our encoder": lambda model: setattr(model, "audio_encoder", our_encoder(model)),
}


@pytest.mark.parametrize("kind", UNALTERED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_accelerate_takes_every_model_with_the_layers_of_stock(nemo_file, kind):
    model = stock_model(nemo_file)
    UNALTERED[kind](model)
    expected = tokens_of(model)
    assert torch.equal(tokens_of(accelerate(model)), expected)


def test_accelerate_keeps_the_rates_of_dropout(nemo_file):
    model = stock_model(nemo_file).train()
    layers = [module for module in model.audio_encoder.modules() if isinstance(module, torch.nn.Dropout)]
    for index, layer in enumerate(layers):
        layer.p = 0.1 * (index % 3)

    def encoded():
        torch.manual_seed(0)
        with torch.no_grad():
            return model.audio_encoder(audio=AUDIO[:1, :8192], audio_len=torch.tensor([8192]))[0]

    expected = encoded()
    accelerate(model)
    assert torch.allclose(encoded(), expected, atol=1e-5)


def test_a_second_accelerate_keeps_hooks_on_the_accelerated_modules(nemo_file):
    class Subclass(StockModel):
        pass

    model = stock_model(nemo_file)
    model.__class__ = Subclass
    accelerate(model)
    model.audio_encoder.pre_conv.conv.register_forward_hook(lambda _, inputs, result: result * 0.5)
    expected = tokens_of(model)
    assert torch.equal(tokens_of(accelerate(model)), expected)


def under_bf16_default():
    @contextlib.contextmanager
    def state():
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return state()


STATES = {
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "bf16": under_bf16_default,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", ["accelerated", "pickled"])
def test_models_are_built_alike_whatever_the_callers_state(nemo_file, expected, state, kind):
    model = stock_model(nemo_file) if kind == "accelerated" else pickle.dumps(ours(nemo_file))
    with STATES[state]():
        model = accelerate(model) if kind == "accelerated" else pickle.loads(model)
    assert torch.equal(tokens_of(model), expected)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def other_codebook(state):
    return state | {"vector_quantizer.fsqs.3.num_levels": state["vector_quantizer.fsqs.3.num_levels"].roll(1, 1)}


class WithHead(AudioCodecModel):
    """Model with modules of a user."""

    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.head = torch.nn.Linear(3, 3)


class WithEncoder(AudioCodecModel):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.audio_encoder = build_part(OmegaConf.to_container(cfg.audio_encoder))


class WithLayer(AudioCodecModel):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        conv = self.audio_encoder.pre_conv.conv
        padding = {"padding": conv.padding, "padding_mode": conv.padding_mode}
        self.audio_encoder.pre_conv.conv = torch.nn.Conv1d(1, conv.out_channels, 7, **padding)


class WithDiscriminator(AudioCodecModel):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.discriminator = torch.nn.ModuleDict({"net": torch.nn.Linear(3, 3)})


class WithoutDiscriminator(AudioCodecModel):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        del self.discriminator


class WithFile(AudioCodecModel):
    """Model that reads a file of a user, which its checkpoints contain."""

    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        path = self.register_artifact("speakers", cfg.get("speakers", __file__))
        self.register_buffer("speakers", torch.tensor([os.path.getsize(path)]))


SUBCLASSES = {
    "file": (WithFile, "speakers"),
    "new module": (WithHead, "head.weight"),
    "new encoder": (WithEncoder, f"{CONV}.parametrizations.weight.original1"),
    "new layer": (WithLayer, f"{CONV}.parametrizations.weight.original1"),
    "discriminator": (WithDiscriminator, "discriminator.net.weight"),
}


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_weights_that_a_subclass_saves_are_restored(nemo_file, tmp_path, kind):
    model_class, key = SUBCLASSES[kind]
    model = model_class.restore_from(nemo_file, map_location="cpu")
    for value in model.parameters():
        value.data.mul_(1.25)
    restored, saved, folder = model, tmp_path / "saved.nemo", tmp_path / "unpacked"
    for source in (saved, folder, saved):
        restored.save_to(saved)
        with tarfile.open(saved) as archive:
            archive.extractall(folder, filter="data")
        restored = model_class.restore_from(source, map_location="cpu")
        assert restored.state_dict().keys() == model.state_dict().keys() and key in model.state_dict()
        torch.testing.assert_close(restored.state_dict()[key], model.state_dict()[key])
        assert torch.equal(tokens_of(restored), tokens_of(model))


@pytest.mark.parametrize("name", ["missing.txt", "../secret.txt", "folder/../../secret.txt", "", ".", "a\0b"])
def test_a_file_outside_the_checkpoint_is_not_read(nemo_file, tmp_path, monkeypatch, name):
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = AudioCodecModel.restore_from(nemo_file, return_config=True)
    config.speakers = f"nemo:{name}"
    with pytest.raises(CheckpointError, match=r"tiny\.nemo: speakers is 'nemo:.*no checkpoint with such a file"):
        WithFile.restore_from(nemo_file, override_config_path=config)
    with pytest.raises(ConfigError, match="set speakers to the path of a file"):
        WithFile(config)


def test_weights_of_a_subclass_with_another_shape_are_refused(nemo_file, tmp_path):
    model = WithHead.restore_from(nemo_file, map_location="cpu")
    model.head = torch.nn.Linear(5, 5)
    model.save_to(tmp_path / "saved.nemo")
    message = r"2 weights have other shapes, for example head.weight: \[5, 5\] instead of \[3, 3\]"
    with pytest.raises(CheckpointError, match=rf"saved.nemo: the state dict belongs to another model: {message}"):
        WithHead.restore_from(tmp_path / "saved.nemo", map_location="cpu")
    with pytest.raises(CheckpointError, match=message):
        WithHead.restore_from(nemo_file, map_location="cpu").load_state_dict(model.state_dict(), strict=False)


STRANGE = {
    "whole checkpoint": (lambda state: {"epoch": 3, "state_dict": state}, "int; pass the value of the key state_dict"),
    "number": (
        lambda state: state | {"audio_encoder.epoch": 5},
        "epoch in the state dict is not a tensor but int",
    ),
    "numpy": (lambda state: {key: value.numpy() for key, value in state.items()}, "not a tensor but ndarray"),
    "meta": (lambda state: {key: value.to("meta") for key, value in state.items()}, "is a meta tensor"),
    "name": (lambda state: state | {5: torch.zeros(1)}, "has the key 5"),
    "none": (lambda state: None, "has the type NoneType"),
    "path": (lambda state: "codec.nemo", "has the type str"),
    "list": (lambda state: list(state.items()), "has the type list"),
    "empty": (lambda state: {}, "lacks weights"),
    "levels": (other_codebook, "belongs to another codec: vector_quantizer.fsqs.3.num_levels"),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_invalid_state_dict_is_named_and_changes_nothing(nemo_file, expected, strange):
    change, message = STRANGE[strange]
    model = ours(nemo_file)
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(change(model.state_dict()))
    assert torch.equal(tokens_of(model), expected)


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_names_of_any_wrapper_are_understood(nemo_file, expected, wrapper):
    state = ours(nemo_file).state_dict()
    model = AudioCodecModel(OmegaConf.create(small_config())).eval()
    model.load_state_dict(
        {f"{wrapper}.{key}".replace("res_layers.", f"res_layers.{wrapper}."): value for key, value in state.items()}
    )
    assert torch.equal(tokens_of(model), expected)


def test_streams_of_one_model_are_pushed_together(nemo_file):
    model = ours(nemo_file)
    streams = [model.codec.stream_encoder() for _ in range(2)]
    given = push_encoders(streams, list(AUDIO.numpy()))
    assert torch.equal(torch.from_numpy(given[0]), tokens_of(model)[0, :, : given[0].shape[1]])
    codec = model.codec
    assert copy.copy(model).codec is not codec and copy.deepcopy(model).codec.encoder is not codec.encoder
    model.audio_encoder = copy.deepcopy(model.audio_encoder)
    assert model.codec is not codec and model.codec.encoder is model.audio_encoder


@pytest.mark.parametrize(
    ("name", "message"), [("folder.nemo", "is a folder"), ("file/codec.nemo", "cannot be written")]
)
def test_a_path_that_cannot_be_written_is_named(nemo_file, tmp_path, name, message):
    (tmp_path / "folder.nemo").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        ours(nemo_file).save_to(str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.nemo"]


@pytest.mark.parametrize("path", ["", None, 5, b"codec.nemo"])
def test_invalid_path_argument_is_named(nemo_file, path):
    with pytest.raises(CheckpointError, match="save_path is"):
        ours(nemo_file).save_to(path)


def test_deleting_the_discriminator_frees_its_weights(trained_file, expected):
    stock = stock_model(trained_file)
    restored = WithoutDiscriminator.restore_from(trained_file, map_location="cpu")
    assert not any(key.startswith("discriminator.") for key in restored.state_dict())
    for model in (ours(trained_file), accelerate(stock_model(trained_file))):
        assert any(key.startswith("discriminator.") for key in model.state_dict())
        del model.discriminator
        assert not hasattr(model, "discriminator")
        assert not any(key.startswith("discriminator.") for key in model.state_dict())
        model.load_state_dict(stock.state_dict())
        assert not any(key.startswith("discriminator.") for key in model.state_dict())
        assert torch.equal(tokens_of(model), expected)


# Converted codebooks


@pytest.mark.parametrize("kind", ["ours", "accelerated after del", "accelerated, compiled before", "pickled"])
def test_codebooks_are_regrouped_as_by_stock_and_back(nemo_file, kind):
    levels = {"num_groups": 4, "num_levels_per_group": [8, 7, 6, 6, 8, 7, 6, 6]}
    tokens = torch.randint(0, 2016, (2, 8, 20), generator=torch.Generator().manual_seed(0))
    tokens[0] = 2015
    lengths = torch.tensor([20, 13])
    stock, mine = (model.vector_quantizer for model in (stock_model(nemo_file), MODELS[kind](nemo_file)))
    for target in (GroupFiniteScalarQuantizer, nemo_lfr.modules.quantizer.GroupFiniteScalarQuantizer):
        converters = [
            VectorQuantizerIndexConverter(stock, GroupFiniteScalarQuantizer(**levels)),
            VectorQuantizerIndexConverter(mine, target(**levels)),
        ]
        there = [each.convert_original_to_new(audio_tokens=tokens, audio_lens=lengths) for each in converters]
        assert torch.equal(*there)
        back = [each.convert_new_to_original(audio_tokens=there[0], audio_lens=lengths) for each in converters]
        assert torch.equal(*back)
        assert torch.equal(back[0][0], tokens[0].int()) and torch.equal(back[0][1, :, :13], tokens[1, :, :13].int())


def test_codes_of_another_dimension_are_named(nemo_file):
    quantizer = ours(nemo_file).vector_quantizer
    with pytest.raises(TokensError, match=r"the values have shape \[1, 31, 5\]; this quantizer takes \[B, 32, T\]"):
        quantizer.codes_to_indices(codes=torch.zeros(1, 31, 5), input_len=torch.tensor([5]))


@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_dequantize_takes_tokens_outside_the_codebook_modulo_its_size_as_stock_does(nemo_file, kind):
    stock, model = stock_model(nemo_file), MODELS[kind](nemo_file)
    lengths = torch.tensor([7])
    for dtype in (torch.int64, torch.int16, torch.uint8, torch.float32):
        tokens = torch.tensor([2016, 2017, 30_000, -1, -2016, 2015, 5]).to(dtype).expand(1, 8, 7)
        expected = stock.dequantize(tokens=tokens, tokens_len=lengths)
        assert torch.equal(model.dequantize(tokens=tokens, tokens_len=lengths), expected), dtype
        if dtype is not torch.uint8:
            with pytest.raises(TokensError, match=r"token 2016(\.0)? is outside \[0, 2016\); pass tokens"):
                model.vector_quantizer.decode(tokens.transpose(0, 1), lengths)


@pytest.mark.parametrize("levels", [[8, 7, 6, 6], [2, 3], [5, 5, 5, 5, 5, 5], [36, 37]])
def test_the_steps_of_fsq_equal_stocks(levels):
    from nemo.collections.tts.modules.audio_codec_modules import FiniteScalarQuantizer as StockFSQ

    from nemo_lfr.modules.quantizer import FiniteScalarQuantizer

    stock, mine = StockFSQ(levels), FiniteScalarQuantizer(levels)
    inputs = torch.randn(2, len(levels), 50, generator=torch.Generator().manual_seed(1)) * 2
    lengths = torch.tensor([50, 50])
    codes = stock.inputs_to_codes(inputs=inputs, input_len=lengths)
    assert torch.equal(mine.inputs_to_codes(inputs=inputs, input_len=lengths), codes)
    assert torch.equal(mine.compress(inputs=inputs, input_len=lengths), stock.compress(inputs, lengths))
    assert torch.equal(mine.round(inputs=inputs, input_len=lengths), stock.round(inputs, lengths))
    digits = stock.codes_to_nonnegative(codes)
    assert torch.equal(mine.codes_to_nonnegative(codes), digits)
    assert torch.equal(mine.nonnegative_to_codes(digits), stock.nonnegative_to_codes(digits))
    assert torch.equal(mine.codebook, stock.codebook)
    tokens = mine.codes_to_indices(codes)
    assert torch.equal(tokens, mine.encode(inputs)[0])
    # Stock NeMo truncates instead of rounding, so its index may be one off for levels that are not a power of 2.
    if max(levels) <= 8:
        assert torch.equal(tokens, stock.codes_to_indices(codes))


# NeuralModule's methods

SECTIONS = ["audio_encoder", "audio_decoder", "vector_quantizer", "vector_quantizer.fsqs.0"]


@pytest.mark.parametrize("section", SECTIONS)
def test_freezing_follows_nemos_rules(nemo_file, section):
    def states(model):
        module = model.get_submodule(section)
        seen = []

        def look():
            gradients = tuple(parameter.requires_grad for parameter in module.parameters())
            seen.append((module.training, module.num_weights, gradients))

        for parameter in list(module.parameters())[::2]:
            parameter.requires_grad_(False)
        look()
        with module.as_frozen():
            look()
        look()
        module.freeze()
        module.freeze()
        look()
        module.unfreeze(partial=True)
        look()
        with pytest.raises(ValueError, match="freez"):
            module.unfreeze(partial=True)
        module.unfreeze()
        look()
        return seen

    assert states(ours(nemo_file)) == states(stock_model(nemo_file))


@functools.cache
def random_models(kind):
    """Return our model and a stock model, which tests must not change."""
    return AudioCodecModel(OmegaConf.create(small_config(kind))), StockModel(OmegaConf.create(small_config(kind)))


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("kind", ["symmetric", "causal", "nano"])
def test_modules_have_nemos_types(section, kind):
    mine, stock = (model.get_submodule(section) for model in random_models(kind))
    for direction in ("input_types", "output_types"):
        assert str(getattr(mine, direction)) == str(getattr(stock, direction))


# Why our modules lack these names of every NeuralModule. `LFRCodecModel` has them.
FILES = dict.fromkeys(("save_to", "restore_from"), "NeMo raises NotImplementedError: only models are files")
CONFIGS = dict.fromkeys(
    ("from_config_dict", "from_config_file", "to_config_dict", "to_config_file"),
    "modules are built from plain arguments; the model keeps their config",
)
LACKING = FILES | CONFIGS


@pytest.mark.parametrize("section", ["", *SECTIONS])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in ("symmetric", "causal", "nano")])
def test_every_public_name_of_stock_is_there_or_its_absence_has_a_reason(section, kind):
    mine, stock = (model.get_submodule(section) for model in random_models(kind))
    lacking = {name for name in dir(stock) if not name.startswith("_")} - set(dir(mine))
    assert lacking == (set(LACKING) if section else set())
    for name in set(dir(stock)) - lacking:
        method = getattr(type(stock), name, None)
        if inspect.isfunction(inspect.unwrap(method)) and not name.startswith("_") and hasattr(type(mine), name):
            arguments = inspect.signature(getattr(mine, name)).parameters
            if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
                named = {
                    key
                    for key, value in inspect.signature(getattr(stock, name)).parameters.items()
                    if value.kind not in (value.VAR_KEYWORD, value.VAR_POSITIONAL)
                }
                assert named <= set(arguments), f"{name} takes other keywords"


# The loading code of NeMo's models, taken from the installed NeMo


def lines_between(function, first, last):
    """Return the source of a function from one line to another, both included, as a dedented block."""
    source = inspect.getsource(function)
    begin = source.rindex("\n", 0, source.index(first)) + 1
    end = source.index("\n", source.index(last, begin))
    return textwrap.dedent(source[begin:end])


@pytest.mark.parametrize("caller", ["Magpie", "EasyMagpie"])
@pytest.mark.parametrize("new_quantizer", [None, {"num_groups": 4, "num_levels_per_group": [8, 7, 6, 6, 8, 7, 6, 6]}])
def test_magpies_loading_code_runs_on_our_model(nemo_file, expected, caller, new_quantizer):
    from nemo.collections.tts.models import easy_magpietts_inference, magpietts
    from nemo.collections.tts.modules.magpietts_modules import CodecHelper

    module, model_class = {
        "Magpie": (magpietts, magpietts.MagpieTTSModel),
        "EasyMagpie": (easy_magpietts_inference, easy_magpietts_inference.EasyMagpieTTSInferenceModel),
    }[caller]
    if new_quantizer:
        new_quantizer = {"_target_": MODULES + "GroupFiniteScalarQuantizer"} | new_quantizer
    config = OmegaConf.create({"codecmodel_path": str(nemo_file), "vector_quantizer": new_quantizer})
    me = SimpleNamespace()
    names = vars(module) | {"AudioCodecModel": AudioCodecModel, "cfg": config, "self": me}
    code = lines_between(model_class.__init__, "codec_model_path = cfg.get", "codec_converter = None")
    exec(code, names)
    assert (me.sample_rate, me.output_sample_rate) == (22050, 22050)
    assert (names["num_audio_codebooks"], names["data_num_audio_codebooks"]) == (4 if new_quantizer else 8, 8)
    codec, converter = names["codec_model"], names["codec_converter"]
    assert type(codec.audio_encoder) is HiFiGANEncoder
    codec.freeze()
    helper = CodecHelper(codec, converter)
    codes, codes_len = helper.audio_to_codes(AUDIO, LENGTHS)
    assert torch.equal(codes, expected)
    resampled, _ = helper.audio_to_codes(AUDIO, LENGTHS, sample_rate=44100)
    assert resampled.shape[2] == 5
    if converter is not None:
        codes = converter.convert_original_to_new(audio_tokens=codes, audio_lens=codes_len)
    audio, audio_len, decoded = helper.codes_to_audio(codes, codes_len)
    assert torch.equal(decoded, expected)
    assert audio_len.tolist() == [9 * 1024] * 2 and audio.shape == (2, 9 * 1024)


@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_speechlm2_sets_up_its_codec(nemo_file, expected, monkeypatch, kind):
    pretrained = pytest.importorskip("nemo.collections.speechlm2.parts.pretrained")
    if kind == "ours":
        monkeypatch.setattr(pretrained, "AudioCodecModel", AudioCodecModel)
    model = torch.nn.Module()
    model.cfg = OmegaConf.create({"pretrained_audio_codec": str(nemo_file)})
    pretrained.setup_audio_codec(model)
    if kind == "accelerated":
        accelerate(model.audio_codec)
    codec = model.audio_codec
    pretrained.setup_audio_codec(model)
    assert model.audio_codec is codec, "it is set up already"
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    quantizer = codec.vector_quantizer
    assert (quantizer.codebook_size, quantizer.num_groups, quantizer.codebook_dim_per_group) == (2016, 8, 4)
    assert torch.equal(tokens_of(codec), expected)
