"""Marks all tests of this folder with `nemo`, and skips importing their files if they are deselected."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import FULL_SIZE, codec_config, write_nemo

FOLDER = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore this folder under `-m "not nemo"`, because importing NeMo takes longer than a tenth of the fast tier."""
    return True if "not nemo" in config.option.markexpr else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.nemo)


@pytest.fixture(scope="session")
def full_size(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Return a checkpoint of the released size, which takes 13 s of CPU time to make."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        write_nemo(folder / "model.nemo", codec_config(**FULL_SIZE))

    return once("full_size", fill) / "model.nemo"
