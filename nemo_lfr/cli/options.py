"""Option types, and options that several commands share."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_lfr.cli.terminal import echo_stderr
from nemo_lfr.codec.cpu.malloc import configure_malloc
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.locate import expand_home

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec


class Number(click.FloatRange):
    """Float option in a range; NaN is an error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value as a float in the range."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is not a number.", param, ctx)
        return number


class UserPath(click.Path):
    """Path option with a `Path` as its value.

    `~` is expanded, since a shell does not expand it in quotes or in `--out=~/tokens`. An empty path, which an unset
    shell variable yields, is an error.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value as a `Path` with `~` expanded."""
        try:
            return super().convert(expand_home(value), param, ctx)
        except NemoLfrError as error:
            self.fail(str(error).rstrip("."), param, ctx)


def open_codec(model: str | None, device: str | None, precision: str) -> "Codec[Any]":
    """Load the codec that the options select; print a note on stderr if it is the bundled one.

    Args:
        model: checkpoint, folder of ONNX files or Hub id; None for the bundled codec.
        device: device of the network; None for the default.
        precision: see `nemo_lfr.load`.
    """
    from nemo_lfr.pretrained import LFR, load

    configure_malloc()
    if model is None:
        echo_stderr(f"using the bundled codec (PESQ 1.67); for NVIDIA's weights (non-commercial) pass --model {LFR}")
    return load(model, device, precision)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --model, --device, --precision and --json to a command."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the results as JSON."),
        click.option(
            "--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", show_default=True
        ),
        click.option("--device", help="Device: cpu, cuda, cuda:1 ... (default: a GPU if there is one).", default=None),
        click.option(
            "--model",
            help="Checkpoint (.nemo or .ckpt), folder of ONNX files, or Hub id (default: the bundled codec).",
        ),
    ):
        command = option(command)
    return command


def entropy_model_option(text: str) -> Callable[..., Any]:
    """Return the option --entropy-model with a help text."""
    return click.option("--entropy-model", type=UserPath(dir_okay=False), help=text)


lookahead_option = click.option(
    "--lookahead",
    type=click.IntRange(min=0),
    help="Frames of right context for pipes (default: all that a result depends on).",
)
