"""List the utterances of a speech corpus on disk: a published corpus, a folder of audio files, or a table.

`LAYOUTS` has a function for each kind of corpus. These functions do not open the audio files, so an unreadable file
does not stop them.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_lfr.errors import ConfigError, counted, shorten
from nemo_lfr.io.columns import repeated_column
from nemo_lfr.io.folders import AUDIO_SUFFIXES, MAX_NAME, find_files, find_named
from nemo_lfr.io.segment_columns import SegmentsNotReadError
from nemo_lfr.io.splits import split_label, split_of_name, splits_of_folders
from nemo_lfr.io.tables import METADATA_NAMES, RepeatedColumnError, check_audio_key, read_table
from nemo_lfr.io.text import decode, read_lines
from nemo_lfr.io.transcripts import check_link, text_of, transcript_lines, why_unreadable

# Maximum number of characters in a field. A longer field is not one sentence, but the result of a missing line end.
MAX_FIELD = 1 << 17
# Suffixes of the transcript beside an audio file, in order of precedence. TIMIT's names are in upper case.
TRANSCRIPT_SUFFIXES = (".txt", ".TXT")


@dataclass(frozen=True)
class CorpusUtterance:
    """One utterance that a corpus lists.

    Attributes:
        path: path of the audio file, relative to the folder of the corpus. If there is a `problem`, this may be
            the location of the problem instead, such as "train.tsv, line 3".
        speaker: name of the speaker in the corpus; empty if unknown.
        split: one of `nemo_lfr.io.splits.SPLITS`; None if the corpus does not assign the utterance to a split.
        labels: the labels "lang" and "text", if the corpus provides them.
        problem: reason why the utterance cannot be used, such as a transcript that is not UTF-8, or None.
        offset: start of the utterance in the file, in seconds; None for the beginning of the file.
        duration: duration of the utterance in seconds; None for the rest of the file.
    """

    path: Path
    speaker: str
    split: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    offset: float | None = None
    duration: float | None = None


def librispeech(corpus: Path) -> Iterator[CorpusUtterance]:
    """Read LibriSpeech (openslr.org/12).

    Audio files are PART/SPEAKER/CHAPTER/*.flac. Each chapter has one transcript, *.trans.txt.
    """
    unread: list[OSError] = []
    for transcript in find_named(corpus, "*.trans.txt", unread):
        part, speaker, _ = transcript.parent.parts[-3:]
        if (split := split_of_name(part)) is None:
            yield _without_split(transcript, corpus, part)
            continue
        for number, (name, text, problem) in enumerate(transcript_lines(transcript, corpus, b" "), start=1):
            if name is None:
                yield CorpusUtterance(Path(text), speaker, split, problem=problem)
                continue
            if not _is_file_name(name):
                place = Path(f"{transcript.relative_to(corpus)}, line {number}")
                yield CorpusUtterance(place, speaker, split, problem=f"{shorten(name)!r} is not a valid file name")
                continue
            path = (transcript.parent / f"{name}.flac").relative_to(corpus)
            yield CorpusUtterance(path, speaker, split, {"lang": "en", "text": text}, problem)
    yield from _unread_folders(unread, corpus)


def mls(corpus: Path) -> Iterator[CorpusUtterance]:
    """Read Multilingual LibriSpeech (openslr.org/94).

    Each folder mls_LANGUAGE/SPLIT contains transcripts.txt, and audio files audio/SPEAKER/BOOK/*.
    """
    unread: list[OSError] = []
    for transcript in find_named(corpus, "transcripts.txt", unread):
        folder = transcript.parent
        language = folder.parent.name.removeprefix("mls_").removesuffix("_opus")
        if (split := split_of_name(folder.name)) is None:
            yield _without_split(transcript, corpus, folder.name)
            continue
        for number, (name, text, problem) in enumerate(transcript_lines(transcript, corpus, b"\t"), start=1):
            if name is None:
                yield CorpusUtterance(Path(text), "", split, problem=problem)
                continue
            words = name.split("_")
            if len(words) != 3 or not _is_file_name(name):
                place = Path(f"{transcript.relative_to(corpus)}, line {number}")
                yield CorpusUtterance(place, "", split, problem=f"{shorten(name)!r} should be SPEAKER_BOOK_NUMBER")
                continue
            stem = folder / "audio" / words[0] / words[1] / name
            path = next(
                (found for kind in (".flac", ".opus") if os.path.exists(found := stem.with_suffix(kind))), None
            )
            path = (path or stem.with_suffix(".flac")).relative_to(corpus)
            yield CorpusUtterance(path, words[0], split, {"lang": language, "text": text}, problem)
    yield from _unread_folders(unread, corpus)


def commonvoice(corpus: Path) -> Iterator[CorpusUtterance]:
    """Read Common Voice, either Scripted Speech or Spontaneous Speech.

    Scripted Speech has tables LANGUAGE/{train,dev,test}.tsv with the columns `client_id`, `path`, `sentence` and
    `locale`; the audio is in clips/*.mp3. Spontaneous Speech has tables ss-corpus-*.tsv with the columns `client_id`,
    `audio_file`, `transcription`, `language` and `split`; the audio is in audios/*. If a row is invalid, for instance
    because it has more fields than the header, its utterance has a `problem`.

    Raises:
        ValueError: if a table lacks the column of speakers, audio files or texts, or repeats the name of a column.
    """
    unread: list[OSError] = []
    for table in find_named(corpus, "*.tsv", unread):
        spontaneous = table.name.startswith("ss-corpus-")
        if not (spontaneous or table.stem in ("train", "dev", "test")):
            continue
        place = table.relative_to(corpus)
        split = None if spontaneous else split_of_name(table.stem)
        try:
            check_link(table, corpus)
            header, *rows = read_lines(table)
            columns = decode(header).split("\t")
        except (OSError, ValueError) as error:
            yield CorpusUtterance(place, "", split, problem=why_unreadable(error, table))
            continue
        audio, text, folder = (
            ("audio_file", "transcription", "audios") if "audio_file" in columns else ("path", "sentence", "clips")
        )
        if missing := sorted({"client_id", audio, text} - set(columns)):
            raise ValueError(f"{place} lacks the columns {missing}; it has the columns {columns}")
        if name := repeated_column(columns):
            raise ValueError(f"{place} has two columns with the name {shorten(repr(name))}")
        for number, line in enumerate(rows, start=2):
            if not line.strip():
                continue
            try:
                row = _row(line, columns)
                path = _below(row[audio])
                own = split_label(row.get("split")) if spontaneous else split
            except ValueError as error:
                yield CorpusUtterance(Path(f"{place}, line {number}"), "", split, problem=str(error))
                continue
            labels = {"lang": row.get("locale") or row.get("language") or table.parent.name}
            labels |= {"text": row[text]} if row[text] or not spontaneous else {}
            yield CorpusUtterance((table.parent / folder / path).relative_to(corpus), row["client_id"], own, labels)
    yield from _unread_folders(unread, corpus)


def vctk(corpus: Path) -> Iterator[CorpusUtterance]:
    """Read VCTK 0.92 (wav48_silence_trimmed, first microphone) or 0.80 (wav48), with txt/SPEAKER/*.txt."""
    unread: list[OSError] = []
    names = ("wav48_silence_trimmed/*/*_mic1.flac", "wav48/*/*.wav")
    for path in sorted(path for name in names for path in find_named(corpus, name, unread)):
        speaker = path.parent.name
        text = path.parents[2] / "txt" / speaker / f"{path.stem.removesuffix('_mic1')}.txt"
        labels, problem = text_of(text, corpus=corpus, audio=path)
        yield CorpusUtterance(path.relative_to(corpus), speaker, None, {"lang": "en"} | labels, problem)
    yield from _unread_folders(unread, corpus)


def folder(corpus: Path, speaker_level: int | None = None) -> Iterator[CorpusUtterance]:
    """Read the audio files below a folder.

    The transcript of `a.wav` is `a.txt` or `a.TXT` in the same folder. If an AudioFolder table (`metadata.csv`,
    `metadata.tsv` or `metadata.jsonl`) lists the audio file, all labels and the split come from the table instead. A
    missing speaker or split comes from the folder names; see `speaker_level` and `nemo_lfr.io.splits`.

    Args:
        corpus: the folder.
        speaker_level: depth of the folders that are named after speakers; 1 is directly below `corpus`. None if folder
            names are not speakers.
    """
    rows: dict[Path, list[CorpusUtterance]] = {}
    for row in _metadata(corpus):
        rows.setdefault(row.path, []).append(row)
    unread: list[OSError] = []
    texts: set[Path] = set()
    paths = find_files(
        corpus,
        AUDIO_SUFFIXES,
        companion_suffixes=TRANSCRIPT_SUFFIXES,
        companions=texts,
        known=METADATA_NAMES,
        unread=unread,
    )
    folders = {path: path.relative_to(corpus).parts[:-1] for path in paths}
    splits = splits_of_folders(corpus, set(folders.values()), speaker_level)
    for path, names in folders.items():
        speaker = names[speaker_level - 1] if speaker_level and len(names) >= speaker_level else ""
        split = splits[names]
        if found := rows.pop(path.relative_to(corpus), []):
            for row in found:
                yield replace(row, speaker=row.speaker or speaker, split=row.split or split)
        else:
            possible = (path.with_suffix(suffix) for suffix in TRANSCRIPT_SUFFIXES)
            labels, problem = text_of(*(text for text in possible if text in texts), corpus=corpus, audio=path)
            yield CorpusUtterance(path.relative_to(corpus), speaker, split, labels, problem)
    for row in (row for found in rows.values() for row in found):
        yield row if row.problem else replace(row, problem="the file is listed in a table, but does not exist")
    yield from _unread_folders(unread, corpus)


def _unread_folders(errors: list[OSError], corpus: Path) -> Iterator[CorpusUtterance]:
    """Yield an utterance with a problem for each folder that cannot be read."""
    for name, error in {error.filename: error for error in errors}.items():
        yield CorpusUtterance(Path(name).relative_to(corpus), "", problem=unread_folder(error))


def unread_folder(error: OSError) -> str:
    """Return a message about a folder that cannot be read, without the name of the folder."""
    return f"this folder cannot be read ({error.strerror}), so its files are missing; make it readable"


def table(path: Path, *, by_file: bool = False) -> Iterator[CorpusUtterance]:
    """Read a CSV, TSV or metadata.jsonl file with a column of audio paths.

    Args:
        path: the table. Paths of audio files in it are relative to its folder.
        by_file: whether to report an invalid row with the path of its audio file instead of its location, such as
            "train.tsv, line 3". A row without a valid path is always reported with its location.
    """
    # Imported late: this loads the audio readers, which `--help` does not need.
    from nemo_lfr.io.manifests import resolve_audio_path, seconds

    for row in read_table(path):
        place = Path(f"{path.name}, line {row.line}")
        if row.problem:
            yield CorpusUtterance(place, "", problem=row.problem)
            continue
        values = row.values
        labels = {key: text for key in ("lang", "text") if (text := _as_text(values.get(key)))}
        speaker = _as_text(values.get("speaker"))
        try:
            name = resolve_audio_path("", values["audio_filepath"])
        except ValueError as error:
            yield CorpusUtterance(place, speaker, problem=str(error))
            continue
        try:
            split = split_label(values.get("split"))
            section = (seconds(values, "offset"), seconds(values, "duration"))
        except (TypeError, ValueError) as error:
            problem = f"{place}: {error}" if by_file else str(error)
            yield CorpusUtterance(name if by_file else place, speaker, problem=problem)
            continue
        yield CorpusUtterance(name, speaker, split, labels, None, *section)


def _as_text(value: object) -> str:
    """Return a label as text; empty for a label that is neither text nor a number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas converts integer columns with missing values to float
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _metadata(corpus: Path) -> Iterator[CorpusUtterance]:
    """Yield the rows of all AudioFolder tables, such as metadata.csv, in a folder and its subfolders.

    A table that cannot be read, or has no column of audio, gives one utterance with a problem.
    """
    # `folder`, the caller, reports the folders that cannot be read.
    tables = find_files(corpus, (".csv", ".tsv", ".jsonl"), report=lambda _: None, unread=[])
    for path in [path for name in METADATA_NAMES for path in tables if path.name == name]:
        try:
            check_link(path, corpus)
            if path.suffix == ".jsonl":
                check_audio_key(path)
            # `by_file`, since a file with an invalid row must not be used without the labels in that row.
            for row in table(path, by_file=True):
                yield replace(row, path=Path(os.path.normpath(path.parent.relative_to(corpus) / row.path)))
        except (RepeatedColumnError, SegmentsNotReadError):
            raise
        except (ConfigError, OSError) as error:
            problem = f"{why_unreadable(error, path)}; the labels in this table are not used"
            yield CorpusUtterance(path.relative_to(corpus), "", problem=problem)


LAYOUTS: dict[str, Callable[[Path], Iterator[CorpusUtterance]]] = {
    "librispeech": librispeech,
    "mls": mls,
    "commonvoice": commonvoice,
    "vctk": vctk,
    "folder": folder,
    "table": table,
}


def hold_out(utterances: list[CorpusUtterance], share: float) -> list[CorpusUtterance]:
    """Assign each utterance without a split to "train" or "valid".

    All utterances of a unit get the same split. The unit of an utterance is its speaker, or its file if all utterances
    have the same speaker. If the speaker is unknown, the unit is the folder, or the file if there are fewer than
    1 / `share` folders. A hash of the unit's name determines the split, so that a growing corpus keeps its validation
    set. If `share` is between 0 and 1, each of the two splits gets at least one unit; a single unit is assigned to
    "train".

    Args:
        utterances: utterances without a `problem`. An utterance that has a split keeps this split.
        share: fraction of the units to assign to "valid".

    Returns:
        The utterances in the same order, all with a split.
    """
    unit = _units(utterances, share)

    def name(utterance: CorpusUtterance) -> str:
        path = utterance.path
        names = {"speaker": utterance.speaker, "folder": path.parent.as_posix(), "file": path.as_posix()}
        return names[unit(utterance)]

    hashes = {
        name(utterance): zlib.crc32(name(utterance).encode(errors="surrogateescape"))
        for utterance in utterances
        if utterance.split is None
    }
    order = sorted(hashes, key=hashes.__getitem__)
    count = sum(value < share * 2**32 for value in hashes.values())
    if 0 < share < 1 and order:  # the hashes of a few names may all give the same split
        count = min(max(count, 1), len(order) - 1)
    held = set(order[:count])
    return [
        replace(utterance, split=utterance.split or ("valid" if name(utterance) in held else "train"))
        for utterance in utterances
    ]


def held_out_by(utterances: list[CorpusUtterance], share: float) -> str:
    """Return the kind of unit that `hold_out` assigns to splits: "speaker", "folder" or "file".

    The result names several kinds if they are mixed, as in "speaker or file". It is empty if all utterances have a
    split already. The arguments are those of `hold_out`.
    """
    unit = _units(utterances, share)
    units = {unit(utterance) for utterance in utterances if utterance.split is None and not utterance.problem}
    return " or ".join(sorted(units, reverse=True))


def _units(utterances: list[CorpusUtterance], share: float) -> Callable[[CorpusUtterance], str]:
    """Return a function from an utterance to the kind of its unit; see `hold_out`.

    The kind is "speaker", "folder" or "file".
    """
    speakers = {utterance.speaker for utterance in utterances if utterance.split is None}
    folders = {utterance.path.parent for utterance in utterances if utterance.split is None}

    def unit(utterance: CorpusUtterance) -> str:
        if utterance.speaker and len(speakers) > 1:
            return "speaker"
        return "folder" if not utterance.speaker and share * len(folders) >= 1 else "file"

    return unit


def _without_split(transcript: Path, corpus: Path, name: str) -> CorpusUtterance:
    problem = f"the folder name {shorten(name)!r} is not a split; expected a name such as train, dev or test"
    return CorpusUtterance(transcript.relative_to(corpus), "", problem=problem)


def _row(line: bytes, columns: list[str]) -> dict[str, str]:
    """Split one line of a TSV table, and return a dict from each column to its field.

    Quotes have no special meaning.

    Raises:
        ValueError: if the line is not UTF-8, has a different number of fields than the header, or has a field of more
            than `MAX_FIELD` characters.
    """
    fields = decode(line).split("\t")
    if len(fields) != len(columns):
        found = counted(len(fields), "field")
        raise ValueError(f"the row has {found} ({shorten(fields)}), but the header has {len(columns)}")
    row = dict(zip(columns, fields, strict=True))
    for name, value in row.items():
        if len(value) > MAX_FIELD:
            raise ValueError(f"the field {name!r} has {len(value)} characters; the limit is {MAX_FIELD}")
    return row


def _below(name: str) -> Path:
    """Return the path of an audio file that a table lists, relative to the folder of audio files.

    Raises:
        ValueError: if the path is empty, absolute, or contains `..`.
    """
    path = Path(name)
    if not name.strip() or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{shorten(name)!r} is not a path inside the folder of audio files")
    return path


def _is_file_name(name: str) -> bool:
    """Return whether a name in a transcript is a valid file name, without folders."""
    return name == Path(name).name and len(os.fsencode(name)) <= MAX_NAME - len(".flac")
