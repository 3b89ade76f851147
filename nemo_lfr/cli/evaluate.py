"""Command `nemo-lfr evaluate`."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_lfr.cli.options import UserPath
from nemo_lfr.cli.terminal import echo_stderr, echo_stdout, progress
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.regular import open_regular

if TYPE_CHECKING:
    from nemo_lfr.io.manifests import Recording


class RegistryOption(click.Option):
    """Option whose help lists what is registered; the codecs and metrics are imported only when it is shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help, with `{}` replaced by the registered names."""
        from nemo_lfr.evaluation.codecs import codec_usage
        from nemo_lfr.evaluation.model_metrics import model_metric_kinds

        names = codec_usage() if self.name == "codecs" else ", ".join(model_metric_kinds())
        record = super().get_help_record(ctx)
        return record and (record[0], record[1].replace("{}", names))


@click.command(short_help="Measure codecs on recordings and write a report.")
@click.argument("source", type=UserPath())
@click.option(
    "--codec", "codecs", multiple=True, cls=RegistryOption, help="Codec to compare, repeatable: {} (default: lfr)."
)
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
@click.option(
    "--model-metric",
    "model_metrics",
    multiple=True,
    cls=RegistryOption,
    help="Metric of another model, as KIND or KIND:MODEL, repeatable; kinds: {}.",
)
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
    by: tuple[str, ...],
    examples: int,
    jobs: int | None,
    device: str | None,
    **models: Any,
) -> None:
    """Measure codecs on the recordings of a NeMo manifest or table, and write a report.

    Results are kept: the same command resumes an interrupted run, and another --codec or a larger --limit adds to
    it. The exit code is 1 if a codec failed on a recording, which the report names, if a line of the manifest could
    not be used, or if a requested model could not be loaded.
    """
    from nemo_lfr.evaluation import report
    from nemo_lfr.evaluation.codecs import open_codec
    from nemo_lfr.evaluation.recordings import choose
    from nemo_lfr.evaluation.run import evaluate
    from nemo_lfr.io.exclusive import exclusive

    report.check_packages()
    recordings, look, bad_lines = _read_recordings(source, preset, audio_dir, seed)
    opened = [open_codec(text, device) for text in dict.fromkeys(codecs or ("lfr",))]
    requested = _requested_models(**models)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        evaluation = evaluate(
            choose(recordings, limit, seed),
            opened,
            out,
            rate=rate,
            device=device,
            jobs=jobs or os.cpu_count() or 1,
            models=requested,
            source=f"{preset or 'manifest'} {source.resolve()}",
            progress=progress,
        )
        if not any(result.round_trips for result in evaluation.results):
            raise NemoLfrError(f"{source}: no codec processed any recording; the lines above say why.")
        command = shlex.join(["nemo-lfr", *sys.argv[1:]])
        paths = report.write_report(evaluation, out, command=command, by=by, examples=examples, **look)
    for path in paths:
        echo_stdout(path)
    for kind, reason in evaluation.failed_models.items():
        echo_stderr(f"nemo-lfr: {kind}: the model {requested[kind]} could not be loaded: {reason}")
    if bad_lines or evaluation.failed_models or any(result.failures for result in evaluation.results):
        sys.exit(1)


def _requested_models(asr: str | None, speaker_model: str | None, model_metrics: tuple[str, ...]) -> dict[str, str]:
    """Return the model for each kind of model metric that the options request."""
    models = {kind: model for kind, _, model in (text.partition(":") for text in model_metrics)}
    named = {"asr": asr, "speaker": speaker_model}
    return models | {kind: model for kind, model in named.items() if model is not None}


def _read_recordings(
    source: Path, preset: str | None, audio_dir: Path | None, seed: int
) -> "tuple[list[Recording], dict[str, Any], list[str]]":
    """Return the recordings of a manifest or preset, the arguments of the report, and the unusable lines."""
    from nemo_lfr.evaluation.presets import PRESETS
    from nemo_lfr.io.manifests import read_manifest

    bad_lines: list[str] = []
    if preset:
        if not source.is_dir():
            raise NemoLfrError(f"{source}: no such folder; with --preset, pass the folder of the unpacked archives.")
        recordings = PRESETS[preset].recordings(source, seed)
        look = {"title": f"Speech codecs on {preset}", "card": PRESETS[preset].card}
        echo_stderr(f"{preset}: {PRESETS[preset].selection}")
    else:
        _check_manifest(source)
        recordings = read_manifest(source, audio_dir, on_bad_line=bad_lines.append)
        look = {"title": f"Speech codecs on {source.stem}"}
        for problem in bad_lines:
            echo_stderr(f"nemo-lfr: {problem}")
    if not recordings:
        raise NemoLfrError(f"{source}: contains no recordings.")
    return recordings, look, bad_lines


def _check_manifest(source: Path) -> None:
    """Raise an error unless `source` is a regular file."""
    if source.is_dir():
        raise NemoLfrError(
            f"{source}: is a folder, not a manifest; write one with: nemo-lfr prepare folder {source} --out FOLDER"
        )
    if not source.exists():
        raise NemoLfrError(f"{source}: no such manifest.")
    open_regular(source, advice="write the manifest to a file and pass its path").close()
