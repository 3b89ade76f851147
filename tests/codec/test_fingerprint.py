"""Tests that a codec has one fingerprint on every CPU, and accepts the CPU-dependent ones of older versions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nemo_lfr
from nemo_lfr.checkpoint import build_parts, write_checkpoint
from nemo_lfr.checkpoint.names import GAIN
from nemo_lfr.io.token_file import Metadata, TokenReader, TokenWriter
from nemo_lfr.spec import VERSION_3, same_fingerprint
from nemo_lfr.testing import TWO_STAGES
from tests.models import codec_config
from tests.tiers import slow_after

# Values of PyTorch's ATEN_CPU_CAPABILITY, which chooses among the kernels that the CPU can run.
CAPABILITIES = ("default", "avx2", "avx512")
LAYERS = ("symmetric", "nano", "causal")  # kinds of different convolutions
# Prints the fingerprint of each codec before and after its weights are loaded, the fingerprint of modules with weight
# norm, and the one of older versions. Then reads fingerprints of each codec, and prints those that a form of the codec
# does not accept.
SCRIPT = """
import copy, json, sys
from pathlib import Path
import torch, nemo_lfr
from nemo_lfr.checkpoint import load_parts
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.fingerprint import fingerprint, settings_of, weights_digest
from nemo_lfr.codec.torch_backend import TorchBackend

@torch.no_grad()
def older(parts):
    "Compute fingerprints from weights that PyTorch's kernel folds."
    weights = []
    for part in (parts.encoder, parts.decoder):
        state = {name: value for name, value in part.state_dict().items() if ".parametrizations." not in name}
        for name, module in part.named_modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
                state[name + ".weight"] = module.weight
        weights += sorted(state.items())
    digest = weights_digest(weights)
    settings = settings_of(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate)
    return [fingerprint(digest, settings), digest[:16]]

results, codecs = {"capability": torch.backends.cpu.get_cpu_capability().lower()}, {}
for path in map(Path, sys.argv[1:]):
    parts, _ = load_parts(path)
    unread, loaded = nemo_lfr.load(path, "cpu"), nemo_lfr.load(path, "cpu")
    unread.fingerprint, loaded.encoder, loaded.decoder
    forms = [unread, loaded, copy.deepcopy(loaded), Codec(TorchBackend(*parts.named().values(), parts.sample_rate))]
    codecs[path.name] = forms
    results[path.name] = {"now": sorted({codec.fingerprint for codec in forms}), "older": older(parts)}
print(json.dumps(results), flush=True)
known = json.loads(sys.stdin.readline())
print(json.dumps({
    name: [(index, value) for index, codec in enumerate(forms) for value in known[name] if not codec.made(value)]
    for name, forms in codecs.items()
}))
"""


def start(capability: str, paths: list[Path]) -> tuple[subprocess.Popen[str], dict]:
    """Start the script with one kind of kernels, and return the process and its first results."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", SCRIPT, *map(str, paths)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def write_normed(path: Path, kind: str, **changes: Any) -> Path:
    """Write a `.nemo` whose weight-norm gains differ from the norms of the directions, as after training."""
    torch.manual_seed(3)
    config = codec_config(kind, **changes)
    parts = build_parts(config, weight_norm=True)
    state = {
        f"{name}.{key}": value for name, part in parts.named().items() for key, value in part.state_dict().items()
    }
    for key, value in state.items():
        if key.endswith(GAIN):
            state[key] = value * torch.empty_like(value).uniform_(0.5, 2)
    write_checkpoint(path, config, state)
    return path


