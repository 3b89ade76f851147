"""Check that `config.json` and the safetensors files in a folder belong together."""

import json

from omegaconf import DictConfig

from nemo_lfr.checkpoint.config import codec_values
from nemo_lfr.checkpoint.safetensors import WEIGHTS_CHECKSUM
from nemo_lfr.checkpoint.tensors import Tensors
from nemo_lfr.errors import CheckpointError, ConfigError, quoted
from nemo_lfr.io.locate import SAFETENSORS, SAFETENSORS_CONFIG


def check_pair(tensors: Tensors, config: DictConfig) -> None:
    """Check that the weights in a safetensors file belong to a config.

    The file may store a copy of the config, and the config may store a checksum of the weights. A missing copy or
    checksum is not an error.

    Raises:
        CheckpointError: if the copy differs from `config`, or the checksum differs from that of the weights.
    """
    _check_stored_config(tensors, config)
    expected, checksum = config.get(WEIGHTS_CHECKSUM), tensors.checksum()
    if isinstance(expected, DictConfig):
        expected = dict(expected)
    if expected is None or checksum in (None, expected):
        return
    name = SAFETENSORS
    if isinstance(checksum, dict):
        recorded = expected if isinstance(expected, dict) else dict.fromkeys(checksum, expected)
        name = next(shard for shard in sorted({*recorded, *checksum}) if recorded.get(shard) != checksum.get(shard))
        expected, checksum = recorded.get(name), checksum.get(name)
    raise CheckpointError(
        f"{tensors.path}: {SAFETENSORS_CONFIG} and {name} do not belong together: {WEIGHTS_CHECKSUM} is "
        f"{quoted(expected)}, but the weights have the SHA-256 {quoted(checksum)}; export or copy the folder "
        f"again. If you changed the weights on purpose, remove {WEIGHTS_CHECKSUM} from {SAFETENSORS_CONFIG}."
    )


def _check_stored_config(tensors: Tensors, config: DictConfig) -> None:
    if tensors.codec_config is None:
        return
    try:
        values = codec_values(config)
    except ConfigError:  # reported with the name of the file when modules are built from this config
        return
    for key, expected in tensors.codec_config.items():
        if json.dumps(values.get(key), sort_keys=True) != json.dumps(expected, sort_keys=True):
            raise CheckpointError(
                f"{tensors.path}: {SAFETENSORS_CONFIG} and {SAFETENSORS} do not belong together: {key} is "
                f"{quoted(values.get(key), 150)}, but the weights were written for {quoted(expected, 150)}; export "
                "or copy the folder again."
            )
