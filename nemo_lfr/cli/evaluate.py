"""Command `nemo-lfr evaluate`."""

import os
import shlex
import sys
from pathlib import Path

import click

from nemo_lfr.cli.options import UserPath
from nemo_lfr.cli.terminal import echo_stderr, echo_stdout, progress
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation import CODECS
from nemo_lfr.io.regular import open_regular


@click.command(short_help="Measure codecs on recordings and write a report.")
@click.argument("source", type=UserPath())
@click.option("--codec", "codecs", multiple=True, help=f"Codec to compare, repeatable: {CODECS} (default: lfr).")
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    required=True,
    help="Folder for the report and all audio.",
)
@click.option(
    "--preset",
    type=click.Choice(["card-mls", "card-daps"]),
    help="Test set of NVIDIA's model card; SOURCE is the folder of its unpacked archives.",
)
@click.option(
    "--audio-dir",
    type=UserPath(exists=True, file_okay=False),
    help="Base folder of the manifest's paths (default: the manifest's folder).",
)
@click.option("--limit", type=click.IntRange(min=1), help="Number of recordings to sample (default: all).")
@click.option("--seed", type=int, default=0, show_default=True, help="Sampling seed for --limit.")
@click.option(
    "--rate",
    type=click.IntRange(8000, 48000),
    default=22050,
    show_default=True,
    help="Sample rate of the comparison, in Hz.",
)
@click.option(
    "--asr", help="ASR model for CER and WER: a folder or Hub id (transformers), a .nemo file or nemo:HUB_ID."
)
@click.option("--speaker-model", help="Model for speaker similarity; same forms as --asr.")
@click.option("--by", multiple=True, help="Manifest key to group tables by, such as lang; repeatable.")
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Recordings shown in the report with audio players.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Number of processes for the metrics (default: one per core)."
)
@click.option("--device", help="Device: cpu, cuda, cuda:1 ... (default: a GPU if there is one).")
def evaluate(
    source: Path,
    codecs: tuple[str, ...],
    out: Path,
    preset: str | None,
    audio_dir: Path | None,
    limit: int | None,
    seed: int,
    rate: int,
    asr: str | None,
    speaker_model: str | None,
    by: tuple[str, ...],
    examples: int,
    jobs: int | None,
    device: str | None,
) -> None:
    """Measure codecs on the recordings of a NeMo manifest, and write a report.

    Results are kept: the same command resumes an interrupted run, and another --codec or a larger --limit adds to
    it. The exit code is 1 if a codec failed on a recording, which the report names, or if a line of the
    manifest could not be used.
    """
    from nemo_lfr.evaluation import report
    from nemo_lfr.evaluation.presets import PRESETS
    from nemo_lfr.evaluation.run import choose, evaluate
    from nemo_lfr.io.manifests import read_manifest

    report.check_packages()
    bad_lines: list[str] = []
    title, card = f"Speech codecs on {source.stem}", None
    if preset:
        if not source.is_dir():
            raise NemoLfrError(f"{source}: no such folder; with --preset give that of the unpacked archives.")
        found = PRESETS[preset].recordings(source, seed)
        card, title = PRESETS[preset].card, f"Speech codecs on {preset}"
        echo_stderr(f"{preset}: {PRESETS[preset].selection}")
    else:
        if source.exists() and not source.is_dir():
            open_regular(source).close()  # raises a specific error for pipes and devices
        if not source.is_file():
            raise NemoLfrError(f"{source}: no such manifest; folders are turned into one by: nemo-lfr prepare folder")
        found = read_manifest(source, audio_dir, on_bad_line=bad_lines.append)
        for problem in bad_lines:
            echo_stderr(f"nemo-lfr: {problem}")
    if not found:
        raise NemoLfrError(f"{source}: holds no recording.")
    evaluation = evaluate(
        choose(found, limit, seed),
        codecs or ("lfr",),
        out,
        rate=rate,
        device=device,
        jobs=jobs or os.cpu_count() or 1,
        asr=asr,
        speaker_model=speaker_model,
        progress=progress,
    )
    if not any(result.sent for result in evaluation.results):
        raise NemoLfrError(f"{source}: no recording went through any codec; the lines above say why.")
    command = shlex.join(["nemo-lfr", *sys.argv[1:]])
    for path in report.write_report(
        evaluation, out, title=title, command=command, by=by, examples=examples, card=card
    ):
        echo_stdout(path)
    if bad_lines or any(result.failures for result in evaluation.results):
        sys.exit(1)
