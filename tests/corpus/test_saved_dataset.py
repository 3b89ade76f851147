"""Tests of saved Hugging Face datasets that are incomplete, or have one split."""

import json
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.corpus.sources import open_corpus
from nemo_lfr.errors import ConfigError
from tests.models import RATE, synthesize
from tests.packages import require

require("datasets", reason="pip install datasets")


def clips_of(path: Path) -> list:
    corpus = open_corpus(path, None, path.parent / "unused.json")
    return [clip for part in corpus.shards(100) for clip in corpus.read(part)]


@pytest.fixture
def rows(tmp_path):
    soundfile.write(tmp_path / "a.wav", synthesize(0.2), RATE)
    data = (tmp_path / "a.wav").read_bytes()
    from datasets import Dataset  # takes 1 s

    return Dataset.from_dict({"audio": [data] * 6, "text": list("abcdef")})


def without_end_mark(folder: Path) -> None:
    path = folder / "data-00001-of-00003.arrow"
    path.write_bytes(path.read_bytes()[:-8])


def unlisted_file(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    del state["_data_files"][1]
    (folder / "state.json").write_text(json.dumps(state))


INCOMPLETE = {
    "no end mark": (without_end_mark, r"data-00001-of-00003\.arrow: the Arrow file is truncated"),
    "a missing file": (lambda folder: (folder / "data-00001-of-00003.arrow").unlink(), "data-00001-of-00003.arrow"),
    "a file that is not listed": (unlisted_file, r"saved: files are missing: data-00001-of-00003\.arrow;"),
    "no state": (lambda folder: (folder / "state.json").unlink(), r"saved dataset without its state\.json"),
    "no info": (lambda folder: (folder / "dataset_info.json").unlink(), "cannot read this folder"),
}


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_an_incomplete_saved_dataset_is_refused(kind, rows, tmp_path):
    damage, problem = INCOMPLETE[kind]
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    assert len(clips_of(tmp_path / "saved")) == 6
    damage(tmp_path / "saved")
    with pytest.raises(ConfigError, match=problem) as error:
        clips_of(tmp_path / "saved")
    assert "\n" not in str(error.value)


def test_filtered_and_selected_rows_are_complete(rows, tmp_path):
    rows.select([4, 0]).save_to_disk(tmp_path / "selected")
    rows.filter(lambda row: row["text"] > "b").shuffle(seed=1).save_to_disk(tmp_path / "filtered")
    assert [len(clips_of(tmp_path / name)) for name in ("selected", "filtered")] == [2, 4]


def test_the_only_split_is_read(rows, tmp_path):
    from datasets import DatasetDict

    DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    assert [clip.labels["text"] for clip in clips_of(tmp_path / "saved")] == list("abcdef")
    for content in ('{"splits": ["../x"]}', '{"splits": 5}', "{", "[]"):
        (tmp_path / "saved" / "dataset_dict.json").write_text(content)
        with pytest.raises(ConfigError, match=r"dataset_dict\.json: "):
            clips_of(tmp_path / "saved")
