"""Tests of exports with `torch.export`, and of golden vectors."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import nemo_lfr
from nemo_lfr.cli.main import app
from nemo_lfr.codec.golden import export_golden, golden_vectors
from nemo_lfr.codec.onnx.backend import OnnxBackend
from nemo_lfr.codec.programs import export_programs
from nemo_lfr.errors import NemoLfrError
from tests.models import KINDS, cached_codec, codec_config, same_parts, speech_like, write_nemo
from tests.tiers import slow_except


@pytest.fixture(scope="module")
def programs():
    return export_programs(cached_codec("two_stages"))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "frames"), [(1, 40), (3, 300)])
def test_programs_give_the_tokens_and_audio_of_the_codec(programs, batch, frames):
    codec = cached_codec("two_stages")
    audio = torch.stack([speech_like(frames * codec.samples_per_frame, seed) for seed in range(batch)])
    expected, _ = codec.encode(audio, [audio.shape[1]] * batch, codec.sample_rate)
    tokens = programs.encoder.module()(audio)
    assert torch.equal(tokens, expected)
    lengths = torch.tensor([frames] * batch)
    decoded = programs.decoder.module()(tokens.long(), lengths)
    assert torch.allclose(decoded, codec.decode(expected)[0], atol=1e-5)  # other kernels sum in another order


@pytest.mark.slow
def test_programs_are_saved_and_loaded(programs, tmp_path):
    torch.export.save(programs.encoder, tmp_path / "encoder.pt2")
    audio = speech_like(40 * 15)[None]
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    assert torch.equal(loaded(audio), programs.encoder.module()(audio))


@pytest.mark.parametrize("function", [export_programs, golden_vectors])
def test_other_precisions_and_backends_are_refused(function):
    with pytest.raises(NemoLfrError, match=r"precision is \"tf32\", but .* are exported in fp32"):
        function(same_parts(cached_codec("two_stages"), precision="tf32"))
    codec = same_parts(cached_codec("two_stages"))
    onnx = object.__new__(OnnxBackend)
    onnx.name = "folder"
    codec.backend = onnx
    with pytest.raises(NemoLfrError, match="folder: only a codec that runs in PyTorch can be exported"):
        function(codec)


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(KINDS, "nano", "two_stages"))
def test_golden_vectors_are_those_of_the_codec(kind):
    codec = cached_codec(kind)
    golden = golden_vectors(codec)
    tokens, tokens_len = codec.encode(golden["input.audio"], sample_rate=codec.sample_rate)
    assert torch.equal(golden["tokens"], tokens) and tokens_len.tolist() == [tokens.shape[2]]
    assert torch.allclose(golden["decoded"], codec.decode(tokens)[0], atol=1e-5)
    assert torch.equal(golden["compressed"].round(), (golden["codes"] * _middle(codec)).round())
    names = list(golden)
    for first, second in [("input.padded", "audio_encoder.pre_conv"), ("audio_encoder.post_conv", "encoded")]:
        assert names.index(first) < names.index(second)
    assert names[-1] == "decoded" and torch.equal(golden["audio_encoder.post_conv"], golden["encoded"])
    assert not any(module._forward_hooks for module in codec.encoder.modules())


def _middle(codec) -> torch.Tensor:
    return torch.tensor([level // 2 for level in codec.levels] * codec.num_codebooks)[None, :, None]


@pytest.mark.slow
def test_the_command_writes_golden_vectors_that_safetensors_reads(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="pip install safetensors")
    model, out = write_nemo(tmp_path / "tiny.nemo", codec_config("two_stages")), tmp_path / "new" / "g.safetensors"
    result = CliRunner().invoke(app, ["export", "golden", "--model", str(model), "--out", str(out)])
    assert result.exit_code == 0 and result.stdout.split() == [str(out)]
    codec = nemo_lfr.load(model, "cpu")
    with safetensors.safe_open(out, "pt") as file:
        values = json.loads(file.metadata()["nemo_lfr"])
        golden = golden_vectors(codec)
        assert values["tensors"] == list(golden) and sorted(file.keys()) == sorted(golden)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in golden.items())
    assert values["version"] == 1 and values["spec"]["fingerprint"] == codec.fingerprint
    before = out.read_bytes()
    with pytest.raises(NemoLfrError, match="exists; pass --overwrite"):
        export_golden(codec, out)
    assert export_golden(codec, out, overwrite=True).read_bytes() == before
    with pytest.raises(NemoLfrError, match=r"ends in \.safetensors"):
        export_golden(codec, Path(tmp_path, "g.npz"))
