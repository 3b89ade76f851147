import io
import json
import os
import re
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_lfr.errors import NemoLfrError, TokenFileError, TokensError
from nemo_lfr.io.packing import pack
from nemo_lfr.io.token_file import (
    MAX_BLOCK_FRAMES,
    Metadata,
    TokenReader,
    TokenStreamReader,
    TokenStreamWriter,
    TokenWriter,
)
from tests.crash import ROOT, killed_at_random_moments, on_a_full_disk
from tests.models import build_codec, cached_codec
from tests.tiers import slow_after

RELEASED = Metadata(22050, 1024, (8, 7, 6, 6), 8, "0123456789abcdef")


def random_tokens(metadata: Metadata, frames: int, seed: int = 0) -> np.ndarray:
    shape = (metadata.num_codebooks, frames)
    return np.random.default_rng(seed).integers(0, metadata.codebook_size, shape, dtype=np.int32)


def write(path, metadata, blocks, num_samples):
    with TokenWriter(path, metadata, overwrite=True) as writer:
        for block in blocks:
            writer.write(block)
        writer.finish(num_samples)
    return path


def write_version_1(path, metadata, blocks, num_samples):
    """Write a file as nemo_lfr did before version 2, following the specification."""

    def section(data: bytes) -> bytes:
        return data + struct.pack("<I", zlib.crc32(data))

    text = json.dumps(asdict(metadata), separators=(",", ":")).encode()
    raw = section(b"LFRT" + struct.pack("<BI", 1, len(text)) + text)
    for block in blocks:
        packed = pack(block, metadata.codebook_size, metadata.bytes_per_frame)
        raw += section(struct.pack("<I", block.shape[1]) + packed)
    path.write_bytes(raw + section(struct.pack("<IQ", 0, num_samples)))
    return path


WRITERS = {1: write_version_1, 2: write}


def read(path):
    with TokenReader(path) as reader:
        return reader.read(), reader.num_samples, reader.metadata


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(2, 10), min_size=1, max_size=5),
    st.integers(1, 13),
    st.lists(st.integers(0, 20), max_size=4),
    st.integers(1, 2048),
    st.data(),
)
def test_tokens_of_any_layout_in_any_blocks_survive_a_file_of_either_version(
    tmp_path, levels, codebooks, sizes, frame, data
):
    metadata = Metadata(16000, frame, tuple(levels), codebooks, "00ff")
    total = sum(sizes)
    tokens = random_tokens(metadata, total)
    samples = data.draw(st.integers((total - 1) * frame + 1, total * frame)) if total else 0
    blocks = np.split(tokens, np.cumsum(sizes)[:-1], axis=1) if sizes else []
    blocks = [block for block in blocks if block.size]
    for writer in WRITERS.values():
        got, num_samples, got_metadata = read(writer(tmp_path / "a.lfr", metadata, blocks, samples))
        assert np.array_equal(got, tokens) and got.dtype == np.int32
        assert (num_samples, got_metadata) == (samples, metadata)


def test_the_file_is_laid_out_as_its_specification_says(tmp_path):
    tokens = random_tokens(RELEASED, 5)
    raw = write(tmp_path / "a.lfr", RELEASED, [tokens[:, :3], tokens[:, 3:]], 5000).read_bytes()
    magic, version, length = struct.unpack_from("<4sBI", raw)
    assert (magic, version, raw[8]) == (b"LFRT", 2, 0)
    assert json.loads(raw[9 : 9 + length])["levels"] == [8, 7, 6, 6]
    at = 9 + length
    assert struct.unpack_from("<I", raw, at)[0] == zlib.crc32(raw[:at])
    outline = raw[at : at + 4]
    for count in (3, 2):
        end = at + 8 + 11 * count
        assert struct.unpack_from("<I", raw, at + 4)[0] == count
        assert struct.unpack_from("<I", raw, end)[0] == zlib.crc32(raw[at:end])  # from the CRC field before it
        outline += raw[at + 4 : at + 8] + raw[end : end + 4]
        at = end
    first = raw[-20 - 2 * 11 - 3 * 11 - 8 - 4 :][:11]
    assert int.from_bytes(first, "little") == sum(int(t) * 2016**i for i, t in enumerate(tokens[:, 0]))
    assert struct.unpack_from("<IQI", raw, at + 4) == (0, 5000, zlib.crc32(outline))
    assert struct.unpack_from("<I", raw, at + 20)[0] == zlib.crc32(raw[at + 4 : at + 20])
    assert len(raw) == at + 24


