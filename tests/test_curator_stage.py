"""Test of the example stage for NeMo Curator, which is skipped where Curator is not installed."""

import importlib.util

import pytest
import soundfile
import torch

from nemo_lfr.io.token_file import TokenReader
from nemo_lfr.pretrained import load
from tests.corpora import write_codec
from tests.crash import ROOT
from tests.models import RATE, synthesize

tasks = pytest.importorskip("nemo_curator.tasks", reason="needs NeMo Curator: pip install nemo-curator")


def test_tasks_get_the_tokens_of_their_files(tmp_path):
    spec = importlib.util.spec_from_file_location("nemo_curator_stage", ROOT / "examples" / "nemo_curator_stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = write_codec(tmp_path / "tiny.nemo")
    paths = [tmp_path / folder / "a.wav" for folder in ("x", "y", "missing")]
    for seed, path in enumerate(paths[:2]):
        path.parent.mkdir()
        soundfile.write(path, synthesize(0.3, seed), RATE)
    stage = module.TokenizeStage(str(tmp_path / "tokens"), model=str(model), device="cpu")
    stage.setup()
    made = [tasks.AudioTask(data={"audio_filepath": str(path), "text": path.parent.name}) for path in paths]
    results = stage.process_batch(made)
    codec = load(model, "cpu")
    assert [task.data["text"] for task in results] == ["x", "y", "missing"]
    for path, task in zip(paths[:2], results[:2], strict=True):
        expected = codec.encode(soundfile.read(path, dtype="float32")[0])[0][0]
        with TokenReader(task.data["tokens_filepath"]) as reader:
            assert torch.equal(torch.as_tensor(reader.read()).long(), expected.long())
        assert task.data["num_frames"] == expected.shape[1]
    assert "missing" in results[2].data["tokens_error"] and "tokens_filepath" not in results[2].data
