"""Exceptions of this package, and helpers for their messages.

A good message names the file or argument, its value, what is wrong with it, and what to do.
"""

import re
from functools import cache
from typing import TypedDict

# Packages of the NeMo integration. NeMo installs the last two itself. They are listed because `pyproject.toml`
# excludes some of their releases.
NEMO_PACKAGES = ("nemo_toolkit[tts]", "lightning", "pytorch-lightning")


class NemoLfrError(ValueError):
    """Base class of this package's exceptions.

    Control characters in the message are replaced, because it may contain untrusted file names (see `printable`).

    If the error was raised in a worker process of a data loader, PyTorch replaces the message by a traceback. This
    class keeps only the last line of the traceback.

    Attributes:
        source: name of the utterance that caused the error; None if unknown, or if no utterance caused it.
    """

    source: str | None = None

    def __init__(self, *args: object) -> None:
        super().__init__(*(_one_line(value) if isinstance(value, str) else value for value in args))


def _one_line(message: str) -> str:
    if message.startswith("Caught ") and "\n" in message:
        message = message.strip().rpartition("\n")[2]
    return printable(message)


class OutputExistsError(NemoLfrError):
    """Output file that exists and may not be replaced."""


class AudioError(NemoLfrError):
    """Waveform or audio file that cannot be read or encoded.

    This class is also raised for an invalid Lhotse cut or label.
    """


class TokensError(NemoLfrError):
    """Tokens with a shape, type or range that this codec cannot decode."""


class TokenFileError(NemoLfrError):
    """Token file that is missing or damaged, has an unknown version, or was written by another codec."""


class EntropyModelError(TokenFileError):
    """Entropy model (used to compress token files) that is damaged, missing, or made for another codec."""


class CheckpointError(NemoLfrError):
    """Checkpoint that cannot be found, read or written, or that does not match its own config."""


class ConfigError(NemoLfrError):
    """Config with a missing, unknown or contradictory value.

    This class is also raised for a manifest, table or folder of data that cannot be used.
    """


class MissingExtraError(NemoLfrError, ImportError):
    """Optional dependency that is needed, but is not installed or cannot be imported."""


class ServerError(NemoLfrError):
    """Raised by `nemo_lfr.client` if a request or stream fails.

    Subclasses describe the most common reasons. This class itself is raised after an error in the server, or if an
    answer does not follow the protocol.
    """


class ServerRefusedError(ServerError):
    """Raised if the server refuses the input, a parameter or the access token. Retrying does not help."""


class ServerFullError(ServerError):
    """Raised if the server already processes its maximum number of streams or files. Try again later."""


class ServerShutdownError(ServerError):
    """Raised if the server is shutting down. Connect to another server."""


class ServerLostError(ServerError):
    """Raised if the server cannot be reached, does not answer in time, or closes the connection without a reason."""


class Failure(TypedDict):
    """Record of one failure, for JSON output and for `failures.jsonl`.

    Attributes:
        input: path or name of the input, model or output that the failure concerns.
        error: the message, on one line.
        type: name of the exception's class, such as "AudioError".
    """

    input: str
    error: str
    type: str


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun, for messages: "1 file", "2 files".

    Args:
        count: the count.
        noun: noun in the singular.
        plural: the plural (default: the noun with an "s").
    """
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def failure(source: object, error: BaseException) -> Failure:
    """Return the record of a failure.

    Args:
        source: path or name of the input.
        error: the exception that the input caused.
    """
    return {"input": str(source), "error": message_of(error), "type": type(error).__name__}


def message_of(error: BaseException) -> str:
    """Return an exception's message on one line.

    If an OSError names a file, the message starts with this name. An empty message is replaced by the name of the
    exception's class.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}." if error.filename is not None else f"{error.strerror}."
    return " ".join(text.split()) or type(error).__name__


def shorten(text: object, length: int = 80) -> str:
    """Shorten untrusted text to one printable line for an error message.

    Args:
        text: any object; `str` is applied to it.
        length: maximum number of characters before "...".
    """
    try:
        text = str(text)
    except ValueError:  # an integer of thousands of digits
        text = type(text).__name__
    return printable(text[:length]) + ("..." if len(text) > length else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if the line is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def quoted(value: object, length: int = 80) -> str:
    """Return a value for an error message, shortened, and in quotes if it is a string.

    Quotes show that the string "1.0" is not the number 1.0.

    Args:
        value: any object.
        length: maximum number of characters before "...".
    """
    return shorten(repr(value) if isinstance(value, str) else value, length)


def printable(text: str) -> str:
    """Replace characters that are not printable, such as control characters and line ends, with "?"."""
    return "".join(char if char.isprintable() else "?" for char in text)


def install_command(*packages: str) -> str:
    """Return the pip command that installs optional packages.

    The command names the packages instead of an extra such as `nemo_lfr[evaluate]`, so that it also works if nemo_lfr
    was installed from a clone or a local file. It includes the version limits of nemo_lfr.

    Args:
        packages: names on the package index, with their extras, such as "nemo_toolkit[tts]".
    """
    return " ".join(["pip install", *(_quoted(_requirements().get(_key(name), name)) for name in packages)])


@cache
def _requirements() -> dict[str, str]:
    """Return the requirements of nemo_lfr by package name; the result is empty if nemo_lfr is not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("nemo-lfr") or []
    except PackageNotFoundError:  # imported from a clone that is not installed
        return {}
    requirements: dict[str, str] = {}
    for line in lines:
        requirement = line.partition(";")[0].strip()
        requirements.setdefault(_key(requirement), requirement)
    return requirements


def _key(requirement: str) -> str:
    """Return the normalized package name in a requirement, such as "scikit-learn" for "scikit_learn>=1.0"."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def _quoted(requirement: str) -> str:
    return requirement if re.fullmatch(r"[\w.-]+", requirement) else f'"{requirement}"'
