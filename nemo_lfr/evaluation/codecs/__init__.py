"""Codecs that an evaluation can compare. Each kind of codec has its own module.

A codec is a subclass of `ComparedCodec` that is decorated with `register_codec`. All modules in this folder are
imported together, so they must import large packages only inside functions.
"""

from typing import TYPE_CHECKING

from nemo_lfr.errors import NemoLfrError, quoted
from nemo_lfr.evaluation.plugins import add_entry, import_submodules, in_order, load_plugins

if TYPE_CHECKING:
    from nemo_lfr.evaluation.codecs.base import ComparedCodec

_registered: dict[str, "type[ComparedCodec]"] = {}


def register_codec(codec: "type[ComparedCodec]") -> "type[ComparedCodec]":
    """Register a codec under its `kind`. This function can be used as a class decorator.

    Args:
        codec: class of the codec.

    Returns:
        `codec` itself.

    Raises:
        NemoLfrError: if another codec has the same `kind`.
    """
    add_entry(_registered, codec.kind, codec, "codec")
    return codec


def codec_kinds() -> "dict[str, type[ComparedCodec]]":
    """Return all registered codec classes by `kind`, including those of other installed packages."""
    import_submodules(__name__)
    load_plugins()
    return in_order(_registered, __name__)


def codec_usage() -> str:
    """Return the accepted values of `--codec`, separated by commas."""
    return ", ".join(codec.usage for codec in codec_kinds().values())


def open_codec(text: str, device: str | None = None) -> "ComparedCodec":
    """Open a codec.

    Args:
        text: value of `--codec`, such as "opus:16"; see `codec_usage`. For an LFR codec, the path of a `.nemo` or
            `.ckpt` file or a Hub id is enough, without the prefix "lfr:".
        device: PyTorch device; chosen automatically if None.

    Returns:
        The codec.

    Raises:
        NemoLfrError: if the codec is unknown, or if a program, a package or the weights for the codec are missing.
    """
    kinds = codec_kinds()
    kind, colon, options = text.partition(":")
    if kind in kinds:
        if colon and not options:
            raise NemoLfrError(f"--codec {quoted(text)}: there is nothing after the colon; use {kinds[kind].usage}.")
        return kinds[kind](options, device)
    if text.endswith((".nemo", ".ckpt")) or "/" in text:
        return kinds["lfr"](text, device)
    raise NemoLfrError(f"--codec {text}: unknown codec; use one of {codec_usage()}.")
