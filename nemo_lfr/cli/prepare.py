"""Command `nemo-lfr prepare`."""

import json
import sys
from pathlib import Path

import click

from nemo_lfr.cli.options import Number, UserPath
from nemo_lfr.cli.terminal import print_table, progress
from nemo_lfr.io.layouts import LAYOUTS


@click.command(short_help="Write training manifests for a corpus.")
@click.argument("kind", type=click.Choice(list(LAYOUTS)))
@click.argument("corpus", type=UserPath())
@click.option("--out", type=UserPath(file_okay=False), required=True, help="Folder for the manifests.")
@click.option(
    "--valid-share",
    type=Number(0, 1),
    default=0.02,
    show_default=True,
    help="Share of speakers held out for validation if the corpus has no validation set.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="Number of files read in parallel."
)
@click.option("--no-check", is_flag=True, help="Trust file headers (default: decode every file to its end).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prepare(kind: str, corpus: Path, out: Path, valid_share: float, jobs: int, no_check: bool, as_json: bool) -> None:
    """Turn an unpacked corpus into the manifests that training reads; the audio stays where it is.

    An interrupted run resumes where it stopped. Files that cannot be used are listed in failures.jsonl; the
    exit code is then 1.
    """
    from nemo_lfr.training.prepare import prepare

    values = prepare(kind, corpus, out, valid_share=valid_share, jobs=jobs, check=not no_check, progress=progress)
    if as_json:
        click.echo(json.dumps(values, indent=2))
    else:
        print_table(values)
    if "failures" in values:
        sys.exit(1)
