"""Tests of Lhotse cuts and Shar as training and validation data, compared with NeMo's own dataset."""

import json
import random

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("nemo", reason="Lhotse comes with NeMo: pip install '.[nemo]'")

from lhotse import CutSet, MonoCut, Recording
from lhotse.shar import SharWriter
from nemo.collections.tts.data.audio_codec_dataset_lhotse import AudioCodecLhotseDataset
from omegaconf import OmegaConf

from nemo_lfr import AudioCodecModel
from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.nemo.cuts import CutDataset, cut_loader
from tests.models import RATE, synthesize
from tests.nemo.test_training_with_nemo import training_config


def cuts(folder, count: int = 6, rate: int = RATE, custom: bool = True) -> CutSet:
    made = []
    for index in range(count):
        path = folder / f"{index}.wav"
        soundfile.write(path, synthesize(1 + index / 4, index), rate)
        recording = Recording.from_file(path, recording_id=str(index))
        cut = MonoCut(id=str(index), start=0, duration=recording.duration, channel=0, recording=recording)
        if custom:
            cut.target_audio = recording
        made.append(cut)
    return CutSet.from_cuts(made)


@pytest.fixture
def shar(tmp_path):
    """Write a Shar folder with `target_audio` in two shards of three cuts, as NeMo's codec training reads it."""
    for name in ("wav", "shar"):
        (tmp_path / name).mkdir()
    with SharWriter(tmp_path / "shar", {"recording": "wav", "target_audio": "wav"}, shard_size=3) as writer:
        for cut in cuts(tmp_path / "wav"):
            writer.write(cut)
    return tmp_path / "shar"


def section(shar, **loader):
    return OmegaConf.create(
        {
            "dataset_args": {"segment_duration": 0.5},
            "dataloader_params": {
                "use_lhotse": True, "shar_path": str(shar), "batch_size": 2, "num_workers": 0, **loader,
            },
        }
    )  # fmt: skip


def test_segments_are_those_of_nemos_dataset(tmp_path):
    some = cuts(tmp_path, 3)
    random.seed(1)
    expected = AudioCodecLhotseDataset(RATE, 0.5)[some]
    random.seed(1)
    mine = CutDataset(RATE, 0.5)[some]
    assert torch.equal(mine["audio"], expected["audio"]) and torch.equal(mine["audio_lens"], expected["audio_lens"])


def test_cuts_without_target_audio_short_ones_and_other_rates_are_read_too(tmp_path):
    batch = CutDataset(RATE, 1.2)[cuts(tmp_path, 2, custom=False)]
    assert batch["audio_lens"].tolist() == [RATE, int(1.2 * RATE)] and not batch["audio"][0, RATE:].any()
    (length,) = CutDataset(RATE)[cuts(tmp_path, 1, rate=16000)]["audio_lens"].tolist()
    assert length == pytest.approx(RATE * RATE / 16000, abs=2)


