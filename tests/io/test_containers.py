"""Tests of files with wrong headers: all samples that can be decoded are read, or an error says what is missing."""

import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.containers import cache, find_streams
from nemo_lfr.io.containers.ogg import _checksum as ogg_checksum
from nemo_lfr.io.resampling import count_samples
from tests.models import synthesize

RATE = 22050
WAVE = synthesize(1.5, seed=1)
OTHER = synthesize(0.7, seed=2)


ID3 = b"ID3\x03\0\0\0\0\x02\0" + bytes(256)


def written(wave=WAVE, rate=RATE, **options):
    file = io.BytesIO()
    soundfile.write(file, wave, rate, **{"format": "WAV", **options})
    return file.getvalue()


def pcm(wave=WAVE):
    return (np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes()


def chunk(name, data, size=None, pad=True):
    size = len(data) if size is None else size
    return name + struct.pack("<I", size) + data + (b"\0" if pad and len(data) % 2 else b"")


def wav(*chunks, riff=None, rate=RATE, align=2, byte_rate=None):
    form = struct.pack("<HHIIHH", 1, 1, rate, byte_rate or rate * 2, align, 16)
    body = b"WAVE" + chunk(b"fmt ", form) + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def without_bits(data):
    """Return a WAV file whose `fmt ` chunk ends before the number of bits per sample."""
    return patched(data[:34] + data[36:], (16, struct.pack("<I", 14)))


def rf64(size, data_size=0xFFFFFFFF):
    data = pcm()
    ds64 = struct.pack("<QQQI", len(data) + 80, size, 0, 0)
    form = struct.pack("<HHIIHH", 1, 1, RATE, RATE * 2, 2, 16)
    body = b"WAVE" + chunk(b"ds64", ds64) + chunk(b"fmt ", form) + chunk(b"data", data, data_size)
    return b"RF64" + struct.pack("<I", 0xFFFFFFFF) + body


def patched(data, *patches):
    data = bytearray(data)
    for position, value in patches:
        data[position : position + len(value)] = value
    return bytes(data)


def flac(wave=WAVE, known=True):
    data = written(wave, format="FLAC")
    return data if known else patched(data, (21, bytes([data[21] & 0xF0])), (22, bytes(4)))


def au(length, wave=WAVE):
    return patched(written(wave, format="AU"), (8, struct.pack(">I", length)))


def aiff(zero):
    data = written(format="AIFF")
    if not zero:
        return data
    common, samples = data.index(b"COMM"), data.index(b"SSND")
    return patched(data, (common + 10, bytes(4)), (samples + 4, bytes(4)))


def aiff_of(length):
    data = written(format="AIFF")
    return patched(data, (data.index(b"SSND") + 4, struct.pack(">I", length)))


def caf(length):
    data = written(format="CAF", subtype="PCM_16")
    return patched(data, (data.index(b"data") + 4, struct.pack(">q", length)))


def voc(pieces):
    """Return a VOC file as FFmpeg writes it, with the samples in separate blocks."""
    blocks = []
    for index, piece in enumerate(pieces):
        fields = b"" if index else struct.pack("<IBBHI", RATE, 16, 1, 4, 0)
        size = len(fields) + len(piece)
        blocks.append(bytes([2 if index else 9]) + size.to_bytes(3, "little") + fields + piece)
    return written(format="VOC", subtype="PCM_16")[:26] + b"".join(blocks) + b"\0"


SIZE = 2 * len(WAVE)
LIKE_A_NAME = b"abcd\xff\x7f\xff\x7f"
LIKE_A_CHUNK = b"abcd\x10\0\0\0"
SILENCE = wav(chunk(b"data", bytes(4000), 0))
# Files that contain exactly the 16-bit samples of WAVE.
WHOLE = {
    "plain": wav(chunk(b"data", pcm())),
    "RIFF size of the whole file": wav(chunk(b"data", pcm()), riff=SIZE + 44),
    "RIFF size 0": wav(chunk(b"data", pcm()), riff=0),
    "RIFF size unknown": wav(chunk(b"data", pcm()), riff=0xFFFFFFFF),
    "data size 0": wav(chunk(b"data", pcm(), 0), riff=36),
    "data size unknown": wav(chunk(b"data", pcm(), 0xFFFFFFFF), riff=0xFFFFFFFF),
    "data size of sox into a pipe": wav(chunk(b"data", pcm(), 0x7FFFFFFF - 36), riff=0x7FFFFFFF),
    "data size of a quarter": wav(chunk(b"data", pcm(), SIZE // 4 // 2 * 2), riff=SIZE // 4 + 36),
    "data size of the whole file": wav(chunk(b"data", pcm(), SIZE + 44)),
    "data size of the RIFF chunk": wav(chunk(b"data", pcm(), SIZE + 36)),
    "byte rate of another format": wav(chunk(b"data", pcm()), byte_rate=8000),
    "wrong fact chunk": wav(chunk(b"fact", struct.pack("<I", 7)), chunk(b"data", pcm())),
    "list before": wav(chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0"), chunk(b"data", pcm())),
    "chunk without a name in ASCII before": wav(chunk(b"\xa9xyz", b"abc"), chunk(b"data", pcm())),
    "short acid chunk before": wav(chunk(b"acid", b"1234"), chunk(b"data", pcm())),
    "short bext chunk after": wav(chunk(b"data", pcm()), chunk(b"bext", b"1234")),
    "list of unknown type before": wav(chunk(b"LIST", b"\xff" * 27), chunk(b"data", pcm())),
    "list after": wav(chunk(b"data", pcm()), chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0")),
    "chunk without a name in ASCII after a list": wav(
        chunk(b"data", pcm()), chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0"), chunk(b"\xa9xyz", b"A" * 5000)
    ),
    "bytes after a list": wav(chunk(b"data", pcm()), chunk(b"LIST", b"INFO")) + b"\xff\0\x12\x88" * 999,
    "text after a list": wav(chunk(b"data", pcm()), chunk(b"LIST", b"INFO")) + b"-----BEGIN PGP SIGNATURE-----" * 9,
    "ID3 after": wav(chunk(b"data", pcm()), chunk(b"id3 ", b"ID3\x04\0\0\0\0\0\0" * 40)),
    "tag after the RIFF chunk": wav(chunk(b"data", pcm())) + b"TAG" + b"title".ljust(125, b"\0"),
    "zeros after the RIFF chunk": wav(chunk(b"data", pcm())) + bytes(512),
    "zeros before the data chunk": wav(b"\0" * 16, chunk(b"data", pcm())),
    "odd chunk without its pad byte": wav(chunk(b"note", b"abc", pad=False), chunk(b"data", pcm())),
    "two data chunks": wav(chunk(b"data", pcm()[:2000]), chunk(b"JUNK", b"12"), chunk(b"data", pcm()[2000:])),
    "RF64": rf64(SIZE),
    "RF64 whose long size is unknown": rf64(0),
    "RF64 with a short size, and a long size of 0": rf64(0, SIZE),
    "RF64 with a short size of 0, and a chunk behind": rf64(SIZE, 0) + chunk(b"bext", b"1234" * 50),
    "RF64 with a short size, and a long size of half of it": rf64(SIZE // 4 * 2, SIZE),
    "BW64": b"BW64" + rf64(SIZE)[4:],
    "FLAC": flac(),
    "FLAC of unknown length": flac(known=False),
    "AU of unknown length": au(0xFFFFFFFF),
    "AU of length 0": au(0),
    "AU of half its length": au(SIZE // 2),
    "AIFF of length 0": aiff(zero=True),
    "AIFF of sox into a pipe": aiff_of(0x7F000008),
    "AIFF with a copyright behind": aiff(zero=False) + b"(c) \0\0\0\x14" + b"1989 A long company.",
    "AIFF with a copyright before": aiff(zero=False).replace(b"COMM", b"(c) \0\0\0\x0a1989 A manCOMM"),
    "AIFF with an invalid CHAN chunk": aiff(zero=False).replace(b"SSND", b"CHAN\0\0\0\x0e" + b"1" * 14 + b"SSND"),
    "CAF with a short peak chunk": written(format="CAF", subtype="ALAC_16").replace(
        b"data", b"peak\0\0\0\0\0\0\0\x041234data"
    ),
    "CAF of unknown length": caf(-1),
    "CAF of length 0": caf(0),
    "CAF of half its length": caf(SIZE // 4 * 2 + 4),
    "AIFF of half its length": aiff_of(SIZE // 4 * 2 + 8),
    "FLAC of half its length": patched(flac(), (22, struct.pack(">I", len(WAVE) // 2))),
    "FLAC with an ID3 tag behind": flac() + b"TAG".ljust(128, b"\0"),
    "FLAC with an APE tag behind": flac() + b"APETAGEX" + struct.pack("<4I", 2000, 32, 0, 0) + bytes(8),
    "FLAC with an ID3 tag before": ID3 + flac(),
    "FLAC of unknown length with an ID3 tag before": ID3 + flac(known=False),
    "SPHERE": written(format="NIST"),
    "SPHERE without the size of its samples": written(format="NIST").replace(b"sample_n_bytes", b"sample_x_bytes"),
    "SPHERE of 100 samples": written(format="NIST").replace(b"-i 33075\nend_head\n", b"-i 100\nend_head\n\0\0"),
    "VOC": written(format="VOC", subtype="PCM_16"),
    "VOC with a repetition": voc([pcm()])[:26] + b"\6\2\0\0\2\0" + voc([pcm()])[26:-1] + b"\7\0\0\0\0",
    "VOC in several blocks": voc([pcm()[:3000], pcm()[3000:9000], pcm()[9000:]]),
    "8SVX": written(format="SVX"),
    "AVR": written(format="AVR"),
    "data size of a quarter, then bytes like a name": wav(
        chunk(b"data", patched(pcm(), (SIZE // 4 // 2 * 2, LIKE_A_NAME)), SIZE // 4 // 2 * 2)
    ),
    "data size of a quarter, then bytes like a chunk": wav(
        chunk(b"data", patched(pcm(), (SIZE // 4 // 2 * 2, LIKE_A_CHUNK)), SIZE // 4 // 2 * 2)
    ),
    "unknown chunks after": wav(chunk(b"data", pcm()), chunk(b"abcd", bytes(16)), chunk(b"efgh", bytes(range(1, 31)))),
    "FLAC with zeros behind": flac() + bytes(500),
    "WAV with two ID3 tags before": ID3 * 2 + wav(chunk(b"data", pcm())),
    "WAV with an ID3 tag before": ID3 + wav(chunk(b"data", pcm())),
    "WAV without the number of bits per sample": without_bits(wav(chunk(b"data", pcm()))),
}


def read(data, rate=RATE, block=10.0):
    with AudioReader("a.wav", rate, data=data) as reader:
        duration = reader.duration
        wave = np.concatenate([np.zeros(0, np.float32), *reader.blocks(block)])
    assert abs(duration - len(wave) / rate) < 2 / rate
    return wave


@pytest.mark.parametrize("name", WHOLE)
def test_wrong_header_loses_no_sample(tmp_path, name):
    wave = read(WHOLE[name])
    assert len(wave) == len(WAVE)
    expected = WAVE.copy()
    if name.startswith("data size of a quarter, then bytes like a"):
        odd = LIKE_A_NAME if name.endswith("name") else LIKE_A_CHUNK
        expected[SIZE // 8 :][:4] = np.frombuffer(odd, "<i2") / 32768
    np.testing.assert_allclose(wave, expected, rtol=0, atol=2**-14)  # a step of 16 bits, written by two conventions
    (tmp_path / "a.bin").write_bytes(WHOLE[name])
    with AudioReader(tmp_path / "a.bin", RATE) as reader:
        assert np.array_equal(np.concatenate(list(reader.blocks(0.1))), wave)
        part = reader.segment(0.5, 0.25)
    assert np.array_equal(part, wave[RATE // 2 : RATE // 2 + len(part)]) and len(part) == count_samples(0.25, RATE)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_ffmpeg_reads_the_same_samples(tmp_path, name):
    """FFmpeg may stop at the end that a header states, but the samples that it reads must equal ours."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        pytest.skip("FFmpeg is not installed")
    if name == "two data chunks":
        pytest.skip("FFmpeg reads the last data chunk only")
    if name == "WAV without the number of bits per sample":
        pytest.skip("FFmpeg assumes 8 bits")
    (tmp_path / "a.bin").write_bytes(WHOLE[name])
    command = [ffmpeg, "-v", "error", "-i", tmp_path / "a.bin", "-f", "f32le", "-ac", "1", "-"]
    expected = np.frombuffer(subprocess.run(command, capture_output=True).stdout, "<f4")
    wave = read(WHOLE[name])
    assert len(expected) <= len(wave)
    np.testing.assert_allclose(wave[: len(expected)], expected, rtol=0, atol=2**-14)


def test_silence_after_a_data_size_of_0_is_read():
    assert len(read(SILENCE)) == 2000


def test_samples_that_look_like_the_name_of_a_chunk_are_read():
    letters = b"RMS " * 1000
    assert len(read(wav(chunk(b"data", letters, 0)))) == 2000
    assert len(read(wav(chunk(b"data", pcm()), chunk(b"RMS ", letters)))) == len(WAVE)


@pytest.mark.parametrize("tail", [b"", b"TAG".ljust(128, b"\0")])
@pytest.mark.parametrize("before", [bytes(3000), b"<html>302</html>\n" * 50, b"\xff\xfb\x90" * 100])
def test_mp3_that_begins_with_something_else_is_read_to_the_end(tmp_path, caplog, before, tail):
    data = written(format="MP3")
    (tmp_path / "a.mp3").write_bytes(before + data + tail)
    with AudioReader(tmp_path / "a.mp3", RATE) as reader:
        assert np.array_equal(np.concatenate(list(reader.blocks())), read(data))
    assert (f"the {len(before)} bytes before the first MPEG frame are ignored" in caplog.text) == any(before)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100])
def test_mp3_with_damage_in_the_header_of_its_encoder_is_read_to_the_end(rate, capfd):
    """libmpg123 takes such a header for audio and estimates the length, which is too short at low rates."""
    data = written(rate=rate, format="MP3")
    expected = read(data, rate)
    for at in (6, 9, 12):
        assert np.array_equal(read(patched(data, (at, b"\xff")), rate), expected)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("count", [1, 2])
def test_mp3_in_wav_is_decoded_as_mp3(count):
    mp3 = written(format="MP3")
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 8000, 1, 0, 12, 1, 2, 1152, 1, 0)
    body = b"WAVE" + chunk(b"fmt ", form) + chunk(b"fact", struct.pack("<I", 7)) + chunk(b"data", mp3)
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    assert np.array_equal(read(data * count), np.tile(read(mp3), count))
    with pytest.raises(AudioError, match="was truncated"):
        read(data[:-1000])


# Position and format of the size of the audio. The position counts from the name of a chunk.
SIZES = {
    "WAV": (b"data", 4, "<I"),
    "W64": (b"data\xf3", 16, "<q"),
    "AIFF": (b"SSND", 4, ">I"),
    "CAF": (b"data", 4, ">q"),
    "AU": (b".snd", 8, ">I"),
}


def by_name(kind, subtype, channels=1):
    """Return a file of 16000 samples. libsndfile cannot write every codec to a file object."""
    wave = WAVE[:16000] if channels == 1 else np.stack([WAVE[:16000]] * channels, axis=1)
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(f"{folder}/a", wave, 16000, format=kind, subtype=subtype)
        return Path(folder, "a").read_bytes()


def shortened(data, kind, lost, size=None):
    """Remove the last `lost` bytes of audio, and declare the new size, or another `size`."""
    name, skipped, form = SIZES[kind]
    position = data.index(name) + skipped
    (old,) = struct.unpack_from(form, data, position)
    begin = 24 if kind == "AU" else position + struct.calcsize(form)
    end = begin + old - (24 if kind == "W64" else 0)
    kept = data[: end - lost] + bytes((old - lost) % 2 if kind in ("WAV", "AIFF") else 0) + data[end:]
    kept = patched(kept, (position, struct.pack(form, old - lost if size is None else size)))
    return patched(kept, (4, struct.pack("<I", len(kept) - 8))) if kind == "WAV" else kept


def inserted(data, position, new):
    return data[:position] + new + data[position:]


def bare_mp3(wave=WAVE):
    data = written(wave, format="MP3")
    return data[data.index(data[:2], 2) :]  # the first frame contains the header and no audio


CUT = {
    "WAV": wav(chunk(b"data", pcm()))[:-1000],
    "WAV without its last sample": wav(chunk(b"data", pcm()))[:-2],
    "WAV without as many bytes as its header has": wav(chunk(b"data", pcm()))[:-44],
    "WAV without as many bytes as its header has after the RIFF size": wav(chunk(b"data", pcm()))[:-36],
    "RF64": rf64(SIZE)[:-1000],
    "RF64 without as many bytes as its header has": rf64(SIZE)[:-80],
    "RF64 without as many bytes as its header has after the RIFF size": rf64(SIZE)[:-72],
    "DWVW with a damaged end": patched(by_name("AIFF", "DWVW_16"), (-300, bytes(300))),
    "ALAC without its last packet": shortened(by_name("CAF", "ALAC_16"), "CAF", 1000),
    "SDS of unknown length": patched(written(format="SDS"), (10, bytes(3))),
    "AU": au(SIZE)[:-1000],
    "AIFF": aiff(zero=False)[:-1000],
    "CAF": caf(SIZE + 4)[:-1000],
    "FLAC": flac()[:-1000],
    "FLAC of unknown length": flac(known=False)[:-1000],
    "second of two FLACs": flac() + flac(OTHER)[:-1000],
    "Vorbis": written(format="OGG", subtype="VORBIS")[:-3000],
    "half of Opus": written(format="OGG", subtype="OPUS", rate=24000)[:4000],
    "MP3": written(format="MP3")[:-1000],
    "second of two MP3s": written(format="MP3") + written(OTHER, format="MP3")[:-1000],
    "MP3 without a header of its encoder, with a hole": bare_mp3()[:1500] + bare_mp3()[2100:],
    "MP3 without a header of its encoder, with zeros": patched(bare_mp3(), (1500, bytes(600))),
    "MP3 with a header of its encoder, with inserted bytes": inserted(written(format="MP3"), 1500, b"\x55" * 3000),
    "WAV without its data chunk": wav(),
    "WAV without its format": b"RIFF\0\0\0\0WAVE" + chunk(b"data", pcm()),
    "WAV within the name of its data chunk": wav(chunk(b"data", pcm()))[:42],
    "SPHERE": written(format="NIST")[:-1000],
    "VOC": written(format="VOC")[:-1000],
    "8SVX": written(format="SVX")[:-1000],
    "AVR": written(format="AVR")[:-1000],
    "FLAC within its header": flac()[:30],
    "AU within its header": au(SIZE)[:20],
    "AIFF within its header": aiff(zero=False)[:30],
}
# Formats of libsndfile, each with a sample rate that it supports.
RARE = {
    "AIFF": 22050, "AU": 22050, "AVR": 22050, "CAF": 22050, "HTK": 20000, "IRCAM": 22050, "MAT4": 22050, "MAT5": 22050,
    "MPC2K": 44100, "NIST": 22050, "PAF": 22050, "PVF": 22050, "RF64": 22050, "SDS": 22050, "SVX": 22050, "VOC": 22050,
    "W64": 22050, "WAVEX": 22050, "WVE": 8000, "XI": 44100,
}  # fmt: skip
NO_LENGTH = {"IRCAM", "PAF", "PVF"}  # truncation is only detectable within a sample


@pytest.mark.parametrize("name", CUT)
def test_a_stream_that_is_cut_is_refused(name):
    with pytest.raises(AudioError, match=r"a\.wav: the audio (was truncated|is damaged)"):
        read(CUT[name])


def test_samples_in_a_list_are_refused_as_not_supported():
    with pytest.raises(AudioError, match=r"a\.wav: the samples .* LIST chunk of the type wavl, .* one data chunk"):
        read(wav(chunk(b"LIST", b"wavl" + chunk(b"data", pcm()))))


def rare(kind, channels=1):
    """Write a file in a rare format, in stereo if the format supports it."""
    wave = WAVE if channels == 1 else np.stack([WAVE] * channels, axis=1)
    subtype = "PCM_16" if "PCM_16" in soundfile.available_subtypes(kind) else None
    data = written(wave, RARE[kind], format=kind, subtype=subtype)
    if kind == "XI":  # libsndfile leaves its length open
        data = patched(data, (298, struct.pack("<I", 2 * len(WAVE))))
    return data


@pytest.mark.parametrize("kind", RARE)
def test_every_format_is_complete_or_reported_as_truncated(kind):
    assert len(read(rare(kind), RARE[kind])) == len(WAVE)
    for taken in (3, 1001, len(rare(kind)) * 2 // 3):
        if kind in NO_LENGTH and (len(rare(kind)) - taken) % 2 == 0:
            taken += 1
        with pytest.raises(AudioError, match=r"was truncated: its (header|last sample)"):
            read(rare(kind)[:-taken], RARE[kind])
    for size in (9, 12) if kind == "PVF" else (20, 30):
        with pytest.raises(AudioError, match=r"truncated|not an audio file"):
            read(rare(kind)[:size], RARE[kind])


# Position of the length in the header of some formats, or the name before it, and the size of the length in bytes.
LENGTHS = {"AVR": (26, 4), "MPC2K": (30, 4), "NIST": (b"sample_count -i ", 5), "SVX": (b"BODY", 4), "XI": (298, 4)}


def rare_of_unknown_length(kind):
    data = rare(kind)
    if kind not in LENGTHS:
        return data
    position, size = LENGTHS[kind]
    position = data.index(position) + len(position) if isinstance(position, bytes) else position
    return patched(data, (position, b"0".rjust(size, b"0") if kind == "NIST" else bytes(size)))


@pytest.mark.parametrize("kind", sorted(NO_LENGTH | set(LENGTHS)))
@pytest.mark.parametrize("size", [len(WAVE), len(WAVE) // 2])
def test_a_file_without_a_length_is_read_with_a_warning(kind, size, caplog):
    data = rare_of_unknown_length(kind)[: 2 * (size - len(WAVE)) or None]
    warning = "its header declares no length, so it is unknown whether the file is complete"
    assert len(read(data, RARE[kind])) == size
    assert caplog.text.count(warning) == 1
    with AudioReader("a", RARE[kind], data) as reader:
        assert len(reader.segment(0.0, 0.01)) < size
        assert caplog.text.count(warning) == 1
        assert len(reader.segment(0.0, reader.duration)) == size
    assert caplog.text.count(warning) == 2


@pytest.mark.parametrize("kind", ["AVR", "IRCAM", "MAT4", "MAT5", "PAF", "PVF", "W64", "CAF"])
def test_stereo_of_rare_formats_is_complete(kind):
    assert len(read(rare(kind, 2), RARE[kind])) == len(WAVE)
    with pytest.raises(AudioError, match=r"was truncated: its (header|last sample)"):
        read(rare(kind, 2)[:-11], RARE[kind])


@pytest.mark.parametrize("damage", ["a byte", "a page"])
def test_damage_within_ogg_is_refused(damage):
    data = bytearray(written(synthesize(8), format="OGG", subtype="VORBIS"))
    pages = [position for position in range(len(data)) if data[position : position + 4] == b"OggS"]
    assert len(pages) > 5
    if damage == "a byte":
        data[pages[4] + 100] ^= 1
    else:
        del data[pages[3] : pages[4]]
    with pytest.raises(AudioError, match="is damaged"):
        read(bytes(data))


# Codecs that store audio in blocks: format, codec, channels, number of missing bytes at the end of the last block,
# number of samples in these bytes.
SHORT_BLOCKS = [
    ("WAV", "IMA_ADPCM", 1, 100, 200),
    ("WAV", "IMA_ADPCM", 2, 96, 96),
    ("WAV", "IMA_ADPCM", 1, 510, 1017),
    ("WAV", "MS_ADPCM", 1, 100, 200),
    ("WAV", "MS_ADPCM", 2, 98, 98),
    ("WAV", "MS_ADPCM", 1, 510, 1012),
    ("WAV", "GSM610", 1, 16, 160),
    ("WAV", "GSM610", 1, 40, 320),
    ("WAV", "G721_32", 1, 34, 68),
    ("WAV", "NMS_ADPCM_16", 1, 2, 160),
    ("WAV", "NMS_ADPCM_32", 1, 80, 160),
    ("W64", "IMA_ADPCM", 2, 96, 96),
    ("W64", "MS_ADPCM", 2, 98, 98),
    ("W64", "GSM610", 1, 15, 160),
    ("AIFF", "IMA_ADPCM", 1, 3, 64),
    ("AIFF", "IMA_ADPCM", 2, 33, 64),
    ("AIFF", "GSM610", 1, 3, 160),
    ("AU", "G721_32", 1, 34, 68),
    ("AU", "G723_24", 1, 30, 80),
    ("AU", "G723_40", 1, 33, 53),
]
UNKNOWN = {"WAV": 0xFFFFFFFF, "AU": 0xFFFFFFFF, "AIFF": 0, "W64": -1}


@pytest.mark.parametrize(("kind", "subtype", "channels", "lost", "missing"), SHORT_BLOCKS)
def test_all_samples_of_a_short_last_block_are_read(kind, subtype, channels, lost, missing, caplog):
    data = by_name(kind, subtype, channels)
    whole = read(data, 16000)
    files = [shortened(data, kind, lost)]
    is_reported = subtype.startswith(("GSM", "NMS")) or kind == "AIFF" or lost == 510
    if (kind, subtype) != ("AIFF", "GSM610"):
        files.append(shortened(data, kind, lost, UNKNOWN[kind]))
    for file in files:
        caplog.clear()
        wave = read(file, 16000)
        assert len(wave) == len(whole) - missing
        assert np.array_equal(wave, whole[: len(wave)])
        assert is_reported == ("the last block of the audio is incomplete" in caplog.text)
        with AudioReader("a", 16000, data=file) as reader:
            part = reader.segment(len(wave) / 16000 - 0.05, 1.0)
        assert np.array_equal(part, wave[-800:])


@pytest.mark.parametrize("blocks", [1, 2, 25])
@pytest.mark.parametrize("counted", [False, True], ids=["after the chunk", "in the chunk"])
def test_the_padding_byte_of_gsm_is_no_block(blocks, counted, caplog):
    data = bytearray(written(synthesize(1)[: 320 * blocks], 8000, format="WAV", subtype="GSM610"))
    at = data.index(b"data") + 4
    assert len(data) == at + 4 + 65 * blocks + blocks % 2
    struct.pack_into("<I", data, at, 65 * blocks + (blocks % 2) * counted)
    with AudioReader("a", None, data=bytes(data)) as reader:
        assert sum(map(len, reader.blocks())) == 320 * blocks
    assert not caplog.text


def w64(subtype, channels=1):
    """Return Wave64 audio with an extended description of the samples, as FFmpeg writes it."""
    file = io.BytesIO()
    soundfile.write(file, np.repeat(WAVE[:, None], channels, 1), RATE, format="WAVEX", subtype=subtype)
    data = file.getvalue()
    tail = bytes.fromhex("f3acd3118cd100c04f8edb8a")
    form = data[data.index(b"fmt ") + 8 :][:40]
    samples = data[data.index(b"data") + 8 :]
    body = b"wave" + tail
    for name, content in ((b"fmt ", form), (b"data", samples)):
        body += name + tail + struct.pack("<q", 24 + len(content)) + content + bytes(-len(content) % 8)
    return b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000") + struct.pack("<q", 24 + len(body)) + body


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wave64_with_an_extended_description_has_its_samples(subtype, channels):
    with AudioReader("a", None, data=w64(subtype, channels)) as reader:
        wave = np.concatenate(list(reader.blocks()))
    np.testing.assert_allclose(wave, WAVE, rtol=0, atol=2**-15)


@pytest.mark.parametrize("subtype", ["IMA_ADPCM", "MS_ADPCM", "GSM610"])
def test_a_wrong_number_of_samples_per_block_is_ignored(subtype):
    pytest.importorskip("av")  # libsndfile refuses such a file with MS ADPCM
    data = shortened(by_name("WAV", subtype), "WAV", 16)
    wave = read(patched(data, (data.index(b"fmt ") + 26, b"\1\0")), 16000)
    np.testing.assert_allclose(wave, read(data, 16000), rtol=0, atol=0.01)  # decoders of MS ADPCM round differently


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "subtype", "channels", "lost", "missing"), SHORT_BLOCKS)
def test_ffmpeg_reads_as_many_samples_of_a_short_last_block(tmp_path, kind, subtype, channels, lost, missing):
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        pytest.skip("FFmpeg is not installed")
    if subtype.startswith("NMS"):
        pytest.skip("FFmpeg has no decoder for this codec")
    file = shortened(by_name(kind, subtype, channels), kind, lost)
    (tmp_path / "a.bin").write_bytes(file)
    command = [ffmpeg, "-v", "error", "-i", tmp_path / "a.bin", "-f", "f32le", "-ac", "1", "-"]
    expected = np.frombuffer(subprocess.run(command, capture_output=True).stdout, "<f4")
    wave = read(file, 16000)
    # FFmpeg decodes no incomplete block of GSM, not even the first of its two frames.
    assert len(wave) - len(expected) == (160 if subtype == "GSM610" and missing == 160 and kind != "AIFF" else 0)


@pytest.mark.parametrize("subtype", ["PCM_U8", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "GSM610", "DWVW_16"])
@pytest.mark.parametrize("size", [0, 1604])
def test_compressed_aiff_of_unknown_or_wrong_length_is_read_whole_or_refused(subtype, size):
    data = by_name("AIFF", subtype)
    file = shortened(data, "AIFF", 0, size)
    file = patched(file, (file.index(b"COMM") + 10, bytes(4))) if not size else file
    if subtype in ("GSM610", "DWVW_16"):
        with pytest.raises(AudioError, match="has no length in its header" if not size else "is damaged: its header"):
            read(file, 16000)
    else:
        assert np.array_equal(read(file, 16000), read(data, 16000))


JOINED = {
    "WAV": {},
    "FLAC": {"format": "FLAC"},
    "Vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "Opus": {"format": "OGG", "subtype": "OPUS"},
    "MP3": {"format": "MP3"},
    "MP3 of variable rate": {"format": "MP3", "bitrate_mode": "VARIABLE"},
}


@pytest.mark.parametrize("kind", JOINED)
@pytest.mark.parametrize("rates", [(24000, 24000, 24000), (24000, 48000, 24000)])
def test_recordings_joined_by_cat_are_read_one_after_the_other(kind, rates):
    files = [
        written(wave, rate, **JOINED[kind])
        for wave, rate in zip((WAVE, OTHER, WAVE[: len(WAVE) // 2]), rates, strict=True)
    ]
    alone = [read(data, 24000) for data in files]
    joined = read(b"".join(files), 24000)
    assert len(joined) == sum(map(len, alone))
    np.testing.assert_allclose(joined, np.concatenate(alone), rtol=0, atol=1e-6)
    with AudioReader("a", 24000, data=b"".join(files)) as reader:
        start = len(alone[0]) / 24000
        part = reader.segment(start - 0.01, 0.02)  # over the first seam
    assert len(part) == 480
    if len(set(rates)) == 1 and kind in ("WAV", "FLAC"):
        np.testing.assert_allclose(part, joined[len(alone[0]) - 240 :][:480], rtol=0, atol=1e-6)


def without_rate(data):
    """Return Opus audio whose header declares no input rate."""
    at, end = data.index(b"OpusHead") + 12, data.index(b"OggS", 1)
    page = patched(data[:end], (at, bytes(4)))
    return patched(page, (22, struct.pack("<I", ogg_checksum(page)))) + data[end:]


def test_opus_without_an_input_rate_is_decoded_at_the_full_rate():
    """libsndfile alone would decode it at 8 kHz."""
    data = written(rate=48000, format="OGG", subtype="OPUS")
    assert np.array_equal(read(without_rate(data)), read(data))
    assert np.array_equal(read(without_rate(data) * 2), read(data * 2))


def test_mp3_without_a_header_of_its_encoder_is_read_to_the_end():
    data = written(synthesize(6), format="MP3", bitrate_mode="VARIABLE")
    whole = read(data)
    second = data.index(data[:2], 2)  # the first frame contains the header and no audio
    wave = read(data[second:])
    # Without the header the delay of the encoder is unknown, so it is not removed.
    assert len(whole) <= len(wave) <= len(whole) + 3 * 1152


def test_mp3_ending_within_a_frame_is_read_with_a_warning(caplog, capfd):
    """Recorded streams end like this; FFmpeg and librosa read them too."""
    data = bare_mp3()
    wave = read(data)
    assert not caplog.records
    part = read(data[:-100])
    assert len(wave) - 1152 <= len(part) < len(wave) and np.array_equal(part[:-576], wave[: len(part) - 576])
    assert "a.wav: the audio ends within a frame" in caplog.text and len(caplog.records) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("make", [flac, bare_mp3, lambda: written(format="MP3")])
def test_bytes_after_the_last_frame_are_logged_but_not_printed(make, caplog, capfd):
    wave = read(make())
    assert np.array_equal(read(make() + np.random.default_rng(0).bytes(3000)), wave)
    assert "ignored" in caplog.text and len(caplog.records) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("promised", [len(WAVE) + 1, 10 * len(WAVE), (1 << 36) - 1])
def test_flac_with_fewer_samples_than_declared_is_truncated(promised):
    data = flac()
    data = patched(
        data, (21, bytes([data[21] & 0xF0 | promised >> 32])), (22, struct.pack(">I", promised & 0xFFFFFFFF))
    )
    with pytest.raises(
        AudioError, match=f"was truncated: its header declares {promised} samples, but there are {len(WAVE)}"
    ):
        read(data)


def test_mp3_that_begins_and_ends_within_a_frame_is_read(caplog):
    """A part of a recorded stream begins and ends within frames."""
    data = bare_mp3()
    assert len(read(data)) - len(read(data[150:-100])) in (576 * 2, 576 * 3, 576 * 4)  # whole frames
    assert "ends within a frame" in caplog.text


def test_wav_with_a_tag_between_recordings_is_read_whole():
    data = wav(chunk(b"data", pcm()))
    for between in (b"TAG".ljust(128, b"x"), bytes(300), ID3):
        assert len(read(data + between + data)) == 2 * len(WAVE)


def test_mp3_that_goes_from_mono_to_stereo_is_read():
    mono, stereo = bare_mp3(), bare_mp3(np.stack([WAVE, WAVE], axis=1))
    assert len(read(mono + stereo)) == len(read(mono)) + len(read(stereo))


def test_mp3_with_a_tag_between_frames_is_read_completely():
    data = bare_mp3()
    frame = data.index(data[:2], data.index(data[:2], 2) + 2)  # the two frames before it show that this is MP3
    assert len(read(data[:frame] + b"TAG".ljust(128, b"x") + data[frame:])) == len(read(data))


def test_mp3_with_tags_around_it_is_read_once():
    data = written(format="MP3")
    tag = b"ID3\x03\0\0\0\0\x02\0" + bytes(256)
    expected = read(data)
    assert np.array_equal(read(tag + data + b"TAG".ljust(128, b"\0")), expected)
    assert len(read(tag + data + tag + data)) == 2 * len(expected)


@pytest.mark.slow
def test_more_joined_recordings_than_python_allows_nested_calls_are_read():
    count = sys.getrecursionlimit() + 100
    assert len(read(written(WAVE[:10]) * count)) == 10 * count


@pytest.mark.parametrize(
    "data",
    [
        b".snd",
        b"dns.\0",
        b"FORM\0\0\0\0AIFF",
        b"caff\0\1\0\0data",
        b"riff",
        b"OggS",
        b"fLaC\0\0\0\x22" + bytes(34),
        b"ID3",
        b"RIFX\0\0\0\0WAVEfmt \0\0\0\0data\0\0\0\0",
        b"RIFF\0\0\0\0WAVEfmt \xf0\xff\xff\xff" + bytes(40),
        written(format="MP3") + written(format="MP3")[:18],
    ],
)
def test_a_truncated_header_raises_no_other_error(data):
    try:
        read_any(data)
    except AudioError as error:
        assert str(error).startswith("a.wav: ")


def test_a_file_is_scanned_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    scans = []
    monkeypatch.setattr(cache, "find_streams", lambda file: scans.append(1) or find_streams(file))
    path = tmp_path / "a.flac"

    def scan(data, age):
        path.write_bytes(data)
        os.utime(path, (time.time() - age,) * 2)
        counts = []
        for _ in range(3):
            with AudioReader(path, RATE) as reader:
                counts.append(sum(map(len, reader.blocks())))
        assert len(set(counts)) == 1
        return counts[0]

    assert scan(flac(), age=60) == len(WAVE)
    assert len(scans) == 1
    assert scan(flac() + flac(OTHER), age=30) == len(WAVE) + len(OTHER)
    assert len(scans) == 2
    assert scan(flac(), age=0) == len(WAVE)  # it could change again within the resolution of its time
    assert len(scans) == 5


FILES = {
    "WAV": wav(chunk(b"data", pcm())),
    "FLAC": flac(),
    "Vorbis": written(format="OGG", subtype="VORBIS"),
    "MP3": written(format="MP3"),
    "AIFF": aiff(zero=False),
    "AU": au(SIZE),
}
NOT_TAKEN_APART = {
    "AU": au(SIZE) * 2,
    "AIFF": aiff(zero=False) * 2,
    "CAF": caf(SIZE + 4) * 2,
    "Wave64": written(format="W64") * 2,
    "SPHERE": written(format="NIST") * 2,
    "VOC": written(format="VOC") * 2,
    "8SVX": written(format="SVX") * 2,
    "AVR": written(format="AVR") * 2,
    **{
        f"{second} after {first}": FILES[first] + FILES[second]
        for first in FILES
        for second in FILES
        if first != second
    },
    "MP3 with a tag after WAV with a list": wav(chunk(b"data", pcm()), chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0"))
    + ID3
    + written(format="MP3"),
    "AIFF of sox into a pipe, twice": (
        aiff_of(0x7F000008)
        + aiff_of(0x7F000008).replace(
            b"COMM", b"COMT\0\0\0\x0c" + struct.pack(">HIHH2s", 1, 0, 0, 2, b"ab") + b"COMM", 1
        )
    ),
    "FLAC after MP3 with a tag": written(format="MP3") + b"TAG".ljust(128, b"\0") + flac(),
}


@pytest.mark.parametrize("kind", NOT_TAKEN_APART)
def test_joined_recordings_that_cannot_be_split_are_refused(kind):
    with pytest.raises(AudioError, match=r"a\.wav: the audio contains several recordings"):
        read(NOT_TAKEN_APART[kind])


@pytest.mark.parametrize("sync", [b"\xfe\x7f\x01\x80", b"\xff\x1f\x00\xe8", b"\x72\xf8\x1f\x4e"])
def test_coded_audio_in_linear_pcm_is_not_read_as_samples(sync):
    with pytest.raises(AudioError, match="contains DTS or AC-3"):
        read(wav(chunk(b"data", bytes(400) + sync + pcm())))


@pytest.mark.parametrize("offset", [0, 23, 0xFFFF0000])
def test_au_whose_samples_begin_in_its_header_or_beyond_its_end_is_refused(offset):
    with pytest.raises(AudioError, match=f"says that samples begin at byte {offset}, but the"):
        read(patched(au(SIZE), (4, struct.pack(">I", offset))))


def test_sphere_of_8_bits_is_read_completely():
    assert len(read(written(format="NIST", subtype="ULAW"))) == len(WAVE)
    with pytest.raises(AudioError, match="was truncated"):
        read(written(format="NIST", subtype="ULAW")[:-100])


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16"])
@pytest.mark.parametrize("channels", [1, 2])
def test_voc_of_a_pipe_lacks_the_zero_at_its_end(subtype, channels):
    data = written(np.stack([WAVE] * channels, axis=1), format="VOC", subtype=subtype)
    assert data.endswith(b"\0") and np.array_equal(read(data[:-1]), read(data)) and len(read(data)) > 0


def test_adpcm_in_voc_is_not_read_as_linear_samples():
    data = written(format="VOC", subtype="PCM_U8")
    with pytest.raises(AudioError, match="the encoding of the VOC file is unknown; convert it to WAV"):
        read(patched(data, (data.index(b"\1", 26) + 5, b"\1")))


EMPTY = {
    "WAV": wav(chunk(b"data", b"")),
    "WAV with a list": wav(chunk(b"data", b""), chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0")),
    "unknown and nothing there": wav(chunk(b"data", b"", 0xFFFFFFFF)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_file_that_truly_holds_nothing_is_empty(name):
    assert len(read(EMPTY[name])) == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # an error in a callback of libsndfile
def test_random_bytes_after_any_magic_never_raise_anything_else():
    rng = np.random.default_rng(0)
    seeds = [*WHOLE.values(), *(written(rate=24000, **options) for options in JOINED.values())]
    for _ in range(300):
        data = bytearray(seeds[rng.integers(len(seeds))][: rng.integers(4, 3000)])
        for position in rng.integers(0, len(data), rng.integers(1, 20)):
            data[position] = rng.integers(0, 256)
        try:
            assert np.isfinite(read_any(bytes(data))).all()
        except AudioError as error:
            assert str(error).startswith("a.wav: ")


def read_any(data):
    with AudioReader("a.wav", RATE, data=data) as reader:
        return np.concatenate([np.zeros(0, np.float32), *reader.blocks()])
