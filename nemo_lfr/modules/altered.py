"""Detect networks with hooks, replaced layers or patched methods, and run them without packed weights.

Fast inference (packed weights on a CPU, plans on CUDA) uses copies of the weights and does not call the modules.
Forward hooks would not run, and weights that a hook recomputes before each call would not be updated (as with
`torch.nn.utils.prune` and the older `weight_norm` and `spectral_norm`). Altered networks are therefore run by calling
their modules. The modules are also called while global hooks are registered (`register_module_forward_hook`), and if
a network with dropout is in training mode.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as _hooks

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.modules.activation import CodecActivation

# Endings for the message of `check_unaltered`, one for each function that does not call the modules.
STREAM = "which a stream does not call; remove them, or use encode and decode instead of streams"
FINGERPRINT = "which its fingerprint does not cover; remove or merge them, or store the tokens without a fingerprint"
SAVE = "which are not saved, so the saved codec would give other results; remove or merge them"
PICKLE = "which are not pickled, so the unpickled codec would give other results; remove or merge them"
EXPORT = "which are not exported, so the exported codec would give other results; remove or merge them"


Module = TypeVar("Module", bound=type[nn.Module])

# Original methods, by class and by name: the methods that compute a convolution, and all methods of the classes that
# `notice_patches` decorates.
_ORIGINALS: dict[type, dict[str, Any]] = {
    nn.Conv1d: {"forward": nn.Conv1d.forward, "_conv_forward": nn.Conv1d._conv_forward},
    nn.ConvTranspose1d: {"forward": nn.ConvTranspose1d.forward},
}


def notice_patches(kind: Module) -> Module:
    """Class decorator that lets `is_patched` detect methods replaced in the class.

    Methods replaced in other classes are not detected, except in PyTorch's convolutions.
    """
    _ORIGINALS[kind] = {name: value for name, value in vars(kind).items() if callable(value)}
    return kind


Function = TypeVar("Function", bound=Callable[..., Any])


def _constant_when_compiling(function: Function) -> Function:
    """Decorate a function so that `torch.compile` calls it and treats the result as constant.

    PyTorch's `assume_constant_result` does the same, but its import takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
@_constant_when_compiling
def _methods(kind: Any) -> frozenset[str]:
    """Return "forward" and the names of the methods that a module class adds to `nn.Module` or overrides."""
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    names = {name for parent in classes for name, value in vars(parent).items() if callable(value)}
    return frozenset(names | {"forward"})


def is_patched(module: nn.Module) -> bool:
    """Return whether a caller has replaced a method of a module, or of its class (see `notice_patches`)."""
    kind: Any = type(module)
    if not _methods(kind).isdisjoint(module.__dict__):
        return True
    return _is_class_patched(kind)


@_constant_when_compiling
def _is_class_patched(kind: Any) -> bool:
    return any(vars(parent).get(name) is not method for parent, name, method in _originals(kind))


@functools.cache
def _originals(kind: Any) -> tuple[tuple[type, str, Any], ...]:
    parents = [parent for parent in kind.__mro__ if parent in _ORIGINALS]
    return tuple((parent, name, method) for parent in parents for name, method in _ORIGINALS[parent].items())


def has_global_hooks() -> bool:
    """Return whether hooks for all modules are registered, as by PyTorch's `register_module_forward_hook`."""
    return bool(
        _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )


