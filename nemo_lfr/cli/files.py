"""Plan, check and run the tasks of `encode` and `decode`. A task is an input file and its output file."""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lfr.cli.identify import (
    TOKEN_SUFFIX,
)
from nemo_lfr.cli.inputs import check_input, path_exists
from nemo_lfr.cli.progress import progress
from nemo_lfr.cli.results import FileFigures
from nemo_lfr.cli.session import current, fail, note, print_line
from nemo_lfr.errors import NemoLfrError, OutputExistsError, counted
from nemo_lfr.io.atomic import check_overwrite, sweep
from nemo_lfr.io.folders import AUDIO_SUFFIXES, describe_contents, find_files
from nemo_lfr.io.globs import find_matches
from nemo_lfr.io.locate import URL, expand_home
from nemo_lfr.io.shortage import shortage_of

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec


@dataclass(frozen=True)
class FileTask:
    """Task of `encode` or `decode`.

    Attributes:
        source: path of the input file.
        target: path of the output file.
        replaces_link: whether the output replaces a link to a missing file. Only --skip-existing sets this attribute.
        keeps_existing: value of --skip-existing. If True, the task counts as done if another process writes `target`
            first.
    """

    source: Path
    target: Path
    replaces_link: bool = False
    keeps_existing: bool = False


def plan_tasks(
    inputs: Sequence[str],
    out: Path | None,
    suffixes: Collection[str],
    new_suffix: str,
    report: Callable[[str], None] = note,
    unread: list[OSError] | None = None,
    possible: Sequence[str] | None = None,
) -> list[FileTask]:
    """Expand files, folders and globs into tasks.

    The subfolders of an input folder are mirrored under `out`. If `out` ends in `new_suffix` and is not an existing
    folder, it is the output file of a single input.

    Args:
        inputs: paths and glob patterns from the command line.
        out: output folder, or output file of a single input; None writes beside the inputs.
        suffixes: lower-case suffixes of the files to select in folders.
        new_suffix: suffix of the outputs.
        report: function that is called after all checks have passed, with one line for each folder in which files
            were skipped.
        unread: list to which the errors of unreadable folders are added. With None, the first such error is raised,
            but folders that cannot be searched for matches of a glob pattern are ignored. If the only input is
            unreadable, its error is always raised.
        possible: all suffixes that an output file may have, for messages; None if `new_suffix` is the only one.

    Returns:
        Tasks without duplicates.

    Raises:
        NemoLfrError: if an input or `out` is not valid, or if an output would replace an input or another output.
    """
    passed_over: list[str] = []
    single = names_a_file(out, new_suffix, possible)
    tasks: list[FileTask] = []
    for text in inputs:
        if (text.startswith("~") or URL.match(text)) and not os.path.lexists(text):
            text = str(expand_home(text))
        exists = path_exists(text)
        unsearched: list[OSError] = []
        matches = [Path(text)] if exists else [Path(match) for match in find_matches(text, unsearched)]
        if not matches:
            raise NemoLfrError(_not_found(text, inputs, new_suffix, unsearched))
        if unread is not None:
            unread += unsearched
        is_only = len(inputs) == len(matches) == 1
        if single and (not is_only or os.path.isdir(matches[0])):
            raise NemoLfrError(
                f"--out {out} names one {new_suffix} file, but the input is not a single file; pass a folder as --out."
            )
        for path in sorted(matches):
            if os.path.isdir(path):
                try:
                    files = find_files(path, suffixes, report=passed_over.append, unread=unread)
                except OSError as error:
                    if is_only or unread is None:
                        raise
                    unread.append(error)
                    continue
                if not files and len(matches) == 1 and (is_only or not unread):
                    contents = describe_contents(path, suffixes)
                    raise NemoLfrError(f"{path}: no {_kinds(suffixes)} file in this folder{contents}.")
                tasks += [
                    FileTask(file, _renamed((out or path) / file.relative_to(path), new_suffix)) for file in files
                ]
                continue
            try:
                check_input(path, suffixes, is_only=is_only)
            except OSError:  # the task fails, while the other inputs are processed
                if is_only or unread is None:
                    raise
            if single and out is not None:
                tasks.append(FileTask(path, out))
            else:
                tasks.append(FileTask(path, _renamed((out or path.parent) / path.name, new_suffix)))
    _check_targets(tasks)
    for line in passed_over:
        report(f"nemo-lfr: {line}")
    return list(dict.fromkeys(tasks))


