"""The scripts of `examples/`, run as a user runs them."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import soundfile
import torch

from nemo_lfr.checkpoint import read_config
from nemo_lfr.pretrained import load
from tests.crash import ROOT
from tests.models import RATE, synthesize

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten recordings and a manifest, in a folder whose name can be told from any other."""
    folder = tmp_path_factory.mktemp("corpus-of-this-machine")
    lines = []
    for number in range(10):
        soundfile.write(folder / f"{number}.wav", synthesize(1.2, number), RATE, subtype="FLOAT")
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "duration": 1.2}))
    (folder / "manifest.json").write_text("\n".join(lines))
    return folder


def start(script: str, *arguments: object, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, ROOT / "examples" / script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HYDRA_FULL_ERROR": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment
    )


def run(script: str, *arguments: object, cwd: Path) -> str:
    process = start(script, *arguments, cwd=cwd)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output


def tutorial(corpus: Path, out: Path, *overrides: str) -> list[str]:
    """Arguments of NeMo's tutorial command with the debug config."""
    meta = [
        f"+{kind}_ds_meta.mine.{key}={value}"
        for kind in ("train", "val", "log")
        for key, value in (("manifest_path", corpus / "manifest.json"), ("audio_dir", corpus))
    ]
    config = "--config-name=audio_codec_low_frame_rate_22050_debug"
    return [config, "max_epochs=1", f"log_dir={out / 'logs'}", f"exp_manager.exp_dir={out}", *meta, *overrides]


def train(corpus: Path, out: Path, *overrides: str) -> Path:
    """Run it; returns the folder of checkpoints."""
    run("audio_codec.py", *tutorial(corpus, out, *overrides), cwd=out)
    return out / "AudioCodec" / "checkpoints"


@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "conf").glob("*.yaml")))
def test_a_configs_trainer_is_one_for_this_machine(config):
    """With a GPU or without: stock's configs ask for GPUs and end where there are none."""
    pl = pytest.importorskip("lightning.pytorch", reason="needs NeMo's Lightning: pip install 'nemo-lfr[nemo]'")
    hydra = pytest.importorskip("hydra", reason="needs NeMo's Hydra: pip install 'nemo-lfr[nemo]'")
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
        trainer = pl.Trainer(**hydra.compose(config, ["max_epochs=1"]).trainer)
    assert trainer.num_devices == (max(torch.cuda.device_count(), 1) if "debug" not in config else 1)


def test_the_tutorials_command_trains_saves_and_starts_again_from_what_it_saved(corpus, tmp_path):
    pytest.importorskip("nemo", reason="NeMo's door needs NeMo: pip install 'nemo-lfr[nemo]'")
    checkpoints = train(corpus, tmp_path)
    saved = checkpoints / "AudioCodec.nemo"
    tokens, _ = load(saved, "cpu").encode(synthesize(1))
    assert tokens.shape == (1, 8, 22)
    assert list((tmp_path / "logs").rglob("*_audio_out.wav"))
    with tarfile.open(saved) as archive:
        text = archive.extractfile("./model_config.yaml" if "./model_config.yaml" in archive.getnames() else
                                   "model_config.yaml").read().decode()  # fmt: skip
    assert str(corpus) not in text and str(tmp_path) not in text
    assert read_config(saved).train_ds.dataset.dataset_meta.mine.manifest_path == "manifest.json"
    (last,) = checkpoints.glob("*last.ckpt")
    assert torch.equal(load(last, "cpu").encode(synthesize(1))[0], tokens)
    for key, start in (("init_from_nemo_model", saved), ("init_from_ptl_ckpt", last)):
        # Without a step, what is saved is what it started from.
        again = tmp_path / key
        again.mkdir()
        found = train(corpus, again, f"+{key}='{start}'", "model.optim.lr=0") / "AudioCodec.nemo"
        assert torch.equal(load(found, "cpu").encode(synthesize(1))[0], tokens), key


def test_a_run_that_is_killed_and_started_again_ends_as_one_that_was_not(corpus, tmp_path):
    pytest.importorskip("nemo", reason="NeMo's door needs NeMo: pip install 'nemo-lfr[nemo]'")
    ends = []
    for name in ("whole", "killed"):
        out = tmp_path / name
        out.mkdir()
        if name == "killed":
            process = start("audio_codec.py", *tutorial(corpus, out, "max_epochs=2"), cwd=out)
            while process.poll() is None and not list(out.rglob("*epoch=0.ckpt")):
                time.sleep(0.05)
            time.sleep(0.5)  # amid the second epoch
            process.kill()
            process.communicate()
        checkpoints = train(corpus, out, "max_epochs=2")
        (last,) = checkpoints.glob("*epoch=2-last.ckpt")
        ends.append(torch.load(last, map_location="cpu", weights_only=False))
    whole, killed = ends
    assert whole["global_step"] == killed["global_step"]
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, killed["state_dict"][key]), key


def test_the_embedded_codecs_script_trains_resumes_and_exports(corpus, tmp_path):
    manifest = corpus / "manifest.json"
    common = ["--train", manifest, "--valid", manifest, "--out", tmp_path / "run", "--batch-size", 2, "--frames", 8]
    small = ["--encoder-channels", 8, "--decoder-channels", 64, "--eval-every", 2, "--eval-clips", 2]
    small += ["--adversarial-from", 3]
    run("train_default.py", *common, *small, "--steps", 2, cwd=tmp_path)
    output = run("train_default.py", *common, *small, "--steps", 4, cwd=tmp_path)
    assert "continuing from step 2" in output
    curve = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [2, 4]
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == 4 and state["discriminator_optimizer"]["state"]
    run("train_default.py", "--out", tmp_path / "run", "--export", tmp_path / "small.nemo", cwd=tmp_path)
    assert load(tmp_path / "small.nemo", "cpu").encode(synthesize(1))[0].shape == (1, 8, 22)


def test_the_language_model_learns_and_makes_sound(corpus, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nemo_lfr", "tokenize", corpus / "manifest.json", "--out", tmp_path / "tokens"],
        cwd=ROOT,
    )
    assert done.returncode == 0
    said = run("train_language_model.py", tmp_path / "tokens", "--seconds", 15, cwd=tmp_path)
    losses = [float(line.split()[2]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.5, said
    audio, rate = soundfile.read(tmp_path / "sample.wav")
    assert rate == RATE and len(audio) == 72 * 1024 and audio.std() > 1e-3


def test_what_is_spoken_is_heard_through_the_codec(tmp_path):
    wave = synthesize(3)
    soundfile.write(tmp_path / "in.wav", wave, RATE)
    said = run("microphone_to_speaker.py", "--input", "in.wav", "--output", "out.wav", cwd=tmp_path)
    assert "65 frames of 8 tokens" in said
    codec = load(None, "cpu")
    expected = codec.decode(codec.encode(soundfile.read(tmp_path / "in.wav", dtype="float32")[0])[0])[0][0].numpy()
    heard, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert heard.shape == expected.shape and abs(heard - expected).max() < 1e-3
