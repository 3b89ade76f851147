"""Command `nemo-lfr decode`."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_lfr.cli.command import Command
from nemo_lfr.cli.files import FileTask, run_tasks, task_result, tasks_to_run
from nemo_lfr.cli.identify import TOKEN_SUFFIX
from nemo_lfr.cli.inputs import check_input
from nemo_lfr.cli.interrupts import watch_signals
from nemo_lfr.cli.options import (
    PathText,
    UserPath,
    entropy_model_option,
    lookahead_option,
    model_options,
    open_codec,
    overwrite_option,
    seconds_option,
    skip_existing_option,
)
from nemo_lfr.cli.results import FileFigures, FilesResult
from nemo_lfr.cli.session import begin_work
from nemo_lfr.cli.stdio import check_pipe, spooled
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.folders import WRITABLE_FORMATS, WRITABLE_SUFFIXES

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec


@click.command(cls=Command, result=FilesResult, short_help="Decode .lfr token files into audio.")
@click.argument("inputs", nargs=-1, required=True, type=PathText())
@click.option(
    "--out",
    type=UserPath(),
    help="Folder for the audio, or NAME.wav or NAME.flac for one input (default: beside the input).",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(WRITABLE_FORMATS),
    help="Audio format (default: the suffix of --out, or wav).",
)
@overwrite_option
@skip_existing_option
@seconds_option("--start", "Start of the audio to decode, in seconds.", 0.0)
@seconds_option("--duration", "Duration of the audio to decode, in seconds (default: to the end).")
@click.option("--recover", is_flag=True, help="Decode the intact part of damaged or unfinished files.")
@entropy_model_option(
    "Entropy model (.lfrm) for compressed files (default: the bundled codec's model, or HASH.lfrm in the folder of "
    "the token file or in a folder above it; `nemo-lfr info` prints the HASH). Files that were compressed with "
    "a different model still use the default."
)
@lookahead_option
@model_options
def decode(
    inputs: tuple[str, ...],
    out: Path | None,
    kind: str | None,
    start: float,
    duration: float | None,
    recover: bool,
    overwrite: bool,
    skip_existing: bool,
    entropy_model: Path | None,
    lookahead: int | None,
    **options: Any,
) -> dict[str, Any] | None:
    """Decode .lfr token files, folders or globs into audio of the original length.

    `decode - -` reads a token file from stdin and writes audio to stdout; WAV is written as tokens arrive.
    Ctrl-C ends the input from a pipe, and the audio is completed; a second Ctrl-C stops at once.
    `decode FILE -` writes the audio of FILE to stdout.
    """
    wanted = {"start": start, "duration": duration, "recover": recover, "entropy_model": entropy_model}
    if "-" in inputs:
        check_pipe(inputs, out)
        if inputs[0] != "-":
            check_input(Path(inputs[0]), {TOKEN_SUFFIX}, is_only=True)
        kind = kind or "wav"
        streams = inputs[0] == "-" and kind == "wav" and not (start or duration is not None or recover)
        if lookahead is not None and not streams:
            raise NemoLfrError(
                "--lookahead only works when a whole token file is decoded from stdin to WAV; remove --lookahead, or "
                "run `nemo-lfr decode - -` without --start, --duration, --recover and --format."
            )
        if streams:
            source: Any = sys.stdin.buffer
            with watch_signals(source):
                from nemo_lfr.cli.pipes import decode_pipe

                codec = open_codec(options["model"], options["device"], options["precision"], ["decode"])
                decode_pipe(codec, source, sys.stdout.buffer, lookahead, entropy_model)
            return None
        with spooled(inputs[0], TOKEN_SUFFIX, f".{kind}") as task:
            if inputs[0] == "-":
                check_input(task.source, {TOKEN_SUFFIX}, is_only=True)
            codec = open_codec(options["model"], options["device"], options["precision"], ["decode"])
            begin_work()
            decode_task(task, codec, **wanted)
        return None
    if lookahead is not None:
        raise NemoLfrError(
            "--lookahead only works with pipes (decode - -); files are always decoded with the full lookahead. Remove "
            "--lookahead."
        )
    possible = WRITABLE_SUFFIXES if kind is None else (f".{kind}",)
    kind = output_format(kind, out)
    tasks = tasks_to_run(inputs, out, {TOKEN_SUFFIX}, f".{kind}", overwrite, skip_existing, possible)
    if not tasks:
        return {"files": []}
    codec = open_codec(options["model"], options["device"], options["precision"], ["decode"])

    def work(batch: list[FileTask]) -> Iterator[FileFigures]:
        for task in batch:
            yield decode_task(task, codec, overwrite=overwrite or task.replaces_link, **wanted)

    return run_tasks(tasks, work, 1)


def output_format(kind: str | None, out: Path | None) -> str:
    """Return the audio format that --format or the suffix of --out selects.

    Args:
        kind: value of --format, if it was passed.
        out: value of --out, if it was passed.

    Returns:
        One of `WRITABLE_FORMATS`; WAV if neither option selects a format.

    Raises:
        NemoLfrError: if the two options name different formats.
    """
    suffix = "" if out is None or out.is_dir() else out.suffix[1:].lower()
    if suffix not in WRITABLE_FORMATS:
        return kind or WRITABLE_FORMATS[0]
    if kind not in (None, suffix):
        raise NemoLfrError(f"--out {out} and --format {kind} name different formats; remove one of them.")
    return suffix


def decode_task(task: FileTask, codec: "Codec[Any]", **options: Any) -> FileFigures:
    """Decode one token file; `options` are keyword arguments of `Codec.decode_file`."""
    started = time.perf_counter()
    num_samples = codec.decode_file(task.source, task.target, **options)
    return task_result(task, codec, num_samples, task.source, time.perf_counter() - started)
