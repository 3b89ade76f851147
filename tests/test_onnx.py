"""The exported codec: the same tokens and audio, for any length and batch, where there is no torch."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import soundfile
import torch

import nemo_lfr
from nemo_lfr import AudioError, CheckpointError, NemoLfrError, TokensError, cli
from nemo_lfr.tokens.format import TokenReader
from tests.models import KINDS, RATE, cached_codec, synthesize
from tests.reference import assert_same_tokens

onnx = pytest.importorskip("onnx", reason="pip install 'nemo-lfr[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'nemo-lfr[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'nemo-lfr[onnx]'")

from nemo_lfr.onnx.codec import OnnxCodec  # noqa: E402
from nemo_lfr.onnx.export import export_onnx  # noqa: E402


@pytest.fixture(scope="module", params=[pytest.param(k, marks=() if k == "nano" else pytest.mark.slow) for k in KINDS])
def pair(request, tmp_path_factory):
    """A codec and what it was exported to."""
    codec = cached_codec(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    export_onnx(codec, folder)
    return codec, nemo_lfr.load(folder, backend="onnx")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The folder of the codec inside the package."""
    folder = tmp_path_factory.mktemp("embedded")
    export_onnx(nemo_lfr.load(), folder)
    return folder


def assert_same(codec, exported, waves: list[np.ndarray]) -> None:
    """One ragged batch, with noise as padding."""
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((len(waves), max(map(len, waves)))).astype(np.float32)
    for row, wave in zip(audio, waves, strict=True):
        row[: len(wave)] = wave
    lengths = [len(wave) for wave in waves]
    tokens, tokens_len = codec.encode(audio, lengths)
    got, got_len = exported.encode(audio, lengths)
    assert isinstance(got, np.ndarray) and got.dtype == np.int32 and got_len.tolist() == tokens_len.tolist()
    for wave, mine, expected, total in zip(waves, got, tokens, got_len, strict=True):
        if total:
            assert_same_tokens(codec, wave, torch.from_numpy(mine[:, :total]), expected[:, :total])
        assert not mine[:, total:].any()
    heard, heard_len = exported.decode(tokens.numpy(), tokens_len.tolist(), lengths)
    expected, expected_len = codec.decode(tokens, tokens_len, lengths)
    assert heard.dtype == np.float32 and heard_len.tolist() == expected_len.tolist() == lengths
    assert np.abs(heard - expected.numpy()).max(initial=0) < 1e-4


def test_tokens_and_audio_are_torchs_for_ragged_batches_of_any_length(pair):
    codec, exported = pair
    frame = codec.samples_per_frame
    lengths = [0, 1, frame - 1, frame, frame + 1, 3 * frame, 4 * frame, 7 * frame + 3, 40 * frame + 1]
    assert_same(codec, exported, [synthesize(3, seed=n)[:length] for n, length in enumerate(lengths)])
    for name in ("sample_rate", "samples_per_frame", "levels", "num_codebooks", "fingerprint", "bit_rate"):
        assert getattr(exported, name) == getattr(codec, name)


def test_long_recordings_run_in_chunks(pair):
    codec, exported = pair
    exported.chunk_frames = 20
    try:
        assert_same(codec, exported, [synthesize(6)[: 100 * codec.samples_per_frame + 7]])
    finally:
        exported.chunk_frames = codec.chunk_frames


def test_both_files_pass_the_checker_and_say_whose_they_are(embedded):
    codec = nemo_lfr.load()
    for name in ("encoder.onnx", "decoder.onnx"):
        model = onnx.load(embedded / name)
        onnx.checker.check_model(model, full_check=True)
        said = json.loads({entry.key: entry.value for entry in model.metadata_props}["nemo_lfr"])
        assert said["fingerprint"] == codec.fingerprint and said["levels"] == [8, 7, 6, 6]
        assert said["encoder"] == asdict(codec.encoder.context) | {"min_frames": codec.encoder.min_frames}
        for value in [*model.graph.input, *model.graph.output]:
            dims = value.type.tensor_type.shape.dim
            assert dims[0].dim_param == "batch"
    assert not list(embedded.glob(".writing*"))


