"""Tests of compressed `.lfr` files, like those of packed files in `test_format.py`, and of finding the model."""

import io
import itertools
import json
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace

import numpy as np
import pytest

from nemo_lfr.errors import EntropyModelError, TokenFileError, TokensError
from nemo_lfr.io.entropy.blocks import encode_block
from nemo_lfr.io.entropy.find import bundled_model
from nemo_lfr.io.entropy.model import EntropyModel, ModelSpec, write_model
from nemo_lfr.io.token_file import Metadata, TokenReader, TokenStreamReader, TokenStreamWriter, TokenWriter
from tests import entropy_reference
from tests.crash import ROOT, killed_at_random_moments
from tests.io.test_entropy import likely_tokens, random_model, random_tokens
from tests.io.test_format import RELEASED

SMALL = Metadata(22050, 1024, (4, 3), 6, "0123456789abcdef")


def small_model(**options):
    return random_model(SMALL.levels, SMALL.num_codebooks, hidden=(3, 4), past=1, averages=(2,), **options)


def likely_model():
    """Return a model that expects the lowest level in each FSQ dimension."""
    spec = ModelSpec(SMALL.levels, SMALL.num_codebooks, 1, (), (), (1, 1), (0, 0, 0))
    weights = {name: np.zeros(shape, dtype) for name, dtype, shape in spec.tensors()}
    weights["output_bias"] = np.array([64, 0, 0, 0, 64, 0, 0] * 6, "<i4")
    return EntropyModel(spec, weights)


def write(path, model, blocks, metadata=SMALL, gather=None):
    """Write a file with one block for each item of `blocks`."""
    with open(path, "wb") as file:
        stream = TokenStreamWriter(file, metadata, model, gather)
        for block in blocks:
            stream.write(block)
        stream.finish(metadata.samples_per_frame * sum(block.shape[1] for block in blocks))
    return path


def read(path, model, recover=False):
    with TokenReader(path, recover, model) as reader:
        return reader.read()


@pytest.mark.parametrize(
    "blocks", [[], [1], [1, 5, 2], pytest.param([1024, 3], marks=pytest.mark.slow), [4] * 40], ids=str
)
def test_tokens_survive_writing_and_every_way_of_reading(tmp_path, blocks):
    model = small_model()
    parts = [
        (random_tokens if number % 3 == 1 else likely_tokens)(model, *blocks[number : number + 1], number)
        for number in range(len(blocks))
    ]
    path = write(tmp_path / "a.lfr", model, parts)
    expected = np.concatenate([np.zeros((6, 0), np.int32), *parts], axis=1)
    assert np.array_equal(read(path, model), expected)
    assert np.array_equal(read(path, model, recover=True), expected)
    stream = TokenStreamReader(io.BytesIO(path.read_bytes()), path, model)
    assert np.array_equal(np.concatenate([expected[:, :0], *stream.blocks()], axis=1), expected)
    frames = entropy_reference.decode_file(path.read_bytes(), entropy_reference.Model(model.to_bytes()))
    assert np.array_equal(np.array(frames).reshape(-1, 6).T, expected)
    with TokenReader(path, model=model) as reader:
        assert (reader.coding, reader.entropy_hash, reader.complete) == (1, model.hash, True)
        assert reader.payload_bytes == path.stat().st_size - len(sections(path)[0]) - 12 * len(blocks) - 20
        for start, stop in itertools.product((0, 1, 5, 37, 900), (1, 6, 38, 5000)):
            assert np.array_equal(reader.read(start, stop), expected[:, start:stop])


def sections(path):
    """Return the header, blocks and end of a file, each with its CRC."""
    data = path.read_bytes()
    at = 9 + int.from_bytes(data[5:8], "little") + 4
    head, blocks = data[:at], []
    while data[at : at + 4] != bytes(4):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little") + 4
        blocks.append(data[at:end])
        at = end
    return head, blocks, data[at:]


@pytest.mark.slow
def test_writer_gathers_frames_for_blocks_that_compress_well(tmp_path):
    model = small_model()
    parts = [random_tokens(model, frames, frames) for frames in (100, 156, 7, 500, 1)]
    with TokenWriter(tmp_path / "a.lfr", SMALL, model=model) as writer:
        for part in parts:
            writer.write(part)
            part[:] = 0  # the caller may reuse its buffer
        writer.finish(764 * 1024)
    counts = [int.from_bytes(block[:4], "little") for block in sections(tmp_path / "a.lfr")[1]]
    assert counts == [256, 256, 252] and all(counts)
    expected = np.concatenate([random_tokens(model, frames, frames) for frames in (100, 156, 7, 500, 1)], axis=1)
    assert np.array_equal(read(tmp_path / "a.lfr", model), expected)


