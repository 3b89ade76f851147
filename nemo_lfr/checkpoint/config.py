"""Parse model configs, and build codec modules from an allow-list of classes."""

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from nemo_lfr.checkpoint.interpolations import Expansion, check_interpolations, strings
from nemo_lfr.checkpoint.resolvers import NEMO_RESOLVERS, with_own_resolvers
from nemo_lfr.errors import ConfigError, quoted, shorten
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.empty import on_meta_device
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer

PARTS = ("audio_encoder", "vector_quantizer", "audio_decoder")
CONFIG_KEYS = ("sample_rate", "samples_per_frame", *PARTS)  # values on which tokens and audio depend
NEMO_MODEL = "nemo.collections.tts.models.audio_codec.AudioCodecModel"
_NEMO_MODULES = "nemo.collections.tts.modules.audio_codec_modules."

# For each class of NeMo: our class, the arguments that NeMo's class implies, and those of NeMo's defaults that differ
# from ours.
NEMO_CLASSES: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any]]] = {
    _NEMO_MODULES + "HiFiGANEncoder": (HiFiGANEncoder, {}, {}),
    _NEMO_MODULES + "CausalHiFiGANEncoder": (HiFiGANEncoder, {"causal": True}, {"pad_mode": "zeros"}),
    _NEMO_MODULES + "HiFiGANDecoder": (HiFiGANDecoder, {}, {}),
    _NEMO_MODULES + "CausalHiFiGANDecoder": (
        HiFiGANDecoder,
        {"causal": True},
        {"pad_mode": "zeros", "n_groups_equal_to_out_channels": True},
    ),
    _NEMO_MODULES + "FiniteScalarQuantizer": (FiniteScalarQuantizer, {}, {}),
    _NEMO_MODULES + "GroupFiniteScalarQuantizer": (GroupFiniteScalarQuantizer, {}, {}),
}
_OUR_CLASSES = {f"{ours.__module__}.{ours.__name__}": ours for ours, _, _ in NEMO_CLASSES.values()}
# Older versions of this package wrote `nemo_lfr.codec` instead of `nemo_lfr.modules` into configs and checkpoints.
_OUR_CLASSES |= {name.replace(".modules.", ".codec."): ours for name, ours in _OUR_CLASSES.items()}


# Limits against malicious configs. NVIDIA's released codec has 112.7 M parameters, and lists of at most 5 items.
MAX_CONFIG_EVENTS = 20_000  # events of the YAML parser: a scalar, or the start or end of a list or mapping
MAX_CONFIG_DEPTH = 32
MAX_SIZE = 16384
MAX_LIST = 32
MAX_GROUPS = 256
MAX_PARAMETERS = 2_000_000_000

# Keys that Hydra, with which NeMo builds modules, does not pass to the constructor. The codec does not depend on them.
_HYDRA_KEYS = ("_target_", "_convert_", "_recursive_")
_OTHER_FAMILIES = ("semantic_codec", "semantic_codec_path")

# OmegaConf flag of configs that came from a checkpoint. Training checkpoints contain this name, so keep it.
_FROM_CHECKPOINT = "nemo_lfr_from_file"


@dataclass
class CodecModules:
    """Encoder, quantizer and decoder of a codec, and its sample rate in Hz."""

    encoder: HiFiGANEncoder
    quantizer: FiniteScalarQuantizer | GroupFiniteScalarQuantizer
    decoder: HiFiGANDecoder
    sample_rate: int

    def named(self) -> dict[str, nn.Module]:
        """Return the modules by their names in a checkpoint."""
        return dict(zip(PARTS, (self.encoder, self.quantizer, self.decoder), strict=True))


def parse_config(text: str) -> DictConfig:
    """Parse a model config from YAML, without resolving interpolations.

    Raises:
        ConfigError: if the text is not a YAML mapping, is too large or too deeply nested, or contains YAML aliases or
            an interpolation that is not allowed.
    """
    try:
        _check_yaml(text)
        check_interpolations(text)
        config = OmegaConf.create(text)
        if not isinstance(config, DictConfig):
            raise ConfigError("the config is a list, not a mapping.")
        plain = OmegaConf.to_container(config, resolve=False)
        for value in strings(plain):
            if "${" in value and ":" in NEMO_RESOLVERS.sub("", value):
                raise ConfigError(
                    f"{shorten(value)!r} uses an OmegaConf resolver other than multiply, sum and gpu_name; write the "
                    "value instead."
                )
        expansion = Expansion(plain)
        for key in config:
            expansion.check(str(key))
        mark_from_checkpoint(config)
        return config
    except ConfigError:
        raise
    except Exception as error:  # OmegaConf raises AssertionError; PyYAML may raise any exception
        reason = " ".join(str(error).split())[:200] or "it is not a mapping"
        raise ConfigError(f"the config cannot be parsed: {reason}") from error


