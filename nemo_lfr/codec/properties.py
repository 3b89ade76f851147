"""Properties of a codec that follow from its backend."""

from dataclasses import replace
from typing import Any, cast

from nemo_lfr.codec.backend import Backend
from nemo_lfr.spec import CodecSpec, same_fingerprint


class CodecProperties:
    """Properties of a codec that follow from its backend."""

    backend: Backend[Any]

    @property
    def spec(self) -> CodecSpec:
        """Description of the tokens, with the fingerprint, as it is stored in files."""
        return replace(self.backend.spec, fingerprint=self.fingerprint)

    @property
    def name(self) -> str:
        """Source of the weights, for messages."""
        return self.backend.name

    @property
    def sample_rate(self) -> int:
        """Samples per second, Hz."""
        return self.backend.spec.sample_rate

    @property
    def samples_per_frame(self) -> int:
        """Number of samples per frame."""
        return self.backend.spec.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        """C: tokens of one frame."""
        return self.backend.spec.num_codebooks

    @property
    def levels(self) -> tuple[int, ...]:
        """FSQ levels of one codebook."""
        return self.backend.spec.levels

    @property
    def precision(self) -> str:
        """Precision that the network runs at; "fp32" gives the reference tokens."""
        return self.backend.spec.precision

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.backend.spec.frame_rate

    @property
    def codebook_size(self) -> int:
        """Entries of one codebook; 0 <= token < codebook_size."""
        return self.backend.spec.codebook_size

    @property
    def bit_rate(self) -> float:
        """Bits per second: frame_rate * num_codebooks * log2(codebook_size)."""
        return self.backend.spec.bit_rate

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and settings, 16 hex digits; empty where the backend has none."""
        return next(iter(self.backend.fingerprints()), "")

    def made(self, fingerprint: str) -> bool:
        """Return whether a fingerprint, current or older, is one of this codec."""
        known = iter(self.backend.fingerprints())
        first = next(known, fingerprint)  # a backend without fingerprints accepts all
        return same_fingerprint(first, fingerprint) or any(same_fingerprint(other, fingerprint) for other in known)

    @property
    def device(self) -> Any:
        """Device of the network."""
        return self.backend.device

    @property
    def encoder(self) -> Any:
        """The encoder module of a PyTorch backend; of other backends, the `Limits` of the encoder."""
        return self.backend.encoder

    @property
    def decoder(self) -> Any:
        """The decoder module of a PyTorch backend; of other backends, the `Limits` of the decoder."""
        return self.backend.decoder

    @property
    def quantizer(self) -> Any:
        """Quantizer module of a PyTorch backend; other backends have none."""
        return cast(Any, self.backend).quantizer
