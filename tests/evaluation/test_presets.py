"""Tests of the test sets from the model card, with small archives in the same layout."""

import numpy as np
import pytest
import soundfile

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation import presets
from nemo_lfr.evaluation.presets import MLS_LANGUAGES, PRESETS


def write(path, seconds, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate)), rate)


@pytest.fixture(scope="module")
def mls(tmp_path_factory):
    """Write 12 test and 2 training recordings in each language, and return the folder."""
    folder = tmp_path_factory.mktemp("mls")
    for language in MLS_LANGUAGES:
        for split, count in (("test", 12), ("train", 2)):
            lines = []
            for number in range(count):
                speaker, book = 100 + number % 3, 7
                name = f"{speaker}_{book}_{number:06d}"
                write(folder / f"mls_{language}" / split / "audio" / str(speaker) / str(book) / f"{name}.flac", 0.1)
                lines.append(f"{name}\ttext {number}\n")
            (folder / f"mls_{language}" / split / "transcripts.txt").write_text("".join(lines))
    return folder


def test_mls_gives_a_fixed_draw_of_each_languages_test_set(mls, monkeypatch):
    monkeypatch.setattr(presets, "MLS_SAMPLES", 5)
    found = PRESETS["card-mls"].recordings(mls, 0)
    assert len(found) == 8 * 5
    assert {recording.labels["lang"] for recording in found} == set(MLS_LANGUAGES)
    assert all("/test/" in str(recording.path) and recording.path.is_file() for recording in found)
    assert all(recording.labels["text"].startswith("text ") and recording.duration == 0.1 for recording in found)
    assert found == PRESETS["card-mls"].recordings(mls, 0) != PRESETS["card-mls"].recordings(mls, 1)
    # The selection must be the same everywhere, since published results depend on it.
    drawn = ["100_000006", "101_000001", "101_000004", "101_000010", "102_000011"]
    assert [recording.path.stem.replace("_7", "") for recording in found[:5]] == drawn


def test_mls_uses_all_recordings_if_there_are_fewer_than_in_the_card(mls):
    assert len(PRESETS["card-mls"].recordings(mls, 0)) == 8 * 12


def test_languages_that_are_missing_are_named(tmp_path, mls):
    (tmp_path / "mls_german").symlink_to(mls / "mls_german")
    with pytest.raises(NemoLfrError, match=r"no MLS test set for dutch, english, .*spanish in this folder; unpack"):
        PRESETS["card-mls"].recordings(tmp_path, 0)


def test_daps_gives_whole_pieces_of_the_clean_recordings_of_two_speakers(tmp_path):
    for speaker in ("f1", "f10", "m10"):
        for script in (1, 2):
            write(tmp_path / "daps" / "clean" / f"{speaker}_script{script}_clean.wav", 25, 4000)
    write(tmp_path / "daps" / "ipad_office1" / "f10_script1_ipad_office1.wav", 25, 4000)
    found = PRESETS["card-daps"].recordings(tmp_path, 0)
    assert len(found) == 2 * 2 * 2
    assert {recording.labels["speaker"] for recording in found} == {"f10", "m10"}
    assert [(recording.offset, recording.duration) for recording in found[:3]] == [(0, 10), (10, 10), (0, 10)]


def test_a_folder_without_daps_is_refused(tmp_path):
    with pytest.raises(NemoLfrError, match=r"clean/f10_script\*_clean.wav in this folder; unpack daps.tar.gz"):
        PRESETS["card-daps"].recordings(tmp_path, 0)


def test_the_cards_figures_are_of_existing_metrics():
    from nemo_lfr.evaluation.model_metrics import all_metrics

    for preset in PRESETS.values():
        assert set(preset.card) <= set(all_metrics())
