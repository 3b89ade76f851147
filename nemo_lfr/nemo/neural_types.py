"""NeMo's neural types for the encoder, quantizer and decoder of this package.

Each class of `nemo_lfr.modules` has the types of the NeMo class with the same name, such as `HiFiGANEncoder`.
"""

from typing import Any

from nemo.collections.tts.modules import audio_codec_modules
from torch import nn

from nemo_lfr.modules import neural_module


def lookup_types(module: nn.Module, attribute: str) -> dict[str, Any]:
    """Return the neural types of the inputs or the outputs of a module.

    Args:
        module: encoder, quantizer or decoder of this package, or an instance of a subclass.
        attribute: "input_types" or "output_types".

    Returns:
        The NeMo type of each input or output, by name.

    Raises:
        NotImplementedError: if no class of NeMo has the same name as the module's class or one of its base classes.
    """
    for ours in type(module).__mro__:
        if (stock := getattr(audio_codec_modules, ours.__name__, None)) is not None:
            types: dict[str, Any] = getattr(stock, attribute).fget(module)  # these properties do not use the instance
            return types
    raise NotImplementedError(f"NeMo has no class {type(module).__name__}.")


neural_module.type_lookup = lookup_types
