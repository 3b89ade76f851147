"""Errors a user can cause. Each text names what came, what was expected and what to do."""


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


clip = shorten  # the old name


def printable(text: str) -> str:
    """Replace characters that a terminal would act on: controls, line ends and changes of writing direction."""
    return "".join(char if char.isprintable() else "?" for char in text)
