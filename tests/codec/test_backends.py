"""Tests of the registry of backends, and `testing.BACKEND_CHECKS` for every registered backend.

For a new backend, add a function that creates a model to `MODELS`. `export_smallest` creates the one of ONNX Runtime.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nemo_lfr
from nemo_lfr import Codec, NemoLfrError
from nemo_lfr.codec import backends
from nemo_lfr.testing import BACKEND_CHECKS
from tests import level_backend
from tests.models import codec_config, export_smallest, write_nemo
from tests.tiers import slow_if


def write_checkpoint(folder: Path) -> Path:
    return write_nemo(folder / "codec.nemo", codec_config("two_stages"))


def write_levels(folder: Path) -> Path:
    path = folder / "codec.levels"
    path.touch()
    return path


MODELS: dict[str, Callable[[Path], Path] | None] = {"torch": write_checkpoint, "onnx": None, "levels": write_levels}


@pytest.fixture(scope="module", autouse=True)
def levels() -> Iterator[None]:
    """Register a third-party backend."""
    backends.register("levels", level_backend.OPENER)
    yield
    backends.unregister("levels")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, once: Callable[..., Path]) -> Callable[[str], Path]:
    """Return a function that returns the model for a backend's name; models are cached, as an export takes 5 s."""

    def make(name: str) -> Path:
        write = MODELS[name]
        return write(tmp_path_factory.mktemp(name)) if write else once("onnx-smallest", export_smallest)

    return functools.cache(make)


every_model = slow_if(MODELS, ["onnx"])


@pytest.fixture(scope="module", params=every_model)
def codec(request: pytest.FixtureRequest, model_of: Callable[[str], Path]) -> Codec:
    """Return a codec for each backend."""
    return nemo_lfr.load(model_of(request.param), "cpu", backend=request.param)


def test_every_registered_backend_is_tested():
    assert set(backends.backend_names()) == set(MODELS)


@pytest.mark.parametrize("check", BACKEND_CHECKS, ids=lambda check: check.__name__)
def test_backend_passes_all_checks(codec: Codec, check: Callable[[Codec], None]) -> None:
    check(codec)


def test_codec_properties_equal_its_spec(codec):
    spec = codec.spec
    assert (codec.sample_rate, codec.samples_per_frame) == (spec.sample_rate, spec.samples_per_frame)
    assert (codec.levels, codec.num_codebooks, codec.precision) == (spec.levels, spec.num_codebooks, spec.precision)
    assert f"{codec.sample_rate} Hz" in repr(codec)


# The registry.


@pytest.mark.parametrize("name", every_model)
def test_load_finds_the_backend_by_the_kind_of_model(model_of, name):
    model = model_of(name)
    expected = type(nemo_lfr.load(model, "cpu", backend=name).backend)
    assert type(nemo_lfr.load(model, "cpu").backend) is expected


def test_models_of_another_kind_are_refused(tmp_path):
    with pytest.raises(NemoLfrError, match=r"'levels' needs a \.levels file, but the source is .*codec\.nemo; touch"):
        nemo_lfr.load(write_checkpoint(tmp_path), backend="levels")
    with pytest.raises(NemoLfrError, match=r"a \.levels file, which backend 'torch' cannot open; pass the checkpoint"):
        nemo_lfr.load(write_levels(tmp_path), backend="torch")
    with pytest.raises(NemoLfrError, match="backend 'levels' needs"):
        nemo_lfr.load(backend="levels")


def test_unknown_and_taken_names_are_refused():
    for name in ("tensorrt", ""):
        with pytest.raises(NemoLfrError, match=f"backend '{name}' is unknown; use 'torch', 'onnx' or 'levels'"):
            nemo_lfr.load(backend=name)
    with pytest.raises(NemoLfrError, match="backend 'torch' is already registered"):
        backends.register("torch", level_backend.open_levels)


def test_a_backend_may_open_checkpoints(tmp_path):
    opened: list[tuple[Path, str | None]] = []

    def open_levels(path, options):
        opened.append((path, options.device))
        return level_backend.LevelBackend(options.name)

    model = write_checkpoint(tmp_path)
    backends.register("of_checkpoints", open_levels)
    try:
        codec = nemo_lfr.load(model, "here", backend="of_checkpoints")
        nemo_lfr.load(backend="of_checkpoints")
    finally:
        backends.unregister("of_checkpoints")
    assert codec.name == str(model)
    assert opened[0] == (model, "here") and opened[1][0].name == "default.nemo"


def test_a_package_registers_a_backend_by_an_entry_point(tmp_path, monkeypatch):
    folder = tmp_path / "plugin-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[nemo_lfr.backends]\nplugged = plugin_of_a_test:OPENER\n")
    (tmp_path / "plugin_of_a_test.py").write_text("from tests.level_backend import OPENER\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = write_levels(tmp_path)
    try:
        assert "plugged" in backends.backend_names()
        assert type(nemo_lfr.load(model, backend="plugged").backend) is level_backend.LevelBackend
    finally:
        backends.unregister("plugged")
        sys.modules.pop("plugin_of_a_test", None)
