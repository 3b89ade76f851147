"""Read the manifest `codec.json`, which describes the tokens and contains the SHA-256 of each ONNX file.

    {"version": 2, "sample_rate": 22050, "samples_per_frame": 1024, "levels": [8, 7, 6, 6], "num_codebooks": 8,
     "fingerprint": "...", "weights_fingerprint": "...", "older_fingerprints": ["...", ...],
     "written_by": "nemo_lfr ...",
     "encoder": {"past": 6, "future": 6, "min_frames": 4}, "decoder": {...},
     "files": {"encoder.onnx": "<64 hex digits>", "decoder.onnx": "..."}}

The metadata of both ONNX files contains the same values, except "files". An ONNX file is read into memory and checked
before ONNX Runtime opens it. It is rejected if its hash differs, or if it has contents that the export never writes
(see `nemo_lfr.codec.onnx.graph`).
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lfr.codec.backend import ModuleLimits
from nemo_lfr.codec.onnx import DECODER, ENCODER, MANIFEST, VERSION
from nemo_lfr.codec.onnx.graph import check_graph
from nemo_lfr.errors import CheckpointError, quoted, shorten
from nemo_lfr.frames import Context
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.text import decode
from nemo_lfr.spec import CodecSpec

MAX_BYTES = 1 << 16
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
AGAIN = "export the codec again with nemo-lfr export onnx"


@dataclass(frozen=True)
class Manifest:
    """Validated contents of `codec.json`.

    Attributes:
        spec: description of the tokens.
        weights_fingerprint: hash of the weights alone, which older versions used as the fingerprint.
        older_fingerprints: other fingerprints that older versions computed for this codec on different kinds of CPU;
            may be empty.
        encoder: context and shortest input of the encoder.
        decoder: context and shortest input of the decoder.
        files: SHA-256 of each ONNX file, by file name.
        values: all values of the manifest except "files"; the metadata of both ONNX files must equal them.
    """

    spec: CodecSpec
    weights_fingerprint: str
    older_fingerprints: tuple[str, ...]
    encoder: ModuleLimits
    decoder: ModuleLimits
    files: dict[str, str]
    values: dict[str, Any]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an exported folder.

    Raises:
        CheckpointError: if the manifest is missing, cannot be read or is not valid.
    """
    path = folder / MANIFEST
    try:
        if not os.path.lexists(path):
            raise CheckpointError(
                f"{folder}: no {MANIFEST} in this folder. An ONNX file needs the {MANIFEST} of its export in the same "
                f"folder; copy it there, or {AGAIN}."
            )
        with open_regular(path, CheckpointError, AGAIN) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the file cannot be read ({shorten(error.strerror or error)}); check its permissions, or {AGAIN}."
        ) from error
    if len(raw) > MAX_BYTES:
        raise CheckpointError(f"{path}: the file is larger than {MAX_BYTES} bytes, the limit for manifests; {AGAIN}.")
    try:
        return parse_manifest(json.loads(decode(raw)))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error} {AGAIN[0].upper()}{AGAIN[1:]}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the file is not valid JSON ({shorten(error)}); {AGAIN}.") from error


def parse_manifest(values: Any) -> Manifest:
    """Validate the values of a manifest.

    Raises:
        CheckpointError: for the first invalid value.
    """
    if not isinstance(values, dict):
        raise CheckpointError("the file is not a JSON object.")
    version = values.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(f"version is {quoted(version)}, but this nemo_lfr only reads version {VERSION}.")
    levels = values.get("levels")
    if not isinstance(levels, list) or not 1 <= len(levels) <= 16:
        raise CheckpointError(f"levels are {quoted(levels)}; expected a list of 1 to 16 whole numbers.")
    levels = tuple(_whole({"levels": level}, "levels", 2, 4096) for level in levels)
    if math.prod(levels) >= 2**31:
        raise CheckpointError(f"levels are {quoted(levels)}, so a codebook would have 2^31 entries or more.")
    older = values.get("older_fingerprints", [])
    if not isinstance(older, list) or len(older) > 16:
        raise CheckpointError(f"older_fingerprints are {quoted(older)}; expected a list of at most 16 hashes.")
    files = values.get("files")
    if not isinstance(files, dict) or set(files) != {ENCODER, DECODER}:
        raise CheckpointError(f"files are {quoted(files)}; expected an object with {ENCODER} and {DECODER}.")
    return Manifest(
        spec=CodecSpec(
            sample_rate=_whole(values, "sample_rate", 1000, 192_000),
            samples_per_frame=_whole(values, "samples_per_frame", 1, 1_000_000),
            levels=levels,
            num_codebooks=_whole(values, "num_codebooks", 1, 256),
            fingerprint=_text(values, "fingerprint", _FINGERPRINT),
        ),
        weights_fingerprint=_text(values, "weights_fingerprint", _FINGERPRINT),
        older_fingerprints=tuple(
            _text({"older_fingerprints": item}, "older_fingerprints", _FINGERPRINT) for item in older
        ),
        encoder=_limits(values, "encoder"),
        decoder=_limits(values, "decoder"),
        files={name: _text(files, name, _SHA256) for name in (ENCODER, DECODER)},
        values={key: value for key, value in values.items() if key != "files"},
    )


def _whole(values: dict[str, Any], name: str, low: int, high: int) -> int:
    value = values.get(name)
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(f"{name} is {quoted(value)}; expected a whole number from {low} to {high}.")
    return value


def _text(values: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise CheckpointError(f"{name} is {quoted(value)}; expected a hash in hexadecimal.")
    return value


def _limits(values: dict[str, Any], name: str) -> ModuleLimits:
    part = values.get(name)
    if not isinstance(part, dict):
        raise CheckpointError(f"{name} is {quoted(part)}; expected an object with past, future and min_frames.")
    past, future = (_whole(part, key, 0, 4096) for key in ("past", "future"))
    return ModuleLimits(Context(past, future), _whole(part, "min_frames", 1, 4096))


def read_verified(folder: Path, name: str, manifest: Manifest) -> bytes:
    """Read encoder.onnx or decoder.onnx, and check its hash and its contents.

    Args:
        folder: folder with the file.
        name: `ENCODER` or `DECODER`.
        manifest: manifest of the folder.

    Returns:
        Content of the file.

    Raises:
        CheckpointError: if the file cannot be read, its hash differs from the one in the manifest, or it contains
            something that the export does not write.
    """
    path = folder / name
    if not folder.exists():
        raise CheckpointError(f"{folder}: this folder was moved or deleted after it was opened; load the codec again.")
    if not os.path.lexists(path):
        other = "decode" if name == ENCODER else "encode"
        raise CheckpointError(
            f"{path}: no such file, so this folder can only {other}; nemo-lfr export onnx writes it."
        )
    try:
        with open_regular(path, CheckpointError, AGAIN) as file:
            data = file.read()
    except OSError as error:
        raise CheckpointError(
            f"{path}: the file cannot be read ({shorten(error.strerror or error)}); check its permissions, or {AGAIN}."
        ) from error
    if hashlib.sha256(data).hexdigest() != manifest.files[name]:
        raise CheckpointError(
            f"{path}: the SHA-256 of this file differs from the one in {MANIFEST}, so the file is damaged, truncated "
            f"or from another export; {AGAIN}."
        )
    try:
        check_graph(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: the file {error}; {AGAIN}.") from None
    return data
