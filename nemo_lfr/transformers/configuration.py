"""Config of the codec for `transformers`: the keys of a NeMo model config that describe the modules."""

import json
import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from nemo_lfr.checkpoint.config import NEMO_CLASSES, PARTS, codec_values, parse_config
from nemo_lfr.checkpoint.folder import MODEL_TYPE
from nemo_lfr.errors import ConfigError, shorten

_MODULES = next(iter(NEMO_CLASSES)).rpartition(".")[0] + "."


@strict
class NemoLfrConfig(PreTrainedConfig):
    """Config of a `NemoLfrModel`; the defaults describe NVIDIA's released codec.

    Args:
        sample_rate: sample rate of the audio, Hz.
        samples_per_frame: number of samples per frame.
        audio_encoder: class and arguments of the encoder, as in a NeMo model config.
        vector_quantizer: class and arguments of the quantizer, as in a NeMo model config.
        audio_decoder: class and arguments of the decoder, as in a NeMo model config.
    """

    model_type = MODEL_TYPE

    sample_rate: int = 22050
    samples_per_frame: int = 1024
    audio_encoder: dict[str, Any] | None = None
    vector_quantizer: dict[str, Any] | None = None
    audio_decoder: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Use the released codec's config section for each module whose section was not passed.

        Raises:
            ConfigError: if `kwargs` sets a property that is computed from other values, such as `sampling_rate`.
        """
        for name, default in _released().items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        _check_keys(kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a config from the content of `config.json`.

        Keys that do not describe the modules, such as losses and data, are left out. Interpolations are resolved.

        Raises:
            ConfigError: if the values are not a valid config, or if `kwargs` sets a property that is computed from
                other values, such as `sampling_rate`.
        """
        _check_keys(kwargs)
        known = set(PreTrainedConfig().to_dict()) | {"architectures", "model_type", "dtype"}
        values = {key: value for key, value in config_dict.items() if key in known}
        config = codec_values(parse_config(json.dumps(config_dict)))
        config.pop("output_sample_rate", None)
        return super().from_dict(values | config, **kwargs)

    @property
    def sampling_rate(self) -> int:
        """Sample rate of the audio, Hz."""
        return self.sample_rate

    @property
    def hop_length(self) -> int:
        """Number of samples per frame."""
        return self.samples_per_frame

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks, which is also the number of tokens in one frame."""
        return int((self.vector_quantizer or {}).get("num_groups", 1))

    @property
    def codebook_size(self) -> int:
        """Number of entries in one codebook."""
        quantizer = self.vector_quantizer or {}
        levels = quantizer.get("num_levels_per_group") or quantizer.get("num_levels") or []
        return math.prod(levels)


def _check_keys(changes: Mapping[str, Any]) -> None:
    """Raise ConfigError if a key in `changes` names a property. Properties are computed from other keys."""
    for key, value in changes.items():
        if isinstance(getattr(NemoLfrConfig, key, None), property) and key in vars(NemoLfrConfig):
            resample = " To use audio at another rate, resample it." if key == "sampling_rate" else ""
            raise ConfigError(
                f"{key}={shorten(repr(value))}: the checkpoint determines this value, so it cannot be set; remove the "
                f"argument.{resample}"
            )


def _released() -> dict[str, dict[str, Any]]:
    """Return the config sections of NVIDIA's released codec, which has 112.7 M parameters."""
    strides = [2, 2, 4, 8, 8]
    encoder = {
        "_target_": _MODULES + "HiFiGANEncoder",
        "down_sample_rates": strides,
        "encoded_dim": 32,
        "base_channels": 48,
        "activation": "lrelu",
    }
    quantizer = {
        "_target_": _MODULES + "GroupFiniteScalarQuantizer",
        "num_groups": 8,
        "num_levels_per_group": [8, 7, 6, 6],
    }
    decoder = {
        "_target_": _MODULES + "HiFiGANDecoder",
        "up_sample_rates": strides[::-1],
        "input_dim": 32,
        "base_channels": 1024,
        "activation": "lrelu",
        "output_activation": "tanh",
    }
    return dict(zip(PARTS, (encoder, quantizer, decoder), strict=True))
