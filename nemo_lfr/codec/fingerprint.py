"""Fingerprint of a codec: a hash of its weights and of all settings that change tokens or audio.

The fingerprint is derived from the modules, so it does not depend on the class names in the config or on weight norm.
Older `.lfr` files and corpora contain a hash of the weights alone, or a fingerprint that depends on the CPU.
`Codec.made` accepts both.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nemo_lfr.checkpoint.config import build_parts
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.empty import on_meta_device
from nemo_lfr.modules.level_tables import level_tables
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from nemo_lfr.modules.residual import ResidualBlock
from nemo_lfr.modules.weights import contiguous_values

LENGTH = 16  # hex digits


def weights_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256, in hex, of the names and the fp32 values of weights.

    The first 16 digits are the fingerprint that older versions wrote.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(contiguous_values(weight).float().cpu().numpy().data)
    return digest.hexdigest()


def fingerprint(digest: str, settings: Any) -> str:
    """Return a codec's fingerprint: a hash of `digest` (from `weights_digest`) and `settings` (from `settings_of`)."""
    text = json.dumps([digest, settings], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def settings_of(
    encoder: nn.Module,
    quantizer: FiniteScalarQuantizer | GroupFiniteScalarQuantizer,
    decoder: nn.Module,
    sample_rate: int,
) -> dict[str, Any]:
    """Return the settings that tokens and audio depend on, as values that JSON can store.

    Raises:
        NemoLfrError: if a buffer of the quantizer was changed after the quantizer was built.
    """
    groups = list(quantizer.fsqs) if isinstance(quantizer, GroupFiniteScalarQuantizer) else [quantizer]
    for group in groups:
        assert isinstance(group, FiniteScalarQuantizer)
        for name, wanted in level_tables(quantizer.levels).items():
            buffer = getattr(group, name)
            if not buffer.is_meta and (values := buffer.flatten().tolist()) != wanted:
                raise NemoLfrError(
                    f"the quantizer's {name} are {shorten(values)}, but it was built with {wanted}; "
                    "load the codec again, or build another quantizer."
                )
    eps = [float(group.eps) for group in groups if isinstance(group, FiniteScalarQuantizer)]
    return {
        "sample_rate": int(sample_rate),
        "encoder": _layers(encoder),
        "quantizer": [quantizer.num_codebooks, list(quantizer.levels), eps[0] if len(set(eps)) == 1 else eps],
        "decoder": _layers(decoder),
    }


def check_described(config: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> None:
    """Check that a config matches the settings of the modules, before config and weights are saved.

    Args:
        config: model config, resolved.
        settings: settings in use, from `settings_of`.
        name: name of the codec, for messages.

    Raises:
        NemoLfrError: if a setting differs, so the saved codec would give other tokens or audio.
    """
    with on_meta_device():
        parts = build_parts(config, weight_norm=False)
    described = settings_of(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate)
    for key, expected in described.items():
        if settings[key] == expected:
            continue
        used, wanted = settings[key], expected
        if isinstance(expected, list) and len(used) == len(expected):
            used, wanted = next(pair for pair in zip(used, wanted, strict=True) if pair[0] != pair[1])
        raise NemoLfrError(
            f"{name}: the {key} differs from the codec's config: {shorten(used)} instead of {shorten(wanted)}. The "
            "saved codec would give other results; restore the setting, or build the codec from a config that "
            "describes it."
        )


def _unused_children(module: nn.Module) -> list[nn.Module]:
    """Return the children of a layer that do not affect results, such as dropout."""
    match module:
        case Conv1d() | ConvTranspose1d():
            return [module.activation]
        case ResidualBlock():
            return [module.dropout]
    return []


def _layers(network: nn.Module) -> list[list[Any]]:
    """Return the name, class name and settings of each layer in a network, sorted by name."""
    layers = []
    unused = {id(child) for module in network.modules() for child in _unused_children(module)}
    for name, module in network.named_modules():
        if id(module) in unused:
            continue
        match module:
            case Conv1d(conv=conv):
                sizes = [*conv.kernel_size, *conv.stride, *conv.dilation, conv.groups, *module.pad]
                settings = [*map(int, sizes), module.pad_mode]
            case ConvTranspose1d(conv=conv):
                settings = [*map(int, [*conv.kernel_size, *conv.stride, conv.groups, module.first_sample])]
            case nn.LeakyReLU():
                settings = [float(module.negative_slope)]
            case nn.ELU():
                settings = [float(module.alpha)]
            case _ if next(module.children(), None) is None and ".parametrizations." not in f".{name}.":
                settings = []  # an activation without settings
            case _:
                continue
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            layers.append([name, type(module).__name__, *settings])
    return sorted(layers)
