"""Tests of training data: recordings that stock NeMo cannot read or reads wrongly, and sampling."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from omegaconf import OmegaConf

from nemo_lfr.errors import AudioError, ConfigError
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.training.data import CodecDataset, manifest_loader
from tests.models import RATE, synthesize


def corpus(
    folder: Path, files: dict[str, bytes | np.ndarray], rate: int = RATE, subtype: str = "PCM_16", **entry
) -> dict:
    """Write audio files and their manifest, and return a `dataset_meta`."""
    lines = []
    for name, contents in files.items():
        if isinstance(contents, bytes):
            (folder / name).write_bytes(contents)
            duration = 1.0
        else:
            soundfile.write(folder / name, contents, rate, subtype=subtype)
            duration = len(contents) / rate
        lines.append(json.dumps({"audio_filepath": name, "duration": duration} | entry))
    (folder / "manifest.json").write_text("\n".join(lines) + "\n")
    return {"mine": {"manifest_path": str(folder / "manifest.json"), "audio_dir": str(folder)}}


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_every_encoding_is_read_as_declared(tmp_path, subtype):
    """Stock NeMo reads floating-point files as silence."""
    wave = synthesize(1)
    (example,) = CodecDataset(corpus(tmp_path, {"a.wav": wave}, subtype=subtype), RATE)
    assert example["audio"].dtype == torch.float32 and example["audio_len"] == len(wave)
    assert np.abs(example["audio"].numpy() - wave).max() < (0.02 if subtype == "ULAW" else 1e-4)


def test_channels_are_mixed_and_other_rates_resampled(tmp_path):
    wave = synthesize(1)
    (example,) = CodecDataset(corpus(tmp_path, {"a.wav": np.stack([wave, 0 * wave], axis=1)}), RATE)
    assert np.abs(example["audio"].numpy() - wave / 2).max() < 1e-4
    (example,) = CodecDataset(corpus(tmp_path, {"a.wav": wave}, rate=16000), RATE)
    assert example["audio_len"] == pytest.approx(len(wave) * RATE / 16000, abs=2)


def test_segments_are_drawn_anywhere_and_are_exactly_as_long_as_asked(tmp_path):
    wave = np.linspace(-0.5, 0.5, 3 * RATE).astype(np.float32)  # each sample encodes its position
    dataset = CodecDataset(corpus(tmp_path, {"a.flac": wave}), RATE, n_samples=8192)
    torch.manual_seed(0)
    starts = []
    for _ in range(50):
        audio = dataset[0]["audio"].numpy()
        assert len(audio) == 8192
        start = round(float(audio[0] + 0.5) * (len(wave) - 1))
        assert np.abs(audio - wave[start : start + 8192]).max() < 1e-4
        starts.append(start)
    assert min(starts) < 0.1 * len(wave) and max(starts) > 0.8 * (len(wave) - 8192)


def test_offsets_truncation_and_clips_shorter_than_a_segment(tmp_path):
    wave = np.linspace(-0.5, 0.5, 2 * RATE).astype(np.float32)
    meta = corpus(tmp_path, {"a.wav": wave}, offset=1.0)
    (example,) = CodecDataset(meta, RATE, trunc_duration=0.25)
    assert np.abs(example["audio"].numpy() - wave[RATE : RATE + 5513]).max() < 1e-4
    (example,) = CodecDataset(corpus(tmp_path, {"a.wav": wave[:500]}), RATE, n_samples=8192)
    assert example["audio_len"] == 500


BROKEN = {
    "corrupt": b"RIFF" + bytes(100),
    "of no bytes": b"",
    "of text": b"hello",
    "without samples": np.zeros(0, np.float32),
    "of NaN": np.full(RATE, np.nan, np.float32),
    "that needs an extra": b"\0\0\0\x20ftypM4A " + bytes(500),
}


@pytest.mark.parametrize("kind", [*BROKEN, "missing", "truncated"])
def test_unreadable_file_is_logged_once_and_replaced(tmp_path, caplog, kind, monkeypatch):
    """With such files, stock NeMo stops, or silently trains on half of a file."""
    monkeypatch.setitem(sys.modules, "av", None)
    good = synthesize(1)
    meta = corpus(tmp_path, {"bad.wav": BROKEN.get(kind, good), "good.wav": good}, subtype="FLOAT", duration=1.0)
    if kind == "missing":
        (tmp_path / "bad.wav").unlink()
    if kind == "truncated":
        (tmp_path / "bad.wav").write_bytes((tmp_path / "bad.wav").read_bytes()[:-9000])
    dataset = CodecDataset(meta, RATE)
    for _ in range(3):
        assert dataset[0]["audio_filepath"] == Path("good.wav")
    assert caplog.text.count("bad.wav") == 1


def test_a_corpus_of_broken_files_is_an_error_not_an_endless_search(tmp_path):
    dataset = CodecDataset(corpus(tmp_path, {"a.wav": b"x", "b.wav": b"y"}), RATE)
    with pytest.raises(AudioError, match="no recording in the manifests can be read"):
        dataset[0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"duration": 1}', "line 1.*audio_filepath"),
        ('{"audio_filepath": "a.wav", "duration": "long"}', "line 1"),
        ("[1, 2]", "line 1"),
        ('{"audio_filepath": "a.wav"}\n[1, 2]', "line 1.*no such file.*1 more line cannot be used"),
        ("", "contain no recording"),
        ('{"audio_filepath": "a.wav", "duration": 0.1}', "contain no recording"),
    ],
)
def test_a_bad_manifest_is_refused_with_the_line(tmp_path, text, match):
    (tmp_path / "m.json").write_text(text)
    meta = {"mine": {"manifest_path": str(tmp_path / "m.json"), "audio_dir": str(tmp_path)}}
    with pytest.raises(ConfigError, match=match):
        CodecDataset(meta, RATE, min_duration=0.4)
    with pytest.raises(ConfigError, match=r"none\.json"):
        read_manifest(tmp_path / "none.json", tmp_path, "mine")


def test_a_missing_duration_is_read_from_the_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", synthesize(1.5), RATE)
    (tmp_path / "m.json").write_text('{"audio_filepath": "a.wav"}\n\n{"audio_filepath": "gone.wav"}\n')
    (recording,) = read_manifest(tmp_path / "m.json", tmp_path, "mine")
    assert recording.duration == pytest.approx(1.5, abs=1e-3)


def test_batches_have_nemos_keys_and_end_in_zeros(tmp_path):
    dataset = CodecDataset(corpus(tmp_path, {"a.wav": synthesize(0.5), "b.wav": synthesize(1)}), RATE)
    batch = dataset.collate_fn([dataset[0], dataset[1]])
    assert batch["audio"].shape == (2, RATE) and batch["audio_lens"].tolist() == [RATE // 2, RATE]
    assert not batch["audio"][0, RATE // 2 :].any()
    assert batch["dataset_names"] == ["mine", "mine"]


def test_an_epoch_is_one_shuffled_pass_or_so_many_steps_by_weight(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    files = {f"{i}.wav": synthesize(0.5) for i in range(4)}
    (tmp_path / "other").mkdir()
    meta = corpus(tmp_path, files) | {"rare": corpus(tmp_path / "other", files)["mine"] | {"sample_weight": 0.0}}
    dataset = CodecDataset(meta, RATE, n_samples=1024)
    sampler = dataset.get_sampler(2, 1)
    order = [index for index, _ in sampler]
    assert sorted(order) == list(range(8)) and order != sorted(order)
    dataset = CodecDataset(meta, RATE, n_samples=1024, weighted_sampling_steps_per_epoch=50)
    drawn = [index for index, _ in dataset.get_sampler(2, 1)]
    assert len(drawn) == 100 and set(drawn) == set(range(4))
    assert CodecDataset(meta, RATE).get_sampler(2, 1) is None
    assert "rare: using 4 of 4 recordings" in caplog.text


def test_samples_of_an_epoch_depend_on_its_number_and_are_split_among_ranks(tmp_path):
    dataset = CodecDataset(corpus(tmp_path, {f"{i}.wav": synthesize(0.5) for i in range(7)}), RATE, n_samples=1024)
    whole, again = dataset.get_sampler(2, 1), dataset.get_sampler(2, 1)
    first = list(whole)
    torch.rand(5)
    assert list(again) == first
    whole.set_epoch(1)
    assert list(whole) != first
    shares = [list(dataset.get_sampler(2, 2, rank)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [len(dataset.get_sampler(2, 2, 0))] * 2 == [3, 3]
    assert {*shares[0], *shares[1]} < set(first) and not {*shares[0]} & {*shares[1]}
    assert torch.equal(dataset[first[0]]["audio"], dataset[first[0]]["audio"])


def test_ranks_that_begin_after_the_sampler_was_made_draw_their_own_shares(tmp_path, monkeypatch):
    dataset = CodecDataset(corpus(tmp_path, {f"{i}.wav": synthesize(0.5) for i in range(6)}), RATE, n_samples=1024)
    sampler, second = dataset.get_sampler(2, 2, 0), list(dataset.get_sampler(2, 2, 1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert list(sampler) == second


def loader(folder: Path, dataset: dict | None = None, world_size: int = 1, **params):
    """Build the loader of a `train_ds` section for three recordings."""
    meta = corpus(folder, {f"{i}.wav": synthesize(0.5) for i in range(3)})
    target = {"_target_": "nemo_lfr.training.data.CodecDataset", "dataset_meta": meta, "sample_rate": RATE}
    config = {"dataset": target | (dataset or {}), "dataloader_params": {"batch_size": 2} | params}
    return manifest_loader(OmegaConf.create({"train_ds": config}).train_ds, world_size, 0)


@pytest.mark.parametrize(
    ("more", "is_ours"),
    [
        ({"feature_processors": {}}, True),
        ({"feature_processors": None, "resample_rate": None}, True),
        ({"feature_processors": {"pitch": {}}}, False),
        ({"resample_rate": 16000}, False),
    ],
)
def test_datasets_that_need_nemos_own_loader(more, is_ours, tmp_path):
    assert (loader(tmp_path, more) is not None) == is_ours


BAD = [
    ({"n_samples": 0}, r"n_samples is 0; pass a whole number from 1 to"),
    ({"n_samples": -1024}, "n_samples is -1024"),
    ({"n_samples": 1.5}, r"n_samples is 1\.5"),
    ({"n_samples": "long"}, "n_samples is 'long'"),
    ({"n_samples": True}, "n_samples is True"),
    ({"weighted_sampling_steps_per_epoch": 0}, "weighted_sampling_steps_per_epoch is 0"),
    ({"weighted_sampling_steps_per_epoch": 10**12}, "steps_per_epoch is 1000000000000; .* to 1000000000"),
    ({"min_duration": float("nan")}, "min_duration is nan; pass a number from 0"),
    ({"min_duration": -1}, "min_duration is -1"),
    ({"max_duration": 0}, "max_duration is 0; pass a number greater than 0"),
    ({"trunc_duration": "ten"}, "trunc_duration is 'ten'"),
    ({"min_duration": 3, "max_duration": 2.0}, r"min_duration is 3, but max_duration is 2\.0"),
    ({"sample_rate": -5}, "sample_rate is -5"),
    ({"sample_rate": "high"}, "sample_rate is 'high'"),
    ({"dataset_meta": {}}, "dataset_meta is {}"),
    ({"dataset_meta": {"a": "m.json"}}, r"dataset_meta\.a is 'm\.json'"),
    ({"dataset_meta": {"a": {"audio_dir": "."}}}, "manifest_path is a path"),
    ({"dataset_meta": {"a": {"manifest_path": "m.json", "weight": 2}}}, r"unknown keys: \['weight'\]"),
    ({"dataset_meta": {"a": {"manifest_path": "m.json", "sample_weight": -1}}}, "sample_weight is -1"),
    ({"steps": 5}, "steps.*correct the arguments"),
]


@pytest.mark.parametrize(("dataset", "match"), BAD)
def test_an_invalid_argument_of_the_dataset_is_named(tmp_path, dataset, match):
    with pytest.raises((ConfigError, AudioError), match=rf"train_ds\.dataset.*{match}"):
        loader(tmp_path, dataset)


def test_the_dataset_itself_checks_its_numbers(tmp_path):
    meta = corpus(tmp_path, {"a.wav": synthesize(0.5)})
    with pytest.raises(ConfigError, match=r"^n_samples is 0; pass a whole number from 1 to"):
        CodecDataset(meta, RATE, n_samples=0)
    with pytest.raises(ConfigError, match=r"sample_weight is 0 for every dataset .* \(a\); set it"):
        CodecDataset({"a": meta["mine"] | {"sample_weight": 0}}, RATE, weighted_sampling_steps_per_epoch=1)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"batch_size": 0}, r"\.batch_size is 0; pass a whole number from 1 to 1000000"),
        ({"batch_size": -1}, r"\.batch_size is -1"),
        ({"batch_size": 1.5}, r"\.batch_size is 1\.5"),
        ({"batch_size": "many"}, r"\.batch_size is 'many'"),
        ({"batch_size": 10**9}, r"\.batch_size is 1000000000"),
        ({"batch_size": None}, ": batch_size must be set"),
        ({"num_workers": -1}, r"\.num_workers is -1; pass a whole number from 0 to"),
        ({"timeout": -1}, r"\.timeout is -1"),
        ({"prefetch_factor": 2}, "prefetch_factor"),
        ({"workers": 2}, "workers"),
        ({"batch_size": 4, "drop_last": True}, "3 recordings cannot fill a batch of 4; set batch_size to 3 or less"),
        ({"drop_last": True, "world_size": 2}, "3 recordings, divided among 2 processes, .* set batch_size to 1 or"),
        ({"world_size": 4}, "3 recordings, divided among 4 processes, .*use fewer processes, or add recordings"),
    ],
)
def test_an_invalid_argument_of_the_loader_is_named(tmp_path, params, match):
    with pytest.raises(
        ConfigError, match=rf"^train_ds\.dataloader_params{match}|^train_ds.dataloader_params: .*{match}"
    ):
        loader(tmp_path, {"n_samples": 1024}, **params)


def test_loader_with_shuffle_shuffles(tmp_path):
    meta = corpus(tmp_path, {f"{i}.wav": synthesize(0.5) for i in range(8)})
    dataset = {"_target_": "nemo_lfr.training.data.CodecDataset", "dataset_meta": meta, "sample_rate": RATE}
    for n_samples in (None, 1024):
        section = {
            "dataset": dataset | {"n_samples": n_samples},
            "dataloader_params": {"batch_size": 4, "shuffle": True},
        }
        orders = set()
        for _ in range(5):
            loader = manifest_loader(OmegaConf.create(section), 1, 0)
            assert loader is not None
            if n_samples:
                loader.sampler.set_epoch(len(orders))
            orders.add(tuple(name for batch in loader for name in batch["audio_filepaths"]))
        assert len(orders) > 1 and all(len(set(order)) == 8 for order in orders)
