"""Compare a model with a model that was rebuilt from its config, to find the changes that rebuilding drops.

`nemo_lfr.accelerate` and `pickle` rebuild modules from the config. They use this file to refuse a model with changes
that would be lost.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from nemo_lfr.checkpoint.names import WRAPPERS, plain_key, spell_as
from nemo_lfr.errors import ConfigError, NemoLfrError, shorten

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
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
# Modules of PyTorch whose hooks implement weight norm, which is kept.
_WEIGHT_NORM = ("torch.nn.utils.weight_norm", "torch.nn.utils.parametrizations")
# Packages whose wrappers are removed. Wrappers from other packages may change results, so they are refused.
_WRAPPER_PACKAGES = ("torch", "lightning", "lightning_fabric", "pytorch_lightning")
# Attributes of every module, which are restored in other ways
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


class Operation(NamedTuple):
    """Words for error messages about an operation that would drop changes of a model.

    A message is, for example: "decoder.pre_conv is a LoraConv, not the stock Conv1d, and accelerate() would drop the
    LoraConv; put the stock module back before accelerate(), and insert the LoraConv again in the accelerated model."

    Attributes:
        name: the operation, such as "accelerate()".
        original: article and adjective for an unchanged module, such as "the stock".
        result: the model after the operation, such as "accelerated model".
    """

    name: str
    original: str
    result: str


_PICKLING = Operation("pickling", "the configured", "unpickled model, or in the constructor of a subclass")


def check_layers(module: nn.Module, reference: nn.Module, path: str, operation: Operation) -> None:
    """Check that a module has the same hooks, methods and layer classes as a rebuilt module.

    Args:
        module: the module, possibly inside wrappers such as `torch.compile`.
        reference: the rebuilt module.
        path: name of the module in the model, for messages.
        operation: the operation that rebuilds the module, such as pickling, for messages.

    Raises:
        ConfigError: if the module or one of its sub-modules differs.
    """
    for name, layer, original in _pairs(module, reference, path, operation):
        for key, value in vars(layer).items():
            if not callable(getattr(type(layer), key, None)):
                continue
            if key not in vars(original) or _function_name(value) != _function_name(vars(original)[key]):
                raise ConfigError(
                    f"the method {_join(name, key)} is overridden, and {operation.name} would drop the new method; "
                    f"delete it before {operation.name}, and set it afterwards on the {operation.result}."
                )


def check_settings(module: nn.Module, reference: nn.Module, path: str, operation: Operation) -> None:
    """Check that the layers of a module have the same settings as in a rebuilt module.

    Dropout rates may differ. For the arguments see `check_layers`.

    Raises:
        ConfigError: if a setting such as the padding of a convolution differs.
    """
    for name, layer, original in _pairs(module, reference, path, operation):
        for key, expected in vars(original).items():
            if key.startswith("_") or key == "training" or (key == "p" and isinstance(original, nn.Dropout)):
                continue
            value = vars(layer).get(key, expected)
            if not _is_equal(value, expected):
                raise ConfigError(
                    f"{_join(name, key)} is {shorten(repr(value))} instead of {shorten(repr(expected))}, and "
                    f"{operation.name} would drop this value; restore the old value before {operation.name}, and set "
                    f"the new one afterwards on the {operation.result}."
                )


def settings_to_pickle(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    build: Callable[[bool], nn.Module],
    skipped: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Check that a model can be rebuilt completely, and return the settings to pickle beside its weights.

    Args:
        model: model to pickle.
        state: its state dict.
        build: function that rebuilds the model without its weights. Its argument is whether the encoder and the
            decoder must have values; if not, they may be on the meta device.
        skipped: names of attributes to ignore.

    Returns:
        A dict for `restore_settings`, from the path of each changed layer to the names and values of the attributes
        that differ from the rebuilt layer.

    Raises:
        ConfigError: if the model cannot be rebuilt, or if its hooks, modules, methods, parameters or buffers differ
            from those of the rebuilt model.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            try:
                twin = build(False)
            except Exception:  # the constructor of a subclass may need the weights
                twin = build(True)
    except Exception as error:  # constructors of subclasses raise any exception
        raise _not_rebuilt(model, error) from error
    check_layers(model, twin, "", _PICKLING)
    _check_tensors(model, twin, "", _PICKLING)
    try:
        twin.requires_grad_(False)  # weights that were loaded in inference mode cannot require gradients here
        twin.load_state_dict(spell_as(twin.state_dict(), state), assign=True)
    except (NemoLfrError, RuntimeError) as error:
        raise _not_rebuilt(model, error) from error
    rebuilt = twin.state_dict()
    for key, value in spell_as(rebuilt, state).items():
        if key not in rebuilt or not _is_same(value, rebuilt[key]):
            raise _not_rebuilt(model, f"{key} would be lost")
    return _changed_settings(model, twin, _PICKLING, skipped)


def restore_settings(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the attributes that `settings_to_pickle` returned."""
    for path, values in settings.items():
        layer = model.get_submodule(path)
        for key, value in values.items():
            (layer._buffers if key in layer._buffers else vars(layer))[key] = value


