"""Registry of custom discriminators, losses and metrics (components) for training configs.

In a training config, the key `_target_` names the class of a component. The value is the import path of the class,
such as `my_package.MyDiscriminator`, or a name under which the class was registered with `register_component`. Only a
config that the user passes can cause an import (`import_components`). A config from a checkpoint can use only
registered and built-in components, so that a checkpoint cannot choose which code to run.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar, overload

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from nemo_lfr.checkpoint import is_from_checkpoint
from nemo_lfr.errors import ConfigError, quoted, shorten
from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.settings import MAX, Range, check_settings

_REGISTERED: dict[str, type[nn.Module]] = {}
# Names of the keyword arguments of losses and metrics, as in NeMo's losses
AUDIO_ARGUMENTS = ("audio_real", "audio_gen", "audio_len")

Component = TypeVar("Component", bound=nn.Module)
ComponentClass = TypeVar("ComponentClass", bound=type[nn.Module])


@overload
def register_component(component: ComponentClass, *, name: str | None = None) -> ComponentClass: ...
@overload
def register_component(*, name: str) -> Callable[[ComponentClass], ComponentClass]: ...
def register_component(component: Any = None, *, name: str | None = None) -> Any:
    """Register the class of a discriminator, loss or metric. This function can be used as a class decorator.

    If another class was registered under the same name, the new class replaces it.

    Args:
        component: a subclass of `torch.nn.Module`.
        name: value of `_target_` for this class; by default the import path of the class.

    Returns:
        `component` itself, or a decorator if `component` is not passed.

    Raises:
        ConfigError: if `component` is not a subclass of `torch.nn.Module`.
    """
    if component is None:
        return lambda decorated: register_component(decorated, name=name)
    _check_class(component, "the component")
    _REGISTERED[name or f"{component.__module__}.{component.__qualname__}"] = component
    return component


def unregister_component(name: str) -> None:
    """Remove a component from the registry. An unknown name is ignored."""
    _REGISTERED.pop(name, None)


def registered_components(config: Mapping[str, Any]) -> dict[str, type[nn.Module]]:
    """Return the registered components that a model config uses, as a dictionary from name to class."""
    targets = {target for _, target in _targets(config)}
    return {target: _REGISTERED[target] for target in sorted(targets) if target in _REGISTERED}


def import_components(config: Mapping[str, Any], built_in: Collection[str]) -> None:
    """Import and register the components that a training config uses.

    Sections of the config that were read from a checkpoint are skipped.

    Args:
        config: model config.
        built_in: values of `_target_` for built-in classes, which are not imported.

    Raises:
        ConfigError: if a class cannot be imported or is not a subclass of `torch.nn.Module`.
    """
    for where, target in _targets(config, own=True):
        if target not in built_in and target not in _REGISTERED:
            _REGISTERED[target] = _imported(target, where)


def _imported(target: str, where: str) -> type[nn.Module]:
    module, _, name = target.rpartition(".")
    if not module:
        raise ConfigError(
            f"{where}: _target_ {shorten(target)!r} is not registered; register it, or use its import path, "
            "package.Class."
        )
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # importing a module may raise anything
        reason = shorten(" ".join(str(error).split()), 200)
        raise ConfigError(
            f"{where}: _target_ {shorten(target)!r} cannot be imported ({reason}); install its package, or add its "
            "folder to PYTHONPATH."
        ) from error
    _check_class(found, f"{where}: _target_ {shorten(target)!r}")
    component: type[nn.Module] = found
    return component


def _check_class(component: Any, what: str) -> None:
    if not (isinstance(component, type) and issubclass(component, nn.Module)):
        raise ConfigError(f"{what} is {described(component)}; pass a subclass of torch.nn.Module.")


def _targets(config: Mapping[str, Any], own: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the name of the section and the `_target_` of each component in a model config.

    Args:
        config: model config, or a part of a model config.
        own: whether to leave out sections that were read from a checkpoint.
    """
    for key in ("discriminator", "generator_loss", "discriminator_loss", "losses", "metrics"):
        section = _plain_section(config, key, own)
        if key in ("losses", "metrics"):
            for name, item in section.items() if isinstance(section, dict) else ():
                yield from _targets_in(f"{key}.{name}", item)
        else:
            yield from _targets_in(key, section)


