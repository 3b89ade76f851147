"""Command `nemo-lfr info`."""

import os
from pathlib import Path
from typing import Any

import click

from nemo_lfr.bundled import BUNDLED_QUALITY
from nemo_lfr.cli.command import Command
from nemo_lfr.cli.identify import (
    ANY_RATE,
    AUDIO,
    CHECKPOINT,
    ENTROPY_MODEL,
    TOKEN_SUFFIX,
    TOKENS,
    UNKNOWN,
    identify_content,
    identify_suffix,
)
from nemo_lfr.cli.options import PathText
from nemo_lfr.cli.results import (
    AudioFigures,
    CodecFigures,
    EntropyModelFigures,
    InfoFigures,
    InfoResult,
    TokenFileFigures,
)
from nemo_lfr.cli.session import begin_work, fail, print_line
from nemo_lfr.cli.table import print_table
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.folders import AUDIO_SUFFIXES
from nemo_lfr.io.locate import SAFETENSORS_INDEX, SHARDS, expand_home, folder_files


@click.command(cls=Command, result=InfoResult, short_help="Describe files, folders and codecs.")
@click.argument("files", nargs=-1, type=PathText())
def info(files: tuple[str, ...]) -> dict[str, Any]:
    """Describe token files, checkpoints, audio, folders or Hub ids.

    Without arguments, describe the bundled codec.
    """
    items: list[InfoFigures] = []
    for file in files or (None,):
        try:
            items.append(describe(file))
        except (NemoLfrError, OSError) as error:
            if len(files) < 2:
                raise
            fail(file, error)
    for position, values in enumerate(items):
        if position:
            print_line("")
        print_table(values)
    only: dict[str, Any] = {**items[0]} if len(files) < 2 else {}  # earlier versions had only these keys
    return only | {"items": items}


def describe(text: str | None) -> InfoFigures:
    """Describe a file, a folder, a Hub id or the bundled codec.

    Args:
        text: path or Hub id; None for the bundled codec.

    Returns:
        Properties by name, as `nemo-lfr info --json` prints them.

    Raises:
        NemoLfrError: if the file is missing, or is not a file that this package can read.
    """
    path = None if text is None else expand_home(text)
    if path is None or not os.path.lexists(path):
        if path is not None and path.suffix.lower() in AUDIO_SUFFIXES | {TOKEN_SUFFIX}:
            raise NemoLfrError(f"{path}: no such file.")
        return _describe_codec(text)
    content = identify_content(path)
    if content is not None and content.kind != UNKNOWN.kind:
        begin_work()  # otherwise, a file that cannot be read is a usage error
    identity = content or identify_suffix(path)
    if identity.kind == TOKENS.kind:
        return _describe_tokens(path)
    if identity.kind == AUDIO.kind:
        return _describe_audio(path)
    if identity.kind == ENTROPY_MODEL.kind:
        return _describe_entropy_model(path)
    if identity.kind in (CHECKPOINT.kind, "onnx"):
        return _describe_codec(str(path))
    if identity.kind == UNKNOWN.kind:
        raise NemoLfrError(f"{path}: {identity.text}; {identity.advice}.")
    described = {"kind": identity.kind, "path": str(path), "description": identity.text, "use": identity.advice}
    return {**described, **dict(identity.counts)}  # type: ignore[return-value]


def _describe_tokens(path: Path) -> TokenFileFigures:
    from nemo_lfr.io.token_file import TokenReader

    with TokenReader(path) as reader:
        meta = reader.metadata
        duration, size = reader.num_samples / meta.sample_rate, path.stat().st_size
        return {
            "kind": "tokens",
            "path": str(path),
            "compressed": bool(reader.entropy_hash),
            "duration_s": round(duration, 4),
            "samples": reader.num_samples,
            "frames": reader.num_frames,
            "file_bytes": size,
            "bit_rate_bps": round(8 * size / duration, 1) if duration else 0.0,
            "payload_bit_rate_bps": round(8 * reader.payload_bytes / duration, 1) if duration else 0.0,
            "payload_bits_per_frame": round(8 * reader.payload_bytes / max(reader.num_frames, 1), 2),
            "entropy_model": reader.entropy_hash or None,
            "sample_rate_hz": meta.sample_rate,
            "samples_per_frame": meta.samples_per_frame,
            "num_codebooks": meta.num_codebooks,
            "levels": list(meta.levels),
            "codec_fingerprint": meta.fingerprint,
            "precision": meta.precision,
            "written_by": meta.written_by,
        }


def _describe_entropy_model(path: Path) -> EntropyModelFigures:
    from nemo_lfr.io.entropy.model import EntropyModel

    model = EntropyModel.read(path)
    spec = model.spec
    return {
        "kind": "entropy_model",
        "path": str(path),
        "entropy_model": model.hash,
        "file_bytes": path.stat().st_size,
        "num_codebooks": spec.num_codebooks,
        "levels": list(spec.levels),
        "codec_fingerprint": spec.fingerprint,
        "past_frames": spec.past,
        "averages": list(spec.averages),
        "spreads": list(spec.spreads),
        "hidden_units": list(spec.hidden),
        "written_by": spec.written_by,
        "use": ENTROPY_MODEL.advice,
    }


def _describe_audio(path: Path) -> AudioFigures:
    from nemo_lfr.io.audio import AudioReader

    with AudioReader(path, ANY_RATE) as reader:
        return {
            "kind": "audio",
            "path": str(path),
            "duration_s": round(reader.duration, 4),
            "sample_rate_hz": reader.native_rate,
            "channels": reader.channels,
            "file_bytes": path.stat().st_size,
            "use": AUDIO.advice,
        }


def _describe_codec(text: str | None) -> CodecFigures:
    from nemo_lfr.codec.backends import is_exported
    from nemo_lfr.io.hub import find_checkpoint
    from nemo_lfr.pretrained import load

    codec = load(text, "cpu")
    begin_work()
    spec, encoder, decoder = codec.spec, codec.encoder.context, codec.decoder.context
    path, size, parameters = Path(codec.name), None, (None, None)
    if text is None or not is_exported(text):
        path = find_checkpoint(text)
        files = [path / name for name in folder_files(os.listdir(path)) or ()] if path.is_dir() else [path]
        if files[-1].name == SAFETENSORS_INDEX:
            files += path.glob(SHARDS)
        size = sum(file.stat().st_size for file in files)
        parameters = tuple(sum(p.numel() for p in part.parameters()) for part in (codec.encoder, codec.decoder))
    quality = BUNDLED_QUALITY if text is None else {}
    return {
        "kind": "codec",
        "format": "onnx" if text is not None and is_exported(text) else "checkpoint",
        "name": codec.name,
        "path": str(path),
        "file_bytes": size,
        "encoder_parameters": parameters[0],
        "decoder_parameters": parameters[1],
        "sample_rate_hz": spec.sample_rate,
        "samples_per_frame": spec.samples_per_frame,
        "frame_rate_hz": round(spec.frame_rate, 3),
        "num_codebooks": spec.num_codebooks,
        "codebook_size": spec.codebook_size,
        "levels": list(spec.levels),
        "bit_rate_bps": round(spec.bit_rate, 1),
        "encoder_context_frames": [encoder.past, encoder.future],
        "decoder_context_frames": [decoder.past, decoder.future],
        "fingerprint": spec.fingerprint,
        "bundled_pesq_wb": float(quality["PESQ-WB"]) if quality else None,
        "bundled_estoi": float(quality["ESTOI"]) if quality else None,
    }
