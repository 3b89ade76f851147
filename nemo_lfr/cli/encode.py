"""Command `nemo-lfr encode`."""

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
    count_option,
    entropy_model_option,
    lookahead_option,
    model_options,
    open_codec,
    overwrite_option,
    skip_existing_option,
)
from nemo_lfr.cli.results import FileFigures, FilesResult
from nemo_lfr.cli.session import note
from nemo_lfr.cli.stdio import check_pipe
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.folders import AUDIO_SUFFIXES

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec
    from nemo_lfr.io.entropy.model import EntropyModel

# Files up to this duration are batched; longer ones are encoded one at a time in bounded memory.
BATCH_SECONDS = 60


@click.command(cls=Command, result=FilesResult, short_help="Encode audio files into .lfr token files.")
@click.argument("inputs", nargs=-1, required=True, type=PathText())
@click.option(
    "--out",
    type=UserPath(),
    help="Folder for the token files, or NAME.lfr for one input (default: beside the input).",
)
@overwrite_option
@skip_existing_option
@count_option("--batch-size", "Number of files to encode together.", 8)
@count_option("--block", "For pipes: number of frames to encode at a time.", 8)
@click.option("--compress", is_flag=True, help="Compress the token files losslessly, to about 75 % of their size.")
@entropy_model_option("Entropy model (.lfrm); implies --compress (default: the bundled codec's model).")
@lookahead_option
@model_options
def encode(
    inputs: tuple[str, ...],
    out: Path | None,
    batch_size: int,
    overwrite: bool,
    skip_existing: bool,
    block: int,
    compress: bool,
    entropy_model: Path | None,
    lookahead: int | None,
    **options: Any,
) -> dict[str, Any] | None:
    """Encode audio files, folders or globs into .lfr token files.

    `encode - -` reads audio from stdin and writes a token file to stdout; WAV is encoded as it arrives.
    Ctrl-C ends the input from a pipe, and the token file is completed; a second Ctrl-C stops at once.
    `encode FILE -` encodes FILE and writes the token file to stdout.
    """
    if "-" in inputs:
        check_pipe(inputs, out)
        if inputs[0] != "-":
            check_input(Path(inputs[0]), AUDIO_SUFFIXES, is_only=True)
        source: Any = sys.stdin.buffer if inputs[0] == "-" else Path(inputs[0])
        with watch_signals(None if isinstance(source, Path) else source) as signals:
            from nemo_lfr.cli.pipes import encode_pipe
            from nemo_lfr.io.entropy.find import model_to_write

            codec = open_codec(options["model"], options["device"], options["precision"], ["encode"])
            model = model_to_write(codec, compress, entropy_model)
            reader = encode_pipe(codec, source, sys.stdout.buffer, block, signals, lookahead, model)
        if reader.channels > 1:
            note(f"{reader.name}: {reader.channels} channels mixed to mono")
        if not reader.samples_read:
            note(f"{reader.name}: the input contains no samples")
        return None
    if lookahead is not None:
        raise NemoLfrError(
            "--lookahead only works if the token file is written to stdout (encode - - or encode FILE -); other files "
            "are always encoded with the full lookahead. Remove --lookahead."
        )
    from nemo_lfr.io.entropy.find import model_to_write

    tasks = tasks_to_run(inputs, out, AUDIO_SUFFIXES, TOKEN_SUFFIX, overwrite, skip_existing)
    if not tasks:
        return {"files": []}
    codec = open_codec(options["model"], options["device"], options["precision"], ["encode"])
    model = model_to_write(codec, compress, entropy_model)
    return run_tasks(tasks, lambda batch: encode_tasks(batch, codec, overwrite, model), batch_size)


def encode_tasks(
    tasks: list[FileTask], codec: "Codec[Any]", overwrite: bool, model: "EntropyModel | None" = None
) -> Iterator[FileFigures]:
    """Encode short files in one batch, and longer files one at a time in bounded memory.

    Args:
        tasks: files to encode.
        codec: codec to use.
        overwrite: replace existing files.
        model: entropy model that compresses the token files; None for no compression.

    Yields:
        A description of each file for --json, in the order of `tasks`, as soon as its token file is complete.
    """
    import numpy as np

    from nemo_lfr.codec.arrays import to_numpy
    from nemo_lfr.io.audio import AudioReader
    from nemo_lfr.io.token_file import TokenWriter

    started = time.perf_counter()
    clips: dict[FileTask, Any] = {}
    for task in tasks:
        with AudioReader(task.source, codec.sample_rate) as reader:
            if reader.channels > 1:
                note(f"{task.source}: {reader.channels} channels mixed to mono")
            if len(tasks) > 1 and reader.duration <= BATCH_SECONDS:
                clips[task] = np.concatenate([np.zeros(0, np.float32), *reader.blocks()])
    tokens: dict[FileTask, Any] = {}
    if clips:
        audio = np.zeros((len(clips), max(map(len, clips.values()))), np.float32)
        for row, clip in zip(audio, clips.values(), strict=True):
            row[: len(clip)] = clip
        batch, lengths = codec.encode(audio, [len(clip) for clip in clips.values()], codec.sample_rate)
        for task, row, length in zip(clips, to_numpy(batch), lengths.tolist(), strict=True):
            tokens[task] = row[:, :length]
    for task in tasks:
        replace = overwrite or task.replaces_link
        if task in tokens:
            with TokenWriter.for_codec(task.target, codec, replace, model) as writer:
                writer.write(tokens[task])
                writer.finish(len(clips[task]))
            num_samples = len(clips[task])
        else:
            num_samples = codec.encode_file(task.source, task.target, overwrite=replace, entropy_model=model)
        yield task_result(task, codec, num_samples, task.target, (time.perf_counter() - started) / len(tasks))