def _plain_section(config: Mapping[str, Any], key: str, own: bool) -> Any:
    """Return a section of a config as Python values.

    The result is None if the section cannot be resolved, or if `own` is set and the section was read from a
    checkpoint.
    """
    try:
        section = config.get(key)
        if not OmegaConf.is_config(section):
            return section
        return None if own and is_from_checkpoint(section) else OmegaConf.to_container(section, resolve=True)
    except OmegaConfBaseException:
        return None


def _targets_in(where: str, section: Any) -> Iterator[tuple[str, str]]:
    if isinstance(section, dict) and isinstance(target := section.get("_target_"), str):
        yield where, target
        inner = section.get("discriminators")
        for item in inner if isinstance(inner, list) else ():
            yield from _targets_in(where, item)


def build_component(
    section: Mapping[str, Any], where: str, base: type[Component], built_in: Collection[str] = ()
) -> Component:
    """Build a registered component from its section of a training config.

    Args:
        section: `_target_` and the arguments of the constructor.
        where: name of the section, for error messages.
        base: required base class of the component.
        built_in: values of `_target_` for built-in classes in this section, for error messages.

    Returns:
        The component.

    Raises:
        ConfigError: if the component is not registered, is not a subclass of `base`, or cannot be built with these
            arguments.
    """
    target = section.get("_target_") if isinstance(section, Mapping) else None
    if not isinstance(target, str):
        raise ConfigError(f"{where} is {quoted(section)}; pass a mapping with the key _target_.")
    component = _REGISTERED.get(target)
    if component is None:
        known = ", ".join(sorted(built_in))
        raise ConfigError(
            f"{where}: _target_ {shorten(target)!r} is not registered. If this is your own class, first pass it to "
            f"nemo_lfr.training.components.register_component.{f' Built-in: {known}.' if known else ''}"
        )
    what = f"{where}: {target}"
    if not issubclass(component, base):
        raise ConfigError(
            f"{what} is not a subclass of {base.__module__}.{base.__qualname__}; derive it from this class."
        )
    arguments = {str(key): value for key, value in section.items() if not str(key).startswith("_")}
    try:
        inspect.signature(component).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{what} cannot be built: {error}; correct the arguments in the config.") from error
    try:
        return component(**arguments)
    except Exception as error:  # custom constructors may raise anything
        reason = shorten(" ".join(str(error).split()), 200)
        raise ConfigError(f"{what} cannot be built with the arguments {shorten(arguments, 200)}: {reason}") from error


def check_accepts(method: Callable[..., Any], what: str, arguments: Sequence[str], *positional: str) -> None:
    """Check that a method of a component can be called with certain arguments.

    Args:
        method: bound method.
        what: config section and class of the component, for the error message.
        arguments: names of the keyword arguments.
        *positional: names of the positional arguments.

    Raises:
        ConfigError: if the method does not accept the arguments.
    """
    try:
        inspect.signature(method).bind(*positional, **dict.fromkeys(arguments))
    except TypeError as error:
        call = f"{method.__name__}({', '.join([*positional, *(f'{name}=' for name in arguments)])})"
        raise ConfigError(
            f"{what} cannot be called as {call}: {error}; define the method with these arguments."
        ) from error


def check_scalar(value: Any, what: str) -> torch.Tensor:
    """Convert the result of a component to a scalar tensor.

    Args:
        value: result of the component.
        what: config section and class of the component, for the error message.

    Raises:
        ConfigError: if the result is neither a number nor a scalar tensor.
    """
    if isinstance(value, int | float):
        return torch.tensor(float(value))
    if not isinstance(value, torch.Tensor) or value.dim():
        raise ConfigError(f"{what} returned {described(value)}; return a scalar tensor, such as error.mean().")
    return value


def described(value: Any) -> str:
    """Describe a value by its type or shape, for an error message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__qualname__', value)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(described(item) for item in value[:3]) or 'nothing'}"
    return f"a value of type {type(value).__name__}"


class ScoreLoss(nn.Module):
    """Custom loss that is computed from discriminator scores.

    Args:
        section: `_target_` and the arguments of the constructor.
        where: key of the section in the config.
        arguments: names of the keyword arguments of the loss. The value of each argument is a list of scores with one
            tensor [B, ...] per network.
        built_in: values of `_target_` for the built-in losses, for error messages.

    Raises:
        ConfigError: if the loss is not registered, is not an `nn.Module`, cannot be built from `section`, or does not
            accept `arguments`.
    """

    def __init__(
        self, section: Mapping[str, Any], where: str, arguments: Sequence[str], built_in: Collection[str]
    ) -> None:
        super().__init__()
        self.loss = build_component(section, where, nn.Module, built_in).requires_grad_(False)
        self.what, self.arguments = f"{where}: {section['_target_']}", arguments
        check_accepts(self.loss.forward, self.what, arguments)

    def forward(self, *scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute the loss.

        Args:
            *scores: one list of scores for each name in `arguments`, in this order. A list has one tensor [B, ...] per
                network.

        Returns:
            A scalar.

        Raises:
            ConfigError: if the loss does not return a scalar.
        """
        named = {name: list(value) for name, value in zip(self.arguments, scores, strict=True)}
        return check_scalar(self.loss(**named), self.what)


