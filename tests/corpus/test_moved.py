"""Tests that `tokenize` resumes the run of a corpus that was moved, but not that of a corpus with an equal list."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.cli.main import main
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.inventory import digest, list_digest, sampled_digest
from nemo_lfr.corpus.records import METADATA, PLAN, STATE
from nemo_lfr.corpus.run import tokenize
from nemo_lfr.corpus.sources.folder import PROBLEM
from nemo_lfr.corpus.sources.manifest import Manifest
from nemo_lfr.errors import NemoLfrError
from tests.corpus.inputs import (
    RATE,
    SAMPLES,
    cut,
    lines,
    pa,
    pq,
    write_audio,
    write_manifest,
    write_parquet,
    write_recordings,
    write_shar,
)
from tests.tiers import slow_after, slow_except


def write_csv(folder: Path) -> Path:
    path = folder / "t.csv"
    path.write_text("path,text\na.wav,x\nb.wav,y\n,\nc.wav,z\n")
    return path


def write_folder(folder: Path) -> Path:
    (folder / "metadata.csv").write_text("file_name,text\na.wav,x\na.wav,x\nb.wav,y\n")
    return folder


def write_saved(folder: Path) -> Path:
    columns = {"audio": ["a.wav", "b.wav", "c.wav"], "text": list("xyz")}
    pytest.importorskip("datasets", reason="pip install '.[corpus]'").Dataset.from_dict(columns).save_to_disk(
        folder / "saved"
    )
    for name in "abc":
        (folder / f"{name}.wav").rename(folder / "saved" / f"{name}.wav")
    return folder / "saved"


def write_mixed(folder: Path, write_table) -> Path:
    """Write a list whose first entries have absolute paths of a third corpus."""
    paths = [*["/gone/z.wav"] * 120, "a.wav", "b.wav", "c.wav"]
    if write_table is None:
        return lines(folder / "m.json", [{"audio_filepath": path} for path in paths])
    write_table(pa.table({"audio": paths}), folder / "t.parquet")
    return folder / "t.parquet"


def with_relative_paths(write):
    """Return a function that writes Lhotse files whose paths start from the working directory."""

    def relative(folder: Path) -> Path:
        os.chdir(folder)
        return write(Path())

    return relative


def relative_cuts(folder: Path, *before: object) -> Path:
    return lines(folder / "c.jsonl", [*before, *(cut(Path(f"{name}.wav")) for name in "abc")])


# Functions that write a corpus with relative paths into a folder of audio files.
PARALLEL = {
    "manifest": lambda folder: write_manifest(folder, "xyz"),
    "folder": write_folder,
    "CSV": write_csv,
    "Parquet": lambda folder: write_parquet(folder, "xyz"),
    "Parquet after an absolute path": lambda folder: write_mixed(folder, pq.write_table),
    "manifest after absolute paths": lambda folder: write_mixed(folder, None),
    "saved dataset": write_saved,
    "cuts": with_relative_paths(relative_cuts),
    "cuts after an invalid line": with_relative_paths(lambda folder: relative_cuts(folder, {"type": "MonoCut"}, 1)),
    "cuts after an absolute path": with_relative_paths(lambda folder: relative_cuts(folder, cut(Path("/gone/z.wav")))),
    "recordings": with_relative_paths(lambda folder: write_recordings(folder, "xyz")),
    "Shar": with_relative_paths(lambda folder: write_shar(folder, "xyz")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(PARALLEL, "manifest"))
def test_an_equal_list_in_another_folder_is_not_resumed(kind, model, tmp_path, monkeypatch, caplog):
    """Parallel corpora, such as clean and noisy speech, have equal lists of files."""
    monkeypatch.chdir(tmp_path)
    jobs = {}
    for name, frequency in (("clean", 0.02), ("noisy", 0.03)):
        write_audio(tmp_path / name, frequency)
        source = PARALLEL[kind](tmp_path / name)
        size = 200 if "after" in kind else 2
        jobs[name] = TokenizeConfig(
            str(source), str(tmp_path / "out"), "lfr", model=str(model), shard_size=size, dataset="x"
        )

    def run(name):
        if PARALLEL[kind].__name__ == "relative":
            os.chdir(tmp_path / name)
        return tokenize(jobs[name], workers=1, device="cpu")

    assert run("clean")["clips"] == 3
    remedy = "run the command in .*clean" if PARALLEL[kind].__name__ == "relative" else "pass --audio-dir .*clean"
    remedy = "pass .*clean as the corpus" if kind == "folder" else remedy
    reason = "the folder that relative paths start from was .*clean"
    if kind != "saved dataset":  # whose files contain more than the list
        reason += f".*{remedy} if it is the same audio"
    with pytest.raises(NemoLfrError, match=reason):
        run("noisy")
    assert run("clean")["clips"] == 3
    (tmp_path / "clean").rename(tmp_path / "kept")
    with pytest.raises(
        NemoLfrError, match=r"That audio was in .*clean.*, which no longer exists, and .*\.wav differs"
    ):
        run("noisy")
    (tmp_path / "noisy").rename(tmp_path / "removed")
    (tmp_path / "kept").rename(tmp_path / "noisy")  # the same corpus in another place
    for record in (tmp_path / "out" / STATE / "done").iterdir():
        record.unlink()
    assert run("noisy")["clips"] == 3
    assert "was moved" not in caplog.text
    plan = tmp_path / "out" / STATE / PLAN
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"audio": None}))  # as of an older version
    assert run("noisy")["clips"] == 3
    assert "was moved" in caplog.text


@pytest.mark.parametrize("kind", PARALLEL)
def test_a_base_folder_that_is_not_used_is_reported(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_audio(tmp_path / "audio", 0.02)
    source = PARALLEL[kind](tmp_path / "audio")
    job = TokenizeConfig(str(source), str(tmp_path / "out"), "lfr", audio_dir=str(tmp_path / "audio"))
    job.state.mkdir(parents=True)
    for relist in (True, False):  # False in workers
        job.open(relist)
    is_reported = kind == "folder" or PARALLEL[kind].__name__ == "relative"
    assert caplog.text.count("--audio-dir is not used for this kind of corpus") == is_reported


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", slow_after(2, [kind for kind in PARALLEL if kind not in ("folder", "saved dataset", "Shar")])
)
def test_a_link_to_a_list_is_read_like_a_copy(kind, model, tmp_path, monkeypatch):
    """In the cache of the Hugging Face Hub, each file is a link to a file without suffix in another folder."""
    write_audio(tmp_path / "snapshot", 0.02)
    monkeypatch.chdir(tmp_path / "snapshot")
    source, blob = PARALLEL[kind](tmp_path / "snapshot"), tmp_path / "blobs" / "0a1b"
    path = tmp_path / "snapshot" / source
    blob.parent.mkdir()
    path.rename(blob)
    path.symlink_to(Path("..", "blobs", blob.name))
    job = TokenizeConfig(str(source), str(tmp_path / "out"), "lfr", model=str(model), shard_size=200, dataset="x")
    counts = tokenize(job, workers=1, device="cpu")
    assert counts["clips"] == 3 and counts["source"] == str(path)
    path.unlink()
    blob.rename(path)
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3  # resumed
    lines(blob, [{"audio_filepath": "a.wav"}])
    path.unlink()
    path.symlink_to(blob)
    with pytest.raises(NemoLfrError):
        tokenize(job, workers=1, device="cpu")


@pytest.mark.slow
def test_a_copy_of_a_manifest_without_relative_paths_is_resumed(model, tmp_path):
    write_audio(tmp_path / "audio", 0.02)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        entries = [{"audio_filepath": str(tmp_path / "audio" / f"{letter}.wav")} for letter in "abc"]
        source = lines(tmp_path / name / "m.json", entries)
        job = TokenizeConfig(str(source), str(tmp_path / "out"), "lfr", model=str(model), dataset="x")
        assert tokenize(job, workers=1, device="cpu")["clips"] == 3


@pytest.mark.slow
def test_a_copy_of_a_table_is_resumed_with_the_earlier_folder(model, tmp_path):
    write_audio(tmp_path / "audio", 0.02)
    cells = [{"bytes": (tmp_path / "audio" / f"{name}.wav").read_bytes(), "path": f"{name}.wav"} for name in "abc"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"audio": cells}), tmp_path / name / "t.parquet")
    job = TokenizeConfig(
        str(tmp_path / "one" / "t.parquet"), str(tmp_path / "out"), "lfr", model=str(model), dataset="x"
    )
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3
    copy = replace(job, source=str(tmp_path / "two" / "t.parquet"))
    with pytest.raises(NemoLfrError, match="the folder that relative paths start from was"):
        tokenize(copy, workers=1, device="cpu")
    assert tokenize(replace(copy, audio_dir=str(tmp_path / "one")), workers=1, device="cpu")["clips"] == 3


def write_absolute(folder: Path) -> Path:
    return lines(folder / "m.json", [{"audio_filepath": str(folder / f"{name}.wav")} for name in "abc"])


def older_list(source: Path, job: TokenizeConfig) -> dict[str, object]:
    """Return what older versions stored for a folder or table, whose list contained absolute paths."""
    folder = source if source.is_dir() else source.parent
    listing = lines(
        folder.parent / "list.json",
        [
            entry | {PROBLEM: [str(folder / entry["audio_filepath"]), entry[PROBLEM]]} if PROBLEM in entry else entry
            for entry in map(json.loads, job.listing.read_text().splitlines())
        ],
    )
    shards = Manifest(listing).shards(job.shard_size)
    return {
        "corpus": hashlib.sha256(f"{folder} {digest(listing)}".encode()).hexdigest()[:16],
        "audio_dir": None,
        "parts": shards,
        "parts_digest": hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16],
    }


def named_list(hash_file, *paths: Path) -> dict[str, object]:
    return {"corpus": list_digest((path.name, hash_file(path)) for path in paths)}


def older_shar(source: Path, job: TokenizeConfig) -> dict[str, object]:
    files = sorted(source.iterdir())
    return {"corpus": list_digest((str(path), sampled_digest(path)) for path in files), "audio_dir": None}


# Functions that write a corpus, and that return values of an older version's plan.
OLDER_PLANS = {
    "manifest": (PARALLEL["manifest"], lambda source, job: {"audio_dir": None}),
    "manifest of absolute paths": (
        lambda folder: write_absolute(folder).rename(folder.parent / "m.json"),
        lambda source, job: {"audio_dir": str(source.parent / "elsewhere")},
    ),
    "folder": (write_folder, older_list),
    "CSV": (write_csv, older_list),
    "Parquet": (PARALLEL["Parquet"], lambda source, job: named_list(sampled_digest, source)),
    "recordings": (
        lambda folder: write_recordings(folder, "xyz"),
        lambda source, job: named_list(digest, source, source.with_name("x_supervisions.jsonl")),
    ),
    "Shar": (lambda folder: write_shar(folder, "xyz"), older_shar),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(OLDER_PLANS, "folder"))
def test_a_plan_of_an_older_version_is_resumed(kind, model, tmp_path):
    write, older = OLDER_PLANS[kind]
    write_audio(tmp_path / "audio", 0.02)
    source = write(tmp_path / "audio")
    job = TokenizeConfig(str(source), str(tmp_path / "out"), "lfr", model=str(model), shard_size=2)
    counts = tokenize(job, workers=1, device="cpu")
    path = job.state / PLAN
    plan = json.loads(path.read_text())
    del plan["source"]
    path.write_text(json.dumps(plan | older(source, job)))
    for record in (job.state / "done").iterdir():
        record.unlink()
    assert tokenize(job, workers=1, device="cpu") == counts and counts["clips"] == 3


def write_cuts(folder: Path) -> Path:
    return lines(folder / "c.jsonl", [cut(folder / f"{name}.wav") for name in "abc"])


def rename(source: Path) -> dict[str, str]:
    return {"source": str(source.rename(source.with_name(f"other{source.suffix}")))}


def write_segments(folder: Path) -> Path:
    sections = [{"audio_filepath": "a.wav", "offset": offset, "duration": 0.1} for offset in (0, 0.1)]
    return lines(folder / "m.json", [*sections, {"audio_filepath": "b.wav"}])


def move_repaired(source: Path) -> dict[str, str]:
    """Move the folder of a corpus, and write one of its files again."""
    folder = source.parent.rename(source.parent.with_name("moved"))
    soundfile.write(folder / "b.wav", np.zeros(SAMPLES), RATE)
    return {"source": str(folder / source.name), "audio_dir": str(folder)}


# Function that writes a corpus, function that changes it between two runs and returns options of the second run, and
# part of the error message; None if the run is resumed.
CHANGES = {
    "the folder of the first run has no effect": (write_cuts, lambda source: {"audio_dir": None}, None),
    "the folder of the second run has no effect": (write_cuts, lambda source: {"audio_dir": "/elsewhere"}, None),
    "a manifest is moved out of the folder of its files": (
        write_absolute,
        lambda source: {"source": str(source.rename(source.parent.parent / "m.json")), "audio_dir": None},
        "relative paths start from was .*audio, but is now .*; .* or pass --audio-dir .*audio if it is",
    ),
    "a moved manifest with a repaired file": (PARALLEL["manifest"], move_repaired, None),
    "moved segments of a repaired file": (write_segments, move_repaired, None),
    "a renamed manifest": (PARALLEL["manifest"], rename, None),
    "a renamed table": (PARALLEL["Parquet"], rename, None),
    "renamed cuts": (write_cuts, rename, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", slow_after(3, CHANGES))
def test_a_corpus_is_found_again_after_a_change(change, model, tmp_path, monkeypatch, caplog):
    write, make, message = CHANGES[change]
    monkeypatch.setattr("nemo_lfr.corpus.audio_sample.FILES", 2)
    write_audio(tmp_path / "audio", 0.02)
    source = write(tmp_path / "audio")
    audio_dir = str(tmp_path / "audio")
    job = TokenizeConfig(str(source), str(tmp_path / "out"), "lfr", model=str(model), audio_dir=audio_dir, dataset="x")
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3
    changed = replace(job, **make(source))
    if message is None:
        assert tokenize(changed, workers=1, device="cpu")["clips"] == 3
        assert caplog.text.count("1 of 2 compared files differ") == ("repaired" in change)
        return
    with pytest.raises(NemoLfrError, match=message):
        tokenize(changed, workers=1, device="cpu")
    assert tokenize(replace(changed, audio_dir=audio_dir), workers=1, device="cpu")["clips"] == 3  # as advised


@pytest.mark.slow
def test_a_renamed_folder_keeps_the_name_of_the_corpus(model, tmp_path):
    write_audio(tmp_path / "earlier", 0.02)
    options = ["--out", tmp_path / "out", "--model", model, "--device", "cpu", "--workers", 1]
    main(list(map(str, ["tokenize", tmp_path / "earlier", *options])))
    (tmp_path / "earlier").rename(tmp_path / "later")
    main(list(map(str, ["tokenize", tmp_path / "later", *options])))
    assert "--dataset earlier" in json.loads((tmp_path / "out" / METADATA).read_text())["command"]