def test_speech_and_files_without_torch(embedded, tmp_path):
    """Nor anything else but ONNX Runtime, numpy and soundfile."""
    soundfile.write(tmp_path / "a.wav", synthesize(3), RATE)
    script = """
import sys
for name in ("torch", "nemo", "soxr", "omegaconf", "yaml", "huggingface_hub", "filelock", "scipy", "onnx", "click"):
    sys.modules[name] = None
import nemo_lfr
codec = nemo_lfr.load(sys.argv[1], backend="onnx")
codec.encode_file("a.wav", "a.lfr")
codec.decode_file("a.lfr", "b.wav")
print(codec)
try:
    nemo_lfr.load()
except nemo_lfr.NemoLfrError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(embedded)]
    root = str(nemo_lfr.__path__[0]).rpartition("/")[0]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "OnnxCodec(" in done.stdout and "pip install torch" in done.stdout
    codec = nemo_lfr.load()
    wave, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    with TokenReader(tmp_path / "a.lfr") as reader:
        reader.check_codec(codec)
        tokens = torch.from_numpy(reader.read())
    assert_same_tokens(codec, wave, tokens)
    heard, _ = soundfile.read(tmp_path / "b.wav", dtype="float32")
    expected = codec.decode(tokens, audio_len=[len(wave)])[0][0].numpy()
    assert np.abs(heard - expected).max() < 1e-4


def run(capsys, *arguments):
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line_runs_the_folder_as_a_model(capsys, embedded, tmp_path):
    for name, seconds in (("a", 2), ("b", 1.3)):
        soundfile.write(tmp_path / f"{name}.wav", synthesize(seconds), 16000)
    assert run(capsys, "encode", tmp_path, "--model", embedded, "--out", tmp_path / "onnx")[0] == 0
    assert run(capsys, "encode", tmp_path, "--out", tmp_path / "torch")[0] == 0
    for name in ("a.lfr", "b.lfr"):
        assert (tmp_path / "onnx" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()
    assert run(capsys, "decode", tmp_path / "onnx", "--model", embedded)[0] == 0
    assert "ONNX files" in run(capsys, "info", embedded)[1]
    code, _, err = run(capsys, "encode", tmp_path, "--model", embedded, "--precision", "bf16", "--overwrite")
    assert code == 2 and "ONNX files run in fp32" in err


def test_each_codec_opens_each_of_its_files_once(embedded, monkeypatch):
    opened = []
    session = onnxruntime.InferenceSession
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **more: opened.append(1) or session(*args, **more)
    )
    pair = [OnnxCodec(embedded), OnnxCodec(embedded)]
    for _ in range(3):
        for codec in pair:
            codec.decode(codec.encode(synthesize(0.2))[0])
    assert len(opened) == 4
    copied = pickle.loads(pickle.dumps(pair[0]))
    assert np.array_equal(copied.encode(synthesize(0.2))[0], pair[0].encode(synthesize(0.2))[0])


def test_what_is_there_is_not_replaced_unasked(capsys, embedded):
    code, _, err = run(capsys, "export", "onnx", "--out", embedded)
    assert code == 2 and "encoder.onnx exists; pass --overwrite" in err


def test_what_was_exported_is_not_exported_again(capsys, embedded, tmp_path):
    code, _, err = run(capsys, "export", "onnx", "--model", embedded, "--out", tmp_path / "again")
    assert code == 2 and f"{embedded}: is exported already; give the checkpoint" in err


def test_one_file_without_the_other_does_its_half(embedded, tmp_path):
    shutil.copy(embedded / "decoder.onnx", tmp_path)
    codec = nemo_lfr.load(tmp_path)
    assert codec.decode(np.zeros((8, 5), int))[0].shape == (1, 5 * 1024)
    with pytest.raises(CheckpointError, match=r"encoder\.onnx: no such file"):
        codec.encode(np.zeros(5000, np.float32))


def test_what_is_no_pair_of_ours_is_refused(embedded, tmp_path):
    with pytest.raises(NemoLfrError, match="nemo-lfr export onnx --out FOLDER"):
        nemo_lfr.load(tmp_path, backend="onnx")
    with pytest.raises(NemoLfrError, match="backend 'tensorrt' is unknown"):
        nemo_lfr.load(backend="tensorrt")
    with pytest.raises(NemoLfrError, match="backend 'torch' needs the checkpoint"):
        nemo_lfr.load(embedded, backend="torch")
    with pytest.raises(NemoLfrError, match="'tpu' cannot be used here"):
        nemo_lfr.load(embedded, "tpu")
    with pytest.raises(CheckpointError, match=r"no encoder\.onnx or decoder\.onnx"):
        OnnxCodec(tmp_path)
    (tmp_path / "encoder.onnx").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="ONNX Runtime cannot open it"):
        nemo_lfr.load(tmp_path)
    model = onnx.load(embedded / "encoder.onnx")
    said = json.loads(model.metadata_props[0].value)
    for changes, message in (
        ({"version": 2}, "version 2"),
        ({"levels": None}, "metadata is not ours"),
        ({"fingerprint": "0" * 16}, "of another codec than the other file"),
    ):
        model.metadata_props[0].value = json.dumps(said | changes)
        onnx.save(model, tmp_path / "encoder.onnx")
        shutil.copy(embedded / "decoder.onnx", tmp_path)
        with pytest.raises(CheckpointError, match=message):
            nemo_lfr.load(tmp_path).decode(np.zeros((8, 5), int))
    with pytest.raises(NemoLfrError, match="does not stream"):
        nemo_lfr.load(embedded).stream_encoder()
    with pytest.raises(NemoLfrError, match="exported in fp32"):
        export_onnx(nemo_lfr.load(precision="bf16"), tmp_path / "bf16")


def test_bad_audio_and_tokens_are_refused_as_by_torch(embedded):
    codec = nemo_lfr.load(embedded)
    for bad in (
        np.zeros((1, 2, 3), np.float32), np.zeros(5, bool), np.full(5000, np.nan), np.full(5000, 1e4), "speech",
        [[1.0], [1.0, 2.0]], np.zeros((0, 5), np.float32), np.zeros(5, np.uint16), None,
    ):  # fmt: skip
        with pytest.raises(AudioError):
            codec.encode(bad)
    for bad in (np.zeros(8, int), np.zeros((7, 2), int), np.zeros((8, 2)), np.full((8, 2), 2016), np.full((8, 1), -1)):
        with pytest.raises(TokensError):
            codec.decode(bad)
    with pytest.raises(AudioError, match="audio_len"):
        codec.encode(np.zeros((2, 5000), np.float32), [5000])
    with pytest.raises(TokensError, match="hold"):
        codec.decode(np.zeros((8, 2), int), audio_len=[9000])
    whole = codec.encode((synthesize(1) * 32767).astype(np.int16))[0]
    assert whole.shape == (1, 8, 22) and codec.encode(synthesize(1), sample_rate=16000)[0].shape == (1, 8, 30)


@pytest.mark.slow
def test_a_corpus_is_tokenised_by_onnx_too(capsys, embedded, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(5):
        soundfile.write(tmp_path / "in" / f"{number}.wav", synthesize(1 + number / 5, number), RATE)
    for name, options in (("torch", ()), ("onnx", ("--model", embedded))):
        out = tmp_path / name
        code, _, err = run(
            capsys, "tokenize", tmp_path / "in", "--out", out, "--format", "lfr", "--workers", 1, *options
        )
        assert code == 0, err
    for number in range(5):
        with (
            TokenReader(tmp_path / "torch" / "tokens" / f"{number}.lfr") as one,
            TokenReader(tmp_path / "onnx" / "tokens" / f"{number}.lfr") as other,
        ):
            assert (one.read() != other.read()).sum() <= 1
