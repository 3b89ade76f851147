"""Command `nemo-lfr info`."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_lfr.cli.identify import AUDIO, CHECKPOINT, ENTROPY_MODEL, TOKEN_SUFFIX, TOKENS, identify
from nemo_lfr.cli.terminal import echo_stderr, print_table
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.folders import AUDIO_SUFFIXES
from nemo_lfr.io.locate import expand_home

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec

# Target rate (Hz) of an `AudioReader` that only reads headers; any valid value would do.
INFO_RATE = 22050


@click.command(short_help="Describe files, folders and codecs.")
@click.argument("files", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(files: tuple[str, ...], as_json: bool) -> None:
    """Describe token files, checkpoints, audio, folders or Hub ids; the bundled codec by default."""
    described, problems = [], []
    for file in files or (None,):
        try:
            described.append(describe(file))
        except (NemoLfrError, OSError) as error:
            if len(files) < 2:
                raise
            problems.append(f"{file}: {error.strerror}." if isinstance(error, OSError) else str(error))
    if as_json and described:
        click.echo(json.dumps(described if len(files) > 1 else described[0], indent=2))
    for position, values in enumerate([] if as_json else described):
        if position:
            click.echo()
        print_table(values)
    for problem in problems:
        echo_stderr(f"nemo-lfr: {problem}")
    if problems:
        sys.exit(1 if described else 2)


def describe(text: str | None) -> dict[str, Any]:
    """Describe a file, a folder, a Hub id or the bundled codec.

    Args:
        text: path or Hub id; None for the bundled codec.

    Returns:
        Properties by name, as `nemo-lfr info` prints them.

    Raises:
        NemoLfrError: if the file is missing or this package cannot read it.
    """
    path = None if text is None else expand_home(text)
    if path is None or not os.path.lexists(path):
        if path is not None and path.suffix.lower() in AUDIO_SUFFIXES | {TOKEN_SUFFIX}:
            raise NemoLfrError(f"{path}: no such file.")
        return _describe_codec(text)
    identity = identify(path)
    if identity.kind == TOKENS.kind:
        return _describe_tokens(path)
    if identity.kind == AUDIO.kind:
        return _describe_audio(path)
    if identity.kind == ENTROPY_MODEL.kind:
        return _describe_entropy_model(path)
    if identity.kind in (CHECKPOINT.kind, "onnx"):
        return _describe_codec(str(path))
    if identity.kind == "unknown":
        raise NemoLfrError(f"{path}: {identity.text}; {identity.advice}.")
    return {"path": str(path), "kind": identity.text, "use": identity.advice}


def _describe_tokens(path: Path) -> dict[str, Any]:
    from nemo_lfr.io.token_file import TokenReader

    with TokenReader(path) as reader:
        meta = reader.metadata
        duration, size = reader.num_samples / meta.sample_rate, path.stat().st_size
        return {
            "file": str(path),
            "duration": round(duration, 4),
            "samples": reader.num_samples,
            "frames": reader.num_frames,
            "bytes": size,
            "bit rate": round(8 * size / duration, 1) if duration else 0.0,
            "payload bit rate": round(8 * reader.payload_bytes / duration, 1) if duration else 0.0,
            "payload bits a frame": round(8 * reader.payload_bytes / max(reader.num_frames, 1), 2),
            "entropy model": reader.entropy_hash or "none (packed frames)",
            "sample rate": meta.sample_rate,
            "samples per frame": meta.samples_per_frame,
            "codebooks": meta.num_codebooks,
            "levels": list(meta.levels),
            "codec fingerprint": meta.fingerprint,
            "precision": meta.precision,
            "written by": meta.written_by,
        }


def _describe_entropy_model(path: Path) -> dict[str, Any]:
    from nemo_lfr.io.entropy.model import EntropyModel

    model = EntropyModel.read(path)
    spec = model.spec
    return {
        "file": str(path),
        "kind": ENTROPY_MODEL.text,
        "entropy model": model.hash,
        "bytes": path.stat().st_size,
        "codebooks": spec.num_codebooks,
        "levels": list(spec.levels),
        "codec fingerprint": spec.fingerprint,
        "past frames": spec.past,
        "averages": list(spec.averages),
        "spreads": list(spec.spreads),
        "hidden units": list(spec.hidden),
        "written by": spec.written_by,
        "use": ENTROPY_MODEL.advice,
    }


def _describe_audio(path: Path) -> dict[str, Any]:
    from nemo_lfr.io.audio import AudioReader

    with AudioReader(path, INFO_RATE) as reader:
        return {
            "file": str(path),
            "kind": AUDIO.text,
            "duration": round(reader.duration, 4),
            "sample rate": reader.native_rate,
            "channels": reader.channels,
            "bytes": path.stat().st_size,
            "use": AUDIO.advice,
        }


def _describe_codec(text: str | None) -> dict[str, Any]:
    from nemo_lfr.codec.backends import is_exported
    from nemo_lfr.pretrained import find_checkpoint, load

    codec = load(text, "cpu")
    if text is not None and is_exported(text):
        return {"ONNX files": codec.name} | _layout(codec)
    path = find_checkpoint(text)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (codec.encoder, codec.decoder)]
    return {
        "checkpoint": codec.name,
        "file": str(path),
        "bytes": path.stat().st_size,
        "encoder parameters": sizes[0],
        "decoder parameters": sizes[1],
    } | _layout(codec)


def _layout(codec: "Codec[Any]") -> dict[str, Any]:
    spec = codec.spec
    contexts = {"encoder": codec.encoder.context, "decoder": codec.decoder.context}
    return {
        "sample rate": spec.sample_rate,
        "samples per frame": spec.samples_per_frame,
        "frame rate": round(spec.frame_rate, 3),
        "codebooks": spec.num_codebooks,
        "codebook size": spec.codebook_size,
        "levels": list(spec.levels),
        "bit rate": round(spec.bit_rate, 1),
        **{f"{name} context frames": [context.past, context.future] for name, context in contexts.items()},
        "fingerprint": spec.fingerprint,
    }
