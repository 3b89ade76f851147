"""A codec as encoder.onnx (audio -> tokens, FSQ inside) and decoder.onnx (tokens -> audio), any batch and length."""

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_lfr._version import __version__
from nemo_lfr.atomic import naming, writing_folder
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.finite import quantize, to_audio
from nemo_lfr.errors import MissingExtraError, NemoLfrError
from nemo_lfr.locate import expand_home
from nemo_lfr.onnx import DECODER, ENCODER, MANIFEST, METADATA, VERSION

OPSET = 20


class _Encoder(nn.Module):
    """Whole frames of audio [B, T * samples_per_frame] -> tokens [B, C, T] as int32; -1 where they are not finite."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.encoder, self.quantizer = codec.encoder, codec.quantizer

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return quantize(self.quantizer, self.encoder.encode_frames(audio))


class _Decoder(nn.Module):
    """Tokens [B, C, T] as int64, silent after `tokens_len` [B] -> audio [B, T * samples_per_frame]."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.quantizer, self.decoder = codec.quantizer, codec.decoder

    def forward(self, tokens: torch.Tensor, tokens_len: torch.Tensor) -> torch.Tensor:
        valid = torch.arange(tokens.shape[2], device=tokens.device) < tokens_len[:, None]
        hidden = self.decoder.hidden_frames(self.quantizer.decode(tokens.transpose(0, 1)) * valid[:, None])
        return to_audio(self.decoder.out_activation, hidden).squeeze(1)


def export_onnx(codec: Codec, folder: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
    """Write encoder.onnx, decoder.onnx and codec.json into `folder`; each is written aside, checked and renamed.

    Inputs and outputs are those of the two modules above. A length under `min_frames` has to be completed with
    silence, and a batch is of one length; `nemo_lfr.load(folder)` does both. What the tokens mean is in codec.json,
    whose format `nemo_lfr.onnx.manifest` describes, and in the metadata of both files under "nemo_lfr".

    Args:
        codec: fp32, on any device.
        folder: made if it is missing.
        overwrite: replace files that exist.

    Raises:
        MissingExtraError: if onnx or onnxscript is not installed.
        NemoLfrError: if a file exists and `overwrite` is not set, or the codec is not fp32.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise MissingExtraError("exporting to ONNX needs onnx and onnxscript: pip install 'nemo-lfr[onnx]'") from error
    if not isinstance(codec, Codec):
        raise NemoLfrError(f"{codec.name}: is exported already; give the checkpoint it is from.")
    if codec.precision != "fp32":
        raise NemoLfrError(f"precision is {codec.precision}; ONNX files are exported in fp32.")
    folder = expand_home(folder)
    targets = [Path(folder, name) for name in (ENCODER, DECODER, MANIFEST)]
    for target in targets:
        if target.exists() and not overwrite:
            raise NemoLfrError(f"{target} exists; pass --overwrite (overwrite=True) to replace it.")
    folder.mkdir(parents=True, exist_ok=True)
    with building_state(torch.device("cpu")), codec.computing():
        _write(codec, targets)
    return targets


def _write(codec: Codec, targets: list[Path]) -> None:
    import onnx

    folder, values = targets[0].parent, metadata(codec)
    batch = torch.export.Dim("batch", min=1)
    frame, device = codec.samples_per_frame, codec.device
    count = max(codec.encoder.min_frames, codec.decoder.min_frames, 2) + 2
    encode_frames = torch.export.Dim("frames", min=codec.encoder.min_frames)
    decode_frames = torch.export.Dim("frames", min=codec.decoder.min_frames)
    audio = torch.zeros(2, count * frame, dtype=torch.float32, device=device)
    tokens = torch.zeros(2, codec.num_codebooks, count, dtype=torch.int64, device=device)
    tokens_len = torch.full((2,), count, device=device)
    jobs: list[tuple[nn.Module, tuple[torch.Tensor, ...], tuple[Any, ...], list[str], str]] = [
        (_Encoder(codec), (audio,), ({0: batch, 1: frame * encode_frames},), ["audio"], "tokens"),
        (
            _Decoder(codec),
            (tokens, tokens_len),
            ({0: batch, 2: decode_frames}, {0: batch}),
            ["tokens", "tokens_len"],
            "audio",
        ),
    ]
    files = {}
    with writing_folder(folder) as aside:
        for target, (module, example, shapes, inputs, output) in zip(targets[:2], jobs, strict=True):
            with torch.no_grad(), warnings.catch_warnings(), _quiet(), _interruptible():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    module.eval(),
                    example,
                    dynamo=True,
                    dynamic_shapes=shapes,
                    input_names=inputs,
                    output_names=[output],
                    opset_version=OPSET,
                    external_data=False,
                    verbose=False,
                )
            assert program is not None
            model = program.model_proto
            model.metadata_props.add(key=METADATA, value=json.dumps(values))
            files[target.name] = _write_aside(Path(aside, target.name), model.SerializeToString(), target)
            onnx.checker.check_model(str(Path(aside, target.name)), full_check=True)
        _write_aside(Path(aside, MANIFEST), json.dumps(values | {"files": files}, indent=1).encode(), targets[2])
        for target in targets:
            with naming(target, aside):
                Path(aside, target.name).replace(target)


def _write_aside(path: Path, data: bytes, target: Path) -> str:
    """Write a file that becomes `target` to the disk; returns its SHA-256."""
    with naming(target, path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def metadata(codec: Codec) -> dict[str, Any]:
    """What both files say of the codec."""
    return {
        "version": VERSION,
        "sample_rate": codec.sample_rate,
        "samples_per_frame": codec.samples_per_frame,
        "levels": list(codec.levels),
        "num_codebooks": codec.num_codebooks,
        "fingerprint": codec.fingerprint,
        "weights_fingerprint": codec.weights_fingerprint,
        "written_by": f"nemo_lfr {__version__}",
    } | {
        name: {"past": part.context.past, "future": part.context.future, "min_frames": part.min_frames}
        for name, part in (("encoder", codec.encoder), ("decoder", codec.decoder))
    }


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise an interrupt or an exit as itself, which torch's exporter wraps into an error of its own."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt | SystemExit):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


class _quiet:
    """Torch's exporter logs what it registers, which is nothing to a user."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch.onnx")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
