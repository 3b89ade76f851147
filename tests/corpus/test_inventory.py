"""Tests of inputs that are edited between or during runs of `tokenize`, and of inputs that contain other tokens."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.cli.main import main
from nemo_lfr.corpus import run as corpus_run
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.inventory import WHOLE_BYTES, sampled_digest
from nemo_lfr.corpus.records import PLAN, STATE
from nemo_lfr.corpus.run import tokenize
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.cut_files import read_cuts
from tests.corpora import write_codec
from tests.tiers import slow_after, slow_except

pa = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
pq = pytest.importorskip("pyarrow.parquet", reason="pip install '.[corpus]'")
pytest.importorskip("lhotse", reason="pip install '.[corpus]'")

RATE, SAMPLES = 22050, 4096


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_codec(tmp_path_factory.mktemp("model") / "tiny.nemo", "two_stages")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write three recordings, and make their folder the working directory."""
    for number, name in enumerate("abc", start=1):
        wave = 0.3 * np.sin(np.arange(SAMPLES) * 0.02 * number)
        soundfile.write(tmp_path / f"{name}.wav", wave, RATE)
    return tmp_path


def cut(path: Path, **changes: object) -> dict:
    name, duration = path.stem, SAMPLES / RATE
    recording = {
        "id": name,
        "sources": [{"type": "file", "channels": [0], "source": str(path)}],
        "num_samples": SAMPLES,
    }
    recording |= {"sampling_rate": RATE, "duration": duration}
    supervision = {"id": name, "recording_id": name, "start": 0.0, "duration": duration, "channel": 0, "text": name}
    made = {"id": name, "start": 0.0, "duration": duration, "channel": 0, "type": "MonoCut", "recording": recording}
    return made | {"supervisions": [supervision]} | changes


def lines(path: Path, items: list) -> Path:
    text = "".join(json.dumps(item) + "\n" for item in items)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


def write_manifest(folder: Path, texts: str) -> Path:
    items = zip("abc", texts, strict=True)
    return lines(folder / "m.json", [{"audio_filepath": f"{name}.wav", "text": text} for name, text in items])


def write_recordings(folder: Path, texts: str) -> Path:
    cuts = [cut(folder / f"{name}.wav") for name in "abc"]
    supervisions = [item["supervisions"][0] | {"text": text} for item, text in zip(cuts, texts, strict=True)]
    lines(folder / "x_supervisions.jsonl", supervisions)
    return lines(folder / "x_recordings.jsonl", [item["recording"] for item in cuts])


def write_shar(folder: Path, texts: str) -> Path:
    """Write one Shar shard whose texts are a separate field, so that the texts can change without the cuts file."""
    shar = folder / "shar"
    shar.mkdir(exist_ok=True)
    lines(shar / "cuts.000000.jsonl.gz", [cut(folder / f"{name}.wav", supervisions=[]) for name in "abc"])
    lines(shar / "text.000000.jsonl", [{"cut_id": n, "text": t} for n, t in zip("abc", texts, strict=True)])
    return shar


def write_parquet(folder: Path, texts: str) -> Path:
    path = folder / "t.parquet"
    columns = {"audio": [f"{name}.wav" for name in "abc"], "text": list(texts)}
    pq.write_table(pa.table(columns), path, row_group_size=1, compression=None)
    return path


