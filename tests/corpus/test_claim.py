"""Tests of runs whose output folder is removed, replaced or changed: they end with an error and no tokens.json."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.corpus import shard
from nemo_lfr.corpus.claim import NAME, check_claim, claim, writing
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.records import METADATA, ShardRecord
from nemo_lfr.corpus.run import Totals, tokenize
from nemo_lfr.errors import NemoLfrError
from tests.models import RATE, synthesize

CLIPS = 4


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("audio")
    for number in range(CLIPS):
        soundfile.write(root / f"{number}.wav", synthesize(0.2, seed=number), RATE)
    return root


def job(audio: Path, out: Path, model: Path) -> TokenizeConfig:
    return TokenizeConfig(str(audio), str(out), "lfr", model=str(model), shard_size=1)


@pytest.fixture(scope="module")
def whole(audio, model, tmp_path_factory) -> list[bytes]:
    """Return the token files of a run that was not disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    tokenize(job(audio, out, model), device="cpu", workers=1)
    return [path.read_bytes() for path in tokens_of(out)]


def remove(out: Path) -> None:
    """Remove the folder, to which a worker may be writing meanwhile."""
    while out.exists():
        shutil.rmtree(out, ignore_errors=True)


def take_over(out: Path) -> None:
    """Remove the folder of the first run, and claim a new folder, as a second run does at its start."""
    shutil.rmtree(out)
    (out / ".tokenize").mkdir(parents=True)
    claim(out / ".tokenize")


def tokens_of(out: Path) -> list[Path]:
    """Return the files of complete shards, without those that a worker is still writing."""
    return sorted((out / "tokens").rglob("*.lfr"))


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


GONE = "was removed or replaced during the run"
CHANGED = "files of 1 of 4 shards .* were removed or changed"
MEDDLING: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (remove, GONE),
    "moved": (lambda out: out.rename(out.with_name("elsewhere")), GONE),
    "taken over": (take_over, GONE),
    "its claim alone removed": (lambda out: (out / ".tokenize" / NAME).unlink(), GONE),
    "its claim cut": (lambda out: (out / ".tokenize" / NAME).write_text("0123"), GONE),
    "a file removed": (lambda out: tokens_of(out)[0].unlink(), CHANGED),
    "a file cut": (lambda out: tokens_of(out)[0].write_bytes(b""), CHANGED),
    "a mark removed": (lambda out: ShardRecord.path(out, 0).unlink(), CHANGED),
}

FAST = ("removed", "taken over", "a file cut")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meddling", "workers"),
    [
        *((meddling, 1) for meddling in FAST),
        *(pytest.param(meddling, 1, marks=pytest.mark.slow) for meddling in MEDDLING if meddling not in FAST),
        *(pytest.param(meddling, 2, marks=pytest.mark.slow) for meddling in ("removed", "a file removed")),
    ],
)
def test_output_replaced_during_a_run_raises_without_data_loss(meddling, workers, audio, model, whole, tmp_path):
    meddle, reason = MEDDLING[meddling]
    out = tmp_path / "out"
    is_done = False

    def watch(totals: Totals) -> None:
        nonlocal is_done
        if totals.done >= 1 and not is_done:
            is_done = True
            meddle(out)

    if workers > 1:  # a worker that starts late may not find the files of the run
        reason += "|a worker cannot start: .*No such file"
        # The removed file may be that of a shard whose record the driver has not received yet.
        reason += r"|files of shard \d are missing or changed right after they were written"
    with pytest.raises(NemoLfrError, match=reason):
        tokenize(job(audio, out, model), device="cpu", workers=workers, watch=watch)
    assert is_done and not (out / METADATA).exists()
    if meddling == "taken over":  # the folder contains only files of the second run
        assert set(files_of(out)) == {f".tokenize/{NAME}"}
        return
    done = tokenize(job(audio, out, model), device="cpu", workers=1)
    assert done["clips"] == CLIPS and len(tokens_of(out)) == CLIPS
    assert [path.read_bytes() for path in tokens_of(out)] == whole


def test_resumed_run_keeps_the_existing_claim(tmp_path):
    first = claim(tmp_path)
    assert claim(tmp_path) == first
    check_claim(tmp_path, first)
    check_claim(tmp_path / "no such folder", "")  # a shard that is tokenized outside a run has no claim
    for text in ("", "zz", "\xff" * 32, first * 2):
        (tmp_path / NAME).write_text(text, encoding="utf-8")
        with pytest.raises(NemoLfrError, match=GONE):
            check_claim(tmp_path, first)
        assert len(claim(tmp_path)) == len(first) and claim(tmp_path) != first


@pytest.mark.parametrize("function", ["check_replaceable", "_move_files"])
def test_removal_that_reaches_the_claim_last_is_reported(function, audio, model, tmp_path, monkeypatch):
    def begin_removal(*arguments: object) -> object:
        for folder in (out / "tokens", out / ".tokenize/staging"):
            shutil.rmtree(folder, ignore_errors=True)
        threading.Timer(0.1, (out / ".tokenize" / NAME).unlink).start()
        return original(*arguments)

    out = tmp_path / "out"
    original = getattr(shard, function)
    monkeypatch.setattr(shard, function, begin_removal)
    monkeypatch.setattr("nemo_lfr.corpus.claim.REMOVAL_SECONDS", 60)
    with pytest.raises(NemoLfrError, match=GONE):
        tokenize(job(audio, out, model), device="cpu", workers=1)


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError, PermissionError])
def test_error_that_no_removal_caused_is_raised_unchanged(error, tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_lfr.corpus.claim.REMOVAL_SECONDS", 0.1)
    text = claim(tmp_path)
    with pytest.raises(error, match="reason"), writing(tmp_path, text):
        raise error(17, "reason", str(tmp_path / "file"))
