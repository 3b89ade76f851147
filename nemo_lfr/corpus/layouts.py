"""Speech corpora as they lie on disk: the layouts of published archives, and plain folders of audio.

Lhotse has recipes for the same archives, which stop at the first file that cannot be read; here a corpus is a list of
utterances, and opening them is left to whoever can go on without one.
"""

import csv
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_lfr.errors import NemoLfrError

AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf", ".m4a"}
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Utterance:
    """One recording of a corpus.

    Attributes:
        path: relative to the corpus.
        speaker: as the corpus labels it.
        split: one of `SPLITS`; None where the corpus has none.
        labels: what else the corpus says of it: "lang", "text".
    """

    path: Path
    speaker: str
    split: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


def librispeech(corpus: Path) -> Iterator[Utterance]:
    """LibriSpeech (openslr.org/12): PART/SPEAKER/CHAPTER/*.flac, with one *.trans.txt for each chapter."""
    for transcript in sorted(corpus.rglob("*.trans.txt")):
        part, speaker, _ = transcript.parent.parts[-3:]
        for line in _lines(transcript):
            name, _, text = line.partition(" ")
            path = (transcript.parent / f"{name}.flac").relative_to(corpus)
            yield Utterance(path, speaker, _split(part), {"lang": "en", "text": text})


def mls(corpus: Path) -> Iterator[Utterance]:
    """Multilingual LibriSpeech (openslr.org/94): mls_LANGUAGE/SPLIT/transcripts.txt, audio/SPEAKER/BOOK/*."""
    for transcript in sorted(corpus.rglob("transcripts.txt")):
        folder = transcript.parent
        language = folder.parent.name.removeprefix("mls_").removesuffix("_opus")
        for line in _lines(transcript):
            name, _, text = line.partition("\t")
            speaker, book, _ = name.split("_")
            stem = folder / "audio" / speaker / book / name
            path = next((found for kind in (".flac", ".opus") if (found := stem.with_suffix(kind)).exists()), None)
            path = (path or stem.with_suffix(".flac")).relative_to(corpus)
            yield Utterance(path, speaker, _split(folder.name), {"lang": language, "text": text})


def commonvoice(corpus: Path) -> Iterator[Utterance]:
    """Common Voice: LANGUAGE/{train,dev,test}.tsv and LANGUAGE/clips/*.mp3."""
    for table in sorted(corpus.rglob("*.tsv")):
        if table.stem in ("train", "dev", "test"):
            with open(table, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                    labels = {"lang": row.get("locale") or table.parent.name, "text": row["sentence"]}
                    path = (table.parent / "clips" / row["path"]).relative_to(corpus)
                    yield Utterance(path, row["client_id"], _split(table.stem), labels)


def vctk(corpus: Path) -> Iterator[Utterance]:
    """VCTK 0.92 (wav48_silence_trimmed, first microphone) and 0.80 (wav48), with txt/SPEAKER/*.txt."""
    pattern = "wav48_silence_trimmed/*/*_mic1.flac"
    for path in sorted([*corpus.rglob(pattern), *corpus.rglob("wav48/*/*.wav")]):
        speaker = path.parent.name
        text = path.parents[2] / "txt" / speaker / f"{path.stem.removesuffix('_mic1')}.txt"
        labels = {"lang": "en"} | ({"text": " ".join(_lines(text))} if text.exists() else {})
        yield Utterance(path.relative_to(corpus), speaker, None, labels)


def folder(corpus: Path) -> Iterator[Utterance]:
    """Any audio below a folder; a sub-folder is taken for a speaker, a .txt beside a file for its text."""
    for path in sorted(corpus.rglob("*")):
        if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file():
            own = path.relative_to(corpus)
            text = path.with_suffix(".txt")
            labels = {"text": " ".join(_lines(text))} if text.exists() else {}
            yield Utterance(own, own.parts[0] if len(own.parts) > 1 else "", None, labels)


LAYOUTS: dict[str, Callable[[Path], Iterator[Utterance]]] = {
    "librispeech": librispeech,
    "mls": mls,
    "commonvoice": commonvoice,
    "vctk": vctk,
    "folder": folder,
}


def hold_out(utterances: list[Utterance], share: float) -> list[Utterance]:
    """Give those without a split one: whole speakers to "valid", or single files where there is but one speaker.

    Who is held out follows from a hash of the name, so that a corpus that grows keeps its validation set. Unless the
    share is 0 or 1 there is at least one on each side.

    Args:
        utterances: with `split` None where one is wanted.
        share: of speakers, or files, to hold out.
    """
    speakers = {utterance.speaker for utterance in utterances}

    def name(utterance: Utterance) -> str:
        return utterance.speaker if len(speakers) > 1 else utterance.path.as_posix()

    hashes = {
        name(utterance): zlib.crc32(name(utterance).encode(errors="surrogateescape"))
        for utterance in utterances
        if utterance.split is None
    }
    order = sorted(hashes, key=hashes.__getitem__)
    count = sum(value < share * 2**32 for value in hashes.values())
    if 0 < share < 1 and len(order) > 1:  # a few names may all fall on one side
        count = min(max(count, 1), len(order) - 1)
    held = set(order[:count])
    return [
        replace(utterance, split=utterance.split or ("valid" if name(utterance) in held else "train"))
        for utterance in utterances
    ]


def _split(name: str) -> str:
    kind = name.partition("-")[0]
    return "valid" if kind == "dev" else kind if kind in SPLITS else "train"


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise NemoLfrError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
