"""Tests of F0 estimation: accuracy, and processes that compile librosa's kernels at the same time."""

import os
import subprocess
import sys

import numpy as np
import pytest

from nemo_lfr.evaluation.pitch import SAMPLE_RATE, estimate_pitch

SCRIPT = """
import sys
import numba

for _ in range(int(sys.argv[1])):  # kernels of other processes then have other names
    numba.njit(lambda x: x + 1)(1)

import numpy as np

from nemo_lfr.evaluation.pitch import SAMPLE_RATE, estimate_pitch

f0, voiced = estimate_pitch(np.sin(2 * np.pi * 200 / SAMPLE_RATE * np.arange(8000)).astype("float32"))
assert abs(np.median(f0[voiced]) - 200) < 2, f0
"""


@pytest.mark.slow
@pytest.mark.parametrize("hertz", [80, 200, 400])
def test_the_pitch_of_a_tone_is_found_and_silence_is_unvoiced(hertz):
    pytest.importorskip("librosa")
    tone = np.sin(2 * np.pi * hertz / SAMPLE_RATE * np.arange(SAMPLE_RATE)).astype(np.float32)
    f0, voiced = estimate_pitch(np.concatenate([tone, np.zeros(SAMPLE_RATE, np.float32)]))
    assert voiced[5:45].all() and not voiced[60:].any()
    assert np.abs(f0[5:45] / hertz - 1).max() < 0.01 and np.isnan(f0[60:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("hertz", [40, 50, 58, 505, 520])
def test_a_periodic_sound_outside_of_the_range_is_unvoiced(hertz):
    pytest.importorskip("librosa")
    phase = 2 * np.pi * hertz / SAMPLE_RATE * np.arange(SAMPLE_RATE)
    f0, voiced = estimate_pitch(sum(np.sin(phase * k) / k for k in range(1, 6)).astype(np.float32))
    assert not voiced.any() and np.isnan(f0).all()


@pytest.mark.slow
def test_processes_that_compile_at_the_same_time_leave_a_cache_that_works(tmp_path):
    pytest.importorskip("librosa")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    together = [subprocess.Popen([*command, str(count)], env=environment) for count in (0, 3)]
    assert [process.wait() for process in together] == [0, 0]
    assert subprocess.run([*command, "0"], env=environment).returncode == 0


@pytest.mark.slow
def test_missing_cache_folder_is_tolerated(tmp_path):
    pytest.importorskip("librosa")
    (tmp_path / "file").touch()
    environment = os.environ | {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "file")}
    code = "import numba\nfrom nemo_lfr.evaluation.pitch import _numba_cache\n"
    code += "with _numba_cache():\n    print(numba.config.CACHE_DIR)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "nemo-lfr-numba-" in done.stdout, done.stderr
