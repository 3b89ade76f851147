"""Tests of AVI files: any damage to the names and sizes of their chunks is reported, and nothing else is refused."""

import io
from collections.abc import Iterator

import numpy as np
import pytest

from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.containers import find_streams

RATE, FRAMES, PIECE = 8000, 10, 801  # an odd number of bytes per chunk, which is padded


def chunk(name: bytes, data: bytes, pad: bool = True) -> bytes:
    return name + len(data).to_bytes(4, "little") + data + b"\0" * (pad and len(data) % 2)


def chunks(kind: str = "plain") -> list[bytes]:
    """Return the chunks of the `movi` list: video and 8-bit audio, which alternate."""
    noise = np.random.default_rng(0).integers(100, 150, FRAMES * PIECE).astype(np.uint8).tobytes()
    parts = []
    for number in range(FRAMES):
        pair = [chunk(b"00dc", b"\xff\xd8" * 9), chunk(b"01wb", noise[number * PIECE :][:PIECE], kind != "no padding")]
        parts += [chunk(b"LIST", b"rec " + b"".join(pair))] if kind == "records" else pair
        parts += [chunk(b"JUNK", b"x" * 7)] if kind == "junk" else []
    return parts


def index_of(parts: list[bytes]) -> bytes:
    entries, position = [], 4
    for part in parts:
        if part[:4] != b"JUNK":
            entries.append(part[:4] + bytes([16, 0, 0, 0]) + position.to_bytes(4, "little") + part[4:8])
        position += len(part)
    return chunk(b"idx1", b"".join(entries))


def write_avi(kind: str = "plain") -> bytes:
    video = chunk(b"strh", b"vidsMJPG".ljust(56, b"\0")) + chunk(b"strf", bytes(40))
    audio = b"auds" + bytes(16) + np.array([1, RATE, 0, FRAMES * PIECE, 0, 0, 1, 0, 0], "<u4").tobytes()
    form = np.array([1, 1], "<u2").tobytes() + np.array([RATE, RATE], "<u4").tobytes() + b"\1\0\x08\0"
    streams = [video, chunk(b"strh", audio) + chunk(b"strf", form)]
    header = chunk(b"avih", bytes(24) + b"\2\0\0\0" + bytes(28))
    header = chunk(b"LIST", b"hdrl" + header + b"".join(chunk(b"LIST", b"strl" + stream) for stream in streams))
    parts = chunks(kind)
    later = parts[len(parts) // 2 :] if kind == "several RIFF chunks" else []
    first = parts[: len(parts) - len(later)]
    index = b"" if kind in ("records", "no index") else index_of(first)
    data = chunk(b"RIFF", b"AVI " + header + chunk(b"LIST", b"movi" + b"".join(first)) + index)
    return data + (chunk(b"RIFF", b"AVIX" + chunk(b"LIST", b"movi" + b"".join(later))) if later else b"")


def problems(data: bytes) -> list[str]:
    return [text for stream in find_streams(io.BytesIO(data)) for text in (stream.problem, stream.note) if text]


KINDS = ("plain", "records", "junk", "no padding", "no index", "several RIFF chunks")


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_read_whole(kind):
    data = write_avi(kind)
    assert not problems(data)
    pytest.importorskip("av", reason="pip install '.[media]'")
    if kind != "several RIFF chunks":  # FFmpeg needs an OpenDML index for these
        with AudioReader("a.avi", RATE, data=data) as reader:
            assert sum(len(block) for block in reader.blocks(0.3)) == FRAMES * PIECE


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield variants in which a chunk's name or size is changed, or a part is removed or cut off."""
    movi, places = data.index(b"movi"), []
    position = data.index(b"00dc", movi)
    while data[position : position + 4] in (b"00dc", b"01wb", b"JUNK", b"LIST"):
        places.append(position)
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        is_record = data[position : position + 4] == b"LIST"
        position += 12 if is_record else 8 + size
        position += not data[position : position + 4].isalnum()
    assert len(places) >= FRAMES
    for place in places[3:8]:
        for at in range(place, place + 8):
            for bit in (1, 16, 128):
                name = data[place : place + 4]
                if name == b"LIST" or (at < place + 4 and name in (b"JUNK", b"00dc")):
                    continue  # FFmpeg ignores the size of a record; 00dc may become another chunk without audio
                yield f"bit {bit} at {at}", data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    middle = len(data) // 2
    for cut in (data[:middle], data[:-1], data[: places[4]], data[: places[-1]], data[:movi]):
        yield f"cut at {len(cut)}", cut
        yield f"cut at {len(cut)}, repaired", cut[:4] + (len(cut) - 8).to_bytes(4, "little") + cut[8:]
    yield "a part is missing", data[:middle] + data[middle + 500 :]
    yield "a chunk is missing", data[: places[4]] + data[places[5] :]
    yield "a block of zeros", data[: places[4] - 9] + bytes(30) + data[places[4] + 21 :]
    shorter = int.from_bytes(data[movi - 4 : movi], "little") - 1000
    yield "a shorter list", data[: movi - 4] + shorter.to_bytes(4, "little") + data[movi:]


@pytest.mark.parametrize("kind", ["plain", "records", "junk", "no index", "several RIFF chunks"])
def test_no_damage_to_the_chunks_goes_unnoticed(kind):
    silent = [name for name, data in damaged(write_avi(kind)) if not problems(data)]
    assert not silent


def test_an_index_that_does_not_list_all_audio_is_damage():
    data = write_avi()
    at = data.rindex(b"01wb")
    for damage in (data[:at] + b"01wc" + data[at + 4 :], data[: at + 12] + b"\xff" + data[at + 13 :]):
        assert "damaged" in problems(damage)[0] or "follow the audio" in problems(damage)[0]
        pytest.importorskip("av", reason="pip install '.[media]'")
        with pytest.raises(AudioError, match=r"a\.avi: the audio is damaged"):
            AudioReader("a.avi", RATE, data=damage).close()
