"""Remove wrapper prefixes from the names of weights, and convert weights between weight norm and plain weights."""

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

from nemo_lfr.errors import CheckpointError, shorten
from nemo_lfr.modules.weight_norm import fold_weight_norm, row_norms

# NeMo 2.4 and later name the weights of weight norm as PyTorch's parametrization does; NeMo 2.0 uses `weight_g` and
# `weight_v`.
GAIN, DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"
# Name components that `torch.compile`, `DistributedDataParallel`, FSDP, activation checkpointing and Lightning Fabric
# insert into the names of a wrapped module's weights.
WRAPPERS = frozenset(
    (
        "_orig_mod",
        "module",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_original_module",
    )
)

Value = TypeVar("Value")


def plain_key(key: str) -> str:
    """Return a weight's name without the components that wrappers insert, such as `_orig_mod`."""
    if "_orig_mod" not in key and "module" not in key:
        return key
    return ".".join(name for name in key.split(".") if name not in WRAPPERS)


def plain_keys(items: Iterable[tuple[str, Value]], what: str) -> dict[str, Value]:
    """Return a dict from each weight's plain name (see `plain_key`) to its value.

    Args:
        items: pairs of a weight's name and any value.
        what: origin of the weights, for the message.

    Raises:
        CheckpointError: if two weights have the same plain name.
    """
    plain: dict[str, Value] = {}
    for key, value in items:
        name = plain_key(key)
        if name in plain:
            raise CheckpointError(
                f"{what}: {shorten(name)} occurs twice (parts of names that wrappers insert, such as _orig_mod and "
                "module, are ignored); keep one."
            )
        plain[name] = value
    return plain


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers such as `torch.compile` and `DistributedDataParallel`."""
    while len(module._modules) == 1:
        (name, inner), *_ = module._modules.items()
        if name not in WRAPPERS or inner is None:
            break
        module = inner
    return module


def gain_of(weight: torch.Tensor) -> torch.Tensor:
    """Return the gain of a weight for weight norm: the norm of each slice along the first dimension.

    All other dimensions of the gain have size 1. The norms are rounded as in `fold_weight_norm`, so that folding the
    gain and the weight gives exactly the weight again.
    """
    if weight.is_meta:
        return weight.new_empty(len(weight), *[1] * (weight.dim() - 1))
    return row_norms(weight).to(weight)


def spell_as(expected: Collection[str], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert weights between their plain and weight-normed forms to match the names of another state dict.

    Args:
        expected: names in the other state dict. A weight that matches none of them stays unchanged.
        state: tensors by name, without the name components that wrappers insert.
    """
    spelled: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        stem = key.removesuffix(".weight") if key.endswith(".weight") else key.removesuffix(DIRECTION)
        if key == stem + ".weight" and key not in expected and stem + DIRECTION in expected:
            spelled[stem + GAIN], spelled[stem + DIRECTION] = gain_of(value), value
        elif key == stem + DIRECTION and stem + ".weight" in expected and stem + GAIN in state:
            spelled[stem + ".weight"] = fold_weight_norm(value, state[stem + GAIN])
        elif not (key.endswith(GAIN) and key.removesuffix(GAIN) + ".weight" in expected):
            spelled[key] = value
    return spelled
