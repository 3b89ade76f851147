"""Result tables of an evaluation.

The tables hold means with confidence intervals, cost, compression and codebook use.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_lfr.evaluation.escape import escape_markdown, plain_cell
from nemo_lfr.evaluation.metrics import NotMeasured
from nemo_lfr.evaluation.model_metrics import all_metrics
from nemo_lfr.evaluation.results import Evaluation, Result

RESAMPLES = 10_000
NONE = "-"


@dataclass(frozen=True)
class Mean:
    """Mean of `count` recordings with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Compute the mean of at least one value and its bootstrap interval."""
        rng, found = np.random.default_rng(0), np.asarray(values, float)
        # Resample in blocks: all resamples at once would need gigabytes for a large test set.
        blocks = [rng.choice(found, (RESAMPLES // 50, len(found))).mean(axis=1) for _ in range(50)]
        draws = np.concatenate(blocks)
        low, high = np.quantile(draws, (0.025, 0.975))
        mean = float(np.mean(values))
        # Rounding may put the mean outside the interval, and matplotlib rejects negative error bars.
        return cls(mean, min(mean, float(low)), max(mean, float(high)), len(values))

    def text(self, digits: int) -> str:
        """Format the mean and its interval; a single value has no interval."""
        if self.count == 1:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Table:
    """Table of text cells with a title and a header."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Format the table as Markdown, with escaped cells."""
        rows = [list(map(escape_markdown, line)) for line in (self.head, *self.rows)]
        cells = ("| " + " | ".join(line) + " |" for line in (rows[0], ["---"] * len(self.head), *rows[1:]))
        return "\n".join(([f"### {escape_markdown(self.title)}", ""] if self.title else []) + list(cells)) + "\n"


def means(result: Result, keys: Iterable[str]) -> dict[str, Mean]:
    """Compute the mean of each metric over the recordings that have a value."""
    columns: dict[str, list[float]] = {}
    for key in keys:
        for name, value in result.values.get(key, {}).items():
            if not isinstance(value, NotMeasured):
                columns.setdefault(name, []).append(value)
    return {name: Mean.of(values) for name, values in columns.items()}


def quality(
    evaluation: Evaluation, keys: Sequence[str], title: str = "", card: Mapping[str, float] | None = None
) -> Table:
    """Tabulate bit rate and metrics, with one row for each codec.

    Args:
        evaluation: results to tabulate.
        keys: keys of the recordings to include.
        title: title of the table.
        card: values of NVIDIA's model card for the same test set, by metric, added as a last row.

    Returns:
        A table with a column for each metric that any codec has.
    """
    found = [means(result, keys) for result in evaluation.results]
    names = [name for name in all_metrics() if name in (card or {}) or any(name in own for own in found)]
    units = (all_metrics()[name].unit for name in names)
    arrows = ({"higher": " ↑", "lower": " ↓", None: ""}[all_metrics()[name].better] for name in names)
    head = ["codec", "kbit/s", "n"] + [
        f"{name}{f' ({unit})' if unit else ''}{arrow}" for name, unit, arrow in zip(names, units, arrows, strict=True)
    ]
    rows = []
    for result, own in zip(evaluation.results, found, strict=True):
        count = sum(key in result.round_trips for key in keys)
        cells = [_cell(own.get(name), all_metrics()[name].digits, count) for name in names]
        rows.append([result.name, _kilobits(result, keys, "num_bytes"), str(count), *cells])
    if card:
        cells = [f"{card[name]:g}" if name in card else NONE for name in names]
        rows.append(["NVIDIA's card, released weights", "1.89", NONE, *cells])
    return Table(title, head, rows)


def _cell(mean: Mean | None, digits: int, count: int) -> str:
    if mean is None:
        return NONE
    return mean.text(digits) + (f", n={mean.count}" if mean.count != count else "")


def cost(evaluation: Evaluation) -> Table:
    """Tabulate bit rate, delay and speed, with one row for each codec."""
    rows = []
    for result in evaluation.results:
        seconds, encode, decode = (
            sum(sent[name] for sent in result.round_trips.values())
            for name in ("seconds", "encode_seconds", "decode_seconds")
        )
        rows.append(
            [
                result.name,
                _kilobits(result, result.round_trips, "num_bytes"),
                _kilobits(result, result.round_trips, "file_bytes"),
                f"{1000 * result.delay:g}",
                f"{seconds / encode:.1f}" if encode else NONE,
                f"{seconds / decode:.1f}" if decode else NONE,
            ]
        )
    head = [
        "codec",
        "kbit/s",
        "kbit/s of its files",
        "delay taken out (ms)",
        "encodes x real time",
        "decodes x real time",
    ]
    return Table("Cost", head, rows)