def test_a_block_longer_than_the_format_allows_is_written_as_several(tmp_path):
    metadata = replace(RELEASED, levels=(2,), num_codebooks=1, samples_per_frame=1)
    tokens = random_tokens(metadata, MAX_BLOCK_FRAMES + 5)
    path = write(tmp_path / "a.lfr", metadata, [tokens], MAX_BLOCK_FRAMES + 5)
    with TokenReader(path) as reader:
        assert [block.shape[1] for block in reader.blocks()] == [MAX_BLOCK_FRAMES, 5]
        assert np.array_equal(reader.read(), tokens)


def outcome(path):
    try:
        return read(path)
    except TokenFileError as error:
        assert str(path) in str(error)
        return None


@pytest.mark.slow
@pytest.mark.parametrize("version", slow_after(1, WRITERS))
def test_any_flipped_bit_is_detected(tmp_path, version):
    blocks = [random_tokens(RELEASED, 2), random_tokens(RELEASED, 1, 1)]
    raw = WRITERS[version](tmp_path / "a.lfr", RELEASED, blocks, 3000).read_bytes()
    for position in range(len(raw)):
        for change in (1 << bit for bit in range(8)):
            # A file that is truncated first may be written to the disk when it is closed.
            with open(tmp_path / "a.lfr", "r+b") as file:
                file.seek(position)
                file.write(bytes([raw[position] ^ change]))
            assert outcome(tmp_path / "a.lfr") is None, f"byte {position} ^ {change} went unseen"
        with open(tmp_path / "a.lfr", "r+b") as file:
            file.seek(position)
            file.write(raw[position : position + 1])
    assert (tmp_path / "a.lfr").read_bytes() == raw


@pytest.mark.parametrize("version", WRITERS)
def test_any_truncation_and_any_appended_data_is_detected(tmp_path, version):
    raw = WRITERS[version](tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 3)], 3000).read_bytes()
    for cut in [raw[:size] for size in range(len(raw))] + [raw + b"\0", raw + raw]:
        (tmp_path / "b.lfr").write_bytes(cut)
        assert outcome(tmp_path / "b.lfr") is None, f"{len(cut)} of {len(raw)} bytes went unseen"


def header(version=2, coding=0, **changes) -> bytes:
    values = {"sample_rate": 22050, "samples_per_frame": 1024, "levels": [8, 7, 6, 6], "num_codebooks": 8} | changes
    text = json.dumps(values).encode()
    raw = b"LFRT" + struct.pack("<BI", version, coding << 24 | len(text)) + text
    return raw + struct.pack("<I", zlib.crc32(raw))


def empty(header: bytes) -> bytes:
    """Write a file without frames."""
    end = struct.pack("<IQI", 0, 0, zlib.crc32(header[-4:]))
    return header + end + struct.pack("<I", zlib.crc32(end))


def test_too_large_metadata_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "a.lfr").write_bytes(b"LFRT" + struct.pack("<BI", 2, 65537) + bytes(100))
    with pytest.raises(TokenFileError, match="its metadata length is 65537 bytes"):
        TokenReader(tmp_path / "a.lfr")


def test_a_block_of_too_many_frames_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "a.lfr").write_bytes(header() + struct.pack("<I", 65537) + bytes(100))
    with pytest.raises(TokenFileError, match="a block has 65537 frames"):
        TokenReader(tmp_path / "a.lfr")


def test_a_newer_version_is_refused_with_both_versions(tmp_path):
    (tmp_path / "a.lfr").write_bytes(empty(header(version=3)))
    with pytest.raises(TokenFileError, match=r"a\.lfr: the file has format version 3.*reads versions 1 and 2"):
        TokenReader(tmp_path / "a.lfr")


def test_a_coding_of_a_newer_writer_is_refused(tmp_path):
    (tmp_path / "a.lfr").write_bytes(empty(header(coding=2)))
    with pytest.raises(
        TokenFileError, match=r"a\.lfr: its blocks have coding 2.*reads codings 0 and 1; install a newer"
    ):
        TokenReader(tmp_path / "a.lfr", recover=True)


def test_a_file_of_unknown_fields_and_no_fingerprint_is_read(tmp_path):
    (tmp_path / "a.lfr").write_bytes(empty(header(speaker="x")))
    _, num_samples, metadata = read(tmp_path / "a.lfr")
    assert num_samples == 0
    assert metadata.fingerprint == metadata.precision == metadata.written_by == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": []},
        {"levels": 8},
        {"levels": [1, 2]},
        {"levels": [8.0, 7]},
        {"levels": [4096] * 8},
        {"levels": None},
        {"num_codebooks": 0},
        {"num_codebooks": 10**9},
        {"num_codebooks": "8"},
        {"sample_rate": -1},
        {"sample_rate": True},
        {"samples_per_frame": 0},
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, changes):
    (tmp_path / "a.lfr").write_bytes(empty(header(**changes)))
    with pytest.raises(TokenFileError, match=r"a\.lfr: its metadata is invalid"):
        TokenReader(tmp_path / "a.lfr")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[]", r"expected an object, found \[\]"),
        (b"5", "expected an object, found 5"),
        (b"{", ""),
        (b"\xff\xfe", ""),
        (b"{}", "sample_rate is missing"),
        (b"[" * 3000, ""),
        (b'"levels"', "expected an object, found 'levels'"),
        (b"null", "expected an object, found None"),
        (json.dumps(asdict(RELEASED)).encode("utf-16"), ""),
        (json.dumps(asdict(RELEASED)).encode("utf-8-sig"), ""),
    ],
)
def test_metadata_that_is_no_json_object_is_refused(tmp_path, text, reason):
    raw = b"LFRT" + struct.pack("<BI", 2, len(text)) + text
    (tmp_path / "a.lfr").write_bytes(empty(raw + struct.pack("<I", zlib.crc32(raw))))
    with pytest.raises(TokenFileError, match=rf"a\.lfr: its metadata is invalid \({reason}"):
        TokenReader(tmp_path / "a.lfr")