def flags_of(model: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    """Return `training` of each module and `requires_grad` of each tensor, by plain name (see `plain_key`)."""
    modules = model.named_modules(remove_duplicate=False)
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)  # PyTorch makes a frozen weight without weight norm a buffer
    return (
        {plain_key(name): module.training for name, module in modules},
        {plain_key(name): value.requires_grad for name, value in (*parameters, *buffers)},
    )


def restore_flags(model: nn.Module, modes: Mapping[str, bool], gradients: Mapping[str, bool]) -> None:
    """Set `training` and `requires_grad` in a rebuilt model as in the original model.

    Args:
        model: the rebuilt model.
        modes: dict from the plain name of each module (see `plain_key`) to its `training`.
        gradients: dict from the plain name of each parameter and buffer to its `requires_grad`.
    """
    for name, module in model.named_modules():
        module.training = modes.get(plain_key(name), modes[""])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(gradients.get(plain_key(name), True))


def _not_rebuilt(model: nn.Module, reason: object) -> ConfigError:
    text = shorten(" ".join(str(reason).split()), 300).removesuffix(".")
    return ConfigError(
        f"this {_name(type(model))} cannot be pickled, because it cannot be rebuilt from its config and its weights "
        f"({text}); pickle model.state_dict() instead."
    )


def _check_tensors(module: nn.Module, reference: nn.Module, path: str, operation: Operation) -> None:
    """Check that a module has the same parameters and buffers as a rebuilt module, and no hooks on parameters.

    The shapes are not compared. For the arguments see `check_layers`.

    Raises:
        ConfigError: if a parameter or buffer was added or removed, or if a parameter has a hook.
    """
    for name, layer, original in _pairs(module, reference, path, operation):
        tensors, expected = _tensors(layer), _tensors(original)
        if added := [key for key in tensors if key not in expected]:
            raise ConfigError(
                f"{_join(name, added[0])} is a tensor that {operation.original} module does not have, and "
                f"{operation.name} would drop it; delete it before {operation.name}, and add it afterwards to the "
                f"{operation.result}."
            )
        if removed := [key for key in expected if key not in tensors]:
            raise ConfigError(
                f"{_join(name, removed[0])} was removed, and {operation.name} would add it again; restore it before "
                f"{operation.name}, and remove it afterwards from the {operation.result}."
            )
        for key, value in layer._parameters.items():
            if any(getattr(value, kind, None) for kind in _TENSOR_HOOKS):
                raise ConfigError(
                    f"{_join(name, key)} has a gradient hook, which {operation.name} would drop; remove the hook "
                    f"before {operation.name}, and register it afterwards on the {operation.result}."
                )


