"""The kinds of codecs as parameters of a test."""

import pytest

from tests.models import KINDS

# The slow ones differ from "symmetric" in one layer or one argument.
ALL_KINDS = [
    pytest.param(kind, marks=pytest.mark.slow if kind in ("single", "zeros", "clamp") else ()) for kind in KINDS
]
