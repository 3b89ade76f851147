"""Tests of containers that are read with FFmpeg. FFmpeg makes the files, and its own decoding is the reference."""

import builtins
import io
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from nemo_lfr.errors import AudioError, MissingExtraError
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.containers.opus import OpusTimes
from tests.models import synthesize
from tests.tiers import slow_after, slow_except

RATE = 22050
MADE = {
    "m4a": ["-c:a", "aac"],
    "mp4": ["-c:a", "aac", "-movflags", "+faststart"],
    "aac": ["-c:a", "aac"],
    "webm": ["-c:a", "libopus"],
    "mka": ["-c:a", "libvorbis"],
    "wma": ["-c:a", "wmav2"],
    "mov": ["-c:a", "pcm_s16le"],
    "ts": ["-c:a", "mp2"],
    "ac3": ["-c:a", "ac3", "-ar", "44100"],
    "eac3": ["-c:a", "eac3", "-ar", "44100"],
    "dts": ["-c:a", "dca", "-strict", "-2", "-ar", "44100"],
    "wv": ["-c:a", "wavpack"],
    "tta": ["-c:a", "tta"],
    "avi": ["-c:a", "pcm_s16le"],
    "flv": ["-c:a", "aac"],
    "mkv": ["-c:a", "aac"],
    "rm": ["-c:a", "ac3", "-ar", "44100"],
}


def ffmpeg(*arguments) -> bytes:
    program = shutil.which("ffmpeg")
    if program is None:
        pytest.skip("FFmpeg is not installed")
    return subprocess.run([program, "-v", "error", "-y", *map(str, arguments)], capture_output=True, check=True).stdout


def made(folder, suffix):
    soundfile.write(folder / "source.wav", synthesize(3), RATE)
    ffmpeg("-i", folder / "source.wav", *MADE[suffix], folder / f"a.{suffix}")
    return folder / f"a.{suffix}"


def read(path, rate=RATE, **options):
    with AudioReader(path, rate, **options) as reader:
        return np.concatenate([np.zeros(0, np.float32), *reader.blocks(0.3)])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", MADE)
