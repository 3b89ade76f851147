"""Write the report of an evaluation as a self-contained HTML page, as Markdown and as CSV files."""

import base64
import hashlib
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from nemo_lfr._version import __version__
from nemo_lfr.errors import NemoLfrError, install_command, printable, shorten
from nemo_lfr.evaluation import spreadsheets, tables
from nemo_lfr.evaluation.escape import code_fence, escape_markdown
from nemo_lfr.evaluation.model_metrics import all_metrics
from nemo_lfr.evaluation.plots import metric_plots, spectrogram
from nemo_lfr.evaluation.recordings import read
from nemo_lfr.evaluation.results import Evaluation
from nemo_lfr.io.atomic import sweep
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.manifests import Recording
from nemo_lfr.io.shortage import missing_extra

EXAMPLE_SECONDS = 10.0  # maximum duration of an audio example
# Packages that the report and its metrics need, for the installation command in error messages.
PACKAGES = ("jinja2", "matplotlib", "pystoi", "pesq", "librosa", "scipy", "jiwer")
INTERVALS = (
    "Means over recordings, with 95 % bootstrap confidence intervals in parentheses. ↑: higher is better, ↓: lower is "
    "better."
)
PAIRED = (
    "Value of the first codec minus value of the second: mean over the recordings for which both codecs have a value, "
    f"with the 95 % bootstrap confidence interval. {tables.FIRST}: the first codec is better, {tables.SECOND}: the "
    "second codec is better. There is no mark if the interval contains zero, if there is only one recording, or if "
    "neither higher nor lower values of the metric are better."
)


def check_packages() -> None:
    """Check that the packages of the report are installed.

    Call this function before recordings are processed, so that a missing package is reported at once.

    Raises:
        MissingExtraError: if jinja2 or matplotlib cannot be imported.
    """
    for package in ("jinja2", "matplotlib"):
        try:
            import_module(package)
        except Exception as error:  # a broken installation can raise anything
            name = getattr(error, "name", None) or package  # a package that it needs may be missing
            raise missing_extra(error, package, f"the report needs {name}: {install_command(*PACKAGES)}") from error


