"""Evaluation reports as a self-contained HTML page, as Markdown and as CSV."""

import base64
import io
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from nemo_lfr._version import __version__
from nemo_lfr.errors import install_command, printable
from nemo_lfr.evaluation import tables
from nemo_lfr.evaluation.escape import code_fence, escape_markdown
from nemo_lfr.evaluation.metrics import NotMeasured
from nemo_lfr.evaluation.model_metrics import all_metrics
from nemo_lfr.evaluation.recordings import read
from nemo_lfr.evaluation.results import Evaluation
from nemo_lfr.io.atomic import sweep
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.shortage import missing_extra

EXAMPLE_SECONDS = 10.0
# Packages that the report and its metrics need, for the installation hint.
PACKAGES = ("jinja2", "matplotlib", "pystoi", "pesq", "librosa", "scipy", "jiwer")
PLOTTED = ("PESQ-WB", "ESTOI", "mel distance", "STFT distance", "SI-SDR", "F0 error", "Squim MOS", "CER")


def check_packages() -> None:
    """Check that the packages of the report are installed.

    Called before any recording is processed, so that a missing package is reported at once.

    Raises:
        MissingExtraError: if jinja2 or matplotlib cannot be imported.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except Exception as error:  # a broken installation can raise anything
        name = getattr(error, "name", None) or "jinja2 and matplotlib"
        raise missing_extra(error, name, f"the report needs {name}: {install_command(*PACKAGES)}") from error


def write_report(
    evaluation: Evaluation,
    out: Path,
    *,
    title: str,
    command: str,
    by: Sequence[str] = (),
    examples: int = 4,
    card: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write the evaluation report as HTML, Markdown and CSV.

    The files are `report.html`, `report.md`, `summary.csv` and `recordings.csv`.

    Args:
        evaluation: results to report.
        out: output folder.
        title: title of the report.
        command: command line that produced the evaluation, shown in the report.
        by: manifest keys to group the quality table by, such as "lang".
        examples: number of recordings to plot and play, spaced evenly over the evaluation.
        card: values from NVIDIA's model card for the same test set, by metric.

    Returns:
        Paths of the files.
    """
    from jinja2 import Environment

    keys = list(evaluation.recordings)
    quality = tables.quality(evaluation, keys, card=card)
    more = [tables.cost(evaluation)]
    if compressed := tables.compression(evaluation):
        more.append(compressed)
    if use := tables.codebooks(evaluation):
        more.append(use)
    for label in by:
        more += tables.groups(evaluation, label)
    seconds = sum(recording.duration for recording in evaluation.recordings.values())
    subtitle = f"{len(keys)} recordings, {seconds / 60:.1f} minutes, compared at {evaluation.rate} Hz."
    common: dict[str, Any] = {
        "title": title,
        "subtitle": subtitle,
        "quality": quality,
        "tables": more,
        "gaps": tables.gaps(evaluation),
        "definitions": tables.definitions(evaluation),
        "command": command,
        "versions": versions(),
    }
    template = (files("nemo_lfr.evaluation") / "report.html.jinja").read_text(encoding="utf-8")
    page = (
        Environment(autoescape=True)
        .from_string(template)
        .render(**common, plots=_plots(evaluation, keys), examples=_examples(evaluation, keys, examples))
    )
    page = "".join(char if char.isprintable() or char == "\n" else "?" for char in page)  # labels are untrusted
    contents = {
        "report.html": page,
        "report.md": markdown(**common),
        "summary.csv": tables.summary(evaluation),
        "recordings.csv": tables.per_recording(evaluation),
    }
    sweep(out, contents)
    return [write_text(out / name, text) for name, text in contents.items()]


def markdown(
    title: str,
    subtitle: str,
    quality: tables.Table,
    tables: Sequence[tables.Table],
    gaps: Sequence[str],
    definitions: Sequence[tuple[str, str]],
    command: str,
    versions: str,
) -> str:
    """Format the report as Markdown.

    Args:
        title: title of the report.
        subtitle: number and duration of the recordings.
        quality: main quality table.
        tables: additional tables.
        gaps: failures and undefined metrics, one line each.
        definitions: names and definitions of the metrics.
        command: command line that produced the evaluation.
        versions: package versions and processor, from `versions`.

    Returns:
        Markdown text with all labels escaped.
    """
    command = printable(command)
    fence = code_fence(command)
    head = f"{subtitle} Means with 95 % bootstrap intervals over recordings."
    parts = [f"# {escape_markdown(title)}", head, quality.markdown()]
    parts += [table.markdown() for table in tables]
    if gaps:
        parts.append("### Without a figure\n\n" + "\n".join(f"- {escape_markdown(line)}" for line in gaps))
    lines = [f"- **{name}**: {escape_markdown(text)}" for name, text in definitions]
    parts.append("### What the figures are\n\n" + "\n".join(lines))
    parts.append(f"### How it was made\n\n{fence}\n{command}\n{fence}\n\n{versions}")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def versions() -> str:
    """Return the versions of the installed packages and the processor name."""
    found = [f"nemo-lfr {__version__}", f"Python {platform.python_version()}"]
    for package in ("torch", "numpy", "pesq", "pystoi", "librosa", "jiwer", "transformers", "nemo_toolkit"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) + f"; {platform.processor() or platform.machine()}"


