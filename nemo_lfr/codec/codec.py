"""The codec in PyTorch, as a user holds it: audio in, tokens out, and back; any length, any batch."""

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from nemo_lfr.codec import inference
from nemo_lfr.codec.ambient import building_state, check_weights, convolutions, reference_state
from nemo_lfr.codec.base import BATCH_FRAMES, CHUNK_FRAMES, BaseCodec
from nemo_lfr.codec.decoder import HiFiGANDecoder
from nemo_lfr.codec.encoder import HiFiGANEncoder
from nemo_lfr.codec.fingerprint import LENGTH, fingerprint, settings_of, weights_digest
from nemo_lfr.codec.finite import quantize
from nemo_lfr.codec.plan import has_bf16
from nemo_lfr.codec.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from nemo_lfr.codec.tracing import outside_of_graphs, refuse_tracing, refuse_wrapper
from nemo_lfr.codec.weights import one_look, weights_version
from nemo_lfr.errors import NemoLfrError, clip

if TYPE_CHECKING:
    from nemo_lfr.checkpoint import Checkpoint
    from nemo_lfr.codec.gpu.graphs import Engine
    from nemo_lfr.streaming import StreamDecoder, StreamEncoder

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# A GPU takes long windows and large batches, in few shapes: each costs a graph or cuDNN's search for a kernel.
GPU_BATCH_FRAMES = 4096
GPU_CHUNK_FRAMES = 512
GPU_WIDTH_STEP = 16