def _changed_settings(
    model: nn.Module, reference: nn.Module, operation: Operation, skipped: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Return the attributes of a model and its layers that differ from those of a rebuilt model.

    Plain values, such as dropout rates, and tensors outside the state dict are compared by value. Other objects are
    compared by type if the attribute is public, and ignored if it is private.

    Args:
        model: the model.
        reference: the rebuilt model.
        operation: words for error messages.
        skipped: names of attributes to ignore.

    Returns:
        A dict from the path of each changed layer to a dict of its changed attributes.
    """
    settings = {}
    for path, layer, original in _pairs(model, reference, "", operation):
        expected = vars(original) | original._buffers
        attributes = {key: value for key, value in vars(layer).items() if key not in _OWN_ATTRIBUTES}
        attributes |= {key: layer._buffers[key] for key in layer._non_persistent_buffers_set}
        values = {
            key: value.detach() if isinstance(value, torch.Tensor) else value
            for key, value in attributes.items()
            if key not in skipped and _is_changed(key, value, expected)
        }
        if values:
            settings[path] = values
    return settings


def _pairs(
    module: nn.Module, reference: nn.Module, path: str, operation: Operation
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield (path, layer, rebuilt layer) for a module and all modules inside it.

    Raises:
        ConfigError: if a layer has hooks or another class than the rebuilt layer, or if a layer was added or removed.
    """
    name, original_kind = path or "the model", f"{operation.original} module"
    while len(module._modules) == 1 and type(module).__module__.partition(".")[0] in _WRAPPER_PACKAGES:
        (key, inner), *_ = module._modules.items()
        if key not in WRAPPERS or inner is None:
            break
        _check_hooks(module, reference, name, _CALL_HOOKS, operation)
        module = inner
    _check_hooks(module, reference, name, _CALL_HOOKS | _STATE_HOOKS, operation)
    kind, expected = (parametrize.type_before_parametrizations(layer) for layer in (module, reference))
    if kind is not expected:
        raise ConfigError(
            f"{name} is a {_name(kind)}, not {operation.original} {_name(expected)}, and {operation.name} would drop "
            f"the {_name(kind)}; put {original_kind} back before {operation.name}, and insert the {_name(kind)} again "
            f"in the {operation.result}."
        )
    yield path, module, reference
    for key, child in module._modules.items():
        original = reference._modules.get(key)
        if child is not None and original is None:
            raise ConfigError(
                f"{_join(path, key)} is a {_name(type(child))} that {original_kind} lacks, so {operation.name} would "
                f"drop it; remove it before {operation.name}, and add it afterwards to the {operation.result}."
            )
        if child is not None and original is not None:
            yield from _pairs(child, original, f"{path}.{key}" if path else key, operation)
    for key, original in reference._modules.items():
        # A layer without "parametrizations" may have had its weight norm removed. The weights are compared later.
        if original is not None and module._modules.get(key) is None and key != "parametrizations":
            raise ConfigError(
                f"{_join(path, key)} was removed, and {operation.name} would add it again; restore {original_kind} "
                f"before {operation.name}, and remove it afterwards from the {operation.result}."
            )


def _check_hooks(
    module: nn.Module, reference: nn.Module, path: str, kinds: Mapping[str, str], operation: Operation
) -> None:
    for attribute, kind in kinds.items():
        kept = Counter(_function_name(hook) for hook in getattr(reference, attribute).values())
        hooks: Iterable[Any] = getattr(module, attribute).values()
        for hook in hooks:
            name = _function_name(hook)
            kept[name] -= 1
            if kept[name] < 0 and name.partition(":")[0] not in _WEIGHT_NORM:
                raise ConfigError(
                    f"{path} has a {kind}, which {operation.name} would drop; remove the hook before "
                    f"{operation.name}, and register it afterwards on the {operation.result}."
                )


def _function_name(function: Any) -> str:
    """Return "MODULE:NAME" of a function, or of the class of a callable object."""
    function = getattr(function, "hook", function)  # PyTorch wraps some kinds of hooks in an object
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(function, '__module__', None)}:{named.__qualname__}"


def _tensors(layer: nn.Module) -> set[str]:
    """Return the names of the parameters and buffers of a layer, including those that are parametrized."""
    names = {key for key, value in (layer._parameters | layer._buffers).items() if value is not None}
    return names | set(getattr(layer, "parametrizations", ()))


def _is_changed(key: str, value: Any, expected: Mapping[str, Any]) -> bool:
    """Return whether an attribute of a layer differs from that of the rebuilt layer; see `_changed_settings`.

    Args:
        key: name of the attribute.
        value: value of the attribute.
        expected: attributes and buffers of the rebuilt layer.
    """
    if isinstance(value, torch.Tensor):
        other = expected.get(key)
        return not isinstance(other, torch.Tensor) or not _is_same(value, other)
    if _is_plain(value):
        return key not in expected or not _is_plain(expected[key]) or value != expected[key]
    # Private attributes that are not plain are caches, or belong to Lightning or NeMo.
    return not key.startswith("_") and type(value) is not type(expected.get(key))


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | bytes | int | float | complex | torch.dtype)


def _is_same(value: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype, device and values, without copying them."""
    if value.shape != other.shape or value.dtype != other.dtype or value.device != other.device or value.is_meta:
        return False
    is_shared = value.data_ptr() == other.data_ptr() and value.stride() == other.stride()
    return is_shared or torch.equal(value, other)


def _join(path: str, key: str) -> str:
    return f"{path}.{shorten(key)}" if path else shorten(key)


def _name(kind: type) -> str:
    return shorten(kind.__name__)


def _is_equal(value: Any, expected: Any) -> bool:
    """Return whether two settings are equal.

    Numbers, strings, tensors and iterables are compared by value, and other objects by type. A meta tensor equals any
    other tensor.
    """
    if isinstance(expected, str | int | float | None):
        return isinstance(value, str | int | float | None) and value == expected
    if isinstance(expected, torch.Tensor):
        return isinstance(value, torch.Tensor) and (value.is_meta or expected.is_meta or torch.equal(value, expected))
    if isinstance(expected, Iterable):
        return isinstance(value, Iterable) and list(value) == list(expected)
    return type(value) is type(expected)
