"""Encoder and decoder without data-dependent control flow, for export to ONNX or with `torch.export`."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from nemo_lfr.codec.ambient import building_state
from nemo_lfr.codec.base import CodecBase
from nemo_lfr.codec.fingerprint import settings_of
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.modules.altered import EXPORT
from nemo_lfr.modules.finite import quantize, to_audio


class Graph(NamedTuple):
    """Encoder or decoder with the arguments that an exporter needs to trace it for any batch size and length.

    Attributes:
        module: the encoder or decoder.
        example: example inputs.
        dynamic_shapes: dynamic dimensions of each input, in the form that `torch.export` expects.
        inputs: names of the inputs.
        output: name of the output.
    """

    module: nn.Module
    example: tuple[torch.Tensor, ...]
    dynamic_shapes: tuple[Any, ...]
    inputs: list[str]
    output: str


class Programs(NamedTuple):
    """Result of `export_programs`: the exported encoder and decoder."""

    encoder: torch.export.ExportedProgram
    decoder: torch.export.ExportedProgram


class Encoder(nn.Module):
    """Encoder followed by FSQ: audio [B, T * samples_per_frame] -> int32 tokens [B, C, T].

    If the encoder returns NaN or infinite values for a frame, all tokens of this frame are -1.
    """

    def __init__(self, backend: TorchBackend) -> None:
        super().__init__()
        self.encoder, self.quantizer = backend.encoder, backend.quantizer

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Encode whole frames."""
        return quantize(self.quantizer, self.encoder.encode_frames(audio))


class Decoder(nn.Module):
    """Dequantizer and decoder: int64 tokens [B, C, T], `tokens_len` [B] -> audio [B, T * samples_per_frame]."""

    def __init__(self, backend: TorchBackend) -> None:
        super().__init__()
        self.quantizer, self.decoder = backend.quantizer, backend.decoder

    def forward(self, tokens: torch.Tensor, tokens_len: torch.Tensor) -> torch.Tensor:
        """Decode whole frames."""
        valid = torch.arange(tokens.shape[2], device=tokens.device) < tokens_len[:, None]
        hidden = self.decoder.hidden_frames(self.quantizer.decode_unchecked(tokens.transpose(0, 1)) * valid[:, None])
        return to_audio(self.decoder.out_activation, hidden).squeeze(1)


def graphs(backend: TorchBackend) -> tuple[Graph, Graph]:
    """Return the encoder and the decoder, each with example inputs and dynamic dimensions for an exporter."""
    batch = torch.export.Dim("batch", min=1)
    spec, encoder, decoder, device = backend.spec, backend.encoder, backend.decoder, backend.device
    frame = spec.samples_per_frame
    count = max(encoder.min_frames, decoder.min_frames, 2) + 2
    encode_frames = torch.export.Dim("frames", min=encoder.min_frames)
    decode_frames = torch.export.Dim("frames", min=decoder.min_frames)
    audio = torch.zeros(2, count * frame, dtype=torch.float32, device=device)
    tokens = torch.zeros(2, spec.num_codebooks, count, dtype=torch.int64, device=device)
    tokens_len = torch.full((2,), count, device=device)
    return (
        Graph(Encoder(backend).eval(), (audio,), ({0: batch, 1: frame * encode_frames},), ["audio"], "tokens"),
        Graph(
            Decoder(backend).eval(),
            (tokens, tokens_len),
            ({0: batch, 2: decode_frames}, {0: batch}),
            ["tokens", "tokens_len"],
            "audio",
        ),
    )


def fp32_backend(codec: CodecBase[Any], target: str) -> TorchBackend:
    """Return the PyTorch backend of a codec, after checking that the codec can be exported.

    Args:
        codec: the codec.
        target: what will be exported, in the plural, for messages; for example "ONNX files".

    Raises:
        NemoLfrError: if the codec does not run in PyTorch in fp32, or has hooks or other changes that cannot be
            exported.
    """
    backend = codec.backend
    if not isinstance(backend, TorchBackend):
        raise NemoLfrError(
            f"{codec.name}: only a codec that runs in PyTorch can be exported; pass the original checkpoint."
        )
    if codec.precision != "fp32":
        raise NemoLfrError(
            f'precision is "{codec.precision}", but {target} are exported in fp32; load the codec with '
            'precision="fp32".'
        )
    backend.check_unaltered(EXPORT)
    _, _, eps = settings_of(backend.encoder, backend.quantizer, backend.decoder, codec.sample_rate)["quantizer"]
    if isinstance(eps, list):
        raise NemoLfrError(
            f"{codec.name}: the codebooks have the eps {shorten(eps)}, but {target} support only one for all "
            "codebooks; set the same eps in each of the quantizers."
        )
    return backend


def export_programs(codec: CodecBase[Any]) -> Programs:
    """Export the encoder and the decoder with `torch.export`, for ExecuTorch, AOTInductor and other compilers.

    The encoder maps audio [B, T * samples_per_frame] to int32 tokens [B, C, T]. The decoder maps int64 tokens
    [B, C, T] and tokens_len [B] to audio. The numbers of clips and frames are dynamic, but all clips in a batch must
    have the same length. Input shorter than `codec.encoder.min_frames` or `codec.decoder.min_frames` must be
    zero-padded.

    Args:
        codec: codec with the PyTorch backend, in fp32.

    Returns:
        The exported programs of the encoder and the decoder, which `torch.export.save` can write to files.

    Raises:
        NemoLfrError: if the codec does not run in PyTorch in fp32, or has hooks or other changes that cannot be
            exported.
    """
    backend = fp32_backend(codec, "programs")
    with building_state(torch.device("cpu")), backend.computing():
        sides = graphs(backend)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Programs(
            *(torch.export.export(side.module, side.example, dynamic_shapes=side.dynamic_shapes) for side in sides)
        )