@pytest.mark.parametrize(
    "raw", [b"", b"RIFF0000WAVE", b"LFR", b"LFRT", b"LFRT\x01\xff\xff\xff\xff", b"LFRT\2\0\xff\xff"]
)
def test_other_files_are_refused_as_token_files(tmp_path, raw):
    (tmp_path / "a.lfr").write_bytes(raw)
    assert outcome(tmp_path / "a.lfr") is None


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert outcome(tmp_path / "none.lfr") is None
    assert outcome(tmp_path) is None


def test_a_writer_that_fails_or_is_not_finished_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "a.lfr", RELEASED) as writer:
        writer.write(random_tokens(RELEASED, 2))
        raise RuntimeError
    with pytest.raises(TokensError, match="2016"), TokenWriter(tmp_path / "a.lfr", RELEASED) as writer:
        writer.write(np.full((8, 2), 2016))
    message = "num_samples is 3000, which corresponds to 3 frames, but 2 frames were written"
    with pytest.raises(TokensError, match=message), TokenWriter(tmp_path / "a.lfr", RELEASED) as writer:
        writer.write(random_tokens(RELEASED, 2))
        writer.finish(3000)
    with (
        pytest.raises(TokensError, match="`finish` was not called"),
        TokenWriter(tmp_path / "a.lfr", RELEASED) as writer,
    ):
        writer.write(random_tokens(RELEASED, 2))
    for shape in ((7, 2), (9, 2), (8,), (1, 8, 2)):
        with (
            pytest.raises(TokensError, match=r"expected \[8, T\]"),
            TokenWriter(tmp_path / "a.lfr", RELEASED) as writer,
        ):
            writer.write(np.zeros(shape, np.int32))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_from_the_start_keeps_no_file(tmp_path, monkeypatch):
    def full(self, data, before=b""):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenWriter, "_write_section", full)
    with pytest.raises(OSError, match="No space"):
        TokenWriter(tmp_path / "a.lfr", RELEASED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["fingerprint", "precision", "written_by"])
@pytest.mark.parametrize("value", ["\ud800", "\x1b]0;title\x07", "a\nfingerprint  forged", "x" * 201, 5, None, ["a"]])
def test_untrusted_strings_in_messages_are_short_and_printable(tmp_path, key, value):
    path = write(tmp_path / "a.lfr", replace(RELEASED, **{key: value}), [], 0)
    with pytest.raises(TokenFileError, match=rf"a\.lfr: its metadata is invalid \({key} is") as caught:
        TokenReader(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400 + len(str(path))


def test_a_huge_duration_ends_with_the_recording(tmp_path):
    path = write(tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 2)], 2048)
    with TokenReader(path) as reader:
        assert reader.samples_between(0.0, 1e306) == (0, 2048)


class InPieces(io.RawIOBase):
    """Unbuffered file that reads and writes at most three bytes per call, as a pipe may do."""

    def __init__(self, data=b""):
        self.file = io.BytesIO(data)

    def readable(self):
        return True

    def writable(self):
        return True

    def read(self, size=-1):
        return self.file.read(min(size, 3))

    def write(self, data):
        return self.file.write(data[:3])


class NonBlocking(InPieces):
    def read(self, size=-1):
        return None

    def write(self, data):
        return None


@pytest.mark.parametrize("result", [None, 0, True, "3", 10**6])
def test_an_object_that_does_not_count_bytes_gets_each_piece_once(result):
    pieces = []
    writer = TokenStreamWriter(
        SimpleNamespace(write=lambda data: pieces.append(bytes(data)) or result, flush=lambda: None), RELEASED
    )
    writer.write(random_tokens(RELEASED, 5))
    writer.finish(5 * 1024)
    expected = io.BytesIO()
    writer = TokenStreamWriter(expected, RELEASED)
    writer.write(random_tokens(RELEASED, 5))
    writer.finish(5 * 1024)
    assert b"".join(pieces) == expected.getvalue()


