"""Tests that a file has the same samples when it is read whole, in blocks, in segments, and by libsndfile at once.

`librosa.load` reads a file with one call of libsndfile, so `soundfile.read` is the reference for it.
"""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

import nemo_lfr
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.containers.mpeg import read_frame
from nemo_lfr.io.containers.ogg import _checksum as ogg_checksum
from nemo_lfr.io.reading import read_file
from tests.models import synthesize
from tests.tiers import slow_after, slow_except

RATE = 24000
SPEECH = np.tile(read_file(Path(nemo_lfr.__file__).parent / "weights" / "speech.flac", 0, None, RATE, 100), 3)
WAVE = np.concatenate([synthesize(2, seed=1), np.zeros(4000, np.float32), synthesize(3, seed=2)])


def written(kind, wave=WAVE, **options):
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format=kind, **options)
    return file.getvalue()


def mp3(quality=0.9, mode="CONSTANT"):
    """Return MP3 audio. LAME writes a Xing header only if the bit rate varies."""
    return written("MP3", bitrate_mode=mode, compression_level=quality)


def ogg(subtype, wave=WAVE, first_sample=0, quality=0.5):
    """Return Ogg audio whose time stamps begin at `first_sample`."""
    data = bytearray(written("OGG", wave, subtype=subtype, compression_level=quality))
    at = -1
    while (at := data.find(b"OggS", at + 1)) >= 0:
        table = data[at + 27 : at + 27 + data[at + 26]]
        stop = at + 27 + len(table) + sum(table)
        (stamp,) = struct.unpack_from("<q", data, at + 6)
        if stamp > 0:
            struct.pack_into("<q", data, at + 6, stamp + first_sample)
            struct.pack_into("<I", data, at + 22, ogg_checksum(bytes(data[at:stop])))
    return bytes(data)


def with_late_end(data, count):
    """Return Ogg audio whose last page has a time stamp `count` samples after the last sample."""
    at = data.rindex(b"OggS")
    (stamp,) = struct.unpack_from("<q", data, at + 6)
    page = data[at : at + 6] + struct.pack("<q", stamp + count) + data[at + 14 :]
    return data[:at] + page[:22] + struct.pack("<I", ogg_checksum(page)) + page[26:]


def with_pre_skip(data, count):
    """Return Opus audio in Ogg whose header declares `count` samples of padding at 48 kHz before the first sample."""
    at, end = data.index(b"OpusHead") + 10, data.index(b"OggS", 1)
    page = data[:at] + struct.pack("<H", count) + data[at + 2 : end]
    return page[:22] + struct.pack("<I", ogg_checksum(page)) + page[26:] + data[end:]


def mp2(frames):
    """Return silent frames of MPEG layer 2 at 44.1 kHz; `frames` are pairs (bit rate index, padding bit)."""
    heads = [bytes([0xFF, 0xFD, rate << 4 | padding << 1, 0xC0]) for rate, padding in frames]
    return b"".join(head.ljust(read_frame(head).length, b"\0") for head in heads)


FILES = {
    "MP3": mp3(),
    "MP3 of a high bit rate": mp3(0.0),
    "MP3 of the lowest bit rate": mp3(0.99),
    "MP3 of variable bit rate": mp3(mode="VARIABLE"),
    "MP3 without its first frames": mp3()[10 * read_frame(mp3()).length :],
    "Vorbis": ogg("VORBIS"),
    "Vorbis of low quality": ogg("VORBIS", quality=0.9),
    "Vorbis in one page": ogg("VORBIS", WAVE[:3000]),
    "Vorbis in stereo": ogg("VORBIS", np.stack([WAVE, WAVE[::-1]], axis=1)),
    "Opus": ogg("OPUS"),
    "Opus of a low bit rate": ogg("OPUS", quality=1.0),
    "Opus of speech": ogg("OPUS", SPEECH, quality=0.9),
    "Opus with much padding before its first sample": with_pre_skip(ogg("OPUS"), 30000),
    "FLAC": written("FLAC"),
    "WAV with MS ADPCM": written("WAV", subtype="MS_ADPCM"),
    "WAV with GSM": written("WAV", subtype="GSM610"),
    "CAF with ALAC": written("CAF", subtype="ALAC_16"),
}
VARIABLE = mp3(mode="VARIABLE")
# Files that `soundfile.read` does not read, with files that have the same samples.
OTHERS = {
    "Opus that begins at 2 s": (ogg("OPUS", first_sample=96000), ogg("OPUS")),
    "Opus that begins at 1 ms": (ogg("OPUS", first_sample=48), ogg("OPUS")),
    "Vorbis that begins at 2 s": (ogg("VORBIS", first_sample=2 * RATE), ogg("VORBIS")),
}
# Recordings that are joined.
JOINED = {
    "Vorbis": (ogg("VORBIS"), ogg("VORBIS", WAVE[::-1])),
    "Opus": (ogg("OPUS"), ogg("OPUS", WAVE[::-1], first_sample=96000)),
    "MP3": (mp3(mode="VARIABLE"), mp3(0.99, "VARIABLE")),
    "FLAC": (written("FLAC"), written("FLAC", WAVE[::-1])),
}


