"""Exceptions for bad input, and helpers that word their messages.

Each message names the value that was passed, what was expected and what to do.
"""

import re
from functools import cache

# What the NeMo integration needs. The last two are named because some of their releases are excluded.
NEMO_PACKAGES = ("nemo_toolkit[tts]", "lightning", "pytorch-lightning")


class NemoLfrError(ValueError):
    """Base of every error that this package raises for bad input."""


class AudioError(NemoLfrError):
    """A waveform, or an audio file, that cannot be encoded."""


class TokensError(NemoLfrError):
    """Tokens that this codec cannot decode."""


class TokenFileError(NemoLfrError):
    """A token file that is damaged, unknown, or made for another codec."""


class EntropyModelError(TokenFileError):
    """An entropy model that is damaged, missing, or for another codec."""


class CheckpointError(NemoLfrError):
    """A checkpoint that cannot be read, or does not hold the codec that its config describes."""


class ConfigError(NemoLfrError):
    """A model config with a missing, unknown or contradictory value."""


class MissingExtraError(NemoLfrError, ImportError):
    """A part of the package needs an optional dependency that is not installed."""


def shorten(text: object, length: int = 80) -> str:
    """Shorten untrusted text to one printable line for an error message."""
    try:
        text = str(text)
    except ValueError:  # an integer of thousands of digits
        text = type(text).__name__
    return printable(text[:length]) + ("..." if len(text) > length else "")


def printable(text: str) -> str:
    """Replace characters that a terminal would act on: controls, line ends and changes of writing direction."""
    return "".join(char if char.isprintable() else "?" for char in text)


def install_command(*packages: str) -> str:
    """Return the pip command that installs optional packages.

    The packages themselves are named rather than one of our extras, so that the command works however this package
    was installed: from a clone, from a wheel or by hand.

    Args:
        packages: names on the package index, with their extras, such as "nemo_toolkit[tts]".
    """
    return " ".join(["pip install", *(_quoted(_requirements().get(_key(name), name)) for name in packages)])


@cache
def _requirements() -> dict[str, str]:
    """Return our distribution's requirements by package name; empty where the package is not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("nemo-lfr") or []
    except PackageNotFoundError:  # run from a clone, by its path
        return {}
    requirements: dict[str, str] = {}
    for line in lines:
        requirement = line.partition(";")[0].strip()
        requirements.setdefault(_key(requirement), requirement)
    return requirements


def _key(requirement: str) -> str:
    """Return the normalized name of the package that a requirement names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def _quoted(requirement: str) -> str:
    return requirement if re.fullmatch(r"[\w.-]+", requirement) else f'"{requirement}"'
