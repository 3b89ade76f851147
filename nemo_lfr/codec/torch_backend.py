"""PyTorch backend, for CPUs and GPUs."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_lfr.checkpoint import Checkpoint
from nemo_lfr.checkpoint.config import codec_values
from nemo_lfr.codec.ambient import building_state, check_weights, convolutions, reference_state
from nemo_lfr.codec.backend import Batching, Operation
from nemo_lfr.codec.base import CodecBase
from nemo_lfr.codec.cpu import network as inference
from nemo_lfr.codec.cpu.packed import has_bf16
from nemo_lfr.codec.fingerprint import LENGTH, check_described, fingerprint, settings_of, weights_digest
from nemo_lfr.codec.lazy_module import LazyModule
from nemo_lfr.codec.streaming import StreamDecoder, StreamEncoder
from nemo_lfr.codec.torch_arrays import TorchArrays, guard_after_fork
from nemo_lfr.codec.tracing import check_not_tracing
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.modules.altered import FINGERPRINT, check_unaltered, must_call_modules, run_decoder, run_encoder
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.finite import dequantize, quantize
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from nemo_lfr.modules.weight_norm import CANONICAL, OTHERS, SumOrder
from nemo_lfr.modules.weights import checksum_once, weights_version
from nemo_lfr.spec import CodecSpec

if TYPE_CHECKING:
    from nemo_lfr.codec.cuda.graphs import CudaModule

Quantizer = FiniteScalarQuantizer | GroupFiniteScalarQuantizer

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

BATCHING = {
    # oneDNN compiles kernels for every new shape, which takes a third as long as encoding a sentence.
    "cpu": Batching(pad_multiple=8),
    # A GPU is faster with long windows and large batches. Few shapes should occur, because each new shape needs a CUDA
    # graph or a kernel search in cuDNN.
    "cuda": Batching(chunk_frames=512, batch_frames=4096, pad_multiple=16, mix_widths=True),
}


class TorchBackend:
    """Backend that runs an encoder, a quantizer and a decoder in PyTorch.

    Args:
        encoder: encoder, from audio to encoded frames.
        quantizer: quantizer, between encoded frames and tokens.
        decoder: decoder, from dequantized frames to audio.
        sample_rate: sample rate of the audio, Hz.
        precision: "fp32" gives the reference tokens: TF32 is off, whatever PyTorch's settings are. "tf32" drops 13 of
            23 mantissa bits in convolutions on a GPU, as stock NeMo with PyTorch's defaults does; on a CPU it equals
            "fp32". "bf16" and "fp16" run the convolutions at that precision, which changes about 16 % (bf16) or 1.5 %
            (fp16) of the bundled codec's tokens. FSQ runs in fp32 at every precision.
        name: name of the codec for messages, such as the path of its checkpoint.
        config: model config of the modules, which `Codec.save_pretrained` writes; None if there is no config.

    Raises:
        NemoLfrError: for an unknown precision, or bf16 on a CPU that has no instructions for it.
    """

    def __init__(
        self,
        encoder: HiFiGANEncoder | LazyModule[HiFiGANEncoder],
        quantizer: Quantizer,
        decoder: HiFiGANDecoder | LazyModule[HiFiGANDecoder],
        sample_rate: int,
        *,
        precision: str = "fp32",
        name: str = "codec",
        config: dict[str, Any] | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise NemoLfrError(f"precision {precision!r} is unknown; use one of {list(PRECISIONS)}.")
        self._encoder = encoder if isinstance(encoder, LazyModule) else LazyModule(encoder)
        self._decoder = decoder if isinstance(decoder, LazyModule) else LazyModule(decoder)
        self.quantizer = quantizer
        self.name = name
        self.config = config
        samples_per_frame = self._encoder.module.samples_per_frame
        self.spec = CodecSpec(
            sample_rate, samples_per_frame, quantizer.levels, quantizer.num_codebooks, precision=precision
        )
        self._digests: dict[SumOrder, str] = {}
        self._digests_version: Any = None
        if precision == "bf16" and self.device.type == "cpu" and not has_bf16():
            raise NemoLfrError(
                'precision "bf16" needs bf16 instructions (on x86, AMX or AVX512-bf16), which this CPU lacks; use '
                '"fp32".'
            )
        if precision == "fp16" and self.device.type == "cpu":
            _warn_about_fp16()

    @classmethod
    def from_checkpoint(
        cls, path: Path, device: torch.device, *, precision: str = "fp32", name: str | None = None
    ) -> "TorchBackend":
        """Open a checkpoint and validate its keys and shapes.

        The weights of the encoder and the decoder are loaded on first use. If they are damaged, CheckpointError is
        raised then.

        Args:
            path: local `.nemo` file, Lightning `.ckpt` file, or folder of an unpacked or exported codec.
            device: device of the modules.
            precision: as in the constructor.
            name: name of the codec in messages; default: the path.

        Raises:
            CheckpointError: if the checkpoint cannot be read.
            NemoLfrError: as in the constructor.
        """
        with building_state(torch.device("cpu")):
            checkpoint = Checkpoint(path)
            parts = checkpoint.parts
            return cls(
                LazyModule(parts.encoder, checkpoint, "audio_encoder", device),
                parts.quantizer.to(device),
                LazyModule(parts.decoder, checkpoint, "audio_decoder", device),
                parts.sample_rate,
                precision=precision,
                name=str(path) if name is None else name,
                config=codec_values(checkpoint.config),
            )

    @property
    def encoder(self) -> HiFiGANEncoder:
        """Encoder, from audio to encoded frames. Its weights are loaded on first access."""
        return self._encoder.get()

    @property
    def decoder(self) -> HiFiGANDecoder:
        """Decoder, from dequantized frames to audio. Its weights are loaded on first access."""
        return self._decoder.get()

    def load(self, operation: Operation) -> None:
        """Load the weights of the encoder ("encode") or the decoder ("decode"), if they are not loaded yet."""
        (self._encoder if operation == "encode" else self._decoder).get()

    @property
    def device(self) -> torch.device:
        """Device that the modules are on, or will be on once their weights are loaded."""
        return self._decoder.device

    @property
    def arrays(self) -> TorchArrays:
        """Array operations with tensors on the device."""
        return TorchArrays(self.device)

    @property
    def batching(self) -> Batching:
        """Window and batch sizes that suit the device."""
        return BATCHING.get(self.device.type, Batching())

    def fingerprints(self) -> Iterator[str]:
        """Yield the current fingerprint, and then all fingerprints that older versions gave the same codec.

        In some older versions, the fingerprint depended on the kind of CPU; one for each known kind is included.

        Raises:
            NemoLfrError: if a module has hooks, replaced layers or changed levels, which a fingerprint does not cover.
        """
        self.check_unaltered(FINGERPRINT)
        settings = settings_of(self._encoder.module, self.quantizer, self._decoder.module, self.spec.sample_rate)
        digests = set()
        for order in (CANONICAL, *OTHERS):
            digest = self._weights_digest(order)
            if digest not in digests:
                digests.add(digest)
                yield fingerprint(digest, settings)
                yield digest[:LENGTH]

    def check_unaltered(self, consequence: str) -> None:
        """Raise NemoLfrError if a module has hooks or replaced layers; see `nemo_lfr.modules.altered`."""
        named = {"encoder": self._encoder.module, "quantizer": self.quantizer, "decoder": self._decoder.module}
        for name, module in named.items():
            check_unaltered(module, f"the {name} of {self.name}", consequence)

    def check_weights(self) -> None:
        """Check the weights and convolutions of the encoder and the decoder; see the function `check_weights`.

        Raises:
            NemoLfrError: if a weight is not dense fp32, or the settings of a convolution were changed to unsupported
                values.
        """
        check_weights(self._encoder.module, f"the encoder of {self.name}")
        check_weights(self._decoder.module, f"the decoder of {self.name}")

    def check_described(self, consequence: str) -> None:
        """Check that the codec's config describes its modules, before the config is saved.

        Args:
            consequence: end of the message, such as "which are not saved; remove or merge them".

        Raises:
            NemoLfrError: if a module has hooks, replaced layers or changed settings.
        """
        assert self.config is not None
        self.check_unaltered(consequence)
        modules = self._encoder.module, self.quantizer, self._decoder.module
        check_described(self.config, settings_of(*modules, self.spec.sample_rate), self.name)

    def _weights_digest(self, order: SumOrder) -> str:
        """Return the SHA-256 of all weights. It is cached until a weight changes.

        Args:
            order: order of summation for the norms when weight norm is folded.
        """
        with self.computing():
            modules: tuple[LazyModule[Any], ...] = (self._encoder, self._decoder)
            in_memory = [lazy.module for lazy in modules if lazy.is_read]
            version = [id(module) for module in in_memory], weights_version(*in_memory)()
            if version != self._digests_version:
                self._digests, self._digests_version = {}, version
            if order not in self._digests:
                weights = (weight for lazy in modules for weight in lazy.weights(order))
                self._digests[order] = weights_digest(weights)
            return self._digests[order]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Keep the caller's PyTorch settings from affecting networks inside a `with` block.

        Raises:
            NemoLfrError: within a tracer or function transform; see `nemo_lfr.codec.tracing`.
        """
        guard_after_fork()
        check_not_tracing()
        with reference_state(self.device), checksum_once():
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context manager within which PyTorch modules run at the codec's precision."""
        dtype = PRECISIONS[self.spec.precision]
        if dtype is not None:
            return torch.autocast(self.device.type, dtype=dtype)
        if self.device.type != "cuda":
            return nullcontext()
        return convolutions(tf32=self.spec.precision == "tf32")

    @torch.no_grad()
    def encode_frames(self, audio: torch.Tensor, num_frames: list[int]) -> torch.Tensor:
        """See `Backend.encode_frames`."""
        encoder, width = self.encoder, audio.shape[1] // self.spec.samples_per_frame
        if self.device.type == "cuda" and self.quantizer.is_plain and not must_call_modules(encoder):
            check_weights(encoder, f"the encoder of {self.name}")
            return self._cuda_module(encoder)(audio, num_frames, width)
        return quantize(self.quantizer, self.encode_latents(audio, num_frames), num_frames)

    @torch.no_grad()
    def encode_latents(self, audio: torch.Tensor, num_frames: list[int]) -> torch.Tensor:
        """See `LatentBackend.encode_latents`."""
        encoder, width = self.encoder, audio.shape[1] // self.spec.samples_per_frame
        check_weights(encoder, f"the encoder of {self.name}")
        with self.autocast():
            if must_call_modules(encoder) or self.device.type == "cuda":  # the GPU's kernels return tokens only
                encoded = run_encoder(encoder, audio, num_frames, width)
            else:
                encoded = inference.encode_frames(encoder, audio, _ends(num_frames, width, encoder.min_frames))
        return encoded.float()

    @torch.no_grad()
    def quantize_latents(self, encoded: torch.Tensor, num_frames: list[int]) -> torch.Tensor:
        """See `LatentBackend.quantize_latents`."""
        codes: torch.Tensor = self.quantizer(encoded, torch.tensor(num_frames, device=encoded.device))[0]
        return codes

    @torch.no_grad()
    def decode_frames(self, tokens: torch.Tensor, num_frames: list[int]) -> torch.Tensor:
        """See `Backend.decode_frames`."""
        decoder, width = self.decoder, tokens.shape[2]
        check_weights(decoder, f"the decoder of {self.name}")
        if must_call_modules(decoder):
            with self.autocast():
                codes = dequantize(self.quantizer, tokens, num_frames)
                return run_decoder(decoder, codes, num_frames, self.spec.samples_per_frame).float()
        if self.device.type == "cuda" and self.quantizer.is_plain:
            return self._cuda_module(decoder)(tokens, num_frames, width)
        codes = dequantize(self.quantizer, tokens, num_frames)
        with self.autocast():
            return inference.decode_frames(decoder, codes, _ends(num_frames, width, decoder.min_frames)).float()

    def _cuda_module(self, module: HiFiGANEncoder | HiFiGANDecoder) -> "CudaModule":
        from nemo_lfr.codec.cuda import graphs  # imported late: only needed on a GPU

        return graphs.cuda_module(module, self.quantizer, self.spec.precision, self.device)

    # Streams.

    def stream_encoder(self, codec: CodecBase[torch.Tensor], lookahead: int | None) -> StreamEncoder:
        """See `Codec.stream_encoder`."""
        return StreamEncoder(codec, self, lookahead)

    def stream_decoder(
        self, codec: CodecBase[torch.Tensor], lookahead: int | None, first_lookahead: int | None = None
    ) -> StreamDecoder:
        """See `Codec.stream_decoder`."""
        return StreamDecoder(codec, self, lookahead, first_lookahead)


@cache
def _warn_about_fp16() -> None:
    """Log a warning, once, that fp16 is slow on CPUs."""
    logger.warning(
        'precision "fp16" is for GPUs. On most CPUs it takes about ten times as long as "fp32"; use "fp32".'
    )


def _ends(num_frames: list[int], width: int, min_frames: int) -> list[int] | None:
    """Return max(count, min_frames) for each count in `num_frames`; None if all of these equal `width`."""
    ends = [max(count, min_frames) for count in num_frames]
    return None if min(ends) == width else ends
