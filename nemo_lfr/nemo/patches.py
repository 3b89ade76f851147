"""Find methods of NeMo's model and of its modules that a caller has replaced."""

import logging
import sys
from collections.abc import Collection
from inspect import getattr_static
from types import ModuleType
from typing import Any

from nemo_lfr.nemo.base import NeMoAudioCodecModel, audio_codec_modules

logger = logging.getLogger(__name__)

# Classes of NeMo's modules that this package replaces
_REPLACED = ("HiFiGANEncoder", "HiFiGANDecoder", "FiniteScalarQuantizer", "GroupFiniteScalarQuantizer")


def patched_method(kind: type, names: Collection[str] | None = None) -> str | None:
    """Return "CLASS.METHOD" for a method that a caller has patched in a class of NeMo; None if there is none.

    A method is patched if its code is not from NeMo's file.

    Args:
        kind: class of NeMo, or a subclass.
        names: names of the methods to check; all by default.
    """
    for parent in kind.__mro__:
        if parent.__module__.startswith("nemo.collections."):
            file, methods = sys.modules[parent.__module__].__file__, vars(parent)
            for name in methods if names is None else names:
                method = methods.get(name)
                function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
                is_method = callable(function) and not isinstance(function, type)
                if is_method and getattr(getattr(function, "__code__", None), "co_filename", None) != file:
                    return f"{parent.__name__}.{name}"
    return None


def is_replaced(model: NeMoAudioCodecModel, name: str, kind: type) -> bool:
    """Return whether a method of a model is not the original one.

    This is the case if the method `name` is set on `model` itself, overridden in a subclass of `kind`, or patched in
    NeMo's class.
    """
    # `getattr_static`, because NeMo's decorators return another object at each access.
    is_overridden = name in vars(model) or getattr_static(type(model), name) is not getattr_static(kind, name)
    return is_overridden or patched_method(NeMoAudioCodecModel, (name,)) is not None


def is_changed(kind: Any, module: ModuleType) -> bool:
    """Return whether a class is defined outside NeMo's module `module`, or has a patched method."""
    return getattr(kind, "__module__", None) != module.__name__ or patched_method(kind) is not None


def warn_of_patched_modules() -> None:
    """Log a warning for each patched module of NeMo, because this package's modules ignore the patch."""
    for name, kind in vars(audio_codec_modules).items():
        patched = None
        if isinstance(kind, type) and kind.__module__ == audio_codec_modules.__name__:
            patched = patched_method(kind)
        if patched is None and name in _REPLACED and is_changed(kind, audio_codec_modules):
            patched = name
        if patched is not None:
            logger.warning(
                "%s of NeMo is patched, but the model has modules of nemo_lfr without this patch; patch their methods",
                patched,
            )
