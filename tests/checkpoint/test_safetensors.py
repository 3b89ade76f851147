"""Tests of folders with `config.json` and `model.safetensors`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import nemo_lfr
from nemo_lfr.checkpoint.config import codec_values
from nemo_lfr.checkpoint.folder import export_safetensors
from nemo_lfr.checkpoint.reader import Checkpoint
from nemo_lfr.cli.main import app, main
from nemo_lfr.errors import CheckpointError, NemoLfrError
from nemo_lfr.io.hub import find_checkpoint
from tests.hub_server import HubServer
from tests.models import KINDS, codec_config, speech_like, write_nemo
from tests.tiers import slow_after, slow_except

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def nemo_file(tmp_path_factory):
    return write_nemo(tmp_path_factory.mktemp("model") / "tiny.nemo", codec_config())


@pytest.fixture
def folder(nemo_file, tmp_path):
    export_safetensors(nemo_file, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def small_folder(tmp_path):
    export_safetensors(write_nemo(tmp_path / "small.nemo", codec_config("two_stages")), tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(KINDS, "two_stages"))
def test_an_exported_folder_gives_the_same_tokens_audio_and_fingerprint(kind, tmp_path):
    source = write_nemo(tmp_path / "tiny.nemo", codec_config(kind))
    paths = export_safetensors(source, tmp_path / "out")
    names = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert [path.name for path in paths] == sorted(os.listdir(tmp_path / "out")) == names
    first, second = (nemo_lfr.load(path, "cpu") for path in (source, tmp_path / "out"))
    audio = speech_like(9000)
    tokens, _ = first.encode(audio)
    assert torch.equal(second.encode(audio)[0], tokens)
    assert torch.equal(second.decode(tokens)[0], first.decode(tokens)[0])
    assert second.fingerprint == first.fingerprint


@pytest.mark.slow
def test_the_safetensors_package_and_our_reader_read_each_others_files(folder):
    safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    tensors = safetensors.load_file(folder / "model.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"audio_encoder", "vector_quantizer", "audio_decoder"}
    before = nemo_lfr.load(folder, "cpu")
    audio = speech_like(9000)
    expected = before.encode(audio)[0]
    safetensors.save_file(tensors, folder / "model.safetensors")
    after = nemo_lfr.load(folder, "cpu")
    assert torch.equal(after.encode(audio)[0], expected) and after.fingerprint == before.fingerprint


@pytest.mark.slow
def test_an_exported_folder_can_be_exported_again(folder, tmp_path):
    export_safetensors(folder, tmp_path / "again")
    for name in os.listdir(folder):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(NemoLfrError, match=r"config\.json exists; pass --overwrite"):
        export_safetensors(folder, tmp_path / "again")
    assert len(export_safetensors(folder, tmp_path / "again", overwrite=True)) == 3


@pytest.mark.slow
def test_the_command_exports_a_folder(nemo_file, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", "safetensors", "--model", str(nemo_file), "--out", str(out)])
    assert result.exit_code == 0 and result.stdout.split() == [
        str(out / "config.json"),
        str(out / "model.safetensors"),
        str(out / "preprocessor_config.json"),
    ]
    assert nemo_lfr.load(out, "cpu").fingerprint == nemo_lfr.load(nemo_file, "cpu").fingerprint


def _header(change):
    def damage(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return damage


def _first(header):
    return next(value for name, value in header.items() if name != "__metadata__")


def _overlap(header):
    header.pop("__metadata__")  # and the checksum
    first, second = [name for name in header if name.endswith("post_conv.conv.bias")]
    header[second] = header[first]


def _drop(header):
    del header[next(name for name in header if name.startswith("audio_decoder"))]


DAMAGE = {
    "empty": lambda data: b"",
    "five bytes": lambda data: data[:5],
    "a cut header": lambda data: data[:100],
    "cut values": lambda data: data[:-1],
    "a flipped bit of a value": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "values after the end": lambda data: data + b"1234",
    "a checksum that is no text": _header(lambda header: header.update(__metadata__={"sha256_of_values": 5})),
    "a giant header": lambda data: b"\xff" * 8 + data[8:],
    "not JSON": lambda data: data[:8] + b"x" + data[9:],
    "a list": lambda data: (2).to_bytes(8, "little") + b"[]",
    "no tensors": lambda data: (2).to_bytes(8, "little") + b"{}",
    "an unknown dtype": _header(lambda header: _first(header).update(dtype="F8_E4M3")),
    "a negative offset": _header(lambda header: _first(header).update(data_offsets=[-4, 0])),
    "an offset that is no integer": _header(lambda header: _first(header).update(data_offsets=[0.0, 4.0])),
    "offsets of another size": _header(lambda header: _first(header).update(data_offsets=[0, 3])),
    "a giant shape": _header(lambda header: _first(header).update(shape=[2**61, 2**61])),
    "no shape": _header(lambda header: _first(header).pop("shape")),
    "an entry that is a number": _header(lambda header: header.update(x=3)),
    "a missing weight": _header(_drop),
    "two tensors at one place": _header(_overlap),
    "a gap between tensors": _header(_drop),
    "a pickle": lambda data: b"\x80\x02}q\x00." + data,
}


@pytest.mark.parametrize("damage", slow_after(2, DAMAGE.values()), ids=list(DAMAGE))
def test_a_damaged_file_is_refused_by_name(damage, folder):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError) as error:
        nemo_lfr.load(folder, "cpu")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", slow_after(2, ["", "[]", "{", '{"a": 1}', "\xff"]))
def test_a_damaged_config_is_refused_by_name(text, folder):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as error:
        nemo_lfr.load(folder, "cpu")
    assert str(folder) in str(error.value) and "config.json" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_no_flipped_bit_changes_a_codec_unnoticed(name, small_folder):
    def contents():
        checkpoint = Checkpoint(small_folder)
        stored = {key: value.sum().item() for key, value in checkpoint.iter_stored()}
        return codec_values(checkpoint.config), stored

    path, expected = small_folder / name, contents()
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little") if name == "model.safetensors" else len(data)
    refused = 0
    for position in range(0, end, end // 50):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 7]) + data[position + 1 :])
        try:
            assert contents() == expected
        except CheckpointError:
            refused += 1
    assert refused > 20


@pytest.mark.slow
@pytest.mark.parametrize("written", [["model.safetensors"], ["model.safetensors", "preprocessor_config.json"]])
def test_an_interrupted_export_over_another_codec_is_refused(written, small_folder, tmp_path):
    config = codec_config("two_stages")
    config["audio_encoder"]["activation"] = "elu"  # the names and shapes of all weights stay the same
    export_safetensors(write_nemo(tmp_path / "b.nemo", config), tmp_path / "other")
    for name in written:
        shutil.copy(tmp_path / "other" / name, small_folder / name)
    with pytest.raises(CheckpointError, match=r"config\.json and model\.safetensors do not belong together"):
        nemo_lfr.load(small_folder, "cpu")


@pytest.mark.slow
def test_infinite_weights_are_refused_when_they_are_used(folder):
    path = folder / "model.safetensors"
    data = _header(lambda header: header.pop("__metadata__"))(path.read_bytes())  # removes the checksum
    begin = 8 + int.from_bytes(data[:8], "little")  # first value of the decoder, since names are sorted
    path.write_bytes(data[:begin] + b"\xff" * 1000 + data[begin + 1000 :])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "weights_sha256"}))
    codec = nemo_lfr.load(folder, "cpu")
    tokens, _ = codec.encode(speech_like(9000))
    with pytest.raises(CheckpointError, match="NaN"):
        codec.decode(tokens)


LOAD = """
import nemo_lfr
print(nemo_lfr.load("someone/codec", "cpu").fingerprint)
"""


@pytest.mark.slow
def test_a_repository_of_the_hub_holds_safetensors(folder, tmp_path):
    expected = nemo_lfr.load(folder, "cpu").fingerprint
    files = {name: folder / name for name in os.listdir(folder)}
    with HubServer({"someone/codec": files}) as hub:
        for more in ({}, {"HF_HUB_OFFLINE": "1"}):
            environment = hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT), **more)
            run = subprocess.run(
                [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, cwd=tmp_path
            )
            assert run.returncode == 0, run.stderr[-2000:]
            assert run.stdout.strip() == expected


def test_a_folder_needs_both_files(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError):
        nemo_lfr.load(folder, "cpu")


@pytest.mark.slow
def test_info_describes_an_exported_folder(folder, capsys):
    main(["info", str(folder), "--json"])
    (described,) = json.loads(capsys.readouterr().out)["items"]
    assert described["format"] == "checkpoint" and described["fingerprint"] == nemo_lfr.load(folder, "cpu").fingerprint
    assert described["file_bytes"] == sum(
        (folder / name).stat().st_size for name in ("config.json", "model.safetensors")
    )


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "encoder.onnx", "codec.json", "model_config.yaml", "model_weights.ckpt"],
)
def test_one_file_of_a_folder_is_refused_with_a_hint_to_the_folder(name, tmp_path):
    (tmp_path / "model_config.yaml").write_bytes(b"x")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=f"{name}: this file is only a part of a checkpoint; pass the folder {tmp_path}"
    ):
        nemo_lfr.load(tmp_path / name, "cpu")


def test_a_folder_of_onnx_files_is_not_exported_again(tmp_path):
    (tmp_path / "encoder.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="has ONNX files, but no checkpoint; pass the checkpoint"):
        find_checkpoint(tmp_path)