def check(path, expected, positions):
    """Check that a file has the expected samples, and compare its segments with them."""
    with AudioReader(path, None) as reader:
        assert round(reader.duration * RATE) == len(expected)
        whole = np.concatenate(list(reader.blocks(0.3)))
    assert len(whole) == len(expected)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-6)
    with AudioReader(path, None) as same:
        for position in positions:
            wanted = whole[position:][: RATE // 50]
            with AudioReader(path, None) as fresh:
                for reader in (same, fresh):
                    part = reader.segment(position / RATE, 0.02)
                    assert len(part) == len(wanted), position
                    np.testing.assert_allclose(part, wanted, rtol=0, atol=1e-6, err_msg=f"at {position}")
        np.testing.assert_allclose(np.concatenate(list(same.blocks(0.7))), whole, rtol=0, atol=1e-6)


def positions_in(count, seed=0):
    rng = np.random.default_rng(seed)
    ends = [count - 1, 0, count - 100, 7, count - 2000, count - 9000]
    return [max(0, place) for place in ends] + rng.integers(0, count, 24).tolist()


@pytest.mark.parametrize("name", slow_except(FILES, "MP3", "Vorbis", "FLAC", "WAV with GSM"))
def test_whole_blocks_and_segments_have_the_samples_that_libsndfile_reads_at_once(tmp_path, name):
    path = tmp_path / "a.bin"
    path.write_bytes(FILES[name])
    expected, _ = soundfile.read(path, dtype="float32", always_2d=True)
    check(path, expected.mean(axis=1), positions_in(len(expected)))


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(1, OTHERS))
def test_time_stamps_that_do_not_begin_at_0_change_no_sample(tmp_path, name):
    data, same = OTHERS[name]
    path = tmp_path / "a.ogg"
    path.write_bytes(data)
    expected, _ = soundfile.read(io.BytesIO(same), dtype="float32")
    check(path, expected, positions_in(len(expected)))


@pytest.mark.parametrize("count", [1, 16, 1000])
def test_vorbis_whose_last_time_stamp_is_late_has_the_samples_of_its_packets(count):
    expected, _ = soundfile.read(io.BytesIO(ogg("VORBIS")), dtype="float32")
    with AudioReader("a", None, data=with_late_end(ogg("VORBIS"), count)) as reader:
        wave = np.concatenate(list(reader.blocks(0.3)))
        assert len(expected) <= len(wave) <= len(expected) + count
        np.testing.assert_allclose(wave[: len(expected)], expected, rtol=0, atol=1e-6)
        part = reader.segment((len(expected) - 500) / RATE, 1.0)
        np.testing.assert_allclose(part, wave[len(expected) - 500 :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", slow_after(1, JOINED))
def test_segments_of_joined_recordings_are_those_of_each(tmp_path, name):
    parts = []
    for data in JOINED[name]:
        with AudioReader("a", None, data=data) as reader:
            parts.extend(reader.blocks())
    expected = np.concatenate(parts)
    path = tmp_path / "a.bin"
    path.write_bytes(b"".join(JOINED[name]))
    seam = [len(expected) // 2 + place for place in (-3000, -300, 0, 300)]
    check(path, expected, seam + positions_in(len(expected)))


def test_mp3_frames_after_those_that_its_header_declares_do_not_shift_the_others():
    with AudioReader("a", None, data=VARIABLE) as reader:
        first = np.concatenate(list(reader.blocks()))
    with AudioReader("a", None, data=VARIABLE + mp3()) as reader:
        both = np.concatenate(list(reader.blocks()))
    assert len(both) > 2 * len(first)
    # The last frame of the first recording overlaps the next one.
    np.testing.assert_allclose(both[: len(first) - 1152], first[:-1152], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "frames",
    [
        [(8, index % 24 > 0) for index in range(100)],  # the size of most frames is rounded up
        [(8, index % 24 > 0) for index in range(1, 100)],
        [(8, 0)] * 100,
        [(14, 0)] + [(4, 0)] * 99,
        [(4, 0)] + [(14, 0)] * 99,
    ],
)
def test_the_duration_of_layer_2_is_that_of_its_frames(frames):
    with AudioReader("a", None, data=mp2(frames)) as reader:
        assert round(reader.duration * 44100) == 1152 * len(frames)
        assert sum(map(len, reader.blocks())) == 1152 * len(frames)
