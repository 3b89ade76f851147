"""Types of the command line's options."""

import math
from pathlib import Path
from typing import Any

import click

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.locate import expand_home


class Number(click.FloatRange):
    """A number in a range; NaN, which compares with no limit, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is not a number.", param, ctx)
        return number


class UserPath(click.Path):
    """A path, given as a `Path`; its `~` is expanded, which a shell leaves alone in quotes and in `--out=~/tokens`.

    An empty one, as of a variable that is not set, is refused.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(expand_home(value), param, ctx)
        except NemoLfrError as error:
            self.fail(str(error).rstrip("."), param, ctx)
