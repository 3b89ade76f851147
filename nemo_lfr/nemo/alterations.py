"""Find what a user has changed in the modules of a stock NeMo model, so that `accelerate` does not drop it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from nemo_lfr.checkpoint import nemo_config
from nemo_lfr.checkpoint.names import WRAPPERS
from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.modules.empty import on_meta_device
from nemo_lfr.nemo.base import audio_codec_modules

_CALL_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_STATE_HOOKS = {
    "_state_dict_hooks": "state dict hook",
    "_state_dict_pre_hooks": "state dict pre-hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}
# Modules of PyTorch whose hooks implement weight norm, which `accelerate` keeps.
_WEIGHT_NORM = ("torch.nn.utils.weight_norm", "torch.nn.utils.parametrizations")
# Packages of the wrappers that `accelerate` removes. A wrapper class of a user may change results.
_WRAPPER_PACKAGES = ("torch", "lightning", "lightning_fabric", "pytorch_lightning")


def stock_module(config: Mapping[str, Any]) -> nn.Module:
    """Build NeMo's module that a section of a model config describes, for comparison.

    The weights of an encoder or decoder are on the meta device.

    Args:
        config: `_target_` and the constructor's arguments.

    Raises:
        ConfigError: if NeMo has no class for this module.
    """
    config = nemo_config(config)
    name = str(config["_target_"]).rpartition(".")[2]
    kind: type[nn.Module] = getattr(audio_codec_modules, name)
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    if name.endswith("Quantizer"):  # its constructor reads values of tensors
        return kind(**arguments)
    with on_meta_device():
        return kind(**arguments)


def check_layers(module: nn.Module, reference: nn.Module, path: str) -> None:
    """Check that a module has no hooks, no patched methods and no layers of other classes than a stock module.

    Args:
        module: NeMo's module, possibly inside wrappers such as `torch.compile`.
        reference: unchanged stock module, see `stock_module`.
        path: name of the module in the model, for messages.

    Raises:
        ConfigError: if the module or one of its sub-modules differs. The message says how to fix it.
    """
    for name, layer, original in _pairs(module, reference, path):
        patched = [
            key for key in vars(layer) if callable(getattr(type(layer), key, None)) and key not in vars(original)
        ]
        if patched:
            raise ConfigError(
                f"the method {name}.{shorten(patched[0])} is overridden, which accelerate() would drop; delete that "
                "attribute before accelerate(), and set it afterwards on the accelerated model."
            )
        if (method := _patched_in_class(type(layer))) is not None:
            raise ConfigError(
                f"{name}: the method {shorten(method)} of NeMo is patched, which accelerate() would drop; undo the "
                "patch before accelerate(), and patch the modules of the accelerated model afterwards."
            )


def _patched_in_class(kind: type) -> str | None:
    """Return the name of a method that is not from the file in which NeMo defines the class; None if there is none."""
    for parent in kind.__mro__:
        if parent.__module__ == audio_codec_modules.__name__:
            for name, method in vars(parent).items():
                code = getattr(getattr(method, "__func__", method), "__code__", None)
                if code is not None and code.co_filename != audio_codec_modules.__file__:
                    return f"{parent.__name__}.{name}"
    return None


def check_settings(module: nn.Module, reference: nn.Module, path: str) -> None:
    """Check that the layers of a module have the settings of a stock module, except for the rates of dropout.

    For the arguments see `check_layers`.

    Raises:
        ConfigError: if a setting such as the padding of a convolution differs. The message says how to fix it.
    """
    for name, layer, original in _pairs(module, reference, path):
        for key, expected in vars(original).items():
            if key.startswith("_") or key == "training" or (key == "p" and isinstance(original, nn.Dropout)):
                continue
            value = vars(layer).get(key, expected)
            if not _is_equal(value, expected):
                raise ConfigError(
                    f"{name}.{key} is {shorten(repr(value))} instead of {shorten(repr(expected))}, which accelerate() "
                    "would drop; restore it before accelerate(), and set it afterwards on the accelerated model."
                )


def _pairs(module: nn.Module, reference: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the path, the layer and the stock layer for each layer, and check the hooks and the class of each."""
    while len(module._modules) == 1 and type(module).__module__.partition(".")[0] in _WRAPPER_PACKAGES:
        (name, inner), *_ = module._modules.items()
        if name not in WRAPPERS or inner is None:
            break
        _check_hooks(module, path, _CALL_HOOKS)
        module = inner
    _check_hooks(module, path, _CALL_HOOKS | _STATE_HOOKS)
    kind, expected = (parametrize.type_before_parametrizations(layer) for layer in (module, reference))
    if kind is not expected:
        raise ConfigError(
            f"{path} is a {_name(kind)}, not the stock {_name(expected)}, and accelerate() would drop it; restore the "
            "stock module before accelerate(), and replace it afterwards in the accelerated model."
        )
    yield path, module, reference
    for name, child in module._modules.items():
        original = reference._modules.get(name)
        if child is not None and original is None:
            raise ConfigError(
                f"{path}.{shorten(name)} is a {_name(type(child))} that the stock module does not have, and "
                "accelerate() would drop it; remove it before accelerate(), and add it afterwards to the accelerated "
                "model."
            )
        if child is not None and original is not None:
            yield from _pairs(child, original, f"{path}.{name}")
    for name, original in reference._modules.items():
        # Weight norm may have been removed. Its parametrizations are compared with those of the other layers later.
        if original is not None and module._modules.get(name) is None and name != "parametrizations":
            raise ConfigError(
                f"{path}.{name} was removed, and accelerate() would add it again; restore the stock module before "
                "accelerate(), and remove it afterwards from the accelerated model."
            )


def _check_hooks(module: nn.Module, path: str, kinds: Mapping[str, str]) -> None:
    for attribute, kind in kinds.items():
        hooks: Iterable[Any] = getattr(module, attribute).values()
        for hook in hooks:
            hook = getattr(hook, "hook", hook)  # PyTorch wraps some kinds of hooks in an object
            if getattr(hook, "__module__", None) not in _WEIGHT_NORM:
                raise ConfigError(
                    f"{path} has a {kind}, which accelerate() would drop; remove the hook before accelerate(), and "
                    "register it afterwards on the accelerated model."
                )


def _name(kind: type) -> str:
    return shorten(kind.__name__)


def _is_equal(value: Any, expected: Any) -> bool:
    """Return whether two settings are equal. Objects other than numbers, texts and lists only need the same type."""
    if isinstance(expected, str | int | float | None):
        return isinstance(value, str | int | float | None) and value == expected
    if isinstance(expected, torch.Tensor):
        return isinstance(value, torch.Tensor) and (value.is_meta or expected.is_meta or torch.equal(value, expected))
    if isinstance(expected, Iterable):
        return isinstance(value, Iterable) and list(value) == list(expected)
    return type(value) is type(expected)
