"""Validate integers and flags that callers pass."""

import operator
from typing import SupportsIndex

import numpy as np

from nemo_lfr.errors import NemoLfrError, quoted


def check_whole_number(
    value: object, name: str, least: int, most: int | None = None, error: type[NemoLfrError] = NemoLfrError
) -> int:
    """Check that an argument is an integer (from Python or numpy), and return it as an `int`.

    Args:
        value: the argument.
        name: its name, for messages.
        least: smallest valid value.
        most: largest valid value; None if there is no limit.
        error: type of the error to raise.

    Raises:
        NemoLfrError: of the type `error`, if the value is not an integer, or is out of range.
    """
    is_whole = isinstance(value, SupportsIndex) and not isinstance(value, bool | np.bool_)
    try:
        number = operator.index(value) if is_whole else None  # type: ignore[arg-type]
    except TypeError:  # an array of several values
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise error(f"{name} is {quoted(value)}; pass an integer {limits}.")
    return number


def check_flag(value: object, name: str) -> bool:
    """Check that an argument is True or False (from Python or numpy), and return it as a `bool`.

    Raises:
        NemoLfrError: if it is anything else, such as the text "no", which would count as true.
    """
    if not isinstance(value, bool | np.bool_):
        raise NemoLfrError(f"{name} is {quoted(value)}; pass True or False.")
    return bool(value)
