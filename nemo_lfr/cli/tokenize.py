"""`nemo-lfr tokenize`."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from nemo_lfr.cli.options import Number, UserPath
from nemo_lfr.cli.terminal import echo_stderr, echo_stdout
from nemo_lfr.corpus.formats import format_names

FORMATS = format_names()


@click.command(short_help="Tokenize a corpus.")
@click.argument("corpus", type=UserPath())
@click.option("--out", type=UserPath(file_okay=False), required=True, help="Folder for the tokens.")
@click.option("--format", "kind", type=click.Choice(FORMATS), default="shar", show_default=True)
@click.option("--model", help="A .nemo or .ckpt file, or a Hub id; the codec inside the package if not given.")
@click.option("--device", help="cpu, cuda, cuda:1 ...; every GPU there is, else the CPU.")
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--compress", is_flag=True, help="Make the files of --format lfr about a third smaller, without loss.")
@click.option(
    "--entropy-model",
    type=UserPath(dir_okay=False),
    help="A .lfrm file to compress with; for the codec in the package its own by default.",
)
@click.option(
    "--pad",
    type=click.Choice(["encode", "magpie"]),
    default="encode",
    show_default=True,
    help="magpie: a whole frame of silence after clips that fill their frames, as NeMo's Magpie datasets have it.",
)
@click.option("--context", is_flag=True, help="Tokenise the context audio that the corpus names, too.")
@click.option(
    "--audio-dir",
    type=UserPath(exists=True, file_okay=False),
    help="Folder of relative paths; that of the manifest by default.",
)
@click.option("--dataset", help="Name of the corpus in Magpie's speaker labels; that of the input if not given.")
@click.option("--shard-size", type=click.IntRange(min=1), default=256, show_default=True, help="Clips of a shard.")
@click.option("--max-duration", type=Number(min=0), default=3600.0, show_default=True, help="Seconds.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes or actors; one a GPU or core if not given.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of each worker on a CPU.")
@click.option("--readers", type=click.IntRange(min=1), default=1, show_default=True, help="Of audio, in each worker.")
@click.option("--ray", help="Run on Ray: local, auto, or the address of a cluster.")
@click.option("--allow-url", is_flag=True, help="Read audio that Lhotse cuts place at an http(s) URL.")
@click.option("--strict", is_flag=True, help="Stop at the first clip that fails.")
@click.option("--verify", is_flag=True, help="Compare hashes of shards that exist, not only their sizes.")
@click.option(
    "--retry-failed", is_flag=True, help="Compute shards again in which clips failed, as after mending them."
)
@click.option("--json", "as_json", is_flag=True, help="Print what tokens.json holds.")
def tokenize(
    corpus: Path,
    out: Path,
    kind: str,
    audio_dir: Path | None,
    entropy_model: Path | None,
    dataset: str | None,
    workers: int | None,
    device: str | None,
    ray: str | None,
    verify: bool,
    retry_failed: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Tokenise a corpus: a NeMo manifest, Lhotse cuts or Shar, Parquet, a saved Hugging Face dataset, or a folder.

    The same command again goes on where it was interrupted. Clips that cannot be tokenised are listed in
    failures.jsonl; the exit code is then 1.
    """
    from nemo_lfr.corpus.config import TokenizeConfig
    from nemo_lfr.corpus.run import tokenize

    config = TokenizeConfig(
        str(corpus),
        str(out),
        kind,
        audio_dir=None if audio_dir is None else str(audio_dir),
        entropy_model=None if entropy_model is None else str(entropy_model),
        dataset=dataset or corpus.resolve().name.partition(".")[0],
        **options,
    )
    with watching() as watch:
        done = tokenize(
            config, workers=workers, device=device, ray=ray, verify=verify, retry_failed=retry_failed, watch=watch
        )
    if as_json:
        click.echo(json.dumps(done, indent=2))
    else:
        echo_stdout(out)
    text = f"nemo-lfr: {done['clips']} clips, {done['hours']:.2f} hours"
    if done["failures"]:
        text += f"; {done['failures']} failed, see {out}/failures.jsonl; once they are mended, add --retry-failed"
    echo_stderr(text)
    if done["failures"]:
        sys.exit(1)


@contextmanager
def watching() -> Iterator[Callable[[Any], None]]:
    """A bar on a terminal, a line each half minute elsewhere; its value is called with the totals after each shard."""
    started = time.monotonic()

    def summarize(totals: Any) -> str:
        hours = totals.samples / totals.sample_rate / 3600
        speed = totals.computed_samples / totals.sample_rate / max(time.monotonic() - started, 1e-9)
        return f"{totals.clips} clips, {hours:.2f} h, {speed:.1f}x real time, {len(totals.failures)} failed"

    if not sys.stderr.isatty():
        last = started

        def now_and_then(totals: Any) -> None:
            nonlocal last
            if time.monotonic() - last > 30:
                last = time.monotonic()
                echo_stderr(f"nemo-lfr: {totals.done} of {totals.shards} shards: {summarize(totals)}")

        yield now_and_then
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda totals: bar.update(
            task, total=totals.shards, completed=totals.done, description=summarize(totals)
        )
