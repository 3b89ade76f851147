"""Option types, and options that several commands share."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from nemo_lfr.bundled import bundled_quality
from nemo_lfr.codec.cpu.malloc import configure_malloc
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.io.locate import expand_home

if TYPE_CHECKING:
    from nemo_lfr.codec.backend import Operation
    from nemo_lfr.codec.codec import Codec

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


class WholeNumber(click.IntRange):
    """Type of an option whose value is an integer whose absolute value is below 2^63."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the value to an int in the range of this type; refuse absolute values of 2^63 or more."""
        number = super().convert(value, param, ctx)
        if abs(number) >= 2**63:
            self.fail(f"{shorten(str(value))} is too large; pass a number below 2^63.", param, ctx)
        return number


class Number(click.FloatRange):
    """Type of an option whose value is a float in a range. NaN and infinity are rejected."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the value to a float in the range of this type; refuse NaN and infinity."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a valid number.", param, ctx)
        return number


class UserPath(click.Path):
    """Type of an option whose value is a `Path`.

    `~` is expanded, because shells do not expand it in `--out=~/tokens`. An empty path, "-" and a broken link in the
    path of a folder are errors.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value as a `Path` with `~` expanded."""
        if value == "-":
            self.fail(
                "- stands for stdin or stdout, and is only allowed as an argument of encode and decode, as in "
                "`encode FILE -`; pass a path (./- for a file that is named -)",
                param,
                ctx,
            )
        try:
            path: Any = super().convert(expand_home(value), param, ctx)
        except NemoLfrError as error:
            self.fail(str(error).rstrip("."), param, ctx)
        for folder in () if self.file_okay else (path, *path.parents):
            if _is_dangling(folder):
                self.fail(
                    f"{folder} is a link to a missing folder; create that folder, or remove the link", param, ctx
                )
        return path


def _is_dangling(path: Path) -> bool:
    """Return whether a path is a link to a file or folder that does not exist."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return os.path.islink(path)
    except OSError:  # such as a loop of links, which is reported when the path is used
        return False
    return False


class PathText(click.ParamType):  # type: ignore[type-arg]  # generic in recent releases of click
    """Type of an argument that may be a path, a pattern, a Hub id or "-". Shell completion treats it as a path.

    Args:
        name: placeholder for the value in help texts.
    """

    def __init__(self, name: str = "path") -> None:
        self.name = name

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete file names."""
        return [CompletionItem(incomplete, type="file")]


def open_codec(
    model: str | None, device: str | None, precision: str, operations: Sequence["Operation"] = ()
) -> "Codec[Any]":
    """Load the codec that the options select.

    Args:
        model: checkpoint, folder of ONNX files or Hub id; None for the bundled codec.
        device: device to run on; None for the default.
        precision: as in `nemo_lfr.load`.
        operations: operations whose weights are loaded now ("encode", "decode"), so that an incomplete folder of ONNX
            files is refused before the work begins.

    Raises:
        NemoLfrError: if `nemo_lfr.load` raises it, if the codec does not support one of `operations`, or if `model` is
            an audio file, a token file or an entropy model.
    """
    from nemo_lfr.cli.identify import refuse_other_kind
    from nemo_lfr.pretrained import load

    if model:
        refuse_other_kind(expand_home(model), "a checkpoint")
    configure_malloc()
    codec = load(model, device, precision)
    for operation in operations:
        codec.backend.load(operation)
    return codec


def model_option(
    accepted: str = "checkpoint (.nemo or .ckpt), folder of safetensors or ONNX files, or Hub id",
) -> Decorator:
    """Return the option --model.

    Args:
        accepted: what the option accepts, for its help text.
    """
    text = f"Codec: {accepted} (default: the bundled codec, {bundled_quality()})."
    return click.option("--model", type=PathText("model"), help=text)


def device_option(default: str = "a GPU if there is one, else the CPU") -> Decorator:
    """Return the option --device."""
    return click.option("--device", metavar="DEVICE", help=f"Device: cpu, cuda, cuda:1 ... (default: {default}).")


precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Numerical precision of the encoder and decoder.",
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --model, --device and --precision to a command."""
    return model_option()(device_option()(precision_option(command)))


def entropy_model_option(text: str) -> Decorator:
    """Return the option --entropy-model with a help text."""
    return click.option("--entropy-model", type=UserPath(dir_okay=False), help=text)


def count_option(name: str, text: str, default: int | None = None, low: int = 1, **options: Any) -> Decorator:
    """Return an option whose value is a whole number.

    Args:
        name: name of the option, such as "--workers".
        text: help text. If `default` is None, the text must say what happens without the option.
        default: default value, which is appended to the help text; None for no value.
        low: smallest value.
        options: other arguments of `click.option`.
    """
    kind = WholeNumber(min=low)
    return click.option(
        name, type=kind, metavar="N", default=default, show_default=default is not None, help=text,
        **options,
    )  # fmt: skip


def seconds_option(name: str, text: str, default: float | None = None, low: float = 0) -> Decorator:
    """Return an option whose value is a number of seconds.

    Args:
        name: name of the option, such as "--duration".
        text: help text. If `default` is None, the text must say what happens without the option.
        default: default value, which is appended to the help text; None for no value.
        low: smallest value.
    """
    return click.option(
        name,
        type=Number(min=low),
        metavar="SECONDS",
        default=default,
        show_default=default is not None,
        help=text,
    )


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace existing files.")
skip_existing_option = click.option(
    "--skip-existing", is_flag=True, help="Keep existing outputs and process the other inputs."
)
lookahead_option = count_option(
    "--lookahead",
    "For pipes: number of later frames that must arrive before a frame is output. Fewer frames reduce latency and "
    "quality (default: the codec's lookahead).",
    low=0,
)