def test_media_files_give_the_samples_that_ffmpeg_gives(tmp_path, suffix):
    pytest.importorskip("av")
    path = made(tmp_path, suffix)
    with AudioReader(path, RATE) as reader:
        native = reader.native_rate
        duration = reader.duration
    expected = np.frombuffer(ffmpeg("-i", path, "-f", "f32le", "-ac", "1", "-"), "<f4")
    wave = read(path, native)
    assert duration == pytest.approx(len(wave) / native)
    # The ffmpeg program also drops samples with a negative time stamp.
    assert 0 <= len(wave) - len(expected) <= 2048
    size = len(expected) - 2048
    lag = int(np.argmin([np.abs(wave[at : at + 2000] - expected[:2000]).sum() for at in range(2049)]))
    assert lag == 0 or suffix in ("aac", "webm", "ts", "flv", "mkv")
    np.testing.assert_allclose(wave[lag : lag + size], expected[:size], rtol=0, atol=1e-4)
    assert np.array_equal(read(path, native, data=path.read_bytes()), wave)
    with AudioReader(path, native) as reader:
        assert np.array_equal(reader.segment(1.0, 0.5), wave[native : native + native // 2])
        assert np.array_equal(reader.segment(0.2, 0.1), wave[round(0.2 * native) :][: round(0.1 * native)])


@pytest.mark.parametrize("suffix", slow_after(2, ["wv", "tta", "ac3", "eac3", "rm"]))
def test_a_frame_whose_checksum_is_wrong_is_damage(tmp_path, suffix):
    pytest.importorskip("av")
    path = made(tmp_path, suffix)
    data = path.read_bytes()
    for share in (0.3, 0.5, 0.7):
        at = int(share * len(data))
        path.write_bytes(data[:at] + bytes(byte ^ 0x55 for byte in data[at : at + 20]) + data[at + 20 :])
        with pytest.raises(AudioError, match="damaged"):
            read(path)


DAMAGE = {
    "a zeroed block": lambda data, at: data[:at] + bytes(4096) + data[at + 4096 :],
    "missing bytes": lambda data, at: data[:at] + data[at + 101 :],
    "inserted bytes": lambda data, at: data[:at] + b"\x55" * 999 + data[at:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", slow_after(1, ["aac", "ac3", "eac3", "dts"]))
def test_frames_with_a_gap_are_damage_and_not_several_recordings(tmp_path, suffix, damage):
    pytest.importorskip("av")
    path = made(tmp_path, suffix)
    data = path.read_bytes()
    path.write_bytes(DAMAGE[damage](data, len(data) // 2 | 1))
    with pytest.raises(AudioError, match=r"damaged: \d+ bytes at position \d+ are not codec frames"):
        read(path)
    path.write_bytes(data + TAG + data)
    with pytest.raises(AudioError, match="several recordings"):
        read(path)


@pytest.mark.parametrize("kind", ["aac", "caf"])
def test_reasons_of_ffmpeg_are_about_the_audio(tmp_path, kind):
    """FFmpeg returns the system's code "Operation not permitted" for AAC, and asks for patches for ALAC."""
    pytest.importorskip("av")
    soundfile.write(tmp_path / "source.wav", synthesize(1), RATE)
    path = tmp_path / f"a.{kind}"
    ffmpeg("-i", tmp_path / "source.wav", *(["-c:a", "alac"] if kind == "caf" else []), path)
    data, messages = path.read_bytes(), set()
    for seed in range(12):
        at, noise = len(data) * (seed + 3) // 16, np.random.default_rng(seed).bytes(64)
        path.write_bytes(data[:at] + noise + data[at + len(noise) :])
        try:
            read(path)
        except AudioError as error:
            messages.add(str(error).partition(": ")[2])
    assert messages and not any("permitted" in text or "patches" in text for text in messages), messages


@pytest.mark.parametrize("suffix", slow_after(1, ["m4a", "mp4", "webm", "wma", "wv", "tta", "avi", "flv", "mkv"]))
def test_a_media_file_that_is_cut_is_refused(tmp_path, suffix):
    pytest.importorskip("av")
    path = made(tmp_path, suffix)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=rf"a\.{suffix}: "):
        read(path)


LIVE = {
    "webm": ["-c:a", "libopus", "-f", "webm"],
    "mp4": ["-c:a", "aac", "-f", "mp4", "-movflags", "frag_keyframe+empty_moov"],
    "ts": ["-c:a", "mp2", "-f", "mpegts"],
}


@pytest.mark.parametrize("suffix", slow_after(1, LIVE))
def test_a_file_that_names_no_length_is_refused_where_it_is_cut(tmp_path, suffix):
    """Browsers and live encoders write files without a length to a pipe."""
    pytest.importorskip("av")
    soundfile.write(tmp_path / "source.wav", synthesize(3), RATE)
    data = ffmpeg("-i", tmp_path / "source.wav", *LIVE[suffix], "-")
    (tmp_path / "a").write_bytes(data)
    whole = read(tmp_path / "a")
    assert len(whole) > 2.9 * RATE
    (tmp_path / "a").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(AudioError, match="was truncated"):
        read(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("second", ["itself", "WAV"])
@pytest.mark.parametrize("suffix", ["m4a", "webm", "mkv", "wma", "wv", "tta", "avi", "flv", "aac"])
def test_joined_media_files_are_read_whole_or_refused(tmp_path, suffix, second):
    pytest.importorskip("av")
    data = made(tmp_path, suffix).read_bytes()
    path = tmp_path / f"b.{suffix}"
    path.write_bytes(data + (data if second == "itself" else (tmp_path / "source.wav").read_bytes()))
    try:
        assert abs(len(read(path)) - 2 * len(read(tmp_path / f"a.{suffix}"))) <= 2048 and second == "itself"
    except AudioError as error:
        assert "b." in str(error) and ("contains several recordings" in str(error) or "was truncated" in str(error))


@pytest.mark.parametrize("options", [[], ["-movflags", "frag_keyframe+empty_moov"]])
def test_joined_mp4_is_refused_as_only_the_first_would_be_read(tmp_path, options):
    made(tmp_path, "mov")
    data = ffmpeg("-i", tmp_path / "a.mov", "-c:a", "aac", *options, tmp_path / "b.mp4")
    data = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data + data)
    with pytest.raises(AudioError, match=r"b\.mp4: the audio contains several recordings"):
        read(tmp_path / "b.mp4")


def test_the_length_of_aac_is_not_estimated_from_its_quiet_start(tmp_path):
    pytest.importorskip("av")
    noise = 0.3 * np.random.default_rng(0).standard_normal(3 * RATE).clip(-3, 3)
    soundfile.write(tmp_path / "a.wav", np.concatenate([np.zeros(3 * RATE), noise]), RATE)
    ffmpeg("-i", tmp_path / "a.wav", tmp_path / "a.aac")
    assert 0 <= len(read(tmp_path / "a.aac")) - 6 * RATE <= 3 * 1024


def test_aac_that_ends_within_a_frame_is_read_to_its_last_whole_frame_with_a_message(tmp_path, caplog):
    pytest.importorskip("av")
    data = made(tmp_path, "aac").read_bytes()
    whole = read("a.aac", data=data)
    part = read("a.aac", data=data[:-20])
    assert len(part) == len(whole) - 1024 and np.array_equal(part, whole[: len(part)])
    assert "a.aac: the audio ends within a frame" in caplog.text


@pytest.mark.parametrize("codec", ["flac", "libspeex"])
def test_chained_ogg_that_only_ffmpeg_reads_is_read_once(tmp_path, codec):
    pytest.importorskip("av")
    soundfile.write(tmp_path / "source.wav", synthesize(1), 16000)
    ffmpeg("-i", tmp_path / "source.wav", "-c:a", codec, tmp_path / "a.ogg")
    data = (tmp_path / "a.ogg").read_bytes()
    one = read(tmp_path / "a.ogg", 16000)
    assert np.array_equal(read(tmp_path / "a.ogg", 16000, data=data * 2), np.concatenate([one, one]))


# Arguments of FFmpeg by format.
ENDS = {
    "mpeg": ["-c:a", "mp2", "-ar", "44100"],
    "vob": ["-c:a", "ac3", "-ar", "48000"],
    "mpegts": ["-c:a", "mp2", "-ar", "44100"],
    "mpegts with time codes": ["-c:a", "ac3", "-ar", "48000", "-mpegts_m2ts_mode", "1"],
    "dts": ["-c:a", "dca", "-strict", "-2", "-ar", "44100"],
    "ac3": ["-c:a", "ac3", "-ar", "44100"],
    "eac3": ["-c:a", "eac3", "-ar", "48000"],
    "latm": ["-c:a", "aac"],
    "adts": ["-c:a", "aac"],
    "gsm": ["-c:a", "libgsm", "-ar", "8000"],
    "rm": ["-c:a", "ac3", "-ar", "44100"],
    "caf": ["-c:a", "alac"],
    "ipod": ["-c:a", "aac"],
    "mp4": ["-c:a", "aac", "-movflags", "frag_keyframe+empty_moov"],
    "mov": ["-c:a", "pcm_s16le"],
    "matroska": ["-c:a", "libvorbis"],
    "webm": ["-c:a", "libopus"],
    "asf": ["-c:a", "wmav2"],
    "asf with a long delay": ["-c:a", "wmav2", "-ar", "8000"],
    "wv": ["-c:a", "wavpack"],
    "tta": ["-c:a", "tta"],
    "avi": ["-c:a", "pcm_s16le"],
    "avi with a wrong duration": ["-c:a", "adpcm_ms", "-ar", "44100", "-ac", "2"],
    "flv": ["-c:a", "aac"],
    "w64": [],
    "sox": [],
    "ircam": ["-c:a", "pcm_s16le"],
}
TAG = b"TAG" + b"title".ljust(125, b"\0")


def encoded(folder, kind, wave=None, rate=RATE, options=ENDS):
    soundfile.write(folder / "source.wav", synthesize(1) if wave is None else wave, rate)
    try:
        ffmpeg("-i", folder / "source.wav", *options[kind], "-f", kind.partition(" ")[0], folder / "made")
    except subprocess.CalledProcessError as error:
        if b"Unknown encoder" in error.stderr:
            pytest.skip(f"FFmpeg has no encoder for {kind}")
        raise
    return (folder / "made").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENDS)
def test_no_sample_is_lost_or_invented_silently_at_the_end_of_a_file(tmp_path, caplog, kind):
    pytest.importorskip("av")
    data = encoded(tmp_path, kind)
    noise = np.random.default_rng(0).bytes(5000)

    def outcome(data):
        """Return the number of samples, 0 for an error, and the messages."""
        caplog.clear()
        try:
            count = len(read("a", None, data=data))
        except AudioError as error:
            return 0, str(error)
        return count, caplog.text

    whole, message = outcome(data)
    no_length = "declares no length"  # truncation is only detectable within a sample
    assert whole and (not message or (no_length in message and kind == "ircam"))
    for size in (len(data) * 2 // 5 | 1, len(data) * 3 // 4 | 1, len(data) - 30):  # not detectable between frames
        count, message = outcome(data[:size])
        assert count == whole or message, size
        assert count <= whole
    count, message = outcome(data + data)
    assert "contains several recordings" in message if not count else abs(count - 2 * whole) <= 2048
    count, message = outcome(data + (tmp_path / "source.wav").read_bytes())
    assert count == 0 and "contains several recordings" in message
    if kind != "ircam":
        count, message = outcome(data + noise)
        assert count == whole and "5000 bytes" in message and "ignored" in message
    for tag in (TAG, TAG + bytes(700)):
        assert (kind == "ircam" and len(tag) > 128) or outcome(data + tag)[0] == whole
    assert kind == "ircam" or not outcome(data + TAG)[1]


def overwritten(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


GAP, END, EMPTY = r"gaps of 0\.\d\d s", r"ends after 1\.\d\d s, but the header declares 2\.\d\d s", "no samples in it"
FRAGMENTS = ["-c:a", "aac", "-movflags", "frag_keyframe+empty_moov"]
# FFmpeg arguments, a change of the file of 2 s, and the message. FFmpeg reads such a file without an error.
LOST = {
    "asf, header": (["-c:a", "wmav2"], lambda data: overwritten(data, 28, b"\xff" * 4), EMPTY),
    "mp4, header": (FRAGMENTS, lambda data: overwritten(data, data.find(b"tkhd") + 16, b"\x80"), EMPTY),
    "asf, beginning": (["-c:a", "wmav2"], lambda data: overwritten(data, data.find(b"\x82\0\0") + 3, bytes(300)), GAP),
    "asf, middle": (["-c:a", "wmav1"], lambda data: overwritten(data, len(data) // 2, bytes(300)), GAP),
    "asf, end": (["-c:a", "wmav2"], lambda data: overwritten(data, len(data) - 2600, bytes(300)), END),
    "matroska, end": (["-c:a", "libvorbis"], lambda data: overwritten(data, len(data) * 4 // 5, bytes(300)), END),
    "webm, end": (["-c:a", "libopus"], lambda data: overwritten(data, len(data) * 4 // 5, bytes(300)), END),
    "ipod, time scale": (
        ["-c:a", "aac"],
        lambda data: overwritten(data, data.find(b"mvhd") + 16, b"\0\xff\0\0"),
        r"only \d+ of the \d+ packets",
    ),
}


@pytest.mark.parametrize("kind", slow_after(2, LOST))
def test_audio_that_ffmpeg_drops_is_reported(tmp_path, caplog, kind):
    pytest.importorskip("av")
    options, change, message = LOST[kind]
    data = encoded(tmp_path, kind.partition(",")[0], synthesize(2), options={kind.partition(",")[0]: options})
    whole = len(read("a", data=data))
    assert not caplog.text
    if message == EMPTY:
        with pytest.raises(AudioError, match=rf"a: .*{message}"):
            read("a", data=change(data))
    else:
        assert 0 < len(read("a", data=change(data))) < whole
        assert len(caplog.messages) == 1 and re.search(message, caplog.messages[0])
        with AudioReader("a", None, data=change(data)) as reader:
            reader.segment(0.01, reader.duration)
        assert len(caplog.messages) == 2 and re.search(message, caplog.messages[1])


# Configurations in the headers of Opus packets: 60 ms, 2.5 ms and 10 ms instead of 20 ms.
TOCS = {"60 ms": 3, "2.5 ms": 28, "10 ms": 0}
OPUS = {"mp4": ["-c:a", "libopus", "-strict", "-2"], "caf": ["-c:a", "libopus"], "webm": ["-c:a", "libopus"]}


@pytest.mark.parametrize("which", slow_after(1, [50, 0, -1]))
@pytest.mark.parametrize("kind", OPUS)
def test_opus_packets_with_a_changed_header_are_refused(tmp_path, caplog, kind, which):
    av = pytest.importorskip("av")
    data = encoded(tmp_path, kind, synthesize(2), options=OPUS)
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    at = data.index(packets[which])
    assert len(read("a", data=data)) and not caplog.text
    for name, config in TOCS.items():
        if (which, name) == (-1, "10 ms") and kind != "caf":
            continue  # the container states that at most 10 ms of the last packet belong to the audio
        changed = overwritten(data, at, bytes([config << 3 | packets[which][0] & 7]))
        with pytest.raises(AudioError, match=r"a: the audio is damaged: 1 of its Opus packets .* contradicts"):
            read("a", data=changed)


# Time stamps in seconds, and configurations of the packets; 1, 2 and 3 stand for 20 ms, 40 ms and 60 ms.
VALID_TIMES = {
    "regular": [(0.02 * index, 1) for index in range(50)],
    "rounded": [(round(0.0025 * index, 3), 28) for index in range(50)],
    "imprecise": [(0.06 * index + 0.007 * (-1) ** index, 3) for index in range(50)],
    "a lost packet": [(0.02 * index, 1) for index in range(50) if index != 20],
    "pauses": [(0.4 * index, 1) for index in range(50)],
    "a pause": [(0.02 * index + (index > 20) * 0.7, 1) for index in range(50)],
    "two durations": [(0.04 * index, 2) for index in range(20)] + [(0.8 + 0.02 * index, 1) for index in range(50)],
    "a short last packet": [*((0.02 * index, 1) for index in range(50)), (1.0, 0)],
    "many lost and late packets": [
        (0.02 * index + 0.005 * math.sin(7 * index), 1) for index in range(300) if index * 7919 % 10 > 2
    ],
    "most packets lost": [(0.02 * index, 1) for index in range(300) if index * 7919 % 10 > 5],
    "a long last packet": [(0.0, 1), (0.02, 1), (0.04, 3)],
    "one packet": [(0.0, 1)],
    "none": [],
}


@pytest.mark.parametrize("kind", VALID_TIMES)
def test_valid_opus_packets_are_accepted(kind):
    times = OpusTimes()
    for start, config in VALID_TIMES[kind]:
        times.add(bytes([config << 3]), start)
    assert times.problem(1.01) is None and times.problem(None) is None


def test_mpeg_audio_whose_bit_rate_falls_is_read_completely(tmp_path):
    """For layer 2, libsndfile alone estimates the length from the first frame and stops there."""
    soundfile.write(tmp_path / "source.wav", synthesize(2), RATE)
    fast, slow = (ffmpeg("-i", tmp_path / "source.wav", "-b:a", rate, "-f", "mp2", "-") for rate in ("128k", "32k"))
    assert len(read("a", data=slow)) >= 2 * RATE
    assert len(read("a", data=fast + slow)) == len(read("a", data=fast)) + len(read("a", data=slow))


UNCHECKED = {
    "nut": ["-c:a", "mp2", "-ar", "44100"],
    "truehd": ["-c:a", "truehd", "-strict", "-2", "-ar", "44100"],
    "mlp": ["-c:a", "mlp", "-strict", "-2", "-ar", "44100"],
}


@pytest.mark.parametrize("kind", slow_after(1, UNCHECKED))
def test_a_format_whose_truncation_would_not_show_is_refused(tmp_path, kind):
    pytest.importorskip("av")
    data = encoded(tmp_path, kind, options=UNCHECKED)
    with pytest.raises(
        AudioError, match=r"a: the format .* is not supported because truncated files cannot be detected; convert it"
    ):
        read("a", data=data)


@pytest.mark.parametrize(
    "kinds",
    slow_except([("mpeg", "vob"), ("mpegts", "mpegts of another codec"), ("matroska", "webm")], ("mpeg", "vob")),
)
@pytest.mark.parametrize("order", slow_after(1, [1, -1]))
def test_joined_files_of_one_container_and_two_codecs_lose_nothing_silently(tmp_path, kinds, order):
    pytest.importorskip("av")
    options = {**ENDS, "mpegts of another codec": ["-c:a", "aac"]}
    first, second = (encoded(tmp_path, kind, options=options) for kind in kinds[::order])
    seconds = 0.0
    for data in (first, second):
        with AudioReader("a", None, data=data) as reader:
            seconds += reader.duration
    try:
        with AudioReader("a", None, data=first + second) as reader:
            assert reader.duration == pytest.approx(seconds, abs=0.1)
    except AudioError as error:
        assert "contains several recordings" in str(error) or "damaged" in str(error)


@pytest.mark.parametrize("rate", slow_after(1, [16000, 22050, 48000]))
@pytest.mark.parametrize("suffix", slow_after(1, ["webm", "mka"]))
def test_the_delay_and_padding_of_opus_in_matroska_are_dropped(tmp_path, suffix, rate):
    pytest.importorskip("av")
    soundfile.write(tmp_path / "source.wav", synthesize(1), rate)
    ffmpeg("-i", tmp_path / "source.wav", "-c:a", "libopus", tmp_path / f"a.{suffix}")
    # 1 s at 22050 Hz, as seconds of `rate`, in Opus's 48 kHz. Times in Matroska are rounded to 1 ms.
    expected = RATE * 48000 / rate
    assert abs(len(read(tmp_path / f"a.{suffix}", 48000)) - expected) <= 48
    reference = np.frombuffer(ffmpeg("-i", tmp_path / f"a.{suffix}", "-f", "f32le", "-ac", "1", "-"), "<f4")
    np.testing.assert_allclose(read(tmp_path / f"a.{suffix}", 48000)[:40000], reference[:40000], rtol=0, atol=1e-5)


def test_a_change_of_rate_within_a_track_is_refused(tmp_path):
    pytest.importorskip("av")
    options = {"mpegts": ["-c:a", "mp2", "-ar", "44100"], "mpegts faster": ["-c:a", "mp2", "-ar", "48000"]}
    data = b"".join(encoded(tmp_path, kind, options=options) for kind in options)
    with pytest.raises(AudioError, match="changes its sample rate or number of channels"):
        read("a", None, data=data)


@pytest.mark.parametrize("codec", [("libopus", "libvorbis"), ("libvorbis", "libopus"), ("flac", "libopus")])
def test_the_first_of_several_tracks_in_ogg_is_read_with_one_message(tmp_path, caplog, codec):
    if "flac" in codec:  # libsndfile does not read FLAC in Ogg with other tracks
        pytest.importorskip("av")
    for number, seconds in enumerate((1, 2)):
        soundfile.write(tmp_path / f"{number}.wav", synthesize(seconds, seed=number), RATE)
    inputs = ["-i", tmp_path / "0.wav", "-i", tmp_path / "1.wav", "-map", "0", "-map", "1"]
    ffmpeg(*inputs, "-c:0", codec[0], "-c:1", codec[1], tmp_path / "a.ogg")
    assert abs(len(read(tmp_path / "a.ogg")) - RATE) <= 1024
    assert caplog.text.count("contains 2 audio tracks; the first one is read") == 1


def test_the_first_of_several_audio_tracks_is_read_with_a_message(tmp_path, caplog):
    pytest.importorskip("av")
    soundfile.write(tmp_path / "1.wav", synthesize(1), RATE)
    soundfile.write(tmp_path / "2.wav", synthesize(2, seed=1), RATE)
    inputs = ["-i", tmp_path / "1.wav", "-i", tmp_path / "2.wav", "-map", "0", "-map", "1"]
    ffmpeg(*inputs, "-c:a", "pcm_s16le", tmp_path / "a.mkv")
    assert len(read(tmp_path / "a.mkv")) == RATE
    assert "contains 2 audio tracks; the first one is read" in caplog.text


@pytest.mark.parametrize("suffix", ["gsm", "vox"])
def test_headerless_bytes_with_an_audio_suffix_are_refused(tmp_path, suffix):
    """libsndfile would decode any bytes as 8 kHz audio."""
    (tmp_path / f"a.{suffix}").write_bytes(b"These are no samples.\n" * 100)
    with pytest.raises(AudioError, match="not an audio file: it has no header"):
        read(tmp_path / f"a.{suffix}")


def test_an_id3_tag_before_aac_is_skipped(tmp_path):
    pytest.importorskip("av")
    path = made(tmp_path, "aac")
    tagged = b"ID3\x04\0\0\0\0\x02\0" + bytes(256) + path.read_bytes()
    assert np.array_equal(read("a.aac", data=tagged), read(path))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'av'"), r'pip install "?av\b'),
        (
            ImportError("libavcodec.so.61: cannot open shared object file"),
            r"PyAV is installed, but cannot be imported \(ImportError: libavcodec\.so\.61: cannot open",
        ),
        (RuntimeError("module compiled against another ABI"), r"PyAV is installed.*another ABI"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_failed_import_of_the_extra_is_explained(tmp_path, monkeypatch, error, message):
    imported = builtins.__import__

    def missing(name, *arguments, **options):
        if name == "av":
            raise error
        return imported(name, *arguments, **options)

    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(1000))
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=rf"a\.m4a: libsndfile does not read this file.*{message}"):
        AudioReader(tmp_path / "a.m4a", RATE)


PLAYLISTS = {
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{path}'\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_opens_no_other_file(tmp_path, kind):
    pytest.importorskip("av")
    soundfile.write(tmp_path / "secret.wav", synthesize(0.5), RATE)
    (tmp_path / "a.m4a").write_text(PLAYLISTS[kind].format(path=tmp_path / "secret.wav"))
    with pytest.raises(AudioError, match="not an audio file"):
        read(tmp_path / "a.m4a")


def test_a_container_without_audio_is_refused(tmp_path):
    pytest.importorskip("av")
    ffmpeg("-f", "lavfi", "-i", "color=size=16x16:duration=0.2", "-c:v", "mpeg4", tmp_path / "a.mp4")
    with pytest.raises(AudioError, match="no audio track"):
        read(tmp_path / "a.mp4")


def amr() -> bytes:
    noise = np.random.default_rng(0)
    return b"#!AMR\n" + b"".join(b"\x3c" + noise.bytes(31) for _ in range(100))


def voc() -> bytes:
    def block(kind, data):
        return bytes([kind]) + len(data).to_bytes(3, "little") + data

    sound = np.random.default_rng(0).bytes(4000)
    header = b"Creative Voice File\x1a" + b"\x1a\0\x0a\x01\x29\x11"
    return header + block(1, b"\x83\0" + sound) + b"".join(block(2, sound) for _ in range(3)) + b"\0"


# Formats without the number of sections in a header: FFmpeg arguments, or the file; and the position of a header in
# the middle.
OPEN_ENDED = {
    "amr": (amr(), lambda data: 6 + 32 * 50),
    "voc": (voc(), lambda data: 26 + 4006 + 4004),
    "flv": (["-c:a", "aac"], lambda data: data.find(b"\x08\0", len(data) // 2)),
    "wv": (["-c:a", "wavpack"], lambda data: data.find(b"wvpk", len(data) // 3)),
    "asf": (["-c:a", "wmav2"], lambda data: data.find(b"\x82\0\0", len(data) // 2)),
    "adts": (["-c:a", "aac"], lambda data: data.find(data[:2], len(data) // 2)),
    "gsm": (["-c:a", "libgsm", "-ar", "8000"], lambda data: 33 * (len(data) // 66)),
    "mp4": (["-c:a", "aac", "-movflags", "frag_keyframe+empty_moov"], lambda data: data.rfind(b"moof") - 4),
    "webm": (["-c:a", "libopus"], lambda data: data.rfind(b"\x1f\x43\xb6\x75")),
    "rm": (["-c:a", "ac3", "-ar", "44100"], lambda data: data.find(b"DATA")),
}


@pytest.mark.parametrize("damage", ["overwritten", "moved"])
@pytest.mark.parametrize("kind", slow_after(2, OPEN_ENDED))
def test_audio_behind_a_damaged_header_is_never_dropped_silently(tmp_path, kind, damage):
    pytest.importorskip("av")
    made, middle = OPEN_ENDED[kind]
    data = made if isinstance(made, bytes) else encoded(tmp_path, kind, synthesize(3), options={kind: made})
    at = middle(data)
    assert 0 < at < len(data) - 40
    assert len(read("a", None, data=data))
    kept = at + 4 if damage == "overwritten" else at
    bad = data[:at] + b"\x7f" * 4 + data[kept:]
    with pytest.raises(AudioError, match=r"damage|was truncated|not an audio file"):
        read("a", None, data=bad)


DELAYED = {"mka": [], "webm": [], "wma": [], "mov": [], "flv": ["-ar", "44100"], "ts": ["-c:a", "mp2"]}


@pytest.mark.parametrize("suffix", slow_after(2, DELAYED))
def test_audio_that_starts_late_is_complete(tmp_path, suffix):
    pytest.importorskip("av")
    soundfile.write(tmp_path / "source.wav", synthesize(1), RATE)
    ffmpeg("-itsoffset", 2, "-i", tmp_path / "source.wav", *DELAYED[suffix], tmp_path / f"a.{suffix}")
    with AudioReader(tmp_path / f"a.{suffix}", None) as reader:
        assert reader.duration == pytest.approx(1, abs=0.1)


def without_size(data: bytes, size: int) -> bytes:
    at = data.index(bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")) + 16
    return data[:at] + size.to_bytes(8, "little") + data[at + 8 :]


@pytest.mark.parametrize("size", slow_after(2, [None, 0, 24, 50]))
def test_a_live_wma_recording_is_read_whole_and_refused_where_it_is_cut(tmp_path, size):
    """Programs that write to a pipe leave the size of the data open."""
    pytest.importorskip("av")
    soundfile.write(tmp_path / "source.wav", synthesize(3), RATE)
    data = ffmpeg("-i", tmp_path / "source.wav", "-c:a", "wmav2", "-f", "asf", "-")
    data = data if size is None else without_size(data, size)
    assert len(read("a", data=data)) > 2.9 * RATE
    with pytest.raises(AudioError, match="was truncated"):
        read("a", data=data[:-100])
