"""Tests that NeMo's iterators skip only the clip of an invalid line in a manifest, cuts file or Shar."""

import gzip
import io
import itertools
import json
import tarfile
from pathlib import Path

import pytest
import soundfile

pytest.importorskip("nemo", reason="Lhotse comes with NeMo: pip install '.[nemo]'")

from lhotse import CutSet
from lhotse.shar import SharWriter
from omegaconf import OmegaConf

from nemo_lfr.errors import ConfigError
from nemo_lfr.nemo import careful
from nemo_lfr.nemo.cuts import cut_loader
from tests.models import RATE, synthesize
from tests.nemo.test_cuts import cuts

COUNT = 5
BAD = 2  # index of the clip that is skipped


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch):
    monkeypatch.setattr(careful, "_reported", set())


def lengths(validation: bool = True, **loader) -> list[int]:
    """Return the lengths in samples of the clips of one pass, or of a few training batches."""
    parameters = {"use_lhotse": True, "batch_size": 1, "num_workers": 0, **loader}
    config = OmegaConf.create({"dataset_args": {"segment_duration": 0.2}, "dataloader_params": parameters})
    if validation:
        del config.dataset_args
    batches = cut_loader(config, RATE, 0, 1, validation=validation)
    return sorted(
        length for batch in itertools.islice(iter(batches), 3 * COUNT) for length in batch["audio_lens"].tolist()
    )


def expected(*lost: int) -> list[int]:
    return [round(RATE * (1 + index / 4)) for index in range(COUNT) if index not in lost]


def manifest(folder: Path) -> list[str]:
    lines = []
    for number in range(COUNT):
        soundfile.write(folder / f"{number}.wav", synthesize(1 + number / 4, number), RATE)
        lines.append(json.dumps({"audio_filepath": f"{folder}/{number}.wav", "duration": 1 + number / 4}))
    return lines


# Replacements of a valid line.
LINES = {
    "no JSON": b"not JSON",
    "truncated": b'{"audio_filepath": "a.wav", "dura',
    "a number": b"17",
    "a list": b"[1, 2]",
    "null": b"null",
    "no keys": b"{}",
    "a key alone": b'{"audio_filepath": "x.wav"}',
    "Latin-1": '{"audio_filepath": "ü.wav", "duration": 1}'.encode("latin-1"),
    "NUL": b'{"audio_filepath": "a\\u0000b.wav", "duration": 1}',
    "endless": b'{"audio_filepath": "x.wav", "duration": Infinity}',
    "NaN": b'{"audio_filepath": "x.wav", "duration": NaN}',
    "negative": b'{"audio_filepath": "x.wav", "duration": -1}',
    "a text for a number": b'{"audio_filepath": "x.wav", "duration": "long"}',
    "a file that is not there": b'{"audio_filepath": "gone.wav", "duration": 1.0}',
    "300 characters": json.dumps({"audio_filepath": 300 * "x" + ".wav", "duration": 1.0}).encode(),
    "deep": b"[" * 100_000,
    "a number of 5,000 digits": b'{"audio_filepath": "x.wav", "duration": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize(("name", "place"), [*((name, BAD) for name in LINES), ("no JSON", 0), ("no keys", COUNT - 1)])
def test_invalid_line_of_a_nemo_manifest_skips_only_its_clip(name, place, tmp_path, caplog):
    lines = [line.encode() for line in manifest(tmp_path)]
    lines[place] = LINES[name]
    path = tmp_path / "m.json"
    path.write_bytes(b"\n".join(lines) + b"\n")
    for _ in range(2):
        assert lengths(manifest_filepath=str(path)) == expected(place)
    reports = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(reports) == 1 and str(path) in reports[0] and "\n" not in reports[0], reports


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "place"),
    [("no JSON", 0), ("no JSON", BAD), ("no keys", COUNT - 1), ("a number", 0), ("Latin-1", BAD), ("deep", BAD)],
)
def test_invalid_line_of_a_cuts_file_skips_only_its_clip(name, place, packed, tmp_path, caplog):
    path = tmp_path / "cuts.jsonl"
    cuts(tmp_path, COUNT).to_file(path)
    lines = path.read_bytes().splitlines()
    lines[place] = LINES[name]
    path.write_bytes(b"\n".join(lines) + b"\n")
    if packed:
        path = tmp_path / "cuts.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "cuts.jsonl").read_bytes()))
    assert lengths(cuts_path=str(path)) == expected(place)
    assert sum("skipped" in record.message for record in caplog.records) == 1


def shar(folder: Path) -> Path:
    (folder / "shar").mkdir()
    with SharWriter(folder / "shar", {"recording": "wav"}, shard_size=3) as writer:
        for cut in cuts(folder, COUNT, custom=False):
            writer.write(cut)
    return folder / "shar"


def break_line(folder: Path) -> list[int]:
    path = folder / "cuts.000000.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    lines[1] = b"not JSON"
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return [1]