def run_everywhere(folder: Path) -> None:
    """Run the script with each kind of kernels, and write its results for each kind that this CPU has."""
    folder.mkdir()
    # Fingerprints are computed layer by layer, so only the released layout has all stages.
    small = {kind: {} if kind == "symmetric" else TWO_STAGES for kind in LAYERS}
    paths = [write_normed(folder / f"{kind}.nemo", kind, **changes) for kind, changes in small.items()]
    paths.append(Path(nemo_lfr.__file__).parent / "weights" / "default.nemo")
    processes, first, refused = {}, {}, {}
    for name in CAPABILITIES:
        processes[name], results = start(name, paths)
        if results.pop("capability") == name:
            first[name] = results
    known: dict[str, list[str]] = {path.name: [] for path in paths}
    for results in first.values():
        for name, values in results.items():
            known[name] += values["now"] + values["older"]
    for name, process in processes.items():
        output, _ = process.communicate(json.dumps(known) + "\n")
        assert process.returncode == 0
        if name in first:
            refused[name] = json.loads(output)
    (folder / "results.json").write_text(json.dumps({"first": first, "refused": refused}))


@pytest.fixture(scope="module")
def everywhere(once) -> dict[str, dict]:
    return json.loads((once("fingerprints", run_everywhere) / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYERS, "default"])
def test_a_codec_has_one_fingerprint_with_every_kernel(everywhere, name):
    fingerprints = [value for results in everywhere["first"].values() for value in results[f"{name}.nemo"]["now"]]
    assert len(set(fingerprints)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYERS, "default"])
def test_fingerprints_that_depended_on_the_kernel_are_accepted(everywhere, name):
    refused = [by_kernel[f"{name}.nemo"] for by_kernel in everywhere["refused"].values()]
    assert refused == [[]] * len(everywhere["first"])
    older = {value for results in everywhere["first"].values() for value in results[f"{name}.nemo"]["older"]}
    assert len(everywhere["first"]) == 1 or len(older) > 2  # otherwise all kernels agree, and this test proves nothing


def test_fingerprint_of_the_bundled_codec():
    codec = nemo_lfr.load(device="cpu")
    assert codec.fingerprint == "36e566f9c6c7db62"
    assert codec.made(codec.fingerprint) and not codec.made("0" * 16)


@pytest.mark.slow
def test_version_3_of_the_bundled_codec_has_several_fingerprints():
    assert all(same_fingerprint(first, second) for first in VERSION_3 for second in VERSION_3)
    codec = nemo_lfr.load(device="cpu")
    assert not any(codec.made(value) or same_fingerprint(codec.fingerprint, value) for value in VERSION_3)


@pytest.mark.slow
def test_weights_that_were_written_after_loading_no_longer_have_the_older_fingerprints(tmp_path):
    path = write_normed(tmp_path / "a.nemo", "two_stages")
    codec = nemo_lfr.load(path, "cpu")
    older = list(codec.backend.fingerprints())
    assert len(older) > 2
    with torch.no_grad():
        codec.encoder.post_conv.conv.bias.add_(0.1)
        codec.decoder.post_conv.conv.bias.add_(0.1)
    assert not any(codec.made(value) for value in older)


@pytest.mark.slow
@pytest.mark.parametrize("change", slow_after(1, ["removed", "replaced", "damaged"]))
def test_a_file_changed_after_loading_loses_only_its_older_fingerprints(tmp_path, change):
    path = write_normed(tmp_path / "a.nemo", "two_stages")
    codec = nemo_lfr.load(path, "cpu")
    before = list(codec.backend.fingerprints())
    codec = nemo_lfr.load(path, "cpu")
    assert codec.encoder and codec.decoder
    path.unlink()
    if change == "replaced":
        write_normed(path, "causal")
    elif change == "damaged":
        path.write_bytes(b"no checkpoint")
    assert [codec.made(value) for value in before] == [True, True] + [False] * (len(before) - 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_token_files_with_older_fingerprints_are_decoded(tmp_path, number):
    codec = nemo_lfr.load(device="cpu")
    older = list(codec.backend.fingerprints())[number]
    metadata = Metadata.of(codec)
    path = tmp_path / "a.lfr"
    with TokenWriter(path, metadata.__class__(**vars(metadata) | {"fingerprint": older})) as writer:
        writer.write(np.zeros((8, 4), np.int32))
        writer.finish(4 * 1024)
    with TokenReader(path) as reader:
        reader.check_codec(codec)
    assert codec.decode_file(path, tmp_path / "a.wav") == 4 * 1024