def test_tokens_that_do_not_compress_are_packed(tmp_path):
    model = likely_model()
    worst = np.full((6, 50), 11, np.int32)
    path = write(tmp_path / "a.lfr", model, [worst, worst * 0])
    blocks = sections(path)[1]
    assert len(blocks[0]) == 8 + 50 * SMALL.bytes_per_frame + 4
    assert len(blocks[1]) < len(blocks[0]) / 4
    assert np.array_equal(read(path, model), np.hstack([worst, worst * 0]))
    assert np.array_equal(np.array(entropy_reference.decode_file(write(path, model, [worst]).read_bytes())).T, worst)


def test_equal_tokens_give_equal_bytes_and_raw_files_stay_as_they_were(tmp_path):
    model, tokens = small_model(), random_tokens(small_model(), 9)
    one, two = (write(tmp_path / name, model, [tokens]).read_bytes() for name in ("a", "b"))
    assert one == two
    raw = write(tmp_path / "c", None, [tokens]).read_bytes()
    assert raw[8] == 0
    assert b"entropy" not in raw
    assert b',"%s"]' % model.hash.encode() in one


@pytest.mark.slow
def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    model = small_model()
    tokens = [likely_tokens(model, 5), random_tokens(model, 4)]
    path = write(tmp_path / "a.lfr", model, tokens)
    data = path.read_bytes()
    cases = [data[:cut] for cut in range(len(data))] + [data + b"\0"]
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        cases.append(bytes(damaged))
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(TokenFileError, match=re.escape(str(path))):
            read(path, model)
        with pytest.raises(TokenFileError):
            list(TokenStreamReader(io.BytesIO(case), path, model).blocks())
        try:
            with TokenReader(path, recover=True, model=model) as reader:
                found = reader.read()
                assert not reader.complete or found.shape[1] == 9
                assert np.array_equal(found, np.hstack(tokens)[:, : found.shape[1]])
                assert found.shape[1] in (0, 5, 9)
        except TokenFileError:
            pass


def test_blocks_in_another_order_are_found(tmp_path):
    model = small_model()
    path = write(tmp_path / "a.lfr", model, [likely_tokens(model, 5, seed) for seed in range(3)])
    head, blocks, end = sections(path)
    for order in ((1, 0, 2), (0, 2), (0, 1, 1, 2), (0, 0, 2)):
        path.write_bytes(head + b"".join(blocks[number] for number in order) + end)
        with pytest.raises(TokenFileError):
            read(path, model)


def sealed(head, bodies, samples):
    """Return a file with correct checksums around any blocks."""
    data, before = bytearray(head), head[-4:]
    outline = zlib.crc32(before)
    for body in bodies:
        before = struct.pack("<I", zlib.crc32(before + body))
        outline = zlib.crc32(body[:4] + before, outline)
        data += body + before
    end = struct.pack("<IQI", 0, samples, outline)
    return bytes(data + end + struct.pack("<I", zlib.crc32(end)))


def body(frames, payload, size=None):
    return struct.pack("<II", frames, len(payload) if size is None else size) + payload


def test_hostile_blocks_with_right_checksums_raise(tmp_path):
    model = small_model()
    path = write(tmp_path / "a.lfr", model, [likely_tokens(model, 20)])
    head = sections(path)[0]
    payload = encode_block(model, likely_tokens(model, 20))
    cases = {
        "too many frames": (body(1025, bytes(2048)), "1025 frames"),
        "fewer bytes than a quarter of the frames": (body(20, b"1234"), "20 frames has a payload of 4 bytes"),
        "more bytes than packed": (body(20, bytes(61)), "has a payload of 61 bytes"),
        "no state": (body(4, b"123"), "state"),
        "state out of range": (body(20, bytes(len(payload))), "state"),
        "cut digits": (body(20, payload[:-1]), "compressed data"),
        "byte more": (body(20, payload + b"\0"), "follow"),
        "fewer frames": (body(18, payload), r"compressed data|bytes|does not represent tokens"),
        "packed frame too large": (body(2, b"\xff" * 6), "does not represent tokens"),
    }
    for name, (block, message) in cases.items():
        path.write_bytes(sealed(head, [block], 1024 * struct.unpack_from("<I", block)[0]))
        with pytest.raises(TokenFileError, match=message):
            read(path, model)
            raise AssertionError(name)
        assert read(path, model, recover=True).shape == (6, 0)


