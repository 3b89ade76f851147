"""Tests of NeMo's OmegaConf resolvers in the values of a codec: the result does not depend on what is imported."""

import json

import pytest
from omegaconf import OmegaConf

import nemo_lfr
from nemo_lfr.checkpoint import split_weight_norm, write_checkpoint
from nemo_lfr.checkpoint.config import codec_values, parse_config
from nemo_lfr.errors import ConfigError
from tests.models import build_codec, codec_config, random_parts

# (value of `sample_rate`, other keys of the config, expected value)
ARITHMETIC = {
    "product": ("${multiply:22,1000}", {}, 22000),
    "sum": ("${sum:22000,50}", {}, 22050),
    "spaces": ("${multiply: 22 , 1000 }", {}, 22000),
    "float": ("${multiply:0.5,44100}", {}, 22050.0),
    "of a key": ("${multiply:${kilo},1000}", {"kilo": 22}, 22000),
    "of two keys": ("${sum:${a},${b.c}}", {"a": 22000, "b": {"c": 50}}, 22050),
    "of a product": ("${sum:${multiply:22,1000},50}", {}, 22050),
    "through another key": ("${rate}", {"rate": "${multiply:22,1000}"}, 22000),
    "negative": ("${sum:22100,-50}", {}, 22050),
}


def parsed(value, others):
    return parse_config(json.dumps(codec_config("nano") | {"sample_rate": value} | others))


NEMO = {"multiply": lambda x, y: x * y, "sum": lambda x, y: x + y}
REGISTERED = {"nothing": {}, "NeMo's": NEMO, "another program's": dict.fromkeys(NEMO, lambda *_: 16000)}


def register(functions):
    for name in NEMO:
        OmegaConf.clear_resolver(name)
    for name, function in functions.items():
        OmegaConf.register_new_resolver(name, function)


@pytest.fixture(params=REGISTERED)
def registered(request):
    """The resolvers that a process may have registered: none, NeMo's, or other functions with these names."""
    before = {name: function for name, function in NEMO.items() if OmegaConf.has_resolver(name)}
    register(REGISTERED[request.param])
    yield
    register(before)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_products_and_sums_do_not_depend_on_what_is_imported(registered, name):
    value, others, expected = ARITHMETIC[name]
    found = codec_values(parsed(value, others))["sample_rate"]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value",
    [
        "${multiply:a,9}",
        "${multiply:2}",
        "${multiply:1,2,3}",
        "${sum:a,b}",
        "${sum:[1],[2]}",
        "${multiply:9e99,9e99}",
        "${multiply:1e308,1e308}",
        "${sum:nan,1}",
        "${multiply:true,2}",
        "${multiply:${no},2}",
        "${gpu_name:}",
    ],
)
def test_other_values_are_refused_whatever_is_imported(registered, value):
    with pytest.raises(ConfigError, match="sample_rate cannot be resolved"):
        codec_values(parsed(value, {}))


@pytest.mark.slow
def test_a_checkpoint_with_a_product_is_loaded(tmp_path):
    values = codec_config("nano")
    rates = values["audio_encoder"]["down_sample_rates"]
    values["audio_encoder"] |= {"down_sample_rates": [f"${{multiply:{rate},1}}" for rate in rates]}
    modules = random_parts(codec_config("nano")).named()
    state = {
        f"{name}.{key}": value for name, part in modules.items() for key, value in split_weight_norm(part).items()
    }
    write_checkpoint(tmp_path / "product.nemo", values, state)
    assert nemo_lfr.load(tmp_path / "product.nemo", "cpu").fingerprint == build_codec("nano").fingerprint


def test_a_config_of_the_user_may_refer_to_its_parent():
    outer = OmegaConf.create({"kilo": 22, "model": codec_config("nano") | {"sample_rate": "${multiply:${kilo},1000}"}})
    assert codec_values(outer.model)["sample_rate"] == 22000