def mark_from_checkpoint(config: Any) -> None:
    """Mark a config and its sections as coming from a checkpoint. OmegaConf copies the mark with the config."""
    if isinstance(config, DictConfig | ListConfig):
        config._set_flag(_FROM_CHECKPOINT, True)
        for node in _nodes(config):
            mark_from_checkpoint(node)


def is_from_checkpoint(config: Any) -> bool:
    """Return whether a config, or any section in it, came from a checkpoint rather than from the user."""
    if not isinstance(config, DictConfig | ListConfig):
        return False
    return bool(config._get_flag(_FROM_CHECKPOINT)) or any(is_from_checkpoint(node) for node in _nodes(config))


def sections_from_checkpoint(config: Any) -> list[str]:
    """Return the keys of those sections of a model config that came from a checkpoint rather than from the user."""
    if not isinstance(config, DictConfig):
        return []
    found = []
    for key in config:
        with contextlib.suppress(OmegaConfBaseException):  # an interpolation that cannot be resolved
            if is_from_checkpoint(config.get(key)):
                found.append(str(key))
    return found


def _nodes(config: DictConfig | ListConfig) -> list[Any]:
    """Return the child nodes of a config without resolving interpolations."""
    if config._is_none() or config._is_missing() or config._is_interpolation():
        return []
    if isinstance(config, ListConfig):
        return [config._get_node(index) for index in range(len(config))]
    return [config._get_node(key) for key in config]


def _check_yaml(text: str) -> None:
    """Raise ConfigError if YAML text has aliases, or is too long or too deeply nested to be parsed safely."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError("the config uses YAML aliases, which are not allowed; repeat the values instead.")
        if count > MAX_CONFIG_EVENTS or depth > MAX_CONFIG_DEPTH:
            raise ConfigError(
                f"the config is too large or too deeply nested; at most {MAX_CONFIG_EVENTS} YAML events and "
                f"{MAX_CONFIG_DEPTH} levels are allowed."
            )


def codec_values(config: DictConfig) -> dict[str, Any]:
    """Return the config values that determine encoding and decoding, as plain Python values by key.

    Raises:
        ConfigError: if a value cannot be resolved, or the config uses a semantic codec, which is not supported.
    """
    config = with_own_resolvers(config)
    values: dict[str, Any] = {}
    for key in (*_OTHER_FAMILIES, "sample_rate", "output_sample_rate", "samples_per_frame", *PARTS):
        try:
            if key in config:
                item = config[key]
                values[key] = OmegaConf.to_container(item, resolve=True) if OmegaConf.is_config(item) else item
        except (OmegaConfBaseException, RecursionError) as error:
            raise ConfigError(f"{key} cannot be resolved: {' '.join(str(error).split())[:200]}") from error
    for key in _OTHER_FAMILIES:
        if values.pop(key, None):
            raise ConfigError(
                f"{key} is set, but nemo_lfr does not support semantic codecs; use NeMo's own AudioCodecModel."
            )
    return values


def our_target(target: str) -> tuple[type[nn.Module], dict[str, Any], dict[str, Any]]:
    """Return the class and the default arguments that a config's `_target_` selects.

    Returns:
        The class of this package, the arguments that NeMo's class implies, such as `{"causal": True}`, and those
        default arguments of NeMo's class that differ from the defaults of this package.

    Raises:
        ConfigError: if `target` is not the name of a class of the LFR codec family.
    """
    if target in NEMO_CLASSES:
        return NEMO_CLASSES[target]
    if target in _OUR_CLASSES:
        return _OUR_CLASSES[target], {}, {}
    known = ", ".join(sorted(name.rpartition(".")[2] for name in NEMO_CLASSES))
    raise ConfigError(
        f"_target_ {target!r} is not a class of the LFR codec family; use the full name of one of these classes in "
        f"{_NEMO_MODULES.rstrip('.')}: {known}."
    )


def nemo_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's config with NeMo's class name, so that NeMo can build the module without this package.

    Raises:
        ConfigError: if NeMo has no class for this module.
    """
    config = dict(config)
    target = str(config["_target_"])
    if target in NEMO_CLASSES:
        return config
    ours, _, _ = our_target(target)
    causal = bool(config.pop("causal", False))
    config.pop("weight_norm", None)  # an argument of our classes only
    for name, (candidate, implied, _) in NEMO_CLASSES.items():
        if candidate is ours and implied.get("causal", False) == causal:
            config["_target_"] = name
            return config
    raise ConfigError(f"_target_ {target!r} has no counterpart in NeMo; use a class that NeMo also has.")


