"""Codecs: a network, a spec and a backend behind one API."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec

__all__ = ["Codec"]


def __getattr__(name: str) -> Any:
    # On first use, because other modules of this folder need less than `Codec` does.
    if name == "Codec":
        from nemo_lfr.codec.codec import Codec

        return Codec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
