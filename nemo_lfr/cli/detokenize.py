"""Command `nemo-lfr detokenize`."""

import sys
from pathlib import Path
from typing import Any

import click

from nemo_lfr.cli.options import UserPath
from nemo_lfr.cli.terminal import echo_stderr, echo_stdout
from nemo_lfr.errors import NemoLfrError, shorten


@click.command(short_help="Decode a tokenized corpus into audio files.")
@click.argument("tokens", type=UserPath())
@click.option("--out", type=UserPath(file_okay=False), required=True, help="Folder for the audio.")
@click.option("--format", "kind", type=click.Choice(["wav", "flac"]), default="wav", show_default=True)
@click.option("--model", help="Codec of the tokens: checkpoint or Hub id (default: the bundled codec).")
@click.option("--device", help="Device: cpu, cuda ... (default: a GPU if there is one).")
@click.option("--limit", type=click.IntRange(min=1), help="Number of utterances to decode (default: all).")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option("--verify", is_flag=True, help="Compare hashes of the token files, not only their sizes.")
def detokenize(tokens: Path, out: Path, kind: str, overwrite: bool, **options: Any) -> None:
    """Decode a folder that `tokenize` wrote into audio files; existing files are skipped.

    Utterances that cannot be decoded are listed on stderr; the exit code is then 1.
    """
    from nemo_lfr.corpus.decode import decode_folder

    decoded = failed = 0
    for result in decode_folder(tokens, out, kind, overwrite=overwrite, **options):
        if isinstance(result, NemoLfrError):
            failed += 1
            echo_stderr(f"nemo-lfr: {shorten(result, 500)}")
        else:
            decoded += 1
            echo_stdout(result)
    if failed:
        echo_stderr(f"nemo-lfr: {decoded} utterances, {failed} failed")
        sys.exit(1)