def build_part(config: Mapping[str, Any], *, weight_norm: bool = True) -> nn.Module:
    """Build the encoder, quantizer or decoder that one section of a model config describes.

    Args:
        config: `_target_` (NeMo's name or ours) and the constructor's arguments.
        weight_norm: whether to build convolutions with weight norm, for training, or with plain weights.

    Raises:
        ConfigError: if a class or argument is unknown, or a value is invalid.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"the section is {quoted(config)}, not a mapping with a _target_.")
    target = str(config.get("_target_", ""))
    ours, implied, defaults = our_target(target)
    arguments = {key: value for key, value in config.items() if key not in _HYDRA_KEYS}
    known = set(inspect.signature(ours).parameters)
    if target in NEMO_CLASSES:
        known -= {"causal", "weight_norm"}
    for key in arguments:
        if key not in known:
            kind = target.rpartition(".")[2]
            raise ConfigError(f"{shorten(key)} is not an argument of {kind}; remove it from the config.")
    if ours in (HiFiGANEncoder, HiFiGANDecoder):
        implied = implied | {"weight_norm": weight_norm}
    arguments = defaults | arguments | implied
    _check_sizes(arguments)
    try:
        if torch.get_default_device().type != "meta":
            with on_meta_device():
                size = sum(parameter.numel() for parameter in ours(**arguments).parameters())
            if size > MAX_PARAMETERS:
                raise ConfigError(f"the module has {size} parameters; at most {MAX_PARAMETERS} are allowed.")
        return ours(**arguments)
    except ConfigError:
        raise
    except Exception as error:  # values of any type reach the constructors
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{ours.__name__} cannot be built from {shorten(arguments, 300)}: {reason}") from error


def _check_sizes(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for sizes that are invalid, or that would need too much memory or time in a constructor."""
    for key, value in arguments.items():
        if isinstance(value, list | tuple) and not 1 <= len(value) <= MAX_LIST:
            raise ConfigError(f"{key} has {len(value)} items; between 1 and {MAX_LIST} are allowed.")
        # All numbers are sizes, except FSQ's eps.
        least, most = (0, 1) if key == "eps" else (1, MAX_GROUPS if key == "num_groups" else MAX_SIZE)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, bool) or item is None or isinstance(item, str):
                continue
            is_valid = isinstance(item, int | float) and least <= item <= most
            if key == "eps":  # the quantizer divides by 1 - eps
                is_valid, allowed = is_valid and item != 1, "numbers of at least 0 and less than 1"
            else:
                is_valid, allowed = is_valid and item == int(item), f"whole numbers from {least} to {most}"
            if not is_valid:
                raise ConfigError(f"{key} is {quoted(value)}; {allowed} are allowed.")


def build_parts(config: Mapping[str, Any], *, weight_norm: bool = True) -> CodecModules:
    """Build the encoder, quantizer and decoder of a model config, and check that they fit together.

    Args:
        config: values by key, as `codec_values` returns them.
        weight_norm: whether to build convolutions with weight norm, for training, or with plain weights.

    Raises:
        ConfigError: if a key is missing or has an invalid value, or if the modules do not fit together.
    """
    for key in ("sample_rate", "samples_per_frame", *PARTS):
        if config.get(key) is None:
            raise ConfigError(f"the config has no {key!r}; pass a checkpoint of the LFR codec family.")
    sections = {}
    for name in PARTS:
        try:
            sections[name] = build_part(config[name], weight_norm=weight_norm)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    encoder, quantizer, decoder = (sections[name] for name in PARTS)
    if not (
        isinstance(encoder, HiFiGANEncoder)
        and isinstance(quantizer, FiniteScalarQuantizer | GroupFiniteScalarQuantizer)
        and isinstance(decoder, HiFiGANDecoder)
    ):
        raise ConfigError(
            f"the sections {list(PARTS)} build {[type(part).__name__ for part in sections.values()]}; they must build "
            "an encoder, a quantizer and a decoder."
        )
    sample_rate, samples_per_frame = config["sample_rate"], config["samples_per_frame"]
    if not isinstance(sample_rate, int) or not 1000 <= sample_rate <= 192_000:
        raise ConfigError(f"sample_rate is {quoted(sample_rate)}; whole numbers from 1000 to 192000 (Hz) are allowed.")
    if (output_rate := config.get("output_sample_rate", sample_rate)) != sample_rate:
        raise ConfigError(
            f"output_sample_rate is {quoted(output_rate)}, but sample_rate is {sample_rate}; codecs with two "
            "sample rates are not supported."
        )
    for part in (encoder, decoder):
        if part.samples_per_frame != samples_per_frame:
            raise ConfigError(
                f"the rates of {type(part).__name__} multiply to {part.samples_per_frame}, but samples_per_frame is "
                f"{quoted(samples_per_frame)}; make the two agree."
            )
    if encoder.encoded_dim != quantizer.codebook_dim:
        raise ConfigError(
            f"encoded_dim of the encoder is {encoder.encoded_dim}, but the quantizer has {quantizer.codebook_dim} "
            "dimensions; make the two agree."
        )
    return CodecModules(encoder, quantizer, decoder, sample_rate)
