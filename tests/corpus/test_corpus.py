"""Tests of `tokenize` and `detokenize`: inputs, output formats, executors, and processes that die."""

import contextlib
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from nemo_lfr.cli.main import main
from nemo_lfr.corpus import shard
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.dataset import TokenDataset
from nemo_lfr.corpus.formats import BUILT_IN
from nemo_lfr.corpus.run import tokenize
from nemo_lfr.corpus.sources import open_corpus
from nemo_lfr.corpus.worker_failures import WorkerFailures
from nemo_lfr.errors import AudioError, ConfigError, NemoLfrError
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.io.token_file import TokenReader, TokenWriter
from nemo_lfr.pretrained import load
from tests.models import RATE, codec_config, synthesize, write_nemo
from tests.tiers import slow_after, slow_except

pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("NEMO_LFR_KILLS", "2"))
CLIPS = int(os.environ.get("NEMO_LFR_CLIPS", "120"))
# Samples of each clip: near multiples of 1,024, and shorter than the context of the network.
LENGTHS = [9000, 1, 1024, 4096, 5000, 20480, 12_345, 7000, 3071, 6144, 30_000]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Write the checkpoint of a tiny codec in the released layout."""
    return write_nemo(tmp_path_factory.mktemp("model") / "tiny.nemo", codec_config())


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    return {f"s{n % 3}/clip{n}": synthesize(2, seed=n)[:length] for n, length in enumerate(LENGTHS)}


@pytest.fixture(scope="module")
def audio(tmp_path_factory, clips) -> Path:
    """Write the clips as 16-bit files in a folder for each of three speakers, and a manifest of the files."""
    root = tmp_path_factory.mktemp("audio")
    lines = []
    for number, (name, wave) in enumerate(clips.items()):
        path = root / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wave, RATE)
        other = f"s{number % 3}/clip{number % 3}.wav"
        lines.append(
            {
                "audio_filepath": f"{name}.wav",
                "duration": len(wave) / RATE,
                "text": f"clip number {number}",
                "speaker": f"| Language:en Dataset:made Speaker:s{number % 3} |",
                "context_audio_filepath": other,
                "context_audio_duration": LENGTHS[number % 3] / RATE,
                "normalized_text": f"clip number {number}",
            }
        )
    (root / "manifest.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def expected(model, audio, clips) -> dict[str, torch.Tensor]:
    """Return the tokens of each file when it is encoded alone."""
    codec = load(model, "cpu")
    waves = {name: soundfile.read(audio / f"{name}.wav", dtype="float32")[0] for name in clips}
    return {name: codec.encode(wave)[0][0].long() for name, wave in waves.items()}


def job(source: Path, out: Path, model: Path, kind: str = "shar", **options) -> TokenizeConfig:
    return TokenizeConfig(
        str(source), str(out), kind, model=str(model), shard_size=options.pop("shard_size", 4), **options
    )


def files_of(out: Path) -> dict[str, str]:
    """Return the hash of every file that a user reads, with the output path replaced by OUT."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and ".tokenize" not in path.parts:
            data = path.read_bytes().replace(str(out.resolve()).encode(), b"OUT").replace(str(out).encode(), b"OUT")
            found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def read(out: Path) -> dict[str, torch.Tensor]:
    utterances = list(TokenDataset(out))
    assert len({utterance.id for utterance in utterances}) == len(utterances)
    return {utterance.id: utterance.tokens for utterance in utterances}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tokens in expected.items():
        assert torch.equal(got[name], tokens), name


@pytest.mark.parametrize("kind", slow_except(BUILT_IN, "shar", "parquet"))
def test_every_layout_gives_back_the_tokens_of_each_clip_alone(kind, audio, model, expected, clips, tmp_path):
    done = tokenize(job(audio / "manifest.json", tmp_path / "out", model, kind), device="cpu", workers=1)
    assert (done["clips"], done["shards"], done["failures"]) == (11, 3, 0)
    assert_equal(read(tmp_path / "out"), expected)
    dataset = TokenDataset(tmp_path / "out")
    assert (len(dataset), dataset.num_codebooks, dataset.codebook_size) == (11, 8, 2016)
    for utterance in dataset:
        assert utterance.num_samples == len(clips[utterance.id])
        assert utterance.labels["text"] == f"clip number {utterance.id.partition('clip')[2]}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shar", "manifest", "parquet"])
def test_contexts_are_stored_with_their_clips(kind, audio, model, expected, tmp_path):
    tokenize(job(audio / "manifest.json", tmp_path / "out", model, kind, context=True), device="cpu", workers=1)
    for utterance in TokenDataset(tmp_path / "out"):
        number = int(utterance.id.partition("clip")[2]) % 3
        assert torch.equal(utterance.context, expected[f"s{number}/clip{number}"])


@pytest.mark.slow
def test_magpie_padding_adds_a_frame_to_clips_that_end_at_a_frame_boundary(audio, model, expected, clips, tmp_path):
    tokenize(job(audio / "manifest.json", tmp_path / "out", model, "lfr", pad="magpie"), device="cpu", workers=1)
    codec = load(model, "cpu")
    for name, tokens in read(tmp_path / "out").items():
        full = len(clips[name]) % 1024 == 0
        assert tokens.shape[1] == expected[name].shape[1] + full
        wave = soundfile.read(audio / f"{name}.wav", dtype="float32")[0]
        assert torch.equal(tokens, codec.encode(np.pad(wave, (0, 1024 * full)))[0][0].long())


# Inputs.


