"""Tests of `nemo-lfr prepare lhotse:NAME` with Lhotse's own recipes on miniature corpora."""

import json
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.cli.main import main
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io import lhotse_recipes
from nemo_lfr.training.prepare import prepare
from tests.models import RATE, synthesize

lhotse = pytest.importorskip("lhotse")


def write_ljspeech(root: Path, count: int = 3) -> Path:
    (root / "wavs").mkdir(parents=True)
    rows = []
    for index in range(count):
        soundfile.write(root / "wavs" / f"LJ00{index}.wav", synthesize(0.1), RATE)
        rows.append(f"LJ00{index}|Sentence {index}.|sentence {index}\n")
    (root / "metadata.csv").write_text("".join(rows), encoding="utf-8")
    return root


def write_yesno(root: Path) -> Path:
    root.mkdir()
    for index in range(60):  # the recipe checks the number
        soundfile.write(root / f"{'_'.join(f'{index:08b}')}.wav", synthesize(0.05), 8000)
    return root


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_recipe_without_splits(tmp_path):
    corpus = write_ljspeech(tmp_path / "corpus")
    prepare("lhotse:ljspeech", corpus, tmp_path / "out", valid_share=0.3)
    train, valid = (entries(tmp_path / "out" / f"{split}.json") for split in ("train", "valid"))
    assert {Path(entry["audio_filepath"]).relative_to(corpus).as_posix() for entry in train + valid} == {
        f"wavs/LJ00{index}.wav" for index in range(3)
    }
    assert {entry["text"] for entry in train + valid} == {f"Sentence {index}." for index in range(3)}
    assert {entry["lang"] for entry in train + valid} == {"English"} and train and valid


def test_recipe_with_splits(tmp_path):
    corpus = write_yesno(tmp_path / "corpus")
    prepare("lhotse:yesno", corpus, tmp_path / "out")
    counts = {path.stem: len(entries(path)) for path in (tmp_path / "out").glob("*.json")}
    assert counts == {"train": 29, "valid": 1, "test": 30}


def recording(corpus: Path, name: str, **changes) -> "lhotse.Recording":
    made = lhotse.Recording.from_file(corpus / "wavs" / name)
    return lhotse.utils.fastcopy(made, **changes)


def test_results_of_other_shapes(tmp_path, caplog):
    corpus = write_ljspeech(tmp_path / "corpus", 2)
    segments = [
        lhotse.SupervisionSegment(f"{start}", "LJ000", start, 0.05, speaker=speaker, text=text, language="en")
        for start, speaker, text in ((0.05, "b", "second"), (0, "a", "first"))
    ]
    outside = tmp_path / "outside.wav"
    soundfile.write(outside, synthesize(0.1), RATE)
    recordings = [
        recording(corpus, "LJ000.wav"),
        recording(corpus, "LJ001.wav").resample(8000),
        lhotse.Recording.from_file(outside),
        lhotse.utils.fastcopy(
            recording(corpus, "LJ001.wav", id="command"), sources=[lhotse.AudioSource("command", [0], "touch escaped")]
        ),
    ]
    part = {"recordings": recordings, "supervisions": segments}
    manifests = {"en": {"dev_clean": part, "train-other": {"recordings": recordings[:1]}}}
    found = list(lhotse_recipes._utterances(manifests, corpus, "mine"))
    assert [(str(utterance.path), utterance.split, utterance.speaker, utterance.labels) for utterance in found] == [
        ("wavs/LJ000.wav", "valid", "a", {"lang": "en", "text": "first second"}),
        ("wavs/LJ001.wav", "valid", "", {}),
        ("outside", "valid", "", {}),
        ("command", "valid", "", {}),
        ("wavs/LJ000.wav", "train", "", {}),
    ]
    problems = [utterance.problem or "" for utterance in found]
    expected = ["", "the recipe modifies the audio", "is not in the folder", "sources of type ['command']", ""]
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))
    assert "several supervisions" in caplog.text
    with pytest.raises(NemoLfrError, match="returns list, not recordings"):
        list(lhotse_recipes._utterances([], corpus, "mine"))


REFUSED = {
    "unknown": ("lhotse:ljspech", "no recipe 'ljspech'; did you mean ljspeech"),
    "empty": ("lhotse:", "no recipe ''"),
    "needs more": ("lhotse:dihard3", "needs other arguments besides .*eval_audio_dir"),
    "starts programs": ("lhotse:ali_meeting", "starts other programs"),
    "another corpus": ("lhotse:ljspeech", "recipe ljspeech failed .*metadata.csv"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_recipes(case, tmp_path, capsys):
    kind, message = REFUSED[case]
    (tmp_path / "corpus").mkdir()
    with pytest.raises(NemoLfrError, match=message):
        prepare(kind, tmp_path / "corpus", tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        main(["prepare", kind, str(tmp_path / "corpus"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_audio_backends_that_start_a_shell_are_removed(tmp_path):
    """A recipe opens the files in the corpus, and Lhotse would pass the name of an .sph file to a shell."""
    corpus = write_ljspeech(tmp_path / "corpus", 1)
    prepare("lhotse:ljspeech", corpus, tmp_path / "out")
    backends = lhotse.audio.backend.get_default_audio_backend().backends
    assert not [backend for backend in backends if "Subprocess" in type(backend).__name__]
