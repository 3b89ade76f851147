"""Compute the metrics of an evaluation in several processes."""

import multiprocessing
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import soundfile

from nemo_lfr.corpus.main_program import begin_worker, check_is_file, check_starts, new_children, safe_imports
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.evaluation.codecs.base import fit
from nemo_lfr.evaluation.metrics import METRICS, Metric, Signal, Undefined, Value, measure
from nemo_lfr.evaluation.recordings import read
from nemo_lfr.evaluation.results import Result
from nemo_lfr.io.journal import Journal, Progress
from nemo_lfr.io.manifests import Recording
from nemo_lfr.io.shortage import sharing

JOURNAL = "metrics.jsonl"
MAX_WORKERS = 61  # limit of a process pool on Windows


@dataclass(frozen=True)
class Output:
    """Audio that a codec produced from a recording, and the metrics to compute for it.

    Attributes:
        index: index of the codec in the list of results.
        path: file that contains the audio.
        names: names of the metrics to compute.
    """

    index: int
    path: Path
    names: list[str]


@dataclass(frozen=True)
class Task:
    """Recording with the outputs of all codecs. The features of the original are computed once per task.

    Attributes:
        key: key of the recording.
        recording: the original recording.
        rate: sample rate of the comparison in Hz.
        outputs: outputs of the codecs.
        table: descriptions of all metrics. In a worker process, metrics of other packages are not registered.
    """

    key: str
    recording: Recording
    rate: int
    outputs: list[Output]
    table: Mapping[str, Metric]


Measured = tuple[str, list[tuple[int, dict[str, Value]]]]


def measure_all(
    recordings: dict[str, Recording], results: Sequence[Result], rate: int, jobs: int, progress: Progress
) -> None:
    """Compute the metrics that the codecs' journals do not contain yet, and add them to the journals.

    Args:
        recordings: recordings by key.
        results: results of each codec. Stored and new metrics are added to their `values`.
        rate: sample rate of the comparison in Hz.
        jobs: number of processes.
        progress: progress callback; see `nemo_lfr.io.journal`.
    """
    for result in results:
        _load_values(result, recordings)
    tasks = []
    for key, recording in recordings.items():
        outputs = []
        for index, result in enumerate(results):
            names = [name for name in METRICS if key in result.round_trips and name not in result.values.get(key, {})]
            if names:
                outputs.append(Output(index, result.audio(key), names))
        if outputs:
            tasks.append(Task(key, recording, rate, outputs, METRICS))
    with ExitStack() as stack, progress(len(tasks)) as advance:
        folders = dict.fromkeys(result.folder for result in results)  # two names of the same codec share a folder
        journals = {folder: stack.enter_context(Journal(folder / JOURNAL)) for folder in folders}
        for key, measured in _in_parallel(tasks, jobs):
            for index, values in measured:
                _store_values(results[index], journals[results[index].folder], key, values)
            advance("")


def are_values(values: Any) -> bool:
    """Return whether a journal entry is a dictionary of metric values.

    A value is a number, null, or a string with the reason why the value is missing.
    """
    return isinstance(values, dict) and all(isinstance(value, str) or is_number(value) for value in values.values())


def is_number(value: Any) -> bool:
    """Return whether a value of a journal entry is a number or null."""
    return value is None or type(value) in (int, float)


def values_from_json(values: dict[str, Any]) -> dict[str, Value]:
    """Convert a journal entry to metric values.

    A string says why a value is missing, and becomes `Undefined`.
    """
    return {name: Undefined(value) if isinstance(value, str) else value for name, value in values.items()}


def read_pair(recording: Recording, output: Path, rate: int) -> tuple[Signal, Signal]:
    """Read a recording and the output of a codec.

    Args:
        recording: the recording.
        output: WAV file with the output of the codec.
        rate: sample rate of the comparison in Hz.

    Returns:
        The recording and the output. The output is trimmed or padded to the length of the recording.

    Raises:
        AudioError: if the recording cannot be read, or if the recording or the output is not valid (see `Signal`).
    """
    original = Signal(read(recording.path, rate, recording.offset, recording.duration), rate)
    return original, read_output(output, original)


def read_output(path: Path, original: Signal) -> Signal:
    """Read the output of a codec, and trim or pad it to the length of the original."""
    audio, rate = soundfile.read(path, dtype="float32")
    return Signal(fit(audio, len(original.wave)), rate)


def _load_values(result: Result, recordings: dict[str, Recording]) -> None:
    with Journal(result.folder / JOURNAL) as journal:
        for key, values in journal.entries(2):
            if key in recordings and are_values(values):
                result.values.setdefault(key, {}).update(values_from_json(values))


def _store_values(result: Result, journal: Journal, key: str, values: dict[str, Value]) -> None:
    """Store the metrics of a recording.

    A metric that failed, for example because a package is missing, is not written to the journal, so that the next run
    computes it again.
    """
    result.values.setdefault(key, {}).update(values)
    final = {name: value for name, value in values.items() if isinstance(value, Undefined | float)}
    journal.add([key, final])


def _in_parallel(tasks: Sequence[Task], jobs: int) -> Iterator[Measured]:
    if jobs == 1 or len(tasks) < 2:
        yield from map(_measure, tasks)
        return
    check_is_file()
    _check_functions(tasks[0].table)
    others = multiprocessing.active_children()
    with sharing("several --workers"), safe_imports():
        workers = min(jobs, len(tasks), MAX_WORKERS)
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (os.getpid(),))
    started: set[BaseProcess] = set()
    try:
        futures = []
        for task in tasks:
            with safe_imports():  # starts the workers
                futures.append(pool.submit(_measure, task))
            if len(started) < workers:
                started |= new_children(others)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        pool.shutdown(cancel_futures=True)
        check_starts(started)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _check_functions(table: Mapping[str, Metric]) -> None:
    """Raise NemoLfrError if a metric has a function that worker processes cannot import."""
    for name, metric in table.items():
        try:
            pickle.dumps(metric)
        except Exception as error:  # pickle raises errors of several classes
            raise NemoLfrError(
                f"metric {name!r} cannot be sent to worker processes ({shorten(error, 200)}); define the function at "
                "the top level of a module, or use --workers 1 (jobs=1)."
            ) from error


def _start(driver: int) -> None:
    """Initialize a worker process with one thread; see `begin_worker`."""
    begin_worker(driver)
    import torch

    torch.set_num_threads(1)


def _measure(task: Task) -> Measured:
    recording = task.recording
    original = Signal(read(recording.path, task.rate, recording.offset, recording.duration), task.rate)
    return task.key, [
        (output.index, measure(original, read_output(output.path, original), output.names, task.table))
        for output in task.outputs
    ]
