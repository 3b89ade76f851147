"""Marks for parameters of tests."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from tests.models import KINDS


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Return values as parameters, all marked slow except for those in `fast`."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_if(values: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Return values as parameters, of which some are marked slow."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values]


def slow_after(count: int, rows: Iterable[Any]) -> list[Any]:
    """Return the rows of a table of parameters, of which all after the first `count` are marked slow.

    A tuple holds the values of several arguments. A table with at most `count` rows is an error, since the call would
    mark none of them.
    """
    rows, marked = list(rows), []
    assert count < len(rows), f"none of {len(rows)} rows would be slow"
    for number, row in enumerate(rows):
        if isinstance(row, tuple):
            parameters = row if hasattr(row, "marks") else pytest.param(*row)
        else:
            parameters = pytest.param(row)
        slow = [pytest.mark.slow] if number >= count else []
        marked.append(pytest.param(*parameters.values, marks=[*parameters.marks, *slow], id=parameters.id))
    return marked


# All kinds of codecs. The slow ones combine what the fast ones have, or differ from them in the number of stages or in
# one layer.
ALL_KINDS = slow_except(KINDS, "causal", "two_stages")
