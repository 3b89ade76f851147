"""Tests of `nemo-lfr prepare`: small corpora in their published layouts, broken files and interruption."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.cli.main import main
from nemo_lfr.errors import Failure, NemoLfrError
from nemo_lfr.io.layouts import LAYOUTS, CorpusUtterance, hold_out
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.training import prepare as module
from nemo_lfr.training.prepare import EXPECTED, prepare
from tests.models import RATE, synthesize


def audio(path: Path, seconds: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, synthesize(seconds), RATE)


def text(path: Path, contents: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(contents, encoding="utf-8")


def librispeech(root: Path) -> None:
    for part, speaker in (("train-clean-100", "19"), ("dev-clean", "84"), ("test-other", "367")):
        chapter = root / "LibriSpeech" / part / speaker / "1"
        text(chapter / f"{speaker}-1.trans.txt", f"{speaker}-1-0000 HELLO THERE\n{speaker}-1-0001 AGAIN\n")
        for number in range(2):
            audio(chapter / f"{speaker}-1-000{number}.flac")


def mls(root: Path) -> None:
    for split, speaker, kind in (("train", "10", ".flac"), ("dev", "11", ".opus"), ("test", "12", ".flac")):
        folder = root / "mls_german" / split
        text(folder / "transcripts.txt", f"{speaker}_7_000000\tguten tag\n")
        path = folder / "audio" / speaker / "7" / f"{speaker}_7_000000{kind}"
        path.parent.mkdir(parents=True)
        if kind == ".opus":
            soundfile.write(path, synthesize(0.5), 24000, format="OGG", subtype="OPUS")
        else:
            audio(path)


def commonvoice(root: Path) -> None:
    language = root / "cv-corpus-17.0" / "pl"
    for split in ("train", "dev", "test"):
        rows = ["client_id\tpath\tsentence\tup_votes\tlocale", f'{split}er\t{split}.mp3\tpowiedział "tak\t2\tpl']
        text(language / f"{split}.tsv", "\n".join(rows) + "\n")
        audio(language / "clips" / f"{split}.mp3")


def vctk(root: Path) -> None:
    for speaker in (f"p{number}" for number in range(225, 265)):
        audio(root / "wav48_silence_trimmed" / speaker / f"{speaker}_001_mic1.flac", 0.1)
        audio(root / "wav48_silence_trimmed" / speaker / f"{speaker}_001_mic2.flac", 0.1)
        text(root / "txt" / speaker / f"{speaker}_001.txt", "Please call Stella.\n")


def folder(root: Path) -> None:
    for index in range(60):
        audio(root / f"{index}.wav", 0.1)
    text(root / "3.txt", "drei")


MAKE = {"librispeech": librispeech, "mls": mls, "commonvoice": commonvoice, "vctk": vctk, "folder": folder}


def manifest(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def name_of(entry: dict) -> str:
    """Return the path of an entry's audio file relative to the folder named `corpus`."""
    path = Path(entry["audio_filepath"])
    assert path.is_absolute()
    return path.as_posix().rpartition("/corpus/")[2]


def test_every_layout_is_tested():
    assert {*MAKE, "table"} == {*LAYOUTS}


@pytest.mark.parametrize("kind", MAKE)
def test_a_published_layout_becomes_manifests_that_training_reads(tmp_path, kind):
    MAKE[kind](tmp_path / "corpus")
    prepare(kind, tmp_path / "corpus", tmp_path / "out", valid_share=0.1)
    entries = {split: manifest(tmp_path / "out" / f"{split}.json") for split in ("train", "valid")}
    expected = {"librispeech": 2, "mls": 1, "commonvoice": 1}
    if kind in expected:
        entries["test"] = manifest(tmp_path / "out" / "test.json")
        assert {split: len(own) for split, own in entries.items()} == dict.fromkeys(entries, expected[kind])
    else:
        total = len(entries["train"]) + len(entries["valid"])
        assert total == (40 if kind == "vctk" else 60) and 0 < len(entries["valid"]) < 0.3 * total
    if kind != "folder":
        speakers = [{entry["speaker"] for entry in own} for own in entries.values()]
        assert not set.intersection(*speakers) and all(entry["text"] for own in entries.values() for entry in own)
        languages = {"mls": "german", "commonvoice": "pl"}
        assert {entry["lang"] for entry in entries["train"]} == {languages.get(kind, "en")}
    for split, own in entries.items():
        recordings = read_manifest(tmp_path / "out" / f"{split}.json", None, kind)
        assert [recording.duration for recording in recordings] == [entry["duration"] for entry in own]
        for recording in recordings:
            assert soundfile.info(recording.path).duration == pytest.approx(recording.duration, abs=1e-3)
    assert not (tmp_path / "out" / "failures.jsonl").exists()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json"}


# How the corpus is named, as a function of its path.
NAMES = {
    "relative": lambda path: Path(path.name),
    "absolute": lambda path: path,
    "by a link": lambda path: path / ".." / "link",
}


@pytest.mark.parametrize("name", NAMES)
def test_manifests_can_be_used_in_any_folder_and_by_nemo(tmp_path, monkeypatch, name):
    audio(tmp_path / "corpus" / "sub" / "a.wav", 0.1)
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    result = prepare("folder", NAMES[name](tmp_path / "corpus"), Path("out"), valid_share=0)
    (tmp_path / "other").mkdir()
    moved = (tmp_path / "out" / "train.json").rename(tmp_path / "other" / "train.json")
    monkeypatch.chdir(tmp_path / "other")
    (entry,) = manifest(moved)
    path = Path(entry["audio_filepath"])
    assert (
        path.is_absolute() and path.is_file() and path.is_relative_to(result.audio_dir)
    )  # NeMo asks for the last one
    (whole,) = read_manifest(moved)
    (named,) = read_manifest(moved, result.audio_dir)
    assert whole.path == named.path == path and whole.name == path and named.name == Path("sub/a.wav")