def test_pipes_that_transfer_a_few_bytes_at_a_time_lose_none(tmp_path):
    tokens = random_tokens(RELEASED, 5)
    expected, pieces = io.BytesIO(), InPieces()
    for file in (expected, pieces):
        writer = TokenStreamWriter(file, RELEASED)
        writer.write(tokens)
        writer.finish(5 * 1024)
    assert pieces.file.getvalue() == expected.getvalue()
    reader = TokenStreamReader(InPieces(expected.getvalue()), "pipe")
    assert np.array_equal(np.concatenate(list(reader.blocks()), axis=1), tokens)


def test_a_non_blocking_pipe_is_refused():
    with pytest.raises(BlockingIOError, match="non-blocking mode"):
        TokenStreamWriter(NonBlocking(), RELEASED)
    with pytest.raises(BlockingIOError, match="non-blocking mode"):
        TokenStreamReader(NonBlocking(), "pipe")


@pytest.mark.parametrize("value", [-1, 1.5, "3", float("nan"), np.array([0, 1])])
@pytest.mark.parametrize("name", ["start", "stop"])
def test_only_frame_numbers_are_accepted_as_the_ends_of_a_range(tmp_path, name, value):
    write(tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 5)], 5 * 1024)
    with TokenReader(tmp_path / "a.lfr") as reader:
        with pytest.raises(TokenFileError, match=f"a.lfr: {name} is .*integer from 0 to 5"):
            reader.read(**{name: value})
        assert reader.read(np.int64(2), np.int32(9)).shape[1] == 3 and reader.read(start=7).shape[1] == 0


def test_a_failed_replacement_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 2)], 2048)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), TokenWriter(path, RELEASED, overwrite=True):
        raise RuntimeError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_only_when_asked(tmp_path):
    path = write(tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 2)], 2048)
    with pytest.raises(NemoLfrError, match=r"a\.lfr exists.*overwrite"):
        TokenWriter(path, RELEASED)
    assert list(tmp_path.iterdir()) == [path]
    write(path, RELEASED, [], 0)
    assert read(path)[1] == 0


def test_missing_folders_of_the_target_are_made(tmp_path):
    write(tmp_path / "a" / "b" / "c.lfr", RELEASED, [], 0)
    assert read(tmp_path / "a" / "b" / "c.lfr")[2] == RELEASED


@pytest.mark.slow
def test_tokens_of_another_codec_are_refused(tmp_path):
    codec = cached_codec("symmetric")
    other = build_codec("symmetric", audio_encoder={"base_channels": 6})
    path = write(tmp_path / "a.lfr", Metadata.of(codec), [random_tokens(RELEASED, 2)], 2048)
    with TokenReader(path) as reader:
        reader.check_codec(codec)
        with pytest.raises(TokenFileError, match=f"fingerprint {codec.fingerprint}.*{other.fingerprint}.*--model"):
            reader.check_codec(other)
        with pytest.raises(TokenFileError, match=r"num_codebooks 8.*4"):
            reader.check_codec(cached_codec("causal"))
    with pytest.raises(TokenFileError, match="fingerprint"):
        other.decode_file(path, tmp_path / "out.wav")
    assert list(tmp_path.iterdir()) == [path]


# --- the document


EXAMPLE = replace(RELEASED, fingerprint="00112233aabbccdd", written_by="nemo_lfr 0.1.0")
# The same file as nemo_lfr wrote it before version 2.
EXAMPLE_VERSION_1 = bytes.fromhex("""
4c465254 01 a5000000 7b2273616d706c655f72617465223a32323035302c2273616d706c65735f7065725f6672616d65223a313032342c226c65
76656c73223a5b382c372c362c365d2c226e756d5f636f6465626f6f6b73223a382c2266696e6765727072696e74223a223030313132323333616162
6263636464222c22707265636973696f6e223a2266703332222c227772697474656e5f6279223a226e656d6f5f6c667220302e312e30227d
7ac37738 02000000 c11b8806d63428df60e500 fffffffff78d55eca81c00 fc5f082d 00000000 dc05000000000000 9b8a5f78
""")


def example_tokens() -> np.ndarray:
    tokens = np.array([[token, 2015] for token in range(1, 9)])
    tokens[7, 1] = 0
    return tokens


def test_the_documents_example_is_what_is_written(tmp_path):
    text = (ROOT / "docs" / "concepts" / "lfr-format.md").read_text()
    dump = bytes.fromhex("".join(re.findall(r"^[0-9a-f]{8}  ((?:[0-9a-f]{2} )+)", text, re.MULTILINE)))
    assert write(tmp_path / "a.lfr", EXAMPLE, [example_tokens()], 1500).read_bytes() == dump
    for position, described in re.findall(r"^\| 0x([0-9a-f]{2}) \| `([0-9a-f ]+)`", text, re.MULTILINE):
        assert dump[int(position, 16) :].startswith(bytes.fromhex(described)), position


