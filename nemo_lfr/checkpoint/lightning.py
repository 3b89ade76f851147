"""Read the model config of a Lightning `.ckpt` without creating the pickled objects.

The pickle contains the state dict, the config as OmegaConf objects, and the state of optimizers and callbacks. In
place of each object that is neither a tensor nor a plain container, the unpickler creates an `Inert` placeholder,
which only stores the object's state.
"""

from collections.abc import Collection
from typing import Any

import yaml

from nemo_lfr.checkpoint.config import MAX_CONFIG_DEPTH, MAX_CONFIG_EVENTS, PARTS
from nemo_lfr.errors import ConfigError, quoted


class Inert:
    """Placeholder for a pickled object of any class.

    The placeholder stores the object's state and, for an object of a dict subclass, its items. Everything else that
    the pickle does with the object is ignored.
    """

    __slots__ = ("items", "state")
    items: dict[Any, Any]
    state: Any

    def __new__(cls, *_: Any) -> "Inert":
        """Return a new placeholder; the arguments are ignored."""
        inert = super().__new__(cls)
        inert.state = None
        inert.items = {}
        return inert

    def __call__(self, *_: Any) -> "Inert":
        """Return a placeholder for the result of a pickled call."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, item: Any) -> None:
        """Ignore an item that the pickle appends to a list-like object."""


class InertNamespace(Inert):
    """Placeholder for an `argparse.Namespace`, in which older versions of Lightning stored hyperparameters."""

    __slots__ = ()


def config_text(checkpoint: Any, names: Collection[str]) -> str:
    """Return the model config of an unpickled training checkpoint as YAML.

    Args:
        checkpoint: the unpickled checkpoint.
        names: names of the tensors in its state dict.

    Raises:
        ConfigError: if the checkpoint has no config, or its config is too large or too deeply nested. Also if the
            codec is a submodule of the model in the checkpoint.
    """
    own, inside = f"{PARTS[0]}.", f".{PARTS[0]}."
    owner = next((name.partition(inside)[0] for name in names if inside in name), None)
    if owner is not None and not any(name.startswith(own) for name in names):
        raise ConfigError(
            f"the codec is the submodule {quoted(owner)} of another model; load this model with its own class, and "
            "save the submodule as a .nemo file (save_to)."
        )
    config = _Plain().of(_cfg(checkpoint))
    if not isinstance(config, dict):
        config = _Plain().of(_parameters(checkpoint))
    if not isinstance(config, dict):
        raise ConfigError(
            "the file has no hyper_parameters, so it is not a training checkpoint of NeMo; build a model from a "
            "config, and pass the state dict of the file to its load_state_dict."
        )
    text: str = yaml.safe_dump(config, sort_keys=False)
    return text


def has_dict_config(checkpoint: Any) -> bool:
    """Return whether NeMo can build a model from an unpickled training checkpoint.

    NeMo needs the hyperparameter `cfg`, and it must be a `DictConfig`.
    """
    cfg = _cfg(checkpoint)
    return isinstance(cfg, Inert) and isinstance(cfg.state, dict) and "_content" in cfg.state


def _parameters(checkpoint: Any) -> Any:
    parameters = dict.get(checkpoint, "hyper_parameters") if isinstance(checkpoint, dict) else None
    if isinstance(parameters, Inert):
        return _content(parameters) or parameters.state
    return parameters


def _cfg(checkpoint: Any) -> Any:
    """Return the hyperparameter `cfg`, in which NeMo saves the config; None if there is none."""
    parameters = _parameters(checkpoint)
    return dict.get(parameters, "cfg") if isinstance(parameters, dict) else None


class _Plain:
    """Convert pickled containers to dicts and lists, and limit the total number of values."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        """Convert an unpickled value to dicts, lists, strings, numbers and None.

        Objects of all other types become None.

        Raises:
            ConfigError: if there are more than MAX_CONFIG_EVENTS values or more than MAX_CONFIG_DEPTH levels.
        """
        self.count += 1
        if self.count > MAX_CONFIG_EVENTS or depth > MAX_CONFIG_DEPTH:
            raise ConfigError(
                f"the hyper_parameters are too large or too deeply nested; at most {MAX_CONFIG_EVENTS} values and "
                f"{MAX_CONFIG_DEPTH} levels are allowed."
            )
        if isinstance(value, Inert):
            value = _content(value)
        if isinstance(value, dict):
            return {str(key): self.of(item, depth + 1) for key, item in dict.items(value)}
        if isinstance(value, list):
            return [self.of(item, depth + 1) for item in value]
        return value if isinstance(value, str | int | float | None) else None


def _content(placeholder: Inert) -> Any:
    """Return the content of a placeholder for an OmegaConf object, a dict subclass or a Namespace; otherwise None."""
    state = placeholder.state if isinstance(placeholder.state, dict) else {}
    for key in ("_content", "_val"):  # of a container, and of a leaf
        if key in state:
            return dict.get(state, key)
    return placeholder.items or (state if isinstance(placeholder, InertNamespace) else None)