def break_json_in_tar(folder: Path) -> list[int]:
    path = folder / "recording.000000.tar"
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w") as archive:
        for member, data in members:
            if member.name == "1.json":
                data = b"?" * len(data)
            archive.addfile(member, io.BytesIO(data))
    return [1]


def cut_tar(folder: Path) -> list[int]:
    """Truncate the tar within the audio of its second clip."""
    path = folder / "recording.000000.tar"
    with tarfile.open(path) as archive:
        second = next(member for member in archive if member.name.startswith("1."))
    path.write_bytes(path.read_bytes()[: second.offset_data + 1000])
    return [1, 2]


@pytest.mark.parametrize("damage", [break_line, break_json_in_tar, cut_tar])
def test_damage_in_a_shar_skips_only_the_damaged_clips(damage, tmp_path, caplog):
    folder = shar(tmp_path)
    lost = damage(folder)
    assert lengths(shar_path=str(folder)) == expected(*lost)
    assert sum("skipped" in record.message for record in caplog.records) == len(lost)


@pytest.mark.parametrize("form", ["list", "input_cfg", "group"])
def test_invalid_lines_are_skipped_in_every_form_of_a_section(form, tmp_path, caplog):
    lines = manifest(tmp_path)
    path = str(tmp_path / "m.json")
    Path(path).write_text("\n".join([*lines[:BAD], "not JSON", *lines[BAD:]]) + "\n")
    entry = {"type": "nemo", "manifest_filepath": path}
    sections = {
        "list": {"manifest_filepath": [[path]]},
        "input_cfg": {"input_cfg": [entry]},
        "group": {"input_cfg": [{"type": "group", "input_cfg": [entry]}]},
    }
    assert set(lengths(**sections[form])) == set(expected())
    assert sum("skipped" in record.message for record in caplog.records) == 1


def test_training_continues_after_invalid_lines(tmp_path, caplog):
    lines = manifest(tmp_path)
    (tmp_path / "m.json").write_text("\n".join([*lines, "not JSON"]) + "\n")
    assert len(lengths(False, manifest_filepath=str(tmp_path / "m.json"), force_finite=True)) == COUNT


def test_file_of_only_invalid_lines_raises(tmp_path):
    (tmp_path / "m.json").write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"none of the 2 entries can be used; the first error is: .*m\.json, line 1"):
        lengths(manifest_filepath=str(tmp_path / "m.json"))


@pytest.mark.parametrize("shards", [1, 2])
def test_invalid_line_for_a_tar_file_is_named(shards, tmp_path):
    lines = manifest(tmp_path)
    for shard in range(shards):
        with tarfile.open(tmp_path / f"audio_{shard}.tar", "w") as archive:
            for number in range(COUNT):
                archive.add(tmp_path / f"{number}.wav", f"{number}.wav")
        own = [json.dumps(json.loads(line) | {"shard_id": shard}) for line in lines]
        own = [line.replace(f"{tmp_path}/", "") for line in own]
        (tmp_path / f"manifest_{shard}.json").write_text("\n".join([*own[:BAD], "not JSON", *own[BAD + 1 :]]) + "\n")
    names = f"_OP_0..{shards - 1}_CL_" if shards > 1 else "0"
    options = {
        "manifest_filepath": f"{tmp_path}/manifest_{names}.json",
        "tarred_audio_filepaths": f"{tmp_path}/audio_{names}.tar",
    }
    cause = "because NeMo needs an entry for each file in the tar file; " if shards > 1 else ""
    with pytest.raises(ConfigError, match=f"not JSON.*{cause}fix"):
        lengths(**options)
    if shards > 1:
        found = lengths(**options, skip_missing_manifest_entries=True)
        assert set(found) == set(expected(BAD))


def test_invalid_line_of_a_parallel_manifest_is_named(tmp_path):
    """If the line were skipped, all later clips would be paired with lines of other clips."""
    lines = manifest(tmp_path)
    (tmp_path / "m.json").write_text("\n".join([*lines[:BAD], "not JSON", *lines[BAD:]]) + "\n")
    (tmp_path / "q.txt").write_text("\n".join("abcdef") + "\n")
    field = {"type": "text_iter", "name": "question", "path": str(tmp_path / "q.txt")}
    entry = {"type": "nemo", "manifest_filepath": str(tmp_path / "m.json"), "extra_fields": [field]}
    with pytest.raises(ConfigError, match=rf"m\.json, line {BAD + 1}: not JSON.* fix the line"):
        lengths(input_cfg=[entry])


def test_nemos_loader_is_left_as_it_was(tmp_path):
    from nemo.collections.common.data.lhotse import dataloader

    before = dataloader.read_cutset_from_config
    CutSet.from_cuts([]).to_file(tmp_path / "cuts.jsonl")
    with pytest.raises(ConfigError), careful.careful_iterators():
        raise ConfigError("x")
    assert dataloader.read_cutset_from_config is before
