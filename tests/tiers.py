"""Marks for parameters of tests."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

import pytest

from tests.models import KINDS


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Return values as parameters, all marked slow except for those in `fast`."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_if(values: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Return values as parameters, of which some are marked slow."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values]


def slow_after(count: int, rows: Iterable[Any], kind: Callable[[Any], Hashable] = lambda row: None) -> list[Any]:
    """Return the rows of a table of parameters, of which all after the first `count` of each kind are marked slow.

    Args:
        count: number of fast rows of each kind.
        rows: values of the parameters. A tuple holds the values of several arguments. Rows of which none would be slow
            are an error.
        kind: function that returns the kind of a row; by default, all rows are of one kind.
    """
    marked: list[Any] = []
    seen: Counter[Hashable] = Counter()
    for row in rows:
        seen[kind(row)] += 1
        if isinstance(row, tuple):
            parameters = row if hasattr(row, "marks") else pytest.param(*row)
        else:
            parameters = pytest.param(row)
        slow = [pytest.mark.slow] if seen[kind(row)] > count else []
        marked.append(pytest.param(*parameters.values, marks=[*parameters.marks, *slow], id=parameters.id))
    assert any(number > count for number in seen.values()), f"none of {len(marked)} rows would be slow"
    return marked


# All kinds of codecs. The slow ones combine what the fast ones have, or differ from them in the number of stages or in
# one layer.
ALL_KINDS = slow_except(KINDS, "causal", "two_stages")
