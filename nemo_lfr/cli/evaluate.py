"""Command `nemo-lfr evaluate`."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_lfr.bundled import bundled_quality
from nemo_lfr.cli.command import Command, RenamedOption
from nemo_lfr.cli.identify import refuse_other_kind
from nemo_lfr.cli.options import PathText, UserPath, count_option, device_option
from nemo_lfr.cli.progress import progress
from nemo_lfr.cli.results import EvaluateResult
from nemo_lfr.cli.session import current, fail, note, print_line
from nemo_lfr.errors import NemoLfrError, counted
from nemo_lfr.io.locate import resolve_folder
from nemo_lfr.io.regular import open_regular

if TYPE_CHECKING:
    from nemo_lfr.evaluation.results import Evaluation
    from nemo_lfr.io.manifests import Recording


class RegistryOption(click.Option):
    """Option whose help text lists all registered codecs or metrics.

    The modules that register them are slow to import, so they are imported only when the help is shown.
    """

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help text. In the text, `{}` is replaced by the names of all codecs or metrics."""
        from nemo_lfr.evaluation.codecs import codec_usage
        from nemo_lfr.evaluation.model_metrics import model_metric_kinds

        names = codec_usage() if self.name == "codecs" else ", ".join(model_metric_kinds())
        record = super().get_help_record(ctx)
        return record and (record[0], record[1].replace("{}", names))


@click.command(cls=Command, result=EvaluateResult, short_help="Measure codecs on recordings and write a report.")
@click.argument("source", type=UserPath())
@click.option(
    "--codec",
    "codecs",
    multiple=True,
    cls=RegistryOption,
    metavar="CODEC",
    help=f"Codec to compare, repeatable: {{}} (default: lfr; the bundled codec has {bundled_quality()}).",
)
@click.option("--out", type=UserPath(file_okay=False), required=True, help="Folder for the report and all audio.")
@click.option(
    "--preset",
    type=click.Choice(["card-mls", "card-daps"]),
    help="Test set from a corpus that NVIDIA's model card names (default: none). With this option, SOURCE is the "
    "folder with the unpacked archives of the corpus.",
)
@click.option(
    "--audio-dir",
    type=UserPath(exists=True, file_okay=False),
    help="Base folder for relative paths in SOURCE (default: the folder that contains SOURCE).",
)
@count_option("--limit", "Maximum number of recordings, chosen at random (default: all).")
@count_option("--seed", "Random seed for --limit and for presets that choose recordings at random.", 0, low=0)
@click.option(
    "--rate",
    type=click.IntRange(8000, 48000),
    metavar="HZ",
    default=22050,
    show_default=True,
    help="Sample rate at which codecs are compared, in Hz.",
)
@click.option(
    "--asr",
    type=PathText("model"),
    help="ASR model for CER and WER: a folder or Hub id (transformers), a .nemo file or nemo:HUB_ID (default: none).",
)
@click.option(
    "--speaker-model",
    type=PathText("model"),
    help="Speaker verification model for speaker similarity: a folder or Hub id (transformers), a .nemo file or "
    "nemo:HUB_ID (default: none).",
)
@click.option(
    "--model-metric",
    "model_metrics",
    multiple=True,
    cls=RegistryOption,
    metavar="KIND[:MODEL]",
    help="Model that computes metrics, repeatable; kinds: {} (default: squim, if its weights have been downloaded).",
)
@click.option(
    "--by",
    multiple=True,
    metavar="KEY",
    help="Manifest key, such as lang; adds a table for each of its values; repeatable (default: none).",
)
@count_option("--examples", "Number of recordings with audio players in the report.", 4, low=0)
@count_option(
    "--workers", "Number of processes for the metrics (default: one per core).", cls=RenamedOption, earlier="--jobs"
)
@device_option()
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
    workers: int | None,
    device: str | None,
    **models: Any,
) -> dict[str, Any]:
    """Measure codecs on the recordings in a NeMo manifest or table, and write a report.

    The output folder keeps all results. To resume an interrupted run, run the same command again. To add results, run
    it with an additional --codec or a larger --limit. The exit code is 1 if a codec failed on a recording, a line of
    the manifest could not be used, or a requested metric could not be measured.
    """
    from nemo_lfr.evaluation import report
    from nemo_lfr.evaluation.codecs import open_codec
    from nemo_lfr.evaluation.recordings import choose
    from nemo_lfr.evaluation.run import evaluate
    from nemo_lfr.io.exclusive import exclusive

    report.check_packages()
    refuse_other_kind(source, "a manifest or a table")
    recordings, look = _read_recordings(source, preset, audio_dir, seed)
    chosen = choose(recordings, limit, seed)
    report.check_keys(chosen.values(), by)
    opened = [open_codec(text, device) for text in dict.fromkeys(codecs or ("lfr",))]
    requested = _requested_models(**models)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        evaluation = evaluate(
            chosen,
            opened,
            out,
            rate=rate,
            device=device,
            jobs=workers or os.cpu_count() or 1,
            models=requested,
            source=f"{preset or 'manifest'} {resolve_folder(source)}",
            progress=progress,
        )
        _record_failures(evaluation, requested)
        if not any(result.round_trips for result in evaluation.results):
            raise NemoLfrError(f"{source}: no codec processed any recording; the messages above give the reasons.")
        command = shlex.join(["nemo-lfr", *sys.argv[1:]])
        paths = report.write_report(evaluation, out, command=command, by=by, examples=examples, **look)
    for path in paths:
        print_line(path)
    return {
        "files": [str(path) for path in paths],
        "recordings": len(evaluation.recordings),
        "codecs": [result.name for result in evaluation.results],
    }