def check_keys(recordings: Iterable[Recording], keys: Iterable[str]) -> None:
    """Raise NemoLfrError if a manifest key in `keys` has no value in any recording."""
    known = {key for recording in recordings for key, value in recording.labels.items() if value is not None}
    for key in keys:
        if key not in known:
            names = ", ".join(map(shorten, sorted(known - {"audio_filepath", "offset", "duration"})))
            raise NemoLfrError(
                f"--by (by=): no recording has the key {shorten(key)!r}; "
                + (f"use one of {names}." if names else "the recordings have no labels, so remove this option.")
            )


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

    The files are `report.html`, `report.md`, `summary.csv`, `differences.csv` and `recordings.csv`.

    Args:
        evaluation: results to report.
        out: output folder.
        title: title of the report.
        command: command line that produced the evaluation, shown in the report.
        by: manifest keys, such as "lang". For each value of such a key, the report contains a quality table.
        examples: number of recordings for which the page has players and spectrograms. These recordings are
            spaced evenly over the evaluation.
        card: values that NVIDIA's model card states for this test set, by metric name; None if it states none.

    Returns:
        Paths of the files.

    Raises:
        NemoLfrError: if a key in `by` has no value in any recording.
    """
    check_keys(evaluation.recordings.values(), by)
    keys = list(evaluation.recordings)
    more = [tables.cost(evaluation), tables.compression(evaluation), tables.codebooks(evaluation)]
    more += [table for label in by for table in tables.groups(evaluation, label)]
    seconds = sum(recording.duration for recording in evaluation.recordings.values())
    common: dict[str, Any] = {
        "title": title,
        "subtitle": f"{len(keys)} recordings, {seconds / 60:.1f} minutes, compared at {evaluation.rate} Hz.",
        "quality": tables.quality(evaluation, keys, card=card),
        "differences": tables.differences(evaluation, keys),
        "tables": [table for table in more if table is not None],
        "gaps": tables.gaps(evaluation),
        "definitions": tables.definitions(evaluation),
        "command": command,
        "versions": versions(),
    }
    plots = metric_plots(evaluation, keys, all_metrics())
    contents = {
        "report.html": page(**common, plots=plots, examples=_examples(evaluation, keys, examples)),
        "report.md": markdown(**common),
        "summary.csv": spreadsheets.summary(evaluation),
        "differences.csv": spreadsheets.differences(evaluation),
        "recordings.csv": spreadsheets.per_recording(evaluation),
    }
    sweep(out, contents)
    return [write_text(out / name, text) for name, text in contents.items()]


def page(**content: Any) -> str:
    """Return the HTML page. The page loads no other files, and runs no script except its own.

    Args:
        content: variables of the page template: `plots`, `examples` and all arguments of `markdown`.
    """
    from jinja2 import Environment

    folder = files("nemo_lfr.evaluation")
    template, style, script = (
        (folder / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("html.jinja", "css", "js")
    )
    # The labels of a manifest are untrusted. With this hash, a browser does not run any script that a label contains,
    # even if the label was not escaped.
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(**content, style=style, script=script, script_hash=script_hash, intervals=INTERVALS, paired=PAIRED)
    )
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def markdown(
    title: str,
    subtitle: str,
    quality: tables.Table,
    differences: tables.Table | None,
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
        differences: paired differences between codecs, or None.
        tables: additional tables.
        gaps: descriptions of failures and missing values, one line each.
        definitions: names and definitions of the metrics.
        command: command line that produced the evaluation.
        versions: package versions and processor, from `versions`.

    Returns:
        Markdown text with all labels escaped.
    """
    command = printable(command)
    fence = code_fence(command)
    parts = [f"# {escape_markdown(title)}", f"{subtitle} {INTERVALS} The best values are bold.", quality.markdown()]
    if differences is not None:
        parts.append(f"### Paired differences\n\n{PAIRED}\n\n{differences.markdown()}")
    parts += [table.markdown() for table in tables]
    if gaps:
        parts.append("### Missing values\n\n" + "\n".join(f"- {escape_markdown(line)}" for line in gaps))
    lines = [f"- **{name}**: {escape_markdown(text)}" for name, text in definitions]
    parts.append("### Definitions of the metrics\n\n" + "\n".join(lines))
    parts.append(f"### Command and versions\n\n{fence}\n{command}\n{fence}\n\n{versions}")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def versions() -> str:
    """Return the versions of nemo-lfr, Python and the packages that evaluations use, and the processor name."""
    found = [f"nemo-lfr {__version__}", f"Python {platform.python_version()}"]
    for package in ("torch", "numpy", "pesq", "pystoi", "librosa", "jiwer", "transformers", "nemo_toolkit"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) + f"; {platform.processor() or platform.machine()}"


def _examples(evaluation: Evaluation, keys: Sequence[str], count: int) -> list[dict[str, Any]]:
    whole = [key for key in keys if all(key in result.round_trips for result in evaluation.results)]
    count = min(count, len(whole))
    shown = []
    for key in [whole[int((index + 0.5) * len(whole) / count)] for index in range(count)]:
        recording = evaluation.recordings[key]
        length = min(recording.duration, EXAMPLE_SECONDS)
        original = read(recording.path, evaluation.rate, recording.offset, length)
        items = [_play("original", original, evaluation.rate)]
        for result in evaluation.results:
            if result.name != "original":
                output, _ = soundfile.read(result.audio(key), dtype="float32", frames=len(original))
                items.append(_play(result.name, output, evaluation.rate))
        labels = (recording.name, recording.labels.get("lang"), recording.labels.get("speaker"))
        title = " · ".join(str(label) for label in labels if label)
        shown.append({"title": title, "text": recording.labels.get("text"), "played": items})
    return shown


def _play(name: str, wave: np.ndarray, rate: int) -> dict[str, str]:
    """Return a player as a dict: its "name", its "picture" (a spectrogram, SVG) and its "audio" (data URI of FLAC)."""
    audio = io.BytesIO()
    soundfile.write(audio, wave.clip(-1, 1), rate, format="FLAC", subtype="PCM_16")
    data = base64.b64encode(audio.getvalue()).decode()
    return {"name": name, "picture": spectrogram(wave, rate, name), "audio": f"data:audio/flac;base64,{data}"}
