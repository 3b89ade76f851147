"""Test sets of NVIDIA's model card, read from the extracted public archives.

The card names the data sets but not the samples, so these selections are our own. They are deterministic and
documented. The values of the card are those of the released checkpoint (170k steps).
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
    """Description of a test set.

    Attributes:
        recordings: function that selects the recordings, from the folder of the extracted archives and a seed.
        card: values of the model card, by metric.
        selection: description of the selection in one sentence.
    """

    recordings: Callable[[Path, int], list[Recording]]
    card: dict[str, float]
    selection: str


def card_mls(folder: Path, seed: int) -> list[Recording]:
    """Select up to 200 utterances of each language's MLS test set.

    Args:
        folder: folder of the extracted archives.
        seed: sampling seed.

    Returns:
        Recordings, sorted by language and path.

    Raises:
        NemoLfrError: if languages are missing; the message lists them.
    """
    by_language: dict[str, list[Recording]] = {}
    for utterance in mls(folder):
        if utterance.split == "test" and not utterance.problem and (folder / utterance.path).is_file():
            labels = {"speaker": utterance.speaker, **utterance.labels}
            own = Recording("mls", folder / utterance.path, utterance.path, 0.0, 0.0, labels)
            by_language.setdefault(utterance.labels["lang"], []).append(own)
    if absent := sorted(set(MLS_LANGUAGES) - set(by_language)):
        raise NemoLfrError(
            f"{folder}: no test set of {', '.join(absent)} in this folder; unpack mls_LANGUAGE.tar.gz of "
            "openslr.org/94 there."
        )
    chosen = []
    for language in MLS_LANGUAGES:
        found = sorted(by_language[language], key=lambda recording: recording.name)
        picked = random.Random(f"{seed} {language}").sample(found, min(MLS_SAMPLES, len(found)))
        chosen += [_whole(recording) for recording in sorted(picked, key=lambda recording: recording.name)]
    return chosen


def card_daps(folder: Path, seed: int) -> list[Recording]:
    """Select the clean DAPS recordings of speakers F10 and M10 in 10 s segments.

    A remainder of less than 10 s at the end of a file is dropped.

    Args:
        folder: folder of the extracted archive.
        seed: unused, since the selection is not random.

    Returns:
        Recordings, sorted by speaker and path.

    Raises:
        NemoLfrError: if a speaker is missing.
    """
    chosen = []
    for speaker in DAPS_SPEAKERS:
        paths = sorted(folder.rglob(f"clean/{speaker}_script*_clean.wav"))
        if not paths:
            raise NemoLfrError(f"{folder}: no clean/{speaker}_script*_clean.wav below; unpack daps.tar.gz there.")
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
        f"{MLS_SAMPLES} utterances of each of {len(MLS_LANGUAGES)} languages' test sets, sampled from the sorted "
        "paths with the seed; the model card uses another sample of the same size, from MLS at 44.1 kHz, which is not "
        "published.",
    ),
    "card-daps": Preset(
        card_daps,
        {"Squim MOS": 4.69, "SI-SDR": 8.07, "mel distance": 0.136, "STFT distance": 0.056, "CER": 0.77},
        f"DAPS clean, speakers F10 and M10, all scripts in consecutive segments of {DAPS_PIECE:g} s; the model card "
        "does not say how it segments them.",
    ),
}
