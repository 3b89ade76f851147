"""Golden vectors: the outputs of every layer for a short input.

They show which layer of a port to another runtime is the first that differs. Golden vectors are stored in a
safetensors file with these tensors:

| name | content |
| --- | --- |
| `input.audio` | audio [1, T_audio]; its last frame is incomplete |
| `input.padded` | `input.audio`, zero-padded to whole frames |
| `audio_encoder.LAYER` | output of each encoder layer; LAYER is its name in a checkpoint |
| `encoded` | output of the encoder [1, D, frames] |
| `compressed` | `encoded`, squashed into the range of the FSQ levels but not rounded |
| `codes` | FSQ values in [-1, 1], [1, D, frames]: the input of the decoder |
| `tokens` | int32 [1, C, frames] |
| `audio_decoder.LAYER` | output of each decoder layer |
| `decoded` | audio [1, frames * samples_per_frame] |

The file's metadata has the key "nemo_lfr" with a JSON object. This object contains the version of the layout, the
version of the package, the description of the tokens (`CodecSpec`), and the names of the tensors in processing order.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nemo_lfr._version import __version__
from nemo_lfr.checkpoint.safetensors import write_tensors
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.programs import fp32_backend
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.frames import num_frames
from nemo_lfr.io.atomic import check_overwrite
from nemo_lfr.io.locate import expand_home
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer

VERSION = 1
METADATA = "nemo_lfr"
SUFFIX = ".safetensors"
MIN_FRAMES = 4
WRAPPED = (".conv", ".activation")  # suffixes of a layer's inner modules; only the output of the layer is stored


def export_golden(codec: Codec[Any], path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the golden vectors of a codec to a safetensors file.

    Args:
        codec: codec with the PyTorch backend, in fp32.
        path: output file, NAME.safetensors.
        overwrite: replace an existing file.

    Returns:
        The path of the file.

    Raises:
        NemoLfrError: if the codec does not run in PyTorch in fp32, or has hooks or replaced layers; if `path` does
            not end in `.safetensors`; or if `path` exists and `overwrite` is not set.
    """
    path = expand_home(path)
    if path.suffix != SUFFIX:
        raise NemoLfrError(f"{path}: golden vectors are safetensors files; use a name that ends in {SUFFIX}.")
    check_overwrite(path, overwrite)
    tensors = golden_vectors(codec)
    values = {
        "version": VERSION,
        "written_by": f"nemo_lfr {__version__}",
        "spec": asdict(codec.spec),
        "tensors": list(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {METADATA: json.dumps(values)}, overwrite)
    return path


@torch.no_grad()
def golden_vectors(codec: Codec[Any]) -> dict[str, torch.Tensor]:
    """Return the golden vectors of a codec by name, in processing order; see the module's docstring.

    Raises:
        NemoLfrError: if the codec does not run in PyTorch in fp32, or has hooks or replaced layers.
    """
    backend = fp32_backend(codec, "golden vectors")
    encoder, quantizer, decoder = backend.encoder, backend.quantizer, backend.decoder
    frame = codec.samples_per_frame
    frames = max(encoder.min_frames, decoder.min_frames, MIN_FRAMES) + 1
    audio = _audio(frames * frame - frame // 3, codec.sample_rate).to(backend.device)
    assert num_frames(audio.shape[1], frame) == frames
    tensors = {"input.audio": audio, "input.padded": nn.functional.pad(audio, (0, frames * frame - audio.shape[1]))}
    with backend.computing(), backend.autocast():
        with _recorded(encoder, "audio_encoder", tensors):
            encoded = encoder.encode_frames(tensors["input.padded"])
        tokens = quantizer.encode(encoded)
        tensors |= {"encoded": encoded, "compressed": _compressed(quantizer, encoded)}
        tensors |= {"codes": quantizer.decode_unchecked(tokens), "tokens": tokens.transpose(0, 1)}
        with _recorded(decoder, "audio_decoder", tensors):
            tensors["decoded"] = decoder.decode_frames(tensors["codes"])
    last = tensors.pop("decoded")
    return {name: value.detach().clone() for name, value in (tensors | {"decoded": last}).items()}


def _audio(num_samples: int, sample_rate: int) -> torch.Tensor:
    """Return a rising tone with harmonics and noise, [1, num_samples]."""
    time = np.arange(num_samples) / sample_rate
    phase = 2 * math.pi * (120 * time + 200 * time**2)
    tone = sum(np.sin(k * phase) / k for k in range(1, 12))
    noise = np.random.default_rng(0).standard_normal(num_samples)
    return torch.from_numpy((0.1 * tone + 0.02 * noise).astype(np.float32))[None]


def _compressed(quantizer: FiniteScalarQuantizer | GroupFiniteScalarQuantizer, encoded: torch.Tensor) -> torch.Tensor:
    """Map encoded frames [B, D, T] to the range of the FSQ levels, without rounding."""
    first = quantizer.fsqs[0] if isinstance(quantizer, GroupFiniteScalarQuantizer) else quantizer
    assert isinstance(first, FiniteScalarQuantizer)
    groups = torch.unflatten(encoded, 1, (-1, len(first.levels))).flatten(0, 1)
    return first.compress(groups).reshape(encoded.shape)


@contextmanager
def _recorded(network: nn.Module, name: str, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Add the output of every layer that runs inside a `with` block to `tensors`, under the key "{name}.LAYER"."""
    with ExitStack() as stack:
        for key, module in network.named_modules():
            if key and not key.endswith(WRAPPED):

                def record(module: nn.Module, inputs: Any, output: Any, key: str = key) -> None:
                    if isinstance(output, torch.Tensor):
                        tensors[f"{name}.{key}"] = output

                stack.enter_context(module.register_forward_hook(record))
        yield
