"""Readers of speech corpora on disk: the layouts of published archives, and plain folders of audio.

Lhotse's recipes for the same archives stop at the first file that cannot be read. These readers only list the
utterances; the caller opens the files and can skip unreadable ones.
"""

import logging
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_lfr.errors import ConfigError, NemoLfrError, printable, shorten
from nemo_lfr.io.folders import AUDIO_SUFFIXES, MAX_NAME, find_files
from nemo_lfr.io.tables import METADATA_NAMES, is_table, read_table
from nemo_lfr.io.text import decode, read_lines

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
# Maximum characters of a field. A longer one is not a sentence: a closing quote or a line end is missing.
MAX_FIELD = 1 << 17


@dataclass(frozen=True)
class CorpusUtterance:
    """One recording of a corpus.

    Attributes:
        path: path relative to the corpus.
        speaker: the corpus's label of the speaker.
        split: one of `SPLITS`; None if the corpus has no splits.
        labels: further labels of the corpus: "lang", "text".
        problem: why it cannot be used, such as a transcript that is not UTF-8; `path` then locates the problem.
    """

    path: Path
    speaker: str
    split: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


def librispeech(corpus: Path) -> Iterator[CorpusUtterance]:
    """LibriSpeech (openslr.org/12): PART/SPEAKER/CHAPTER/*.flac, with one *.trans.txt for each chapter."""
    for transcript in _named(corpus, "*.trans.txt"):
        part, speaker, _ = transcript.parent.parts[-3:]
        for number, (name, text, problem) in enumerate(_transcripts(transcript, corpus, b" "), start=1):
            if name is None:
                yield CorpusUtterance(Path(text), speaker, _split(part), problem=problem)
                continue
            if not _is_file_name(name):
                place = Path(f"{transcript.relative_to(corpus)}, line {number}")
                yield CorpusUtterance(
                    place, speaker, _split(part), problem=f"{shorten(name)!r} is not a valid file name"
                )
                continue
            path = (transcript.parent / f"{name}.flac").relative_to(corpus)
            yield CorpusUtterance(path, speaker, _split(part), {"lang": "en", "text": text}, problem)


def mls(corpus: Path) -> Iterator[CorpusUtterance]:
    """Multilingual LibriSpeech (openslr.org/94): mls_LANGUAGE/SPLIT/transcripts.txt, audio/SPEAKER/BOOK/*."""
    for transcript in _named(corpus, "transcripts.txt"):
        folder = transcript.parent
        language = folder.parent.name.removeprefix("mls_").removesuffix("_opus")
        split = _split(folder.name)
        for number, (name, text, problem) in enumerate(_transcripts(transcript, corpus, b"\t"), start=1):
            if name is None:
                yield CorpusUtterance(Path(text), "", split, problem=problem)
                continue
            words = name.split("_")
            if len(words) != 3 or not _is_file_name(name):
                place = Path(f"{transcript.relative_to(corpus)}, line {number}")
                yield CorpusUtterance(place, "", split, problem=f"{shorten(name)!r} is not SPEAKER_BOOK_NUMBER")
                continue
            stem = folder / "audio" / words[0] / words[1] / name
            path = next((found for kind in (".flac", ".opus") if (found := stem.with_suffix(kind)).exists()), None)
            path = (path or stem.with_suffix(".flac")).relative_to(corpus)
            yield CorpusUtterance(path, words[0], split, {"lang": language, "text": text}, problem)


