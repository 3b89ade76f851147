"""Tests of configs with long interpolations, in all places where this package reads a config from a file."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import grammar_parser
from safetensors.torch import save_file
from transformers import AutoConfig

import nemo_lfr.transformers  # noqa: F401  (registers the classes)
from nemo_lfr import AudioCodecModel
from nemo_lfr.checkpoint import read_config
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.nemo.config import override_config
from recipes.bundled_codec.settings import read_settings
from tests.checkpoint.test_checkpoint import STATE, config, lightning, with_config

# Values that OmegaConf would parse for minutes
LONG_INTERPOLATIONS: dict[str, Any] = {
    "40,000 spaces": "${" + " " * 40_000,
    "20,000 beginnings": "${" * 20_000,
    "20,000 commas": "${multiply:" + "," * 20_000 + "}",
    "600 characters": "${b" + " " * 600 + "}",
    "6,000 items": ["${sample_rate}"] * 6000,
    "6,000 keys": {f"k{number}": "${sample_rate}" for number in range(6000)},
}


READERS: dict[str, Callable[[Path, bytes], Any]] = {
    ".nemo": lambda path, text: read_config(written(path / "a.nemo", with_config(text))),
    ".ckpt": lambda path, text: read_config(
        written(path / "a.ckpt", lightning(None, hyper_parameters=json.loads(text)))
    ),
    "config.json": lambda path, text: read_config(
        written(path / "config.json", text, beside="model.safetensors").parent
    ),
    "transformers": lambda path, text: AutoConfig.from_pretrained(
        written(path / "config.json", json.dumps(json.loads(text) | {"model_type": "nemo_lfr"}).encode()).parent
    ),
    "override_config_path": lambda path, text: override_config(written(path / "a.yaml", text)),
    "override_config_path, open file": lambda path, text: override_config(io.BytesIO(text)),
    "hparams_file": lambda path, text: AudioCodecModel.load_from_checkpoint(
        path / "a.ckpt", hparams_file=written(path / "hparams.yaml", text)
    ),
    "settings of a recipe": lambda path, text: read_settings(written(path / "settings.yaml", text)),
}


def written(path: Path, contents: bytes, beside: str | None = None) -> Path:
    path.write_bytes(contents)
    if beside:
        save_file(STATE, path.with_name(beside))
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("value", LONG_INTERPOLATIONS)
def test_omegaconf_never_sees_long_interpolations(reader, value, tmp_path, monkeypatch):
    """OmegaConf takes minutes for them, so this test counts the characters that its parser gets."""
    seen = []
    stream = grammar_parser.InputStream
    monkeypatch.setattr(grammar_parser, "InputStream", lambda text: seen.append(len(text)) or stream(text[:1000]))
    text = json.dumps(config() | {"z": LONG_INTERPOLATIONS[value]}).encode()  # JSON is YAML
    with pytest.raises(NemoLfrError, match=r"with '\$\{' is too long, or there are too many"):
        READERS[reader](tmp_path, text)
    assert sum(seen) < 50_000