def test_a_file_of_version_1_reads_as_it_did(tmp_path):
    path = write_version_1(tmp_path / "a.lfr", EXAMPLE, [example_tokens()], 1500)
    assert path.read_bytes() == EXAMPLE_VERSION_1
    for recover in (False, True):
        with TokenReader(path, recover) as reader:
            assert (reader.version, reader.metadata, reader.num_samples, reader.complete) == (1, EXAMPLE, 1500, True)
            assert np.array_equal(reader.read(), example_tokens())


# --- blocks that were moved


def sections(path) -> tuple[bytes, list[bytes], bytes]:
    """Return the header, blocks and end of a file."""
    raw = path.read_bytes()
    at = struct.unpack_from("<I", raw, 5)[0] + 13
    head, found = raw[:at], []
    while count := struct.unpack_from("<I", raw, at)[0]:
        found.append(raw[at : at + 8 + 11 * count])
        at += len(found[-1])
    return head, found, raw[at:]


# From the sections of two files (of one codec, with equal first blocks): a mixed file, and its first wrong frame.
FORGERIES = {
    "neighbors swapped": (lambda a, b: (a[0], [a[1][0], a[1][2], a[1][1], a[1][3]], a[2]), 5),
    "the ends swapped": (lambda a, b: (a[0], [a[1][3], *a[1][1:3], a[1][0]], a[2]), 0),
    "order reversed": (lambda a, b: (a[0], a[1][::-1], a[2]), 0),
    "one left out": (lambda a, b: (a[0], a[1][:1] + a[1][2:], a[2]), 5),
    "the first left out": (lambda a, b: (a[0], a[1][1:], a[2]), 0),
    "the last left out": (lambda a, b: (a[0], a[1][:-1], a[2]), 15),
    "one repeated": (lambda a, b: (a[0], [*a[1][:2], a[1][1], *a[1][2:]], a[2]), 10),
    "one over another": (lambda a, b: (a[0], [*a[1][:2], a[1][1], a[1][3]], a[2]), 10),
    "one of another file at its own place": (lambda a, b: (a[0], [*a[1][:2], b[1][2], a[1][3]], a[2]), 10),
    "the first of an unlike file": (lambda a, b: (a[0], [b[1][3], *a[1][1:]], a[2]), 0),
    "the rest of another file": (lambda a, b: (a[0], a[1][:2] + b[1][2:], b[2]), 10),
    "the rest of another file with its own end": (lambda a, b: (a[0], a[1][:2] + b[1][2:], a[2]), 10),
    "all of another file under this header": (lambda a, b: (with_fingerprint(a[0]), *b[1:]), 0),
    "the end of another file": (lambda a, b: (*a[:2], b[2]), 20),
    "the end of a shorter file": (lambda a, b: (a[0], a[1][:2], short_end(a[0])), 10),
}


def with_fingerprint(head: bytes) -> bytes:
    changed = head[:-4].replace(RELEASED.fingerprint.encode(), b"f" * 16)
    return changed + struct.pack("<I", zlib.crc32(changed))


def short_end(head: bytes) -> bytes:
    end = struct.pack("<IQI", 0, 10 * 1024, zlib.crc32(head[-4:]))
    return end + struct.pack("<I", zlib.crc32(end))


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_block_that_was_moved_or_belongs_to_another_file_is_found(tmp_path, forgery):
    ours = [random_tokens(RELEASED, 5, seed) for seed in (0, 1, 2, 3)]
    theirs = [random_tokens(RELEASED, 5, seed) for seed in (0, 11, 12, 13)]
    paths = [write(tmp_path / name, RELEASED, blocks, 20 * 1024) for name, blocks in (("a", ours), ("b", theirs))]
    assert sections(paths[0])[1][0] == sections(paths[1])[1][0]
    forge, first_wrong = FORGERIES[forgery]
    head, blocks, end = forge(*map(sections, paths))
    path = tmp_path / "forged.lfr"
    path.write_bytes(head + b"".join(blocks) + end)
    # Opening the file reports it, before any read.
    with pytest.raises(TokenFileError, match=r"forged\.lfr: its blocks were replaced or reordered\. Read the"):
        TokenReader(path)
    # From a pipe and with recovery, nothing is returned from the first wrong block on.
    stream = TokenStreamReader(io.BytesIO(path.read_bytes()), path)
    got = [np.zeros((8, 0))]
    with pytest.raises(TokenFileError, match=rf"the block at frame {first_wrong} is wrong|its blocks were replaced"):
        got.extend(stream.blocks())
    assert np.array_equal(np.concatenate(got, axis=1), np.concatenate(ours, axis=1)[:, :first_wrong])
    with TokenReader(path, recover=True) as reader:
        assert not reader.complete
        assert np.array_equal(reader.read(), np.concatenate(ours, axis=1)[:, :first_wrong])