@pytest.mark.parametrize("value", ['"0123"', "5", "null", '["a"]', '"../../../../etc/x"', '"0123456789ABCDEF"'])
def test_invalid_model_names_are_refused(tmp_path, value):
    path = write(tmp_path / "a.lfr", small_model(), [])
    data = path.read_bytes()
    text = re.sub(rb'"[0-9a-f]+"]', value.encode() + b"]", sections(path)[0][9:-4])
    head = b"LFRT" + struct.pack("<BI", 2, 1 << 24 | len(text)) + text
    path.write_bytes(sealed(head + struct.pack("<I", zlib.crc32(head)), [], 0))
    assert path.read_bytes() != data
    for recover in (False, True):
        with pytest.raises(TokenFileError, match="metadata is invalid"):
            TokenReader(path, recover)


def test_model_is_found_where_the_file_lies(tmp_path):
    model = small_model()
    folder = tmp_path / "out" / "tokens" / "speaker" / "book"
    folder.mkdir(parents=True)
    tokens = random_tokens(model, 5)
    path = write(folder / "a.lfr", model, [tokens])
    message = rf"entropy model {model.hash}, which was not found.*{model.hash}\.lfrm.*written by|weights/"
    with TokenReader(path) as reader:  # the header can be read without the model
        assert reader.num_frames == 5
        with pytest.raises(EntropyModelError, match=message):
            reader.read()
    with pytest.raises(EntropyModelError, match=message):
        TokenReader(path, recover=True)
    (tmp_path / "link.lfr").symlink_to(path)
    (tmp_path / "links").symlink_to(folder)
    (folder / "sub").mkdir()
    paths = [path, folder / "sub" / ".." / "a.lfr", tmp_path / "link.lfr", tmp_path / "links" / "a.lfr"]
    for place in (folder, *list(folder.parents)[:4]):
        write_model(model, place / f"{model.hash}.lfrm")
        for found in paths:
            assert np.array_equal(read(found, None), tokens), (place, found)
        (place / f"{model.hash}.lfrm").unlink()
    write_model(model, tmp_path / "mine.lfrm")
    assert np.array_equal(read(path, tmp_path / "mine.lfrm"), tokens)
    other = small_model(seed=5)
    with pytest.raises(EntropyModelError, match="the passed model is"):
        read(path, other)
    write_model(model, folder / f"{model.hash}.lfrm")
    assert np.array_equal(read(path, other), tokens)  # the passed model is for other files of the same run
    (folder / f"{model.hash}.lfrm").unlink()
    write_model(other, folder / f"{model.hash}.lfrm")
    with pytest.raises(EntropyModelError, match="replace it"):
        read(path, None)


def test_model_of_another_layout_is_refused(tmp_path):
    with pytest.raises(EntropyModelError, match="6 codebooks with levels"):
        TokenWriter(tmp_path / "a.lfr", SMALL, model=random_model())
    assert not list(tmp_path.iterdir())
    path = write(tmp_path / "a.lfr", small_model(), [random_tokens(small_model(), 2)])
    head = path.read_bytes()
    data = head.replace(b"[4,3]", b"[3,4]")
    end = 9 + int.from_bytes(data[5:8], "little")
    path.write_bytes(data[:end] + struct.pack("<I", zlib.crc32(data[:end])) + data[end + 4 :])
    with TokenStreamReaderOf(path, small_model()) as stream, pytest.raises(TokenFileError):
        list(stream.blocks())


class TokenStreamReaderOf:
    def __init__(self, path, model):
        self._file = open(path, "rb")  # noqa: SIM115
        self._stream = TokenStreamReader(self._file, path, model)

    def __enter__(self):
        return self._stream

    def __exit__(self, *_):
        self._file.close()


def test_tokens_outside_the_codebook_are_refused(tmp_path):
    model = small_model()
    for gather in (None, 256):
        stream = TokenStreamWriter(io.BytesIO(), SMALL, model, gather)
        for value in (-1, 12):
            with pytest.raises(TokensError, match=str(value)):
                stream.write(np.full((6, 3), value))


