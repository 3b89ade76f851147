"""Write a codec as a folder that `nemo_lfr.load` and Hugging Face's `from_pretrained` read.

| file | content |
| --- | --- |
| `config.json` | the model config, with the keys that select `nemo_lfr.transformers`, and the SHA-256 of the weights |
| `model.safetensors` | tensors with NeMo's names, including weight norm |
| `preprocessor_config.json` | settings of `AutoFeatureExtractor` |

The exported codec produces the same tokens as the original and has the same fingerprint. Discriminators and other
tensors that inference does not use are not exported.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from nemo_lfr.checkpoint.archive import read_index
from nemo_lfr.checkpoint.config import CONFIG_KEYS, build_parts, codec_values, parse_config
from nemo_lfr.checkpoint.reader import Checkpoint
from nemo_lfr.checkpoint.safetensors import CONFIG, WEIGHTS_CHECKSUM, open_files, write_tensors
from nemo_lfr.checkpoint.writer import split_weight_norm
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import check_overwrite, make_folder, sweep, write_bytes
from nemo_lfr.io.locate import PREPROCESSOR, SAFETENSORS, SAFETENSORS_CONFIG, SAFETENSORS_INDEX, expand_home
from nemo_lfr.modules.empty import on_meta_device

MODEL_TYPE = "nemo_lfr"


def export_safetensors(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], *, overwrite: bool = False
) -> list[Path]:
    """Export the codec of a checkpoint to a folder.

    The folder then contains config.json, model.safetensors and preprocessor_config.json.

    Args:
        source: local path of a checkpoint.
        folder: output folder, created if it does not exist.
        overwrite: whether to replace existing files.

    Returns:
        Paths of the three files that were written.

    Raises:
        CheckpointError: if `source` is missing, is damaged or does not match its own config.
        NemoLfrError: if a file exists and `overwrite` is not set.
    """
    checkpoint = Checkpoint(source)
    for name in checkpoint.parts.named():
        checkpoint.load_module(name)  # validates all values
    config: Any = OmegaConf.to_container(checkpoint.config, resolve=False)
    return write_folder(folder, config, dict(checkpoint.iter_stored()), overwrite=overwrite)


def module_tensors(config: Mapping[str, Any], modules: Mapping[str, nn.Module], name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a codec's modules under the names that NeMo uses.

    Args:
        config: model config of the modules.
        modules: encoder, quantizer and decoder by name, such as "audio_encoder".
        name: name of the codec, for messages.

    Raises:
        NemoLfrError: if the names of the weights differ from those of the modules that `config` describes, for
            instance because adapters were added to `modules`.
    """
    tensors = {
        f"{part}.{key}": value for part, module in modules.items() for key, value in split_weight_norm(module).items()
    }
    with on_meta_device():
        parts = build_parts(codec_values(parse_config(json.dumps(config))), weight_norm=True)
    expected = {f"{part}.{key}" for part, module in parts.named().items() for key in module.state_dict()}
    if different := sorted(expected.symmetric_difference(tensors)):
        raise NemoLfrError(
            f"{name}: the codec's weights do not match its config; {len(different)} names are only in the weights or "
            f"only in the config, for example {different[0]}. Merge or remove added modules, such as adapters."
        )
    return tensors


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write a model config and the tensors of a codec to a folder.

    Args:
        folder: output folder, created if it does not exist.
        config: model config.
        tensors: tensors under the names that NeMo uses, such as those from `module_tensors`.
        overwrite: whether to replace existing files.

    Returns:
        Paths of config.json, model.safetensors and preprocessor_config.json.

    Raises:
        ConfigError: if `config` is invalid.
        NemoLfrError: if a file exists and `overwrite` is not set.
    """
    folder = expand_home(folder)
    paths = [folder / name for name in (SAFETENSORS_CONFIG, SAFETENSORS, PREPROCESSOR)]
    for path in paths:
        check_overwrite(path, overwrite)
    make_folder(folder)
    sweep(folder, [path.name for path in paths])
    values = codec_values(parse_config(json.dumps(config)))
    # The weights file contains the config too, so that a mix of old and new files is detected after an interruption.
    stored = {CONFIG: json.dumps({key: values[key] for key in CONFIG_KEYS if key in values})}
    checksum = write_tensors(paths[1], tensors, stored, overwrite)
    write_bytes(paths[2], _json(_preprocessor(values)), overwrite)
    kind = {"model_type": MODEL_TYPE, "architectures": ["NemoLfrModel"]}
    write_bytes(paths[0], _json(kind | dict(config) | {WEIGHTS_CHECKSUM: checksum}), overwrite)
    return paths


def record_checksum(folder: Path) -> None:
    """Add the SHA-256 of the weights to `config.json`, in a folder that transformers wrote.

    If the weights are in several files, the value is a dict with the SHA-256 of each file.
    """
    single = folder / SAFETENSORS
    if single.exists():
        files = [single]
    else:
        files = [folder / name for name in sorted(set(read_index(folder / SAFETENSORS_INDEX).values()))]
    values = json.loads((folder / SAFETENSORS_CONFIG).read_text(encoding="utf-8"))
    write_bytes(folder / SAFETENSORS_CONFIG, _json(values | {WEIGHTS_CHECKSUM: open_files(files).checksum()}))


def move_files(source: Path, target: Path, stem: str) -> None:
    """Move all files of a save to another folder, which may contain an earlier save.

    Weights files that only the earlier save has are removed, because transformers might load them.

    Args:
        source: folder with the new files.
        target: folder to move the files to.
        stem: beginning of the name of each weights file.
    """
    names = sorted((path.name for path in source.iterdir()), reverse=True)  # "config.json" after the weights
    for name in names:
        os.replace(source / name, target / name)
    weights = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for path in target.iterdir():
        if weights.fullmatch(path.name) and path.name not in names:
            path.unlink()


def _preprocessor(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `nemo_lfr.transformers.NemoLfrFeatureExtractor`."""
    return {
        "feature_extractor_type": "NemoLfrFeatureExtractor",
        "feature_size": 1,
        "hop_length": values["samples_per_frame"],
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": values["sample_rate"],
    }


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