def must_be_called(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a layer must be run by calling it.

    This is the case if the layer has hooks, if global hooks are registered, if a caller has patched a method, or if
    its `forward` method is not that of the class `kind`, such as `nn.Conv1d`. A kernel that only uses the weights of
    such a layer would give other results.
    """
    if layer._backward_hooks or layer._backward_pre_hooks or has_global_hooks():
        return True
    return _is_altered(layer, kind)


def _is_altered(layer: nn.Module, kind: type[nn.Module]) -> bool:
    if layer._forward_hooks or layer._forward_pre_hooks or not isinstance(layer, kind):
        return True
    return is_patched(layer) or type(layer).forward is not kind.forward


@functools.cache
def _overrides(kind: Any) -> bool:
    """Return whether a class that a user wrote overrides methods of this package's or PyTorch's classes.

    The methods `__init__` and `run` do not count: subclasses with other layers override them.
    """
    names: set[str] = set()
    for parent in kind.__mro__:
        if parent.__module__.partition(".")[0] in ("nemo_lfr", "torch"):
            return not names.isdisjoint(_methods(parent) - {"__init__", "run"})
        names |= {name for name, value in vars(parent).items() if callable(value)}
    return False


def is_altered(network: nn.Module) -> bool:
    """Return whether a network has hooks, replaced layers, or methods that a caller has patched or overridden."""
    pending = [(network, True)]
    while pending:
        module, is_layer = pending.pop()
        if module._forward_hooks or module._forward_pre_hooks or is_patched(module):
            return True
        # A user's own modules are allowed inside activations, and as parametrizations of weights.
        kind: Any = type(module)
        if is_layer and _overrides(kind):
            return True
        is_layer = is_layer and not isinstance(module, CodecActivation)
        for name, child in module._modules.items():
            if child is not None:
                if not _is_expected(module, name, child):
                    return True
                pending.append((child, is_layer and name != "parametrizations"))
    activations = getattr(network, "activations", ())
    return not all(isinstance(activation, CodecActivation) for activation in activations)


def _is_expected(module: nn.Module, name: str, child: nn.Module) -> bool:
    """Return whether a child module has no changes that fast inference would ignore.

    Fast inference uses the weights of a convolution, for example, but does not call its `forward`.

    Args:
        module: the parent module.
        name: attribute of the parent that contains the child.
        child: the child module.
    """
    if name == "conv":
        return not _is_altered(child, _conv_kind(child))
    # NeMo's layers have the children "activation" and "dropout" too, which do nothing unless a caller sets them.
    if name == "activation":
        return "conv" not in module._modules or type(child) is nn.Identity
    if name == "dropout":
        return type(child) is nn.Dropout
    if name == "fsqs":
        is_own = all(type(group).__module__.startswith("nemo_lfr.") for group in child.children())
        return is_own and len(child._modules) == module.num_groups
    return not name.endswith("_activation") or name == "out_activation" or isinstance(child, CodecActivation)


def is_dropping(network: nn.Module) -> bool:
    """Return whether a network is in training mode and has a dropout layer with a probability above 0."""
    return any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in network.modules())


def must_call_modules(network: nn.Module) -> bool:
    """Return whether a network must be run by calling its modules, instead of with packed weights or a plan."""
    return has_global_hooks() or is_altered(network) or is_dropping(network)


def _conv_kind(layer: nn.Module) -> type[nn.Module]:
    return nn.ConvTranspose1d if isinstance(layer, nn.ConvTranspose1d) else nn.Conv1d


def check_unaltered(network: nn.Module, name: str, consequence: str) -> None:
    """Raise an error if a network has hooks, patched methods or replaced layers (see `is_altered`).

    Streaming, saving, exporting and fingerprints call this function first, because they ignore such changes.

    Args:
        network: encoder, quantizer or decoder.
        name: name of the network, for messages.
        consequence: end of the message, such as "which a stream does not call; remove them".

    Raises:
        NemoLfrError: if the network is altered.
    """
    if is_altered(network):
        raise NemoLfrError(f"{name} has forward hooks, patched methods or replaced layers, {consequence}.")


def run_encoder(encoder: nn.Module, audio: torch.Tensor, num_frames: list[int], width: int) -> torch.Tensor:
    """Call the encoder for each clip of a batch separately, and return frames [B, D, width].

    Args:
        encoder: the encoder.
        audio: samples, [B, width * samples_per_frame].
        num_frames: valid frames in each clip.
        width: number of frames in the result, including padding.
    """
    frame = audio.shape[1] // width
    results = []
    for clip, count in zip(audio, num_frames, strict=True):
        length = torch.tensor([count * frame], device=audio.device)
        results.append(encoder(audio=clip[None, : count * frame], audio_len=length)[0])
    return _stacked(results, width)


def run_decoder(decoder: nn.Module, inputs: torch.Tensor, num_frames: list[int], frame: int) -> torch.Tensor:
    """Decode each utterance of a batch [B, D, T] alone by calling the module; return audio [B, T * frame].

    Args:
        decoder: the decoder.
        inputs: dequantized frames.
        num_frames: valid frames in each utterance.
        frame: number of samples per frame.
    """
    results = []
    for codes, count in zip(inputs, num_frames, strict=True):
        length = torch.tensor([count], device=inputs.device)
        results.append(decoder(inputs=codes[None, :, :count], input_len=length)[0])
    return _stacked(results, inputs.shape[2] * frame)


def _stacked(results: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat([nn.functional.pad(result, (0, width - result.shape[-1])) for result in results])