@pytest.mark.slow
def test_blocks_of_a_killed_writer_can_be_recovered(tmp_path):
    """A killed process may leave a file that ends at any byte. The complete blocks before that byte are intact."""
    model = small_model()
    parts = [random_tokens(model, 256, seed) for seed in range(3)]
    data = write(tmp_path / "a.lfr", model, parts, gather=256).read_bytes()
    head, blocks, _ = sections(tmp_path / "a.lfr")
    for whole in range(4):
        cut = len(head) + sum(map(len, blocks[:whole]))
        (tmp_path / "a.part").write_bytes(data[: cut + 5])
        assert read(tmp_path / "a.part", model, recover=True).shape[1] == 256 * whole


def test_blocks_of_one_frame_are_read_back(tmp_path):
    """A stream with the lowest latency writes these shortest blocks."""
    model = bundled_model()
    metadata = replace(RELEASED, fingerprint=model.spec.fingerprint)
    tokens = random_tokens(model, 12)
    path = write(tmp_path / "a.lfr", model, np.split(tokens, 12, axis=1), metadata)
    assert np.array_equal(read(path, None), tokens)


def test_the_documents_example_is_what_is_written_and_read(tmp_path):
    text = (ROOT / "docs" / "concepts" / "lfr-compressed.md").read_text(encoding="utf-8")
    text = text[text.index("## A compressed file, byte by byte") :]
    dumps = [bytes.fromhex(dump) for dump in re.findall(r"^```\n((?:[0-9a-f]+\n)+)```$", text, re.MULTILINE)]
    model = EntropyModel.from_bytes(dumps[0], "docs")
    assert f"`{model.hash}`" in text
    expected = np.array([line.split() for line in re.findall(r"^[0-5](?: [0-5]){16}$", text, re.MULTILINE)], int)
    path = tmp_path / "a.lfr"
    path.write_bytes(dumps[1])
    with TokenReader(path, model=model) as reader:
        assert np.array_equal(reader.read(), expected)
        assert reader.num_samples == 17_384
        metadata = reader.metadata
    frames = entropy_reference.decode_file(dumps[1], entropy_reference.Model(dumps[0]))
    assert np.array_equal(np.array(frames).T, expected)
    file = io.BytesIO()
    stream = TokenStreamWriter(file, metadata, model)
    for block in (expected[:, :16], expected[:, 16:]):
        stream.write(block)
    stream.finish(17_384)
    assert file.getvalue() == dumps[1]


@pytest.mark.parametrize("model", [random_model(size=40), bundled_model()], ids=["random", "bundled"])
def test_javascript_decodes_the_same_tokens(tmp_path, model):
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    metadata = replace(RELEASED, fingerprint=model.spec.fingerprint)
    tokens = [likely_tokens(model, 30), random_tokens(model, 3)]
    path = write(tmp_path / "a.lfr", model, tokens, metadata)
    write_model(model, tmp_path / "a.lfrm")
    script = ROOT / "tests" / "entropy_reference.mjs"
    done = subprocess.run([node, script, tmp_path / "a.lfrm", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.array(json.loads(done.stdout)).T, np.hstack(tokens))


WRITER = """
import sys
import numpy as np
from nemo_lfr.io.token_file import TokenWriter
from tests.io.test_entropy import likely_tokens
from tests.io.test_entropy_format import SMALL, small_model

tokens, model = likely_tokens(small_model(), 40), small_model()
while True:
    with TokenWriter(sys.argv[1], SMALL, overwrite=True, model=model) as writer:
        for _ in range(30):
            writer.write(tokens)
        writer.finish(1200 * 1024)
    print(flush=True)
"""


@pytest.mark.slow
def test_output_of_a_killed_writer_is_complete_or_recoverable(tmp_path):
    model = small_model()
    expected = np.tile(likely_tokens(model, 40), (1, 30))
    path = tmp_path / "a.lfr"
    with TokenWriter(path, SMALL, model=model) as writer:
        writer.write(expected)
        writer.finish(1200 * 1024)
    for _ in killed_at_random_moments(WRITER, path, within=0.1):
        assert np.array_equal(read(path, model), expected)
        for part in tmp_path.glob("*.part"):
            if part.stat().st_size > 200:
                found = read(part, model, recover=True)
                assert found.shape[1] in (*range(0, 1200, 256), 1200)
                assert np.array_equal(found, expected[:, : found.shape[1]])
            part.unlink()
