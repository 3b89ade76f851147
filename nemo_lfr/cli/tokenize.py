"""Command `nemo-lfr tokenize`."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from nemo_lfr.cli.command import Command
from nemo_lfr.cli.identify import refuse_other_kind
from nemo_lfr.cli.options import (
    UserPath,
    count_option,
    device_option,
    entropy_model_option,
    model_option,
    precision_option,
    seconds_option,
)
from nemo_lfr.cli.results import TokenizeResult
from nemo_lfr.cli.session import begin_work, current, note, print_line
from nemo_lfr.cli.terminal import echo_stderr, heartbeat, progress_bar
from nemo_lfr.corpus.formats import BUILT_IN, format_names
from nemo_lfr.errors import Failure, counted
from nemo_lfr.frames import duration_text
from nemo_lfr.io.locate import resolve_folder


class FormatName(click.Choice):  # type: ignore[type-arg]  # generic in recent releases of click
    """Type of an option that names an output format, which may be built in or from another installed package."""

    def __init__(self) -> None:
        super().__init__(BUILT_IN)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name if a format has this name; otherwise, fail with the names of all formats."""
        if value not in BUILT_IN and value not in format_names():
            self.fail(f"{value!r} is unknown; use {', '.join(map(repr, format_names()))}.", param, ctx)
        return value


# Other repairs, for example of a manifest or a transcript, change the list of clips, so the run cannot be resumed.
AFTER_REPAIR = "after repairing audio files, rerun with --retry-failed; after other repairs, choose another --out"


@click.command(cls=Command, result=TokenizeResult, short_help="Tokenize a corpus.")
@click.argument("corpus", type=UserPath())
@click.option("--out", type=UserPath(file_okay=False), required=True, help="Folder for the tokens.")
@click.option("--format", "kind", type=FormatName(), default="shar", show_default=True, help="Format of the tokens.")
@click.option(
    "--compress",
    is_flag=True,
    help="Compress the files of --format lfr losslessly, to about 75 % of their size.",
)
@entropy_model_option("Entropy model (.lfrm); implies --compress (default: the bundled codec's model).")
@click.option(
    "--pad",
    type=click.Choice(["encode", "magpie"]),
    default="encode",
    show_default=True,
    help="Padding of clips: encode fills the last frame with zeros. magpie also adds a frame of silence to a clip "
    "whose length is a whole number of frames, as in Magpie's datasets.",
)
@click.option(
    "--context",
    is_flag=True,
    help="Also tokenize the context audio (a sample of the speaker's voice) that the corpus lists for each clip.",
)
@click.option(
    "--audio-dir",
    type=UserPath(exists=True, file_okay=False),
    help="Base folder for relative paths in CORPUS (default: CORPUS if it is a folder, else the folder that "
    "contains it).",
)
@click.option(
    "--dataset", metavar="NAME", help="Corpus name in Magpie's speaker labels (default: the name of CORPUS)."
)
@count_option("--shard-size", "Number of clips per shard.", 256)
@seconds_option("--max-duration", "Maximum duration of a clip, in seconds; longer clips fail.", 3600.0)
@count_option("--workers", "Number of processes or Ray actors (default: one per GPU, or per core without a GPU).")
@count_option("--threads", "Number of threads per worker, if the codec runs on the CPU.", 1)
@count_option("--readers", "Number of threads in each worker for reading audio.", 1)
@click.option(
    "--ray", metavar="ADDRESS", help="Run on Ray: local, auto, or the address of a cluster (default: without Ray)."
)
@click.option(
    "--shard-of",
    metavar="I/N",
    help="Process only the shards of process I of N, where I counts from 0. With 'auto', I and N are read from the "
    "environment variables of torchrun or Slurm (default: all shards).",
)
@click.option("--allow-url", is_flag=True, help="Read audio from the http(s) URLs of Lhotse cuts.")
@click.option("--strict", is_flag=True, help="Stop at the first clip that fails.")
@click.option("--verify", is_flag=True, help="Check existing shards by their hashes, not only by their sizes.")
@click.option(
    "--retry-failed",
    is_flag=True,
    help="Process shards with failed clips again, for example after you have repaired the files.",
)
@model_option()
@device_option("all GPUs, else the CPU")
@precision_option
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
    shard_of: str | None,
    verify: bool,
    retry_failed: bool,
    **options: Any,
) -> dict[str, Any]:
    """Tokenize a corpus: a manifest, a CSV or Parquet table, Lhotse cuts or Shar, a Hugging Face dataset or a folder.

    If a run is interrupted, the same command resumes it. Clips that cannot be tokenized are listed in
    failures.jsonl; the exit code is then 1.

    With --shard-of, several machines share a run without Ray. The process that ends last completes the output. If that
    process was interrupted, run the same command without --shard-of to complete the output.
    """
    from nemo_lfr.corpus.config import TokenizeConfig
    from nemo_lfr.corpus.part import parse_part
    from nemo_lfr.corpus.records import stored_dataset
    from nemo_lfr.corpus.run import tokenize

    refuse_other_kind(corpus, "a manifest, a table, cuts or a folder")
    config = TokenizeConfig(
        str(corpus),
        str(out),
        kind,
        audio_dir=None if audio_dir is None else str(audio_dir),
        entropy_model=None if entropy_model is None else str(entropy_model),
        dataset=dataset or stored_dataset(out) or resolve_folder(corpus).name.partition(".")[0],
        part=None if shard_of is None else parse_part(shard_of),
        **options,
    )
    failures: list[dict[str, str]] = []

    with watching() as watch:

        def watch_failures(totals: Any) -> None:
            failures[:] = totals.failures
            watch(totals)

        done = tokenize(
            config,
            workers=workers,
            device=device,
            ray=ray,
            verify=verify,
            retry_failed=retry_failed,
            watch=watch_failures,
        )
    return _report(out, done, failures)


