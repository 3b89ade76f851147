import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.errors import AudioError, NemoLfrError
from nemo_lfr.io import audio_writer
from nemo_lfr.io.audio import BLOCK_SECONDS, AudioReader, AudioWriter, resample
from nemo_lfr.io.reading import read_samples
from tests.crash import on_a_full_disk
from tests.models import synthesize
from tests.tiers import slow_after


def read(path, rate=22050):
    with AudioReader(path, rate) as reader:
        wave = np.concatenate([np.zeros(0, np.float32), *reader.blocks()])
        assert reader.samples_read == len(wave)
        assert wave.dtype == np.float32
        return wave


def test_stereo_is_mixed_to_its_mean(tmp_path):
    left, right = synthesize(0.3, 1), synthesize(0.3, 2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 22050, subtype="FLOAT")
    np.testing.assert_allclose(read(tmp_path / "a.wav"), (left + right) / 2, rtol=0, atol=1e-7)  # one float32 rounding


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_streamed_resampling_equals_resampling_at_once_with_the_right_length(tmp_path, rate):
    # Longer than two blocks, and not a multiple of a block.
    rng = np.random.default_rng(0)
    wave = (0.1 * rng.standard_normal(round((2 * BLOCK_SECONDS + 0.37) * rate))).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    got, expected = read(tmp_path / "a.wav"), resample(wave, rate, 22050)
    assert len(got) == len(expected)
    assert abs(len(got) - len(wave) * 22050 / rate) <= 1
    # Input and output are float32, and soxr computes in float64.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_resampling_keeps_the_frequency_and_phase_of_a_tone():
    time = np.arange(16000) / 16000
    got = resample(np.sin(2 * np.pi * 440 * time).astype(np.float32), 16000, 22050)
    expected = np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)
    # Ignore the ends, where the filter reads silence. The ripple of soxr's pass band is below 1e-4.
    np.testing.assert_allclose(got[2000:-2000], expected[2000:-2000], rtol=0, atol=1e-4)


@pytest.mark.parametrize("subtype", ["DWVW_16", "PCM_16"])
def test_a_section_is_read_where_libsndfile_cannot_seek(tmp_path, subtype):
    soundfile.write(tmp_path / "a.aiff", synthesize(0.5), 22050, subtype=subtype)
    whole = read(tmp_path / "a.aiff")
    with AudioReader(tmp_path / "a.aiff", 22050) as reader:
        assert np.array_equal(reader.segment(0.3, 0.1), whole[6615:8820])
        assert np.array_equal(reader.segment(0.1, 0.1), whole[2205:4410])


@pytest.mark.parametrize("rate", [0, -8000])
def test_invalid_sample_rate_is_refused(rate):
    with pytest.raises(AudioError, match=str(rate)):
        resample(np.zeros(10, np.float32), rate, 22050)


@pytest.mark.parametrize("rate", [8000.25, np.float64(22050.5), np.float32(44100.0), 44101.5])
def test_decoded_samples_are_resampled_from_a_rate_that_is_not_a_whole_number(rate):
    tone = np.sin(2 * np.pi * 1000 / rate * np.arange(round(float(rate)))).astype(np.float32)
    wave = read_samples(tone, rate, "a", 22050)
    assert abs(len(wave) - 22050) <= 3
    expected = np.sin(2 * np.pi * 1000 / 22050 * np.arange(len(wave)))
    np.testing.assert_allclose(wave[2000:-2000], expected[2000:-2000], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    # The tolerance is half a step of each format. Vorbis is lossy: its audio must only not be silent or shifted.
    [
        ("wav", "FLOAT", 0),
        ("wav", "DOUBLE", 0),
        ("wav", "PCM_16", 2**-15),
        ("wav", "PCM_24", 2**-23),
        ("wav", "PCM_U8", 2**-7),
        ("flac", "PCM_16", 2**-15),
        ("aiff", "PCM_16", 2**-15),
        ("aiff", "DWVW_16", 2**-15),
        ("aiff", "DWVW_24", 2**-22),
        ("ogg", "VORBIS", 0.15),
    ],
)
def test_every_common_format_reads_at_its_own_scale(tmp_path, suffix, subtype, tolerance):
    wave = synthesize(0.5)
    soundfile.write(tmp_path / f"a.{suffix}", wave, 22050, subtype=subtype)
    got = read(tmp_path / f"a.{suffix}")
    assert len(got) == len(wave)
    np.testing.assert_allclose(got, wave, rtol=0, atol=tolerance)
    assert got.std() == pytest.approx(wave.std(), rel=0.1)


