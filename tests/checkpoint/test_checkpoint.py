"""Tests of reading `.nemo` files: every layout that NeMo has written, and damaged or malicious files.

`HOSTILE` is a table of such files, each with the expected error message. No row may run code, open a socket, write a
file, or take much time or memory.
"""

import argparse
import bz2
import copy
import gzip
import io
import lzma
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import nemo_lfr
from nemo_lfr.checkpoint import (
    build_parts,
    load_parts,
    read_checkpoint,
    read_config,
    split_weight_norm,
    write_checkpoint,
)
from nemo_lfr.checkpoint.interpolations import Expansion
from nemo_lfr.checkpoint.names import gain_of
from nemo_lfr.checkpoint.source import MemorySource
from nemo_lfr.checkpoint.tensors import Tensors
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import CheckpointError
from nemo_lfr.io.hub import find_checkpoint
from tests.crash import killed_at_random_moments, on_a_full_disk
from tests.models import KINDS, MODULES, build_codec, codec_config, random_parts, synthesize, write_nemo
from tests.tiers import slow_after, slow_except

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
GAIN, DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"
SIZES: dict[str, Any] = {"audio_encoder": {"base_channels": 2}, "audio_decoder": {"base_channels": 8}}
PARTS = random_parts(codec_config("two_stages", **SIZES))
STATE = {
    f"{name}.{key}": value for name, part in PARTS.named().items() for key, value in split_weight_norm(part).items()
}
KEY = f"audio_encoder.pre_conv.conv.{DIRECTION}"
BIAS = "audio_decoder.post_conv.conv.bias"


def config(**changes: Any) -> dict[str, Any]:
    values = codec_config("two_stages", **SIZES) | {"target": "nemo.collections.tts.models.AudioCodecModel"}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = values[section] | {name: value}
        else:
            values[key] = value
    return values


