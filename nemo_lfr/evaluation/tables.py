"""Tables for the report of an evaluation.

They show means of metrics (with confidence intervals), cost, compression and codebook use.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from nemo_lfr.errors import counted
from nemo_lfr.evaluation.escape import escape_markdown
from nemo_lfr.evaluation.metrics import Metric, NotMeasured
from nemo_lfr.evaluation.model_metrics import all_metrics
from nemo_lfr.evaluation.results import Evaluation, Result

RESAMPLES = 10_000
NONE = "-"
CARD = "NVIDIA's card, released weights"
FIRST, SECOND = "◀", "▶"  # marks in a row for two codecs: the first codec is better, the second codec is better
REFERENCES = ("original", CARD)  # names of rows that are never marked as best


@dataclass(frozen=True)
class Mean:
    """Mean over `count` recordings, with the bounds of its 95 % confidence interval (percentile bootstrap)."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Compute the mean of one or more values, and its 95 % confidence interval by resampling."""
        rng, found = np.random.default_rng(0), np.asarray(values, float)
        # Draw the resamples in blocks, since all of them together need gigabytes of memory for a large test set.
        blocks = [rng.choice(found, (RESAMPLES // 50, len(found))).mean(axis=1) for _ in range(50)]
        draws = np.concatenate(blocks)
        low, high = np.quantile(draws, (0.025, 0.975))
        mean = float(np.mean(values))
        # Because of rounding, the mean may be slightly outside the interval.
        return cls(mean, min(mean, float(low)), max(mean, float(high)), len(values))

    def text(self, digits: int) -> str:
        """Format the mean and its confidence interval, or only the mean if there is a single value."""
        if self.count == 1:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Table:
    """Table of text cells with a title and a header.

    Attributes:
        title: title, or an empty string.
        head: names of the columns.
        rows: rows of cells. The first cell in each row names the codec or the pair of codecs.
        better: "higher" or "lower" for each column whose best value is marked, and None for other columns. An empty
            list marks no values.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    better: list[str | None] = field(default_factory=list)

    @cached_property
    def best(self) -> frozenset[tuple[int, int]]:
        """Return the (row, column) of each best value.

        Values are compared after rounding. Rows in `REFERENCES` are ignored. A column in which all values are equal
        has no best value.
        """
        found = set()
        for column, better in enumerate(self.better):
            values = {
                row: value
                for row, cells in enumerate(self.rows)
                if cells[0] not in REFERENCES and (value := number(cells[column])) is not None
            }
            if better is not None and len(set(values.values())) > 1:
                best = (max if better == "higher" else min)(values.values())
                found |= {(row, column) for row, value in values.items() if value == best}
        return frozenset(found)

    def markdown(self) -> str:
        """Format the table as Markdown, with escaped cells and the best values in bold."""
        cells = [
            [self._bold(escape_markdown(text), (row, column)) for column, text in enumerate(line)]
            for row, line in enumerate(self.rows)
        ]
        lines = [list(map(escape_markdown, self.head)), ["---"] * len(self.head), *cells]
        title = [f"### {escape_markdown(self.title)}", ""] if self.title else []
        return "\n".join(title + ["| " + " | ".join(line) + " |" for line in lines]) + "\n"

    def _bold(self, text: str, place: tuple[int, int]) -> str:
        return f"**{text}**" if place in self.best else text


def number(cell: str) -> float | None:
    """Return the first number in a cell; None if the cell contains no number."""
    match = re.search(r"[-+]?\d+(\.\d+)?", cell)
    return float(match[0]) if match else None


def shorten_name(name: str, length: int) -> str:
    """Shorten a name to at most `length` characters, by replacing its middle with an ellipsis."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def means(result: Result, keys: Iterable[str]) -> dict[str, Mean]:
    """Return the mean of each metric, by name, over the recordings in `keys` that have a value of the metric."""
    columns: dict[str, list[float]] = {}
    for key in keys:
        for name, value in result.values.get(key, {}).items():
            if not isinstance(value, NotMeasured):
                columns.setdefault(name, []).append(value)
    return {name: Mean.of(values) for name, values in columns.items()}


def quality(
    evaluation: Evaluation, keys: Sequence[str], title: str = "", card: Mapping[str, float] | None = None
) -> Table:
    """Tabulate bit rate, number of recordings and metrics, with one row for each codec.

    Args:
        evaluation: results to tabulate.
        keys: keys of the recordings to include.
        title: title of the table.
        card: values that NVIDIA's model card states for this test set, by metric name. They become the last row.

    Returns:
        A table with a column for each metric that has a value in at least one row.
    """
    found = [means(result, keys) for result in evaluation.results]
    metrics = all_metrics()
    names = [name for name in metrics if name in (card or {}) or any(name in own for own in found)]
    head = ["codec", "kbit/s", "n", *(heading(name, metrics[name]) for name in names)]
    rows = []
    for result, own in zip(evaluation.results, found, strict=True):
        count = sum(key in result.round_trips for key in keys)
        cells = [_cell(own.get(name), metrics[name].digits, count) for name in names]
        rows.append([result.name, format_kilobits(result, keys, "num_bytes"), str(count), *cells])
    if card:
        cells = [f"{card[name]:g}" if name in card else NONE for name in names]
        rows.append([CARD, "1.89", NONE, *cells])
    return Table(title, head, rows, [None, "lower", None, *(metrics[name].better for name in names)])


def heading(name: str, metric: Metric) -> str:
    """Return the column name of a metric: name, unit and an arrow.

    The arrow points up if higher values are better, and down if lower values are better.
    """
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}[metric.better]
    return f"{name}{f' ({metric.unit})' if metric.unit else ''}{arrow}"


def differences(evaluation: Evaluation, keys: Sequence[str]) -> Table | None:
    """Tabulate the paired differences in each metric, with one row for each pair of codecs.

    Args:
        evaluation: results of the codecs.
        keys: keys of the recordings to compare.

    Returns:
        A table, or None if there are fewer than two codecs besides "original". A cell contains the mean difference
        (first codec minus second codec) over the recordings for which both codecs have a value, or "-" if there is no
        such recording. With two or more recordings, the confidence interval follows. If this interval excludes zero
        and the metric has a better direction, a mark (FIRST or SECOND) shows which codec is better.
    """
    metrics = all_metrics()
    codecs = [result for result in evaluation.results if result.name not in REFERENCES]
    columns = [
        name
        for name in metrics
        if any(not isinstance(own.get(name, NotMeasured()), NotMeasured) for r in codecs for own in r.values.values())
    ]
    rows = []
    for first, second in itertools.combinations(codecs, 2):
        cells = []
        for name in columns:
            mean = paired_mean(first, second, keys, name)
            cells.append(NONE if mean is None else _difference(mean, metrics[name]))
        rows.append([f"{first.name} minus {second.name}", *cells])
    head = ["codecs", *(heading(name, metrics[name]) for name in columns)]
    return Table("", head, rows) if rows else None


def paired_mean(first: Result, second: Result, keys: Iterable[str], name: str) -> Mean | None:
    """Compute the mean of the paired differences in a metric, first codec minus second codec.

    Args:
        first: results of the first codec.
        second: results of the second codec.
        keys: keys of the recordings.
        name: name of the metric.

    Returns:
        The mean with its confidence interval, or None if there is no recording for which both codecs have a value.
    """
    pairs = ([result.values.get(key, {}).get(name, NotMeasured()) for result in (first, second)] for key in keys)
    found = [a - b for a, b in pairs if not isinstance(a, NotMeasured) and not isinstance(b, NotMeasured)]
    return Mean.of(found) if found else None


def _difference(mean: Mean, metric: Metric) -> str:
    digits = metric.digits
    if mean.count == 1:
        return f"{mean.value:+.{digits}f}"
    sign = 1 if mean.low > 0 else -1 if mean.high < 0 else 0
    sign *= {"higher": 1, "lower": -1, None: 0}[metric.better]
    mark = {1: f"{FIRST} ", -1: f"{SECOND} ", 0: ""}[sign]
    return f"{mark}{mean.value:+.{digits}f} ({mean.low:+.{digits}f} to {mean.high:+.{digits}f})"


def _cell(mean: Mean | None, digits: int, count: int) -> str:
    if mean is None:
        return NONE
    return mean.text(digits) + (f", n={mean.count}" if mean.count != count else "")


def cost(evaluation: Evaluation) -> Table:
    """Tabulate the bit rate, delay and speed of each codec."""
    rows = []
    for result in evaluation.results:
        seconds, encode, decode = (
            sum(sent[name] for sent in result.round_trips.values())
            for name in ("seconds", "encode_seconds", "decode_seconds")
        )
        rows.append(
            [
                result.name,
                format_kilobits(result, result.round_trips, "num_bytes"),
                format_kilobits(result, result.round_trips, "file_bytes"),
                f"{1000 * result.delay:g}",
                f"{seconds / encode:.1f}" if encode else NONE,
                f"{seconds / decode:.1f}" if decode else NONE,
            ]
        )
    head = [
        "codec",
        "kbit/s",
        "kbit/s of whole files",
        "compensated delay (ms)",
        "encoding, x real time",
        "decoding, x real time",
    ]
    return Table("Cost", head, rows, [None, "lower", "lower", "lower", "higher", "higher"])


def compression(evaluation: Evaluation) -> Table | None:
    """Tabulate the bit rate of each codec, with and without entropy coding.

    The bits per frame can be compared with the loss (in bits per frame) of a language model on the same tokens.

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
            [
                result.name,
                *(format_kilobits(result, keys, kind) for kind in kinds),
                *(f"{bit / frames:.2f}" for bit in bits),
            ]
        )
    head = [
        "codec",
        "kbit/s",
        "kbit/s of whole files",
        "kbit/s, compressed",
        "kbit/s of whole files, compressed",
        "bits per frame",
        "bits per frame, compressed",
    ]
    better: list[str | None] = [None, *("lower" for _ in head[1:])]
    return Table("Lossless compression of the tokens", head, rows, better) if rows else None


def codebooks(evaluation: Evaluation) -> Table | None:
    """Tabulate the codebook use of each codec whose tokens are stored.

    Returns:
        The table, or None if there are no tokens.
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
    head = ["codec", "codebooks", "entries used (%)", "bits per entry", "entropy of each codebook (bits)"]
    return Table("Codebooks", head, rows) if rows else None


def groups(evaluation: Evaluation, label: str) -> list[Table]:
    """Return one quality table for each value of the manifest key `label`, and one for recordings without this key."""
    by_value: dict[str, list[str]] = {}
    for key, recording in evaluation.recordings.items():
        by_value.setdefault(str(recording.labels.get(label, "(none)")), []).append(key)
    return [quality(evaluation, keys, f"{label}: {value}") for value, keys in sorted(by_value.items())]


def definitions(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return the name and definition of each metric.

    The definition ends with the name of the model that computed the metric, if any. If the metric is not available,
    the definition ends with the reason.
    """
    measured = {name for result in evaluation.results for own in result.values.values() for name in own}
    lines = []
    for name, metric in all_metrics().items():
        text = metric.definition
        if name in evaluation.models:
            text += f" Model: {evaluation.models[name]}."
        elif name in evaluation.absent or name not in measured:
            reason = evaluation.absent.get(name, "not measured").rstrip(".")
            text += f" {reason[0].upper()}{reason[1:]}."
        lines.append((name, text))
    return lines


def gaps(evaluation: Evaluation) -> list[str]:
    """List, for each codec, the failed recordings, and the number of missing values by metric and reason."""
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
    return lines + [
        f"{codec}: {name} of {counted(count, 'recording')}: {why}" for (codec, name, why), count in reasons.items()
    ]


def kilobits(result: Result, keys: Iterable[str], kind: str = "num_bytes") -> float:
    """Compute the mean bit rate of a codec over recordings.

    Args:
        result: results of the codec.
        keys: keys of the recordings.
        kind: name of the size in `Result.round_trips`, such as "num_bytes" or "file_bytes".

    Returns:
        Total size divided by total duration, in kbit/s.
    """
    own = [result.round_trips[key] for key in keys if key in result.round_trips]
    return sum(sent[kind] for sent in own) * 8 / 1000 / max(sum(sent["seconds"] for sent in own), 1e-9)


def format_kilobits(result: Result, keys: Iterable[str], kind: str) -> str:
    """Format the bit rate that `kilobits` computes, or return a dash for a codec without outputs."""
    return f"{kilobits(result, keys, kind):.2f}" if result.round_trips else NONE
