"""Give the codec's modules NeMo's types: each has those of the NeMo class whose name it bears."""

from typing import Any

from nemo.collections.tts.modules import audio_codec_modules
from torch import nn

from nemo_lfr.modules import neural_module


def lookup_types(module: nn.Module, direction: str) -> dict[str, Any]:
    """Return NeMo's types of a module.

    Args:
        module: an encoder, quantizer or decoder of ours, or of a class derived from one.
        direction: "input_types" or "output_types".
    """
    for ours in type(module).__mro__:
        if (stock := getattr(audio_codec_modules, ours.__name__, None)) is not None:
            types: dict[str, Any] = getattr(stock, direction).fget(module)  # properties that depend on no instance
            return types
    raise NotImplementedError(f"NeMo has no {type(module).__name__}.")


neural_module.type_lookup = lookup_types
