"""Limit the work that the `${...}` interpolations of a config cause."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from nemo_lfr.errors import ConfigError, shorten

# Limits against malicious configs
MAX_RESOLVED = 1_000_000  # characters and nodes
MAX_INTERPOLATED = 500  # characters of one string with `${`. The longest one in the example configs has 144
MAX_ALL_INTERPOLATED = 20_000  # characters of all strings with `${`

_REFERENCE = re.compile(r"\$\{([^${}:]*)\}")


def check_interpolations(config: Any) -> None:
    """Check that strings with `${` are short.

    The time that OmegaConf needs to parse such a string grows with the square of its length.

    Args:
        config: YAML text; or the plain values of a config, with unresolved interpolations.

    Raises:
        ConfigError: if one string with `${` has more than MAX_INTERPOLATED characters, or all of them together have
            more than MAX_ALL_INTERPOLATED.
    """
    total = 0
    for value in _scalars(config) if isinstance(config, str) else strings(config):
        if "${" in value:
            total += len(value)
            if len(value) > MAX_INTERPOLATED or total > MAX_ALL_INTERPOLATED:
                raise ConfigError(
                    f"the string {shorten(value)!r} with '${{' is too long, or there are too many such strings; at "
                    f"most {MAX_INTERPOLATED} characters each, and {MAX_ALL_INTERPOLATED} in total, are allowed. "
                    "Write values instead."
                )


def _scalars(text: str) -> Iterator[str]:
    """Yield the scalars and keys of a YAML text, without building values from them."""
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.ScalarEvent):
            yield event.value


def strings(value: Any) -> Iterator[str]:
    """Yield the strings in nested dicts and lists, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


class Expansion:
    """Check how large a config would become if its `${...}` interpolations were resolved, without resolving them.

    Thirty lines that each refer to the previous one twice would expand to a billion characters. An interpolation
    inside another one is an error.
    """

    def __init__(self, config: Any) -> None:
        self._config = _with_text_keys(config)
        self._sizes: dict[tuple[str, ...], int | None] = {}

    def check(self, key: str) -> None:
        """Raise ConfigError if the interpolations in the value of a key form a cycle, are nested or expand too far."""
        if self._size((key,)) > MAX_RESOLVED:
            raise ConfigError(
                f"{key} cannot be resolved: its interpolations expand to more than {MAX_RESOLVED} characters; write "
                "the values instead."
            )

    def _size(self, path: tuple[str, ...]) -> int:
        if path in self._sizes:
            if (known := self._sizes[path]) is None:
                raise ConfigError(
                    f"{path[0]} cannot be resolved: its interpolations form a cycle; write a value instead."
                )
            return known
        self._sizes[path] = None
        value = self._value(path)
        size = 1
        if isinstance(value, dict | list):
            names = value if isinstance(value, dict) else range(len(value))
            size += sum(self._size((*path, str(name))) for name in names)
        elif isinstance(value, str):
            size += len(value) + sum(self._size(self._target(path, name)) for name in _REFERENCE.findall(value))
            if _REFERENCE.search(_REFERENCE.sub("", value)):
                raise ConfigError(
                    f"{path[0]} cannot be resolved: {shorten(value)!r} is a nested interpolation; write the value "
                    "instead."
                )
        self._sizes[path] = size
        return size

    @staticmethod
    def _target(path: tuple[str, ...], name: str) -> tuple[str, ...]:
        """Return the path that `${name}` in the value at `path` refers to; a name with leading dots is relative."""
        rest = name.strip().lstrip(".")
        up = len(name.strip()) - len(rest)
        base = path[: max(0, len(path) - up)] if up else ()
        return (*base, *(part for part in re.split(r"[.\[\]]+", rest) if part))

    def _value(self, path: tuple[str, ...]) -> Any:
        value = self._config
        for name in path:
            if isinstance(value, dict):
                value = value.get(name)
            elif isinstance(value, list) and name.isdigit() and int(name) < len(value):
                value = value[int(name)]
            elif isinstance(value, str) and "${" in value:
                raise ConfigError(
                    f"${{{'.'.join(path)}}} cannot be resolved, because the value of one of its parent keys is "
                    f"an interpolation, {shorten(value)!r}; write a value instead of ${{{'.'.join(path)}}}."
                )
            else:
                return None  # OmegaConf reports the missing key
        return value


def _with_text_keys(value: Any) -> Any:
    """Convert all keys of nested mappings to strings. If 1 and "1" are both keys, the value of "1" is kept."""
    if isinstance(value, dict):
        texts = {key: item for key, item in value.items() if isinstance(key, str)}
        return {key: _with_text_keys(item) for key, item in ({str(key): value[key] for key in value} | texts).items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value