class Codec(BaseCodec[torch.Tensor]):
    """Encoder, quantizer and decoder, used for inference. Takes numpy arrays and tensors, and gives tensors.

    Args:
        encoder: audio -> encoded frames.
        quantizer: encoded frames <-> tokens.
        decoder: dequantized frames -> audio.
        sample_rate: Hz.
        precision: "fp32", the tokens of record, without TF32 whatever PyTorch is set to; "tf32" lets a GPU's
            convolutions drop 13 of 23 bits, as stock NeMo with PyTorch's defaults does (elsewhere it is "fp32");
            "bf16" or "fp16" run the convolutions at that precision and change a few tokens in a hundred. FSQ is
            fp32 always.
        name: where the weights came from, for messages.
        chunk_frames: frames of one chunk of long audio; the result does not depend on it. None for what suits the
            device.
        device: where the parts are, or will be once they are read.
        checkpoint: what to fill encoder and decoder from, when each is first asked for; they are there if not given.

    Raises:
        NemoLfrError: for an unknown precision, or bf16 on a CPU that has no instructions for it.
    """

    def __init__(
        self,
        encoder: HiFiGANEncoder,
        quantizer: FiniteScalarQuantizer | GroupFiniteScalarQuantizer,
        decoder: HiFiGANDecoder,
        sample_rate: int,
        *,
        precision: str = "fp32",
        name: str = "codec",
        chunk_frames: int | None = None,
        device: torch.device | None = None,
        checkpoint: "Checkpoint | None" = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise NemoLfrError(f"precision {precision!r} is unknown; use one of {list(PRECISIONS)}.")
        self._encoder, self.quantizer, self._decoder = encoder, quantizer, decoder
        if precision == "bf16" and (device or next(decoder.parameters()).device).type == "cpu" and not has_bf16():
            raise NemoLfrError('precision "bf16": this CPU has neither AMX nor AVX512-bf16; use "fp32".')
        self._device, self._checkpoint = device, checkpoint
        self._digest: tuple[Any, str] | None = None
        self.sample_rate = sample_rate
        self.precision = precision
        self.name = name
        self.chunk_frames = chunk_frames or (GPU_CHUNK_FRAMES if self.device.type == "cuda" else CHUNK_FRAMES)

    @functools.cached_property
    def encoder(self) -> HiFiGANEncoder:
        """Audio -> encoded frames; its numbers are read when it is first asked for."""
        if self._checkpoint is not None:
            with building_state(torch.device("cpu")):
                self._checkpoint.fill("audio_encoder", self.device)
        return self._encoder

    @functools.cached_property
    def decoder(self) -> HiFiGANDecoder:
        """Dequantized frames -> audio; its numbers are read when it is first asked for."""
        if self._checkpoint is not None:
            with building_state(torch.device("cpu")):
                self._checkpoint.fill("audio_decoder", self.device)
        return self._decoder

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in this process or another, has all numbers."""
        return self.__dict__ | {"encoder": self.encoder, "decoder": self.decoder, "_checkpoint": None}

    @property
    def samples_per_frame(self) -> int:
        return self._encoder.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        return self.quantizer.num_codebooks

    @property
    def levels(self) -> tuple[int, ...]:
        return self.quantizer.levels

    @property
    def batch_frames(self) -> int:
        return BATCH_FRAMES if self.device.type == "cpu" else GPU_BATCH_FRAMES

    @property
    def width_step(self) -> int:
        # oneDNN compiles kernels for every shape that it meets, which takes a third as long as to encode a sentence.
        return {"cpu": 8, "cuda": GPU_WIDTH_STEP}.get(self.device.type, 1)

    @property
    def device(self) -> torch.device:
        return self._device or next(self._decoder.parameters()).device

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell which codec made tokens; see `nemo_lfr.codec.fingerprint`."""
        settings = settings_of(self._encoder, self.quantizer, self._decoder, self.sample_rate)
        return fingerprint(self._weights_digest(), settings)

    @property
    def weights_fingerprint(self) -> str:
        """The older kind of fingerprint: of the encoder's and decoder's weights alone."""
        return self._weights_digest()[:LENGTH]

    def _weights_digest(self) -> str:
        """SHA-256 of all weights, computed again when they change."""
        with self.computing():
            sides = [side for side in ("encoder", "decoder") if self._checkpoint is None or side in self.__dict__]
            version = sides, weights_version(*(getattr(self, side) for side in sides))()
            if self._digest is None or self._digest[0] != version:
                weights = (weight for side in ("encoder", "decoder") for weight in self._numbers(side))
                self._digest = version, weights_digest(weights)
            return self._digest[1]

    def _numbers(self, side: str) -> Iterable[tuple[str, torch.Tensor]]:
        """Weights of the encoder or the decoder by name; those that nobody has asked for are not kept."""
        if self._checkpoint is not None and side not in self.__dict__:
            return self._checkpoint.numbers(f"audio_{side}")
        return sorted(plain_state(getattr(self, side)).items())

    # `torch.compile` of a function that calls these leaves them out of its graphs.

    encode = outside_of_graphs(BaseCodec[torch.Tensor].encode)
    decode = outside_of_graphs(BaseCodec[torch.Tensor].decode)
    resample = outside_of_graphs(BaseCodec[torch.Tensor].resample)

    # Streams.

    def stream_encoder(self, lookahead: int | None = None) -> "StreamEncoder":
        """A stream that takes one recording's samples as they come and gives its tokens.

        Args:
            lookahead: frames that a token may wait for; None for all that it depends on (`encoder.context.future`),
                with which the tokens are those of `encode`.

        Raises:
            NemoLfrError: if it is no number of frames.
        """
        from nemo_lfr.streaming import StreamEncoder

        return StreamEncoder(self, lookahead)

    def stream_decoder(self, lookahead: int | None = None) -> "StreamDecoder":
        """A stream that takes one recording's tokens as they come and gives its audio; see `stream_encoder`."""
        from nemo_lfr.streaming import StreamDecoder

        return StreamDecoder(self, lookahead)

    # What the base asks for.

    def _array(self, value: Any, name: str, error: type[NemoLfrError]) -> torch.Tensor:
        mind_fork()
        return _tensor(value, name, error)

    def _zeros(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.zeros(*shape, dtype=getattr(torch, dtype), device=self.device)

    def _cast(self, array: torch.Tensor, dtype: str) -> torch.Tensor:
        return array.detach().to(self.device, getattr(torch, dtype))

    @contextmanager
    def computing(self) -> Iterator[None]:
        mind_fork()
        refuse_tracing()
        with reference_state(self.device), one_look():
            yield

    def autocast(self) -> Any:
        dtype = PRECISIONS[self.precision]
        if dtype is not None:
            return torch.autocast(self.device.type, dtype=dtype)
        if self.device.type != "cuda":
            return nullcontext()
        return convolutions(tf32=self.precision == "tf32")

    def _engine(self, part: HiFiGANEncoder | HiFiGANDecoder) -> "Engine":
        from nemo_lfr.codec.gpu import graphs

        return graphs.engine(part, self.quantizer, self.precision, self.device)

    def _grouped(self, jobs: dict[int, list[Any]]) -> Iterable[tuple[int, list[Any]]]:
        if self.device.type != "cuda":
            return jobs.items()
        # Windows of much the same width share a batch, the widest first: a GPU wants few and large ones.
        groups: dict[int, list[Any]] = {}
        shared = 0
        for width in sorted(jobs, reverse=True):
            if 4 * width < 3 * shared or not shared:
                shared = width
            groups.setdefault(shared, []).extend(jobs[width])
        return groups.items()

    def _peaks(self, audio: torch.Tensor, lengths: list[int]) -> list[float]:
        # Together, as a GPU's answer is waited for.
        peaks = [row[:length].abs().max() for row, length in zip(audio, lengths, strict=True) if length]
        found = iter(torch.stack(peaks).tolist() if peaks else [])
        return [next(found) if length else 0.0 for length in lengths]

    @torch.no_grad()
    def _encode_frames(self, audio: torch.Tensor, num_frames: list[int]) -> torch.Tensor:
        check_weights(self.encoder, f"the encoder of {self.name}")
        if self.device.type == "cuda":
            return self._engine(self.encoder)(audio, num_frames, audio.shape[1] // self.samples_per_frame)
        ends = _ends(num_frames, audio.shape[1] // self.samples_per_frame, self.encoder.min_frames)
        with self.autocast():
            encoded = inference.encode_frames(self.encoder, audio, ends)
        return quantize(self.quantizer, encoded.float())

    @torch.no_grad()
    def _decode_frames(self, tokens: torch.Tensor, num_frames: list[int]) -> torch.Tensor:
        check_weights(self.decoder, f"the decoder of {self.name}")
        if self.device.type == "cuda":
            return self._engine(self.decoder)(tokens, num_frames, tokens.shape[2])
        silence = min(num_frames) < tokens.shape[-1]
        length = torch.tensor(num_frames, device=tokens.device) if silence else None
        codes = self.quantizer.decode(tokens.transpose(0, 1), length)
        ends = _ends(num_frames, tokens.shape[2], self.decoder.min_frames)
        with self.autocast():
            return inference.decode_frames(self.decoder, codes, ends).float()


def _ends(num_frames: list[int], width: int, min_frames: int) -> list[int] | None:
    """Where each example of a batch ends, its silence up to `min_frames` included; None if that is everywhere."""
    ends = [max(count, min_frames) for count in num_frames]
    return None if min(ends) == width else ends


def plain_state(part: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name with weight norm folded, the same for a part built with or without it."""
    state = {name: value for name, value in part.state_dict().items() if ".parametrizations." not in name}
    for name, module in part.named_modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            state[f"{name}.weight"] = module.weight
    return state


_computed_in: int | None = None  # process id


def mind_fork() -> None:
    """To call before computing: PyTorch's threads do not survive a fork, and a child would wait for them for ever."""
    global _computed_in
    if _computed_in not in (None, os.getpid()) and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.warning(
            "this process was forked from one that had computed, so that PyTorch has one thread here; "
            "start processes by 'spawn' to have all of them."
        )
    _computed_in = os.getpid()


def _tensor(value: Any, name: str, error: type[NemoLfrError]) -> torch.Tensor:
    """What a caller passed, as a plain tensor.

    Raises:
        NemoLfrError: of the type given, if it is no array of numbers.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise error(f"{name} is a masked array with {int(np.sum(value.mask))} masked values; fill them first.")
    if isinstance(value, np.ndarray):
        if not np.issubdtype(value.dtype, np.number) and value.dtype != bool:
            raise error(f"{name} is an array of {value.dtype}; pass one of numbers.")
        native = value.dtype.newbyteorder("=")
        if not value.flags.writeable or value.dtype != native or min(value.strides, default=0) < 0:
            value = value.astype(native, order="C")  # torch takes no such memory, or warns of it
    try:
        tensor = torch.as_tensor(value)
        if not isinstance(value, np.ndarray | torch.Tensor) and tensor.is_floating_point():
            tensor = torch.as_tensor(value, dtype=torch.float32)  # and not the default dtype
    except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
        what = " ".join(str(reason).split())
        raise error(f"{name} is {type(value).__name__}; pass a numpy array or a tensor ({clip(what)}).") from None
    refuse_wrapper(tensor, name, error)
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise error(f"{name} is a sparse, quantized or meta tensor; pass a plain one.")
    return tensor