class AudioTerms(nn.Module):
    """Custom losses or metrics that compare recordings with reconstructions.

    Each loss or metric ("term") is a `torch.nn.Module` with frozen parameters. It is called like NeMo's losses, as
    `module(audio_real=..., audio_gen=..., audio_len=...)`, with signals [B, T_audio] and lengths in samples [B], and
    returns a scalar.

    Args:
        sections: config section of each term, by name; None if there are no terms. A name consists of a letter and
            further letters, digits and underscores. A section has `_target_` and the arguments of the constructor.
        where: key of the sections in the config, "losses" or "metrics".
        reserved: names of built-in terms, which custom terms must not use.

    Raises:
        ConfigError: if `sections` or a name is invalid, or if a component cannot be built or called as above.
    """

    def __init__(self, sections: Mapping[str, Any] | None, where: str, reserved: Collection[str]) -> None:
        super().__init__()
        sections = {} if sections is None else sections
        if not isinstance(sections, Mapping):
            raise ConfigError(f"{where} is {quoted(sections)}; pass a mapping from names to sections.")
        self.terms = nn.ModuleDict()
        self._what: dict[str, str] = {}
        for name, section in sections.items():
            if not re.fullmatch(r"[A-Za-z]\w*", str(name)) or name in reserved or hasattr(nn.ModuleDict, str(name)):
                raise ConfigError(
                    f"{where}: the name {shorten(str(name))!r} is reserved, or is not a letter followed by letters, "
                    "digits and underscores; choose another."
                )
            module = build_component(section, f"{where}.{name}", nn.Module).requires_grad_(False)
            self._what[name] = f"{where}.{name}: {section['_target_']}"
            check_accepts(module.forward, self._what[name], AUDIO_ARGUMENTS)
            self.terms[name] = module

    def forward(
        self, real: Spectra, gen: Spectra, audio_len: torch.Tensor | None, names: Collection[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute the terms.

        Args:
            real: recordings [B, T_audio].
            gen: reconstructions [B, T_audio].
            audio_len: number of valid samples of each example, shape [B]; None if all samples are valid.
            names: names of the terms to compute; by default all terms.

        Returns:
            A dictionary from the name of each term to a scalar.

        Raises:
            ConfigError: if a term is not a scalar, or has no gradient although the reconstructions require gradients.
        """
        if audio_len is None:
            audio_len = torch.full(real.audio.shape[:1], real.audio.shape[1], device=real.audio.device)
        values = {}
        for name, module in self.terms.items():
            if names is None or name in names:
                value = module(audio_real=real.audio, audio_gen=gen.audio, audio_len=audio_len)
                values[name] = check_scalar(value, self._what[name])
                if torch.is_grad_enabled() and gen.audio.requires_grad and not values[name].requires_grad:
                    raise ConfigError(
                        f"{self._what[name]} has no gradient with respect to audio_gen; compute it with "
                        "differentiable operations, and do not detach audio_gen."
                    )
        return values


def split_scales(sections: Any) -> tuple[Any, dict[str, float]]:
    """Separate the weights of custom losses from the arguments of their constructors.

    Args:
        sections: value of the key `losses` in the config. In each section, the key `scale` is the weight of the loss.

    Returns:
        The sections without `scale`, and a dictionary from names to weights. The default weight is 1.0. If `sections`
        is not a mapping, it is returned unchanged, with an empty dictionary.

    Raises:
        ConfigError: if a scale is not a number.
    """
    if not isinstance(sections, Mapping):
        return sections, {}
    rest: dict[str, Any] = {}
    scales: dict[str, float] = {}
    for name, section in sections.items():
        rest[name] = section
        if isinstance(section, Mapping):
            rest[name] = {key: value for key, value in section.items() if key != "scale"}
            scale = section.get("scale", 1.0)
            check_settings({"scale": scale}, {"scale": Range(False, -MAX)}, f"losses.{name}")
            scales[name] = float(scale)
    return rest, scales