@pytest.mark.slow
def test_every_kind_of_corpus_gives_the_same_tokens(audio, model, expected, clips, tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from lhotse import CutSet

    cuts = lhotse_cuts(audio, list(clips))
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    write_shar(tmp_path / "shar", cuts)
    rows = [{"audio": {"bytes": (audio / f"{name}.wav").read_bytes(), "path": None}, "id": name} for name in clips]
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:6]), tmp_path / "rows" / "a.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(rows[6:]), tmp_path / "rows" / "b.parquet")
    paths = [{"audio": str(audio / f"{name}.wav"), "id": name} for name in clips]
    datasets.Dataset.from_list(paths).save_to_disk(tmp_path / "saved")
    for source in (audio, tmp_path / "cuts.jsonl.gz", tmp_path / "shar", tmp_path / "rows", tmp_path / "saved"):
        out = tmp_path / f"out-{source.name}"
        done = tokenize(job(source, out, model, "shar"), device="cpu", workers=1)
        assert done["failures"] == 0, (out / "failures.jsonl").read_text()
        got = {name.rpartition("-")[0] or name: tokens for name, tokens in read(out).items()}
        assert_equal(got, expected)


@pytest.mark.slow
def test_segments_and_repeated_files_of_a_manifest_are_separate_clips(audio, model, tmp_path):
    name = "s2/clip5.wav"
    lines = [
        {"audio_filepath": name, "offset": 0.25, "duration": 0.5},
        {"audio_filepath": name, "duration": 20480 / RATE},
        {"audio_filepath": name, "duration": 20480 / RATE},
        {"audio_filepath": name, "duration": 0.5},
        {"audio_filepath": name, "offset": 0, "duration": 0.88},
        {"audio_filepath": name, "duration": 0.88},
    ]
    (audio / "parts.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenize(job(audio / "parts.json", tmp_path, model, "lfr", shard_size=3), device="cpu", workers=1)
    codec, wave = load(model, "cpu"), soundfile.read(audio / name, dtype="float32")[0]
    first, half = math.floor(0.25 * RATE + 0.5), 11025  # half a sample rounds up, as in Lhotse
    assert_equal(
        read(tmp_path),
        {
            "s2/clip5-00000250": codec.encode(wave[first : first + half])[0][0].long(),
            "s2/clip5": codec.encode(wave)[0][0].long(),
            "s2/clip5~2": codec.encode(wave)[0][0].long(),
            "s2/clip5~3": codec.encode(wave[:half])[0][0].long(),
            "s2/clip5~4": codec.encode(wave[: math.ceil(0.88 * RATE)])[0][0].long(),
            "s2/clip5~5": codec.encode(wave)[0][0].long(),  # rounded
        },
    )


@pytest.mark.parametrize("name", ["/etc/passwd.wav", "../../up.wav", "a\0b:c|d.wav", ".."])
def test_no_name_escapes_the_output_folder(name, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"audio_filepath": name}) + "\n")
    corpus = open_corpus(tmp_path / "m.json", None, tmp_path / "unused")
    (clip,) = corpus.read(corpus.shards(5)[0])
    target = (tmp_path / clip.id).resolve()
    assert tmp_path in target.parents and "\0" not in clip.id and ":" not in clip.id


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_text("hello\n"), "not a NeMo manifest"),
        (lambda path: path.write_text(""), "not a NeMo manifest"),
        (lambda path: path.write_bytes(b"\xff\xfe\0"), "not a NeMo manifest"),
        (lambda path: path.mkdir(), "no audio file in this folder"),
    ],
)
def test_invalid_corpus_is_refused_in_one_line(make, reason, model, tmp_path):
    make(tmp_path / "corpus.json")
    with pytest.raises(NemoLfrError, match=reason):
        tokenize(job(tmp_path / "corpus.json", tmp_path / "out", model), device="cpu")


def test_invalid_tables_and_cuts_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    for name in ("a.parquet", "a.jsonl.gz"):
        with pytest.raises(ConfigError, match=name):
            open_corpus(tmp_path / name, None, tmp_path / "unused").shards(3)


# Runs.


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_byte(audio, model, tmp_path):
    for workers in (1, 3):
        job_ = job(audio / "manifest.json", tmp_path / str(workers), model, "parquet", shard_size=2)
        tokenize(job_, workers=workers, device="cpu")
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


@pytest.mark.parametrize("kind", slow_except(BUILT_IN, "shar"))
def test_resumed_run_keeps_complete_shards(kind, audio, model, tmp_path):
    job_ = job(audio / "manifest.json", tmp_path / "out", model, kind)
    tokenize(job_, device="cpu", workers=1)
    before, times = files_of(tmp_path / "out"), {}
    marks = sorted((tmp_path / "out" / ".tokenize" / "done").iterdir())
    lost = json.loads(marks[1].read_text())["files"]
    (tmp_path / "out" / next(iter(lost))).unlink()
    times = {path: path.stat().st_mtime_ns for path in marks}
    tokenize(job_, device="cpu", workers=1)
    assert files_of(tmp_path / "out") == before
    changed = [path for path in marks if path.stat().st_mtime_ns != times[path]]
    assert changed == [marks[1]]


