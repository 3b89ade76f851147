"""Implement NeMo's OmegaConf resolvers without NeMo.

Other programs may register other functions under the names `multiply` and `sum`. This package therefore reads the
config of a codec with its own resolvers.
"""

import operator
import re
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_lfr.errors import shorten

# Resolvers that NeMo registers with OmegaConf. All others are refused: `oc.env` could read environment variables.
NEMO_RESOLVERS = re.compile(r"\$\{(multiply|sum|gpu_name):")
PREFIX = "nemo_lfr."
MAX_NUMBER = 1 << 53


def _arithmetic(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def resolve(left: Any, right: Any) -> Any:
        for value in (left, right):
            if type(value) not in (int, float):  # with NeMo's resolver, a string could be repeated a billion times
                raise ValueError(f"{shorten(value)!r} is not a number")
        result = operation(left, right)
        if not abs(result) <= MAX_NUMBER:
            raise ValueError(f"the result {shorten(result)} is too large")
        return result

    return resolve


OmegaConf.register_new_resolver(PREFIX + "multiply", _arithmetic(operator.mul), replace=True)
OmegaConf.register_new_resolver(PREFIX + "sum", _arithmetic(operator.add), replace=True)


def with_own_resolvers(config: DictConfig) -> DictConfig:
    """Return a config in which this package's resolvers replace those of NeMo.

    NeMo's resolver `gpu_name` has no replacement, so a value that uses `gpu_name` cannot be resolved.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    replaced = _replaced(plain)
    return config if replaced == plain else DictConfig(replaced, parent=config._get_parent())


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return NEMO_RESOLVERS.sub(lambda match: f"${{{PREFIX}{match[1]}:", value)
    if isinstance(value, dict):
        return {key: _replaced(item) for key, item in value.items()}
    return [_replaced(item) for item in value] if isinstance(value, list) else value
