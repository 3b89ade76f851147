"""Write the results of an evaluation as CSV text."""

import csv
import io
import itertools

from nemo_lfr.evaluation.escape import plain_cell
from nemo_lfr.evaluation.metrics import NotMeasured
from nemo_lfr.evaluation.model_metrics import all_metrics
from nemo_lfr.evaluation.results import Evaluation
from nemo_lfr.evaluation.tables import Mean, format_kilobits, means, paired_mean

SUFFIXES = ("", " low", " high", " n")


def per_recording(evaluation: Evaluation) -> str:
    """Return CSV text with one line for each codec and recording. Cells of missing values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["codec", "recording", "offset", "seconds", "bytes", "file_bytes", *all_metrics()])
    for result in evaluation.results:
        for key, sent in result.round_trips.items():
            recording, own = evaluation.recordings[key], result.values.get(key, {})
            cells = (
                "" if isinstance(value := own.get(name, NotMeasured()), NotMeasured) else value
                for name in all_metrics()
            )
            costs = (sent["seconds"], sent["num_bytes"], sent["file_bytes"])
            names = (plain_cell(result.name), plain_cell(str(recording.name)))
            writer.writerow([*names, recording.offset, *costs, *cells])
    return text.getvalue()


def summary(evaluation: Evaluation) -> str:
    """Return CSV text with one line for each codec.

    The line contains the bit rates and the delay of the codec. For each metric, it also contains the mean, the bounds
    of its 95 % confidence interval, and the number of recordings that have a value.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}{suffix}" for name in all_metrics() for suffix in SUFFIXES]
    writer.writerow(["codec", "kbit/s", "file kbit/s", "delay (s)", *columns])
    keys = list(evaluation.recordings)
    for result in evaluation.results:
        own = means(result, keys)
        cells: list[object] = []
        for name in all_metrics():
            cells += _cells(own.get(name))
        rates = [format_kilobits(result, keys, kind) for kind in ("num_bytes", "file_bytes")]
        writer.writerow([plain_cell(result.name), *rates, result.delay, *cells])
    return text.getvalue()


def differences(evaluation: Evaluation) -> str:
    """Return CSV text with one line for each pair of codecs.

    For each metric, the line contains the mean of the paired differences (first codec minus second codec), the bounds
    of its 95 % confidence interval, and the number of recordings for which both codecs have a value.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["codec", "minus codec", *(f"{name}{suffix}" for name in all_metrics() for suffix in SUFFIXES)])
    for first, second in itertools.combinations(evaluation.results, 2):
        cells: list[object] = []
        for name in all_metrics():
            cells += _cells(paired_mean(first, second, evaluation.recordings, name))
        writer.writerow([plain_cell(first.name), plain_cell(second.name), *cells])
    return text.getvalue()


def _cells(mean: Mean | None) -> list[object]:
    return [mean.value, mean.low, mean.high, mean.count] if mean else ["", "", "", 0]
