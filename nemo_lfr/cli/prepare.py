"""Command `nemo-lfr prepare`."""

from pathlib import Path
from typing import Any

import click

from nemo_lfr.cli.command import Command, RenamedOption
from nemo_lfr.cli.options import Number, UserPath, count_option
from nemo_lfr.cli.progress import progress
from nemo_lfr.cli.results import PrepareResult
from nemo_lfr.cli.session import current, print_line
from nemo_lfr.errors import counted
from nemo_lfr.frames import duration_text
from nemo_lfr.io.layouts import LAYOUTS


class Kind(click.Choice):  # type: ignore[type-arg]  # generic in recent releases only
    """Type of an argument that names the layout of a corpus: a built-in layout, or a recipe of Lhotse."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value if it is one of the choices or begins with "lhotse:"; otherwise, fail."""
        return value if str(value).startswith("lhotse:") else super().convert(value, param, ctx)


@click.command(cls=Command, result=PrepareResult, short_help="Write training manifests for a corpus.")
@click.argument("kind", metavar="KIND", type=Kind([*LAYOUTS, "lhotse:NAME"]))
@click.argument("corpus", type=UserPath())
@click.option("--out", type=UserPath(file_okay=False), required=True, help="Folder for the manifests.")
@click.option(
    "--valid-share",
    type=Number(0, 1),
    metavar="SHARE",
    default=0.02,
    show_default=True,
    help="Fraction of the speakers to hold out for validation if the corpus has no validation set. If speakers are "
    "unknown, or if there is only one, folders or files are held out instead.",
)
@click.option(
    "--speaker-level",
    type=click.IntRange(min=1),
    metavar="N",
    help="For KIND folder: depth of the folders that are named after speakers (default: no folder is). 1 stands for "
    "the folders directly in CORPUS.",
)
@count_option("--workers", "Number of files to read in parallel.", 4, cls=RenamedOption, earlier="--jobs")
@click.option(
    "--no-check", is_flag=True, help="Read only the headers of the files instead of decoding every file to its end."
)
@click.option("--overwrite", is_flag=True, help="Replace all manifests and failures.jsonl of an earlier run in --out.")
def prepare(
    kind: str,
    corpus: Path,
    out: Path,
    valid_share: float,
    speaker_level: int | None,
    workers: int,
    no_check: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Write training manifests for an unpacked corpus. The audio files are not moved or copied.

    KIND is the layout of CORPUS. Use librispeech, mls, commonvoice or vctk for one of these corpora as published.
    Use folder for any folder of audio files, and table for a .csv, .tsv or metadata.jsonl file. Use lhotse:NAME,
    such as lhotse:ljspeech, for a corpus that the Lhotse recipe NAME can read.

    If a run is interrupted, the same command resumes it. Files that cannot be used are listed in failures.jsonl;
    the exit code is then 1.
    """
    from nemo_lfr.training.prepare import prepare

    done = prepare(
        kind,
        corpus,
        out,
        valid_share=valid_share,
        speaker_level=speaker_level,
        workers=workers,
        check=not no_check,
        overwrite=overwrite,
        progress=progress,
    )
    for split, figures in done.splits.items():
        print_line(
            f"{split:<9}  {figures.manifest}  ({counted(figures.utterances, 'utterance')}, "
            f"{counted(figures.speakers, 'speaker')}, {duration_text(figures.duration_s)})"
        )
    if done.held_out_by:
        print_line(f"valid      held out by {done.held_out_by}")
    if done.failures_file is not None:
        print_line(f"failures   {done.failures_file}  ({len(done.failures)})")
    print_line(f"audio_dir  {done.audio_dir}")
    if kind == "folder" and speaker_level is None and not any(figures.speakers for figures in done.splits.values()):
        print_line("speakers   unknown; if folders are named after speakers, pass their depth as --speaker-level")
    session = current()
    session.failures += done.failures
    session.report_failures(shown=0)
    return {
        "splits": {
            split: {
                "manifest": str(figures.manifest),
                "utterances": figures.utterances,
                "speakers": figures.speakers,
                "duration_s": figures.duration_s,
            }
            for split, figures in done.splits.items()
        },
        "failures_file": None if done.failures_file is None else str(done.failures_file),
        "held_out_by": done.held_out_by,
        "audio_dir": str(done.audio_dir),
    }
