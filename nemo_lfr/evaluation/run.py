"""Evaluate several codecs, and resume an interrupted evaluation.

Each codec has a folder OUT/codecs/NAME-HASH/. For each recording, the folder contains KEY.wav (float samples) and
KEY.npy (tokens). The results are in journals (JSON-lines files): `sent.jsonl` with sizes and times, `metrics.jsonl`,
and one file for each model that computes metrics. If a run is repeated after an interruption, or with more codecs or
recordings, only the missing results are computed.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from nemo_lfr.codec.devices import choose_device
from nemo_lfr.corpus.main_program import check_main_program
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation.codecs.base import ComparedCodec, RoundTrip
from nemo_lfr.evaluation.metrics import Signal, Undefined, checked
from nemo_lfr.evaluation.model_metrics import open_model_metrics
from nemo_lfr.evaluation.model_metrics.base import ModelMetric
from nemo_lfr.evaluation.plugins import load_plugins
from nemo_lfr.evaluation.recordings import claim, read
from nemo_lfr.evaluation.results import Evaluation, Result
from nemo_lfr.evaluation.workers import are_values, is_number, measure_all, read_pair, values_from_json
from nemo_lfr.io.atomic import sweep, write_bytes
from nemo_lfr.io.journal import Journal, Progress
from nemo_lfr.io.locate import check_model_name
from nemo_lfr.io.manifests import Recording


def evaluate(
    recordings: dict[str, Recording],
    codecs: Sequence[ComparedCodec],
    out: Path,
    *,
    rate: int = 22050,
    device: str | None = None,
    jobs: int = 1,
    models: Mapping[str, str] | None = None,
    source: str = "",
    progress: Progress,
) -> Evaluation:
    """Encode and decode every recording with every codec, and compute the metrics.

    Args:
        recordings: recordings by key, from `choose`.
        codecs: codecs to compare, from `open_codec`.
        out: existing folder for the codecs' outputs and journals. The caller must hold the lock of this folder until
            the report is written; see `nemo_lfr.io.exclusive`.
        rate: sample rate of the comparison in Hz. The output of a codec with another sample rate is resampled.
        device: PyTorch device for models that compute metrics; chosen automatically if None.
        jobs: number of processes that compute metrics. With more than one, each process imports the main program,
            whose code must therefore be under `if __name__ == "__main__":`.
        models: for each kind of model metric, the Hub id or path of the model, such as
            {"asr": "openai/whisper-base"}; an empty string for the default model. See `open_model_metrics`.
        source: text that identifies the source of the recordings; see `claim`.
        progress: progress callback; see `nemo_lfr.io.journal`.

    Returns:
        The results of all codecs.

    Raises:
        NemoLfrError: if `out` contains an evaluation of other or changed recordings or at another rate, or if `models`
            has an unknown kind or a missing file.
    """
    check_main_program()
    models = models or {}
    for name in filter(None, models.values()):
        check_model_name(name.removeprefix("nemo:"))
    load_plugins()
    claim(out, recordings, rate, source)
    opened = open_model_metrics(models, str(choose_device(device)))
    results: list[Result] = []
    names: Counter[str] = Counter()
    with progress(len(codecs) * len(recordings)) as advance:
        for codec in codecs:
            names[codec.name] += 1  # different checkpoints may have the same file name
            result = _new_result(codec, names[codec.name], out)
            _run_codec(codec, recordings, rate, result, advance)
            results.append(result)
    measure_all(recordings, results, rate, jobs, progress)
    for model in opened.models:
        _run_model_metric(model, recordings, results, rate, progress)
    model_names = {metric: model.name for model in opened.models for metric in model.metrics}
    return Evaluation(recordings, rate, results, opened.absent, model_names, opened.failed)


def _new_result(codec: ComparedCodec, number: int, out: Path) -> Result:
    """Return an empty result for a codec, and create its folder in `out`.

    `number` is 1 for the first codec with this name, 2 for the second, and so on.
    """
    digest = hashlib.sha256(codec.identity.encode()).hexdigest()[:8]
    folder = out / "codecs" / f"{re.sub('[^A-Za-z0-9.]+', '-', codec.name).strip('-')[-60:]}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, None)
    name = f"{codec.name} #{number}" if number > 1 else codec.name
    return Result(name, codec.delay, codec.levels, folder)


def _run_codec(
    codec: ComparedCodec,
    recordings: dict[str, Recording],
    rate: int,
    result: Result,
    advance: Callable[[str], None],
) -> None:
    with Journal(result.folder / "sent.jsonl") as journal:
        known = {key: entry for key, entry in journal.entries(2) if key in recordings and _is_round_trip(entry)}
        warm = False
        for key, recording in recordings.items():
            if key not in known or not result.audio(key).exists():
                try:
                    audio = read(recording.path, rate, recording.offset, recording.duration)
                    if not len(audio):
                        raise NemoLfrError(
                            f"{recording.path}: no samples at {recording.offset:g} s; correct the offset."
                        )
                    if not warm:  # do not time the first call, which initializes threads and kernels
                        codec.round_trip(audio[:rate], rate)
                        warm = True
                    trip = codec.round_trip(audio, rate)
                    Signal(trip.audio, rate)  # validate the samples before they are written
                except Exception as error:  # third-party codecs can raise anything
                    result.failures[key] = reason = _reason(error)
                    advance(f"{result.name}: {recording.name}: {reason}")
                    continue
                known[key] = _store_round_trip(trip, len(audio), rate, result, key)
                journal.add([key, known[key]])
            advance("")
    result.round_trips = {key: known[key] for key in recordings if key in known and key not in result.failures}


def _is_round_trip(entry: Any) -> bool:
    """Return whether a journal entry has the sizes and times of a round trip, all of them numbers."""
    keys = ("seconds", "num_bytes", "file_bytes", "encode_seconds", "decode_seconds")
    return isinstance(entry, dict) and all(key in entry and is_number(entry[key]) for key in keys)


def _store_round_trip(trip: RoundTrip, num_samples: int, rate: int, result: Result, key: str) -> dict[str, float]:
    """Write the audio and tokens that a codec produced from a recording, and return the journal entry."""
    if trip.tokens is not None:
        array = io.BytesIO()
        np.save(array, trip.tokens.astype(np.int32))
        write_bytes(result.tokens(key), array.getvalue())
    # Encode in memory first, since libsndfile does not report why writing failed, for example on a full disk.
    audio = io.BytesIO()
    soundfile.write(audio, trip.audio, rate, subtype="FLOAT", format="WAV")
    write_bytes(result.audio(key), audio.getvalue())
    entry = {
        "seconds": num_samples / rate,
        "num_bytes": trip.num_bytes,
        "file_bytes": trip.file_bytes,
        "encode_seconds": trip.encode_seconds,
        "decode_seconds": trip.decode_seconds,
    }
    if trip.tokens is not None and trip.compressed_bytes is not None and trip.compressed_file_bytes is not None:
        entry["frames"] = trip.tokens.shape[1]
        entry |= {"compressed_bytes": trip.compressed_bytes, "compressed_file_bytes": trip.compressed_file_bytes}
    # JSON cannot represent NumPy scalars, which a codec of another package may return.
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in entry.items()}


def _run_model_metric(
    model: ModelMetric, recordings: dict[str, Recording], results: Iterable[Result], rate: int, progress: Progress
) -> None:
    for result in results:
        # Stored results are valid only for the same model, text and language.
        with Journal(result.folder / f"{_identity(model.name)}.jsonl") as journal:
            known: dict[str, dict[str, Any]] = {
                entry[0]: entry[1]
                for entry in journal.entries(3)
                if entry[0] in recordings and entry[2] == _labels(recordings[entry[0]]) and are_values(entry[1])
            }
            missing = [key for key in result.round_trips if key not in known]
            with progress(len(missing)) as advance:
                for key in missing:
                    recording = recordings[key]
                    pair = read_pair(recording, result.audio(key), rate)
                    try:
                        values = model.measure(*pair, recording.labels)
                        known[key] = {name: checked(value) for name, value in values.items()}
                    except Exception as error:  # third-party models can raise anything; the next run tries again
                        known[key] = dict.fromkeys(model.metrics, Undefined(f"not measured: {_reason(error)}"))
                    else:
                        journal.add([key, known[key], _labels(recording)])
                    advance("")
        for key in result.round_trips:
            result.values.setdefault(key, {}).update(values_from_json(known[key]))


def _identity(model: str) -> str:
    """Return a short hash of a model's name. For a file, the hash includes its size and modification time."""
    path = Path(model)
    text = f"{model} {path.stat().st_size} {path.stat().st_mtime_ns}" if path.is_file() else model
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _labels(recording: Recording) -> str:
    """Return a short hash of the labels "text" and "lang", which `ModelMetric.measure` may use."""
    labels = [str(recording.labels.get(key)) for key in ("text", "lang")]
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:8]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, NemoLfrError) else f"{type(error).__name__}: {text}"
