"""Resumable evaluation of several codecs: `nemo-lfr evaluate` without its report.

OUT/codecs/NAME-IDENTITY/ holds the output of each codec: KEY.wav (float samples), KEY.npy (tokens), and the journals
`sent.jsonl` and `metrics.jsonl`, with one more journal for each model-based metric. A run that was interrupted, or is
repeated with more codecs or recordings, only computes the missing results.
"""

import hashlib
import io
import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from nemo_lfr.codec.devices import choose_device
from nemo_lfr.corpus.inventory import digest
from nemo_lfr.corpus.orphans import die_with
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.evaluation.judges import Judge, open_judges
from nemo_lfr.evaluation.metrics import METRICS, NotMeasured, Signal, Undefined, Value, measure
from nemo_lfr.evaluation.peers import Peer, Transmission, fit, open_codec, read
from nemo_lfr.io.atomic import sweep, write_bytes
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.io.journal import Journal, Progress, write_text
from nemo_lfr.io.locate import check_model_name
from nemo_lfr.io.manifests import Recording
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.shortage import sharing


@dataclass
class Result:
    """Results of one codec.

    Attributes:
        name: name of the codec in tables.
        delay: delay of the codec in seconds, which is compensated.
        levels: FSQ levels of the codebooks; see `Peer`.
        folder: folder of the codec's outputs and journals.
        sent: sizes and times by recording key: seconds, num_bytes, file_bytes, encode_seconds, decode_seconds. If an
            entropy model is available also frames, compressed_bytes, compressed_file_bytes.
        values: metrics by recording key.
        failures: error messages by recording key.
    """

    name: str
    delay: float
    levels: tuple[int, ...]
    folder: Path
    sent: dict[str, dict[str, float]] = field(default_factory=dict)
    values: dict[str, dict[str, Value]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def audio(self, key: str) -> Path:
        """Return the path of a recording's reconstruction."""
        return self.folder / f"{key}.wav"

    def tokens(self, key: str) -> Path:
        """Return the path of a recording's tokens, if the codec has tokens."""
        return self.folder / f"{key}.npy"


@dataclass
class Evaluation:
    """Results of all codecs on one selection of recordings.

    Attributes:
        recordings: recordings by key.
        rate: sample rate of the comparison in Hz.
        results: results of each codec.
        absent: reason for each metric that is not available.
        judges: name of the model for each model-based metric.
    """

    recordings: dict[str, Recording]
    rate: int
    results: list[Result]
    absent: dict[str, NotMeasured]
    judges: dict[str, str]


def choose(recordings: Sequence[Recording], limit: int | None, seed: int) -> dict[str, Recording]:
    """Select up to `limit` recordings at random.

    Args:
        recordings: recordings of the manifest.
        limit: maximum number of recordings; None selects all.
        seed: sampling seed.

    Returns:
        Recordings in the order of the manifest, by a key that is unique within it and does not depend on `limit`.
    """
    indices = range(len(recordings))
    if limit is not None and limit < len(recordings):
        indices = sorted(random.Random(seed).sample(indices, limit))  # type: ignore[assignment]
    return {f"{index:05d}-{re.sub('[^A-Za-z0-9._-]', '_', recordings[index].name.stem)[:60]}": recordings[index]
            for index in indices}  # fmt: skip


def evaluate(
    recordings: dict[str, Recording],
    codecs: Sequence[str],
    out: Path,
    *,
    rate: int = 22050,
    device: str | None = None,
    jobs: int = 1,
    asr: str | None = None,
    speaker_model: str | None = None,
    progress: Progress,
) -> Evaluation:
    """Encode and decode every recording with every codec, and compute the metrics.

    Args:
        recordings: recordings by key, from `choose`.
        codecs: codec names, as accepted by `open_codec`.
        out: folder of the codecs' outputs and the journals.
        rate: sample rate of the comparison in Hz; the output of codecs with another rate is resampled.
        device: PyTorch device of the models; chosen automatically if None.
        jobs: number of processes for the metrics. Codecs always run one recording at a time on all threads, so that
            their times are comparable.
        asr: ASR model for the error rates; see `open_judges`.
        speaker_model: speaker model for the similarity; see `open_judges`.
        progress: progress callback; see `nemo_lfr.io.journal`.

    Returns:
        Results of all codecs.

    Raises:
        NemoLfrError: if a codec is not available, or `out` holds an evaluation of other recordings.
    """
    for name in (asr, speaker_model):
        if name is not None:
            check_model_name(name.removeprefix("nemo:"))
    peers = [open_codec(text, device) for text in dict.fromkeys(codecs)]
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        return _evaluate(recordings, peers, out, rate, device, jobs, asr, speaker_model, progress)


def _evaluate(
    recordings: dict[str, Recording],
    peers: Sequence[Peer],
    out: Path,
    rate: int,
    device: str | None,
    jobs: int,
    asr: str | None,
    speaker_model: str | None,
    progress: Progress,
) -> Evaluation:
    _claim(out, recordings, rate)
    judges, absent = open_judges(str(choose_device(device)), asr, speaker_model)
    results: list[Result] = []
    names: Counter[str] = Counter()
    with progress(len(peers) * len(recordings)) as advance:
        for peer in peers:
            digest = hashlib.sha256(peer.identity.encode()).hexdigest()[:8]
            name = re.sub("[^A-Za-z0-9.]+", "-", peer.name).strip("-")[-60:]
            names[peer.name] += 1  # two checkpoints may have the same file name
            shown = f"{peer.name} #{names[peer.name]}" if names[peer.name] > 1 else peer.name
            result = Result(shown, peer.delay, peer.levels, out / "codecs" / f"{name}-{digest}")
            result.folder.mkdir(parents=True, exist_ok=True)
            sweep(result.folder, None)
            _send_all(peer, recordings, rate, result, advance)
            results.append(result)
    _measure_all(recordings, results, rate, jobs, progress)
    for judge in judges:
        _judge_all(judge, recordings, results, rate, progress)
    return Evaluation(
        recordings, rate, results, absent, {metric: judge.name for judge in judges for metric in judge.metrics}
    )


def _claim(out: Path, recordings: dict[str, Recording], rate: int) -> None:
    """Record which recordings the keys in `out` stand for.

    Raises:
        NemoLfrError: if a key already stands for another recording, other contents or another rate.
    """
    claims = out / "recordings.json"
    sweep(out, [claims.name])
    paths = {item.path for item in recordings.values() if item.path.is_file()}  # missing files produce no outputs
    contents = {path: digest(path)[:16] for path in paths}
    mine = {
        key: [str(item.path.resolve()), item.offset, item.duration, rate, contents[item.path]]
        for key, item in recordings.items()
        if item.path in paths
    }
    known = {}
    if claims.exists():
        try:
            with open_regular(claims) as file:
                known = json.load(file)
            if not isinstance(known, dict):
                raise ValueError("expected a JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise NemoLfrError(f"{claims}: is damaged ({shorten(error, 200)}); choose another --out.") from error
    if any(known.get(key, value) != value for key, value in mine.items()):
        raise NemoLfrError(
            f"{out}: holds an evaluation of other recordings, or of files that have changed, or at another rate; "
            "choose another --out."
        )
    write_text(claims, json.dumps(known | mine, ensure_ascii=False, indent=0))


def _send_all(
    peer: Peer, recordings: dict[str, Recording], rate: int, result: Result, advance: Callable[[str], None]
) -> None:
    with Journal(result.folder / "sent.jsonl") as journal:
        known = {key: entry for key, entry in journal.entries(2) if key in recordings and _is_sent(entry)}
        warm = False
        for key, recording in recordings.items():
            if key not in known or not result.audio(key).exists():
                try:
                    audio = read(recording.path, rate, recording.offset, recording.duration)
                    if not len(audio):
                        raise NemoLfrError(f"{recording.path}: holds no samples at {recording.offset:g} s.")
                    if not warm:  # the first call initializes threads and kernels, and is not timed
                        peer.send(audio[:rate], rate)
                        warm = True
                    done = peer.send(audio, rate)
                    Signal(done.audio, rate)  # validates the samples before they are written
                except Exception as error:  # third-party codecs can raise anything
                    result.failures[key] = reason = _reason(error)
                    advance(f"{result.name}: {recording.name}: {reason}")
                    continue
                known[key] = _keep(done, len(audio), rate, result, key)
                journal.add([key, known[key]])
            advance("")
    result.sent = {key: known[key] for key in recordings if key in known and key not in result.failures}


def _is_sent(entry: Any) -> bool:
    """Return whether a journal entry has the fields that `_keep` returns."""
    keys = ("seconds", "num_bytes", "file_bytes", "encode_seconds", "decode_seconds")
    return isinstance(entry, dict) and all(key in entry and _is_number(entry[key]) for key in keys)


def _are_values(values: Any) -> bool:
    """Return whether a journal entry maps metric names to values or reasons."""
    return isinstance(values, dict) and all(isinstance(value, str) or _is_number(value) for value in values.values())


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _keep(done: Transmission, num_samples: int, rate: int, result: Result, key: str) -> dict[str, float]:
    """Write the audio and tokens of a recording, and return its journal entry."""
    if done.tokens is not None:
        array = io.BytesIO()
        np.save(array, done.tokens.astype(np.int32))
        write_bytes(result.tokens(key), array.getvalue())
    # Encode in memory first: libsndfile does not report why a write failed, for example on a full disk.
    audio = io.BytesIO()
    soundfile.write(audio, done.audio, rate, subtype="FLOAT", format="WAV")
    write_bytes(result.audio(key), audio.getvalue())
    entry = {
        "seconds": num_samples / rate,
        "num_bytes": done.num_bytes,
        "file_bytes": done.file_bytes,
        "encode_seconds": done.encode_seconds,
        "decode_seconds": done.decode_seconds,
    }
    if done.tokens is not None and done.compressed_bytes is not None and done.compressed_file_bytes is not None:
        entry["frames"] = done.tokens.shape[1]
        entry |= {"compressed_bytes": done.compressed_bytes, "compressed_file_bytes": done.compressed_file_bytes}
    return entry


def _measure_all(
    recordings: dict[str, Recording], results: Sequence[Result], rate: int, jobs: int, progress: Progress
) -> None:
    for result in results:
        _recall(result, recordings)
    tasks = []
    for key, recording in recordings.items():
        wanted = []
        for number, result in enumerate(results):
            names = [name for name in METRICS if key in result.sent and name not in result.values.get(key, {})]
            if names:
                wanted.append((number, result.audio(key), names))
        if wanted:
            tasks.append((key, recording, rate, wanted))
    with ExitStack() as stack, progress(len(tasks)) as advance:
        folders = dict.fromkeys(result.folder for result in results)  # two names of the same codec share a folder
        journals = {folder: stack.enter_context(Journal(folder / "metrics.jsonl")) for folder in folders}
        for key, found in _in_parallel(tasks, jobs):
            for number, values in found:
                _note(results[number], journals[results[number].folder], key, values)
            advance("")


def _recall(result: Result, recordings: dict[str, Recording]) -> None:
    """Load the metrics of these recordings from the journal."""
    with Journal(result.folder / "metrics.jsonl") as journal:
        for key, values in journal.entries(2):
            if key in recordings and _are_values(values):
                result.values.setdefault(key, {}).update(_from_json(values))


def _from_json(values: dict[str, Any]) -> dict[str, Value]:
    return {name: Undefined(value) if isinstance(value, str) else value for name, value in values.items()}


def _note(result: Result, journal: Journal, key: str, values: dict[str, Value]) -> None:
    """Store the metrics of a recording.

    Metrics that need a missing package are not written to the journal, so that the next run computes them.
    """
    result.values.setdefault(key, {}).update(values)
    final = {name: value for name, value in values.items() if isinstance(value, Undefined | float)}
    journal.add([key, final])


Task = tuple[str, Recording, int, list[tuple[int, Path, list[str]]]]
Found = tuple[str, list[tuple[int, dict[str, Value]]]]


def _in_parallel(tasks: Sequence[Task], jobs: int) -> Iterator[Found]:
    if jobs == 1 or len(tasks) < 2:
        yield from map(_measure, tasks)
        return
    with sharing("several --jobs"):
        pool = ProcessPoolExecutor(min(jobs, len(tasks), 61), get_context("spawn"), _start, (os.getpid(),))
    try:
        for future in as_completed([pool.submit(_measure, task) for task in tasks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(driver: int) -> None:
    """Initialize a worker process.

    Workers ignore SIGINT, since the driver handles Ctrl-C for the process group.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(driver)
    import torch

    torch.set_num_threads(1)


def _measure(task: Task) -> Found:
    """Compute the metrics of all codecs for one recording.

    One task covers all codecs, so that the features of the original are computed once.
    """
    key, recording, rate, wanted = task
    original = Signal(read(recording.path, rate, recording.offset, recording.duration), rate)
    return key, [(number, measure(original, _output(path, original), names)) for number, path, names in wanted]


def _output(path: Path, original: Signal) -> Signal:
    audio, rate = soundfile.read(path, dtype="float32")
    return Signal(fit(audio, len(original.wave)), rate)


def _judge_all(
    judge: Judge, recordings: dict[str, Recording], results: Iterable[Result], rate: int, progress: Progress
) -> None:
    for result in results:
        # Stored results are valid only for the same model and the same text and language.
        with Journal(result.folder / f"{_identity(judge.name)}.jsonl") as journal:
            known: dict[str, dict[str, Any]] = {
                entry[0]: entry[1]
                for entry in journal.entries(3)
                if entry[0] in recordings and entry[2] == _labels(recordings[entry[0]]) and _are_values(entry[1])
            }
            missing = [key for key in result.sent if key not in known]
            with progress(len(missing)) as advance:
                for key in missing:
                    recording = recordings[key]
                    original = Signal(read(recording.path, rate, recording.offset, recording.duration), rate)
                    try:
                        known[key] = judge.measure(original, _output(result.audio(key), original), recording.labels)
                    except Exception as error:  # third-party models can raise anything; the next run tries again
                        known[key] = dict.fromkeys(judge.metrics, Undefined(f"not measured: {_reason(error)}"))
                    else:
                        journal.add([key, known[key], _labels(recording)])
                    advance("")
        for key in result.sent:
            result.values.setdefault(key, {}).update(_from_json(known[key]))


def _identity(model: str) -> str:
    """Return a short hash of a model's name, file size and modification time."""
    path = Path(model)
    known = f"{model} {path.stat().st_size} {path.stat().st_mtime_ns}" if path.is_file() else model
    return hashlib.sha256(known.encode()).hexdigest()[:8]


def _labels(recording: Recording) -> str:
    """Return a short hash of the labels that model-based metrics depend on."""
    read = [str(recording.labels.get(key)) for key in ("text", "lang")]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:8]


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, NemoLfrError) else f"{type(error).__name__}: {said}"