def _check_targets(tasks: Sequence[FileTask]) -> None:
    """Raise NemoLfrError if two tasks have the same output, or the output of a task is its input."""
    targets: dict[Path, Path] = {}
    for task in dict.fromkeys(tasks):
        if task.target in targets:
            raise NemoLfrError(
                f"{targets[task.target]} and {task.source} would both be written to {task.target}; rename one of "
                "them, or run the command for each of them with another --out."
            )
        if task.target == task.source:
            raise NemoLfrError(f"{task.source} is the same file as its output; pass another folder as --out.")
        targets[task.target] = task.source


def _not_found(text: str, inputs: Sequence[str], new_suffix: str, unread: Sequence[OSError]) -> str:
    """Return the message for an input that does not exist.

    If the missing input is the last one and looks like an output, the message suggests --out.
    """
    if any(char in text for char in "*?["):
        reason = f" ({unread[0].filename}: {unread[0].strerror})" if unread else ""
        return f"{text}: no file matches this pattern{reason}."
    missing = f"{text or repr(text)}: no such file or folder"
    if len(inputs) > 1 and text == inputs[-1] and text:
        is_output = Path(text).suffix.lower() in {new_suffix, ""}
        return f"{missing}; if it is the output, pass it as --out {text}." if is_output else f"{missing}."
    return f"{missing}."


def names_a_file(out: Path | None, suffix: str, possible: Sequence[str] | None = None) -> bool:
    """Return whether --out names an output file rather than a folder.

    Args:
        out: value of --out, if it was passed.
        suffix: suffix of the outputs in lower case, such as ".lfr".
        possible: all suffixes that an output file may have, for messages; None if `suffix` is the only one.

    Raises:
        NemoLfrError: if --out has the suffix of another kind of output, or is an existing file with another suffix.
    """
    if out is None or out.is_dir():
        return False
    if out.suffix.lower() == suffix:
        return True
    suffixes = " or ".join(possible or (suffix,))
    if out.suffix.lower() in AUDIO_SUFFIXES | {TOKEN_SUFFIX}:
        raise NemoLfrError(
            f"--out {out}: the result is a {suffixes} file; pass a folder, or a name that ends in {suffixes}."
        )
    if out.exists():
        raise NemoLfrError(f"--out {out} is a file; pass a folder, or a name that ends in {suffixes} for one input.")
    return False


def _renamed(path: Path, suffix: str) -> Path:
    return path.with_name(path.stem + suffix)


def _kinds(suffixes: Collection[str]) -> str:
    return "audio" if len(suffixes) > 1 else next(iter(suffixes))


def pending_tasks(tasks: Sequence[FileTask], overwrite: bool, skip_existing: bool) -> list[FileTask]:
    """Return the tasks that remain to be run, and remove temporary files of earlier runs.

    Args:
        tasks: planned tasks.
        overwrite: value of --overwrite.
        skip_existing: value of --skip-existing; if True, tasks whose output exists are dropped. An output that is a
            link to a missing file counts as missing. The link is replaced, and nothing is written to its target.

    Raises:
        NemoLfrError: if both options are set, if an output exists and neither option is set, or if an output folder
            is an existing file.
    """
    if overwrite and skip_existing:
        raise NemoLfrError("--overwrite and --skip-existing are mutually exclusive; remove one of them.")
    kept = {task for task in tasks if skip_existing and os.path.isfile(task.target)}
    if kept:
        note(f"nemo-lfr: {len(kept)} of {counted(len(tasks), 'result')} kept, because they already exist.")
    left = [
        replace(
            task,
            replaces_link=skip_existing and os.path.islink(task.target) and not os.path.exists(task.target),
            keeps_existing=skip_existing,
        )
        for task in tasks
        if task not in kept
    ]
    names: dict[Path, list[str]] = {}
    for task in left:
        names.setdefault(task.target.parent, []).append(task.target.name)
    for folder, own in names.items():
        sweep(folder, own)
    for task in left:
        try:
            check_overwrite(task.target, overwrite or task.replaces_link)
        except OutputExistsError:
            if not skip_existing:  # otherwise, another process has written the file since then
                raise
        _refuse_file_as_folder(task.target)
    return left


