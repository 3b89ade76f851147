"""Fixtures of all tests; PyTorch runs on one thread."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Set before Triton is imported: without a GPU, its kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nemo_lfr.codec.codec import Codec
from tests.models import KINDS, build_codec, cached_codec, synthesize

torch.set_num_threads(1)  # for tiny tensors, the overhead of threads exceeds their gain


@pytest.fixture
def one_thread():
    """Run PyTorch on one thread, which is fastest for tiny models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread_unless_slow(request: pytest.FixtureRequest):
    if request.node.get_closest_marker("slow") is None:
        request.getfixturevalue("one_thread")


@pytest.fixture(scope="session")
def speech():
    """Return `synthesize(seconds, seed)`, which makes float32 [T_audio] at 22.05 kHz."""
    return synthesize


@pytest.fixture(scope="session")
def make_codec():
    """Return `build_codec(kind, **changes)`, which makes a tiny codec."""
    return build_codec


@pytest.fixture(params=list(KINDS))
def codec(request: pytest.FixtureRequest) -> Codec:
    """Return a tiny codec of each kind."""
    return cached_codec(request.param)


@pytest.fixture
def small() -> Codec:
    """Return a codec of the released layout with few channels."""
    return cached_codec("symmetric")
