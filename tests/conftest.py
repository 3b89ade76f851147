"""Fixtures of all tests; PyTorch runs on one thread."""

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch

# Tests start many processes that import librosa, and numba's cache breaks if two of them compile into it at the same
# time. So the tests have a cache of their own, which pytest fills before any worker starts.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "numba"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported

if not torch.cuda.is_available():
    # Set before Triton is imported: without a GPU, its kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nemo_lfr.codec.codec import Codec
from tests.models import build_codec, cached_codec, synthesize
from tests.tiers import ALL_KINDS

MEMORY = Path("/dev/shm")


def pytest_configure(config: pytest.Config) -> None:
    """Compile librosa's kernels once, and choose a folder for files, in the process that starts the workers."""
    if hasattr(config, "workerinput"):
        return
    # Fast tests flush thousands of small files, which takes 10 ms each on a disk.
    if "not slow" in config.option.markexpr and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    if not find_spec("librosa"):
        return
    compiled = Path(os.environ["NUMBA_CACHE_DIR"], "compiled")
    if not compiled.exists():
        code = "import librosa.core.audio, numpy\nfrom nemo_lfr.evaluation import pitch\n"
        code += "pitch.estimate_pitch(numpy.zeros(8000, 'f'))"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
        compiled.touch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names of tests that differ between processes: pytest-xdist needs equal names in all workers.

    Raises:
        pytest.UsageError: If a name contains an address in memory or a path of this machine.
    """
    for item in items:
        if re.search(r"\bat 0x[0-9a-f]+", item.nodeid) or sys.prefix in item.nodeid:
            raise pytest.UsageError(f"the name of this test differs between processes: {item.nodeid}; give it an id")


def pytest_collection_finish() -> None:
    """Make garbage collections cheaper; they would otherwise take 10% of the time.

    Objects of imported modules and collected tests live until the end, so no collection needs to visit them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# With glibc, the memory of tensors of up to 32 MiB is reused, and returned to the system only by `malloc_trim`: new
# pages take long in a virtual machine. -1 is M_TRIM_THRESHOLD, and -3 is M_MMAP_THRESHOLD.
_GLIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_GLIBC = _GLIBC if hasattr(_GLIBC, "malloc_trim") else None
if _GLIBC is not None:
    _GLIBC.mallopt(-1, 2**31 - 1)
    _GLIBC.mallopt(-3, 32 << 20)

_resident = sys.maxsize  # smallest number of bytes since the last collection


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, bool, bool]:
    """Collect garbage after tests with large models, whose objects often refer to each other.

    Python itself rarely collects old objects.
    """
    global _resident
    result = yield
    now = _resident_bytes()
    _resident = min(_resident, now)
    if now - _resident > 512 << 20:
        gc.collect()
        if _GLIBC is not None and now > 3 << 30:
            _GLIBC.malloc_trim(0)
        _resident = _resident_bytes()
    return result


def _resident_bytes() -> int:
    """Return the resident memory of this process on Linux, and 0 on other systems."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise, nanobind would report a leak at the end


hypothesis.settings.register_profile("dev", max_examples=10, deadline=None)  # of `make check`
torch.set_num_threads(1)  # for tiny tensors, the overhead of threads exceeds their gain


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return `once(name, fill)`, which returns a folder that one of the workers has made with `fill(folder)`.

    Tests must not change the folder.
    """
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of all workers

    def once(name: str, fill: Callable[[Path], object]) -> Path:
        done = root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(root / name, ignore_errors=True)  # of a call that failed
                fill(root / name)
                done.touch()
        return root / name

    return once


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


@pytest.fixture(autouse=True)
def _nemo_only_where_marked(request: pytest.FixtureRequest):
    """Fail a test of the fast tier that imports NeMo, which takes 10 s of CPU time in every worker."""
    yield
    if "not nemo" in request.config.option.markexpr and "nemo" in sys.modules:
        pytest.fail("this test imports NeMo: add @pytest.mark.nemo")


@pytest.fixture(scope="session")
def speech():
    """Return `synthesize(seconds, seed)`, which makes float32 [T_audio] at 22.05 kHz."""
    return synthesize


@pytest.fixture(scope="session")
def make_codec():
    """Return `build_codec(kind, **changes)`, which makes a tiny codec."""
    return build_codec


@pytest.fixture(params=ALL_KINDS)
def codec(request: pytest.FixtureRequest) -> Codec:
    """Return a tiny codec of each kind."""
    return cached_codec(request.param)


@pytest.fixture
def small() -> Codec:
    """Return a codec of the released layout with few channels."""
    return cached_codec("symmetric")
