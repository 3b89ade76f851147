"""Tests of inputs that are edited between or during runs of `tokenize`, and of inputs that contain other tokens."""

import gzip
import json
import os
from pathlib import Path

import pytest

from nemo_lfr.cli.main import main
from nemo_lfr.corpus import run as corpus_run
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.inventory import WHOLE_BYTES, sampled_digest
from nemo_lfr.corpus.run import tokenize
from nemo_lfr.corpus.sources.cuts import Cuts
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.cut_files import CutFile
from nemo_lfr.io.json_lines import json_lines
from tests.corpus.inputs import (
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


@pytest.fixture
def folder(tmp_path) -> Path:
    write_audio(tmp_path, 0.02)
    return tmp_path


INPUTS = {
    "manifest": write_manifest,
    "recordings": write_recordings,
    "shar": write_shar,
    "parquet": write_parquet,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(INPUTS, "manifest"))
def test_an_input_edited_to_the_same_size_is_not_resumed(kind, folder, model):
    source = INPUTS[kind](folder, "xyz")
    sizes = [path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()]
    job = TokenizeConfig(str(source), str(folder / "out"), "manifest", model=str(model), shard_size=1)
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3
    assert INPUTS[kind](folder, "pqr") == source
    assert sizes == [p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file() and "out" not in p.parts]
    with pytest.raises(NemoLfrError, match=f"the corpus {source} was changed .*; restore the corpus, or choose"):
        tokenize(job, workers=1, device="cpu")
    INPUTS[kind](folder, "xyz")
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3  # the original input again


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

    with pytest.raises(NemoLfrError, match="was changed during the run"):
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(["manifest", "shar"], "manifest"))
def test_tokens_of_clips_whose_audio_was_deleted_are_kept(kind, folder, model, caplog):
    broken, repaired = folder / "c.wav", folder / "c.flac"
    broken.rename(repaired)
    job = TokenizeConfig(str(write_manifest(folder, "xyz")), str(folder / "out"), kind, model=str(model))
    assert tokenize(job, workers=1, device="cpu")["clips"] == 2
    (folder / "a.wav").rename(folder / "gone.wav")
    repaired.rename(broken)
    again = tokenize(job, workers=1, device="cpu", retry_failed=True)
    assert (again["clips"], again["failures"]) == (2, 1)
    assert "kept as they were, because 1 clip that an earlier run tokenized can no longer be read" in caplog.text
    tokens = sorted(path for path in (folder / "out").rglob("*") if path.suffix in (".pt", ".tar"))
    tokens[0].unlink()
    with pytest.raises(NemoLfrError, match=r"the damaged shard 0 cannot be restored.*make the audio available"):
        tokenize(job, workers=1, device="cpu")
    assert all(path.exists() for path in tokens[1:])
    (folder / "gone.wav").rename(folder / "a.wav")
    assert tokenize(job, workers=1, device="cpu")["clips"] == 3


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.slow
def test_a_folder_that_was_moved_names_its_files_where_they_are(folder, model):
    source = write_manifest(folder, "xyz")
    tokenize(TokenizeConfig(str(source), str(folder / "out"), "manifest", model=str(model)), workers=1, device="cpu")
    (folder / "out").rename(folder / "moved")
    tokenize(TokenizeConfig(str(source), str(folder / "moved"), "manifest", model=str(model)), workers=1, device="cpu")
    for line in (folder / "moved" / "manifest.json").read_text().splitlines():
        assert Path(json.loads(line)["target_audio_codes_path"]).is_relative_to(folder / "moved")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert [item.id for item in CutFile(path).read(40, 43)] == ["c40", "c41", "c42"]
    assert len(parsed) <= 5  # lines: the requested cuts, and the first one, which determines the kind of file


@pytest.mark.parametrize("name", ["c.jsonl.gz", "x_recordings.jsonl.gz"])
def test_shards_that_are_read_in_order_read_a_file_of_cuts_once(name, folder, monkeypatch):
    cuts = [cut(folder / "a.wav", id=f"c{number}") for number in range(50)]
    path = lines(folder / name, cuts)
    if name != "c.jsonl.gz":
        lines(path, [item["recording"] | {"id": item["id"]} for item in cuts])
        texts = [{"id": "s", "recording_id": item["id"], "start": 0, "duration": 0.1, "text": "x"} for item in cuts]
        lines(folder / "x_supervisions.jsonl.gz", texts)
    corpus = Cuts(path)
    shards = corpus.shards(10)
    numbers = []

    def count(path: Path):
        for line in json_lines(path):
            numbers.append(0)
            yield line

    for module in ("cut_files", "json_lines", "supervisions"):
        monkeypatch.setattr(f"nemo_lfr.io.{module}.json_lines", count)
    read = [clip.id for index in (0, 1, 3, 4, 2) for clip in corpus.read(shards[index])]
    assert read == [f"c{number}" for number in [*range(20), *range(30, 50), *range(20, 30)]]
    assert len(numbers) <= 50 + 30 + (0 if name == "c.jsonl.gz" else 50) + 10  # the last shard is read from the start
    pairs = list(zip(corpus.read(shards[1]), corpus.read(shards[3]), strict=True))
    assert [(one.id, other.id) for one, other in pairs] == [(f"c{10 + n}", f"c{30 + n}") for n in range(10)]
    assert all(clip.labels.get("text") for pair in pairs for clip in pair)