INPUTS = {
    "manifest": write_manifest,
    "recordings": write_recordings,
    "shar": write_shar,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", slow_except(INPUTS, "manifest"))
def test_an_input_edited_to_the_same_size_is_not_resumed(kind, folder, model):
    source = INPUTS[kind](folder, "xyz")
    sizes = [path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()]
    job = TokenizeConfig(str(source), str(folder / "out"), "manifest", model=str(model), shard_size=1)
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3
    assert INPUTS[kind](folder, "pqr") == source
    assert sizes == [p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file() and "out" not in p.parts]
    with pytest.raises(NemoLfrError, match="the corpus is another one or was changed"):
        tokenize(job, workers=1, device="cpu")
    INPUTS[kind](folder, "xyz")
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3  # the original input again


def write_audio(folder: Path, frequency: float) -> None:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate("abc", start=1):
        soundfile.write(folder / f"{name}.wav", 0.3 * np.sin(np.arange(SAMPLES) * frequency * number), RATE)


def write_csv(folder: Path) -> Path:
    path = folder / "t.csv"
    path.write_text("path,text\na.wav,x\nb.wav,y\nc.wav,z\n")
    return path


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
    "folder": lambda folder: folder,
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
BY_PATH = ("folder", "CSV")  # the folder's path is part of the identity of these corpora


@pytest.mark.parametrize("kind", slow_except(PARALLEL, "manifest"))
def test_an_equal_list_in_another_folder_is_not_resumed(kind, model, tmp_path, monkeypatch):
    """Parallel corpora, such as clean and noisy speech, have equal lists of files."""
    monkeypatch.chdir(tmp_path)
    jobs = {}
    for name, frequency in (("clean", 0.02), ("noisy", 0.03)):
        write_audio(tmp_path / name, frequency)
        source = PARALLEL[kind](tmp_path / name)
        jobs[name] = TokenizeConfig(
            str(source), str(tmp_path / "out"), "lfr", model=str(model), shard_size=200, dataset="x"
        )

    def run(name):
        if PARALLEL[kind].__name__ == "relative":
            os.chdir(tmp_path / name)
        return tokenize(jobs[name], workers=1, device="cpu")

    assert run("clean")["clips"] == 3
    remedy = "run the command in .*clean" if PARALLEL[kind].__name__ == "relative" else "pass --audio-dir .*clean"
    reason = "the folder that relative paths start from was .*clean"
    if kind not in ("saved dataset", "Shar"):  # whose files contain more than the list
        reason += f".*{remedy} if it is the same audio"
    if kind in BY_PATH:
        reason = "the corpus is another one"
    with pytest.raises(NemoLfrError, match=reason):
        run("noisy")
    assert run("clean")["clips"] == 3
    if kind not in (*BY_PATH, "Shar"):
        (tmp_path / "noisy").rename(tmp_path / "removed")
        (tmp_path / "clean").rename(tmp_path / "noisy")  # the same corpus in another place
        assert run("noisy")["clips"] == 3


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


def test_a_copy_of_a_manifest_without_relative_paths_is_resumed(model, tmp_path):
    write_audio(tmp_path / "audio", 0.02)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        entries = [{"audio_filepath": str(tmp_path / "audio" / f"{letter}.wav")} for letter in "abc"]
        source = lines(tmp_path / name / "m.json", entries)
        job = TokenizeConfig(str(source), str(tmp_path / "out"), "lfr", model=str(model), dataset="x")
        assert tokenize(job, workers=1, device="cpu")["clips"] == 3


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


def test_a_plan_of_an_older_version_without_the_folder_is_resumed(model, tmp_path):
    write_audio(tmp_path / "audio", 0.02)
    source = write_manifest(tmp_path / "audio", "xyz")
    job = TokenizeConfig(str(source), str(tmp_path / "out"), "lfr", model=str(model))
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3
    plan = tmp_path / "out" / STATE / PLAN
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"audio_dir": None}))
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", INPUTS)
def test_an_input_edited_while_it_is_read_stops_the_run(kind, folder, model):
    source = INPUTS[kind](folder, "xyz")
    job = TokenizeConfig(str(source), str(folder / "out"), "manifest", model=str(model), shard_size=1)
    originals = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix != ".wav" and path.is_file()}

    def edit(totals: corpus_run.Totals) -> None:
        if totals.done == (0 if kind == "shar" else 1):  # this Shar has only one shard
            INPUTS[kind](folder, "pqr")
            for path in originals:
                os.utime(path, (1e9, 1e9))  # a change that is detected even if the clock is coarse

    with pytest.raises(NemoLfrError, match="was changed while it was tokenized"):
        tokenize(job, workers=1, device="cpu", watch=edit)
    for path, data in originals.items():
        path.write_bytes(data)
    tokenize(job, workers=1, device="cpu")
    made = [json.loads(line) for line in (folder / "out" / "manifest.json").read_text().splitlines()]
    assert [line["text"] for line in made] == ["x", "y", "z"]


def test_every_byte_of_small_files_and_the_ends_of_large_ones_are_hashed(tmp_path):
    path = tmp_path / "a"
    for size, places in ((100, range(0, 100, 7)), (3 * WHOLE_BYTES, (0, 3 * WHOLE_BYTES - 1))):
        data = bytearray(size)
        path.write_bytes(data)
        whole = sampled_digest(path)
        for place in places:
            changed = data[:place] + b"x" + data[place + 1 :]
            path.write_bytes(changed)
            assert sampled_digest(path) != whole
        path.write_bytes(data + b"\0")
        assert sampled_digest(path) != whole


@pytest.mark.slow
def test_failed_clips_are_tried_again_when_asked_for(folder, model, capsys):
    (folder / "b.wav").rename(folder / "away.wav")
    source = write_manifest(folder, "xyz")
    command = ["tokenize", source, "--out", folder / "out", "--format", "manifest", "--model", model]
    command += ["--device", "cpu", "--workers", 1, "--shard-size", 2]
    for options, code, clips in (
        ([], 1, 2),
        (["--retry-failed"], 1, 2),
        (["mended"], 1, 2),
        (["--retry-failed"], 0, 3),
    ):
        if options == ["mended"]:
            (folder / "away.wav").rename(folder / "b.wav")
            options = []
        with pytest.raises(SystemExit) if code else _nothing():
            main(list(map(str, [*command, *options])))
        assert json.loads((folder / "out" / "tokens.json").read_text())["clips"] == clips
    assert "--retry-failed" in capsys.readouterr().err


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_a_folder_that_was_moved_names_its_files_where_they_are(folder, model):
    source = write_manifest(folder, "xyz")
    tokenize(TokenizeConfig(str(source), str(folder / "out"), "manifest", model=str(model)), workers=1, device="cpu")
    (folder / "out").rename(folder / "moved")
    tokenize(TokenizeConfig(str(source), str(folder / "moved"), "manifest", model=str(model)), workers=1, device="cpu")
    for line in (folder / "moved" / "manifest.json").read_text().splitlines():
        assert Path(json.loads(line)["target_audio_codes_path"]).is_relative_to(folder / "moved")


