"""Find files that a corpus lists more than once."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from nemo_lfr.io.layouts import CorpusUtterance


def mark_repeated(utterances: Iterable[CorpusUtterance]) -> list[CorpusUtterance]:
    """Set the `problem` of each file or section that was listed before.

    Otherwise a file could be used twice, or both for training and for validation.
    """
    seen: set[tuple[Path, float | None, float | None]] = set()
    kept = []
    for utterance in utterances:
        if utterance.problem is None:
            section = (utterance.path, utterance.offset, utterance.duration)
            if section in seen:
                utterance = replace(utterance, problem="listed more than once; the first row is used")
            seen.add(section)
        kept.append(utterance)
    return kept
