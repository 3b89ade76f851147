"""Tests of PCM files with 17 to 24 bits per sample in 4 bytes, such as those of `arecord -f S24_LE`."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest

from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.containers import read_wav_header
from nemo_lfr.io.token_file import TokenReader
from tests.crash import ROOT
from tests.models import RATE, synthesize

GUID_END = b"\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
SPEECH = synthesize(0.5, seed=3)


def wav(values: np.ndarray, bits: int, order: str = "<", channels: int = 1, tag: int = 1) -> bytes:
    """Return a WAV file whose header declares `bits` per sample and 4 bytes for each value."""
    form = struct.pack(f"{order}HHIIHH", tag, channels, RATE, RATE * 4 * channels, 4 * channels, bits)
    if tag != 1:
        form += struct.pack(f"{order}HHII", 22, bits, 0, 1) + GUID_END
    data = values.tobytes()
    chunks = struct.pack(f"{order}4sI", b"fmt ", len(form)) + form + struct.pack(f"{order}4sI", b"data", len(data))
    start = struct.pack(f"{order}4sI4s", b"RIFF" if order == "<" else b"RIFX", 4 + len(chunks) + len(data), b"WAVE")
    return start + chunks + data


def integers(wave: np.ndarray, bits: int, is_high: bool, order: str = "<") -> np.ndarray:
    values = np.round(wave.astype(np.float64) * 2 ** (bits - 1)).astype(np.int64)
    return (values << (32 - bits if is_high else 0)).astype(f"{order}i4")


def read(data: bytes) -> np.ndarray:
    with AudioReader("clip.wav", None, data=data) as reader:
        return reader.segment(0, 100)


@pytest.mark.parametrize("is_high", [False, True])
@pytest.mark.parametrize("bits", [18, 20, 24])
@pytest.mark.parametrize(("order", "tag"), [("<", 1), (">", 1), ("<", 0xFFFE), (">", 0xFFFE)])
@pytest.mark.parametrize("gain", [1.0, 0.002])
def test_samples_are_read_from_the_low_or_the_high_bytes(is_high, bits, order, tag, gain):
    if is_high and gain < 2**-8:
        gain = 2**-5  # quieter samples in the high bytes look like samples in the low bytes
    wave = SPEECH * gain
    heard = read(wav(integers(wave, bits, is_high, order), bits, order, tag=tag))
    assert heard.shape == wave.shape and np.abs(heard - wave).max() <= 2.0**-bits + 1e-7


def test_channels_are_mixed_and_short_or_silent_clips_are_read():
    values = integers(SPEECH, 24, is_high=False)
    stereo = np.stack([values, np.zeros_like(values)], axis=1)
    assert np.abs(read(wav(stereo, 24, channels=2)) - SPEECH / 2).max() < 1e-6
    for wave in (np.zeros(1000, np.float32), np.eye(1, 100, 50, dtype=np.float32)[0] / 2, SPEECH[:1]):
        assert np.abs(read(wav(integers(wave, 24, is_high=False), 24)) - wave).max() < 1e-6


def packed() -> np.ndarray:
    return np.ascontiguousarray(integers(SPEECH, 24, is_high=False).view(np.uint8).reshape(-1, 4)[:, :3])


UNKNOWN = {
    "floats": SPEECH.astype("<f4"),
    "samples of 3 bytes": packed(),
    "a high byte of zeros": integers(SPEECH, 24, is_high=False) & 0xFFFFFF,
    "all 32 bits": integers(SPEECH, 32, is_high=False),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_bits_in_another_position_are_refused(kind):
    with pytest.raises(AudioError, match=r"clip\.wav: the header declares 24 bits in 4 bytes for each sample, but"):
        read(wav(UNKNOWN[kind], 24))


def test_caf_with_such_samples_is_refused():
    data = integers(SPEECH, 24, is_high=True, order=">").tobytes()
    description = struct.pack(">4sqd4sIIIII", b"desc", 32, RATE, b"lpcm", 0, 4, 1, 1, 24)
    caf = struct.pack(">4sHH", b"caff", 1, 0) + description + struct.pack(">4sqI", b"data", 4 + len(data), 0) + data
    with pytest.raises(AudioError, match="24-bit samples in 4 bytes each are not supported in CAF"):
        read(caf)


def test_header_does_not_say_where_the_bits_are():
    header, _ = read_wav_header(io.BytesIO(wav(integers(SPEECH, 24, is_high=False), 24)).read)
    assert not header.is_plain


@pytest.mark.slow
def test_a_pipe_has_the_tokens_of_the_file(tmp_path):
    data = wav(integers(SPEECH, 24, is_high=False), 24)
    (tmp_path / "clip.wav").write_bytes(data)
    command = [sys.executable, "-m", "nemo_lfr", "encode"]
    subprocess.run([*command, tmp_path / "clip.wav", "--out", tmp_path / "file.lfr"], cwd=ROOT, check=True)
    piped = subprocess.run([*command, "-", "-"], cwd=ROOT, input=data, stdout=subprocess.PIPE, check=True).stdout
    (tmp_path / "pipe.lfr").write_bytes(piped)
    with TokenReader(tmp_path / "file.lfr") as file, TokenReader(tmp_path / "pipe.lfr") as pipe:
        assert np.array_equal(file.read(), pipe.read())
