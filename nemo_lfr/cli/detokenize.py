"""Command `nemo-lfr detokenize`."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from nemo_lfr.cli.command import Command
from nemo_lfr.cli.options import (
    UserPath,
    count_option,
    device_option,
    model_option,
    overwrite_option,
    precision_option,
)
from nemo_lfr.cli.progress import progress
from nemo_lfr.cli.results import DetokenizeResult
from nemo_lfr.cli.session import current, fail, note, print_line
from nemo_lfr.errors import NemoLfrError, counted
from nemo_lfr.io.folders import WRITABLE_FORMATS


@click.command(cls=Command, result=DetokenizeResult, short_help="Decode a tokenized corpus into audio files.")
@click.argument("tokens", type=UserPath())
@click.option("--out", type=UserPath(file_okay=False), required=True, help="Folder for the audio.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(WRITABLE_FORMATS),
    default=WRITABLE_FORMATS[0],
    show_default=True,
    help="Audio format.",
)
@overwrite_option
@count_option("--limit", "Maximum number of utterances to decode (default: all).")
@click.option("--verify", is_flag=True, help="Check the token files by their hashes, not only by their sizes.")
@model_option(
    "the one that made the tokens, as a checkpoint (.nemo or .ckpt), folder of safetensors or ONNX files, or Hub id"
)
@device_option()
@precision_option
def detokenize(tokens: Path, out: Path, kind: str, overwrite: bool, **options: Any) -> dict[str, Any]:
    """Decode the output folder of `tokenize` to audio files.

    Existing files of the right length are kept unless --overwrite is passed; their number is printed. Utterances
    that cannot be decoded are listed on stderr; the exit code is then 1.
    """
    from nemo_lfr.corpus.decode import decode_folder

    files: list[str] = []
    kept: list[Path] = []
    total = 0
    advance: Callable[[str], None]
    with ExitStack() as stack:

        def start(count: int) -> None:
            nonlocal total, advance
            total, advance = count, stack.enter_context(progress(count, "utterance", prints_lines=True))

        results = decode_folder(tokens, out, kind, overwrite=overwrite, on_start=start, on_kept=kept.append, **options)
        for result in results:
            if isinstance(result, NemoLfrError):
                fail(result.source or tokens, result)
            else:
                files.append(str(result))
                print_line(result)
            advance("")
    current().report_failures(total, failed=total - len(files))  # one failure may affect several utterances
    if kept:
        note(
            f"{out}: {counted(len(kept), 'file')} existed and {'was' if len(kept) == 1 else 'were'} kept; to decode "
            "again, pass --overwrite"
        )
    return {"files": files, "kept": len(kept)}
