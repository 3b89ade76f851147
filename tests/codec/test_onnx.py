"""Tests of exported ONNX codecs: the same tokens and audio for any length and batch, without PyTorch."""

import codecs
import contextlib
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import nemo_lfr
from nemo_lfr import AudioError, CheckpointError, NemoLfrError, TokensError
from nemo_lfr.cli import main as cli
from nemo_lfr.codec import torch_backend
from nemo_lfr.codec.codec import Codec
from nemo_lfr.io.token_file import TokenReader
from tests.models import KINDS, ONE_STAGE, RATE, build_codec, cached_codec, export_smallest, synthesize
from tests.packages import require
from tests.reference import assert_same_tokens

require("onnx", "onnxruntime", "onnxscript", reason="pip install '.[onnx]'")

from nemo_lfr.codec.onnx.backend import OnnxBackend  # noqa: E402
from nemo_lfr.codec.onnx.export import export_onnx  # noqa: E402
from tests.codec.test_onnx_graph import body, external, node  # noqa: E402

# An export takes 5 to 15 s.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundled(once):
    """Export the bundled codec and return the folder."""
    return once("onnx-bundled", lambda folder: export_onnx(nemo_lfr.load(), folder))


@contextlib.contextmanager
def unusual_state() -> Iterator[None]:
    """Set what PyTorch reads while it builds and traces modules to values with which it could not export."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


# One codec has the released size. The others have the other kinds of layers, each once: an export takes time for each
# layer.
EXPORTED: dict[str, tuple[Callable[[], Codec], Callable[[], contextlib.AbstractContextManager]]] = {
    "bundled": (nemo_lfr.load, contextlib.nullcontext),
    "nano": (lambda: build_codec("nano", **ONE_STAGE), contextlib.nullcontext),
    "causal, exported in an unusual state": (lambda: build_codec("causal", **ONE_STAGE), unusual_state),
    # one FSQ, reflection in the encoder, and replication and clamping in the decoder
    "mixed": (lambda: build_codec("single", audio_decoder=KINDS["clamp"]["audio_decoder"]), contextlib.nullcontext),
}


@pytest.fixture(scope="module", params=EXPORTED)
def pair(request, once):
    """Return a codec and its exported version, which does not depend on the state of the process that exports."""
    build, state = EXPORTED[request.param]
    codec = build()

    def export(folder: Path) -> None:
        with state():
            export_onnx(codec, folder)

    return codec, nemo_lfr.load(once(f"onnx-{request.param}", export), backend="onnx")


def assert_same(codec, exported, waves: list[np.ndarray]) -> None:
    """Compare results for a batch of different lengths with noise as padding."""
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


def test_onnx_equals_torch_for_ragged_batches(pair):
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


def test_both_onnx_files_are_valid_and_have_metadata(bundled):
    codec = nemo_lfr.load()
    for name in ("encoder.onnx", "decoder.onnx"):
        import onnx

        model = onnx.load(bundled / name)
        onnx.checker.check_model(model, full_check=True)
        said = json.loads({entry.key: entry.value for entry in model.metadata_props}["nemo_lfr"])
        assert said["fingerprint"] == codec.fingerprint and said["levels"] == [8, 7, 6, 6]
        assert said["encoder"] == asdict(codec.encoder.context) | {"min_frames": codec.encoder.min_frames}
        for value in [*model.graph.input, *model.graph.output]:
            dims = value.type.tensor_type.shape.dim
            assert dims[0].dim_param == "batch"
    assert not list(bundled.glob(".writing*"))


def test_speech_and_files_are_processed_without_torch(bundled, tmp_path):
    """Only ONNX Runtime, NumPy and soundfile are needed."""
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
for source in (None, f"{sys.argv[1]}/encoder.onnx"):
    try:
        nemo_lfr.load(source)
    except nemo_lfr.NemoLfrError as error:
        print(error)
"""
    command = [sys.executable, "-c", script, str(bundled)]
    root = str(nemo_lfr.__path__[0]).rpartition("/")[0]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Codec(" in done.stdout and "pip install torch" in done.stdout
    assert f"encoder.onnx: this file is only a part of a checkpoint; pass the folder {bundled}." in done.stdout
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


def test_the_command_line_runs_the_folder_as_a_model(capsys, bundled, tmp_path):
    for name, seconds in (("a", 2), ("b", 1.3)):
        soundfile.write(tmp_path / f"{name}.wav", synthesize(seconds), 16000)
    assert run(capsys, "encode", tmp_path, "--model", bundled, "--out", tmp_path / "onnx")[0] == 0
    assert run(capsys, "encode", tmp_path, "--out", tmp_path / "torch")[0] == 0
    for name in ("a.lfr", "b.lfr"):
        assert (tmp_path / "onnx" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()
    assert run(capsys, "decode", tmp_path / "onnx", "--model", bundled)[0] == 0
    assert ["format", "onnx"] in [line.split() for line in run(capsys, "info", bundled)[1].splitlines()]
    code, _, err = run(capsys, "encode", tmp_path, "--model", bundled, "--precision", "bf16", "--overwrite")
    assert code == 2 and "is not available for ONNX files" in err


def test_each_codec_opens_each_of_its_files_once(bundled, monkeypatch):
    opened = []
    import onnxruntime

    session = onnxruntime.InferenceSession
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **more: opened.append(1) or session(*args, **more)
    )
    pair = [Codec(OnnxBackend(bundled)), Codec(OnnxBackend(bundled))]
    for _ in range(3):
        for codec in pair:
            codec.decode(codec.encode(synthesize(0.2))[0])
    assert len(opened) == 4
    copied = pickle.loads(pickle.dumps(pair[0]))
    assert np.array_equal(copied.encode(synthesize(0.2))[0], pair[0].encode(synthesize(0.2))[0])


def test_export_does_not_overwrite_by_default(capsys, bundled):
    code, _, err = run(capsys, "export", "onnx", "--out", bundled)
    assert code == 2 and "encoder.onnx exists; pass --overwrite" in err


def test_exporting_an_exported_folder_raises(capsys, bundled, tmp_path):
    code, _, err = run(capsys, "export", "onnx", "--model", bundled, "--out", tmp_path / "again")
    assert code == 2 and f"{bundled}: only a codec that runs in PyTorch can be exported; pass the original" in err


def test_one_onnx_file_works_in_its_direction(bundled, tmp_path):
    shutil.copy(bundled / "decoder.onnx", tmp_path)
    shutil.copy(bundled / "codec.json", tmp_path)
    codec = nemo_lfr.load(tmp_path)
    assert codec.decode(np.zeros((8, 5), int))[0].shape == (1, 5 * 1024)
    with pytest.raises(CheckpointError, match=r"encoder\.onnx: no such file"):
        codec.encode(np.zeros(5000, np.float32))


def test_other_onnx_folders_raise(bundled, tmp_path, monkeypatch):
    with pytest.raises(NemoLfrError, match="nemo-lfr export onnx --out FOLDER"):
        nemo_lfr.load(tmp_path, backend="onnx")
    with pytest.raises(NemoLfrError, match="backend 'tensorrt' is unknown"):
        nemo_lfr.load(backend="tensorrt")
    with pytest.raises(NemoLfrError, match="which backend 'torch' cannot open; pass the checkpoint"):
        nemo_lfr.load(bundled, backend="torch")
    with pytest.raises(NemoLfrError, match="'tpu' cannot be used here"):
        nemo_lfr.load(bundled, "tpu")
    with pytest.raises(CheckpointError, match=r"no encoder\.onnx or decoder\.onnx"):
        OnnxBackend(tmp_path)
    with pytest.raises(NemoLfrError, match="does not support streaming"):
        nemo_lfr.load(bundled).stream_encoder()
    monkeypatch.setattr(torch_backend, "has_bf16", lambda: True)  # the codec is refused before it runs in bf16
    with pytest.raises(NemoLfrError, match="exported in fp32"):
        export_onnx(nemo_lfr.load(precision="bf16"), tmp_path / "bf16")


# --- files that differ from the export


@pytest.fixture(scope="module")
def two_exports(once):
    """Export a codec, and make what the export of another codec of the same layout would be."""

    def other(folder: Path) -> None:
        shutil.copytree(export, folder)
        forge(folder, fingerprint="0123456789abcdef")
        fill(folder, "encoder.onnx", 0.5)

    export = once("onnx-smallest", export_smallest)
    return [export, once("onnx-other", other)]


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def set_metadata(path: Path, **changes: object) -> None:
    """Change the metadata of an ONNX file with the onnx package."""
    import onnx

    model = onnx.load(path)
    model.metadata_props[0].value = json.dumps(json.loads(model.metadata_props[0].value) | changes)
    onnx.save(model, path)


def set_values(folder: Path, **changes: object) -> None:
    path = folder / "codec.json"
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del values[key]
        else:
            values[key] = value
    path.write_text(json.dumps(values))


def forge(folder: Path, **changes: object) -> None:
    """Change the metadata of an ONNX file and the manifest, and correct the hashes."""
    for name in ("encoder.onnx", "decoder.onnx"):
        set_metadata(folder / name, **changes)
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in json_files(folder)}
    set_values(folder, files=hashes, **changes)