def test_files_that_cannot_be_used_are_listed_with_the_reason(tmp_path):
    librispeech(tmp_path / "corpus")
    chapter = tmp_path / "corpus" / "LibriSpeech" / "train-clean-100" / "19" / "1"
    (chapter / "19-1-0000.flac").write_bytes(b"fLaC")
    (tmp_path / "corpus" / "LibriSpeech" / "dev-clean" / "84" / "1" / "84-1-0001.flac").unlink()
    result = prepare("librispeech", tmp_path / "corpus", tmp_path / "out")
    failures = {Path(entry["input"]).name: entry["error"] for entry in manifest(tmp_path / "out/failures.jsonl")}
    assert failures.keys() == {"19-1-0000.flac", "84-1-0001.flac"}
    assert "not an audio file" in failures["19-1-0000.flac"] and "no such file" in failures["84-1-0001.flac"]
    assert [len(manifest(tmp_path / "out" / f"{split}.json")) for split in ("train", "valid", "test")] == [1, 1, 2]
    assert len(result.failures) == 2


@pytest.mark.parametrize("check", [True, False])
def test_file_that_needs_an_extra_fails_alone(tmp_path, monkeypatch, check):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "corpus").mkdir()
    soundfile.write(tmp_path / "corpus" / "a.wav", synthesize(1), RATE)
    (tmp_path / "corpus" / "b.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(500))
    prepare("folder", tmp_path / "corpus", tmp_path / "out", check=check)
    (failure,) = manifest(tmp_path / "out" / "failures.jsonl")
    assert failure["input"] == "b.m4a" and "need PyAV" in failure["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_a_name_that_is_not_utf8_survives_the_manifest(tmp_path):
    (tmp_path / "corpus").mkdir()
    name = os.fsdecode(b"a\xff.wav")
    with open(tmp_path / "corpus" / name, "wb") as file:
        soundfile.write(file, np.zeros(100), 16_000, format="WAV")
    prepare("folder", tmp_path / "corpus", tmp_path / "out", valid_share=0)
    (recording,) = read_manifest(tmp_path / "out" / "train.json", tmp_path / "corpus")
    assert recording.path == tmp_path / "corpus" / name


def test_a_resumed_run_opens_only_the_remaining_files(tmp_path, monkeypatch):
    folder(tmp_path / "corpus")
    opened = []
    duration = module._decoded_duration

    def interrupted(corpus: Path, name: str) -> float | Failure:
        if len(opened) == 20:
            raise KeyboardInterrupt
        opened.append(name)
        return duration(corpus, name)

    monkeypatch.setattr(module, "_decoded_duration", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("folder", tmp_path / "corpus", tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "train.json").exists()
    with open(tmp_path / "out" / module.JOURNAL, "a") as journal:
        journal.write('["7.wa')  # the state after a kill
    monkeypatch.setattr(module, "_decoded_duration", lambda *path: opened.append(path[1]) or duration(*path))
    prepare("folder", tmp_path / "corpus", tmp_path / "out", workers=1)
    assert sorted(opened) == sorted(set(opened)) and len(opened) == 60
    total = sum(len(manifest(tmp_path / "out" / f"{split}.json")) for split in ("train", "valid"))
    assert total == 60


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("change", ["longer", "same size", "touched", "removed"])
def test_a_file_replaced_since_an_interrupted_run_is_opened_again(tmp_path, monkeypatch, change, check):
    path = tmp_path / "corpus" / "a.wav"
    audio(path, 0.5)
    audio(tmp_path / "corpus" / "b.wav", 0.5)
    monkeypatch.setattr(module, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare("folder", tmp_path / "corpus", tmp_path / "out", valid_share=0, check=check)
    monkeypatch.undo()
    if change == "removed":
        path.unlink()
        audio(tmp_path / "corpus" / "c.wav", 0.5)
    elif change == "longer":
        audio(path, 1.0)
    elif change == "same size":
        soundfile.write(path, synthesize(0.5), RATE // 2)
    os.utime(path, (1e9, 1e9)) if path.exists() else None
    prepare("folder", tmp_path / "corpus", tmp_path / "out", valid_share=0, check=check)
    durations = {name_of(entry): entry["duration"] for entry in manifest(tmp_path / "out" / "train.json")}
    expected = {"longer": 1.0, "same size": 1.0, "touched": 0.5}
    assert durations.pop("a.wav", None) == expected.get(change)
    assert set(durations.values()) == {0.5}


def test_failed_files_are_opened_again(tmp_path):
    for index in range(2):
        text(tmp_path / "corpus" / f"{index}.wav", "not yet unpacked")
    with pytest.raises(NemoLfrError, match=r"no file in the corpus can be used; .*failures\.jsonl lists"):
        prepare("folder", tmp_path / "corpus", tmp_path / "out")
    for index in range(2):
        audio(tmp_path / "corpus" / f"{index}.wav")
    result = prepare("folder", tmp_path / "corpus", tmp_path / "out")
    assert {"train", "valid"} == result.splits.keys()
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_another_corpus_does_not_reuse_results_of_an_interrupted_run(tmp_path, monkeypatch):
    for name, seconds in (("a", 0.5), ("b", 1.0)):
        for index in range(3):
            audio(tmp_path / name / f"{index}.wav", seconds)
    monkeypatch.setattr(module, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare("folder", tmp_path / "a", tmp_path / "out")
    monkeypatch.undo()
    prepare("folder", tmp_path / "b", tmp_path / "out")
    entries = [entry for split in ("train", "valid") for entry in manifest(tmp_path / "out" / f"{split}.json")]
    assert [entry["duration"] for entry in entries] == [1.0] * 3


@pytest.mark.slow
def test_a_folder_has_the_manifests_of_one_run_only(tmp_path):
    out = tmp_path / "out"
    folder(tmp_path / "corpus")
    prepare("folder", tmp_path / "corpus", out, valid_share=0.5)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(NemoLfrError, match="json exists; pass --overwrite"):
        prepare("folder", tmp_path / "corpus", out, valid_share=0)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    prepare("folder", tmp_path / "corpus", out, valid_share=0, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"train.json"}


@pytest.mark.parametrize("speakers", [1, 2, 5, 10])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.999])
def test_hold_out_leaves_both_splits_nonempty(speakers, share):
    few = [
        CorpusUtterance(Path(f"{speaker}/{index}.wav"), f"s{speaker}")
        for speaker in range(speakers)
        for index in range(2)
    ]
    assert {utterance.split for utterance in hold_out(few, share)} == {"train", "valid"}
    assert {utterance.split for utterance in hold_out(few, 1.0)} == {"valid"}


@pytest.mark.parametrize("damaged", ["", "a", "b", "c", "ab", "bc", "ac"])
def test_usable_files_are_split_whatever_files_are_damaged(tmp_path, damaged):
    for name in "abc":
        audio(tmp_path / "c" / f"{name}.wav", 0.1)
    for name in damaged:
        (tmp_path / "c" / f"{name}.wav").write_bytes(b"RIFF")
    splits = prepare("folder", tmp_path / "c", tmp_path / "out", valid_share=0.9).splits
    assert splits.keys() == ({"train"} if len(damaged) == 2 else {"train", "valid"})
    assert sum(split.utterances for split in splits.values()) == 3 - len(damaged)


def test_unpublished_corpus_layout_is_a_one_line_error(tmp_path, monkeypatch):
    librispeech(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path / "corpus" / "LibriSpeech" / "dev-clean")
    assert "valid" in prepare("librispeech", Path("."), tmp_path / "out").splits
    text(tmp_path / "cv" / "pl" / "train.tsv", "client_id\tpath\nme\ta.mp3\n")
    text(tmp_path / "mls" / "mls_polish" / "train" / "transcripts.txt", "name\ttext\n")
    for kind in ("commonvoice", "mls"):
        with pytest.raises(NemoLfrError, match=f"not the published layout of {kind} .*; expected .*/"):
            prepare(kind, tmp_path / {"commonvoice": "cv"}.get(kind, kind), tmp_path / "out")


TRANSCRIPTS = {
    "Latin-1": "caf\u00e9".encode("latin-1"),
    "UTF-16": "\ufeffhello".encode("utf-16-le"),
    "of NUL bytes": b"hel\0lo",
    "a folder": None,
}


@pytest.mark.parametrize("kind", TRANSCRIPTS)
def test_invalid_transcript_fails_only_its_clip(tmp_path, kind):
    for name in "abc":
        audio(tmp_path / "corpus" / f"{name}.wav", 0.1)
        text(tmp_path / "corpus" / f"{name}.txt", f"text of {name}")
    (tmp_path / "corpus" / "b.txt").unlink()
    if (data := TRANSCRIPTS[kind]) is None:
        (tmp_path / "corpus" / "b.txt").mkdir()
    else:
        (tmp_path / "corpus" / "b.txt").write_bytes(data)
    (tmp_path / "corpus" / "c.txt").write_bytes(b"\xef\xbb\xbftext of c\r\n")
    prepare("folder", tmp_path / "corpus", tmp_path / "out", valid_share=0)
    entries = manifest(tmp_path / "out" / "train.json")
    assert {name_of(entry): entry["text"] for entry in entries} == {
        "a.wav": "text of a",
        "c.wav": "text of c",
    }
    (failure,) = manifest(tmp_path / "out" / "failures.jsonl")
    assert failure["input"] == "b.wav" and failure["error"].startswith("the transcript b.txt: ")


ROWS = {
    "too few fields": b"s2\n",
    "too many fields": b"s2\tc2.mp3\thallo\tde\tmore\n",
    "a long field": b"s2\tc2.mp3\t" + b"z" * 200_000 + b"\tde\n",
    "NUL bytes": b"s2\tc2.mp3\tha\0llo\tde\n",
    "Latin-1": "s2\tc2.mp3\tgr\u00fc\u00df\tde\n".encode("latin-1"),
    "an absolute path": b"s2\t/c2.mp3\thallo\tde\n",
    "a path that leads out": b"s2\t../../c2.mp3\thallo\tde\n",
    "no path": b"s2\t\thallo\tde\n",
}


@pytest.mark.parametrize("kind", ROWS)
def test_invalid_row_of_common_voice_fails_only_its_clip(tmp_path, kind):
    language = tmp_path / "cv" / "de"
    for number in (1, 3):
        audio(language / "clips" / f"c{number}.mp3")
    header = b"\xef\xbb\xbfclient_id\tpath\tsentence\tlocale\r\n"
    rows = b's1\tc1.mp3\ter sagte "hallo\tde\r\n' + ROWS[kind] + b"s3\tc3.mp3\tdu\tde\r\n"
    (language / "train.tsv").write_bytes(header + rows)
    prepare("commonvoice", tmp_path / "cv", tmp_path / "out")
    entries = manifest(tmp_path / "out" / "train.json")
    assert [(entry["speaker"], entry["text"]) for entry in entries] == [("s1", 'er sagte "hallo'), ("s3", "du")]
    assert {entry["lang"] for entry in entries} == {"de"}
    (failure,) = manifest(tmp_path / "out" / "failures.jsonl")
    assert failure["input"] == "de/train.tsv, line 3"


def test_spontaneous_speech_is_common_voice_too(tmp_path):
    language = tmp_path / "sps" / "en"
    for name in ("a", "b", "c"):
        audio(language / "audios" / f"{name}.mp3")
    rows = ["s1\ta.mp3\thello\ten\ttrain", "s2\tb.mp3\t\ten\tdev", "s3\tc.mp3\tthere\ten\t"]
    header = "client_id\taudio_file\ttranscription\tlanguage\tsplit"
    text(language / "ss-corpus-en.tsv", "\n".join([header, *rows]) + "\n")
    text(language / "ss-reported-audios-en.tsv", "reason\n")
    prepare("commonvoice", tmp_path / "sps", tmp_path / "out", valid_share=0)
    entries = [entry for split in ("train", "valid") for entry in manifest(tmp_path / "out" / f"{split}.json")]
    assert [(entry["speaker"], entry.get("text")) for entry in entries] == [
        ("s1", "hello"),
        ("s3", "there"),
        ("s2", None),
    ]


def test_invalid_line_of_a_transcript_fails_only_its_clip(tmp_path):
    librispeech(tmp_path / "ls")
    path = tmp_path / "ls" / "LibriSpeech" / "train-clean-100" / "19" / "1" / "19-1.trans.txt"
    path.write_bytes(b"19-1-0000 HELLO \xe9\n19-1-0001 AGAIN\n")
    mls(tmp_path / "mls")
    path = tmp_path / "mls" / "mls_german" / "train" / "transcripts.txt"
    path.write_bytes(path.read_bytes() + b"nonsense\n10_7_000000\tgr\xfc\xdf\n")
    for kind, bad in (("ls", 1), ("mls", 2)):
        prepare({"ls": "librispeech"}.get(kind, kind), tmp_path / kind, tmp_path / f"{kind}-out")
        assert len(manifest(tmp_path / f"{kind}-out" / "train.json")) == 1
        assert len(manifest(tmp_path / f"{kind}-out" / "failures.jsonl")) == bad


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../../a_b_c", "a_b/_c", "a_b_" + "c" * 300, "a_" + "b/" * 3000 + "_c"]
)
def test_invalid_file_name_in_a_transcript_fails_only_its_line(tmp_path, name):
    librispeech(tmp_path / "ls")
    path = tmp_path / "ls" / "LibriSpeech" / "train-clean-100" / "19" / "1" / "19-1.trans.txt"
    path.write_text(f"{path.read_text().strip()}\n{name} AGAIN\n")
    mls(tmp_path / "mls")
    path = tmp_path / "mls" / "mls_german" / "train" / "transcripts.txt"
    path.write_text(f"{path.read_text().strip()}\n{name}\tnoch einmal\n")
    for kind, layout, words in (("ls", "librispeech", " is not a valid file name"), ("mls", "mls", " should be ")):
        prepare(layout, tmp_path / kind, tmp_path / f"{kind}-out")
        assert manifest(tmp_path / f"{kind}-out" / "train.json")
        (failure,) = manifest(tmp_path / f"{kind}-out" / "failures.jsonl")
        assert words in failure["error"] and ", line " in failure["input"]


def test_growing_corpus_keeps_its_validation_speakers():
    many = [
        CorpusUtterance(Path(f"{speaker}/{index}.wav"), str(speaker)) for speaker in range(500) for index in range(2)
    ]
    held = {utterance.speaker for utterance in hold_out(many, 0.1) if utterance.split == "valid"}
    assert 30 < len(held) < 70
    fewer = hold_out(many[:600], 0.1)
    assert {utterance.speaker for utterance in fewer if utterance.split == "valid"} == held & set(map(str, range(300)))
    given = CorpusUtterance(Path("a.wav"), "a", "test")
    assert hold_out([given], 1.0) == [given]


@pytest.mark.parametrize("kind", MAKE)
def test_a_folder_without_such_a_corpus_is_refused_with_its_layout(tmp_path, kind):
    wanted = "audio file" if kind == "folder" else f"utterance of {kind}"
    expected = rf"no {wanted} in this folder(, which contains a\.wav, dev with 2 audio files .*)?; expected "
    for _ in range(2):
        if kind != "folder" or not (tmp_path / "a.wav").exists():
            with pytest.raises(NemoLfrError, match=expected) as error:
                prepare(kind, tmp_path, tmp_path / "out")
            assert EXPECTED[kind] in str(error.value) and "\n" not in str(error.value)
        audio(tmp_path / "a.wav", 0.1)
        audio(tmp_path / "dev" / "b.wav", 0.1)
    with pytest.raises(NemoLfrError, match="no such folder"):
        prepare(kind, tmp_path / "none", tmp_path / "out")


@pytest.mark.slow
def test_command_reports_its_output_and_the_failures(tmp_path, capsys):
    folder(tmp_path / "corpus")
    (tmp_path / "corpus" / "bad.wav").write_bytes(b"no")
    with pytest.raises(SystemExit, match="1"):
        main(["prepare", "folder", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), "--json"])
    output = capsys.readouterr()
    assert json.loads(output.out)["audio_dir"] == str(tmp_path / "corpus")
    assert "bad.wav: not an audio file" in output.err and output.err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "folder", str(tmp_path / "out"), "--out", str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert "no audio file in this folder" in error.splitlines()[-1]


DAMAGE = {
    "cut in the middle": lambda data: data[: len(data) // 2],
    "overwritten in the middle": lambda data: data[: len(data) // 2] + bytes(3000) + data[len(data) // 2 + 3000 :],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_files_are_decoded_to_their_end_unless_headers_are_trusted(tmp_path, kind):
    for name in "ab":
        audio(tmp_path / "corpus" / f"{name}.flac", 2.0)
    data = (tmp_path / "corpus" / "b.flac").read_bytes()
    (tmp_path / "corpus" / "b.flac").write_bytes(DAMAGE[kind](data))
    prepare("folder", tmp_path / "corpus", tmp_path / "out", valid_share=0)
    assert [name_of(entry) for entry in manifest(tmp_path / "out" / "train.json")] == ["a.flac"]
    (failure,) = manifest(tmp_path / "out" / "failures.jsonl")
    assert failure["input"] == "b.flac" and failure["error"]
    prepare("folder", tmp_path / "corpus", tmp_path / "trusted", valid_share=0, check=False)
    # A truncated FLAC can be detected by its last frame, without decoding.
    assert len(manifest(tmp_path / "trusted" / "train.json")) == (1 if kind == "cut in the middle" else 2)


@pytest.mark.parametrize("kind", ["librispeech", "commonvoice"])
def test_a_file_that_is_listed_twice_is_used_once(tmp_path, kind):
    if kind == "librispeech":
        audio(tmp_path / "c" / "dev-clean" / "84" / "1" / "84-1-0.flac")
        text(tmp_path / "c" / "dev-clean" / "84" / "1" / "84-1.trans.txt", "84-1-0 HI\n84-1-0 HI\n")
        expected = {"valid": 1}
    else:
        audio(tmp_path / "c" / "en" / "clips" / "a.wav")
        rows = "client_id\tpath\tsentence\tlocale\ns\ta.wav\thi\ten\n"
        text(tmp_path / "c" / "en" / "train.tsv", rows + "s\ta.wav\thi\ten\n")
        text(tmp_path / "c" / "en" / "dev.tsv", rows)
        expected = {"valid": 1}  # and not in the training set
    prepare(kind, tmp_path / "c", tmp_path / "out")
    found = {path.stem: len(manifest(path)) for path in (tmp_path / "out").glob("*.json")}
    assert found == expected
    failures = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert len(failures) == (1 if kind == "librispeech" else 2) and all("more than once" in line for line in failures)


def test_invalid_entries_of_a_journal_are_ignored(tmp_path):
    corpus, out = tmp_path / "c", tmp_path / "out"
    for name in "abcd":
        audio(corpus / f"{name}.wav", 0.5)
    out.mkdir()
    claim = json.dumps({"kind": "folder", "corpus": str(corpus.resolve()), "check": True})
    bad = [
        "5",
        "[]",
        '["x"]',
        '["a.wav", null]',
        '["b.wav", -5]',
        '["c.wav", 1e400]',
        '["d.wav", true]',
        '{"a": 1}',
        '["a.wav", 7]',
    ]
    bad += ['["a.wav", 7, 0, 0]', '["b.wav", 7, "x", null]', '["c.wav", 7, 1, 2, 3]']
    (out / ".opened.jsonl").write_text("\n".join([claim, *bad]) + "\n")
    prepare("folder", corpus, out, valid_share=0)
    assert [entry["duration"] for entry in manifest(out / "train.json")] == [0.5] * 4


def splits_of(out: Path) -> dict[str, list[str]]:
    """Return the names of the files by split."""
    entries = {path.stem: manifest(path) for path in sorted(out.glob("*.json"))}
    return {split: [name_of(entry) for entry in own] for split, own in entries.items()}


# Layouts of published corpora, with the depth of the speakers' folders.
TREES = {
    "LibriSpeech": (["dev-clean/84/1/a.wav", "dev-clean/84/2/b.wav", "dev-clean/85/1/c.wav"], 2, ["84", "84", "85"]),
    "VCTK": (["wav48/p225/a.wav", "wav48/p225/b.wav", "wav48/p226/c.wav"], 2, ["p225", "p225", "p226"]),
    "Common Voice": (["clips/a.wav", "clips/b.wav"], None, ["", ""]),
    "LJSpeech": (["wavs/a.wav", "wavs/b.wav"], None, ["", ""]),
    "speakers": (["ann/a.wav", "ben/b.wav", "c.wav"], 1, ["ann", "ben", ""]),
}


@pytest.mark.parametrize("tree", TREES)
def test_a_folder_is_a_speaker_only_on_request(tmp_path, tree, capsys):
    names, level, speakers = TREES[tree]
    for name in names:
        audio(tmp_path / "corpus" / name, 0.05)
    command = ["prepare", "folder", str(tmp_path / "corpus"), "--valid-share", "0", "--out"]
    main([*command, str(tmp_path / "out")])
    assert {entry["speaker"] for entry in manifest(tmp_path / "out" / "train.json")} == {""}
    assert "0 speakers" in (output := capsys.readouterr().out) and "--speaker-level" in output
    if level is not None:
        main([*command, str(tmp_path / "named"), "--speaker-level", str(level)])
        found = {name_of(entry): entry["speaker"] for entry in manifest(tmp_path / "named" / "train.json")}
        assert found == dict(zip(names, speakers, strict=True))
        assert "--speaker-level" not in capsys.readouterr().out


def test_folders_without_speakers_are_held_out_together():
    many = [CorpusUtterance(Path(f"{name}/{index}.wav"), "") for name in range(100) for index in range(3)]
    held = [utterance.path.parent for utterance in hold_out(many, 0.1) if utterance.split == "valid"]
    assert len(held) == 3 * len(set(held)) and 1 <= len(set(held)) < 30
    few = [CorpusUtterance(Path(f"{name}/{index}.wav"), "") for name in "ab" for index in range(100)]
    assert 0 < sum(utterance.split == "valid" for utterance in hold_out(few, 0.02)) < 20


def test_speaker_level_is_refused_for_other_layouts(tmp_path):
    vctk(tmp_path / "corpus")
    with pytest.raises(NemoLfrError, match="only valid for the layout 'folder'"):
        prepare("vctk", tmp_path / "corpus", tmp_path / "out", speaker_level=1)


@pytest.mark.parametrize(("name", "remedy"), [("ann/a.wav", "pass a number from 1 to 1, or"), ("a.wav", "")])
def test_speaker_level_below_the_files_is_refused(tmp_path, name, remedy):
    audio(tmp_path / "corpus" / name, 0.05)
    with pytest.raises(
        NemoLfrError, match=rf"is 5, but the audio files are at most \d folders? deep; {remedy}"
    ) as error:
        prepare("folder", tmp_path / "corpus", tmp_path / "out", speaker_level=5)
    assert str(error.value).endswith(" remove it.") and not (tmp_path / "out").exists()


SPLIT_NAMES = {
    "train": ("train", "TRAIN", "training", "train-clean-100", " train"),
    "valid": ("valid", "validation", "Validation", "val", "dev", "dev_clean", "development"),
    "test": ("test", "TEST", " test", "testing", "test-other", "eval", "evaluation"),
    None: ("other", "validated", "traindata", "7", "trial"),
}


@pytest.mark.parametrize(("split", "name"), [(split, name) for split, names in SPLIT_NAMES.items() for name in names])
def test_a_split_in_a_table_is_understood_or_refused(tmp_path, split, name):
    for file in "ab":
        audio(tmp_path / "corpus" / f"{file}.wav", 0.05)
    text(tmp_path / "corpus" / "t.csv", f"file_name,split\na.wav,train\nb.wav,{name}\n")
    result = prepare("table", tmp_path / "corpus" / "t.csv", tmp_path / "out", valid_share=0)
    found = {file: key for key, files in splits_of(tmp_path / "out").items() for file in files}
    assert found == {"a.wav": "train"} | ({"b.wav": split} if split else {})
    assert [failure["input"] for failure in result.failures] == ([] if split else ["t.csv, line 3"])


FOLDER_SPLITS = {
    "AudioFolder": (["train/a.wav", "validation/b.wav", "test/c.wav"], {"train": 1, "valid": 1, "test": 1}),
    "parts": (["train-clean/1/a.wav", "dev-clean/2/b.wav", "test-other/3/c.wav"], {"train": 1, "valid": 1, "test": 1}),
    "no validation": (
        ["train/a.wav", "train/b.wav", "train/d.wav", "test/c.wav"],
        {"train": 2, "valid": 1, "test": 1},
    ),
    "only train": (["train/a.wav", "train/b.wav", "train/c.wav"], {"train": 2, "valid": 1}),
    "below": (["data/train/a.wav", "data/dev/b.wav", "data/test/c.wav"], {"train": 1, "valid": 1, "test": 1}),
    "no splits": (["clean/a.wav", "noisy/b.wav", "c.wav"], {"train": 2, "valid": 1}),
    "only test": (["clean/a.wav", "noisy/b.wav", "test/c.wav"], {"train": 1, "valid": 1, "test": 1}),
    "only valid": (["a.wav", "clean/b.wav", "noisy/c.wav", "dev/d.wav"], {"train": 3, "valid": 1}),
    "valid and test": (["a.wav", "b/b.wav", "val/c.wav", "test/d.wav"], {"train": 2, "valid": 1, "test": 1}),
    "train and others": (["train/a.wav", "more/b.wav"], {"train": 1, "valid": 1}),
    "all in one": (["test/a.wav", "test/b.wav", "test/x/c.wav"], {"train": 2, "valid": 1}),
}


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize("tree", FOLDER_SPLITS)
def test_folders_of_splits_are_kept_apart(tmp_path, tree, metadata, caplog):
    names, expected = FOLDER_SPLITS[tree]
    for name in names:
        audio(tmp_path / "corpus" / name, 0.05)
        if metadata:
            with open((tmp_path / "corpus" / name).parent / "metadata.jsonl", "a") as file:
                file.write(json.dumps({"file_name": Path(name).name, "text": "t"}) + "\n")
    prepare("folder", tmp_path / "corpus", tmp_path / "out", valid_share=0.1)
    found = splits_of(tmp_path / "out")
    assert {split: len(files) for split, files in found.items()} == expected
    assert ("other files are training data" in caplog.text) == (tree in ("only valid", "valid and test"))
    assert ("other files are training or validation data" in caplog.text) == (tree == "only test")
    if "test" in found:
        assert all("test" in name for name in found["test"])


@pytest.mark.parametrize("kind", ["librispeech", "table"])
def test_a_training_set_is_divided_unless_a_table_names_its_splits(tmp_path, kind):
    corpus = tmp_path / "corpus"
    if kind == "librispeech":
        librispeech(corpus)
        shutil.rmtree(corpus / "LibriSpeech" / "dev-clean")
    else:
        splits = {"a": "train", "b": "train", "c": "test"}
        for name in splits:
            audio(corpus / f"{name}.wav", 0.05)
        rows = [f"{name}.wav,{split}" for name, split in splits.items()]
        text(corpus / "t.csv", "\n".join(["audio_filepath,split", *rows]) + "\n")
    prepare(kind, corpus / "t.csv" if kind == "table" else corpus, tmp_path / "out")
    sizes = {split: len(files) for split, files in splits_of(tmp_path / "out").items()}
    expected = {"train": 1, "valid": 1, "test": 2} if kind == "librispeech" else {"train": 2, "test": 1}
    assert {split: count for split, count in sizes.items() if count} == expected


def test_rows_without_a_split_are_training_data_if_there_is_a_validation_set(tmp_path):
    for name in "abcd":
        audio(tmp_path / "corpus" / f"{name}.wav", 0.05)
    text(tmp_path / "corpus" / "t.csv", "audio_filepath,split\na.wav,\nb.wav,\nc.wav,train\nd.wav,validation\n")
    prepare("table", tmp_path / "corpus" / "t.csv", tmp_path / "out", valid_share=0.5)
    assert splits_of(tmp_path / "out") == {"train": ["a.wav", "b.wav", "c.wav"], "valid": ["d.wav"]}


def test_a_validation_set_whose_files_are_all_unusable_is_replaced(tmp_path):
    for name in "abc":
        audio(tmp_path / "corpus" / f"{name}.wav", 0.05)
    text(tmp_path / "corpus" / "d.wav", "not audio")
    text(tmp_path / "corpus" / "t.csv", "audio_filepath,split\na.wav,\nb.wav,\nc.wav,train\nd.wav,validation\n")
    prepare("table", tmp_path / "corpus" / "t.csv", tmp_path / "out", valid_share=0.5)
    assert {split: len(files) for split, files in splits_of(tmp_path / "out").items()} == {"train": 2, "valid": 1}


def test_a_speaker_whose_name_is_a_split_is_not_held_out(tmp_path):
    for name in ("ann", "val", "test"):
        audio(tmp_path / "corpus" / name / "a.wav", 0.05)
    prepare("folder", tmp_path / "corpus", tmp_path / "out", valid_share=0, speaker_level=1)
    assert splits_of(tmp_path / "out").keys() == {"train"}


@pytest.mark.parametrize("kind", ["table", "folder", "link to a table"])
def test_sections_of_a_table_keep_their_audio(tmp_path, kind):
    audio(tmp_path / "c" / "long.wav", 1.0)
    audio(tmp_path / "c" / "b.wav", 0.5)
    rows = [
        "long.wav,0.0,0.3,first", "long.wav,0.5,0.25,second", "long.wav,0.75,,rest", "b.wav,,,whole",
        "long.wav,0.5,0.25,again", "long.wav,0.5,3,beyond", "b.wav,0.6,,after", "b.wav,x,,not a number",
    ]  # fmt: skip
    text(tmp_path / "c" / "metadata.csv", "\n".join(["audio_filepath,offset,duration,text", *rows]) + "\n")
    corpus = tmp_path / "c" if kind == "folder" else tmp_path / "c" / "metadata.csv"
    if kind == "link to a table":
        corpus.rename(tmp_path / "blob")
        corpus.symlink_to(tmp_path / "blob")
    result = prepare("folder" if kind == "folder" else "table", corpus, tmp_path / "out", valid_share=0)
    entries = {entry["text"]: entry for entry in manifest(tmp_path / "out" / "train.json")}
    found = {name: (entry.get("offset"), entry["duration"]) for name, entry in entries.items()}
    assert found == {"first": (0.0, 0.3), "second": (0.5, 0.25), "rest": (0.75, 0.25), "whole": (None, 0.5)}
    reasons = sorted(failure["error"] for failure in result.failures)
    assert len(reasons) == 4 and sum("s of audio, but the table lists" in reason for reason in reasons) == 2
    assert sum("more than once" in reason for reason in reasons) == 1


@pytest.mark.parametrize("kind", ["table", "folder"])
@pytest.mark.parametrize("column", ["speaker", "speaker_id"])
def test_a_number_is_a_speaker_in_a_table(tmp_path, kind, column):
    names = [f"{index}.wav" for index in range(4)]
    for name in names:
        audio(tmp_path / "c" / name, 0.05)
    rows = [{"file_name": name, column: index // 2, "text": 7} for index, name in enumerate(names)]
    text(tmp_path / "c" / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    corpus = tmp_path / "c" / "metadata.jsonl" if kind == "table" else tmp_path / "c"
    prepare(kind, corpus, tmp_path / "out", valid_share=0.3)
    entries = {split: manifest(tmp_path / "out" / f"{split}.json") for split in ("train", "valid")}
    speakers = [{entry["speaker"] for entry in own} for own in entries.values()]
    assert sorted(map(sorted, speakers)) == [["0"], ["1"]]
    assert {entry["text"] for own in entries.values() for entry in own} == {"7"}


SPLIT_WORDS = {
    "train": "train",
    "TRAIN": "train",
    "training": "train",
    "train-clean-100": "train",
    "validation": "valid",
    "Validation": "valid",
    "valid": "valid",
    "val": "valid",
    "dev_clean": "valid",
    "train_dev": "valid",
    "TEST": "test",
    " test": "test",
    "test-clean": "test",
    "testing": "test",
    "testset": "test",
    "eval": "test",
    "evaluation": "test",
    "other": None,
    "validated": None,
    "0": None,
}


@pytest.mark.parametrize("door", ["table", "folder", "commonvoice", "JSON"])
def test_every_name_of_a_split_is_understood_or_refused_with_its_row(tmp_path, door):
    rows = [(f"{index}.wav", name, expected) for index, (name, expected) in enumerate(SPLIT_WORDS.items())]
    root = tmp_path / "corpus"
    kind, place = door, f"{door}.csv"
    if door == "commonvoice":
        place, root = "ss-corpus-en.tsv", root / "en"
        header = "client_id\taudio_file\ttranscription\tlanguage\tsplit"
        lines = [header, *(f"s\t{file}\thi\ten\t{name}" for file, name, _ in rows)]
    else:
        lines = ["file_name,split", *(f"{file},{name}" for file, name, _ in rows)]
    if door == "JSON":
        kind, place = "table", "metadata.jsonl"
        lines = [json.dumps({"file_name": file, "split": 0 if name == "0" else name}) for file, name, _ in rows]
    elif door == "folder":
        place = "metadata.csv"
    text(root / place, "\n".join(lines))
    for file, _, _ in rows:
        audio(root / "audios" / file if door == "commonvoice" else root / file, 0.1)
    corpus = root / place if kind == "table" else tmp_path / "corpus"
    result = prepare(kind, corpus, tmp_path / "out", valid_share=0, check=False)
    splits = {
        Path(entry["audio_filepath"]).name: split
        for split in result.splits
        for entry in manifest(tmp_path / "out" / f"{split}.json")
    }
    assert splits == {file: expected for file, _, expected in rows if expected}
    problems = [f"{entry['input']}: {entry['error']}" for entry in result.failures]
    assert len(problems) == 3 and all(f"{place}, line " in problem for problem in problems)
    assert all("is unknown; use train, validation or test" in problem for problem in problems)


@pytest.mark.parametrize("kind", ["librispeech", "mls"])
def test_a_part_of_another_name_is_no_training_data(tmp_path, kind):
    MAKE[kind](tmp_path / "corpus")
    part = {"librispeech": "LibriSpeech/test-other", "mls": "mls_german/test"}[kind]
    (tmp_path / "corpus" / part).rename(tmp_path / "corpus" / part.replace("test", "held"))
    result = prepare(kind, tmp_path / "corpus", tmp_path / "out")
    assert list(result.splits) == ["train", "valid"]
    (failure,) = result.failures
    assert "is not a split" in failure["error"]


@pytest.mark.parametrize("kind", ["table", "folder", "commonvoice"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path, kind):
    audio(tmp_path / "c" / "a.wav", 0.1)
    name = "train.tsv" if kind == "commonvoice" else "metadata.csv"
    rows = "client_id,path,sentence,sentence\ns,a.wav,,hi\n"
    text(tmp_path / "c" / name, rows.replace(",", "\t") if kind == "commonvoice" else rows)
    with pytest.raises(NemoLfrError, match=r"two columns .* 'sentence'"):
        prepare(kind, tmp_path / "c" / name if kind == "table" else tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


SPEAKERS = {
    "speaker": ["a", "a", "b", "b"],
    "file": ["", "", "", ""],
    "file ": ["a", "a", "a", "a"],
    "speaker or file": ["a", "a", "", ""],
}


@pytest.mark.parametrize("units", SPEAKERS)
def test_the_command_says_what_is_held_out(tmp_path, capsys, units):
    for index in range(4):
        audio(tmp_path / "c" / f"{index}.wav", 0.1)
    rows = [f"{index}.wav,{speaker}" for index, speaker in enumerate(SPEAKERS[units])]
    text(tmp_path / "c" / "metadata.csv", "\n".join(["file_name,speaker", *rows]))
    command = ["prepare", "folder", str(tmp_path / "c"), "--out", str(tmp_path / "out"), "--valid-share", "0.5"]
    for options in ([], ["--json", "--overwrite"]):
        main([*command, *options])
        out = capsys.readouterr().out
        assert f"held out by {units.strip()}" in out or json.loads(out)["held_out_by"] == units.strip()
    sides = [manifest(tmp_path / "out" / f"{split}.json") for split in ("train", "valid")]
    assert all(sides)
    if units == "speaker":
        assert not set.intersection(*({entry["speaker"] for entry in side} for side in sides))


def test_a_table_becomes_manifests_that_training_reads(tmp_path):
    for name in "abc":
        audio(tmp_path / "corpus" / "wavs" / f"{name}.wav", 0.1)
    rows = [
        "wavs/a.wav,hi,s1,train",
        "wavs/b.wav,ho,s2,test",
        "wavs/c.wav,hu,s1,dev",
        "wavs/gone.wav,x,s1,train",
        "bad",
    ]
    text(tmp_path / "corpus" / "t.csv", "\n".join(["file_name,sentence,client_id,split", *rows]))
    result = prepare("table", tmp_path / "corpus" / "t.csv", tmp_path / "out")
    assert result.audio_dir == tmp_path / "corpus"
    for split, name, sentence in (("train", "a", "hi"), ("test", "b", "ho"), ("valid", "c", "hu")):
        (entry,) = manifest(tmp_path / "out" / f"{split}.json")
        assert name_of(entry) == f"wavs/{name}.wav" and entry["text"] == sentence
    failures = {entry["input"]: entry["error"] for entry in manifest(tmp_path / "out" / "failures.jsonl")}
    assert set(failures) == {"wavs/gone.wav", "t.csv, line 6"}


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("table", "none.csv", "no such file"),
        ("table", ".", r"not a \.csv"),
        ("folder", "t.csv", "prepare table"),
        ("table", "t.txt", r"not a \.csv"),
    ],
)
def test_a_table_is_not_mistaken_for_a_folder(tmp_path, kind, name, message):
    for file in ("t.csv", "t.txt"):
        text(tmp_path / file, "file_name\na.wav\n")
    with pytest.raises(NemoLfrError, match=message):
        prepare(kind, tmp_path / name, tmp_path / "out")