def commonvoice(corpus: Path) -> Iterator[CorpusUtterance]:
    """Common Voice: LANGUAGE/{train,dev,test}.tsv with clips/*.mp3, or ss-corpus-*.tsv with audios/*.

    Scripted Speech has the columns `client_id`, `path`, `sentence` and `locale`; Spontaneous Speech `client_id`,
    `audio_file`, `transcription`, `language` and `split`. A row that does not fit its header is an utterance with a
    problem.

    Raises:
        ValueError: if a table lacks one of these columns.
    """
    for table in _named(corpus, "*.tsv"):
        spontaneous = table.name.startswith("ss-corpus-")
        if not table.is_file() or not (spontaneous or table.stem in ("train", "dev", "test")):
            continue
        place = table.relative_to(corpus)
        split = None if spontaneous else _split(table.stem)
        try:
            header, *rows = read_lines(table)
            columns = decode(header).split("\t")
        except (OSError, ValueError) as error:
            yield CorpusUtterance(place, "", split, problem=_why(error, table))
            continue
        audio, text, folder = (
            ("audio_file", "transcription", "audios") if "audio_file" in columns else ("path", "sentence", "clips")
        )
        if missing := sorted({"client_id", audio, text} - set(columns)):
            raise ValueError(f"{place} lacks the columns {missing}; it has {columns}")
        for number, line in enumerate(rows, start=2):
            if not line.strip():
                continue
            try:
                row = _row(line, columns)
                path = _below(row[audio])
            except ValueError as error:
                yield CorpusUtterance(Path(f"{place}, line {number}"), "", split, problem=str(error))
                continue
            labels = {"lang": row.get("locale") or row.get("language") or table.parent.name}
            labels |= {"text": row[text]} if row[text] or not spontaneous else {}
            own = (_split(row["split"]) if row.get("split") else None) if spontaneous else split
            yield CorpusUtterance((table.parent / folder / path).relative_to(corpus), row["client_id"], own, labels)


def vctk(corpus: Path) -> Iterator[CorpusUtterance]:
    """VCTK 0.92 (wav48_silence_trimmed, first microphone) and 0.80 (wav48), with txt/SPEAKER/*.txt."""
    for path in sorted([*_named(corpus, "wav48_silence_trimmed/*/*_mic1.flac"), *_named(corpus, "wav48/*/*.wav")]):
        speaker = path.parent.name
        text = path.parents[2] / "txt" / speaker / f"{path.stem.removesuffix('_mic1')}.txt"
        labels, problem = text_of(text)
        yield CorpusUtterance(path.relative_to(corpus), speaker, None, {"lang": "en"} | labels, problem)


def folder(corpus: Path) -> Iterator[CorpusUtterance]:
    """Audio files below a folder; subfolders name the speakers, and a .txt file beside a recording has its text.

    Labels in AudioFolder's `metadata.csv`, `.tsv` or `.jsonl` replace these.
    """
    rows = {row.path: row for row in _metadata(corpus)}
    for path in find_files(corpus, AUDIO_SUFFIXES, silent_suffixes={".txt"}):
        own = path.relative_to(corpus)
        row = rows.pop(own, None)
        speaker = own.parts[0] if len(own.parts) > 1 else ""
        if row is None or row.problem:
            labels, problem = text_of(path.with_suffix(".txt"))
            yield CorpusUtterance(own, speaker, None, labels, problem)
        else:
            yield replace(row, speaker=row.speaker or speaker)
    for row in rows.values():
        yield row if row.problem else replace(row, problem="is listed in a table, but does not exist")


def table(path: Path) -> Iterator[CorpusUtterance]:
    """CSV, TSV or metadata.jsonl file with a column of audio paths, which are relative to the file's folder."""
    from nemo_lfr.io.manifests import resolve_audio_path  # imports the audio readers, which help texts do not need

    for row in read_table(path):
        if row.problem:
            yield CorpusUtterance(Path(f"{path.name}, line {row.line}"), "", problem=row.problem)
            continue
        values = row.values
        labels = {key: values[key] for key in ("lang", "text") if isinstance(values.get(key), str)}
        split = _split(values["split"]) if isinstance(values.get("split"), str) else None
        try:
            name = resolve_audio_path("", values["audio_filepath"])
        except ValueError as error:
            yield CorpusUtterance(Path(f"{path.name}, line {row.line}"), "", split, problem=str(error))
            continue
        speaker = values.get("speaker")
        yield CorpusUtterance(name, speaker if isinstance(speaker, str) else "", split, labels)


def _metadata(corpus: Path) -> Iterator[CorpusUtterance]:
    """Yield the rows of AudioFolder's tables below a folder."""
    for path in [path for name in METADATA_NAMES for path in _named(corpus, name) if is_table(path)]:
        folder_name = path.parent.relative_to(corpus)
        try:
            for row in table(path):
                yield replace(row, path=Path(os.path.normpath(folder_name / row.path)))
        except ConfigError as error:  # a table of another kind, such as LJSpeech's
            logger.warning("%s Its labels are not used.", error)


