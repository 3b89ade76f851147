"""Check the configs of the NeMo model."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_lfr.checkpoint import codec_values
from nemo_lfr.errors import ConfigError
from nemo_lfr.nemo.base import common
from nemo_lfr.training import discriminators, losses
from nemo_lfr.training.components import import_components

# NeMo only builds a class that `_target_` names if its import path starts with a prefix in this list. Add the prefix
# of this package.
if "nemo_lfr." not in common.ALLOWED_TARGET_PREFIXES:
    common.ALLOWED_TARGET_PREFIXES.append("nemo_lfr.")

IDENTITY = {"_target_": "torch.nn.Identity"}
BUILT_IN = {*discriminators.BUILT_IN, *losses.BUILT_IN}
ANY_LOSS = {"_target_": next(iter(losses.GENERATOR_LOSSES))}
SMALLEST_QUANTIZER = {
    "_target_": "nemo.collections.tts.modules.audio_codec_modules.FiniteScalarQuantizer",
    "num_levels": [2],
}


def checked_values(cfg: DictConfig) -> dict[str, Any]:
    """Return the config values that determine the codec; see `codec_values`.

    Raises:
        ConfigError: if the config enables a loss that would open a file or access the network, if a value cannot be
            resolved, or if a key belongs to another codec family.
    """
    for key in ("use_scl_loss", "use_slm_loss"):
        if cfg.get(key):
            raise ConfigError(f"{key} is set; nemo_lfr does not train codecs with it. Use NeMo's own AudioCodecModel.")
    return codec_values(cfg)


def check_codebook_dropout(rate: Any, num_codebooks: int) -> None:
    """Validate the config's `codebook_dropout_rate`.

    Raises:
        ConfigError: if the rate is not a probability, or the codec has only one codebook.
    """
    if not rate:
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ConfigError(f"codebook_dropout_rate is {rate!r}; use a probability from 0 to 1.")
    if num_codebooks < 2:
        raise ConfigError(f"codebook_dropout_rate is {rate}, but the codec has one codebook; remove the key.")


def target_of(section: Any) -> str | None:
    """Return the `_target_` of a config section; None if the section has no such key."""
    return section.get("_target_") if isinstance(section, Mapping | DictConfig) else None


def override_config(source: Any) -> DictConfig:
    """Load and resolve a config that replaces the config of a checkpoint.

    Args:
        source: path of a YAML file, or a config. If the config has a `model` section, only that section
            is used.

    Raises:
        ConfigError: if the config is not a mapping, or names a component that cannot be imported.
    """
    config = source if OmegaConf.is_config(source) else OmegaConf.load(source)
    if isinstance(config, DictConfig):
        import_components(config.get("model") or config, built_in=BUILT_IN)
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    if not isinstance(config, DictConfig):
        raise ConfigError("the config is a list; pass a mapping from names to values.")
    return config.model if "model" in config else config