def test_equal_tokens_give_equal_bytes(tmp_path):
    blocks = [random_tokens(RELEASED, size) for size in (5, 1, 40)]
    first, second = (write(tmp_path / name, RELEASED, blocks, 46 * 1024).read_bytes() for name in "ab")
    assert first == second


# --- many blocks


class CountedReads(io.FileIO):
    """File that counts requests to the operating system."""

    calls = 0

    def readinto(self, buffer) -> int:
        CountedReads.calls += 1
        return super().readinto(buffer)

    def seek(self, *arguments) -> int:
        CountedReads.calls += 1
        return super().seek(*arguments)


class CountedNumbers(list):
    """Sequence of block positions that counts every access and copy."""

    touched = 0

    def __getitem__(self, index):
        got = super().__getitem__(index)
        CountedNumbers.touched += len(got) if isinstance(index, slice) else 1
        return got


def work(path, use) -> tuple[int, int]:
    """Return the number of Python calls, C calls and system calls in `use(path)`."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    CountedReads.calls = 0
    sys.setprofile(count)
    try:
        use(path)
    finally:
        sys.setprofile(None)
    return calls, CountedReads.calls


def open_and_close(path, recover=False):
    with TokenReader(path, recover):
        pass


def read_from_a_pipe(path):
    with io.BufferedReader(CountedReads(path)) as file:
        assert sum(block.shape[1] for block in TokenStreamReader(file, path).blocks()) > 0


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize(
    "use",
    [open_and_close, lambda path: open_and_close(path, recover=True), read, read_from_a_pipe],
    ids=["open", "recover", "read", "pipe"],
)
def test_work_grows_at_most_linearly_with_the_number_of_blocks(tmp_path, monkeypatch, version, use):
    monkeypatch.setattr("nemo_lfr.io.token_file.open_regular", lambda path, _: io.BufferedReader(CountedReads(path)))
    counts = []
    for size in (500, 2000):
        blocks = [random_tokens(RELEASED, 1)] * size
        counts.append(work(WRITERS[version](tmp_path / "a.lfr", RELEASED, blocks, size * 1024), use))
    (calls, system_calls), (more_calls, more_system_calls) = counts
    assert calls > 0 and more_calls < 4.4 * calls  # four times the blocks
    assert system_calls > 0 and more_system_calls < 4.4 * system_calls + 4
    assert more_calls < 80 * 2000


def test_a_span_costs_the_same_however_many_blocks_there_are(tmp_path):
    touched = []
    for size in (500, 2000):
        path = write(tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 1)] * size, size * 1024)
        with TokenReader(path) as reader:
            reader._firsts, reader._positions = CountedNumbers(reader._firsts), CountedNumbers(reader._positions)
            CountedNumbers.touched = 0
            for start in range(0, 500, 10):
                assert reader.read(start, start + 2).shape == (8, 2)
            touched.append(CountedNumbers.touched)
    assert touched[1] <= touched[0] + 50 * 2  # two more steps of each binary search


# --- use of a writer and a reader


@pytest.mark.parametrize(
    "tokens",
    [
        np.full((8, 20), 1.7),
        np.ones((8, 5)),
        np.full((8, 5), np.nan),
        np.ones((8, 5), complex),
        np.ones((8, 5), bool),
        np.ones((8, 5), object),
        np.ma.masked_equal(np.arange(40).reshape(8, 5), 3),
        [[1, 2], [3]],
        None,
        "tokens",
        torch.ones(8, 5),
        torch.ones(8, 5, dtype=torch.int32, device="meta"),
    ],
    ids=lambda tokens: f"{type(tokens).__name__} {getattr(tokens, 'dtype', '')}",
)
def test_non_integer_tokens_are_refused_and_leave_no_file(tmp_path, tokens):
    with pytest.raises(TokensError, match=r"^tokens "), TokenWriter(tmp_path / "a.lfr", RELEASED) as writer:
        writer.write(tokens)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "convert",
    [
        lambda tokens: tokens.astype(">i4"),
        lambda tokens: tokens.astype(np.uint16),
        lambda tokens: np.asfortranarray(tokens).astype(np.int64),
        torch.from_numpy,
        np.ma.masked_array,
        np.ndarray.tolist,
    ],
)
def test_integers_of_any_kind_are_written(tmp_path, convert):
    tokens = random_tokens(RELEASED, 20)
    path = write(tmp_path / "a.lfr", RELEASED, [convert(tokens)], 20 * 1024)
    assert np.array_equal(read(path)[0], tokens)


@pytest.mark.parametrize("again", [lambda writer: writer.finish(5 * 1024), lambda writer: writer.write([[0]] * 8)])
def test_nothing_is_written_after_the_end(tmp_path, again):
    with pytest.raises(TokensError, match="finish"), TokenWriter(tmp_path / "a.lfr", RELEASED) as writer:
        writer.write(random_tokens(RELEASED, 5))
        writer.finish(5 * 1024)
        again(writer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_samples", [5119.5, 5120.0, "5120", None, float("nan"), [5120]])
def test_invalid_num_samples_is_named(tmp_path, num_samples):
    with pytest.raises(TokensError, match="num_samples is"), TokenWriter(tmp_path / "a.lfr", RELEASED) as writer:
        writer.write(random_tokens(RELEASED, 5))
        writer.finish(num_samples)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("start", "duration"), [("1", None), (None, 1), (0, "1"), ([0], None), (True, None), (0, 1j)])
def test_invalid_span_in_seconds_is_named(tmp_path, start, duration):
    path = write(tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 5)], 5 * 1024)
    with TokenReader(path) as reader, pytest.raises(TokenFileError, match="pass a number of seconds"):
        reader.samples_between(start, duration)


def spans(reader: TokenReader, tokens: np.ndarray, seed: int, count: int = 300) -> int:
    """Read random spans, and return the number of spans that differ from the file."""
    starts = np.random.default_rng(seed).integers(0, tokens.shape[1] - 10, count).tolist()
    return sum(not np.array_equal(reader.read(at, at + 10), tokens[:, at : at + 10]) for at in starts)


@pytest.mark.slow
@pytest.mark.parametrize("version", WRITERS)
def test_threads_may_read_from_one_reader(tmp_path, version):
    tokens = random_tokens(RELEASED, 2000)
    path = WRITERS[version](tmp_path / "a.lfr", RELEASED, np.split(tokens, 500, axis=1), 2000 * 1024)
    with TokenReader(path) as reader, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: spans(reader, tokens, seed), range(8))) == [0] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("version", slow_after(1, WRITERS))
def test_forked_processes_may_read_from_one_reader(tmp_path, version):
    tokens = random_tokens(RELEASED, 2000)
    path = WRITERS[version](tmp_path / "a.lfr", RELEASED, np.split(tokens, 500, axis=1), 2000 * 1024)
    with TokenReader(path) as reader:
        children = []
        for seed in range(4):
            if not (child := os.fork()):
                status = 1
                try:
                    status = min(spans(reader, tokens, seed), 1)
                finally:
                    os._exit(status)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("change", ["other blocks", "other tokens", "shorter"])
def test_a_block_that_changes_while_a_reader_is_open_is_detected(tmp_path, version, recover, change):
    tokens = random_tokens(RELEASED, 30)
    others = tokens if change == "shorter" else (tokens + 1) % RELEASED.codebook_size
    path, other = (
        WRITERS[version](tmp_path / name, RELEASED, np.split(values, count, axis=1), 30 * 1024)
        for name, values, count in (("a.lfr", tokens, 3), ("b.lfr", others, 30 if change == "other blocks" else 3))
    )
    with TokenReader(path, recover=recover) as reader:
        assert np.array_equal(reader.read(0, 15), tokens[:, :15])
        path.write_bytes(other.read_bytes()[: -50 if change == "shorter" else None])
        with pytest.raises(TokenFileError, match=r"the block at frame [12]0 has changed since the file was opened"):
            reader.read(15)


# --- spans


@pytest.mark.parametrize("version", WRITERS)
def test_any_span_of_frames_is_read_from_its_blocks_alone(tmp_path, version):
    sizes = [3, 1, 7, 2]
    tokens = random_tokens(RELEASED, sum(sizes))
    blocks = np.split(tokens, np.cumsum(sizes)[:-1], axis=1)
    path = WRITERS[version](tmp_path / "a.lfr", RELEASED, blocks, sum(sizes) * 1024)
    with TokenReader(path) as reader:
        for start in range(14):
            for stop in range(start, 14):
                assert np.array_equal(reader.read(start, stop), tokens[:, start:stop]), (start, stop)
    # A damaged block before the span is not read.
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"}") + 12] ^= 1
    path.write_bytes(raw)
    with TokenReader(path) as reader:
        assert np.array_equal(reader.read(4, 13), tokens[:, 4:])
        with pytest.raises(TokenFileError, match="the block at frame 0"):
            reader.read(2, 13)


@pytest.mark.parametrize(
    ("start", "duration", "span"),
    [
        (0, None, (0, 3000)),
        (0.1, None, (2205, 3000)),
        (0.05, 0.02, (1103, 1544)),
        (0, 99, (0, 3000)),
        (0.05, 0, (1103,) * 2),
    ],
)
def test_seconds_are_samples_within_the_recording(tmp_path, start, duration, span):
    with TokenReader(write(tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 3)], 3000)) as reader:
        assert reader.samples_between(start, duration) == span


@pytest.mark.parametrize(
    ("start", "duration", "message"),
    [
        (-1, None, r"start is -1; pass a number of seconds from 0 to 0\.136, the duration"),
        (0.2, None, r"start is 0\.2; pass a number of seconds from 0 to 0\.136, the duration"),
        (float("nan"), 1, "start is nan; pass a number"),
        (0, -1, r"duration is -1; pass a number of seconds, 0 or more\."),
        (0, float("nan"), "duration is nan; pass"),
        (0, float("inf"), "duration is inf; pass"),
    ],
)
def test_a_span_outside_the_recording_is_refused(tmp_path, start, duration, message):
    path = write(tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 3)], 3000)
    message = rf"a\.lfr: {message}"
    with TokenReader(path) as reader, pytest.raises(TokenFileError, match=message):
        reader.samples_between(start, duration)


# --- files after a crash


@pytest.mark.parametrize("version", WRITERS)
def test_intact_part_of_a_truncated_file_is_recovered(tmp_path, version):
    blocks = [random_tokens(RELEASED, size, size) for size in (2, 3, 1)]
    whole = WRITERS[version](tmp_path / "a.lfr", RELEASED, blocks, 6 * 1024).read_bytes()
    first = whole.index(b"}") + 5
    ends = list(np.cumsum([first] + [8 + 11 * block.shape[1] for block in blocks]))
    tokens = np.concatenate(blocks, axis=1)
    for size in range(len(whole)):
        (tmp_path / "b.part").write_bytes(whole[:size])
        if size < first:
            with pytest.raises(TokenFileError, match=r"b\.part"):
                TokenReader(tmp_path / "b.part", recover=True)
            continue
        with TokenReader(tmp_path / "b.part", recover=True) as reader:
            frames = [0, 2, 5, 6][sum(end <= size for end in ends) - 1]
            assert reader.num_frames == frames and reader.num_samples == frames * 1024 and not reader.complete
            assert np.array_equal(reader.read(), tokens[:, :frames])
    with TokenReader(tmp_path / "a.lfr", recover=True) as reader:
        assert reader.complete and reader.num_samples == 6 * 1024


def test_recovering_stops_at_the_first_damaged_block(tmp_path):
    blocks = [random_tokens(RELEASED, size, size) for size in (2, 3, 1)]
    path = write(tmp_path / "a.lfr", RELEASED, blocks, 6 * 1024)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"}") + 5 + 30 + 10] ^= 4  # in the second block
    path.write_bytes(raw)
    with TokenReader(path) as reader, pytest.raises(TokenFileError, match=r"frame 2 is wrong.*--recover"):
        reader.read()
    with TokenReader(path, recover=True) as reader:
        assert np.array_equal(reader.read(), blocks[0]) and not reader.complete


WRITER = """
import itertools, sys, time
import numpy as np
from nemo_lfr.io.token_file import Metadata, TokenWriter
metadata = Metadata(22050, 1024, (8, 7, 6, 6), 8)
for _ in itertools.count():
    with TokenWriter(sys.argv[1], metadata, overwrite=True) as writer:
        for block in range(40):
            writer.write(np.full((8, 16), block))
            print(".", end="", flush=True)
            time.sleep(0.001)  # most kills fall between blocks, however fast or busy the machine is
        writer.finish(640 * 1024)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_the_old_file_and_a_part_that_reads(tmp_path):
    path = tmp_path / "a.lfr"
    blocks = [np.full((8, 16), block) for block in range(40)]
    tokens = np.concatenate(blocks, axis=1)
    write(path, RELEASED, blocks, 640 * 1024)
    recovered = set()
    for _ in killed_at_random_moments(WRITER, path, within=0.04):
        assert np.array_equal(read(path)[0], tokens)
        parts = list(tmp_path.glob("a.lfr.*.part"))
        assert len(parts) <= 1 and len(list(tmp_path.iterdir())) == 1 + len(parts)
        for part in parts:
            if part.stat().st_size > 200:
                with TokenReader(part, recover=True) as reader:
                    assert np.array_equal(reader.read(), tokens[:, : reader.num_frames])
                    recovered.add(reader.num_frames)
            part.unlink()
    assert len(recovered) > 3, "the kills never met a file half written"


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path / "a.lfr", RELEASED, [random_tokens(RELEASED, 3)], 3000)
    before = path.read_bytes()
    script = f"""
from tests.io.test_format import RELEASED, random_tokens, write
write({str(path)!r}, RELEASED, [random_tokens(RELEASED, 16)] * 100, 1600 * 1024)
"""
    assert "File too large" in on_a_full_disk(script, free=4000)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
