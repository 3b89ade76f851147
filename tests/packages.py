"""Packages that a test module needs, found without importing them in every test process."""

from importlib.util import find_spec

import pytest


def require(*names: str, reason: str) -> None:
    """Skip the calling module if a package is missing; unlike `pytest.importorskip`, import nothing.

    Args:
        names: top-level packages.
        reason: how to install them.
    """
    for name in names:
        if find_spec(name) is None:
            pytest.skip(f"{name} is missing: {reason}", allow_module_level=True)
