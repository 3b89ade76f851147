"""Tests of `Codec.from_pretrained`, `save_pretrained` and `push_to_hub`."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

import nemo_lfr
from nemo_lfr.errors import CheckpointError, NemoLfrError
from tests.hub_server import COMMIT, HubServer
from tests.models import KINDS, build_codec, codec_config, speech_like, write_nemo
from tests.tiers import slow_after

ROOT = Path(__file__).resolve().parents[2]
FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.fixture
def nemo_file(tmp_path):
    return write_nemo(tmp_path / "tiny.nemo", codec_config("two_stages"))


@pytest.mark.parametrize("kind", slow_after(1, list(KINDS)))
def test_a_saved_codec_is_loaded_with_its_tokens_audio_and_fingerprint(kind, tmp_path):
    codec = nemo_lfr.load(write_nemo(tmp_path / "tiny.nemo", codec_config(kind)), "cpu")
    assert codec.save_pretrained(tmp_path / "out") is None and sorted(os.listdir(tmp_path / "out")) == FILES
    loaded = nemo_lfr.Codec.from_pretrained(tmp_path / "out", device="cpu")
    audio = speech_like(9000)
    tokens, _ = codec.encode(audio, sample_rate=codec.sample_rate)
    assert torch.equal(loaded.encode(audio, sample_rate=codec.sample_rate)[0], tokens)
    assert torch.equal(loaded.decode(tokens)[0], codec.decode(tokens)[0])
    assert loaded.fingerprint == codec.fingerprint and type(loaded) is nemo_lfr.Codec


@pytest.mark.slow
def test_changed_weights_are_saved(nemo_file, tmp_path):
    codec = nemo_lfr.load(nemo_file, "cpu")
    with torch.no_grad():
        codec.encoder.post_conv.conv.weight.mul_(0.5)
    codec.save_pretrained(tmp_path / "out")
    loaded = nemo_lfr.Codec.from_pretrained(tmp_path / "out", device="cpu")
    assert loaded.fingerprint == codec.fingerprint != nemo_lfr.load(nemo_file, "cpu").fingerprint


@pytest.mark.slow
def test_a_folder_is_saved_again_in_place(nemo_file, tmp_path):
    nemo_lfr.load(nemo_file, "cpu").save_pretrained(tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    nemo_lfr.Codec.from_pretrained(tmp_path / "out", device="cpu").save_pretrained(tmp_path / "out")
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in FILES}


@pytest.mark.slow
def test_a_checkpoint_of_nemo_is_a_pretrained_codec_too(nemo_file):
    codec = nemo_lfr.Codec.from_pretrained(nemo_file, device="cpu", force_download=True)
    assert codec.fingerprint == nemo_lfr.load(nemo_file, "cpu").fingerprint


@pytest.mark.slow
def test_codecs_without_a_config_and_changed_modules_are_not_saved(nemo_file, tmp_path):
    with pytest.raises(NemoLfrError, match="has no config to save; load it from a checkpoint"):
        build_codec("two_stages").save_pretrained(tmp_path / "out")
    codec = nemo_lfr.load(nemo_file, "cpu")
    codec.encoder.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(NemoLfrError, match=r"; 2 names are only in .*, for example audio_encoder\.adapter"):
        codec.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


LOAD = """
import nemo_lfr
print(nemo_lfr.Codec.from_pretrained("someone/codec", device="cpu", revision="{revision}").fingerprint)
"""


@pytest.mark.slow
def test_a_repository_is_loaded_at_a_revision(nemo_file, tmp_path):
    codec = nemo_lfr.load(nemo_file, "cpu")
    codec.save_pretrained(tmp_path / "out")
    with HubServer({"someone/codec": {name: tmp_path / "out" / name for name in FILES}}) as hub:
        environment = hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT))
        command = [sys.executable, "-c", LOAD.format(revision=COMMIT)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == codec.fingerprint


@pytest.mark.parametrize("name", [None, 5, ["a"], "a\0b", b"a"])
def test_a_name_that_is_no_path_is_refused(name):
    with pytest.raises(CheckpointError, match="is not a path"):
        nemo_lfr.Codec.from_pretrained(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_codec_is_not_saved_over_a_file(name, nemo_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NemoLfrError, match="is a file, not a folder; choose another name"):
        nemo_lfr.load(nemo_file, "cpu").save_pretrained(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["someone/nothing", "nowhere.nemo", ""])
def test_a_repository_that_cannot_be_loaded_is_named(name, tmp_path):
    with pytest.raises((CheckpointError, NemoLfrError)) as error:
        nemo_lfr.Codec.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("save_pretrained", {"config": {"sample_rate": 8000}}),
        ("save_pretrained", {"model_card_kwargs": {"license": "mit"}}),
        ("save_pretrained", {"overwrite": True}),
        ("push_to_hub", {"config": {"sample_rate": 8000}}),
        ("push_to_hub", {"privat": True}),
        ("from_pretrained", {"devise": "cpu"}),
        ("from_pretrained", {"allow_patterns": "*.nemo"}),
    ],
)
def test_arguments_without_an_effect_are_refused(method, argument, nemo_file, tmp_path):
    codec = nemo_lfr.load(nemo_file, "cpu")
    source = nemo_file if method == "from_pretrained" else tmp_path / "out"
    with pytest.raises(NemoLfrError, match=f"^{method} got the argument {next(iter(argument))}, .*; leave it out"):
        getattr(codec, method)(os.fspath(source), **argument)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_arguments_of_an_upload_are_accepted_without_an_upload(nemo_file, tmp_path):
    options = {"config": None, "private": True, "commit_message": "First"}
    nemo_lfr.load(nemo_file, "cpu").save_pretrained(tmp_path / "out", push_to_hub=False, **options)
    assert sorted(os.listdir(tmp_path / "out")) == FILES


@pytest.mark.slow
def test_a_codec_is_uploaded_with_a_card(nemo_file, tmp_path, monkeypatch):
    """The Hub's API is replaced, because an upload needs an account."""
    uploads = {}

    def upload(self, *, repo_id, folder_path, **options):
        uploads.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return f"{repo_id} {options['commit_message']}"

    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, repo_id, **_: huggingface_hub.RepoUrl(repo_id))
    monkeypatch.setattr(api, "upload_folder", upload)
    codec = nemo_lfr.load(nemo_file, "cpu")
    assert codec.push_to_hub("someone/codec", commit_message="First") == "someone/codec First"
    assert sorted(uploads) == ["README.md", *FILES] and b'from_pretrained("someone/codec")' in uploads["README.md"]
    codec.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="someone/other")
    assert b'from_pretrained("someone/other")' in uploads["README.md"]
    assert uploads["model.safetensors"] == (tmp_path / "mine" / "model.safetensors").read_bytes()