def test_a_wav_file_is_read_if_its_suffix_is_raw(tmp_path, monkeypatch):
    monkeypatch.setattr(AudioReader, "_open_with_ffmpeg", None)
    soundfile.write(tmp_path / "a.wav", synthesize(0.2), 22050)
    (tmp_path / "a.raw").write_bytes((tmp_path / "a.wav").read_bytes())
    assert np.array_equal(read(tmp_path / "a.raw"), read(tmp_path / "a.wav"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_file_with_nan_or_infinity_is_refused(tmp_path, bad):
    wave = synthesize(0.2)
    wave[100] = bad
    soundfile.write(tmp_path / "a.wav", wave, 22050, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav.*NaN"):
        read(tmp_path / "a.wav")


@pytest.mark.parametrize(
    "content", [b"", b"not audio at all" * 100, b"RIFF\x24\0\0\0WAVE", b"fLaC" + b"\0" * 50, b"LFRT"]
)
def test_invalid_audio_file_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.wav: "):
        read(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["none.wav", "."])
def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path, name):
    with pytest.raises(AudioError, match=r"no such file|not a file but a folder"):
        AudioReader(tmp_path / name, 22050)


@pytest.mark.parametrize("suffix", ["mp3", "MP3", "wav", "flac", "ogg", "opus", "m4a", "raw"])
@pytest.mark.parametrize("content", [b"<html>404</html>\n" * 300, bytes(5000), b"PK\x03\x04" + bytes(range(256)) * 20])
def test_a_file_of_another_kind_is_named_as_such_and_libraries_print_nothing(
    tmp_path, suffix, content, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # libsndfile takes a file "._" in the working directory for a header
    (tmp_path / f"a.{suffix}").write_bytes(content)
    message = r"not an audio file that libsndfile reads \(unknown format\); if it is audio, convert it to WAV"
    with pytest.raises(AudioError, match=message):
        AudioReader(tmp_path / f"a.{suffix}", 22050)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "m4a"])
def test_a_file_without_a_byte_is_said_to_be_empty(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").touch()
    with pytest.raises(AudioError, match="the file is empty"):
        AudioReader(tmp_path / f"a.{suffix}", 22050)


def test_a_file_without_samples_has_no_blocks(tmp_path):
    for rate in (22050, 48000):
        soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), rate)
        assert len(read(tmp_path / "a.wav")) == 0


@pytest.mark.slow
def test_a_damaged_flac_is_refused_or_read_but_never_raises_another_error(tmp_path):
    soundfile.write(tmp_path / "a.flac", synthesize(1), 22050)
    raw = (tmp_path / "a.flac").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(raw)
        for position in rng.integers(0, len(raw), 20):
            damaged[position] = rng.integers(0, 256)
        (tmp_path / "b.flac").write_bytes(damaged)
        try:
            assert np.isfinite(read(tmp_path / "b.flac")).all()
        except AudioError as error:
            assert "b.flac" in str(error)


def test_truncated_recording_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", synthesize(2), 22050)
    raw = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "b.flac").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(AudioError, match=r"b\.flac"):
        read(tmp_path / "b.flac")


def test_truncated_mp3_is_refused_and_a_complete_one_is_not(tmp_path):
    for mode in ("CONSTANT", "VARIABLE"):
        soundfile.write(tmp_path / "a.mp3", synthesize(5), 22050, format="MP3", bitrate_mode=mode)
        assert len(read(tmp_path / "a.mp3")) == 5 * 22050
        raw = (tmp_path / "a.mp3").read_bytes()
        (tmp_path / "b.mp3").write_bytes(raw[: len(raw) // 2])
        with pytest.raises(AudioError, match=r"b\.mp3.*truncated"):
            read(tmp_path / "b.mp3")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "full")])
def test_exceptions_in_libsndfile_callbacks_are_raised(tmp_path, monkeypatch, error):
    write, calls = audio_writer.SinkFile.write, []

    def struck(self, data):
        calls.append(1)
        if len(calls) == 4:
            self._file = Struck()
        return write(self, data)

    class Struck:
        def write(self, data):
            raise error

    monkeypatch.setattr(audio_writer.SinkFile, "write", struck)
    expected = type(error) if isinstance(error, Exception) else error
    with pytest.raises(expected), AudioWriter(tmp_path / "a.wav", 22050) as writer:
        for _ in range(20):
            writer.write(synthesize(1.0))
    assert len(calls) >= 4 and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="has no umask")
def test_written_files_have_default_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        with AudioWriter(tmp_path / "a.wav", 22050) as writer:
            writer.write(synthesize(0.1))
    finally:
        os.umask(old)
    assert (tmp_path / "a.wav").stat().st_mode & 0o777 == 0o640


def test_duration_is_in_seconds_of_the_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((24000, 2)), 48000)
    with AudioReader(tmp_path / "a.wav", 22050) as reader:
        assert (reader.duration, reader.native_rate, reader.channels) == (0.5, 48000, 2)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".WAV"])
def test_written_files_are_16_bit_mono_and_read_back(tmp_path, suffix):
    wave = synthesize(0.3)
    with AudioWriter(tmp_path / f"a{suffix}", 22050) as writer:
        for piece in np.array_split(wave, 5):
            writer.write(piece)
        assert not (tmp_path / f"a{suffix}").exists()
    info = soundfile.info(tmp_path / f"a{suffix}")
    assert (info.subtype, info.channels, info.samplerate, info.frames) == ("PCM_16", 1, 22050, len(wave))
    np.testing.assert_allclose(read(tmp_path / f"a{suffix}"), wave, rtol=0, atol=0.501 / 32768)  # half a step
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", [".flac", ".FLAC"])
def test_an_empty_recording_is_not_written_as_flac(tmp_path, suffix):
    with (
        pytest.raises(AudioError, match=r"no samples, and FLAC files cannot be empty; write \.wav"),
        AudioWriter(tmp_path / f"a{suffix}", 22050) as writer,
    ):
        writer.write(np.zeros(0, np.float32))
    assert not list(tmp_path.iterdir())


