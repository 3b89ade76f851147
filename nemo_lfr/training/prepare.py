"""Manifest preparation from downloaded corpora, for `nemo-lfr prepare`."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import sweep
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.io.journal import Journal, Progress, write_text
from nemo_lfr.io.layouts import LAYOUTS, SPLITS, CorpusUtterance, hold_out
from nemo_lfr.io.manifests import MAX_SECONDS
from nemo_lfr.io.tables import is_table

FAILURES = "failures.jsonl"
# Durations of the files opened so far, for resuming an interrupted run
JOURNAL = ".opened.jsonl"


@contextmanager
def silent(total: int) -> Iterator[Callable[[str], None]]:
    """Report no progress; the default of `prepare`."""
    yield lambda text: None


def prepare(
    kind: str,
    corpus: Path,
    out: Path,
    *,
    valid_share: float = 0.02,
    jobs: int = 4,
    check: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write NeMo manifests of a corpus: train.json, valid.json and test.json.

    Only splits with utterances are written. Existing manifests of other splits are kept and named in the result.
    Unusable files, rows and transcripts are listed with the reason in failures.jsonl. Each manifest line has
    `audio_filepath` relative to `corpus`, `duration` in seconds, `speaker`, and `lang` and `text` if the corpus has
    them.

    Args:
        kind: layout of the corpus, a key of `LAYOUTS`.
        corpus: folder of the unpacked archive, or the file of a table; audio files are not copied.
        out: output folder of the manifests.
        valid_share: fraction of the speakers to hold out if the corpus has no validation set.
        jobs: number of files to open in parallel.
        check: whether to decode every file to its end, so that truncated and damaged files are found and durations are
            exact. Otherwise headers are trusted, which is faster.
        progress: returns a context manager for a number of files; its value is called after each file, with a message
            that may be empty.

    Returns:
        File, number of utterances, speakers and hours of each split, the failures, and the audio folder, as text to
        print.

    Raises:
        NemoLfrError: if the corpus does not match the layout, or no file can be opened.
    """
    if kind == "table" and not is_table(corpus):
        problem = "is not a .csv, .tsv or metadata.jsonl file" if corpus.exists() else "no such file"
        raise NemoLfrError(f"{corpus}: {problem}.")
    if kind != "table" and not corpus.is_dir():
        problem = "is not a folder; unpack an archive first" if corpus.exists() else "no such folder"
        if is_table(corpus):
            problem = "is a table, not a folder; use `nemo-lfr prepare table`"
        raise NemoLfrError(f"{corpus}: {problem}.")
    try:
        utterances = list(LAYOUTS[kind](corpus.resolve()))
    except NemoLfrError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise NemoLfrError(f"{corpus}: not {kind} as it is published ({error}); {_expected(kind)}") from error
    if kind == "table":
        corpus = corpus.parent
    if kind not in ("folder", "table") and utterances and all(utterance.problem for utterance in utterances):
        first = utterances[0]
        raise NemoLfrError(
            f"{corpus}: not {kind} as it is published ({first.path}: {first.problem}); {_expected(kind)}"
        )
    if not utterances:
        raise NemoLfrError(f"{corpus}: no utterance of {kind} here; {_expected(kind)}")
    utterances = _once(utterances)
    if any(utterance.split is None for utterance in utterances):
        utterances = hold_out(utterances, valid_share)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        return _write_all(kind, utterances, corpus, out, jobs, check, progress)


