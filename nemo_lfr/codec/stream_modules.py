"""Interface through which streams use a PyTorch backend, and checks of lookahead arguments and networks."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from nemo_lfr.codec.ambient import check_weights
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.modules.altered import STREAM, check_unaltered, is_dropping
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from nemo_lfr.modules.weights import check_once


class StreamModules(Protocol):
    """Modules and settings that streams need from a PyTorch backend."""

    @property
    def name(self) -> str:
        """Name of the codec for messages: usually the path or Hub name of its checkpoint."""

    @property
    def device(self) -> torch.device:
        """Device of the modules."""

    @property
    def encoder(self) -> HiFiGANEncoder:
        """Encoder module, from audio to encoded frames."""

    @property
    def quantizer(self) -> FiniteScalarQuantizer | GroupFiniteScalarQuantizer:
        """Quantizer module, between encoded frames and tokens."""

    @property
    def decoder(self) -> HiFiGANDecoder:
        """Decoder module, from dequantized frames to audio."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context manager within which modules run at the codec's precision."""

    def computing(self) -> AbstractContextManager[None]:
        """Return a context manager that keeps the caller's settings, such as autocast, from affecting the modules."""


def check_lookahead(**values: int | None) -> None:
    """Check the lookahead arguments of a stream. They are passed by keyword, because messages contain their names.

    Raises:
        NemoLfrError: if a value is neither None nor an integer of at least 0.
    """
    for name, value in values.items():
        is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and (not is_whole or value < 0):
            raise NemoLfrError(f"{name} is {shorten(repr(value))}; pass an integer (frames) of 0 or more, or None.")


def check_network(network: nn.Module, name: str) -> None:
    """Check that a stream can run a network.

    A stream uses the weights of the network without calling its modules, so it would ignore hooks and replaced layers.

    Raises:
        NemoLfrError: if the network has hooks, replaced layers or active dropout, or `check_weights` rejects it.
    """

    def check() -> bool:
        check_weights(network, name)
        check_unaltered(network, name, STREAM)
        if is_dropping(network):
            raise NemoLfrError(
                f"{name} is in training mode and has dropout, which a stream does not apply; call its eval() first."
            )
        return True

    check_once(network, "streams", check)