@pytest.mark.parametrize(
    "parts",
    slow_after(
        2, [[], [1], [None], [{"start": -1, "count": 1}], [{"start": 10**9, "count": 3}], [{"start": 0, "count": 1}]]
    ),
)
def test_an_edited_plan_of_a_run_is_refused(parts, folder, model):
    job = TokenizeConfig(str(write_manifest(folder, "xyz")), str(folder / "out"), "manifest", model=str(model))
    tokenize(job, workers=1, device="cpu")
    plan = folder / "out" / ".tokenize" / "job.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"parts": parts}))
    with pytest.raises(NemoLfrError, match="is damaged"):
        tokenize(job, workers=1, device="cpu")


OTHER = {"context_audio_codes_path": "/stale/c.pt", "target_codes": "/stale/t.npy", "tokens_filepath": "x.lfr"}
ARRAY = {"array": {"storage_type": "numpy_files", "storage_path": "/stale", "storage_key": "x.npy", "shape": [8, 9]}}
ARRAY |= {"temporal_dim": -1, "frame_shift": 0.04, "start": 0}


@pytest.mark.parametrize("source", ["manifest", "cuts", "parquet"])
@pytest.mark.parametrize("kind", slow_after(1, ["shar", "manifest", "parquet"]))
def test_run_with_another_codec_is_not_resumed(source, kind, folder, model):
    wav = folder / "a.wav"
    if source == "manifest":
        path = lines(folder / "m.json", [{"audio_filepath": "a.wav", **OTHER}])
    elif source == "cuts":
        made = cut(wav, custom=OTHER | {"context_codes": ARRAY, "target_codes": ARRAY})
        made["supervisions"][0]["custom"] = OTHER
        path = lines(folder / "c.jsonl", [made])
    else:
        path = folder / "t.parquet"
        pq.write_table(pa.table({"audio": ["a.wav"], **{key: [value] for key, value in OTHER.items()}}), path)
    out = folder / "out"
    tokenize(TokenizeConfig(str(path), str(out), kind, model=str(model)), workers=1, device="cpu")
    text = {
        "manifest": lambda: (out / "manifest.json").read_text(),
        "shar": lambda: gzip.decompress((out / "shar" / "cuts.000000.jsonl.gz").read_bytes()).decode(),
        "parquet": lambda: str(pq.read_table(out / "data" / "000000.parquet").column("labels").to_pylist()),
    }[kind]()
    assert "stale" not in text and "x.lfr" not in text


@pytest.mark.parametrize("kind", ["manifest", "parquet"])
def test_labels_are_written_as_strict_json(kind, folder, model):
    (folder / "m.json").write_text('{"audio_filepath": "a.wav", "snr": Infinity, "more": {"x": [NaN, 1]}}\n')
    out = folder / "out"
    tokenize(TokenizeConfig(str(folder / "m.json"), str(out), kind, model=str(model)), workers=1, device="cpu")
    if kind == "manifest":
        text = (out / "manifest.json").read_text()
    else:
        (text,) = pq.read_table(out / "data" / "000000.parquet").column("labels").to_pylist()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse)["more"] == {"x": [None, 1]}


@pytest.mark.parametrize("name", ["id", "start", "supervisions", "custom", "to_dict", "__class__", "not-a-name"])
def test_shar_field_cannot_replace_attributes_of_a_cut(name, folder, model):
    shar = folder / "shar"
    shar.mkdir()
    lines(shar / "cuts.000000.jsonl.gz", [cut(folder / "a.wav"), cut(folder / "b.wav")])
    lines(shar / f"{name}.000000.jsonl", [{"cut_id": "a", name: "same"}, {"cut_id": "b", name: "same"}])
    with pytest.raises(NemoLfrError, match="is not a valid name for custom data"):
        tokenize(TokenizeConfig(str(shar), str(folder / "out"), "lfr", model=str(model)), workers=1, device="cpu")


def test_a_manifest_with_keys_of_lhotse_is_a_manifest(folder, model):
    entry = {"audio_filepath": "a.wav", "recording_id": "r", "start": 0.0, "num_features": 80, "sampling_rate": 1}
    path = lines(folder / "m.jsonl", [entry | {"sources": ["x"]}])
    assert (
        tokenize(TokenizeConfig(str(path), str(folder / "out"), "lfr", model=str(model)), workers=1, device="cpu")[
            "clips"
        ]
        == 1
    )


def test_shard_of_cuts_parses_only_its_own_lines(folder, monkeypatch):
    path = lines(folder / "c.jsonl.gz", [cut(folder / "a.wav", id=f"c{number}") for number in range(50)])
    parsed = []
    loads = json.loads
    monkeypatch.setattr("nemo_lfr.io.cut_files.json.loads", lambda text: parsed.append(0) or loads(text))
    assert [item.id for item in read_cuts(path, start=40, stop=43)] == ["c40", "c41", "c42"]
    assert len(parsed) <= 5  # lines: the requested cuts, and the first one, which determines the kind of file
