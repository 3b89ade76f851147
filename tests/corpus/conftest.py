"""Fixtures of the tests of corpora."""

from pathlib import Path

import pytest

from tests.corpora import write_codec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the checkpoint of the fastest codec."""
    return write_codec(tmp_path_factory.mktemp("model") / "tiny.nemo", "two_stages")
