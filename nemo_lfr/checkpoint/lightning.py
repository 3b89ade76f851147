"""Read the model config of Lightning's `.ckpt` without creating the pickled objects.

A training checkpoint is a plain PyTorch zip. Its pickle contains the state dict, the config as OmegaConf objects, and
the state of optimizers and callbacks. All objects of these classes become `Inert`, which only stores its state.
"""

from typing import Any

import yaml

from nemo_lfr.checkpoint.config import MAX_CONFIG_DEPTH, MAX_CONFIG_EVENTS
from nemo_lfr.errors import ConfigError


class Inert:
    """Placeholder for a pickled object of any class; operations on it have no effect."""

    __slots__ = ("state",)

    def __new__(cls, *_: Any) -> "Inert":
        """Return a placeholder, whatever the arguments."""
        inert = super().__new__(cls)
        inert.state = None
        return inert

    def __call__(self, *_: Any) -> "Inert":
        """Return a placeholder for the result of a pickled call."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Ignore an item of a pickled list."""


def config_text(checkpoint: Any) -> str:
    """Return the model config of an unpickled training checkpoint as YAML.

    Raises:
        ConfigError: if it has no config, or one that expands to an excessive size.
    """
    parameters = dict.get(checkpoint, "hyper_parameters") if isinstance(checkpoint, dict) else None
    config = _Plain().of(parameters)
    if isinstance(config, dict) and isinstance(config.get("cfg"), dict):  # the layout that NeMo saves
        config = config["cfg"]
    if not isinstance(config, dict):
        raise ConfigError("it has no hyper_parameters, so it is not a training checkpoint of NeMo.")
    text: str = yaml.safe_dump(config, sort_keys=False)
    return text


class _Plain:
    """Convert OmegaConf's pickled containers to dicts and lists; shared items count each time they occur."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        """Convert a value; raise ConfigError if it is larger or more deeply nested than any model config."""
        self.count += 1
        if self.count > MAX_CONFIG_EVENTS or depth > MAX_CONFIG_DEPTH:
            raise ConfigError("its hyper_parameters are larger or more deeply nested than any model config.")
        if isinstance(value, Inert):  # `_content` of DictConfig and ListConfig, `_val` of their leaves
            state = value.state if isinstance(value.state, dict) else {}
            value = dict.get(state, "_content", dict.get(state, "_val"))
        if isinstance(value, dict):
            return {str(key): self.of(item, depth + 1) for key, item in dict.items(value)}
        if isinstance(value, list):
            return [self.of(item, depth + 1) for item in value]
        return value if isinstance(value, str | int | float | None) else None
