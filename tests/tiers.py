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


# All kinds of codecs. The slow ones combine what the fast ones have, or differ from "symmetric" in one layer.
ALL_KINDS = slow_except(KINDS, "symmetric", "causal", "two_stages")
