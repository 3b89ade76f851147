"""Write NeMo manifests for downloaded corpora, for `nemo-lfr prepare`."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_lfr.errors import AudioError, Failure, NemoLfrError, counted, failure, shorten
from nemo_lfr.io.atomic import check_overwrite, sweep
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.io.folders import AUDIO_SUFFIXES, describe_contents, find_files
from nemo_lfr.io.journal import Journal, Progress, write_text
from nemo_lfr.io.layouts import LAYOUTS, CorpusUtterance, folder, held_out_by, hold_out
from nemo_lfr.io.lhotse_recipes import PREFIX, lhotse_recipe
from nemo_lfr.io.locate import resolve, resolve_folder
from nemo_lfr.io.manifests import MAX_SECONDS
from nemo_lfr.io.reading import rounding
from nemo_lfr.io.repeated import mark_repeated
from nemo_lfr.io.splits import SPLITS
from nemo_lfr.io.tables import is_table, refuse_spreadsheet

FAILURES = "failures.jsonl"
WRITTEN = {*(f"{split}.json" for split in SPLITS), FAILURES}  # files that a run may write
# Journal for resuming an interrupted run: durations of the files that were opened, with size and modification time
JOURNAL = ".opened.jsonl"
NAMED = 5  # maximum number of names of files that a message lists
# Layouts whose tables name the split of each recording.
KEEPS_SPLITS = ("commonvoice", "table")
# For messages: the files that each layout of a published corpus consists of.
EXPECTED = {
    "librispeech": "PART/SPEAKER/CHAPTER/*.flac with *.trans.txt beside them, as in LibriSpeech (openslr.org/12)",
    "mls": "mls_LANGUAGE/SPLIT/transcripts.txt and audio/SPEAKER/BOOK/*, as in Multilingual LibriSpeech "
    "(openslr.org/94)",
    "commonvoice": "LANGUAGE/{train,dev,test}.tsv with clips/*.mp3, or ss-corpus-*.tsv with audios/*, as in Common "
    "Voice",
    "vctk": "wav48_silence_trimmed/SPEAKER/*_mic1.flac or wav48/SPEAKER/*.wav, as in VCTK",
    "folder": "audio files, such as .wav or .flac",
    "table": "a row for each audio file",
}


@dataclass
class Split:
    """Manifest of one split.

    Attributes:
        manifest: path of the manifest.
        utterances: number of utterances in the manifest.
        speakers: number of speakers.
        duration_s: total duration of the utterances, in seconds.
    """

    manifest: Path
    utterances: int
    speakers: int
    duration_s: float


@dataclass
class Prepared:
    """Result of `prepare`.

    Attributes:
        audio_dir: absolute path of the folder with the audio files, to pass as `audio_dir` to stock NeMo or
            `tokenize`.
        splits: manifest of each split that has utterances, by name of the split.
        failures: records of the files, rows and transcripts that cannot be used.
        failures_file: path of failures.jsonl, which contains these records; None if there are no failures.
        held_out_by: kind of group that was held out for validation: "speaker", "folder" or "file". Several kinds are
            joined by "or". Empty if nothing was held out.
    """

    audio_dir: Path
    splits: dict[str, Split] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    failures_file: Path | None = None
    held_out_by: str = ""


@contextmanager
def silent(total: int) -> Iterator[Callable[[str], None]]:
    """Report no progress. This is the default progress callback of `prepare`."""
    yield lambda text: None


def prepare(
    kind: str,
    corpus: Path,
    out: Path,
    *,
    valid_share: float = 0.02,
    speaker_level: int | None = None,
    workers: int = 4,
    check: bool = True,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Prepared:
    """Write NeMo manifests for a corpus: train.json, valid.json and test.json.

    Each manifest line contains `audio_filepath`, `duration` in seconds, `speaker`, and `lang` and `text` if the corpus
    has these labels. The paths are absolute. A split without utterances has no manifest. Files, rows and transcripts
    that cannot be used are listed in failures.jsonl, with the reason. An interrupted run is resumed.

    Args:
        kind: layout of the corpus, a key of `LAYOUTS`, or "lhotse:NAME" for a recipe of Lhotse.
        corpus: folder with the unpacked archive, or path of a table. Audio files are not copied.
        out: output folder for the manifests.
        valid_share: fraction of the speakers (or of folders or files, see `hold_out`) to use for validation if the
            corpus has no validation set. At least one of them remains for training, unless the fraction is 1.
            Recordings keep the split that a table or Common Voice assigns to them.
        speaker_level: for the layout "folder", depth of the folders that are named after speakers; see `folder`.
        workers: number of files to open in parallel.
        check: whether to decode every file completely, which finds truncated and damaged files and gives exact
            durations. Otherwise the durations are read from the headers, which is faster.
        overwrite: whether to replace or remove all manifests and the failures.jsonl of an earlier run in the output
            folder.
        progress: progress callback; see `nemo_lfr.io.journal`.

    Returns:
        The manifests, and the files, rows and transcripts that cannot be used.

    Raises:
        NemoLfrError: if the layout is unknown, the corpus does not have this layout, no file can be used, or
            `speaker_level` does not fit the layout or the depth of the files. Also if another run is writing to the
            output folder, or if the folder has manifests of a completed run and `overwrite` is not set.
        MissingExtraError: if Lhotse is needed but not installed.
    """
    read = lhotse_recipe(kind.removeprefix(PREFIX)) if kind.startswith(PREFIX) else LAYOUTS.get(kind)
    if read is None:
        raise NemoLfrError(f"layout {shorten(kind)!r} is unknown; use {', '.join(LAYOUTS)} or {PREFIX}NAME.")
    if speaker_level is not None:
        if kind != "folder":
            raise NemoLfrError(
                f"--speaker-level (speaker_level=) is only valid for the layout 'folder', but the layout is {kind!r}; "
                "remove it."
            )
        read = partial(folder, speaker_level=speaker_level)
    refuse_spreadsheet(corpus)
    if kind == "table" and not is_table(corpus):
        problem = "this is not a .csv, .tsv or metadata.jsonl file" if corpus.exists() else "no such file"
        raise NemoLfrError(f"{corpus}: {problem}.")
    if kind != "table" and not corpus.is_dir():
        problem = "this is not a folder; unpack an archive first" if corpus.exists() else "no such folder"
        if is_table(corpus):
            problem = "this is a table, not a folder; use `nemo-lfr prepare table`"
        raise NemoLfrError(f"{corpus}: {problem}.")
    try:
        utterances = list(read(resolve_folder(corpus)))
    except NemoLfrError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise NemoLfrError(
            f"{corpus}: this is not the published layout of {kind} ({error}); {_expected(kind)}"
        ) from error
    source = corpus
    if kind == "table":
        corpus = corpus.parent
    if kind not in ("folder", "table") and utterances and all(utterance.problem for utterance in utterances):
        first = utterances[0]
        raise NemoLfrError(
            f"{corpus}: this is not the published layout of {kind} ({first.path}: {first.problem}); {_expected(kind)}"
        )
    if not utterances:
        wanted = {"folder": "audio file", "table": "row"}.get(kind, f"utterance of {kind}")
        raise NemoLfrError(f"{source}: no {wanted} in this {_contents(kind, corpus)}; {_expected(kind)}")
    _check_level(speaker_level, utterances, corpus)
    utterances = mark_repeated(utterances)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        interrupted = (out / JOURNAL).exists()  # the earlier run may have written some manifests
        overwrite |= interrupted
        for name in sorted(WRITTEN):
            check_overwrite(out / name, overwrite)
        return _write_all(kind, utterances, corpus, out, valid_share, workers, check, overwrite, progress)


def _check_level(speaker_level: int | None, utterances: Sequence[CorpusUtterance], corpus: Path) -> None:
    """Raise NemoLfrError if no audio file is at least `speaker_level` folders deep in the corpus."""
    depth = max(len(utterance.path.parts) for utterance in utterances) - 1
    if speaker_level is not None and speaker_level > depth:
        remedy = f"pass a number from 1 to {depth}, or remove it" if depth else "remove it"
        raise NemoLfrError(
            f"{corpus}: --speaker-level (speaker_level=) is {speaker_level}, but the audio files are at most "
            f"{counted(depth, 'folder')} deep; {remedy}."
        )


def _write_all(
    kind: str,
    utterances: list[CorpusUtterance],
    corpus: Path,
    out: Path,
    valid_share: float,
    workers: int,
    check: bool,
    overwrite: bool,
    progress: Progress,
) -> Prepared:
    """Open all files and write the manifests; see `prepare`."""
    sweep(out, sorted(WRITTEN))
    found = _open_all(kind, utterances, corpus, out / JOURNAL, workers, check, progress)
    utterances = [_fitted(utterance, found) for utterance in utterances]
    result = Prepared(Path(os.path.abspath(corpus)))  # not resolved, so that it is the folder as the user names it
    for utterance in utterances:
        if utterance.problem:
            result.failures.append({"input": str(utterance.path), "error": utterance.problem, "type": "NemoLfrError"})
    result.failures += [value for value in found.values() if isinstance(value, dict)]
    if not any(_is_usable(utterance, found) for utterance in utterances):
        _write(out / FAILURES, result.failures, overwrite)
        raise NemoLfrError(f"no file in the corpus can be used; {out / FAILURES} lists the reasons.")
    # First leave out the files that cannot be used: they may be all files of a split.
    utterances = [utterance for utterance in utterances if _is_usable(utterance, found)]
    rest = "train" if any(item.split == "valid" for item in utterances) else None  # None: `hold_out` decides
    divided = (None,) if kind in KEEPS_SPLITS else ("train", None)
    utterances = [replace(item, split=rest) if item.split in divided else item for item in utterances]
    units = held_out_by(utterances, valid_share)
    utterances = hold_out(utterances, valid_share)
    result.held_out_by = units if valid_share and any(utterance.split == "valid" for utterance in utterances) else ""
    for split in SPLITS:
        chosen = [utterance for utterance in utterances if utterance.split == split]
        own = [_entry(utterance, result.audio_dir) for utterance in chosen]
        if own:
            path = _write(out / f"{split}.json", own, overwrite)
            seconds = sum(entry["duration"] for entry in own)
            speakers = len({entry["speaker"] for entry in own} - {""})
            result.splits[split] = Split(path, len(own), speakers, round(seconds, 4))
    if result.failures:
        result.failures_file = _write(out / FAILURES, result.failures, overwrite)
    written = {f"{split}.json" for split in result.splits} | ({FAILURES} if result.failures else set())
    if overwrite:
        for name in WRITTEN - written:
            (out / name).unlink(missing_ok=True)
    (out / JOURNAL).unlink(missing_ok=True)
    return result


def _expected(kind: str) -> str:
    if kind.startswith(PREFIX):
        return "see the documentation of the Lhotse recipe for the folder that it expects."
    return f"expected {EXPECTED[kind]}."


def _contents(kind: str, corpus: Path) -> str:
    """Describe what a folder or table without utterances contains; the text is part of a message."""
    if kind == "table":
        return "table"
    count = len(find_files(corpus, AUDIO_SUFFIXES, report=lambda _: None, unread=[]))
    if not count:
        return f"folder{describe_contents(corpus, AUDIO_SUFFIXES)}"
    names = sorted(path.name for path in corpus.iterdir() if not path.name.startswith("."))
    entries = ", ".join(shorten(name) for name in names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    files = counted(count, "audio file")
    return f"folder, which contains {entries} with {files} (nemo-lfr prepare folder reads any such folder)"


def _open_all(
    kind: str,
    utterances: list[CorpusUtterance],
    corpus: Path,
    journal: Path,
    workers: int,
    check: bool,
    progress: Progress,
) -> dict[str, float | Failure]:
    """Return a dict from the path of each audio file to its duration in seconds, or to the record of a failure.

    Files of utterances with a `problem` are left out. The durations are also written to `journal`. Durations that an
    interrupted run wrote there are used again if the files have not changed.
    """
    mine = {"kind": kind, "corpus": str(resolve(corpus)), "check": check}
    with Journal(journal) as log:
        found: dict[str, float | Failure] = {}
        known: dict[str, list[Any]] = {}
        ours = False
        for entry in log:
            if isinstance(entry, dict):
                ours = entry == mine
            elif ours and _is_duration(entry):  # files that failed are opened again, since they may have been repaired
                known[entry[0]] = entry[1:]
        log.add(mine)
        usable = list(dict.fromkeys(str(utterance.path) for utterance in utterances if not utterance.problem))
        states = {path: _state(corpus / path) for path in usable}
        for path, state in states.items():
            if path in known and known[path][1:] == state:  # otherwise the file was replaced since then
                found[path] = known[path][0]
        missing = [path for path in usable if path not in found]
        measure = _decoded_duration if check else _duration
        with ThreadPoolExecutor(workers) as pool, progress(len(missing)) as advance:
            for path, value in zip(missing, pool.map(lambda path: measure(corpus, path), missing), strict=True):
                found[path] = value
                log.add([path, value, *states[path]])
                advance(f"{path}: {value['error']}" if isinstance(value, dict) else "")
    return found


def _state(path: Path) -> list[int]:
    """Return the size and the modification time of a file; [0, 0] if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def _is_duration(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 4 or not isinstance(entry[0], str):
        return False
    return type(entry[1]) in (int, float) and 0 < entry[1] <= MAX_SECONDS


def _duration(corpus: Path, name: str) -> float | Failure:
    """Return the duration of a file in seconds, or a failure record if it cannot be opened or is empty."""
    try:
        with AudioReader(corpus / name, None) as reader:
            if reader.duration <= 0:
                raise AudioError("the file contains no samples")
            return round(reader.duration, 4)
    except (NemoLfrError, OSError) as error:
        return _unusable(corpus, name, error)


def _decoded_duration(corpus: Path, name: str) -> float | Failure:
    """Decode a file and return its duration in seconds, or a failure record if it cannot be decoded."""
    try:
        with AudioReader(corpus / name, None) as reader:
            num_samples = sum(len(block) for block in reader.blocks())
            if not num_samples:
                raise AudioError("the file contains no samples")
            return round(num_samples / reader.native_rate, 4)
    except (NemoLfrError, OSError) as error:
        return _unusable(corpus, name, error)


def _unusable(corpus: Path, name: str, error: Exception) -> Failure:
    """Return the record of a failure, in which the path of the file is relative to the corpus."""
    record = failure(name, error)
    record["error"] = record["error"].removeprefix(f"{corpus / name}: ")
    return record


def _fitted(utterance: CorpusUtterance, found: dict[str, float | Failure]) -> CorpusUtterance:
    """Adapt an utterance's duration to the length of its file.

    A missing duration becomes the rest of the file, and rounding differences are corrected. If the utterance extends
    beyond the end of its file, the returned utterance has a `problem`.

    Args:
        utterance: the utterance.
        found: dict from the path of each file to its duration in seconds, or to a failure record.
    """
    total = found.get(str(utterance.path))
    if utterance.problem or not isinstance(total, float | int):
        return utterance
    start, duration = utterance.offset or 0.0, utterance.duration
    slack = rounding(duration or 0.0)
    if start + (duration or 0.0) > total + slack or start >= total:
        stop = "the end" if duration is None else f"{start + duration:.2f} s"
        return replace(
            utterance, problem=f"the file contains {total:.2f} s of audio, but the table lists {start:.2f} s to {stop}"
        )
    if duration is None or (utterance.offset is None and duration >= total - slack):
        duration = round(total - start, 4)
    return replace(utterance, duration=min(duration, total - start))


def _is_usable(utterance: CorpusUtterance, found: dict[str, float | Failure]) -> bool:
    return not utterance.problem and isinstance(found.get(str(utterance.path)), float | int)


def _entry(utterance: CorpusUtterance, audio_dir: Path) -> dict[str, Any]:
    section = {} if utterance.offset is None else {"offset": utterance.offset}
    return {
        "audio_filepath": str(audio_dir / utterance.path),
        **section,
        "duration": utterance.duration,
        "speaker": utterance.speaker,
    } | utterance.labels


def _write(path: Path, entries: Sequence[Mapping[str, Any]], overwrite: bool) -> Path:
    return write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), overwrite)
