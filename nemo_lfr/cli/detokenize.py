"""`nemo-lfr detokenize`."""

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
@click.option("--model", help="The codec that made the tokens; the one inside the package if not given.")
@click.option("--device", help="cpu, cuda ...; a GPU if there is one.")
@click.option("--limit", type=click.IntRange(min=1), help="Utterances; all if not given.")
@click.option("--overwrite", is_flag=True, help="Decode again what is there.")
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
