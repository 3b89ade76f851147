"""Tests of output formats and corpus readers that are registered from outside the package."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.dataset import TokenDataset
from nemo_lfr.corpus.formats import BUILT_IN, format_names, get_format, register_format
from nemo_lfr.corpus.formats.base import Damage, FormatReader, FormatWriter, OutputFormat, Row, ShardFiles
from nemo_lfr.corpus.run import tokenize
from nemo_lfr.corpus.sources import SOURCES, open_corpus, register_source
from nemo_lfr.corpus.sources.base import AudioLoader, Clip, OpenOptions
from nemo_lfr.corpus.sources.manifest import Manifest
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.journal import write_text
from nemo_lfr.pretrained import load
from tests.corpora import write_codec
from tests.models import RATE, synthesize


@register_format
class JsonFormat(OutputFormat):
    """Output format with one JSON file per shard."""

    name = "json"
    supports_context = False
    summary_files = ("shards.txt",)

    class writer(FormatWriter):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.rows: list[dict[str, Any]] = []

        def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
            row = {"id": clip.id, "tokens": tokens.tolist(), "num_samples": num_samples, "labels": clip.labels}
            self.rows.append(row)

        def close(self) -> None:
            (self.folder / f"{self.index}.json").write_text(json.dumps(self.rows))

    class reader(FormatReader):
        def count_shards(self) -> list[int]:
            return self._shard_counts(lambda files: len(self._rows(files)))

        def num_files(self) -> int:
            return len(list(self.folder.glob("*.json")))

        def rows(self, files: ShardFiles, start: int, stop: int) -> Iterator[Row | Damage]:
            for row in self._rows(files)[start:]:
                yield Row(dict, row)

        @staticmethod
        def _rows(files: ShardFiles) -> list[dict[str, Any]]:
            return json.loads(files.path(f"{files.shard}.json").read_text())

    @classmethod
    def finish(cls, out: Path, num_shards: int, context: bool) -> None:
        write_text(out / "shards.txt", f"{num_shards}\n")


class PathList(Manifest):
    """Reader for a text file with the path of an audio file on each line."""

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.suffix == ".list"

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "PathList":
        manifest = options.listing.with_suffix(".manifest")
        if options.relist:
            lines = (json.dumps({"audio_filepath": line}) for line in path.read_text().splitlines())
            write_text(manifest, "\n".join(lines) + "\n")
        return cls(manifest, path.parent)


@pytest.fixture
def path_list(tmp_path):
    """Write three recordings, and a list of them in a format that only this test registers."""
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", synthesize(0.3 + 0.1 * number), RATE)
    (tmp_path / "corpus.list").write_text("0.wav\n1.wav\n2.wav\n")
    register_source(PathList)
    yield tmp_path / "corpus.list"
    SOURCES.remove(PathList)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_registered_format_and_source_are_written_and_read_back(path_list, tmp_path, workers):
    model = write_codec(tmp_path / "model.nemo")
    config = TokenizeConfig(str(path_list), str(tmp_path / "out"), "json", model=str(model), shard_size=2)
    summary = tokenize(config, device="cpu", workers=workers)
    assert (summary["format"], summary["clips"], summary["shards"], summary["failures"]) == ("json", 3, 2, 0)
    assert (tmp_path / "out" / "shards.txt").read_text() == "2\n"
    utterances = list(TokenDataset(tmp_path / "out", verify=True))
    assert [utterance.id for utterance in utterances] == ["0", "1", "2"]
    codec = load(str(model), "cpu")
    for utterance in utterances:
        wave, _ = soundfile.read(tmp_path / f"{utterance.id}.wav", dtype="float32")
        assert torch.equal(utterance.tokens, codec.encode(wave)[0][0].long())
        assert utterance.num_samples == len(wave)


@pytest.mark.slow
def test_damage_of_a_registered_format_is_found(path_list, tmp_path):
    model = write_codec(tmp_path / "model.nemo")
    config = TokenizeConfig(str(path_list), str(tmp_path / "out"), "json", model=str(model), shard_size=2)
    tokenize(config, device="cpu", workers=1)
    (tmp_path / "out" / "1.json").write_text("[]")
    with pytest.raises(NemoLfrError, match=r"1\.json: file has 2 bytes, but \d+ were written"):
        list(TokenDataset(tmp_path / "out"))
    tokenize(config, device="cpu", workers=1)  # repairs it
    assert len(list(TokenDataset(tmp_path / "out"))) == 3


def test_registered_names_come_after_the_built_in_ones():
    assert format_names()[: len(BUILT_IN)] == BUILT_IN
    assert "json" in format_names()[len(BUILT_IN) :]
    assert all(get_format(name).name == name for name in format_names())


def test_unknown_formats_are_rejected_by_name():
    with pytest.raises(NemoLfrError, match=r"format 'text' is unknown; use one of .*'lfr'"):
        get_format("text")


def test_contexts_are_rejected_by_a_format_without_them(path_list, tmp_path):
    config = TokenizeConfig(str(path_list), str(tmp_path / "out"), "json", context=True)
    with pytest.raises(NemoLfrError, match='format "json" cannot store the tokens of context audio'):
        tokenize(config, device="cpu", workers=1)


def test_the_first_source_that_accepts_a_path_opens_it(path_list, tmp_path):
    assert isinstance(open_corpus(path_list, None, tmp_path / "listing.json"), PathList)


def _loaded(value: Any) -> AudioLoader:
    return lambda sample_rate, longest: value


def _raises(sample_rate: int, longest: float) -> np.ndarray:
    raise KeyError("boom")


GOOD = np.full(4096, 0.1, np.float32)
# Clips that a corpus reader of another package may yield by mistake, and the reason for which each of them fails.
BAD_CLIPS = {
    "id int": (Clip(7, "line 2", _loaded(GOOD)), "line 2: the id of the clip is 7; expected a non-empty string"),
    "id None": (Clip(None, "line 2", _loaded(GOOD)), "line 2: the id of the clip is None; expected a non-empty"),
    "id empty": (Clip("", "line 2", _loaded(GOOD)), "line 2: the id of the clip is ''; expected a non-empty"),
    "id above": (Clip("../b", "line 2", _loaded(GOOD)), "the id of the clip, '../b', leads out of the output folder"),
    "label set": (Clip("b", "line 2", _loaded(GOOD), labels={"x": {1}}), "a label cannot be written as JSON (Object"),
    "labels list": (Clip("b", "line 2", _loaded(GOOD), labels=[]), "the labels of the clip are a list"),
    "raises": (Clip("b", "line 2", _raises), "line 2: the audio cannot be loaded (KeyError: 'boom')"),
    "pair": (Clip("b", "line 2", _loaded((GOOD, RATE))), "the audio was loaded as tuple; the loader must return"),
    "int16": (Clip("b", "line 2", _loaded(GOOD.astype(np.int16))), "array with dtype int16 and shape [4096]"),
    "stereo": (Clip("b", "line 2", _loaded(GOOD[None])), "array with dtype float32 and shape [1, 4096]"),
    "nan": (Clip("b", "line 2", _loaded(GOOD * np.nan)), "the audio contains NaN or infinite samples"),
}


class ClipList(PathList):
    """Reader that yields two good clips around the clip `middle`, or raises it if it is an exception."""

    middle: Any = None

    def read(self, shard: dict[str, Any]) -> Iterator[Clip]:
        yield Clip("a", "line 1", _loaded(GOOD))
        if isinstance(self.middle, Exception):
            raise self.middle
        yield self.middle
        yield Clip("c", "line 3", _loaded(GOOD))


@pytest.fixture
def clip_list(path_list, monkeypatch):
    monkeypatch.setattr(SOURCES[SOURCES.index(PathList)], "open", ClipList.open.__func__.__get__(ClipList))
    return path_list


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_CLIPS)
def test_an_invalid_clip_of_another_packages_reader_costs_only_that_clip(case, clip_list, tmp_path, monkeypatch):
    clip, message = BAD_CLIPS[case]
    monkeypatch.setattr(ClipList, "middle", clip)
    model = write_codec(tmp_path / "model.nemo")
    config = TokenizeConfig(str(clip_list), str(tmp_path / "out"), "json", model=str(model))
    assert tokenize(config, device="cpu", workers=1)["failures"] == 1
    assert [utterance.id for utterance in TokenDataset(tmp_path / "out")] == ["a", "c"]
    failure = json.loads((tmp_path / "out" / "failures.jsonl").read_text())
    assert message in failure["error"] and failure["input"] == "line 2" and isinstance(failure["id"], str)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (RuntimeError("source broke"), r"corpus reader tests\S*ClipList raised RuntimeError \(source broke\)"),
        ("b", r"corpus reader tests\S*ClipList yielded a str; `read` must yield `Clip`"),
        (Clip("b", None, _raises), r"corpus reader tests\S*ClipList yielded a clip whose origin is not a string"),
    ],
)
def test_an_error_in_another_packages_reader_names_the_reader(middle, message, clip_list, tmp_path, monkeypatch):
    monkeypatch.setattr(ClipList, "middle", middle)
    model = write_codec(tmp_path / "model.nemo")
    config = TokenizeConfig(str(clip_list), str(tmp_path / "out"), "json", model=str(model))
    with pytest.raises(NemoLfrError, match=message):
        tokenize(config, device="cpu", workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["__init__", "write", "close", "finish"])
def test_an_error_in_another_packages_format_names_the_format(method, path_list, tmp_path, monkeypatch):
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError("it broke")

    monkeypatch.setattr(JsonFormat if method == "finish" else JsonFormat.writer, method, fail)
    model = write_codec(tmp_path / "model.nemo")
    config = TokenizeConfig(str(path_list), str(tmp_path / "out"), "json", model=str(model))
    message = r"the output format tests\S*JsonFormat raised ZeroDivisionError \(it broke\); correct this error"
    with pytest.raises(NemoLfrError, match=message):
        tokenize(config, device="cpu", workers=1)
