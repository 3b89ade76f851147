"""Interface of a PyTorch backend that streams use."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer


class StreamModules(Protocol):
    """Modules and settings that streams need from a PyTorch backend."""

    @property
    def name(self) -> str:
        """Source of the weights, for messages."""

    @property
    def device(self) -> torch.device:
        """Device of the modules."""

    @property
    def encoder(self) -> HiFiGANEncoder:
        """Audio -> encoded frames."""

    @property
    def quantizer(self) -> FiniteScalarQuantizer | GroupFiniteScalarQuantizer:
        """Encoded frames <-> tokens."""

    @property
    def decoder(self) -> HiFiGANDecoder:
        """Dequantized frames -> audio."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which modules run at the codec's precision."""

    def computing(self) -> AbstractContextManager[None]:
        """Return a context that isolates the computation from the caller's settings."""