def lie(folder: Path, change: Callable[[Any], None], name: str = "encoder.onnx") -> None:
    """Change the contents of an ONNX file, and correct its hash."""
    import onnx

    path = folder / name
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    hashes = json_files(folder) | {name: hashlib.sha256(path.read_bytes()).hexdigest()}
    set_values(folder, files=hashes)


def fill(folder: Path, name: str, value: float) -> None:
    """Set the weights of all convolutions of an ONNX file, and correct its hash."""

    def change(model: Any) -> None:
        weights = [tensor for tensor in model.graph.initializer if tensor.data_type == 1 and len(tensor.dims) == 3]
        assert len(weights) > 3
        for weight in weights:
            weight.raw_data = np.full(tuple(weight.dims), value, np.float32).tobytes()

    lie(folder, change, name)


def json_files(folder: Path) -> dict[str, str]:
    return json.loads((folder / "codec.json").read_text())["files"]


def swap(folder: Path, other: Path, name: str) -> None:
    shutil.copy(other / name, folder / name)


DAMAGE = {
    "a bit of the encoder": lambda folder, _: flip(folder / "encoder.onnx", 0.7),
    "a bit of the decoder": lambda folder, _: flip(folder / "decoder.onnx", 0.3),
    "the encoder's first byte": lambda folder, _: flip(folder / "encoder.onnx", 0),
    "the decoder's last byte": lambda folder, _: flip(folder / "decoder.onnx", 0.99999),
    "another export's encoder": lambda folder, other: swap(folder, other, "encoder.onnx"),
    "another export's decoder": lambda folder, other: swap(folder, other, "decoder.onnx"),
    "another export's manifest": lambda folder, other: swap(folder, other, "codec.json"),
    "the decoder as encoder": lambda folder, _: shutil.copy(folder / "decoder.onnx", folder / "encoder.onnx"),
    "a truncated encoder": lambda folder, _: cut(folder / "encoder.onnx", 0.5),
    "a truncated decoder": lambda folder, _: cut(folder / "decoder.onnx", 0.99),
    "an empty encoder": lambda folder, _: cut(folder / "encoder.onnx", 0),
    "no ONNX": lambda folder, _: (folder / "encoder.onnx").write_bytes(b"not a model"),
    "text after the end": lambda folder, _: (folder / "encoder.onnx").open("ab").write(b"more"),
    "no manifest, as of an older export": lambda folder, _: (folder / "codec.json").unlink(),
    "an empty manifest": lambda folder, _: cut(folder / "codec.json", 0),
    "a truncated manifest": lambda folder, _: cut(folder / "codec.json", 0.6),
    "a manifest of bytes": lambda folder, _: (folder / "codec.json").write_bytes(bytes(range(256))),
    "a manifest that is a list": lambda folder, _: (folder / "codec.json").write_text("[1, 2]"),
    "a manifest of a million brackets": lambda folder, _: (folder / "codec.json").write_text("[" * 1_000_000),
    "a deep manifest": lambda folder, _: (folder / "codec.json").write_text("[" * 60_000),
    "a folder as manifest": lambda folder, _: ((folder / "codec.json").unlink(), (folder / "codec.json").mkdir()),
    "a number of 5,000 digits": lambda folder, _: (folder / "codec.json").write_text(
        '{"version": ' + "9" * 5000 + "}"
    ),
    "metadata of a file": lambda folder, _: set_metadata(folder / "encoder.onnx", sample_rate=44100),
    "an edited rate": lambda folder, _: set_values(folder, sample_rate=16000),
    "an edited fingerprint": lambda folder, _: set_values(folder, fingerprint="0" * 16),
    "no files": lambda folder, _: set_values(folder, files=...),
    "files without hashes": lambda folder, _: set_values(folder, files={"encoder.onnx": 1, "decoder.onnx": None}),
    "files elsewhere": lambda folder, _: set_values(folder, files={"../encoder.onnx": "0" * 64}),
    **{
        f"{name} is a {kind}": lambda folder, _, name=name, put=put: ((folder / name).unlink(), put(folder / name))
        for name in ("encoder.onnx", "decoder.onnx", "codec.json")
        for kind, put in {
            "pipe": os.mkfifo,
            "folder": Path.mkdir,
            "dangling link": lambda path: path.symlink_to("x"),
        }.items()
    },
    **{
        f"{key} {value!r}": lambda folder, _, key=key, value=value: forge(folder, **{key: value})
        for key, values in {
            "version": (1, 3, None, "2", True, 2.0),
            "sample_rate": (0, -5, 10**12, None, "22050", 22050.5, float("nan"), float("inf"), True, [], {}),
            "samples_per_frame": (0, -1, 10**12, None, "x", 1.5),
            "levels": (None, [], [0], [1], ["8"], [4096] * 4, 5, [10**12], [8] * 17),
            "num_codebooks": (0, -1, 1000, None, "8"),
            "fingerprint": (None, "", 5, "x" * 16, "0" * 17),
            "encoder": (None, [], {}, {"past": -1, "future": 0, "min_frames": 1}, {"past": 0, "future": 0}),
            "decoder": ("x", {"past": 10**9, "future": 0, "min_frames": 1}),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("damage", [*DAMAGE])
def test_modified_export_folder_is_refused_in_one_line(damage, two_exports, tmp_path):
    folder, other = two_exports
    shutil.copytree(folder, tmp_path / "x")
    DAMAGE[damage](tmp_path / "x", other)
    with pytest.raises(NemoLfrError) as caught:
        codec = nemo_lfr.load(tmp_path / "x")
        codec.decode(codec.encode(synthesize(0.1))[0])
    message = str(caught.value)
    assert str(tmp_path / "x") in message and "\n" not in message and len(message) < 600
    assert "export" in message


@pytest.mark.parametrize(("key", "value"), [("num_codebooks", 9), ("samples_per_frame", 16), ("levels", [8, 8, 8, 8])])
def test_forged_manifest_never_gives_contradicting_tokens(key, value, two_exports, tmp_path):
    shutil.copytree(two_exports[0], tmp_path / "x")
    forge(tmp_path / "x", **{key: value})
    codec = nemo_lfr.load(tmp_path / "x")
    if key == "levels":  # more entries than are used
        assert codec.encode(synthesize(0.1))[0].max() < codec.codebook_size
        return
    with pytest.raises(NemoLfrError, match=r"according to codec\.json|cannot run this file"):
        codec.encode(synthesize(0.1))


@pytest.mark.parametrize("change", [external, node("Loop", body=body()), node("ConstantOfShape")])
def test_files_that_the_export_does_not_write_are_refused_before_they_are_opened(
    change, two_exports, tmp_path, monkeypatch
):
    import onnxruntime

    monkeypatch.delattr(onnxruntime, "InferenceSession")
    monkeypatch.chdir(tmp_path)
    Path("weights.bin").write_bytes(bytes(1 << 20))  # ONNX Runtime would find it in the current folder
    shutil.copytree(two_exports[0], "x")
    lie(Path("x"), change)
    with pytest.raises(CheckpointError, match=r"x/encoder\.onnx: the file contains .* does not accept .*; export"):
        nemo_lfr.load("x")


def test_a_file_that_is_replaced_after_opening_is_not_run(two_exports, tmp_path):
    folder, other = two_exports
    shutil.copytree(folder, tmp_path / "x")
    codec = nemo_lfr.load(tmp_path / "x")
    swap(tmp_path / "x", other, "encoder.onnx")
    with pytest.raises(CheckpointError, match="SHA-256"):
        codec.encode(synthesize(0.1))


@pytest.mark.parametrize("value", [1e30, -1e30, float("nan")])
def test_exported_networks_that_overflow_are_errors_too(value, two_exports, tmp_path):
    shutil.copytree(two_exports[0], tmp_path / "x")
    for name in ("encoder.onnx", "decoder.onnx"):
        fill(tmp_path / "x", name, value)
    exported = nemo_lfr.load(tmp_path / "x")
    with pytest.raises(NemoLfrError, match="encoder gives NaN or infinite"):
        exported.encode(synthesize(0.1))
    with pytest.raises(NemoLfrError, match="decoder gives NaN or infinite"):
        exported.decode(np.ones((8, 12), int))


def test_onnx_rejects_bad_audio_and_tokens_like_torch(bundled):
    codec = nemo_lfr.load(bundled)
    for bad in (
        np.zeros((1, 2, 3), np.float32), np.zeros(5, bool), np.full(5000, np.nan), np.full(5000, 1e4), "speech",
        [["one"], ["two"]], np.zeros((0, 5), np.float32), np.zeros(5, np.uint16), None,
    ):  # fmt: skip
        with pytest.raises(AudioError):
            codec.encode(bad)
    for bad in (np.zeros(8, int), np.zeros((7, 2), int), np.zeros((8, 2)), np.full((8, 2), 2016), np.full((8, 1), -1)):
        with pytest.raises(TokensError):
            codec.decode(bad)
    with pytest.raises(AudioError, match="audio_len"):
        codec.encode(np.zeros((2, 5000), np.float32), [5000])
    with pytest.raises(TokensError, match=r"audio_len\[0\] is 9000.* 1025 to 2048"):
        codec.decode(np.zeros((8, 2), int), audio_len=[9000])
    whole = codec.encode((synthesize(1) * 32767).astype(np.int16))[0]
    assert whole.shape == (1, 8, 22) and codec.encode(synthesize(1), sample_rate=16000)[0].shape == (1, 8, 30)


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("encode {in}/a.wav --model {model}", "encoder"),
        ("decode {tmp}/a.lfr --model {model}", "decoder"),
        ("demo --model {model}", "decoder"),
        ("tokenize {in} --model {model}", "encoder"),
        ("detokenize {tmp}/tokens --model {model}", "decoder"),
        ("evaluate {tmp}/m.json --codec lfr:{model}", "decoder"),
    ],
)
def test_commands_refuse_a_folder_without_the_network_that_they_need(capsys, two_exports, tmp_path, command, missing):
    shutil.copytree(two_exports[0], tmp_path / "x")
    (tmp_path / "x" / f"{missing}.onnx").unlink()
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", synthesize(0.1), RATE)
    (tmp_path / "m.json").write_text('{"audio_filepath": "in/a.wav", "duration": 0.1}\n')
    nemo_lfr.load(two_exports[0]).encode_file(tmp_path / "in" / "a.wav", tmp_path / "a.lfr")
    if command.startswith("detokenize"):
        arguments = ("--out", tmp_path / "tokens", "--model", two_exports[0], "--workers", 1)
        assert run(capsys, "tokenize", tmp_path / "in", *arguments)[0] == 0
    names = {"in": tmp_path / "in", "tmp": tmp_path, "model": tmp_path / "x"}
    code, _, err = run(capsys, *(word.format(**names) for word in command.split()), "--out", tmp_path / "out")
    assert code == 2 and err.count(f"{missing}.onnx: no such file") == 1 and not (tmp_path / "out").exists()


def test_a_manifest_that_was_saved_with_a_byte_order_mark_is_read(two_exports, tmp_path):
    folder = Path(shutil.copytree(two_exports[0], tmp_path / "x"))
    manifest = folder / "codec.json"
    manifest.write_bytes(codecs.BOM_UTF8 + manifest.read_bytes())
    assert nemo_lfr.load(folder).fingerprint == nemo_lfr.load(two_exports[0]).fingerprint


def test_a_folder_that_is_moved_after_it_was_opened_is_named(two_exports, tmp_path):
    codec = nemo_lfr.load(shutil.copytree(two_exports[0], tmp_path / "x"))
    (tmp_path / "x").rename(tmp_path / "y")
    with pytest.raises(CheckpointError, match="x: this folder was moved or deleted after it was opened"):
        codec.encode(synthesize(0.1))


@pytest.mark.slow
def test_onnx_tokenizes_a_corpus(capsys, bundled, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(5):
        soundfile.write(tmp_path / "in" / f"{number}.wav", synthesize(1 + number / 5, number), RATE)
    for name, options in (("torch", ()), ("onnx", ("--model", bundled))):
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


class Unconvertible:
    def __array__(self, *arguments, **keywords):
        raise KeyError("field")


@pytest.mark.parametrize(
    "audio",
    [
        np.ma.masked_greater(synthesize(0.1), 0),
        Unconvertible(),
        None,
        {"samples": [0.0]},
        np.zeros(5, "M8[s]"),
    ],
    ids=lambda audio: type(audio).__name__,
)
def test_both_backends_reject_values_that_are_not_audio(bundled, audio):
    for codec in (nemo_lfr.load(bundled), cached_codec("symmetric")):
        with pytest.raises(AudioError, match=r"^audio (is an? |has type )"):
            codec.encode(audio)


def test_audio_in_any_byte_order_has_the_same_tokens(bundled):
    codec, wave = nemo_lfr.load(bundled), synthesize(0.3)
    for dtype in ("<f4", ">f4", ">f8"):
        assert np.array_equal(codec.encode(wave.astype(dtype))[0], codec.encode(wave)[0])


def test_a_folder_named_from_another_working_directory_still_runs(bundled, monkeypatch, tmp_path):
    monkeypatch.chdir(bundled.parent)
    codec = nemo_lfr.load(bundled.name)
    monkeypatch.chdir(tmp_path)
    assert codec.encode(synthesize(0.1))[0].shape == (1, 8, 3)


@pytest.mark.parametrize("threads", ["0", "1", "4,2", "1000000000000", "9" * 5000, "many"])
def test_any_omp_num_threads_value_is_accepted(bundled, monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert nemo_lfr.load(bundled).encode(synthesize(0.1))[0].shape == (1, 8, 3)
