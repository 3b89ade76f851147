"""Codecs of every kind with random weights, as our classes, as files and as NeMo's model; see `nemo_lfr.testing`."""

import contextlib
import copy
import functools
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lfr import testing
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.testing import LOSSES, MODULES, random_parts, synthesize
from nemo_lfr.testing import SAMPLE_RATE as RATE

__all__ = ["LOSSES", "MODULES", "RATE", "random_parts", "synthesize", "write_nemo"]

# The released decoder has 90 convolutions in residual blocks. Tests mostly need the kinds of layers, not their number.
FEWER_LAYERS: dict[str, Any] = {"resblock_kernel_sizes": [3, 11], "resblock_dilation_sizes": [1, 3]}
ALL_LAYERS: dict[str, Any] = {"resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [1, 3, 5]}
# Arguments of `codec_config` for the released size, 112.7 M parameters.
FULL_SIZE: dict[str, Any] = {
    "audio_encoder": {"base_channels": 48},
    "audio_decoder": {"base_channels": 1024, **ALL_LAYERS},
}


def speech_like(num_samples: int, seed: int = 0) -> torch.Tensor:
    """Return `synthesize` as a tensor, float32 [T_audio]."""
    return torch.from_numpy(synthesize(num_samples / RATE, seed))


# Changes to `codec_config` for the fewest layers. Every kind of layer is there.
ONE_STAGE: dict[str, Any] = {
    "samples_per_frame": 15,
    "audio_encoder": {"down_sample_rates": [15], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [2]},
    "audio_decoder": {"up_sample_rates": [15], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [2]},
}


def merge(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a config with changes; a dict is merged into the section of its name, except for another quantizer."""
    merged = dict(config)
    for key, value in changes.items():
        replaces = key == "vector_quantizer" and "_target_" in value
        merges = isinstance(value, dict) and isinstance(merged.get(key), dict) and not replaces
        merged[key] = merged[key] | value if merges else value
    return merged


# Kinds that differ from "symmetric", which has the released stages, only in one layer have one stage.
KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {},
    # NanoCodec: symmetric encoder, causal decoder whose transposed convolutions sum two channels into one.
    "nano": {
        "audio_encoder": {"activation": "half_snake", "encoded_dim": 52},
        "vector_quantizer": {"num_groups": 13},
        "audio_decoder": {
            "_target_": MODULES + "CausalHiFiGANDecoder",
            "activation": "half_snake",
            "input_dim": 52,
            "n_groups_equal_to_out_channels": True,
            "output_activation": "clamp",
        },
    },
    "causal": {
        "audio_encoder": {"_target_": MODULES + "CausalHiFiGANEncoder", "activation": "snake", "encoded_dim": 16},
        "vector_quantizer": {"num_groups": 4},
        "audio_decoder": {
            "_target_": MODULES + "CausalHiFiGANDecoder",
            "activation": "elu",
            "n_groups_equal_to_out_channels": False,
            "input_dim": 16,
        },
    },
    "single": merge(
        ONE_STAGE,
        {
            "audio_encoder": {"encoded_dim": 4},
            "vector_quantizer": {"_target_": MODULES + "FiniteScalarQuantizer", "num_levels": [8, 7, 6, 6]},
            "audio_decoder": {"input_dim": 4},
        },
    ),
    "zeros": merge(ONE_STAGE, {"audio_encoder": {"pad_mode": "zeros"}, "audio_decoder": {"pad_mode": "zeros"}}),
    "clamp": merge(ONE_STAGE, {"audio_decoder": {"output_activation": "clamp", "pad_mode": "replicate"}}),
    "two_stages": testing.TWO_STAGES,
}


def codec_config(kind: str = "symmetric", **changes: Any) -> dict[str, Any]:
    """Return `testing.codec_config` changed to one of `KINDS`, with the decoder's layers of `FEWER_LAYERS`.

    Args:
        kind: key of `KINDS`.
        changes: further changes; a dict is merged into the section of its name.
    """
    merged = dict(KINDS[kind])
    merged["audio_decoder"] = FEWER_LAYERS | merged.get("audio_decoder", {})
    return testing.codec_config(**merge(merged, changes))


def small_config(kind: str = "symmetric") -> dict[str, Any]:
    """Return `codec_config(kind)` with two stages instead of five and few residual layers, for many models of NeMo.

    NeMo takes 2 ms to build each layer. A frame has 1024 samples, as in the released codec.
    """
    config = codec_config(kind)
    config["audio_encoder"] |= {"down_sample_rates": [32, 32]}
    config["audio_decoder"] |= {"up_sample_rates": [32, 32], "resblock_dilation_sizes": [1]}
    return config


# Random weights are fitted to a signal, which takes 0.3 s of CPU time, so each codec is built once and copied.
@functools.cache
def _built(config: str) -> Codec:
    return testing.build_codec(json.loads(config))


_written: dict[tuple[str, int], bytes] = {}


def build_codec(kind: str = "symmetric", **changes: Any) -> Codec:
    """Build a codec from `random_parts`; see `codec_config` for the arguments."""
    return copy.deepcopy(_built(json.dumps(codec_config(kind, **changes))))


@functools.cache
def cached_codec(kind: str = "symmetric") -> Codec:
    """Return a codec that all tests share, so they must not change it."""
    return build_codec(kind)


def write_nemo(path: str | os.PathLike[str], config: dict[str, Any] | None = None, seed: int = 7) -> Path:
    """Write `testing.write_checkpoint(path, config, seed)`."""
    key = json.dumps(config), seed
    if key in _written:
        Path(path).write_bytes(_written[key])
    elif testing.write_checkpoint(path, config, seed).stat().st_size < 10_000_000:
        _written[key] = Path(path).read_bytes()
    return Path(path)


def export_smallest(folder: Path) -> None:
    """Export a codec with the layers of `ONE_STAGE` to ONNX, for `once("onnx-smallest", export_smallest)`.

    The command line exports it, and stdout.json has what it prints with --json.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="pip install '.[onnx]'")
    from nemo_lfr.cli.main import main

    folder.mkdir()
    model, printed = write_nemo(folder / "codec.nemo", codec_config(**ONE_STAGE)), io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["export", "onnx", "--model", str(model), "--out", str(folder), "--json"])
    model.unlink()
    (folder / "stdout.json").write_text(printed.getvalue())


def same_parts(codec: Codec, *, chunk_frames: int | None = None, **changes: Any) -> Codec:
    """Build another codec from the same modules with other options."""
    backend = TorchBackend(codec.encoder, codec.quantizer, codec.decoder, codec.sample_rate, **changes)
    return Codec(backend, chunk_frames=chunk_frames)


def stock_model(path: Path):
    """Restore a `.nemo` as NeMo's AudioCodecModel with NeMo's reader."""
    from nemo.collections.tts.models.audio_codec import AudioCodecModel

    model = AudioCodecModel.restore_from(str(path), map_location="cpu").eval()
    assert type(model) is AudioCodecModel
    return model