def test_unreadable_cut_is_logged_once_and_skipped(tmp_path, caplog):
    some = cuts(tmp_path, 2)
    (tmp_path / "0.wav").write_bytes(b"RIFF")
    dataset = CutDataset(RATE)
    for _ in range(2):
        assert len(dataset[some]["audio"]) == 1
    assert caplog.text.count("cut 0 skipped") == 1
    soundfile.write(tmp_path / "1.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    assert dataset[some] is None


@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_without_a_readable_cut_is_replaced(tmp_path, bad, batch_size, ranks):
    some = cuts(tmp_path, custom=False)
    for index in bad:
        (tmp_path / f"{index}.wav").unlink()
    some.to_file(tmp_path / "cuts.jsonl")
    config = section(tmp_path, cuts_path=str(tmp_path / "cuts.jsonl"), batch_size=batch_size, shuffle=False)
    del config.dataloader_params.shar_path
    for validation in (False, True):
        counts = [len(list(cut_loader(config, RATE, rank, ranks, validation=validation))) for rank in range(ranks)]
        assert len(set(counts)) == 1 and counts[0] > 0
    if ranks == 1:
        lengths = [batch["audio_lens"].tolist() for batch in cut_loader(config, RATE, 0, 1, validation=True)]
        assert sum(map(len, lengths)) == 6 - len(bad)


@pytest.mark.parametrize("validation", [False, True])
def test_cuts_of_which_none_can_be_read_are_an_error(tmp_path, validation, monkeypatch):
    monkeypatch.setattr("nemo_lfr.nemo.cuts.MAX_UNREADABLE", 20)
    some = cuts(tmp_path, 2, custom=False)
    for index in range(2):
        (tmp_path / f"{index}.wav").unlink()
    some.to_file(tmp_path / "cuts.jsonl")
    config = section(tmp_path, cuts_path=str(tmp_path / "cuts.jsonl"))
    del config.dataloader_params.shar_path
    with pytest.raises(AudioError, match=r"no cut in \d+ consecutive batches can be read"):
        list(cut_loader(config, RATE, 0, 1, validation=validation))


@pytest.mark.parametrize("place", ["recording", "target_audio", "track"])
@pytest.mark.parametrize(("kind", "source"), [("command", "{}; cat"), ("url", "pipe:{}"), ("file", "{}; echo .sph")])
def test_no_source_of_a_cut_runs_anything_in_training(tmp_path, caplog, kind, source, place):
    good, second = cuts(tmp_path, 2, custom=False)
    bad = Recording.from_file(tmp_path / "1.wav")
    bad.sources[0].type, bad.sources[0].source = kind, source.format(f"x; touch {tmp_path}/PWNED")
    if place == "recording":
        second.recording = bad
    elif place == "target_audio":
        second.target_audio = bad
    else:
        second = second.append(bad.to_cut()).with_id("1")
    path = tmp_path / "cuts.jsonl.gz"
    CutSet.from_cuts([good, second]).to_file(path)
    assert len(CutDataset(RATE)[CutSet.from_file(path)]["audio"]) == 1
    assert caplog.text.count("cut 1 skipped") == 1 and not (tmp_path / "PWNED").exists()


def test_no_name_in_a_nemo_manifest_runs_anything(tmp_path):
    """NeMo's iterator opens each file for its header before a dataset sees it."""
    name = f"{tmp_path}/x; touch {tmp_path}/PWNED; echo .sph"
    (tmp_path / "m.json").write_text(json.dumps({"audio_filepath": name, "duration": 1.0}) + "\n")
    config = section(tmp_path, manifest_filepath=str(tmp_path / "m.json"))
    del config.dataloader_params.shar_path
    loader = cut_loader(config, RATE, 0, 1)
    with pytest.raises(Exception, match="sph"):
        next(iter(loader))
    assert not (tmp_path / "PWNED").exists()


def test_urls_are_read_when_the_section_says_so(shar):
    config = section(shar)
    config.dataset_args.allow_url = True
    assert cut_loader(config, RATE, 0, 1).dataset.dataset.allow_url
    assert not CutDataset(RATE).allow_url


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"dataset": {"sample_rate": 8000}}, "{}.dataset.sample_rate is 8000, but the codec runs at"),
        ("manifest.json", "{} is 'manifest.json'; pass a dict or an OmegaConf config"),
        ({"dataset": object()}, "{}: .*object"),
        ({"dataset": "???"}, r"{}\.dataset is '\?\?\?', which means that it is not set"),
    ],
)
def test_an_invalid_section_that_is_no_config_is_named(values, error):
    model = AudioCodecModel(OmegaConf.create(training_config([])))
    with pytest.raises(ConfigError, match=error.format("train_ds")):
        model.setup_training_data(values)
    with pytest.raises(ConfigError, match=error.format("validation_ds")):
        model.setup_validation_data(values)


def test_validation_is_one_pass_over_whole_cuts(shar):
    """Stock NeMo raises "Lhotse data loading is not supported yet for validation"."""
    model = AudioCodecModel(OmegaConf.create(training_config([])))
    config = section(shar)
    del config.dataset_args
    passes = []
    for _ in range(5):
        model.setup_validation_data(config)
        passes.append([length for batch in model._validation_dl for length in batch["audio_lens"].tolist()])
    assert sorted(passes[0]) == [round(RATE * (1 + index / 4)) for index in range(6)]
    assert passes == passes[:1] * 5


@pytest.mark.parametrize("convert", [lambda config: config, OmegaConf.to_container], ids=["config", "dict"])
def test_training_draws_segments_without_end(shar, convert):
    model = AudioCodecModel(OmegaConf.create(training_config([])))
    model.setup_training_data(convert(section(shar, shuffle=True, seed=0, shuffle_buffer_size=20)))
    batches = iter(model._train_dl)
    for _ in range(8):
        assert next(batches)["audio"].shape == (2, RATE // 2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dataset_args": {}}, "segment_duration must be set"),
        ({"dataset_args": {"segment_duration": 1, "color": "red"}}, "color"),
        ({"dataloader_params": {"batch_sise": 3}}, "batch_sise"),
        ({"dataloader_params": {"batch_size": None}}, "batch_size must be set"),
        ({"dataloader_params": {"truncate_duration": 1}}, "remove truncate_duration, because"),
        (
            {"dataloader_params": {"drop_last": None}},
            r"^train_ds\.dataloader_params\.drop_last: Incompatible value 'None'",
        ),
        ({"dataloader_params": {"num_buckets": "many"}}, r"^train_ds\.dataloader_params\.num_buckets: "),
    ],
)
def test_a_wrong_section_is_refused_by_key(shar, change, match):
    config = OmegaConf.to_container(section(shar))
    config["dataset_args"] = change.get("dataset_args", config["dataset_args"])
    config["dataloader_params"] |= change.get("dataloader_params", {})
    with pytest.raises(ConfigError, match=match):
        cut_loader(OmegaConf.create({"train_ds": config}).train_ds, RATE, 0, 1)
