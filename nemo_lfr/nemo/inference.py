"""Encode and decode with the NeMo model."""

from typing import Any

import torch

from nemo_lfr.checkpoint import PARTS
from nemo_lfr.checkpoint.names import unwrapped
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.modules.altered import is_altered
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from nemo_lfr.nemo.base import BaseModel, NeMoAudioCodecModel
from nemo_lfr.nemo.patches import is_replaced, patched_method

# Classes of the modules that `Codec` can run. A model may have other modules, which a user assigned to it.
QUANTIZERS = (FiniteScalarQuantizer, GroupFiniteScalarQuantizer)
_CLASSES: dict[str, tuple[type, ...]] = {
    "audio_encoder": (HiFiGANEncoder,),
    "vector_quantizer": QUANTIZERS,
    "audio_decoder": (HiFiGANDecoder,),
}

# Methods that NeMo's `encode` and `decode` call one after another. `Codec` does not call them.
_STEPS = ("encode_audio", "preprocess_audio", "pad_audio", "quantize", "dequantize", "decode_audio")


class Inference(BaseModel):
    """Mixin with the methods that encode and decode.

    `encode`, `decode` and `forward` normally run a `Codec`. A `Codec` would ignore some changes that a user may make:
    an encoder, quantizer or decoder of another class, a changed quantizer, or an overridden step such as `quantize`.
    After such a change, the three methods work as in NeMo.
    """

    @property
    def codec(self) -> Codec[torch.Tensor]:
        """Standalone `Codec` that uses this model's modules.

        The same object is returned until a module, the sample rate or the device changes.

        Raises:
            ConfigError: if a module was replaced by one that is not of this package, the quantizer was changed, or a
                step such as `quantize` was overridden.
        """
        if (reason := self._alteration()) is not None:
            raise ConfigError(
                f"{reason}, so the model has no standalone codec; call the model's encode without num_codebooks, and "
                "its decode without num_codebooks and audio_len."
            )
        encoder, quantizer, decoder = (unwrapped(getattr(self, name)) for name in PARTS)
        made_of = (encoder, quantizer, decoder, self.sample_rate, next(decoder.parameters()).device)
        kept, codec = self._codec or (None, None)
        # Return the same object each time, because streams can only be batched if they belong to the same codec.
        if codec is None or kept != made_of:
            codec = Codec(TorchBackend(encoder, quantizer, decoder, self.sample_rate))  # type: ignore[arg-type]
            self._codec = made_of, codec
        return codec

    def _alteration(self) -> str | None:
        """Describe the first change to this model that `Codec` would ignore; return None if there is none."""
        for name in PARTS:
            part = getattr(self, name)
            if not isinstance(part, torch.nn.Module) or not isinstance(unwrapped(part), _CLASSES[name]):
                return f"the model's {name} is {type(part).__name__}, not a module of nemo_lfr"
        quantizer: Any = unwrapped(self.vector_quantizer)
        if is_altered(quantizer) or not quantizer.is_consistent:
            return "the model's vector_quantizer has hooks, changed buffers, replaced layers or overridden methods"
        step = next((name for name in _STEPS if is_replaced(self, name, Inference)), None)
        return None if step is None else f"the model's method {step} is overridden"

    def _must_run_stock(self, name: str) -> bool:
        """Return whether a caller made a change that `Codec` would ignore, so that NeMo's method `name` must run."""
        return self._alteration() is not None or patched_method(NeMoAudioCodecModel, (name,)) is not None

    def _is_in_step(self) -> bool:
        """Return whether `decode` and `forward` must compute gradients for a user's training step."""
        return (
            torch.is_grad_enabled()
            and self._trainer is not None
            and self._trainer.training
            and any(parameter.requires_grad for parameter in self.audio_decoder.parameters())
        )

    def encode(
        self,
        audio: torch.Tensor,
        audio_len: torch.Tensor,
        sample_rate: int | None = None,
        num_codebooks: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode audio to tokens; see `Codec.encode`.

        Audio at another sample rate is resampled with soxr.

        Args:
            audio: samples in [-1, 1], shape [B, T_audio].
            audio_len: number of valid samples of each example, shape [B].
            sample_rate: sample rate of `audio`, Hz; the codec's own by default.
            num_codebooks: number of codebooks to use, starting with the first; all by default. As in NeMo, the result
                still has tokens for all codebooks. The tokens of unused codebooks represent FSQ values of zero.

        Returns:
            Tokens as int32, shape [B, C, T_encoded], and their lengths in frames, shape [B].

        Raises:
            AudioError: for audio that cannot be encoded, or an invalid sample rate.
            TokensError: for an invalid `num_codebooks`.
        """
        if num_codebooks is None and self._must_run_stock("encode"):
            stock: tuple[torch.Tensor, torch.Tensor] = super().encode(
                audio=audio, audio_len=audio_len, sample_rate=sample_rate
            )
            return stock
        codec = self.codec
        rate = codec.sample_rate if sample_rate is None else sample_rate
        tokens, tokens_len = codec.encode(audio, audio_len, rate, num_codebooks)
        missing = codec.num_codebooks - tokens.shape[1]
        if not missing:
            return tokens, tokens_len
        is_valid = torch.arange(tokens.shape[2], device=tokens.device) < tokens_len[:, None]
        zeros = (is_valid * codec.backend.spec.zero_token).to(tokens.dtype)[:, None].expand(-1, missing, -1)
        return torch.cat([tokens, zeros], 1), tokens_len

    def decode(
        self,
        tokens: torch.Tensor,
        tokens_len: torch.Tensor,
        audio_len: torch.Tensor | None = None,
        num_codebooks: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode tokens to audio; see `Codec.decode`.

        Args:
            tokens: ids in [0, codebook_size), shape [B, C, T_encoded].
            tokens_len: number of valid frames of each example, shape [B].
            audio_len: number of samples to return for each example, shape [B]; complete frames by default.
            num_codebooks: number of codebooks to use, starting with the first; all by default. `tokens` may leave
                out the other codebooks.

        Returns:
            Audio [B, T_audio] and its lengths in samples [B].

        Raises:
            TokensError: for tokens that cannot be decoded.
        """
        if audio_len is None and num_codebooks is None and (self._is_in_step() or self._must_run_stock("decode")):
            stock: tuple[torch.Tensor, torch.Tensor] = super().decode(tokens=tokens, tokens_len=tokens_len)
            return stock
        return self.codec.decode(tokens, tokens_len, audio_len, num_codebooks)

    def forward(
        self, audio: torch.Tensor, audio_len: torch.Tensor, sample_rate: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode audio to tokens and decode the tokens, without gradients except in a training step.

        Args:
            audio: samples in [-1, 1], shape [B, T_audio].
            audio_len: number of valid samples of each example, shape [B].
            sample_rate: sample rate of `audio`, Hz; the codec's own by default.

        Returns:
            The reconstructions [B, T_audio] at the codec's sample rate, with the durations of the input, and their
            lengths in samples [B].

        Raises:
            AudioError: for audio that cannot be encoded, or an invalid sample rate.
        """
        overrides = is_replaced(self, "decode", Inference)  # NeMo calls `decode`
        if overrides or self._is_in_step() or self._must_run_stock("forward"):
            stock: tuple[torch.Tensor, torch.Tensor] = super().forward(
                audio=audio, audio_len=audio_len, sample_rate=sample_rate
            )
            return stock
        codec = self.codec
        audio, audio_len = codec.resample(audio, audio_len, codec.sample_rate if sample_rate is None else sample_rate)
        tokens, tokens_len = codec.encode(audio, audio_len, codec.sample_rate)
        return codec.decode(tokens, tokens_len, audio_len)

    def encode_audio(
        self, audio: torch.Tensor, audio_len: torch.Tensor, sample_rate: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoder's output, with gradients.

        Args:
            audio: samples in [-1, 1], shape [B, T_audio].
            audio_len: number of valid samples of each example, shape [B].
            sample_rate: sample rate of `audio`, Hz; the codec's own by default.

        Returns:
            Encoded frames [B, D, T_encoded] and their lengths in frames as int64 [B].

        Raises:
            AudioError: for an invalid sample rate, or if audio that requires a gradient would have to be resampled.
        """
        if sample_rate is not None and self._alteration() is None:
            audio, audio_len = self._resampled(audio, audio_len, sample_rate)
            sample_rate = None
        encoded: tuple[torch.Tensor, torch.Tensor] = super().encode_audio(
            audio=audio, audio_len=audio_len, sample_rate=sample_rate
        )
        return encoded

    def _resampled(
        self, audio: torch.Tensor, audio_len: torch.Tensor, sample_rate: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        resampled, resampled_len = self.codec.resample(audio, audio_len, sample_rate)
        if sample_rate == self.sample_rate:
            return audio, audio_len
        if torch.is_grad_enabled() and audio.requires_grad:
            raise AudioError(
                f"audio at {sample_rate} Hz requires a gradient, but the codec's resampler is not differentiable; "
                f"resample the audio to {self.sample_rate} Hz yourself, or pass audio.detach()."
            )
        dtype = audio.dtype if audio.is_floating_point() else torch.float32
        return resampled.to(audio.device, dtype), resampled_len.to(audio_len.device, audio_len.dtype)

    def dequantize(self, tokens: torch.Tensor, tokens_len: torch.Tensor) -> torch.Tensor:
        """Convert tokens to the frames that `decode_audio` takes.

        As in NeMo, a token outside the codebook is taken modulo the codebook's size. `decode` raises an error for such
        a token.

        Args:
            tokens: ids in [0, codebook_size), shape [B, C, T_encoded].
            tokens_len: number of valid frames of each example, shape [B].

        Returns:
            Dequantized frames [B, D, T_encoded].

        Raises:
            TokensError: if `tokens` has another number of codebooks than the model.
        """
        if not tokens.is_floating_point():
            tokens = tokens.long()  # the codebook's size may be too large for 8 or 16 bits
        wrapped = tokens.remainder(self.codebook_size)
        dequantized: torch.Tensor = super().dequantize(tokens=wrapped, tokens_len=tokens_len)
        return dequantized

    def pad_audio(
        self, audio: torch.Tensor, audio_len: torch.Tensor, samples_per_frame: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad audio with zeros to complete frames.

        Unlike NeMo's method, this method also sets the samples after the end of each example to zero.

        Args:
            audio: samples, shape [B, T_audio].
            audio_len: number of valid samples of each example, shape [B].
            samples_per_frame: number of samples per frame.

        Returns:
            Padded audio [B, T_audio] and its lengths in samples [B].
        """
        positions = torch.arange(audio.shape[1], device=audio.device)
        audio = audio.masked_fill(positions >= audio_len[:, None], 0)
        padded: tuple[torch.Tensor, torch.Tensor] = super().pad_audio(audio, audio_len, samples_per_frame)
        return padded
