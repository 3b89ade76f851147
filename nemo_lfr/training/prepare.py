"""`nemo-lfr prepare`: a downloaded corpus into NeMo manifests to train and validate on."""

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

FAILURES = "failures.jsonl"
# What has been opened so far: a run that was cut off goes on from here.
JOURNAL = ".opened.jsonl"


@contextmanager
def silent(total: int) -> Iterator[Callable[[str], None]]:
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
    """Write OUT/train.json, valid.json and test.json, and failures.jsonl, as far as there are such.

    One that is there already, and that this run has nothing for, is left and named in the result.

    A line has `audio_filepath` relative to `corpus`, `duration` in seconds, `speaker`, and `lang` and `text` where the
    corpus has them. Files that cannot be opened, or were cut short, are listed with the reason, and so are rows
    and transcripts that cannot be read.

    Args:
        kind: one of `LAYOUTS`.
        corpus: the unpacked archive; audio stays where it is.
        out: folder for the manifests.
        valid_share: of the speakers, to hold out where the corpus has no validation set.
        jobs: files opened at a time.
        check: decode every file to its end, so that one that is cut or damaged is a failure, and durations are those
            of what can be decoded. Without it headers are trusted, which is quicker.
        progress: gives, for the number of files that are to be opened, a context whose value is called after each,
            with what there is to say of it.

    Returns:
        Counts and hours by split, failures and paths, ready to print.

    Raises:
        NemoLfrError: if the corpus has no utterance of this layout.
    """
    if not corpus.is_dir():
        problem = "is not a folder; unpack an archive first" if corpus.exists() else "no such folder"
        raise NemoLfrError(f"{corpus}: {problem}.")
    try:
        utterances = list(LAYOUTS[kind](corpus.resolve()))
    except NemoLfrError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise NemoLfrError(f"{corpus}: not {kind} as it is published ({error}); {_expected(kind)}") from error
    if kind != "folder" and utterances and all(utterance.problem for utterance in utterances):
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
    """Leave each file to the first row that names it: two would train on it twice, or validate on it."""
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
    """Duration of each file in seconds, or why it cannot be used."""
    mine = {"kind": kind, "corpus": str(corpus.resolve()), "check": check}
    with Journal(journal) as log:
        found: dict[str, float | str] = {}
        ours = False
        for entry in log:
            if isinstance(entry, dict):
                ours = entry == mine
            elif ours and _is_duration(entry):  # what failed may have been mended
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
    """Seconds that can be decoded of a file, or why it cannot be used."""
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
