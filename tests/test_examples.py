"""Tests that run the scripts of `examples/` as a user does."""

import json
import os
import select
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from nemo_lfr.checkpoint import read_config
from nemo_lfr.pretrained import load
from tests.crash import ROOT
from tests.models import RATE, synthesize

pytestmark = pytest.mark.slow

MANIFESTS = {"train": "manifest.json", "val": "manifest.json", "log": "logged.json"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a folder with ten recordings and the files of `MANIFESTS`; tests search for its unique name."""
    folder = tmp_path_factory.mktemp("corpus-of-this-machine")
    lines = []
    for number in range(10):
        soundfile.write(folder / f"{number}.wav", synthesize(1.2, number), RATE, subtype="FLOAT")
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "duration": 1.2}))
    (folder / "manifest.json").write_text("\n".join(lines))
    # Pictures of a clip in each logged epoch take longer than the epoch, so only one clip is logged.
    (folder / "logged.json").write_text(lines[0])
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
    """Return the arguments of NeMo's tutorial command with the debug config."""
    meta = [
        f"+{kind}_ds_meta.mine.{key}={value}"
        for kind in MANIFESTS
        for key, value in (("manifest_path", corpus / MANIFESTS[kind]), ("audio_dir", corpus))
    ]
    config = "--config-name=audio_codec_low_frame_rate_22050_debug"
    return [config, "max_epochs=1", f"log_dir={out / 'logs'}", f"exp_manager.exp_dir={out}", *meta, *overrides]


def train(corpus: Path, out: Path, *overrides: str) -> Path:
    """Run the tutorial's command and return the folder of checkpoints."""
    run("audio_codec.py", *tutorial(corpus, out, *overrides), cwd=out)
    return out / "AudioCodec" / "checkpoints"


# Importing NeMo takes longer than a debug training, so one process imports it and forks a child for each training.
LAUNCHER = """
import json, os, runpy, sys
import torch
import nemo_lfr.nemo.model
torch.set_num_threads(1)
for line in sys.stdin:
    folder, *command = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Launcher:
    """Process that starts debug trainings with NeMo imported."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def train(self, corpus: Path, out: Path, *overrides: str, kill_after: float | None = None) -> bool:
        """Train to the end or for `kill_after` seconds; return whether training finished."""
        assert self.process.stdin is not None and self.process.stdout is not None
        command = [str(ROOT / "examples" / "audio_codec.py"), *tutorial(corpus, out, *overrides)]
        self.process.stdin.write(json.dumps([str(out), *command]) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        ended, _, _ = select.select([self.process.stdout], [], [], kill_after)
        if not ended:
            os.kill(child, signal.SIGKILL)
        status = int(self.process.stdout.readline())
        assert status in (0, signal.SIGKILL), (out / "output.txt").read_text()[-3000:]
        return status == 0


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    pytest.importorskip("nemo", reason="needs NeMo: pip install '.[nemo]'")
    launcher = Launcher()
    yield launcher
    launcher.process.communicate()


@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "conf").glob("*.yaml")))
def test_the_trainer_of_each_config_can_be_built_on_this_machine(config):
    """NeMo's own configs require GPUs."""
    pl = pytest.importorskip("lightning.pytorch", reason="needs NeMo's Lightning: pip install '.[nemo]'")
    hydra = pytest.importorskip("hydra", reason="needs NeMo's Hydra: pip install '.[nemo]'")
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
        trainer = pl.Trainer(**hydra.compose(config, ["max_epochs=1"]).trainer)
    assert trainer.num_devices == (max(torch.cuda.device_count(), 1) if "debug" not in config else 1)


