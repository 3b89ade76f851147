"""Fixtures, and one thread for tiny tensors."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: without a GPU its kernels run in Python.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nemo_lfr.codec.codec import Codec
from tests.models import KINDS, build_codec, cached_codec, synthesize

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give, and more still on a shared machine


@pytest.fixture
def one_thread():
    """Tiny models run fastest on one thread, and much faster where the cores are shared."""
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
    """(seconds, seed) -> synthetic speech, float32 [T_audio] at 22.05 kHz."""
    return synthesize


@pytest.fixture(scope="session")
def make_codec():
    """(kind, **changes to the config) -> a tiny codec."""
    return build_codec


@pytest.fixture(params=list(KINDS))
def codec(request: pytest.FixtureRequest) -> Codec:
    """A tiny codec of each kind."""
    return cached_codec(request.param)


@pytest.fixture
def small() -> Codec:
    """The released layout with few channels."""
    return cached_codec("symmetric")
