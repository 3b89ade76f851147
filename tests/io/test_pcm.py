"""Tests of integer samples: the scale depends on the type alone, for tables and for `Codec.encode`."""

import numpy as np
import pytest

from nemo_lfr.codec.arrays import NumpyArrays
from nemo_lfr.codec.clips import to_batch
from nemo_lfr.codec.torch_arrays import TorchArrays
from nemo_lfr.errors import AudioError
from nemo_lfr.io.pcm import samples_to_float
from nemo_lfr.io.reading import read_samples
from tests.models import RATE, synthesize

WAVE = synthesize(0.1).astype(np.float64)
QUIET = WAVE * 1e-5

# Samples, and the expected ones; or the reason why they are refused.
TYPES = {
    "float64": (WAVE, WAVE),
    "float16": (WAVE.astype(np.float16), WAVE.astype(np.float16).astype(np.float64)),
    "int8": (np.round(WAVE * 127).astype(np.int8), np.round(WAVE * 127) / 128),
    "uint8": (np.round(WAVE * 127 + 128).astype(np.uint8), np.round(WAVE * 127) / 128),
    "int16": (np.round(WAVE * 32767).astype(np.int16), np.round(WAVE * 32767) / 32768),
    "quiet int16": (np.round(QUIET * 32767).astype(np.int16), np.round(QUIET * 32767) / 32768),
    "int32": ((WAVE * 2**31).astype(np.int32), WAVE),
    "silent int32": (np.zeros(1000, np.int32), np.zeros(1000)),
    "16 bits in int32": (np.round(WAVE * 32767).astype(np.int32), "reach only .*store 16-bit audio as int16"),
    "24 bits in int32": (np.round(WAVE * 8388607).astype(np.int32), "reach only .*floats in"),
    "quiet int32": ((QUIET * 2**31).astype(np.int32), "reach only"),
    "16 bits in int64": (np.round(WAVE * 32767).astype(np.int64), np.round(WAVE * 32767) / 32768),
    "quiet 16 bits in int64": (np.round(WAVE * 9).astype(np.int64), np.round(WAVE * 9) / 32768),
    "32 bits in int64": ((WAVE * 2**31).astype(np.int64), "int64 samples are read as 16-bit audio, but reach"),
    "uint16": (np.round(WAVE * 32767 + 32768).astype(np.uint16), "type uint16, which has no defined full scale"),
    "uint32": ((WAVE * 2**31 + 2**31).astype(np.uint32), "type uint32"),
    "uint64": (np.ones(1000, np.uint64), "type uint64"),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("reader", ["function", "table", "numpy item", "torch item"])
def test_the_scale_depends_on_the_type_of_the_samples(reader, kind):
    samples, expected = TYPES[kind]

    def read() -> np.ndarray:
        if reader == "function":
            return samples_to_float(samples, "clip")
        if reader == "table":
            return read_samples(samples, RATE, "clip", RATE)
        import torch

        arrays = NumpyArrays() if reader == "numpy item" else TorchArrays(torch.device("cpu"))
        batch, _ = to_batch(arrays, {"array": samples, "sampling_rate": RATE}, None, None, RATE)
        return np.asarray(batch)[0]

    if isinstance(expected, str):
        with pytest.raises(AudioError, match=expected) as error:
            read()
        assert "\n" not in str(error.value)
    else:
        assert np.abs(read() - expected).max() < 1e-6


def test_a_list_of_integers_is_16_bit_audio():
    samples = np.round(WAVE * 32767).astype(int).tolist()
    batch, _ = to_batch(NumpyArrays(), {"array": samples, "sampling_rate": RATE}, None, None, RATE)
    assert np.abs(batch[0] - WAVE).max() < 1e-4