def tasks_to_run(
    inputs: Sequence[str],
    out: Path | None,
    suffixes: Collection[str],
    suffix: str,
    overwrite: bool,
    skip: bool,
    possible: Sequence[str] | None = None,
) -> list[FileTask]:
    """Return the tasks for all input files, except those whose output is kept.

    Skipped files in input folders are reported, and folders that cannot be read are recorded as failures.

    Args:
        inputs: paths and glob patterns from the command line.
        out: output folder, or output file of a single input; None writes beside the inputs.
        suffixes: lower-case suffixes of the files to select in folders.
        suffix: suffix of the outputs.
        overwrite: value of --overwrite.
        skip: value of --skip-existing, with which existing outputs are kept.
        possible: all suffixes that an output file may have, for messages; None if `suffix` is the only one.

    Raises:
        NemoLfrError: if inputs or outputs are invalid (see `plan_tasks`), if `overwrite` and `skip` are both set, or
            if an output exists and neither is set.
    """
    passed_over: list[str] = []
    unread: list[OSError] = []
    planned = plan_tasks(inputs, out, suffixes, suffix, passed_over.append, unread, possible)
    tasks = pending_tasks(planned, overwrite, skip)
    for line in passed_over:
        note(line)
    for error in {os.path.abspath(error.filename): error for error in unread}.values():
        fail(error.filename, error)
    return tasks


def _refuse_file_as_folder(target: Path) -> None:
    """Raise an error if a parent folder of an output is an existing file."""
    for folder in target.parents:
        if os.path.isdir(folder):
            return
        if os.path.lexists(folder):
            raise NemoLfrError(f"{target} cannot be written: {folder} is not a folder; choose another --out.")


Work = Callable[[list[FileTask]], Iterator[FileFigures]]


def run_tasks(tasks: Sequence[FileTask], work: Work, batch_size: int) -> dict[str, Any]:
    """Run all tasks and print the paths of the outputs.

    If a task fails, the failure is recorded (`session.fail`) and the other tasks are run. If a batch fails, its
    remaining tasks are run one by one.

    Args:
        tasks: tasks to run.
        work: function that runs a batch of tasks. For each task, in order, it yields the return value of `task_result`
            as soon as the output file is complete.
        batch_size: number of tasks per batch.

    Returns:
        A dict with the keys of `FilesResult`, except `failures`.
    """
    results: list[FileFigures] = []
    total = len(tasks) + len(current().failures)  # failures so far: folders that cannot be read
    shows_lines = not current().quiet and (current().verbose or sys.stderr.isatty())
    with progress(len(tasks)) as advance:
        for start in range(0, len(tasks), batch_size):
            batch = list(tasks[start : start + batch_size])
            for result in _attempts(batch, work):
                results.append(result)
                advance(_line(result) if shows_lines else "")
    for result in results:
        print_line(result["output"])
    current().report_failures(total)
    return {"files": results}


def _attempts(batch: list[FileTask], work: Work) -> Iterator[FileFigures]:
    done = 0
    try:
        for result in work(batch):
            done += 1
            yield result
        return
    except (NemoLfrError, OSError) as error:
        if len(batch) == 1:
            if batch[0].keeps_existing and isinstance(error, OutputExistsError):
                note(f"nemo-lfr: {batch[0].target} was written by another process, and is kept.")
                return
            if isinstance(error, OSError) and error.filename is None and not isinstance(error, NemoLfrError):
                error.filename = str(batch[0].target)
            fail(batch[0].source, error)
            return
    except (MemoryError, RuntimeError) as error:
        if (shortage := shortage_of(error)) is None:
            raise
        if len(batch) == 1:
            # Use the base class, because the constructors of subclasses may take other arguments.
            kind = MemoryError if isinstance(error, MemoryError) else RuntimeError
            fail(batch[0].source, kind(f"{batch[0].source}: {shortage}"))
            return
        error.__traceback__ = None  # frees the arrays of the failed attempt, which the traceback references
    for task in batch[done:]:
        yield from _attempts([task], work)


def _line(result: FileFigures) -> str:
    return (
        f"{result['input']} -> {result['output']}  {result['duration_s']:.2f} s  {result['token_file_bytes']} bytes  "
        f"{result['bit_rate_bps'] / 1000:.2f} kbit/s  {result['times_real_time']:.1f}x real time"
    )


def task_result(
    task: FileTask, codec: "Codec[Any]", num_samples: int, token_file: Path, seconds: float
) -> FileFigures:
    """Describe a finished task, for the output of --json.

    Args:
        task: the finished task.
        codec: codec that was used.
        num_samples: number of samples in the recording, at the codec's sample rate.
        token_file: path of the token file: the output of `encode`, or the input of `decode`.
        seconds: wall-clock time that the task took, in seconds.
    """
    if not num_samples:
        note(f"{task.source}: the input, or the selected part, contains no samples")
    duration = num_samples / codec.sample_rate
    size = token_file.stat().st_size
    return {
        "input": str(task.source),
        "output": str(task.target),
        "duration_s": round(duration, 4),
        "samples": num_samples,
        "token_file_bytes": size,
        "bit_rate_bps": round(8 * size / duration, 1) if duration else 0.0,
        "times_real_time": round(duration / max(seconds, 1e-9), 2),
    }