@pytest.mark.slow
@pytest.mark.parametrize("content", slow_after(2, ["pipe", "[1]", "{", "{}", '{"parts": 3}', "null"]))
def test_a_damaged_record_of_the_job_is_named(audio, model, tmp_path, content):
    job_ = job(audio / "manifest.json", tmp_path / "out", model)
    job_.state.mkdir(parents=True)
    record = job_.state / "job.json"
    os.mkfifo(record) if content == "pipe" else record.write_text(content)
    with pytest.raises(NemoLfrError, match=r"job\.json: the file is damaged"):
        tokenize(job_, device="cpu", workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("kept", slow_after(1, ["records", "results"]))
@pytest.mark.parametrize("kind", BUILT_IN)
def test_results_without_the_record_of_the_job_are_refused(audio, model, tmp_path, kind, kept):
    lines = (audio / "manifest.json").read_text().splitlines(True)
    (tmp_path / "m.json").write_text("".join(lines[:2]))
    job_ = job(tmp_path / "m.json", tmp_path / "out", model, kind, audio_dir=str(audio))
    tokenize(job_, device="cpu", workers=1)
    (job_.state / "job.json").unlink()
    for path in (tmp_path / "out").iterdir():
        if kept == "records" and path != job_.state:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kept == "results":
        shutil.rmtree(job_.state / "done")
    before = files_of(tmp_path / "out")
    (tmp_path / "m.json").write_text(lines[2])
    for _ in range(2):  # the first refusal must not make the second run accept the folder
        with pytest.raises(NemoLfrError, match=r"job\.json: the file is missing.*; restore the file, remove "):
            tokenize(job_, device="cpu", workers=1)
    assert files_of(tmp_path / "out") == before


@pytest.mark.slow
def test_run_with_other_options_refuses_an_existing_output(audio, model, tmp_path):
    job_ = job(audio / "manifest.json", tmp_path / "out", model)
    tokenize(job_, device="cpu", workers=1)
    before = files_of(tmp_path / "out")
    for change in ({"pad": "magpie"}, {"kind": "lfr"}, {"precision": "fp16"}, {"shard_size": 5}, {"model": None}):
        with pytest.raises(NemoLfrError, match="contains the tokens of another run"):
            tokenize(replace(job_, **change), device="cpu", workers=1)
    with pytest.raises(NemoLfrError, match="contains the tokens of another run"):
        tokenize(replace(job_, source=str(audio)), device="cpu", workers=1)
    assert files_of(tmp_path / "out") == before
    with pytest.raises(NemoLfrError, match="is not empty and contains no resumable run"):
        tokenize(replace(job_, out=str(audio)), device="cpu", workers=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error"),
    slow_after(
        1,
        [
            ("shar", None),
            ("parquet", None),
            ("lfr", "older version of nemo_lfr"),  # the reader refuses files with two fingerprints
        ],
    ),
)
def test_a_run_that_an_older_version_began_is_resumed_or_refused(audio, model, tmp_path, kind, error):
    (tmp_path / "two.json").write_text("".join((audio / "manifest.json").read_text().splitlines(True)[1:3]))
    job_ = job(tmp_path / "two.json", tmp_path / "out", model, kind, shard_size=1, audio_dir=str(audio))
    tokenize(job_, device="cpu", workers=1)
    expected = read(tmp_path / "out")
    # State of an older version's run that was killed: one of the two shards is missing.
    now, *_, older = load(job_.model, "cpu").backend.fingerprints()
    record = job_.state / "job.json"
    record.write_text(record.read_text().replace(now, older))
    for path in (tmp_path / "out").rglob("*.lfr"):
        with TokenReader(path) as reader:
            metadata, tokens, samples = replace(reader.metadata, fingerprint=older), reader.read(), reader.num_samples
        with TokenWriter(path, metadata, overwrite=True) as writer:
            writer.write(tokens)
            writer.finish(samples)
    (job_.state / "done" / "000001.json").unlink()
    (tmp_path / "out" / "tokens.json").unlink()
    before = files_of(tmp_path / "out")
    if error:
        with pytest.raises(NemoLfrError, match=error):
            tokenize(job_, device="cpu", workers=1)
        assert files_of(tmp_path / "out") == before
        return
    tokenize(job_, device="cpu", workers=1)
    result = read(tmp_path / "out")
    assert list(result) == list(expected) and all(torch.equal(result[name], expected[name]) for name in result)


@pytest.mark.slow
def test_changed_or_different_folder_is_not_resumed(audio, model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "train").mkdir(parents=True)
        shutil.copy(audio / "s0" / "clip0.wav", tmp_path / name / "train")
    mine = job(tmp_path / "a" / "train", tmp_path / "out", model, "lfr", dataset="train")
    tokenize(mine, device="cpu", workers=1)
    before = files_of(tmp_path / "out")
    assert tokenize(mine, device="cpu", workers=1)["clips"] == 1
    with pytest.raises(NemoLfrError, match=r"start from was .*a.train, but is now .*b.train"):
        tokenize(replace(mine, source=str(tmp_path / "b" / "train")), device="cpu", workers=1)
    shutil.copy(audio / "s1" / "clip1.wav", tmp_path / "a" / "train")
    with pytest.raises(NemoLfrError, match=r"the corpus .*a.train was changed after the run was started"):
        tokenize(mine, device="cpu", workers=1)
    assert files_of(tmp_path / "out") == before
    manifest = job(audio / "manifest.json", tmp_path / "other", model, "lfr", audio_dir=str(audio))
    tokenize(manifest, device="cpu", workers=1)
    with pytest.raises(NemoLfrError, match="the folder that relative paths start from was"):
        tokenize(replace(manifest, audio_dir=str(tmp_path)), device="cpu", workers=1)


@pytest.mark.slow
def test_the_command_in_the_metadata_makes_the_same_tokens_again(audio, model, tmp_path):
    (tmp_path / "two words").mkdir()
    shutil.copy(audio / "manifest.json", tmp_path / "two words")
    source = tmp_path / "two words" / "manifest.json"
    mine = job(source, tmp_path / "out", model, "parquet", audio_dir=str(audio), dataset="made")
    done = tokenize(mine, device="cpu", workers=1)
    before = files_of(tmp_path / "out")
    main([*shlex.split(done["command"])[1:], "--device", "cpu", "--workers", "1"])
    assert files_of(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out")
    main([*shlex.split(done["command"])[1:], "--device", "cpu", "--workers", "1"])
    assert files_of(tmp_path / "out") == before


@pytest.mark.slow
def test_a_long_clip_does_not_widen_the_batch_of_many_short_ones(model, tmp_path, monkeypatch):
    lengths = [RATE // 10] * 40 + [20 * RATE] + [RATE // 10] * 40
    speech = synthesize(20, seed=1)
    for number, length in enumerate(lengths):
        soundfile.write(tmp_path / f"{number:03d}.wav", speech[:length], RATE)
    sizes = []
    zeros = shard._zeros
    monkeypatch.setattr(
        shard, "_zeros", lambda codec, rows, columns: sizes.append(rows * columns) or zeros(codec, rows, columns)
    )
    done = tokenize(job(tmp_path, tmp_path / "out", model, "lfr", shard_size=100), device="cpu", workers=1)
    assert (done["clips"], done["failures"]) == (len(lengths), 0)
    assert max(sizes) <= 2 * shard.BATCH_SECONDS["cpu"] * RATE
    wave = soundfile.read(tmp_path / "040.wav", dtype="float32")[0]
    assert torch.equal(read(tmp_path / "out")["040"], load(model, "cpu").encode(wave)[0][0].long())


@pytest.mark.slow
def test_failing_shard_stops_the_run_without_waiting(audio, model, tmp_path):
    (audio / "ends.json").write_text('{"audio_filepath": "x.wav"}\n' + (audio / "manifest.json").read_text() * 20)
    with pytest.raises(AudioError, match=r"x\.wav"):
        tokenize(job(audio / "ends.json", tmp_path / "out", model, strict=True), device="cpu", workers=2)
    assert len(list((tmp_path / "out" / ".tokenize").glob("done/*"))) < 10


@pytest.mark.slow
def test_two_runs_at_once_do_not_share_an_output(audio, model, tmp_path):
    (tmp_path / "out" / ".tokenize").mkdir(parents=True)
    with exclusive(tmp_path / "out"), pytest.raises(NemoLfrError, match="another run is writing"):
        tokenize(job(audio / "manifest.json", tmp_path / "out", model), device="cpu", workers=1)


@pytest.mark.slow
def test_workers_that_cannot_start_stop_the_run_and_say_why(audio, model, tmp_path):
    # Remove the checkpoint after the driver and before a worker has read it.
    doomed = tmp_path / "doomed.nemo"
    shutil.copy(model, doomed)

    def watch(totals):
        doomed.unlink()

    with pytest.raises(NemoLfrError, match=r"a worker cannot start: .*doomed\.nemo: no such file"):
        tokenize(job(audio / "manifest.json", tmp_path / "out", doomed), device="cpu", workers=2, watch=watch)


def test_deaths_without_a_shard_stop_the_run(audio, model, tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_lfr.corpus.worker_failures.MAX_DEATHS", 1)
    deaths = WorkerFailures(job(audio / "manifest.json", tmp_path, model))
    deaths.count([0], RuntimeError("it is gone"))
    message = r"workers died 2 times, and no shard was finished in between \(it is gone\)"
    with pytest.raises(NemoLfrError, match=message):
        deaths.count([1], RuntimeError("it is gone"))


# Bad data.


def bad_files(root: Path) -> dict[str, str]:
    """Write files that cannot be tokenized, and return a part of the expected reason for each."""
    wave = synthesize(0.5)
    soundfile.write(root / "good.wav", wave, RATE)
    good = (root / "good.wav").read_bytes()
    flac = root / "whole.flac"
    soundfile.write(flac, wave, RATE)
    whole = flac.read_bytes()
    flac.unlink()
    content: dict[str, tuple[bytes, str]] = {
        "empty.wav": (b"", "the file is empty"),
        "text.wav": (b"hello, world\n" * 50, "not an audio file"),
        "zeros.wav": (bytes(5000), "not an audio file"),
        "html.mp3": (b"<html><body>404</body></html>", "not an audio file"),
        "header.wav": (good[:44], "truncated"),
        "half-header.wav": (good[:20], "truncated: it ends within its header"),
        "cut.wav": (good[: len(good) // 2], "truncated"),
        "cut.flac": (whole[: len(whole) // 2], "truncated: its last frame"),
        "half-header.flac": (whole[:30], "truncated: it ends within its header"),
        "noise.flac": (whole[:100] + bytes(range(256)) * 20, ""),
        "noise.mp3": (np.random.default_rng(0).bytes(3000), "not an audio file"),
        "png.ogg": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an audio file"),
        "rate0.wav": (good[:24] + struct.pack("<I", 0) + good[28:], ""),
        "channels0.wav": (good[:22] + struct.pack("<H", 0) + good[24:], ""),
        "bits0.wav": (good[:34] + struct.pack("<H", 0) + good[36:], ""),
        "codec99.wav": (good[:20] + struct.pack("<H", 99) + good[22:], ""),
        "json.wav": (b'{"audio": 1}', "not an audio file"),
        "pickle.wav": (b"\x80\x04\x95\x10\x00\x00\x00", "not an audio file"),
    }
    reasons = {}
    for name, (data, reason) in content.items():
        (root / name).write_bytes(data)
        reasons[name] = reason
    waves = {
        "nan.wav": (np.full(4000, np.nan, np.float32), "NaN"),
        "inf.wav": (np.full(4000, np.inf, np.float32), "NaN or infinite"),
        "loud.wav": (30_000 * wave / np.abs(wave).max(), "16-bit"),
        "silent.wav": (np.zeros(4000, np.float32), "silent"),
        "no-samples.wav": (np.zeros(0, np.float32), "no samples"),
        "long.wav": (np.tile(wave, 9), "more than the limit of 3 s"),
    }
    for name, (samples, reason) in waves.items():
        soundfile.write(root / name, samples, RATE, subtype="FLOAT")
        reasons[name] = reason
    (root / "folder.wav").mkdir()
    (root / "loop.wav").symlink_to(root / "loop.wav")
    (root / "dangling.wav").symlink_to(root / "nowhere")
    reasons |= {
        "folder.wav": "not a file but a folder",
        "loop.wav": "",
        "dangling.wav": "a link to a missing file",
        "missing.wav": "no such file; if the paths in the manifest start from another folder, pass it as --audio-dir",
    }
    return reasons


def odd_files(root: Path) -> list[str]:
    """Write files that are unusual but valid."""
    wave = synthesize(0.5)
    soundfile.write(root / "float.wav", 1.2 * wave / np.abs(wave).max(), RATE, subtype="FLOAT")
    soundfile.write(root / "double.wav", wave, RATE, subtype="DOUBLE")
    soundfile.write(root / "stereo.wav", np.stack([wave, wave], 1), RATE)
    soundfile.write(root / "odd-rate.wav", wave, 11_127)
    soundfile.write(root / "u8.wav", wave, RATE, subtype="PCM_U8")
    soundfile.write(root / "24 bit.flac", wave, 48_000, subtype="PCM_24")
    soundfile.write(root / "one-sample.wav", wave[500:501], RATE)
    soundfile.write(root / "ünïcode 語.wav", wave, RATE)
    return [path.name for path in root.iterdir()]


@pytest.mark.slow
def test_invalid_clips_are_listed_once_with_their_reasons(model, tmp_path, capsys):
    root = tmp_path / "audio"
    root.mkdir()
    odd = odd_files(root)
    reasons = bad_files(root)
    assert len(reasons) >= 25
    names = [*odd, "good.wav", *reasons]
    random.Random(0).shuffle(names)
    lines = [json.dumps({"audio_filepath": name}) for name in names]
    # Invalid lines, and one whose duration exceeds its file.
    lines[3:3] = [
        "not json",
        '{"no": 1}',
        '{"audio_filepath": 7}',
        "[]",
        '{"audio_filepath": "good.wav", "duration": 9}',
        '{"audio_filepath": "good.wav", "offset": NaN}',
        '{"audio_filepath": "good.wav", "offset": Infinity}',
        '{"audio_filepath": "good.wav", "offset": -1}',
        '{"audio_filepath": "good.wav", "duration": 1' + "0" * 400 + "}",
        '{"audio_filepath": "good.wav", "offset": 0.1, "text": "\\ud83d"}',
        '{"audio_filepath": ' + "[" * 5000,
        '{"audio_filepath": "good.wav", "offset": 0.1, "duration": 0.1, "deep": ' + "[" * 600 + "]" * 600 + "}",
    ]
    lines[:0] = [json.dumps({"audio_filepath": "good.wav", "offset": 0.1, "duration": 0.2})]
    (tmp_path / "manifest.json").write_text("\n".join(lines) + "\n")
    options = ["--format", "lfr", "--audio-dir", root, "--model", model, "--device", "cpu", "--shard-size", 7]
    options += ["--max-duration", 3, "--workers", 1]
    with pytest.raises(SystemExit) as exit_:
        main(["tokenize", *map(str, [tmp_path / "manifest.json", "--out", tmp_path / "out", *options])])
    assert exit_.value.code == 1
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    said = {failure["input"]: failure["error"] for failure in failures}
    assert len({failure["id"] for failure in failures}) == len(failures) == len(reasons) + 12
    for name, reason in reasons.items():
        assert reason in said[str(root / name)], name
    made = {path.relative_to(tmp_path / "out" / "tokens").as_posix() for path in (tmp_path / "out").rglob("*.lfr")}
    # The id of good.wav is taken by earlier lines, whose duration exceeds the file.
    assert made == {f"{Path(name).stem}.lfr" for name in odd} | {"good~3.lfr", "good-00000100.lfr"}
    assert f"{len(failures)} failed" in capsys.readouterr().err
    with pytest.raises(AudioError):
        tokenize(
            replace(
                job(tmp_path / "manifest.json", tmp_path / "strict", model, "lfr"), audio_dir=str(root), strict=True
            ),
            device="cpu",
            workers=1,
        )
    assert not (tmp_path / "strict" / "tokens.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_name_that_is_not_utf8_fails_only_its_clip(kind, audio, model, tmp_path):
    (tmp_path / "audio").mkdir()
    clip = audio / "s0" / "clip0.wav"
    shutil.copy(clip, tmp_path / "audio" / "good.wav")
    shutil.copy(clip, os.fsencode(tmp_path / "audio") + b"/a\xff.wav")
    done = tokenize(job(tmp_path / "audio", tmp_path / "out", model, kind), device="cpu", workers=1)
    assert (done["clips"], done["failures"]) == (1, 1)
    (failure,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert "file name is not valid UTF-8" in json.loads(failure)["error"]


def lhotse_cuts(audio: Path, names: list[str]) -> list:
    from lhotse import Recording, SupervisionSegment
    from lhotse.cut import MonoCut

    cuts = []
    for name in names:
        recording = Recording.from_file(audio / f"{name}.wav", recording_id=name)
        said = SupervisionSegment(name, name, 0, recording.duration, text="a", speaker="b", language="en")
        cuts.append(MonoCut(name, 0, recording.duration, 0, [said], recording=recording))
    return cuts


def write_shar(folder: Path, cuts: list, **fields: str) -> Path:
    from lhotse.shar import SharWriter

    folder.mkdir()
    with SharWriter(str(folder), fields={"recording": "flac", **fields}, shard_size=4) as writer:
        for cut in cuts:
            writer.write(cut)
    return folder


@pytest.mark.slow
def test_other_fields_of_a_shar_are_dropped(audio, model, expected, clips, tmp_path):
    names = list(clips)[:5]
    old = np.zeros((8, 3), np.int16)
    cuts = [
        cut.attach_tensor("target_codes", old, frame_shift=0.05, temporal_dim=-1) for cut in lhotse_cuts(audio, names)
    ]
    shar = write_shar(tmp_path / "shar", cuts, target_codes="numpy")
    assert tokenize(job(shar, tmp_path / "out", model), device="cpu", workers=1)["failures"] == 0
    assert_equal(read(tmp_path / "out"), {name: expected[name] for name in names})


@pytest.mark.slow
def test_cuts_of_a_truncated_tar_are_failures(audio, model, expected, clips, tmp_path):
    names = list(clips)[:8]
    shar = write_shar(tmp_path / "shar", lhotse_cuts(audio, names))
    first, second = sorted(shar.glob("recording.*.tar"))
    os.truncate(first, first.stat().st_size // 2)  # within an item
    with tarfile.open(second) as file:
        os.truncate(second, file.getmembers()[2].offset)  # after the first clip
    done = tokenize(job(shar, tmp_path / "out", model), device="cpu", workers=1)
    assert done["clips"] + done["failures"] == 8 and done["failures"] >= 5
    got = read(tmp_path / "out")
    assert_equal(got, {name: expected[name] for name in got})
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert {failure["id"] for failure in failures} == set(names) - got.keys()
    assert all("truncated" in failure["error"] for failure in failures)


@pytest.mark.slow
def test_mixed_cuts_become_shar_and_cuts_without_audio_are_failures(audio, model, tmp_path):
    from lhotse import CutSet

    whole, bad = lhotse_cuts(audio, ["s0/clip0", "s1/clip1"])
    bad.custom = {"target_audio": "a name"}
    CutSet.from_cuts([whole.pad(duration=1.0), bad]).to_file(tmp_path / "cuts.jsonl.gz")
    done = tokenize(job(tmp_path / "cuts.jsonl.gz", tmp_path / "out", model), device="cpu", workers=1)
    assert (done["clips"], done["failures"]) == (1, 1)
    (utterance,) = TokenDataset(tmp_path / "out")
    assert utterance.num_samples == RATE and utterance.labels["text"] == "a"


@pytest.mark.slow
def test_labels_keep_their_meaning_in_every_format(audio, model, tmp_path):
    line = {"audio_filepath": "s0/clip0.wav", "text": None, "lang": "zh-CN", "speaker": "a\u2028b"}
    line |= {"context_audio_codes_path": "old.pt", "target_audio_codes_path": "old.pt"}
    (audio / "labels.json").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    found = {}
    for kind in ("shar", "manifest", "parquet", "lfr"):
        tokenize(job(audio / "labels.json", tmp_path / kind, model, kind), device="cpu", workers=1)
        (found[kind],) = TokenDataset(tmp_path / kind)
        assert found[kind].context is None and found[kind].labels["text"] is None
    assert found["shar"].labels["speaker"] == "| Language:zh_CN Dataset:corpus Speaker:a_b |"
    assert found["parquet"].labels["speaker"] == "a\u2028b"
    assert "context_audio_codes_path" not in found["manifest"].labels
    (recording,) = read_manifest(audio / "labels.json", audio)
    assert recording.labels == line


@pytest.mark.slow
def test_a_table_may_hold_the_bytes_of_files_themselves(audio, model, expected, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"audio": (audio / "s0" / "clip0.wav").read_bytes(), "id": "clip"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenize(job(tmp_path / "rows.parquet", tmp_path / "out", model), device="cpu", workers=1)
    assert_equal(read(tmp_path / "out"), {"clip-00000000": expected["s0/clip0"]})


def test_contexts_are_refused_for_a_format_that_cannot_store_them(audio, model, tmp_path):
    with pytest.raises(NemoLfrError, match='"lfr" cannot store the tokens of context audio'):
        tokenize(job(audio / "manifest.json", tmp_path / "out", model, "lfr", context=True), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_shard_of_only_bad_clips_is_read_as_empty(model, audio, tmp_path):
    lines = (audio / "manifest.json").read_text().splitlines()
    (audio / "holes.json").write_text(
        "\n".join([*lines[:2], *['{"audio_filepath": "x.wav"}'] * 2, *lines[2:4]]) + "\n"
    )
    for kind in BUILT_IN:
        done = tokenize(job(audio / "holes.json", tmp_path / kind, model, kind, shard_size=2), device="cpu", workers=1)
        assert (done["clips"], done["failures"], done["shards"]) == (4, 2, 3)
        assert len(read(tmp_path / kind)) == 4


# Processes that die, and Ray.


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Write a manifest of many short clips, some of which are missing."""
    root = tmp_path_factory.mktemp("many")
    lines = []
    for number in range(CLIPS):
        if number % 37:
            soundfile.write(root / f"{number}.wav", synthesize(0.2 + 0.01 * (number % 30), seed=number), RATE)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "text": str(number)}))
    (root / "manifest.json").write_text("\n".join(lines) + "\n")
    return root / "manifest.json"


def start(source: Path, out: Path, model: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "nemo_lfr", "tokenize", source, "--out", out, "--model", model, "--device", "cpu"]
    command += ["--format", "parquet", "--shard-size", 6, *options]
    return subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def below(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started, directly or indirectly."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in below(child)]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def assert_no_half_files(out: Path) -> None:
    import pyarrow.parquet as pq

    for path in out.glob("data/*"):
        assert path.suffix == ".parquet"
        pq.read_table(path)


@pytest.mark.slow
def test_bad_files_among_many_are_each_listed_once(many, model, tmp_path):
    root = tmp_path / "audio"
    root.mkdir()
    reasons = bad_files(root)
    names = [root / name for name in reasons]
    lines = [json.loads(line) for line in many.read_text().splitlines()]
    names += [many.parent / line["audio_filepath"] for line in lines]
    random.Random(0).shuffle(names)
    (tmp_path / "all.json").write_text("".join(json.dumps({"audio_filepath": str(name)}) + "\n" for name in names))
    gone = {str(name) for name in names if name.parent == many.parent and not name.exists()}
    assert gone
    driver = start(tmp_path / "all.json", tmp_path / "out", model, "--workers", 2, "--max-duration", 3)
    assert driver.wait() == 1
    failed = [json.loads(line)["input"] for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert len(failed) == len(set(failed))
    assert set(failed) == gone | {str(root / name) for name in reasons}
    assert len(read(tmp_path / "out")) == len(names) - len(failed)
    print(f"{len(names)} clips, {len(failed)} of them bad, of {len(reasons)} kinds")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize(
    ("name", "are_stopped"),
    [
        ("SIGINT", False),
        ("SIGTERM", False),
        pytest.param(
            "SIGTERM", True, marks=pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
        ),
    ],
)
def test_sigterm_stops_workers_silently(name, are_stopped, many, model, tmp_path):
    """Ctrl-C interrupts the whole process group, whereas `kill` and schedulers end only the driver."""
    entry = json.loads(many.read_text().splitlines()[1])
    lines = [json.dumps(entry | {"audio_filepath": str(many.parent / entry["audio_filepath"])})] * 40_000
    (tmp_path / "long.json").write_text("\n".join(lines))
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from nemo_lfr.cli.main import main; "
    options = ["--model", model, "--workers", 2, "--shard-size", 20_000, "--device", "cpu", "--format", "parquet"]
    command = [sys.executable, "-c", script + "main()", "tokenize", tmp_path / "long.json", "--out", tmp_path / "out"]
    driver = subprocess.Popen(
        [*map(str, [*command, *options])], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(list((tmp_path / "out" / ".tokenize").glob("staging/*"))) < 2:
        assert driver.poll() is None
        time.sleep(0.1)
    workers = below(driver.pid)
    for pid in workers if are_stopped else ():  # like a debugger or a frozen cgroup
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGSTOP)
    number = getattr(signal, name)
    os.killpg(driver.pid, number) if name == "SIGINT" else driver.send_signal(number)
    _, said = driver.communicate(timeout=300)
    assert driver.returncode == 128 + number
    # On a busy machine, the run also prints progress lines.
    assert [line for line in said.split("\n") if "shards" not in line] == (
        ["", "nemo-lfr: interrupted.", ""] if name == "SIGINT" else ["nemo-lfr: stopped by SIGTERM.", ""]
    )
    assert workers
    deadline = time.monotonic() + 120  # Python's resource tracker ends only after it notices the end of the driver
    while left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("engine", [(), ("--ray", "local")], ids=["processes", "ray"])
def test_killed_workers_and_drivers_neither_lose_nor_repeat_clips(engine, many, model, tmp_path):
    """With Ray, its own processes (raylet, GCS ...) are killed too."""
    if engine:
        pytest.importorskip("ray", reason="pip install '.[ray]'")
    whole = job(many, tmp_path / "whole", model, "parquet", shard_size=6, dataset=many.stem)
    tokenize(whole, device="cpu", workers=1)
    rng = random.Random(0)
    out = tmp_path / "killed"
    kills = drivers = 0
    while kills < KILLS:
        shutil.rmtree(out, ignore_errors=True)
        while not (out / "tokens.json").exists():
            driver = start(many, out, model, "--workers", 2, *engine)
            while driver.poll() is None:
                time.sleep(rng.uniform(0.0, 15.0 if engine else 5.0))
                if kills < KILLS and driver.poll() is None:
                    workers = below(driver.pid)
                    victim = rng.choice([driver.pid, *workers, *([] if engine else workers)])
                    kill(victim)
                    kills += 1
                    drivers += victim == driver.pid
                assert_no_half_files(out)
        # The exit code is 1 because clips are missing, unless the driver was killed after its last rename.
        assert driver.returncode in (1, -signal.SIGKILL)
        assert files_of(out) == files_of(tmp_path / "whole")
        assert not list((out / ".tokenize" / "staging").glob("*"))
    print(f"{kills} kills, {drivers} of them of the driver")


@pytest.mark.slow
def test_driver_ends_if_the_last_node_dies_before_the_workers_start(many, model, tmp_path):
    """Ray itself reports no error in this case, and the actors stay pending."""
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    driver = start(many, tmp_path / "out", model, "--workers", 2, "--ray", "local")
    while driver.poll() is None:
        for pid in below(driver.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text() == "raylet\n":
                    time.sleep(2.5)  # the node has registered, and starts the first worker
                    kill(pid)
                    assert driver.wait(120) == 1
    assert driver.returncode == 1


@pytest.mark.slow
def test_ray_gives_the_bytes_of_a_single_process_though_its_workers_die(many, model, tmp_path):
    ray = pytest.importorskip("ray", reason="pip install '.[ray]'")
    tokenize(job(many, tmp_path / "whole", model, "parquet", shard_size=6), device="cpu", workers=1)
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    rng = random.Random(0)
    killed = []

    def watch(totals):
        if len(killed) < 3 and totals.done:
            actors = [pid for pid in below(os.getpid()) if b"ray::Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            if actors:
                killed.append(rng.choice(actors))
                kill(killed[-1])

    try:
        done = tokenize(
            job(many, tmp_path / "ray", model, "parquet", shard_size=6), ray="local", workers=2, watch=watch
        )
    finally:
        ray.shutdown()
    assert killed and done["clips"] + done["failures"] == CLIPS and done["failures"] == len(range(0, CLIPS, 37))
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_nodes_of_a_cluster_give_the_same_bytes_though_one_is_lost(many, model, tmp_path):
    ray = pytest.importorskip("ray", reason="pip install '.[ray]'")
    from ray.cluster_utils import Cluster

    tokenize(job(many, tmp_path / "whole", model, "parquet", shard_size=6), device="cpu", workers=1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    lost = []

    def watch(totals):
        if totals.done >= 4 and not lost:
            cluster.remove_node(other, allow_graceful=False)
            lost.append(other)
            cluster.add_node(num_cpus=1)

    try:
        tokenize(
            job(many, tmp_path / "ray", model, "parquet", shard_size=6), ray=cluster.address, workers=2, watch=watch
        )
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert lost
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_workers_without_cluster_resources_do_not_block_the_run(audio, model, tmp_path):
    ray = pytest.importorskip("ray", reason="pip install '.[ray]'")
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
    mine = job(audio / "manifest.json", tmp_path / "out", model, shard_size=1)
    try:
        with pytest.raises(NemoLfrError, match="this machine does not have the 2 cores that a worker needs"):
            tokenize(replace(mine, threads=2), ray="local")
        with pytest.raises(NemoLfrError, match="cores and a GPU that a worker needs; use --device cpu"):
            tokenize(mine, ray="local", device="cuda")
        doomed = shutil.copy(model, tmp_path / "doomed.nemo")
        with pytest.raises(NemoLfrError, match=r"a worker cannot start: .*doomed\.nemo"):
            tokenize(replace(mine, model=str(doomed)), ray="local", watch=lambda totals: Path(doomed).unlink())
        assert tokenize(mine, ray="local", workers=3)["clips"] == len(LENGTHS)
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_unreachable_cluster_is_a_one_line_error(audio, model, tmp_path):
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    with pytest.raises(NemoLfrError, match="no Ray cluster is reachable"):
        tokenize(job(audio / "manifest.json", tmp_path / "out", model), ray="nowhere:bad")


# Readers of the tokens.


@pytest.fixture(scope="module")
def characters():
    """Return the config of a text tokenizer for NeMo's TTS datasets."""
    pytest.importorskip("nemo", reason="pip install '.[nemo]'")
    from omegaconf import OmegaConf

    module = "nemo.collections.common.tokenizers.text_to_speech.tts_tokenizers."
    return OmegaConf.create({"english_phoneme": {"_target_": f"{module}EnglishCharsTokenizer"}})


@pytest.mark.slow
def test_nemos_lhotse_dataset_reads_the_shar(audio, model, expected, characters, tmp_path):
    from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
    from nemo.collections.tts.data.text_to_speech_dataset_lhotse import MagpieTTSLhotseDataset
    from omegaconf import OmegaConf

    tokenize(job(audio / "manifest.json", tmp_path / "out", model, context=True), device="cpu", workers=1)
    section = OmegaConf.load(tmp_path / "out" / "input_cfg.yaml")
    for entry in section:
        entry.tags = {"tokenizer_names": ["english_phoneme"]}
    cuts, _ = read_cutset_from_config(OmegaConf.create({"input_cfg": section, "force_finite": True}))
    cuts = sorted(cuts, key=lambda cut: cut.id)
    dataset = MagpieTTSLhotseDataset(
        sample_rate=RATE,
        codec_model_samples_per_frame=1024,
        num_audio_codebooks=8,
        load_cached_codes_if_available=True,
        tokenizer_config=characters,
        load_16khz_audio=False,
        context_duration_min=0.1,
        context_duration_max=0.1,
    )
    batch = dataset[cuts]
    assert [cut.id for cut in cuts] == sorted(expected)
    for cut, codes, length in zip(cuts, batch["audio_codes"], batch["audio_codes_lens"], strict=True):
        assert torch.equal(codes[:, :length].long(), expected[cut.id]), cut.id
    assert batch["context_audio_codes"].shape[:2] == (11, 8)


@pytest.mark.slow
def test_nemos_manifest_dataset_reads_the_manifest(audio, model, expected, characters, tmp_path):
    from nemo.collections.tts.data.text_to_speech_dataset import MagpieTTSDataset
    from nemo.collections.tts.data.text_to_speech_dataset_lhotse import setup_tokenizers

    tokenize(job(audio / "manifest.json", tmp_path / "out", model, "manifest", context=True), device="cpu", workers=1)
    dataset = MagpieTTSDataset(
        dataset_meta={"made": {"manifest_path": tmp_path / "out" / "manifest.json", "audio_dir": audio}},
        sample_rate=RATE,
        codec_model_samples_per_frame=1024,
        bos_id=1,
        eos_id=2,
        num_audio_codebooks=8,
        load_16khz_audio=False,
        context_duration_min=0.1,
        context_duration_max=0.1,
    )
    dataset.text_tokenizer = setup_tokenizers(characters)
    found = {}
    for number in range(len(dataset)):
        example = dataset[number]
        found[Path(example["audio_filepath"]).with_suffix("").as_posix()] = example["audio_codes"].long()
        assert example["context_audio_codes"].shape[0] == 8
    assert_equal(found, expected)


def test_a_folder_that_holds_no_finished_tokens_is_refused(tmp_path):
    with pytest.raises(NemoLfrError, match=r"no tokens\.json"):
        TokenDataset(tmp_path)
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(NemoLfrError, match="cannot be read"):
        TokenDataset(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILT_IN)
def test_detokenize_gives_the_audio_of_the_original_length(kind, audio, model, clips, tmp_path, capsys):
    tokenize(job(audio / "manifest.json", tmp_path / "out", model, kind), device="cpu", workers=1)
    arguments = ["detokenize", tmp_path / "out", "--out", tmp_path / "back", "--model", model, "--device", "cpu"]
    main([*map(str, arguments)])
    codec = load(model, "cpu")
    for utterance in TokenDataset(tmp_path / "out"):
        got, rate = soundfile.read(tmp_path / "back" / f"{utterance.id}.wav", dtype="int16")
        assert (len(got), rate) == (len(clips[utterance.id]), RATE)
        alone = codec.decode(utterance.tokens)[0][0, : len(got)].numpy()
        assert np.abs(got - np.clip(np.round(alone * 32768), -32768, 32767)).max() <= 1
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, arguments[:-4])])  # without --model, so that the bundled codec is used
    assert exit_.value.code == 2 and "the tokens were made by the codec" in capsys.readouterr().err