def test_the_tutorials_command_trains_saves_and_starts_from_its_checkpoint(corpus, launcher, tmp_path):
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
        # Without a training step, the saved weights equal the initial ones.
        again = tmp_path / key
        again.mkdir()
        # With validation in every second epoch only, NeMo saves nothing after one epoch.
        shorter = "trainer.check_val_every_n_epoch=2"
        assert launcher.train(corpus, again, f"+{key}='{start}'", "model.optim.lr=0", shorter)
        assert torch.equal(
            load(again / "AudioCodec" / "checkpoints" / "AudioCodec.nemo", "cpu").encode(synthesize(1))[0], tokens
        ), key


def test_each_job_of_a_multirun_trains_in_its_own_folder(corpus, launcher, tmp_path):
    """Job 1 has the weights of a single run with its options, so it resumed nothing of job 0."""
    for name, options in (("both", ["+seed=1,2", "-m"]), ("second", ["+seed=2"])):
        (tmp_path / name).mkdir()
        assert launcher.train(corpus, tmp_path / name, *options)
    jobs = sorted((tmp_path / "both").glob("job-*"))  # another job with the same number has another checksum
    first, second = (last_checkpoint(job)["state_dict"] for job in jobs)
    assert [job.name[:6] for job in jobs] == ["job-0-", "job-1-"]
    expected = last_checkpoint(tmp_path / "second")["state_dict"]
    assert all(torch.equal(value, second[key]) for key, value in expected.items())
    assert any(not torch.equal(value, second[key]) for key, value in first.items())
    assert list((tmp_path / "both" / "logs" / jobs[1].name).rglob("*_audio_out.wav"))


def last_checkpoint(out: Path) -> dict[str, Any]:
    (last,) = (out / "AudioCodec" / "checkpoints").glob("*-last.ckpt")
    return torch.load(last, map_location="cpu", weights_only=False)


def test_repeatedly_killed_run_ends_like_an_uninterrupted_one(corpus, launcher, tmp_path):
    """Kill training several times (NEMO_LFR_KILLS); checkpoints with a final name are always complete."""
    kills, rng = int(os.environ.get("NEMO_LFR_KILLS", "2")), np.random.default_rng(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    epochs = f"max_epochs={kills + 1}"
    launcher.train(corpus, whole, epochs)  # trains to the end and fills the disk cache
    began = time.perf_counter()
    assert launcher.train(corpus, whole, epochs)  # training is finished, so this run takes only the start-up time
    starts = time.perf_counter() - began
    deaths, epoch_takes = 0, 1.0
    while deaths < kills:
        if launcher.train(corpus, killed, epochs, kill_after=starts + rng.uniform(0, 2) * epoch_takes):
            break
        deaths += 1
        files = [
            path for path in (killed / "AudioCodec" / "checkpoints").glob("*") if path.suffix in (".ckpt", ".nemo")
        ]
        for path in files:
            load(path, "cpu")
        if not files:
            epoch_takes *= 1.5  # the machine is slower than assumed
    assert deaths == kills
    launcher.train(corpus, killed, epochs)
    expected, resumed = last_checkpoint(whole), last_checkpoint(killed)
    assert resumed["global_step"] == expected["global_step"]
    assert resumed["state_dict"].keys() == expected["state_dict"].keys()
    for key, value in expected["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    for before, after in zip(expected["optimizer_states"], resumed["optimizer_states"], strict=True):
        for index, state in before["state"].items():
            assert all(torch.equal(value, after["state"][index][name]) for name, value in state.items())


def test_microphone_example_plays_decoded_speech(tmp_path):
    wave = synthesize(3)
    soundfile.write(tmp_path / "in.wav", wave, RATE)
    said = run("microphone_to_speaker.py", "--input", "in.wav", "--output", "out.wav", cwd=tmp_path)
    assert "65 frames of 8 tokens" in said
    codec = load(None, "cpu")
    expected = codec.decode(codec.encode(soundfile.read(tmp_path / "in.wav", dtype="float32")[0])[0])[0][0].numpy()
    heard, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert heard.shape == expected.shape and abs(heard - expected).max() < 1e-3
