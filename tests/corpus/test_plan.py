"""Tests of planning a run: a corpus without clips is refused, whatever its format; an unfinished run is described."""

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_lfr.cli.info import describe
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.decode import decode_folder
from nemo_lfr.corpus.records import METADATA, PLAN, STATE, ShardRecord
from nemo_lfr.corpus.run import tokenize
from nemo_lfr.corpus.token_folder import TokenFolder
from nemo_lfr.errors import NemoLfrError
from tests.corpora import write_tokens


def write_parquet(path: Path, *, num_groups: int = 1) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install '.[corpus]'")
    table = arrow.table({"audio": arrow.array([], arrow.binary())})
    with parquet.ParquetWriter(path, table.schema) as writer:
        for _ in range(num_groups):
            writer.write_table(table)


def write_parquet_folder(path: Path) -> None:
    path.mkdir()
    for name in ("a.parquet", "b.parquet"):
        write_parquet(path / name)


def write_shar(path: Path) -> None:
    pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
    path.mkdir()
    gzip.open(path / "cuts.000000.jsonl.gz", "w").close()
    tarfile.open(path / "recording.000000.tar", "w").close()


def write_cuts(path: Path) -> None:
    pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
    gzip.open(path, "w").close()


def write_dataset(path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    features = datasets.Features({"audio": datasets.Value("string")})
    datasets.Dataset.from_dict({"audio": []}, features=features).save_to_disk(path)


EMPTY: dict[str, tuple[str, Callable[[Path], object]]] = {
    "manifest": ("a.json", lambda path: path.write_text("\n")),
    "table": ("a.csv", lambda path: path.write_text("path,text\n")),
    "folder": ("folder", Path.mkdir),
    "Parquet": ("a.parquet", write_parquet),
    "Parquet without row groups": ("a.parquet", lambda path: write_parquet(path, num_groups=0)),
    "Parquet folder": ("tables", write_parquet_folder),
    "cuts": ("cuts.jsonl.gz", write_cuts),
    "Shar": ("shar", write_shar),
    "saved dataset": ("dataset", write_dataset),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_corpus_without_clips_is_refused(kind, model, tmp_path):
    name, write = EMPTY[kind]
    write(tmp_path / name)
    config = TokenizeConfig(str(tmp_path / name), str(tmp_path / "out"), "lfr", model=str(model))
    with pytest.raises(NemoLfrError, match=f"{name}: .*(no (clips|rows|audio|Lhotse)|without rows|not a NeMo)"):
        tokenize(config, device="cpu", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["shar", "manifest", "parquet", "lfr"])
def test_tokens_without_utterances_are_not_decoded_to_nothing(kind, model, tmp_path):
    write_tokens(tmp_path / "tokens", kind, [0], model)
    with pytest.raises(NemoLfrError, match="tokens: this folder has no utterances"):
        next(decode_folder(tmp_path / "tokens", tmp_path / "out", model=str(model)))


@pytest.mark.parametrize(
    ("plan", "text"),
    [('{"parts": [{}, {}, {}]}', "2 of 3 shards are complete"), (None, "2 shards are complete"), ("{", "2 shards")],
)
def test_an_unfinished_run_is_described(plan, text, tmp_path):
    write_tokens(tmp_path, "lfr", [1, 1])
    (tmp_path / METADATA).unlink()
    if plan is not None:
        (tmp_path / STATE / PLAN).write_text(plan)
    ShardRecord.folder(tmp_path).joinpath(".writing-x.json").write_text("")
    figures = describe(str(tmp_path))
    assert figures["kind"] == "unfinished_tokens" and text in json.dumps(figures)
    assert "same nemo-lfr tokenize command again" in json.dumps(figures)
    with pytest.raises(NemoLfrError, match=rf"the tokenize run is not finished \({text}.*same nemo-lfr tokenize"):
        TokenFolder(tmp_path)
