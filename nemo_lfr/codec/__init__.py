"""The `Codec` class and the backends that run its encoder and decoder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec

__all__ = ["Codec"]


def __getattr__(name: str) -> Any:
    # Imported on first use: modules in this folder that do not need `Codec` then load faster.
    if name == "Codec":
        from nemo_lfr.codec.codec import Codec

        return Codec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