LAYOUTS: dict[str, Callable[[Path], Iterator[CorpusUtterance]]] = {
    "librispeech": librispeech,
    "mls": mls,
    "commonvoice": commonvoice,
    "vctk": vctk,
    "folder": folder,
    "table": table,
}


def hold_out(utterances: list[CorpusUtterance], share: float) -> list[CorpusUtterance]:
    """Assign the utterances without a split to "train" or "valid".

    Speakers are held out as a whole. If there is only one speaker, files are held out. The choice depends on a hash of
    the speaker's name or the file's path, so a growing corpus keeps its validation set. With a share between 0 and 1
    and at least two speakers (or files), both splits get at least one.

    Args:
        utterances: utterances, whose `split` is None if it is to be assigned.
        share: fraction of the speakers or files to hold out.

    Returns:
        The utterances in the same order, all with a split.
    """
    speakers = {utterance.speaker for utterance in utterances}

    def name(utterance: CorpusUtterance) -> str:
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


def _named(corpus: Path, pattern: str) -> list[Path]:
    """Find the files whose last names match a pattern, in folders that `find_files` reads."""
    suffix = pattern[pattern.rindex(".") :]
    return [path for path in find_files(corpus, {suffix}, report=lambda _: None) if path.match(pattern)]


def _split(name: str) -> str:
    kind = name.partition("-")[0]
    return "valid" if kind == "dev" else kind if kind in SPLITS else "train"


def text_of(transcript: Path) -> tuple[dict[str, str], str | None]:
    """Read the text file beside a recording; return its labels, and the reason if it cannot be read."""
    try:
        if not os.path.lexists(transcript):  # a broken link counts as an unreadable transcript
            return {}, None
        lines = [decode(line) for line in read_lines(transcript)]
    except (OSError, ValueError) as error:
        return {}, f"its transcript {transcript.name}: {_why(error, transcript)}"
    return {"text": " ".join(line for line in lines if line.strip())}, None


def _transcripts(path: Path, corpus: Path, separator: bytes) -> Iterator[tuple[str | None, str, str | None]]:
    """Yield name, text and problem of each line; for an unreadable file, an empty name and the file's location."""
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        yield None, str(path.relative_to(corpus)), _why(error, path)
        return
    for line in lines:
        if not line.strip():
            continue
        name, _, text = line.partition(separator)
        try:
            yield decode(name), decode(text), None
        except ValueError as error:
            yield shorten(name.decode(errors="replace")), "", f"its line of {path.name}: {error}"


def _row(line: bytes, columns: list[str]) -> dict[str, str]:
    """Return the fields of a table's line by column. Quotes have no special meaning.

    Raises:
        ValueError: if it is not UTF-8, has another number of fields, or one beyond `MAX_FIELD`.
    """
    fields = decode(line).split("\t")
    if len(fields) != len(columns):
        raise ValueError(f"a row of {len(fields)} fields, where the header has {len(columns)}: {shorten(fields)}")
    row = dict(zip(columns, fields, strict=True))
    for name, value in row.items():
        if len(value) > MAX_FIELD:
            raise ValueError(f"its field {name!r} has {len(value)} characters, more than {MAX_FIELD}")
    return row


def _below(name: str) -> Path:
    """Return the name of a file in a table; raise unless it is inside the folder of the clips."""
    path = Path(name)
    if not name.strip() or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{shorten(name)!r} is not the name of a file in the folder of the clips")
    return path


def _is_file_name(name: str) -> bool:
    """Return whether a name in a transcript is a plain file name, without folders."""
    return name == Path(name).name and len(os.fsencode(name)) <= MAX_NAME - len(".flac")


def _why(error: Exception, path: Path) -> str:
    if isinstance(error, NemoLfrError):  # the message already names the file
        return str(error).removeprefix(f"{printable(str(path))}: ").rstrip(".")
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
