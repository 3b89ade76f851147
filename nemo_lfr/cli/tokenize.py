"""Command `nemo-lfr tokenize`."""

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
@click.option("--model", help="Checkpoint (.nemo or .ckpt) or Hub id (default: the bundled codec).")
@click.option("--device", help="Device: cpu, cuda, cuda:1 ... (default: all GPUs, else the CPU).")
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option(
    "--compress",
    is_flag=True,
    help="Compress the files of --format lfr losslessly, to about two thirds of their size.",
)
@click.option(
    "--entropy-model",
    type=UserPath(dir_okay=False),
    help="Entropy model (.lfrm) to compress with (default for the bundled codec: its own).",
)
@click.option(
    "--pad",
    type=click.Choice(["encode", "magpie"]),
    default="encode",
    show_default=True,
    help="Padding. magpie adds a frame of silence to clips that are whole frames long, as NeMo's Magpie datasets do.",
)
@click.option("--context", is_flag=True, help="Also tokenize the context audio that the corpus names.")
@click.option(
    "--audio-dir",
    type=UserPath(exists=True, file_okay=False),
    help="Base folder of relative paths (default: the manifest's folder).",
)
@click.option("--dataset", help="Corpus name in Magpie's speaker labels (default: the name of CORPUS).")
@click.option("--shard-size", type=click.IntRange(min=1), default=256, show_default=True, help="Clips per shard.")
@click.option(
    "--max-duration",
    type=Number(min=0),
    default=3600.0,
    show_default=True,
    help="Longest clip to tokenize, in seconds.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Number of processes or actors (default: one per GPU or core)."
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads per worker on a CPU."
)
@click.option(
    "--readers", type=click.IntRange(min=1), default=1, show_default=True, help="Audio reading threads per worker."
)
@click.option("--ray", help="Run on Ray: local, auto, or the address of a cluster.")
@click.option("--allow-url", is_flag=True, help="Read audio from the http(s) URLs of Lhotse cuts.")
@click.option("--strict", is_flag=True, help="Stop at the first clip that fails.")
@click.option("--verify", is_flag=True, help="Compare hashes of existing shards, not only sizes.")
@click.option(
    "--retry-failed", is_flag=True, help="Recompute shards with failed clips, for example after repairing the files."
)
@click.option("--json", "as_json", is_flag=True, help="Print tokens.json.")
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
    """Tokenize a corpus: a manifest, a CSV or Parquet table, Lhotse cuts or Shar, a Hugging Face dataset or a folder.

    If a run is interrupted, the same command resumes it. Clips that cannot be tokenized are listed in
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
        text += f"; {done['failures']} failed, see {out}/failures.jsonl; fix them and run again with --retry-failed"
    echo_stderr(text)
    if done["failures"]:
        sys.exit(1)


@contextmanager
def watching() -> Iterator[Callable[[Any], None]]:
    """Show a progress bar on a terminal, or else print a line every 30 s.

    Yields:
        A function to call with the totals of the run so far.
    """
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