def _record_failures(evaluation: "Evaluation", requested: dict[str, str]) -> None:
    """Record the recordings on which a codec failed, and the requested metrics that were not measured.

    Args:
        evaluation: the finished evaluation.
        requested: model for each requested kind of model metric; see `_requested_models`.
    """
    for result in evaluation.results:
        for key, reason in result.failures.items():
            fail(evaluation.recordings[key].path, NemoLfrError(f"{result.name}: {reason}"))
    current().reported = len(current().failures)  # these failures were already printed when they happened
    for kind, reason in evaluation.failed_models.items():
        fail(requested[kind], NemoLfrError(f"{kind}: the model {requested[kind]} could not be loaded: {reason}"))
    for metric, model in evaluation.models.items():
        values = [
            result.values.get(key, {}).get(metric) for result in evaluation.results for key in result.round_trips
        ]
        reasons = [str(value) for value in values if not isinstance(value, int | float)]
        errors = [reason for reason in reasons if reason.startswith("not measured")]
        if model in requested.values() and (errors or (reasons and len(reasons) == len(values))):
            failed = len(errors or reasons)
            fail(
                model,
                NemoLfrError(
                    f"{metric} has no value for {failed} of {counted(len(values), 'decoded recording')}: {reasons[0]}"
                ),
            )


def _requested_models(asr: str | None, speaker_model: str | None, model_metrics: tuple[str, ...]) -> dict[str, str]:
    """Return a dict from each requested kind of model metric, such as "asr", to the Hub id or path of its model.

    An empty string stands for the default model of that kind.
    """
    models = {kind: model for kind, _, model in (text.partition(":") for text in model_metrics)}
    named = {"asr": asr, "speaker": speaker_model}
    return models | {kind: model for kind, model in named.items() if model is not None}


def _read_recordings(
    source: Path, preset: str | None, audio_dir: Path | None, seed: int
) -> "tuple[list[Recording], dict[str, Any]]":
    """Return the recordings in a manifest or preset, and arguments for `write_report`, such as the title.

    Lines of a manifest that cannot be used are recorded as failures.
    """
    from nemo_lfr.evaluation.presets import PRESETS
    from nemo_lfr.io.manifests import read_manifest

    if preset:
        if not source.is_dir():
            raise NemoLfrError(f"{source}: not a folder; with --preset, pass the folder of the unpacked archives.")
        recordings = PRESETS[preset].recordings(source, seed)
        look = {"title": f"Speech codecs on {preset}", "card": PRESETS[preset].card}
        note(f"{preset}: {PRESETS[preset].selection}")
    else:
        _check_manifest(source)
        recordings = read_manifest(source, audio_dir, on_bad_line=lambda line: fail(source, NemoLfrError(line)))
        look = {"title": f"Speech codecs on {resolve_folder(source).parent.name}/{source.name}"}
        current().report_failures()
    if not recordings:
        raise NemoLfrError(f"{source}: no recordings found; pass a manifest with at least one usable line.")
    return recordings, look


def _check_manifest(source: Path) -> None:
    """Raise an error unless `source` is a regular file."""
    if source.is_dir():
        raise NemoLfrError(
            f"{source}: this path is a folder, not a manifest; write a manifest with: nemo-lfr prepare folder "
            f"{source} --out FOLDER"
        )
    if not source.exists():
        raise NemoLfrError(f"{source}: no such file.")
    open_regular(source, advice="write the manifest to a file and pass its path").close()