def _write_all(
    kind: str, utterances: list[CorpusUtterance], corpus: Path, out: Path, jobs: int, check: bool, progress: Progress
) -> dict[str, Any]:
    """Open all files and write the manifests; see `prepare`."""
    sweep(out, [*(f"{split}.json" for split in SPLITS), FAILURES])
    found = _open_all(kind, utterances, corpus, out / JOURNAL, jobs, check, progress)
    problems = [(str(utterance.path), utterance.problem) for utterance in utterances if utterance.problem]
    problems += [(path, value) for path, value in found.items() if isinstance(value, str)]
    failures = [{"audio_filepath": path, "reason": reason} for path, reason in problems]
    if not any(_entry(utterance, found) for utterance in utterances):
        _write(out / FAILURES, failures)
        raise NemoLfrError(f"{corpus}: none of {len(failures)} files can be opened; {out / FAILURES} says why.")
    result: dict[str, Any] = {}
    for split in SPLITS:
        own = [entry for utterance in utterances if utterance.split == split and (entry := _entry(utterance, found))]
        if own:
            path = _write(out / f"{split}.json", own)
            hours = sum(entry["duration"] for entry in own) / 3600
            speakers = len({entry["speaker"] for entry in own})
            result[split] = f"{path}  ({len(own)} utterances, {speakers} speakers, {hours:.2f} hours)"
    if failures:
        result["failures"] = f"{_write(out / FAILURES, failures)}  ({len(failures)})"
    names = {f"{split}.json": split for split in SPLITS} | {FAILURES: "failures"}
    if others := [name for name, key in names.items() if key not in result and (out / name).exists()]:
        result["not of this run"] = ", ".join(str(out / name) for name in others)
    (out / JOURNAL).unlink(missing_ok=True)
    result["audio_dir"] = str(corpus)
    return result


def _once(utterances: list[CorpusUtterance]) -> list[CorpusUtterance]:
    """Mark repeated files as problems, so that each file is used once.

    Otherwise training would use a file twice, or validation would use a training file.
    """
    seen: set[Path] = set()
    kept = []
    for utterance in utterances:
        if utterance.problem is None:
            if utterance.path in seen:
                utterance = replace(utterance, problem="is listed more than once; its first row is used")
            seen.add(utterance.path)
        kept.append(utterance)
    return kept


def _expected(kind: str) -> str:
    return f"expected: {(LAYOUTS[kind].__doc__ or kind).splitlines()[0]}"


def _open_all(
    kind: str,
    utterances: list[CorpusUtterance],
    corpus: Path,
    journal: Path,
    jobs: int,
    check: bool,
    progress: Progress,
) -> dict[str, float | str]:
    """Return each file's duration in seconds, or the reason it is unusable."""
    mine = {"kind": kind, "corpus": str(corpus.resolve()), "check": check}
    with Journal(journal) as log:
        found: dict[str, float | str] = {}
        ours = False
        for entry in log:
            if isinstance(entry, dict):
                ours = entry == mine
            elif ours and _is_duration(entry):  # failed files are opened again: they may have been repaired
                found[entry[0]] = entry[1]
        log.add(mine)
        usable = [str(utterance.path) for utterance in utterances if not utterance.problem]
        missing = [path for path in usable if path not in found]
        measure = _decoded_duration if check else _duration
        with ThreadPoolExecutor(jobs) as pool, progress(len(missing)) as advance:
            for path, value in zip(missing, pool.map(lambda path: measure(corpus / path), missing), strict=True):
                found[path] = value
                log.add([path, value])
                advance(f"{path}: {value}" if isinstance(value, str) else "")
    return found


def _is_duration(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        return False
    return type(entry[1]) in (int, float) and 0 < entry[1] <= MAX_SECONDS


def _duration(path: Path) -> float | str:
    try:
        with AudioReader(path, None) as reader:
            if reader.duration <= 0:
                return "holds no samples"
            return round(reader.duration, 4)
    except (NemoLfrError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")


def _decoded_duration(path: Path) -> float | str:
    """Decode a file and return its duration in seconds, or why it is unusable."""
    try:
        with AudioReader(path, None) as reader:
            num_samples = sum(len(block) for block in reader.blocks())
            return round(num_samples / reader.native_rate, 4) if num_samples else "holds no samples"
    except (NemoLfrError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")


def _entry(utterance: CorpusUtterance, found: dict[str, float | str]) -> dict[str, Any] | None:
    duration = found.get(str(utterance.path))
    if utterance.problem or duration is None or isinstance(duration, str):
        return None
    return {
        "audio_filepath": str(utterance.path),
        "duration": duration,
        "speaker": utterance.speaker,
    } | utterance.labels


def _write(path: Path, entries: list[dict[str, Any]]) -> Path:
    return write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