def _report(out: Path, done: dict[str, Any], failures: list[dict[str, str]]) -> dict[str, Any]:
    """Print the result, and return it for `--json`.

    Args:
        out: the output folder.
        done: return value of `tokenize`.
        failures: failures of this process; used only while shards of other processes are missing.
    """
    missing = done.get("missing_shards", 0)
    failures_file = out / "failures.jsonl"
    if not missing:
        failures = [json.loads(line) for line in failures_file.read_text("utf-8").splitlines()]
    print_line(out)
    text = f"nemo-lfr: {counted(done['clips'], 'clip')}, {duration_text(3600 * done['hours'])}"
    if missing:
        lacks = f"it lacks {counted(missing, 'shard')} of other processes"
        text += f" by process {done['part']}; {out} is not complete yet: {lacks}"
    if failures and missing:
        echo_stderr(f"{text}; {counted(len(failures), 'clip')} failed; failures.jsonl will list them")
    elif failures:
        echo_stderr(f"{text}; {len(failures)} failed, see {failures_file}; {AFTER_REPAIR}")
    else:
        note(text)
    session = current()
    session.failures += [_failure(failure) for failure in failures]
    session.reported = len(session.failures)
    return {
        "output": str(out),
        "metadata": None if missing else str(out / "tokens.json"),
        "failures_file": None if missing else str(failures_file),
        "missing_shards": missing,
        "format": done["format"],
        "shards": done["shards"],
        "clips": done["clips"],
        "frames": done["frames"],
        "duration_s": round(3600 * done["hours"], 1),
    }


def _failure(record: dict[str, str]) -> Failure:
    """Convert a line of failures.jsonl to a `Failure`. Lines of earlier versions have no type."""
    return {"input": record["input"], "error": record["error"], "type": record.get("type", "NemoLfrError")}


@contextmanager
def watching() -> Iterator[Callable[[Any], None]]:
    """Show the progress on stderr: as a bar on a terminal, otherwise as occasional lines.

    Yields:
        A function to call with the current totals of the run.
    """
    started = time.monotonic()
    latest: Any = None

    def watch(totals: Any) -> None:
        nonlocal latest
        latest = totals
        begin_work()

    def summarize() -> str:
        if latest is None:
            return "planning, no shards"
        duration = duration_text(latest.samples / latest.sample_rate)
        speed = latest.computed_samples / latest.sample_rate / max(time.monotonic() - started, 1e-9)
        return f"{counted(latest.clips, 'clip')}, {duration}, {speed:.1f}x real time, {len(latest.failures)} failed"

    def describe() -> str:
        return summarize() if latest is None else f"{latest.done} of {counted(latest.shards, 'shard')} ({summarize()})"

    if current().quiet:
        yield watch
    elif not sys.stderr.isatty():
        with heartbeat(describe):
            yield watch
    else:
        with progress_bar("shards") as update:

            def show(totals: Any) -> None:
                watch(totals)
                update(total=totals.shards, completed=totals.done, text=summarize())

            yield show
