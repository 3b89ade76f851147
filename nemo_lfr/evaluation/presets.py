"""Test sets from the public corpora that NVIDIA's model card names.

The model card does not list the recordings that NVIDIA used, so the selections in this module are our own. The
selections depend only on the files and the seed. The field `card` contains the metrics that the card reports for the
released checkpoint (170k steps).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import soundfile

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.layouts import mls
from nemo_lfr.io.manifests import Recording

MLS_LANGUAGES = ("dutch", "english", "french", "german", "italian", "polish", "portuguese", "spanish")
MLS_SAMPLES = 200
DAPS_SPEAKERS = ("f10", "m10")
DAPS_PIECE = 10.0  # seconds


@dataclass(frozen=True)
class Preset:
    """Test set of an evaluation.

    Attributes:
        recordings: function that selects the recordings. Its arguments are the folder with the extracted archives and
            a random seed.
        card: values that NVIDIA's model card states for this test set, by metric name.
        selection: description of the selection for the report.
    """

    recordings: Callable[[Path, int], list[Recording]]
    card: dict[str, float]
    selection: str


def card_mls(folder: Path, seed: int) -> list[Recording]:
    """Select up to 200 utterances from the MLS test set of each language.

    Args:
        folder: folder with the extracted archives.
        seed: random seed of the selection.

    Returns:
        Recordings, sorted by language and path.

    Raises:
        NemoLfrError: if the test set of a language is missing; the message lists the missing languages.
    """
    by_language: dict[str, list[Recording]] = {}
    for utterance in mls(folder):
        if utterance.split == "test" and not utterance.problem and (folder / utterance.path).is_file():
            labels = {"speaker": utterance.speaker, **utterance.labels}
            own = Recording("mls", folder / utterance.path, utterance.path, 0.0, 0.0, labels)
            by_language.setdefault(utterance.labels["lang"], []).append(own)
    if absent := sorted(set(MLS_LANGUAGES) - set(by_language)):
        raise NemoLfrError(
            f"{folder}: no MLS test set for {', '.join(absent)} in this folder; unpack mls_LANGUAGE.tar.gz from "
            "openslr.org/94 into the folder."
        )
    chosen = []
    for language in MLS_LANGUAGES:
        found = sorted(by_language[language], key=lambda recording: recording.name)
        picked = random.Random(f"{seed} {language}").sample(found, min(MLS_SAMPLES, len(found)))
        chosen += [_whole(recording) for recording in sorted(picked, key=lambda recording: recording.name)]
    return chosen


def card_daps(folder: Path, seed: int) -> list[Recording]:
    """Select the clean DAPS recordings of the speakers F10 and M10, split into segments of 10 s.

    If the last segment of a file is shorter than 10 s, it is dropped.

    Args:
        folder: folder with the extracted archive.
        seed: not used, since the selection is not random.

    Returns:
        Recordings, sorted by speaker and path.

    Raises:
        NemoLfrError: if a speaker is missing.
    """
    chosen = []
    for speaker in DAPS_SPEAKERS:
        paths = sorted(folder.rglob(f"clean/{speaker}_script*_clean.wav"))
        if not paths:
            raise NemoLfrError(
                f"{folder}: no clean/{speaker}_script*_clean.wav in this folder; unpack daps.tar.gz into the folder."
            )
        for path in paths:
            labels = {"speaker": speaker, "lang": "english"}
            for piece in range(int(soundfile.info(path).duration // DAPS_PIECE)):
                name = path.relative_to(folder)
                chosen.append(Recording("daps", path, name, piece * DAPS_PIECE, DAPS_PIECE, labels))
    return chosen


def _whole(recording: Recording) -> Recording:
    duration = soundfile.info(recording.path).duration
    return Recording(recording.dataset, recording.path, recording.name, 0.0, duration, recording.labels)


PRESETS = {
    "card-mls": Preset(
        card_mls,
        {"Squim MOS": 4.43, "SI-SDR": 4.77, "mel distance": 0.143, "STFT distance": 0.060, "CER": 2.16},
        f"{MLS_SAMPLES} utterances from the test set of each of {len(MLS_LANGUAGES)} languages, sampled from the "
        "sorted paths with the seed. The model card uses another sample of the same size, from a version of MLS at "
        "44.1 kHz that is not published.",
    ),
    "card-daps": Preset(
        card_daps,
        {"Squim MOS": 4.69, "SI-SDR": 8.07, "mel distance": 0.136, "STFT distance": 0.056, "CER": 0.77},
        f"Clean DAPS recordings of the speakers F10 and M10: all scripts, in consecutive segments of {DAPS_PIECE:g} "
        "s. The model card does not describe its segments.",
    ),
}
