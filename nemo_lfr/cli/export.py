"""Command group `nemo-lfr export`."""

from pathlib import Path
from typing import Any

import click

from nemo_lfr.cli.command import Command, Group
from nemo_lfr.cli.options import UserPath, model_option, open_codec, overwrite_option
from nemo_lfr.cli.results import ExportResult
from nemo_lfr.cli.session import print_line
from nemo_lfr.web.runtime import DEFAULT, VERSION


@click.group(cls=Group, short_help="Export a codec for another runtime.")
def export() -> None:
    """Export a codec for another runtime."""


@export.command("safetensors", cls=Command, result=ExportResult, short_help="Export a codec to a safetensors folder.")
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    required=True,
    help="Folder for config.json, model.safetensors and preprocessor_config.json.",
)
@model_option("checkpoint (.nemo or .ckpt), folder of safetensors, or Hub id")
@overwrite_option
def export_to_safetensors(out: Path, model: str | None, overwrite: bool) -> dict[str, Any]:
    """Write config.json, model.safetensors and preprocessor_config.json.

    The tensors have NeMo's names. Pass the folder as --model to other commands, or to from_pretrained in transformers.
    """
    from nemo_lfr.checkpoint.folder import export_safetensors
    from nemo_lfr.io.hub import find_checkpoint

    open_codec(model, "cpu", "fp32")  # validates the model, and logs a message for the bundled codec
    paths = export_safetensors(find_checkpoint(model), out, overwrite=overwrite)
    return _printed(paths)


@export.command("onnx", cls=Command, result=ExportResult, short_help="Export a codec to ONNX files.")
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    required=True,
    help="Folder for encoder.onnx and decoder.onnx.",
)
@model_option("checkpoint (.nemo or .ckpt), folder of safetensors, or Hub id")
@overwrite_option
def export_to_onnx(out: Path, model: str | None, overwrite: bool) -> dict[str, Any]:
    """Write encoder.onnx, decoder.onnx and codec.json, for audio of any length and batches of any size.

    Pass the folder as --model to other commands, except serve and export.
    """
    from nemo_lfr.codec.onnx.export import export_onnx

    codec = open_codec(model, "cpu", "fp32")
    paths = export_onnx(codec, out, overwrite=overwrite)
    return _printed(paths)


@export.command("web", cls=Command, result=ExportResult, short_help="Export a codec as a static web site.")
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    required=True,
    help="Folder for index.html and the other files of the site.",
)
@click.option(
    "--onnxruntime-web",
    type=UserPath(),
    default=DEFAULT,
    show_default=True,
    metavar="PATH",
    help=f"Folder of the npm package onnxruntime-web {VERSION}, or the .tgz file from npm pack.",
)
@model_option("checkpoint (.nemo or .ckpt), folder of safetensors, or Hub id")
@overwrite_option
def export_to_web(out: Path, onnxruntime_web: Path, model: str | None, overwrite: bool) -> dict[str, Any]:
    """Write a static site that encodes and decodes in the browser.

    The site consists of the web page of nemo-lfr serve, the ONNX files of the codec, and ONNX Runtime. This command
    downloads nothing, so install onnxruntime-web with npm first.
    """
    from nemo_lfr.web.runtime import read_runtime
    from nemo_lfr.web.site import export_site

    read_runtime(onnxruntime_web)  # checked first, because opening the model takes longer
    codec = open_codec(model, "cpu", "fp32")
    name = codec.name if model is None else Path(model).name  # a public site should not show the path on this machine
    return _printed(export_site(codec, out, onnxruntime_web, name=name, overwrite=overwrite))


@export.command("golden", cls=Command, result=ExportResult, short_help="Export every layer's output as test data.")
@click.option("--out", type=UserPath(dir_okay=False), required=True, help="File to write, NAME.safetensors.")
@model_option("checkpoint (.nemo or .ckpt), folder of safetensors, or Hub id")
@overwrite_option
def export_golden_vectors(out: Path, model: str | None, overwrite: bool) -> dict[str, Any]:
    """Write a file with a short audio signal, its tokens, the decoded audio and the output of every layer.

    Use it to test a port of the codec to another runtime: the port should give the same values, up to rounding errors.
    """
    from nemo_lfr.codec.golden import export_golden

    return _printed([export_golden(open_codec(model, "cpu", "fp32"), out, overwrite=overwrite)])


def _printed(paths: list[Path]) -> dict[str, Any]:
    """Print the paths of the exported files, and return them as the command's result."""
    for path in paths:
        print_line(path)
    return {"files": [str(path) for path in paths]}
