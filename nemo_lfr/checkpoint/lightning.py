"""Lightning's `.ckpt`: the model's config out of pickled objects that are never made.

A training checkpoint is a bare PyTorch zip. Beside the state dict its pickle holds the config as OmegaConf objects,
and whatever optimisers and callbacks keep. All of these become `Inert`, which remembers what it is given.
"""

from typing import Any

import yaml

from nemo_lfr.checkpoint.config import MAX_CONFIG_DEPTH, MAX_CONFIG_EVENTS
from nemo_lfr.errors import ConfigError


class Inert:
    """Stands for an object of any class in a pickle; whatever is done with it has no effect."""

    __slots__ = ("state",)

    def __new__(cls, *_: Any) -> "Inert":
        inert = super().__new__(cls)
        inert.state = None
        return inert

    def __call__(self, *_: Any) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass


def config_text(checkpoint: Any) -> str:
    """The model config of an unpickled training checkpoint, as YAML.

    Raises:
        ConfigError: if it has none, or one that is built to explode.
    """
    parameters = dict.get(checkpoint, "hyper_parameters") if isinstance(checkpoint, dict) else None
    config = _Plain().of(parameters)
    if isinstance(config, dict) and isinstance(config.get("cfg"), dict):  # as NeMo keeps it
        config = config["cfg"]
    if not isinstance(config, dict):
        raise ConfigError("there are no hyper_parameters; it is not a training checkpoint of NeMo's.")
    return yaml.safe_dump(config, sort_keys=False)


class _Plain:
    """OmegaConf's pickled containers -> dictionaries and lists; shared items are counted each time."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        self.count += 1
        if self.count > MAX_CONFIG_EVENTS or depth > MAX_CONFIG_DEPTH:
            raise ConfigError("its hyper_parameters are larger or deeper than any model config.")
        if isinstance(value, Inert):  # `_content` of DictConfig and ListConfig, `_val` of their leaves
            state = value.state if isinstance(value.state, dict) else {}
            value = dict.get(state, "_content", dict.get(state, "_val"))
        if isinstance(value, dict):
            return {str(key): self.of(item, depth + 1) for key, item in dict.items(value)}
        if isinstance(value, list):
            return [self.of(item, depth + 1) for item in value]
        return value if isinstance(value, str | int | float | None) else None
