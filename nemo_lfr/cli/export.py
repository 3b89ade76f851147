"""Command group `nemo-lfr export`."""

from pathlib import Path

import click

from nemo_lfr.cli.options import UserPath, open_codec
from nemo_lfr.cli.terminal import echo_stdout


@click.group(short_help="Export a codec to another runtime.")
def export() -> None:
    """Write a codec for another runtime."""


@export.command("onnx", short_help="Export a codec to ONNX files.")
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    required=True,
    help="Folder for encoder.onnx and decoder.onnx.",
)
@click.option("--model", help="Checkpoint (.nemo or .ckpt) or Hub id (default: the bundled codec).")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
def export_to_onnx(out: Path, model: str | None, overwrite: bool) -> None:
    """Write encoder.onnx and decoder.onnx, for any length and batch; use the folder as --model of other commands."""
    from nemo_lfr.codec.onnx.export import export_onnx

    for path in export_onnx(open_codec(model, "cpu", "fp32"), out, overwrite=overwrite):
        echo_stdout(path)