def compression(evaluation: Evaluation) -> Table | None:
    """Tabulate bit rates with and without entropy coding, one row for each codec.

    The bits per frame can be compared with the loss of a language model over the same tokens, in bits per frame.

    Returns:
        The table, or None if no codec has an entropy model.
    """
    rows = []
    for result in evaluation.results:
        keys = [key for key, sent in result.round_trips.items() if "compressed_bytes" in sent]
        if not keys:
            continue
        frames = sum(result.round_trips[key]["frames"] for key in keys)
        bits = [8 * sum(result.round_trips[key][kind] for key in keys) for kind in ("num_bytes", "compressed_bytes")]
        kinds = ("num_bytes", "file_bytes", "compressed_bytes", "compressed_file_bytes")
        rows.append(
            [result.name, *(_kilobits(result, keys, kind) for kind in kinds), *(f"{bit / frames:.2f}" for bit in bits)]
        )
    head = [
        "codec",
        "kbit/s",
        "kbit/s of its files",
        "kbit/s compressed",
        "kbit/s of compressed files",
        "bits a frame",
        "bits a frame compressed",
    ]
    return Table("Lossless compression of the tokens", head, rows) if rows else None


def codebooks(evaluation: Evaluation) -> Table | None:
    """Tabulate the codebook use of each codec that has tokens.

    Returns:
        The table, or None if no codec has tokens.
    """
    import torch

    from nemo_lfr.signal.codebooks import CodebookUse

    rows = []
    for result in evaluation.results:
        paths = [path for key in result.round_trips if (path := result.tokens(key)).exists()]
        if not result.levels or not paths:
            continue
        use: CodebookUse | None = None
        for path in paths:
            tokens = torch.from_numpy(np.load(path))[None]
            use = use or CodebookUse(tokens.shape[1], result.levels)
            use.update(tokens, torch.tensor([tokens.shape[2]]))
        assert use is not None
        entropy = use.perplexity().log2()
        size = math.prod(result.levels)
        rows.append(
            [
                result.name,
                f"{len(entropy)} x {size}",
                f"{100 * float((use.counts > 0).float().mean()):.1f}",
                f"{math.log2(size):.2f}",
                " ".join(f"{value:.2f}" for value in entropy.tolist()),
            ]
        )
    head = ["codec", "codebooks", "entries used (%)", "bits of an entry", "entropy of each codebook (bits)"]
    return Table("Codebooks", head, rows) if rows else None


def groups(evaluation: Evaluation, label: str) -> list[Table]:
    """Return a quality table for each value of the manifest key `label`."""
    by_value: dict[str, list[str]] = {}
    for key, recording in evaluation.recordings.items():
        by_value.setdefault(str(recording.labels.get(label, "(none)")), []).append(key)
    return [quality(evaluation, keys, f"{label}: {value}") for value, keys in sorted(by_value.items())]


def definitions(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return the name and definition of each metric.

    The definition includes the metric's model, or the reason if the metric is missing.
    """
    measured = {name for result in evaluation.results for own in result.values.values() for name in own}
    lines = []
    for name, metric in all_metrics().items():
        text = metric.definition
        if name in evaluation.models:
            text += f" Model: {evaluation.models[name]}."
        elif name in evaluation.absent or name not in measured:
            text += f" {str(evaluation.absent.get(name, 'not measured')).capitalize()}."
        lines.append((name, text))
    return lines


def gaps(evaluation: Evaluation) -> list[str]:
    """List the failed recordings, and count the undefined metrics by reason."""
    lines = [
        f"{result.name}: {evaluation.recordings[key].name}: {why}"
        for result in evaluation.results
        for key, why in result.failures.items()
    ]
    reasons: dict[tuple[str, str, str], int] = {}
    for result in evaluation.results:
        for own in result.values.values():
            for name, value in own.items():
                if isinstance(value, NotMeasured):
                    reasons[result.name, name, value] = reasons.get((result.name, name, value), 0) + 1
    return lines + [f"{codec}: {name} of {count} recordings: {why}" for (codec, name, why), count in reasons.items()]


def per_recording(evaluation: Evaluation) -> str:
    """Return a CSV with one line per codec and recording, and empty missing values."""
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
    """Return a CSV with one line per codec: mean of each metric with its interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}{suffix}" for name in all_metrics() for suffix in ("", " low", " high", " n")]
    writer.writerow(["codec", "kbit/s", "file kbit/s", "delay (s)", *columns])
    keys = list(evaluation.recordings)
    for result in evaluation.results:
        own = means(result, keys)
        cells: list[object] = []
        for name in all_metrics():
            mean = own.get(name)
            cells += [mean.value, mean.low, mean.high, mean.count] if mean else ["", "", "", 0]
        rates = [_kilobits(result, keys, kind) for kind in ("num_bytes", "file_bytes")]
        writer.writerow([plain_cell(result.name), *rates, result.delay, *cells])
    return text.getvalue()


def kilobits(result: Result, keys: Iterable[str], kind: str = "num_bytes") -> float:
    """Compute the mean bit rate in kbit/s over recordings.

    Args:
        result: results of a codec.
        keys: keys of the recordings.
        kind: size to use, a key of `Result.round_trips`.

    Returns:
        Total bits by total duration, in kbit/s.
    """
    own = [result.round_trips[key] for key in keys if key in result.round_trips]
    return sum(sent[kind] for sent in own) * 8 / 1000 / max(sum(sent["seconds"] for sent in own), 1e-9)


def _kilobits(result: Result, keys: Iterable[str], kind: str) -> str:
    return f"{kilobits(result, keys, kind):.2f}" if result.round_trips else NONE