def without(mapping: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def yaml_of(values: Any) -> bytes:
    return OmegaConf.to_yaml(OmegaConf.create(values)).encode()


def zip_of(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def with_byte_order(order: bytes) -> bytes:
    """Return `WEIGHTS_BYTES` with another record `byteorder`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WEIGHTS_BYTES)) as archive, zipfile.ZipFile(buffer, "w") as changed:
        for info in archive.infolist():
            changed.writestr(info, order if info.filename.endswith("/byteorder") else archive.read(info))
    return buffer.getvalue()


def tar_of(members: list[tuple[str, Any]], mode: str = "w", **options: Any) -> bytes:
    """Return a tar of members: (name, contents), or (name, changes to the header) for a member without contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:  # type: ignore[call-overload]
        for name, contents in members:
            info = tarfile.TarInfo(name)
            if isinstance(contents, bytes):
                info.size = len(contents)
                archive.addfile(info, io.BytesIO(contents))
            else:
                for key, value in contents.items():
                    setattr(info, key, value)
                archive.addfile(info)
    return buffer.getvalue()


CONFIG_BYTES, WEIGHTS_BYTES = yaml_of(config()), zip_of(STATE)
GOOD = [(CONFIG, CONFIG_BYTES), (WEIGHTS, WEIGHTS_BYTES)]
GOOD_TAR = tar_of(GOOD)


def with_config(values: Any) -> bytes:
    return tar_of([(CONFIG, values if isinstance(values, bytes) else yaml_of(values)), GOOD[1]])


def with_weights(state: Any) -> bytes:
    return tar_of([GOOD[0], (WEIGHTS, state if isinstance(state, bytes) else zip_of(state))])


def with_state(**changes: Any) -> bytes:
    return with_weights(STATE | changes)


@pytest.fixture
def nemo(tmp_path):
    """Return a function that writes bytes to a file."""

    def write(contents: bytes) -> Path:
        path = tmp_path / "stranger.nemo"
        path.write_bytes(contents)
        return path

    return write


def tokens_of(path: Path) -> torch.Tensor:
    parts, _ = read_checkpoint(path)
    return Codec(TorchBackend(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate)).encode(
        synthesize(0.2)
    )[0]


EXPECTED_TOKENS = Codec(TorchBackend(PARTS.encoder, PARTS.quantizer, PARTS.decoder, 22050)).encode(synthesize(0.2))[0]

# --- valid files


def nemo_2_0(state):
    return {key.replace(GAIN, "weight_g").replace(DIRECTION, "weight_v"): value for key, value in state.items()}


def nemo_2_7(state):
    return state | {
        "discriminator.discriminators.2.resample.kernel": torch.ones(3, 1, 5),
        "discriminator.discriminators.0.discriminators.0.conv_layers.0.conv.weight_g": torch.ones(4, 1, 1, 1),
    }


def nemo_3_0(state):
    wavlm = {f"discriminator.discriminators.2.slm_model.ssl_model.layer.{i}.weight": torch.ones(3) for i in range(58)}
    return nemo_2_7(state) | wavlm | {"stft_loss_fn.window": torch.ones(8), "mel_loss_fn.mel": torch.ones(3, 3)}


def plain(state):
    return {f"{name}.{key}": value for name, part in PARTS.named().items() for key, value in part.state_dict().items()}


def as_module(state):
    """Return the weights as `module.state_dict()` does: an OrderedDict of Parameters, with metadata."""
    values = OrderedDict((key, torch.nn.Parameter(v) if v.is_floating_point() else v) for key, v in state.items())
    values._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]
    return values


def endless() -> argparse.Namespace:
    values = argparse.Namespace()
    values.values = values
    return values


class Loop:
    """Object that refers to itself, as a trainer does."""

    def __init__(self) -> None:
        self.loop = self


def as_namespace(values: Any) -> Any:
    if isinstance(values, dict):
        return argparse.Namespace(**{key: as_namespace(value) for key, value in values.items()})
    return [as_namespace(value) for value in values] if isinstance(values, list) else values


class AttributeDict(dict):  # type: ignore[type-arg]
    """Dict of a class of its own, as Lightning's hyperparameters are."""


def lightning(values: Any, **more: Any) -> bytes:
    """Return a training checkpoint of the valid weights, as Lightning and NeMo write it."""
    parameters = OmegaConf.create({"cfg": values}) if isinstance(values, dict) else values
    return zip_of({"epoch": 3, "state_dict": as_module(STATE), "hyper_parameters": parameters} | more)


SPELLINGS: dict[str, Callable[[], bytes]] = {
    "NeMo 2.0": lambda: with_weights(nemo_2_0(STATE)),
    "NeMo 2.4": lambda: with_weights(STATE),
    "NeMo 2.7": lambda: with_weights(nemo_2_7(STATE)),
    "NeMo 3.0, with WavLM": lambda: with_weights(nemo_3_0(STATE)),
    "weight norm removed": lambda: with_weights(plain(STATE)),
    "DistributedDataParallel": lambda: with_weights({f"module.{k}": v for k, v in STATE.items()}),
    "Lightning Fabric": lambda: with_weights({f"_forward_module.{k}": v for k, v in STATE.items()}),
    "torch.compile": lambda: with_weights({f"_orig_mod.{k}": v for k, v in STATE.items()}),
    "both, in either order": lambda: with_weights(
        {f"{'_orig_mod.module' if 'encoder' in k else 'module._orig_mod'}.{k}": v for k, v in STATE.items()}
    ),
    "a compiled encoder": lambda: with_weights(
        {k.replace("audio_encoder.", "audio_encoder._orig_mod."): v for k, v in nemo_2_0(STATE).items()}
    ),
    "compiled layers": lambda: with_weights(
        {
            k.replace(".pre_conv.", ".pre_conv._orig_mod.").replace(".conv.", ".module.conv."): v
            for k, v in STATE.items()
        }
    ),
    "a module's state dict": lambda: with_weights(as_module(STATE)),
    "Lightning's nesting": lambda: with_weights({"state_dict": STATE, "epoch": 3}),
    "fp64": lambda: with_weights({k: v.double() if v.is_floating_point() else v for k, v in STATE.items()}),
    "permuted memory": lambda: with_state(**{KEY: STATE[KEY].permute(2, 1, 0).contiguous().permute(2, 1, 0)}),
    "views of one storage": lambda: with_state(**{KEY: torch.stack([STATE[KEY], STATE[KEY]])[1]}),
    "values stored negated": lambda: with_state(**{key: torch._neg_view(STATE[key].neg()) for key in (KEY, BIAS)}),
    "parameters stored negated": lambda: with_state(**{KEY: torch.nn.Parameter(torch._neg_view(STATE[KEY].neg()))}),
    "gzip": lambda: tar_of(GOOD, "w:gz"),
    "bzip2": lambda: tar_of(GOOD, "w:bz2"),
    "xz": lambda: tar_of(GOOD, "w:xz"),
    "GNU tar": lambda: tar_of(GOOD, format=tarfile.GNU_FORMAT),
    "ustar": lambda: tar_of(GOOD, format=tarfile.USTAR_FORMAT),
    "./ before the names": lambda: tar_of([(f"./{name}", contents) for name, contents in GOOD]),
    "weights first": lambda: tar_of(GOOD[::-1]),
    "an artifact": lambda: tar_of([*GOOD, ("1234_tokenizer.model", b"abc")]),
    # The archive is not extracted, so members with paths outside the folder have no effect.
    "../ beside": lambda: tar_of([("../escaped", b"x"), *GOOD]),
    "absolute path beside": lambda: tar_of([("/tmp/escaped", b"x"), *GOOD]),
    "symbolic link beside": lambda: tar_of([("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), *GOOD]),
    "device beside": lambda: tar_of([("zero", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}), *GOOD]),
    "FIFO beside": lambda: tar_of([("fifo", {"type": tarfile.FIFOTYPE}), *GOOD]),
    "our own names": lambda: with_config(
        config(vector_quantizer___target_="nemo_lfr.modules.quantizer.GroupFiniteScalarQuantizer")
    ),
    "interpolation": lambda: with_config(config(samples_per_frame="${frame}", frame=15)),
    "training checkpoint": lambda: lightning(
        config(samples_per_frame="${frame}", frame=15),
        optimizer_states=[torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict()],
        callbacks={"ModelCheckpoint": {"dirpath": Path("/tmp"), "best": torch.tensor(1.0), "time": time.gmtime(0)}},
    ),
    "training checkpoint that would run code": lambda: lightning(config(), callbacks=Payload()),
    "training checkpoint with a Namespace": lambda: lightning(
        None, hyper_parameters=argparse.Namespace(cfg=OmegaConf.create(config()), trainer=None)
    ),
    "training checkpoint with an object beside the config": lambda: lightning(
        None, hyper_parameters={"cfg": OmegaConf.create(config()), "trainer": Loop()}
    ),
    "training checkpoint with Lightning's dict": lambda: lightning(None, hyper_parameters=AttributeDict(cfg=config())),
    "training checkpoint whose config is Lightning's dict": lambda: lightning(
        None, hyper_parameters={"cfg": AttributeDict(config())}
    ),
    "training checkpoint whose config is a Namespace": lambda: lightning(
        None, hyper_parameters={"cfg": as_namespace(config())}
    ),
    "training checkpoint whose config is a Namespace of configs": lambda: lightning(
        None,
        hyper_parameters=argparse.Namespace(cfg=argparse.Namespace(**OmegaConf.create(config()), trainer=Loop())),
    ),
    "NeMo's own resolver": lambda: with_config(config(optim={"steps": "${multiply:2,3}"})),
}


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_weight_norm_naming_gives_the_same_tokens(nemo, spelling):
    path = nemo(SPELLINGS[spelling]())
    assert torch.equal(tokens_of(path), EXPECTED_TOKENS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_fp16_weights_are_widened(nemo):
    half = {key: value.half() if value.is_floating_point() else value for key, value in STATE.items()}
    parts, _ = read_checkpoint(nemo(with_weights(half)))
    assert {parameter.dtype for parameter in parts.encoder.parameters()} == {torch.float32}
    torch.testing.assert_close(parts.decoder.post_conv.conv.bias, STATE[BIAS].half().float())


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["NeMo 2.0", "NeMo 3.0, with WavLM", "weight norm removed"])
def test_weights_for_training_keep_weight_norm(nemo, spelling):
    parts, tensors = load_parts(nemo(SPELLINGS[spelling]()))
    assert dict(parts.encoder.named_parameters()).keys() >= {f"pre_conv.conv.{GAIN}", f"pre_conv.conv.{DIRECTION}"}
    for name, part in parts.named().items():
        for key, value in PARTS.named()[name].state_dict().items():
            weight = dict(part.state_dict()).get(key)
            if weight is None:
                weight = part.get_submodule(key.rpartition(".")[0]).weight
            torch.testing.assert_close(weight, value)
    rest = [key for key in tensors.entries if key.startswith("discriminator.")]
    assert len(rest) == (60 if "3.0" in spelling else 0)


@pytest.mark.slow
def test_strict_false_initializes_missing_and_ignores_unknown_weights(nemo):
    path = nemo(with_weights(without(STATE, BIAS) | {"audio_encoder.bogus": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="1 weights that are not in its config"):
        load_parts(path)
    parts, _ = load_parts(path, strict=False)
    assert parts.decoder.post_conv.conv.bias.isfinite().all()
    torch.testing.assert_close(parts.encoder.pre_conv.conv.bias, STATE["audio_encoder.pre_conv.conv.bias"])


def test_the_file_may_change_after_loading(nemo):
    path = nemo(GOOD_TAR)
    parts, _ = read_checkpoint(path)
    path.write_bytes(b"\0" * len(GOOD_TAR))
    torch.testing.assert_close(parts.decoder.post_conv.conv.bias, STATE[BIAS])


def test_written_checkpoint_reads_back_unchanged(tmp_path):
    write_checkpoint(tmp_path / "a.nemo", config(), STATE)
    assert torch.equal(tokens_of(tmp_path / "a.nemo"), EXPECTED_TOKENS)
    write_checkpoint(tmp_path / "b.nemo", config(), STATE)
    assert (tmp_path / "a.nemo").read_bytes() == (tmp_path / "b.nemo").read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.nemo", "b.nemo"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(KINDS, "symmetric", "two_stages"))
def test_plain_weights_are_the_same_when_written_and_read_again(tmp_path, kind):
    codec = build_codec(kind)
    read = nemo_lfr.load(write_nemo(tmp_path / "a.nemo", codec_config(kind)))
    assert read.fingerprint == codec.fingerprint
    for name in ("encoder", "decoder"):
        expected = getattr(codec, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(read, name).state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3, 5), (64, 32, 11), (1, 16, 7), (48, 96, 16)])
def test_weight_norm_gain_keeps_the_dtype_and_device_of_its_weight(dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    gain = gain_of(weight)
    assert gain.dtype == dtype and gain.shape == (shape[0], 1, 1)
    torch.testing.assert_close(gain.flatten(), weight.double().flatten(1).norm(dim=1).to(dtype))
    if dtype.itemsize > 2:
        assert torch.equal(torch._weight_norm(weight, gain, 0), weight)
    assert gain_of(weight.to("meta")).shape == gain.shape and not gain_of(torch.zeros(2, 3, 1)).any()


def test_written_config_names_nemo_classes(tmp_path):
    ours = {
        "audio_encoder": {"_target_": "nemo_lfr.modules.encoder.HiFiGANEncoder", "causal": True},
        "audio_decoder": {"_target_": "nemo_lfr.modules.decoder.HiFiGANDecoder", "causal": False},
        "vector_quantizer": {"_target_": "nemo_lfr.modules.quantizer.FiniteScalarQuantizer"},
    }
    write_checkpoint(tmp_path / "a.nemo", ours, {})
    written = read_config(tmp_path / "a.nemo")
    assert written.audio_encoder._target_ == MODULES + "CausalHiFiGANEncoder" and "causal" not in written.audio_encoder
    assert written.audio_decoder._target_ == MODULES + "HiFiGANDecoder"
    assert written.vector_quantizer._target_ == MODULES + "FiniteScalarQuantizer"
    assert written.target.endswith(".AudioCodecModel")


# --- invalid files


class Payload:
    """Object that pickles as a call of os.system."""

    def __reduce__(self) -> Any:
        return os.system, ("touch escaped",)


def pickled_in_zip(data: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """Return a PyTorch zip file that contains this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", data)
        for name, contents in (records or {}).items():
            archive.writestr(f"model/data/{name}", contents)
    return buffer.getvalue()


def data_pickle(contents: bytes) -> bytes:
    """Return the pickle inside a PyTorch zip file."""
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def tensor_pickle(
    shape: tuple, stride: tuple, offset: int = 0, key: str = KEY, storage: str = "FloatStorage"
) -> bytes:
    """Return the pickle of a state dict with one tensor, which is in record 0 and may have an impossible shape."""

    def number(value: int) -> bytes:
        return b"\x8a" + bytes([8]) + struct.pack("<q", value)

    def sizes(values: tuple) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    name = key.encode()
    return (
        b"\x80\x02}X" + struct.pack("<I", len(name)) + name + b"ctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\0\0\0storagectorch\n" + storage.encode() + b"\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
        + number(offset) + sizes(shape) + sizes(stride) + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def one_tensor(*arguments: Any, **options: Any) -> bytes:
    return with_weights(pickled_in_zip(tensor_pickle(*arguments, **options), {"0": bytes(64)}))


def flipped(contents: bytes, position: int, bit: int = 1) -> bytes:
    damaged = bytearray(contents)
    damaged[position] ^= bit
    return bytes(damaged)


def changed_header(field: slice, value: bytes) -> bytes:
    """Return the valid tar with one field of its first header overwritten and the header's checksum corrected."""
    raw = bytearray(GOOD_TAR)
    raw[field] = value.ljust(field.stop - field.start, b"\0")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def pax(headers: dict[str, str], name: str = CONFIG) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.pax_headers = headers
        archive.addfile(info)
    raw = buffer.getvalue().rstrip(b"\0")  # without the blocks that end an archive
    return raw + bytes(-len(raw) % 512)


def nested_pax(count: int) -> bytes:
    """Return extended headers that describe extended headers; tarfile reads them recursively."""
    raw = pax({"comment": "x"})
    return raw[:1024] * count + GOOD_TAR


def aliases() -> bytes:
    lines = [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 10)]
    return b"\n".join(lines) + b"\n" + CONFIG_BYTES


def rezipped(change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WEIGHTS_BYTES)) as old, zipfile.ZipFile(buffer, "w") as new:
        change(old, new)
    return buffer.getvalue()


def compressed_records(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in old.namelist():
        new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)


def two_pickles(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in old.namelist():
        new.writestr(name, old.read(name))
    new.writestr("other/data.pkl", b"\x80\x02}.")


def no_records(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in old.namelist():
        if "/data/" not in name:
            new.writestr(name, old.read(name))


def short_records(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in old.namelist():
        new.writestr(name, old.read(name)[:2] if "/data/" in name else old.read(name))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def twice(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for name in [*old.namelist(), old.namelist()[-1]]:
        new.writestr(name, old.read(name))


def at_record(offset: int) -> int:
    """Return the position, in the valid tar, of a byte of the first tensor's values."""
    weights = GOOD_TAR.index(WEIGHTS_BYTES)
    with zipfile.ZipFile(io.BytesIO(WEIGHTS_BYTES)) as archive:
        info = next(info for info in archive.infolist() if "/data/" in info.filename and info.file_size > 64)
    return weights + WEIGHTS_BYTES.index(b"/data/", info.header_offset) + 200 + offset


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


def shared(depth: int) -> dict[str, Any]:
    """Return lists of two references to the next list; with depth 0, a list that contains itself."""
    value: list[Any] = []
    if not depth:
        value.append(value)
    for _ in range(depth):
        value = [value, value]
    return {"a": value}


def doubling(both: Any, name: str = "${{x{}}}") -> dict[str, Any]:
    """Return definitions of x1 ... x40, each of which uses the previous one twice."""

    def filled(value: Any, before: str) -> Any:
        return [filled(item, before) for item in value] if isinstance(value, list) else value.format(before)

    return {f"x{number}": filled(both, name.format(number - 1)) for number in range(1, 41)}


def masked_dict() -> bytes:
    """Return a pickled OrderedDict whose attributes `get` and `items` are numbers."""
    return b"\x80\x02ccollections\nOrderedDict\n)R}(X\x03\0\0\0getK\x01X\x05\0\0\0itemsK\x01ub."


def build_opcode() -> bytes:
    """Return a pickle that sets attributes of the function that rebuilds tensors."""
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\0\0\0evilK\x01sb."


def target(part: str, name: str) -> bytes:
    return with_config(config(**{f"{part}___target_": name}))


BIG = 1 << 40
BAD_CLASSES = [
    "os.system", "subprocess.Popen", "builtins.eval", "torch.load", "torch.nn.Linear", "hydra.utils.instantiate",
    "nemo.collections.asr.models.EncDecCTCModel", "nemo_lfr.checkpoint.writer.write_checkpoint", "",
    MODULES + "ResNetSpeakerEncoder", MODULES + "os.system",
]  # fmt: skip


@pytest.fixture
def no_crc():
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("kind", ["nemo", "ckpt", "ours"])
def test_files_that_pytorch_wrote_without_checksums_are_read(tmp_path, no_crc, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "ours":
        write_checkpoint(path, config(), STATE)
    else:
        path.write_bytes(with_weights(STATE) if kind == "nemo" else lightning(config()))
    assert torch.equal(tokens_of(path), EXPECTED_TOKENS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # everything but the values is checked as before
    with pytest.raises(CheckpointError):
        tokens_of(path)


def test_one_missing_checksum_among_others_is_damage(tmp_path):
    raw = bytearray(WEIGHTS_BYTES)
    with zipfile.ZipFile(io.BytesIO(WEIGHTS_BYTES)) as archive:
        crc = next(info.CRC for info in archive.infolist() if info.filename.endswith("data/0"))
    (tmp_path / "a.nemo").write_bytes(with_weights(bytes(raw.replace(struct.pack("<I", crc), bytes(4)))))
    with pytest.raises(CheckpointError, match="wrong checksum"):
        tokens_of(tmp_path / "a.nemo")


class CountingSource(MemorySource):
    """Bytes in memory that count how many of them are read."""

    count = 0

    def read_into(self, offset, buffer):
        self.count += len(buffer)
        super().read_into(offset, buffer)


def test_tensors_that_share_a_storage_are_read_in_linear_time():
    flat = torch.arange(20_000.0)
    data = zip_of({str(start): flat[start : start + 100] for start in range(0, len(flat), 100)})
    source = CountingSource(data)
    tensors = Tensors(Path("a"), source)
    for start in range(0, len(flat), 100):
        assert torch.equal(tensors[str(start)], flat[start : start + 100])
    assert source.count < 4 * len(data)


def test_damage_anywhere_in_a_shared_storage_is_found():
    flat = torch.zeros(1000)
    data = bytearray(zip_of({"a": flat[:10], "b": flat[10:20]}))
    data[data.index(b"data/0") + 2000] ^= 1
    tensors = Tensors(Path("a"), MemorySource(data))
    for key in "ab" * 2:
        with pytest.raises(CheckpointError, match="wrong checksum"):
            tensors[key]


# name -> (function that makes the file, regular expression of the message)
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    # Not a checkpoint at all.
    "empty file": (lambda: b"", "empty"),
    "one byte": (lambda: b"x", "not a .nemo"),
    "random bytes": (lambda: bytes(range(256)) * 40, "not a .nemo"),
    "zeros": (lambda: bytes(10240), "no model_config.yaml"),
    "Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "web page": (lambda: b"\n<!DOCTYPE html><html>Not Found</html>", "web page"),
    "zip instead of tar": (lambda: WEIGHTS_BYTES, "no hyper_parameters"),
    "empty tar": (lambda: tar_of([]), "no model_config.yaml"),
    "tar in a tar": (lambda: tar_of([("model.nemo", GOOD_TAR)]), "no model_config.yaml"),
    # Truncated or damaged tars.
    **{
        f"truncated at {share} %": (lambda share=share: GOOD_TAR[: int(len(GOOD_TAR) * share / 100)], "")
        for share in (0.1, 1, 5, 10, 25, 50, 75, 90)
    },
    "truncated after the config": (lambda: GOOD_TAR[: GOOD_TAR.index(WEIGHTS_BYTES) - 512], "no model_weights"),
    "truncated in the last kilobyte": (lambda: GOOD_TAR[: GOOD_TAR.index(WEIGHTS_BYTES) + len(WEIGHTS_BYTES) - 900], ""),
    "header's sum is wrong": (lambda: flipped(GOOD_TAR, 0), "no model_config.yaml|not a .nemo"),
    "no config": (lambda: tar_of(GOOD[1:]), "no model_config.yaml"),
    "no weights": (lambda: tar_of(GOOD[:1]), "no model_weights.ckpt"),
    "config in a folder": (lambda: tar_of([("a/" + CONFIG, CONFIG_BYTES), GOOD[1]]), "no model_config.yaml"),
    "config above the folder": (lambda: tar_of([("../" + CONFIG, CONFIG_BYTES), GOOD[1]]), "no model_config.yaml"),
    "config at the root": (lambda: tar_of([("/" + CONFIG, CONFIG_BYTES), GOOD[1]]), "no model_config.yaml"),
    "two configs": (lambda: tar_of([GOOD[0], *GOOD]), "model_config.yaml occurs twice"),
    "two configs, one with ./": (lambda: tar_of([*GOOD, ("./" + CONFIG, b"a: 1")]), "model_config.yaml occurs twice"),
    "two weights": (lambda: tar_of([*GOOD, GOOD[1]]), "model_weights.ckpt occurs twice"),
    **{
        f"{name} is a {kind}": (
            lambda name=name, changes=changes: tar_of([*(m for m in GOOD if m[0] != name), (name, changes)]),
            f"{name} is not a regular file",
        )
        for name in (CONFIG, WEIGHTS)
        for kind, changes in {
            "symbolic link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
            "hard link": {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"},
            "FIFO": {"type": tarfile.FIFOTYPE},
            "device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
            "folder": {"type": tarfile.DIRTYPE},
        }.items()
    },
    "65 members": (lambda: tar_of([*GOOD, *((f"m{i}", b"") for i in range(63))]), "more than 64 members"),
    "20000 members": (lambda: tar_of([(f"m{i}", b"") for i in range(20_000)]), "more than 64 members"),
    "config of 2 MiB": (lambda: with_config(CONFIG_BYTES + b"#" * (2 << 20)), "model_config.yaml claims"),
    "member of a terabyte": (lambda: changed_header(slice(124, 136), b"\x80" + struct.pack(">11s", b"\0" * 5 + b"\1")), ""),
    "member of negative size": (lambda: changed_header(slice(124, 136), b"\xff" * 12), ""),
    "size is no number": (lambda: changed_header(slice(124, 136), b"zzzzzzzzzzz"), ""),
    "PAX size of 10^18": (lambda: pax({"size": "1000000000000000000"}) + GOOD_TAR, ""),
    "PAX size is negative": (lambda: pax({"size": "-512"}) + GOOD_TAR, ""),
    "PAX size is no number": (lambda: pax({"size": "many"}) + GOOD_TAR, ""),
    "PAX path gives a second config": (lambda: pax({"path": CONFIG}, "other") + GOOD_TAR, "twice"),
    "sparse member": (lambda: pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99"}), ""),
    "5000 nested PAX headers": (lambda: nested_pax(5000), ""),
    "PAX header of 8 MiB": (lambda: pax({"comment": "x" * (8 << 20)}) + GOOD_TAR, "claims"),
    # Compressed ones.
    "gzip bomb in a member beside": (lambda: gzip.compress(tar_of([("pad", bytes(200 << 20)), *GOOD]), 1), "unpacks to more"),
    "gzip bomb in a header": (lambda: gzip.compress(pax({"comment": "x" * (96 << 20)}) + GOOD_TAR, 1), "claims"),
    "gzip truncated": (lambda: gzip.compress(GOOD_TAR)[:-2000], ""),
    "gzip checksum": (lambda: flipped(gzip.compress(GOOD_TAR), 5000), ""),
    "bzip2 damaged": (lambda: flipped(bz2.compress(GOOD_TAR), 3000), ""),
    "xz damaged": (lambda: flipped(lzma.compress(GOOD_TAR), 3000), ""),
    "gzip of nothing": (lambda: gzip.compress(b""), ""),
    # Invalid configs.
    "config is empty": (lambda: with_config(b""), "no 'sample_rate'"),
    "config is binary": (lambda: with_config(bytes(range(128, 256))), "model_config.yaml"),
    "config is broken YAML": (lambda: with_config(b"a: [1, 2\nb: }"), "model_config.yaml"),
    "config is a list": (lambda: with_config(b"- 1\n- 2\n"), "a list, not a mapping"),
    "config is a word": (lambda: with_config(b"hello"), "model_config.yaml"),
    "config calls Python": (lambda: with_config(b"a: !!python/object/apply:os.system ['touch escaped']"), "model_config"),
    "config of aliases": (lambda: with_config(aliases()), "aliases"),
    "config is deep": (lambda: with_config(b"a: " + b"[" * 500), "deeply nested"),
    # PyYAML 6.0.4 reaches its own limit first.
    "config is a pit": (lambda: with_config(b"a: " + b"[" * 50_000), "deeply nested|nesting depth"),
    "config is long": (lambda: with_config(b"a: [" + b"1," * 400_000 + b"]"), "too large"),
    "environment": (lambda: with_config(config(name="${oc.env:HOME}")), "resolver"),
    "environment, spaced": (lambda: with_config(config(name="${ oc.env : HOME }")), "resolver"),
    "environment, escaped": (lambda: with_config(CONFIG_BYTES + b'name: "\\u0024{oc.env:HOME}"\n'), "resolver"),
    "environment, nested": (lambda: with_config(config(x="oc", name="${${x}.env:HOME}")), "resolver"),
    "environment, old": (lambda: with_config(config(name="${env:HOME}")), "resolver"),
    "environment in a list": (lambda: with_config(config(loss_resolutions=[["${oc.env:HOME}"]])), "resolver"),
    "resolver that decodes": (lambda: with_config(config(name="${oc.decode:'1'}")), "resolver"),
    "interpolation of nothing": (lambda: with_config(config(sample_rate="${nothing}")), "sample_rate cannot be resolved"),
    "interpolation in a circle": (lambda: with_config(config(sample_rate="${sample_rate}")), "sample_rate"),
    "interpolations that double": (lambda: with_config(config(x0=1, sample_rate="${x40}", **doubling("{0}{0}"))), "expand"),
    "sections that double": (
        lambda: with_config(config(x0=1, sample_rate=22050, audio_encoder={"a": "${x40}"}, **doubling(["{0}", "{0}"]))),
        "expand",
    ),
    "relative interpolations that double": (
        lambda: with_config(config(x0=1, sample_rate="${.x40}", **doubling("{0}{0}", "${{.x{}}}"))), "expand",
    ),
    "interpolations that double through a section": (
        lambda: with_config(config(s={"x0": 1} | doubling("{0}{0}", "${{t.x{}}}"), t="${s}", sample_rate="${t.x40}")),
        r"\$\{t\.x40\} cannot be resolved, because the value of one of its parent keys is an interpolation, '\$\{s\}'; write",
    ),
    "interpolations that double in another section": (
        lambda: with_config(config(train_ds={"x0": 1} | doubling("{0}{0}", "${{.x{}}}"))), "expand",
    ),
    "interpolation that another one names": (lambda: with_config(config(x="y", sample_rate="${${x}}")), "nested interpolation"),
    "interpolation of 40,000 spaces": (
        lambda: with_config(CONFIG_BYTES + b"z: '${" + b" " * 40_000 + b"'\n"), r"with '\$\{' is too long",
    ),
    "ckpt with an interpolation of 40,000 spaces": (
        lambda: lightning(None, hyper_parameters=config() | {"z": "${" + " " * 40_000}), r"with '\$\{' is too long",
    ),
    "interpolation of its own section": (
        lambda: with_config(config(vector_quantizer={"a": "${vector_quantizer}"})), "form a cycle",
    ),
    "sample rate of 6,000 digits": (
        lambda: with_config(CONFIG_BYTES.replace(b"sample_rate: ", b"sample_rate: 0x" + b"f" * 6000, 1)), "sample_rate",
    ),
    "encoded_dim of 6,000 digits": (
        lambda: with_config(CONFIG_BYTES.replace(b"encoded_dim: ", b"encoded_dim: 0x" + b"f" * 6000, 1)), "encoded_dim",
    ),
    "state dict with a number for a method": (lambda: pickled_in_zip(masked_dict()), "contains no state dict|no tensor|missing"),
    "expanded weight": (
        lambda: with_state(**{"audio_encoder.pre_conv.conv.bias": torch.zeros(1).expand(2)}),
        "only 1 values are stored, because it was expanded",
    ),
    "direction of tiny values": (lambda: with_state(**{KEY: STATE[KEY] * 1e-30}), "too small to be squared"),
    "semantic codec": (lambda: with_config(config(semantic_codec_path="/etc/passwd")), "semantic_codec_path"),
    **{
        f"no {key}": (lambda key=key: with_config(without(config(), key)), f"no '{key}'")
        for key in ("sample_rate", "samples_per_frame", "audio_encoder", "vector_quantizer", "audio_decoder")
    },
    **{
        f"audio_encoder is {name or 'nothing'}": (lambda name=name: target("audio_encoder", name), "audio_encoder: _target_")
        for name in BAD_CLASSES
    },
    "vector_quantizer is os.system": (lambda: target("vector_quantizer", "os.system"), "vector_quantizer: _target_"),
    "audio_decoder is os.system": (lambda: target("audio_decoder", "os.system"), "audio_decoder: _target_"),
    "encoder in the decoder's place": (lambda: target("audio_decoder", MODULES + "HiFiGANEncoder"), "audio_decoder"),
    "quantizer in the encoder's place": (lambda: target("audio_encoder", MODULES + "FiniteScalarQuantizer"), "audio_enc"),
    "Hydra's old spelling": (lambda: with_config(config(audio_encoder={"target": "os.system", "params": {}})), "_target_"),
    "a part is a word": (lambda: with_config(config(audio_encoder="os.system")), "audio_encoder"),
    "a part is a list": (lambda: with_config(config(audio_encoder=[1])), "audio_encoder"),
    **{
        f"{key} is {value!r}": (lambda key=key, value=value: with_config(config(**{key: value})), match)
        for key, value, match in [
            ("sample_rate", "abc", "sample_rate"), ("sample_rate", 0, "sample_rate"), ("sample_rate", -1, "sample_rate"),
            ("sample_rate", 10**12, "sample_rate"), ("sample_rate", [1], "sample_rate"), ("sample_rate", 22050.5, "rate"),
            ("sample_rate", True, "sample_rate"), ("sample_rate", None, "sample_rate"),
            ("output_sample_rate", 44100, "output_sample_rate"),
            ("samples_per_frame", "abc", "samples_per_frame"), ("samples_per_frame", 512, "samples_per_frame"),
            ("samples_per_frame", 0, "samples_per_frame"),
            ("audio_encoder__bogus", 1, "bogus"), ("audio_encoder__encoded_dim", 31, "encoded_dim"),
            ("audio_encoder__base_channels", 600_000, "base_channels"), ("audio_encoder__base_channels", -1, "base_ch"),
            ("audio_encoder__base_channels", 0, "base_channels"), ("audio_encoder__base_channels", 2.5, "base_channels"),
            ("audio_encoder__base_channels", "many", "base_channels"), ("audio_encoder__base_channels", [2], "channels"),
            ("audio_encoder__base_channels", float("nan"), "base_channels"),
            ("audio_encoder__base_channels", 3, "shape"), ("audio_encoder__activation", "gelu", "activation"),
            ("audio_encoder__activation", 5, "audio_encoder"), ("audio_encoder__pad_mode", "circular", "pad_mode"),
            ("audio_encoder__down_sample_rates", [], "down_sample_rates"),
            ("audio_encoder__down_sample_rates", [0, 5], "down_sample_rates"),
            ("audio_encoder__down_sample_rates", [10**9], "down_sample_rates"),
            ("audio_encoder__down_sample_rates", [1] * 1000, "down_sample_rates"),
            ("audio_encoder__down_sample_rates", "35", "audio_encoder"),
            ("audio_encoder__down_sample_rates", None, "audio_encoder"),
            ("audio_encoder__down_sample_rates", {"a": 1}, "audio_encoder"),
            ("audio_encoder__resblock_kernel_sizes", [[3]], "resblock_kernel_sizes"),
            ("audio_encoder__down_sample_rates", [1, 15], "each rate must be 2 or more"),
            ("audio_encoder__in_kernel_size", 6, "the kernel size 6 is even"),
            ("audio_encoder__resblock_kernel_sizes", [4], "the kernel size 4 is even"),
            ("audio_decoder__out_kernel_size", 4, "the kernel size 4 is even"),
            ("vector_quantizer__num_levels_per_group", [1000, 1000, 1000, 2], "a product of at most 2"),
            ("audio_decoder__output_activation", "relu", "output_activation"),
            ("audio_decoder__up_sample_rates", [3, 5], "shape"), ("audio_decoder__base_channels", 16384, "shape"),
            ("vector_quantizer__num_groups", 10**9, "num_groups"), ("vector_quantizer__num_groups", 0, "num_groups"),
            ("vector_quantizer__num_groups", 7, "encoded_dim"),
            ("vector_quantizer__num_levels_per_group", [8, 7, 6, 5], "num_levels|codes"),
            ("vector_quantizer__num_levels_per_group", [1, 7, 6, 6], "level"),
            ("vector_quantizer__num_levels_per_group", [0, 7, 6, 6], "num_levels_per_group"),
            ("vector_quantizer__num_levels_per_group", [9999, 9999, 9999, 9999], "vector_quantizer"),
            ("vector_quantizer__eps", 7, "eps"),
            ("vector_quantizer__eps", 1.0, "eps is 1.0; numbers of at least 0 and less than 1 are"),
            ("audio_encoder__causal", True, "causal is not an argument of HiFiGANEncoder; remove it"),
            ("audio_decoder__causal", False, "causal is not an argument of HiFiGANDecoder"),
            ("audio_encoder__weight_norm", False, "weight_norm is not an argument of HiFiGANEncoder"),
            ("audio_encoder____class__", "x", "__class__ is not an argument of HiFiGANEncoder"),
            ("vector_quantizer___args_", [8], "_args_ is not an argument of "),
            ("vector_quantizer___partial_", True, "_partial_ is not an argument of "),

        ]
    },
    # Invalid weights.
    "weights are empty": (lambda: with_weights(b""), "model_weights.ckpt is not a PyTorch zip"),
    "weights are half": (lambda: with_weights(WEIGHTS_BYTES[: len(WEIGHTS_BYTES) // 2]), "model_weights.ckpt"),
    "weights are a bare pickle": (lambda: with_weights(pickle.dumps(Payload())), "bare pickle"),
    "legacy torch file": (lambda: with_weights(zip_of(STATE, _use_new_zipfile_serialization=False)), "bare pickle"),
    "big-endian values": (lambda: with_weights(with_byte_order(b"big")), "byte order of a big-endian computer"),
    "a list": (lambda: with_weights([1, 2]), "no state dict"),
    "a tensor": (lambda: with_weights(torch.ones(2)), "no state dict"),
    "nothing": (lambda: with_weights({}), "no state dict"),
    "numbers": (lambda: with_weights({KEY: 3}), "lacks"),
    "text": (lambda: with_state(**{KEY: "abc"}), "pre_conv"),
    "one weight with and without _orig_mod": (
        lambda: with_weights(STATE | {BIAS.replace("post_conv", "post_conv._orig_mod"): STATE[BIAS]}),
        r"occurs twice \(parts of names that wrappers insert",
    ),
    "the codec with and without module": (
        lambda: with_weights(STATE | {f"module.{k}": v for k, v in STATE.items()}),
        r"occurs twice \(.* such as _orig_mod and module, are ignored\); keep one",
    ),
    "no encoder": (lambda: with_weights({k: v for k, v in STATE.items() if "encoder" not in k}), "audio_encoder lacks"),
    "no decoder": (lambda: with_weights({k: v for k, v in STATE.items() if "decoder" not in k}), "audio_decoder lacks"),
    "no quantizer": (lambda: with_weights({k: v for k, v in STATE.items() if "quant" not in k}), "vector_quantizer lacks"),
    "one weight missing": (lambda: with_weights(without(STATE, BIAS)), "post_conv.conv.bias"),
    "direction missing": (lambda: with_weights(without(STATE, KEY)), "audio_encoder"),
    "gain missing": (lambda: with_weights(without(STATE, KEY.replace("original1", "original0"))), "audio_encoder"),
    "one weight too many": (lambda: with_state(**{"audio_encoder.bogus.weight": torch.ones(1)}), "bogus"),
    "under two names": (lambda: with_weights(nemo_2_0(STATE) | STATE), "under two names"),
    "wrong shape": (lambda: with_state(**{KEY: torch.ones(3, 3, 3)}), "has shape"),
    "shape that would broadcast": (lambda: with_state(**{BIAS: torch.ones(())}), "has shape"),
    "gain of another shape": (lambda: with_state(**{KEY.replace("original1", "original0"): torch.ones(2)}), "has shape"),
    "NaN": (lambda: with_state(**{KEY: STATE[KEY] * torch.nan}), "NaN or infinite"),
    "one infinity": (lambda: with_state(**{BIAS: STATE[BIAS] + torch.inf}), "NaN or infinite"),
    "two infinities that cancel": (lambda: with_state(**{KEY: STATE[KEY].index_fill(0, torch.tensor(0), torch.inf)}), "NaN"),
    "infinite in fp32": (lambda: with_state(**{BIAS: STATE[BIAS].double() + 1e300}), "NaN or infinite"),
    "direction of zeros": (lambda: with_state(**{KEY: STATE[KEY] * 0}), "not finite"),
    "int8": (lambda: with_state(**{KEY: STATE[KEY].to(torch.int8)}), "torch.int8"),
    "int64": (lambda: with_state(**{KEY: STATE[KEY].long()}), "torch.int64"),
    "bool": (lambda: with_state(**{BIAS: STATE[BIAS] > 0}), "torch.bool"),
    "complex": (lambda: with_state(**{KEY: STATE[KEY] + 0j}), "torch.complex64"),
    "other levels": (
        lambda: with_state(**{"vector_quantizer.fsqs.0.num_levels": STATE["vector_quantizer.fsqs.0.num_levels"] - 1}),
        "num_levels",
    ),
    "other base": (
        lambda: with_state(**{"vector_quantizer.fsqs.3.dim_base_index": torch.ones(1, 4, 1, dtype=torch.int32)}),
        "dim_base_index",
    ),
    "levels as floats": (
        lambda: with_state(**{"vector_quantizer.fsqs.0.num_levels": torch.ones(1, 4, 1)}), "torch.float32",
    ),
    "meta tensor": (lambda: with_state(**{KEY: torch.empty(4, device="meta")}), "damaged or unsafe"),
    "sparse tensor": (lambda: with_state(**{KEY: torch.eye(3).to_sparse()}), "damaged or unsafe"),
    "quantized tensor": (
        lambda: with_state(**{KEY: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}), "damaged or unsafe",
    ),
    # Pickles that would do more than build tensors.
    "pickle calls os.system": (lambda: with_weights({"a": Payload()}), "posix.system"),
    "pickle calls eval": (lambda: with_weights(pickled_in_zip(b"\x80\x02cbuiltins\neval\n(X\x01\0\0\x001tR.")), "eval"),
    "pickle calls getattr": (lambda: with_weights(pickled_in_zip(b"\x80\x02cbuiltins\ngetattr\n.")), "getattr"),
    "pickle names torch.load": (lambda: with_weights(pickled_in_zip(b"\x80\x02ctorch\nload\n.")), "torch.load"),
    "pickle names ours": (lambda: with_weights(pickled_in_zip(b"\x80\x02cnemo_lfr.model\nos\n.")), "nemo_lfr.model.os"),
    "pickle of protocol 0": (lambda: with_weights(pickled_in_zip(b"cos\nsystem\n(S'touch escaped'\ntR.")), "os.system|STRING"),
    "pickle of protocol 4": (lambda: with_weights(pickled_in_zip(pickle.dumps(Payload(), 4))), "FRAME|SHORT_BIN"),
    "pickle imports by extension": (lambda: with_weights(pickled_in_zip(b"\x80\x02\x82\x01.")), "EXT1"),
    "pickle makes instances": (lambda: with_weights(pickled_in_zip(b"(ios\nsystem\n.")), "INST"),
    "pickle changes our function": (lambda: with_weights(pickled_in_zip(build_opcode())), "damaged or unsafe"),
    "pickle is empty": (lambda: with_weights(pickled_in_zip(b"")), "damaged or unsafe"),
    "pickle stops": (lambda: with_weights(pickled_in_zip(b"\x80\x02}")), "damaged or unsafe"),
    "pickle takes from an empty stack": (lambda: with_weights(pickled_in_zip(b"\x80\x02R.")), "damaged or unsafe"),
    "pickle of a million dictionaries": (lambda: with_weights(pickled_in_zip(b"\x80\x02" + b"}" * 10**6 + b".")), "more than 400000 opcodes"),
    "pickle of a million sets": (lambda: with_weights(pickled_in_zip(b"\x80\x04" + b"\x8f" * 10**6 + b".")), "EMPTY_SET"),
    "pickle with a huge index": (lambda: with_weights(pickled_in_zip(b"\x80\x02}r\xff\xff\xff\x7f.")), "memo index"),
    "pickle of 8 MiB": (lambda: with_weights(pickled_in_zip(b"\x80\x02X\0\0\x80\0" + bytes(8 << 20) + b".")), "larger"),
    "pickle with a long text": (lambda: with_weights(pickled_in_zip(b"\x80\x02X\xff\xff\xff\x7fabc.")), "damaged or unsafe"),
    "pickle of itself": (lambda: with_weights(pickled_in_zip(b"\x80\x02]q\0h\0a.")), "no state dict"),
    "pickle of strange storage": (lambda: with_weights(pickled_in_zip(b"\x80\x02(K\x01K\x02K\x03tQ.")), "storage"),
    "pickle of no storage": (lambda: with_weights(pickled_in_zip(b"\x80\x02NQ.")), "damaged or unsafe"),
    # Training checkpoints.
    "legacy ckpt": (lambda: zip_of(STATE, _use_new_zipfile_serialization=False), "bare pickle, the format before PyTorch 1.6"),
    "ckpt without a config": (lambda: lightning(None), "no hyper_parameters"),
    "ckpt whose config is an object": (lambda: lightning(Payload()), "no hyper_parameters"),
    "ckpt of a class": (lambda: pickled_in_zip(b"\x80\x02cos\nsystem\n."), "no state dict"),
    "ckpt that calls": (lambda: pickled_in_zip(b"\x80\x02cos\nsystem\n(X\x0d\0\0\0touch escapedtR."), "no state dict"),
    "ckpt that changes a class": (lambda: pickled_in_zip(b"\x80\x02cos\nsystem\n}b."), "damaged or unsafe"),
    "ckpt of protocol 4": (lambda: pickled_in_zip(pickle.dumps(Payload(), 4)), "FRAME|SHORT_BIN"),
    "ckpt with the environment": (lambda: lightning(config(name="${oc.env:HOME}")), "resolver"),
    "ckpt whose config is deep": (lambda: lightning(None, hyper_parameters=nested(40)), "deeply nested"),
    "ckpt whose config explodes": (lambda: lightning(None, hyper_parameters=shared(30)), "too large"),
    "ckpt whose config holds itself": (lambda: lightning(None, hyper_parameters=shared(0)), "deeply nested"),
    "ckpt of a model with a codec inside": (lambda: zip_of({"state_dict": {f"my.codec.{key}": value for key, value in STATE.items()}, "hyper_parameters": {}}), "the codec is the submodule 'my.codec' of another model"),
    "ckpt of an empty config": (lambda: lightning({}), "no 'sample_rate'"),
    "ckpt of an empty Namespace": (lambda: lightning(argparse.Namespace(cfg=argparse.Namespace())), "no 'sample_rate'"),
    "ckpt of a Namespace that holds itself": (lambda: lightning(None, hyper_parameters={"cfg": endless()}), "deeply nested"),
    "ckpt of another model": (lambda: lightning({"encoder": {"_target_": "os.system"}}), "no 'sample_rate'"),
    "ckpt of another config": (lambda: lightning(config(audio_encoder__encoded_dim=31)), "encoded_dim"),
    "ckpt truncated": (lambda: lightning(config())[:-3000], "damaged or unsafe"),
    "ckpt with a flipped bit": (lambda: flipped(lightning(config()), 40_000), "checksum"),
    # Tensors whose metadata is wrong.
    "shape of 2^40 with stride 0": (lambda: one_tensor((BIG,), (0,)), "lacks|shape"),
    "shape of the right size with stride 0": (lambda: one_tensor((2, 1, 7), (0, 0, 0)), "lacks|shape"),
    "offset past the end": (lambda: one_tensor((2,), (1,), BIG), "lacks|shape"),
    "negative offset": (lambda: one_tensor((2,), (1,), -4), "not valid integers"),
    "negative stride": (lambda: one_tensor((2,), (-1,)), "not valid integers"),
    "negative shape": (lambda: one_tensor((-2,), (1,)), "not valid integers"),
    "strides for another shape": (lambda: one_tensor((2, 2), (1,)), "disagree"),
    "a thousand dimensions": (lambda: one_tensor((1,) * 1000, (1,) * 1000), "disagree"),
    "unknown storage": (lambda: one_tensor((2,), (1,), storage="QInt8Storage"), "QInt8Storage"),
    "storage that is a function": (lambda: one_tensor((2,), (1,), storage="load"), "torch.load"),
    # Damaged zips.
    "a bit of a weight": (lambda: flipped(GOOD_TAR, at_record(0)), "wrong checksum"),
    "a sign of a weight": (lambda: flipped(GOOD_TAR, at_record(3), 0x80), "wrong checksum"),
    "a bit of a name": (lambda: GOOD_TAR.replace(b"post_conv.conv.bias", b"post_conv.conv.bios"), "wrong checksum"),
    "the zip's directory": (lambda: with_weights(flipped(WEIGHTS_BYTES, len(WEIGHTS_BYTES) - 20)), "model_weights.ckpt"),
    "no directory": (lambda: with_weights(WEIGHTS_BYTES[:-2000]), "model_weights.ckpt"),
    "a directory of 16 MiB": (
        lambda: with_weights(
            b"PK\x03\x04" + bytes(16 << 20) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 16 << 20, 4, 0)
        ),
        "directory is larger",
    ),
    "compressed records": (lambda: with_weights(rezipped(compressed_records)), "compressed"),
    "two pickles": (lambda: with_weights(rezipped(two_pickles)), "not a PyTorch archive with one data.pkl"),
    "records that are not there": (lambda: with_weights(rezipped(no_records)), "is missing"),
    "records that are short": (lambda: with_weights(rezipped(short_records)), "its record contains"),
    "a record twice": (lambda: with_weights(rezipped(twice)), "two records of the same name"),
}  # fmt: skip


def forbid_effects(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Fail the test if code runs or a socket opens; written files would appear in the temporary folder."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("code ran"))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(folder)


LONG = ("20000 members", "gzip bomb in a header")


# Of the cases with the same message, the first two are fast.
@pytest.mark.parametrize(
    "case",
    [
        *slow_after(2, [case for case in HOSTILE if case not in LONG], lambda case: HOSTILE[case][1]),
        *slow_except(LONG),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_hostile_or_damaged_file_raises_with_its_name(nemo, monkeypatch, tmp_path, case):
    make, match = HOSTILE[case]
    path = nemo(make())
    forbid_effects(monkeypatch, tmp_path)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(path)
    seconds = time.process_time() - started
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 700 + len(str(path)), message
    # A generous limit: an idle machine needs less than 1 s, and a hang or an expanding file takes far longer.
    assert seconds < 5, f"{seconds:.1f} s"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_config_of_many_keys_is_checked_in_linear_time(monkeypatch):
    """Count the keys that are converted to text; finding each of the keys by a search would convert millions."""
    count = 5000
    converted = []

    class Key(str):
        __slots__ = ()

        def __str__(self) -> str:
            converted.append(1)
            return str.__str__(self)

    expansion = Expansion({"z": {Key(f"k{number}"): 1 for number in range(count)}})
    expansion.check("z")
    assert len(converted) <= 5 * count


def test_hostile_files_are_many_and_distinct():
    assert len(HOSTILE) >= 120
    assert len({(make, match) for make, match in HOSTILE.values()}) == len(HOSTILE)


@pytest.mark.parametrize("name", ["missing.nemo", "folder", "folder/missing.nemo"])
def test_missing_file_raises_with_its_path(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name)) + ": (no such file|the folder has no)"):
        read_checkpoint(tmp_path / name)


def special_files(folder: Path) -> dict[str, Path]:
    """Return paths of every kind that are not regular files; opening some of them would block forever."""
    os.mkfifo(folder / "fifo.nemo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket.nemo"))
    listener.close()
    (folder / "dangling.nemo").symlink_to("nowhere")
    (folder / "loop.nemo").symlink_to("loop.nemo")
    (folder / "linked.nemo").symlink_to("fifo.nemo")
    (folder / "unpacked").mkdir()
    (folder / "unpacked" / CONFIG).write_bytes(CONFIG_BYTES)
    os.mkfifo(folder / "unpacked" / "model_weights.ckpt")
    names = ["fifo.nemo", "socket.nemo", "dangling.nemo", "loop.nemo", "linked.nemo", "unpacked"]
    return {name: folder / name for name in names} | {"device": Path("/dev/zero")}


SPECIAL = ["fifo.nemo", "socket.nemo", "dangling.nemo", "loop.nemo", "linked.nemo", "unpacked", "device"]


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("read", [read_checkpoint, load_parts, nemo_lfr.load, find_checkpoint])
def test_non_regular_file_is_refused_without_blocking(tmp_path, name, read):
    path = special_files(tmp_path)[name]
    if (name, read) == ("unpacked", find_checkpoint):
        pytest.skip("finding does not open the files")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read(path)


MEMORY_SCRIPT = """
import pathlib, resource, sys
from nemo_lfr.checkpoint import read_checkpoint
from nemo_lfr.errors import CheckpointError
from nemo_lfr.io.hub import find_checkpoint
read_checkpoint(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    try:
        read_checkpoint(path)
        print("accepted", path)
    except CheckpointError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((peak - before) // 1024, path.name)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_hostile_files_do_not_exhaust_memory(tmp_path):
    (tmp_path / "good.nemo").write_bytes(GOOD_TAR)
    (tmp_path / "bad").mkdir()
    for number, (make, _) in enumerate(HOSTILE.values()):
        (tmp_path / "bad" / f"{number:03}.nemo").write_bytes(make())
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, tmp_path / "good.nemo", tmp_path / "bad"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == len(HOSTILE) and not any(line[0] == "accepted" for line in lines)
    assert max(int(line[0]) for line in lines) < 64, run.stdout


@pytest.mark.slow
def test_checksums_are_verified_before_values_are_used(nemo):
    """Flip one byte in each large and small record of the codec."""
    weights = GOOD_TAR.index(WEIGHTS_BYTES)
    with zipfile.ZipFile(io.BytesIO(WEIGHTS_BYTES)) as archive:
        records = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
    assert len(records) > 100
    for info in records[::4]:
        name, extra = struct.unpack_from("<HH", WEIGHTS_BYTES, info.header_offset + 26)
        begin = weights + info.header_offset + 30 + name + extra
        assert zlib.crc32(GOOD_TAR[begin : begin + info.file_size]) == info.CRC
        with pytest.raises(CheckpointError, match="wrong checksum"):
            read_checkpoint(nemo(flipped(GOOD_TAR, begin + info.file_size // 2)))


@pytest.mark.slow
def test_module_weights_are_read_on_first_use(nemo):
    """Damage in the decoder does not prevent encoding; only decoding fails."""
    decoder = [value for key, value in STATE.items() if key.startswith("audio_decoder.")]
    longest = max(decoder, key=torch.numel).contiguous().numpy().tobytes()
    damaged = nemo_lfr.load(nemo(flipped(GOOD_TAR, GOOD_TAR.index(longest))), device="cpu")
    tokens, _ = damaged.encode(synthesize(0.5))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"audio_decoder.* damaged .*wrong checksum"):
            damaged.decode(tokens)
    whole = nemo_lfr.load(nemo(GOOD_TAR), device="cpu")
    assert torch.equal(tokens, whole.encode(synthesize(0.5))[0])


def test_file_truncated_after_opening_raises_instead_of_crashing(nemo):
    path = nemo(GOOD_TAR)
    codec = nemo_lfr.load(path, device="cpu")
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(truncated|changed) while it was open"):
        codec.encode(synthesize(0.5))


CHANGED_MEANWHILE = {
    "emptied": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 3],
    "zeros": lambda raw: bytes(len(raw)),
    "longer, of zeros": lambda raw: bytes(len(raw) + 4096),
    "another codec": lambda raw: with_weights({key: value + 1 for key, value in STATE.items() if "num" not in key}),
    "the same, moved": lambda raw: tar_of([("pad", b"x" * 512), *GOOD]),
}


@pytest.mark.parametrize("change", CHANGED_MEANWHILE)
@pytest.mark.parametrize("use", ["encode", "decode", "fingerprint", "pickle"])
def test_a_file_that_is_overwritten_after_it_was_opened_is_an_error(nemo, change, use):
    """Weights are read on first use, which may be long after the file was opened."""
    path = nemo(GOOD_TAR)
    codec = nemo_lfr.load(path, device="cpu")
    path.write_bytes(CHANGED_MEANWHILE[change](GOOD_TAR))
    uses = {
        "encode": lambda: codec.encode(synthesize(0.5)),
        "decode": lambda: codec.decode(EXPECTED_TOKENS),
        "fingerprint": lambda: codec.fingerprint,
        "pickle": lambda: pickle.dumps(codec),
    }
    with pytest.raises(
        CheckpointError, match=r"stranger.nemo: the file was (changed|truncated) while it was open; load it"
    ):
        uses[use]()


def test_a_file_that_is_replaced_by_renaming_gives_the_weights_that_were_opened(nemo, tmp_path):
    path = nemo(GOOD_TAR)
    codec = nemo_lfr.load(path, device="cpu")
    (tmp_path / "new").write_bytes(b"not a checkpoint")
    os.replace(tmp_path / "new", path)
    assert torch.equal(codec.encode(synthesize(0.2))[0], EXPECTED_TOKENS)


READ_AGAIN_AND_AGAIN = """
import sys
import torch
import nemo_lfr
from tests.models import synthesize
from tests.checkpoint.test_checkpoint import EXPECTED_TOKENS
torch.set_num_threads(1)
wave, results = synthesize(0.2), {"right": 0, "refused": 0}
print("ready", flush=True)
for _ in sys.stdin:
    try:
        tokens, _ = nemo_lfr.load(sys.argv[1], device="cpu").encode(wave)
        assert torch.equal(tokens, EXPECTED_TOKENS)
        results["right"] += 1
    except nemo_lfr.CheckpointError:
        results["refused"] += 1
    print(results["right"], results["refused"], flush=True)
"""


@pytest.mark.slow
def test_a_file_that_changes_while_it_is_read_gives_its_tokens_or_an_error(tmp_path):
    """Truncate, overwrite and restore a file while a subprocess reads it.

    The subprocess neither crashes nor gets wrong tokens.
    """
    path, rounds = tmp_path / "model.nemo", 60
    path.write_bytes(GOOD_TAR)
    reader = subprocess.Popen(
        [sys.executable, "-c", READ_AGAIN_AND_AGAIN, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with reader:
        assert reader.stdin and reader.stdout
        assert reader.stdout.readline() == "ready\n"
        answers: list[str] = []
        collect = threading.Thread(target=lambda: answers.extend(reader.stdout))
        collect.start()
        rng = np.random.default_rng(0)
        for _ in range(rounds):
            before = len(answers)
            reader.stdin.write("\n")
            reader.stdin.flush()
            while len(answers) == before and reader.poll() is None:
                position = int(rng.integers(len(GOOD_TAR)))
                with open(path, "r+b") as file:
                    if rng.random() < 0.5:
                        file.truncate(position)
                    else:
                        file.seek(position)
                        file.write(b"\xff" * 64)
                time.sleep(rng.uniform(0, 0.01))
                with open(path, "r+b") as file:
                    file.write(GOOD_TAR)
                time.sleep(rng.uniform(0, 0.05))
        reader.stdin.close()
        collect.join()
    assert reader.returncode == 0
    right, refused = map(int, answers[-1].split())
    assert right + refused == rounds


@pytest.mark.slow
def test_a_copied_codec_no_longer_needs_its_file(nemo):
    path = nemo(GOOD_TAR)
    codec = nemo_lfr.load(path, device="cpu")
    copies = [copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))]
    expected = codec.encode(synthesize(0.5))[0]
    path.unlink()
    for other in copies:
        tokens, _ = other.encode(synthesize(0.5))
        assert torch.equal(tokens, expected)
        assert other.fingerprint == codec.fingerprint


def test_unchanged_config_builds_the_same_object(nemo):
    parts, values = read_checkpoint(nemo(GOOD_TAR))
    rebuilt = build_parts(copy.deepcopy(OmegaConf.to_container(values)))
    assert type(rebuilt.encoder) is type(parts.encoder) and rebuilt.sample_rate == parts.sample_rate


WRITER = """
import sys
import torch
from nemo_lfr.checkpoint import write_checkpoint
from tests.models import codec_config
while True:
    print(".", end="", flush=True)
    write_checkpoint(sys.argv[1], codec_config(), {"numbers": torch.zeros(300_000)})
"""


@pytest.mark.slow
def test_killed_writer_leaves_a_complete_file(tmp_path):
    path = tmp_path / "a.nemo"
    write_checkpoint(path, codec_config(), {"numbers": torch.zeros(300_000)})
    whole = path.read_bytes()
    half_written = 0
    for _ in killed_at_random_moments(WRITER, path, within=0.2):
        assert path.read_bytes() == whole
        aside = [entry for entry in tmp_path.iterdir() if entry != path]
        assert all(entry.name.startswith(".writing-") for entry in aside)
        half_written += bool(aside)
        for entry in aside:
            shutil.rmtree(entry)
    assert half_written, "the kills never met a file half written"


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    path = tmp_path / "a.nemo"
    path.write_bytes(b"old")
    script = f"""
from tests.checkpoint.test_checkpoint import STATE, config
from nemo_lfr.checkpoint import write_checkpoint
write_checkpoint({str(path)!r}, config(), STATE)
"""
    assert "CheckpointError: " + str(path) + ": the file cannot be written" in on_a_full_disk(script, free=20_000)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