def test_samples_at_full_scale_do_not_wrap_round(tmp_path):
    wave = np.array([1.0, -1.0, 1.5, -1.5], np.float32)
    with AudioWriter(tmp_path / "a.wav", 22050) as writer:
        writer.write(wave)
    np.testing.assert_allclose(read(tmp_path / "a.wav"), wave.clip(-1, 1), rtol=0, atol=1 / 32767)


def test_a_writer_that_fails_leaves_no_file_and_keeps_the_old_one(tmp_path):
    with pytest.raises(RuntimeError), AudioWriter(tmp_path / "a.wav", 22050) as writer:
        writer.write(synthesize(0.1))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.wav").write_bytes(b"old")
    with pytest.raises(RuntimeError), AudioWriter(tmp_path / "a.wav", 22050, overwrite=True):
        raise RuntimeError
    assert (tmp_path / "a.wav").read_bytes() == b"old"
    with pytest.raises(NemoLfrError, match=r"a\.wav exists.*overwrite"):
        AudioWriter(tmp_path / "a.wav", 22050)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize("name", ["a", "a.xyz", "a.lfr", "a.txt", "a.mp3", "a.ogg", "a.OPUS", "a.raw", "a.aiff"])
def test_a_format_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, name):
    message = (
        r"cannot be written as '\.\w+'; use \.wav or \.flac" if "." in name else r"no suffix.*use \.wav or \.flac"
    )
    with pytest.raises(NemoLfrError, match=rf"{name}: .*{message}"):
        AudioWriter(tmp_path / name, 22050)
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_refuses_its_settings_leaves_nothing(tmp_path):
    with pytest.raises(AudioError, match=r"a\.flac: the audio cannot be written as FLAC at 1000000 Hz"):
        AudioWriter(tmp_path / "a.flac", 1_000_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 24000, 44100, 48000, 22049])
@pytest.mark.parametrize("num_samples", [1, 2, 100, 4799, 48001])
def test_samples_are_those_of_librosa_load(tmp_path, rate, num_samples):
    librosa = pytest.importorskip("librosa")
    wave = 0.1 * np.random.default_rng(num_samples).standard_normal((num_samples, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    expected, _ = librosa.load(tmp_path / "a.wav", sr=22050, mono=True)
    with AudioReader(tmp_path / "a.wav", 22050) as reader:
        blocks = np.concatenate(list(reader.blocks(0.013)))
    whole = read(tmp_path / "a.wav")
    assert len(whole) == len(blocks) == len(expected)
    # The mean of the channels is computed along another axis, which changes one float32 rounding.
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(blocks, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(resample(wave.mean(axis=1), rate, 22050), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", slow_after(1, ["a.wav", "a.flac"]))
@pytest.mark.parametrize("free", slow_after(1, [10, 4000]))
def test_a_full_disk_leaves_the_old_audio_and_nothing_else(tmp_path, name, free):
    path = tmp_path / name
    path.write_bytes(b"old")
    script = f"""
import numpy
from nemo_lfr.io.audio import AudioWriter
from nemo_lfr.io.reading import read_samples
with AudioWriter({str(path)!r}, 22050, overwrite=True) as writer:
    for _ in range(4):
        writer.write(0.3 * numpy.random.default_rng(0).standard_normal(10000, dtype=numpy.float32))
"""
    assert f"File too large: {str(path)!r}" in on_a_full_disk(script, free)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_a_name_that_is_not_utf8_is_read_like_any_other(tmp_path):
    wave = synthesize(0.1, 1)
    soundfile.write(tmp_path / "a.wav", wave, 22050, subtype="FLOAT")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.wav"))
    (tmp_path / "a.wav").rename(odd)
    np.testing.assert_array_equal(read(odd), wave)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(AudioError, match=r"a\.wav: not a regular file; to read a pipe, connect it to stdin"):
        AudioReader(tmp_path / "a.wav", 22050)


def test_a_block_of_any_length_takes_no_more_memory_than_the_audio(tmp_path):
    wave = synthesize(0.1, 1)
    soundfile.write(tmp_path / "a.wav", wave, 22050, subtype="FLOAT")
    with AudioReader(tmp_path / "a.wav", 22050) as reader:
        (block,) = reader.blocks(seconds=1e12)  # an array of this size would need 80 PiB
    np.testing.assert_array_equal(block, wave)


def test_a_folder_is_never_replaced_by_a_file(tmp_path):
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(NemoLfrError, match=r"a\.wav is a folder"):
        AudioWriter(tmp_path / "a.wav", 22050, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize("name", ["n" * 300 + ".wav", "d/" * 3000 + "a.wav", "a\0b.wav"])
def test_impossible_file_name_raises_our_error(tmp_path, name):
    with pytest.raises(AudioError):
        AudioReader(tmp_path / name, 22050)