def _plots(evaluation: Evaluation, keys: Sequence[str]) -> list[dict[str, str]]:
    from matplotlib.figure import Figure

    shown = [result for result in evaluation.results if result.name != "original"]
    found = {result.name: tables.means(result, keys) for result in shown}
    names = [name for name in PLOTTED if any(name in own for own in found.values())]
    if not names:
        return []
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    colors = {result.name: f"C{index}" for index, result in enumerate(shown)}
    rate, spread = (Figure(figsize=(4.3 * columns, 3.2 * rows), layout="constrained") for _ in range(2))
    axes = rate.subplots(rows, columns, squeeze=False).flatten()
    boxes = spread.subplots(rows, columns, squeeze=False).flatten()
    for name, axis, box in zip(names, axes, boxes, strict=False):
        metric = all_metrics()[name]
        label = f"{name}{f' ({metric.unit})' if metric.unit else ''}, {metric.better} is better"
        own = [result for result in shown if name in found[result.name]]
        for result in own:
            mean = found[result.name][name]
            errors = [[mean.value - mean.low], [mean.high - mean.value]]
            axis.errorbar(
                tables.kilobits(result, keys), mean.value, errors, fmt="o", capsize=3, color=colors[result.name],
                label=_label(result.name),
            )  # fmt: skip
        axis.set_xscale("log")
        rates = sorted({round(tables.kilobits(result, keys), 1) for result in own})
        axis.set_xticks(rates, [f"{value:g}" for value in rates], minor=False)
        axis.minorticks_off()
        axis.set_xlabel("kbit/s")
        spreads = [
            [
                value
                for values in result.values.values()
                if not isinstance(value := values.get(name, NotMeasured()), NotMeasured)
            ]
            for result in own
        ]
        drawn = box.boxplot(spreads, orientation="horizontal", patch_artist=True, widths=0.6, showfliers=True)
        for patch, result in zip(drawn["boxes"], own, strict=True):
            patch.set_facecolor(colors[result.name])
            patch.set_alpha(0.6)
        box.set_yticks(range(1, len(own) + 1), [_label(result.name) for result in own])
        box.invert_yaxis()
        for drawing in (axis, box):
            drawing.set_title(label, fontsize=10, loc="left")
            drawing.grid(alpha=0.3)
            drawing.spines[["top", "right"]].set_visible(False)
    for figure_axes in (axes, boxes):
        for unused in figure_axes[len(names) :]:
            unused.remove()
    handles = {
        text: handle
        for axis in axes[: len(names)]
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    rate.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return [
        {"title": "Quality against bit rate", "data": _png(rate)},
        {"title": "Distribution over recordings", "data": _png(spread)},
    ]


def _label(name: str) -> str:
    """Escape a codec name for matplotlib.

    Matplotlib parses "$" as math and hides legend labels that start with "_".
    """
    return printable(name).replace("$", r"\$").lstrip("_")


def _examples(evaluation: Evaluation, keys: Sequence[str], count: int) -> list[dict[str, Any]]:
    whole = [key for key in keys if all(key in result.round_trips for result in evaluation.results)]
    count = min(count, len(whole))
    shown = []
    for key in [whole[int((index + 0.5) * len(whole) / count)] for index in range(count)]:
        recording = evaluation.recordings[key]
        length = min(recording.duration, EXAMPLE_SECONDS)
        original = read(recording.path, evaluation.rate, recording.offset, length)
        items = [{"name": "original", **_play(original, evaluation.rate)}]
        for result in evaluation.results:
            if result.name != "original":
                output, _ = soundfile.read(result.audio(key), dtype="float32", frames=len(original))
                items.append({"name": result.name, **_play(output, evaluation.rate)})
        title = " · ".join(
            str(part)
            for part in (recording.name, recording.labels.get("lang"), recording.labels.get("speaker"))
            if part
        )
        shown.append({"title": title, "text": recording.labels.get("text"), "played": items})
    return shown


def _play(wave: np.ndarray, rate: int) -> dict[str, str]:
    """Return a spectrogram and a FLAC copy of audio [T] as data URIs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.2), layout="constrained")
    axis = figure.subplots()
    look: dict[str, Any] = {"mode": "magnitude", "scale": "dB", "vmin": -105, "vmax": -30, "cmap": "magma"}
    with np.errstate(divide="ignore"):  # log10(0) of bins above a narrowband codec's cutoff
        axis.specgram(wave + 1e-6, NFFT=512, Fs=rate, noverlap=384, **look)
    ticks = range(0, rate // 2, 2000)
    axis.set_yticks(ticks, [str(tick // 1000) for tick in ticks])
    axis.tick_params(labelsize=7)
    axis.set_ylabel("kHz", fontsize=7)
    audio = io.BytesIO()
    soundfile.write(audio, wave.clip(-1, 1), rate, format="FLAC", subtype="PCM_16")
    return {"picture": _png(figure), "audio": _uri("audio/flac", audio.getvalue())}


def _png(figure: Any) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return _uri("image/png", picture.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
