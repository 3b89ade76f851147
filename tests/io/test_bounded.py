"""Tests of small files that expand to large data: a clip is skipped or the file is refused, within bounded memory."""

import gzip
import io
import json
import resource
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nemo_lfr.corpus.formats.base import read_lines
from nemo_lfr.corpus.sources.saved_dataset import SavedDataset
from nemo_lfr.corpus.token_folder import TokenFolder
from nemo_lfr.errors import AudioError, ConfigError, NemoLfrError, TokenFileError
from nemo_lfr.io import bounded
from nemo_lfr.io.arrow_streams import check_stream
from nemo_lfr.io.cut_audio import read_cut
from nemo_lfr.io.cut_files import CutFile, read_shar
from tests.corpora import write_tokens

pa = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
pq = pytest.importorskip("pyarrow.parquet", reason="pip install '.[corpus]'")
pytest.importorskip("lhotse", reason="pip install '.[corpus]'")

HUGE = 60 << 30


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Limit the address space, so that an allocation of many gigabytes fails instead of filling the memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (32 << 30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def sparse_header(name: str, size: int) -> bytes:
    """Return the header of a GNU sparse file of zeros, whose data is not in the archive."""
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[100:108], header[124:136], header[136:148] = b"0000644\0", b"00000000000\0", b"00000000000\0"
    header[156:157], header[257:265] = b"S", b"ustar  \0"
    number = b"\x80" + size.to_bytes(11, "big")
    header[386:398], header[398:410], header[483:495] = number, b"\x80" + bytes(11), number
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_header(size: int) -> bytes:
    """Return an extended header that claims to have a number of bytes."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


HEADERS = {"sparse": sparse_header("a.npy", HUGE), "extended header": pax_header(HUGE)}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("packed", [False, True])
def test_expanding_member_of_an_input_shar_fails_only_its_clip(kind, packed, tmp_path):
    made = {"id": "a", "start": 0, "duration": 1, "channel": 0, "type": "MonoCut", "supervisions": []}
    cuts = tmp_path / "cuts.000000.jsonl.gz"
    cuts.write_bytes(gzip.compress(json.dumps(made).encode()))
    data = HEADERS[kind] + member("a.json", b"{}")
    path = tmp_path / ("recording.000000.tar.gz" if packed else "recording.000000.tar")
    path.write_bytes(gzip.compress(data) if packed else data)
    (item,) = read_shar(cuts, {"recording": path})
    assert item.cut is None and "recording.000000.tar" in item.problem and "Memory" not in item.problem


@pytest.mark.parametrize("kind", HEADERS)
def test_an_expanding_member_of_tokens_is_reported_as_damage(kind, tmp_path):
    write_tokens(tmp_path, "shar", [1])
    (tmp_path / "shar" / "target_codes.000000.tar").write_bytes(HEADERS[kind] + member("a.json", b"{}"))
    results = list(TokenFolder(tmp_path).read(0))
    assert results and all(isinstance(result, TokenFileError) for result in results)
    assert not any("Memory" in str(result) for result in results)


def test_endless_line_fails_only_its_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "MAX_LINE", 1 << 16)
    path = tmp_path / "cuts.jsonl.gz"
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    long = b'{"id": "long", "x": "' + b" " * (1 << 20) + b'"}\n'
    made = {"id": "a", "start": 0, "duration": 1, "channel": 0, "type": "MonoCut", "supervisions": []}
    path.write_bytes(
        packer.compress(json.dumps(made).encode() + b"\n" + long + json.dumps(made).encode()) + packer.flush()
    )
    first, second, third = CutFile(path).read()
    assert first.id == third.id == "a" and first.cut is not None and second.problem is not None
    with gzip.open(path) as file:
        assert max(map(len, bounded.lines(file, truncate=True))) == 1 << 16


def test_an_endless_line_of_tokens_is_reported_as_damage(monkeypatch):
    monkeypatch.setattr(bounded, "MAX_LINE", 1 << 20)
    file = io.BytesIO(b"first\n\n" + bytes((1 << 20) + 1))
    lines = read_lines(file, Path("cuts.jsonl"))
    assert next(lines) == b"first\n"
    with pytest.raises(TokenFileError, match=r"cuts\.jsonl: file is damaged: line 3 has more than 1 MiB"):
        next(lines)


@pytest.mark.parametrize("kind", ["shar", "manifest", "parquet", "lfr"])
@pytest.mark.parametrize("keep_records", [False, True])
def test_missing_shards_are_refused_at_once(kind, keep_records, tmp_path):
    write_tokens(tmp_path, kind, [1, 1])
    summary = json.loads((tmp_path / "tokens.json").read_text()) | {"shards": 10_000_000}
    del summary["shard_clips"]
    (tmp_path / "tokens.json").write_text(json.dumps(summary))
    if not keep_records:
        for path in (tmp_path / ".tokenize" / "done").iterdir():
            path.unlink()
    with pytest.raises(TokenFileError, match="10000000 shards"):
        TokenFolder(tmp_path)


TRANSFORMS = {
    "slow": {"name": "Speed", "kwargs": {"factor": 1e-5}},
    "fast": {"name": "Speed", "kwargs": {"factor": 1e9}},
    "text": {"name": "Speed", "kwargs": {"factor": "1.1"}},
    "rate": {"name": "Resample", "kwargs": {"source_sampling_rate": 22050, "target_sampling_rate": 10**10}},
    "volume": {"name": "Volume", "kwargs": {"factor": "1+1"}},
}


EXTREME = {
    "slow": r"speed factor is 1e-05; expected a number from 0\.05 to 20\.",
    "fast": r"speed factor is 1000000000\.0; expected",
    "text": r"speed factor is '1\.1'; expected",
    "volume": "ufunc 'multiply' did not contain a loop",  # numpy's reason, which Lhotse loses
}


@pytest.mark.parametrize("kind", [*TRANSFORMS, "padding"])
def test_cut_with_an_invalid_transform_is_refused(kind, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    from lhotse.cut.set import deserialize_cut

    soundfile.write(tmp_path / "a.wav", np.full(22050, 0.1, np.float32), 22050)
    recording = {"id": "a", "sampling_rate": 22050, "num_samples": 22050, "duration": 1.0}
    recording["sources"] = [{"type": "file", "channels": [0], "source": str(tmp_path / "a.wav")}]
    made = {"id": "a", "start": 0, "duration": 1.0, "channel": 0, "type": "MonoCut", "supervisions": []}
    made["recording"] = recording
    if kind == "padding":
        padding = {"id": "p", "duration": 1000.0, "sampling_rate": 10**9, "feat_value": 0, "num_samples": 10**12}
        tracks = [{"cut": made, "type": "MonoCut", "offset": 0.0}]
        tracks.append({"cut": padding | {"type": "PaddingCut"}, "type": "PaddingCut", "offset": 1.0})
        made = {"id": "m", "type": "MixedCut", "tracks": tracks}
    else:
        recording["transforms"] = [TRANSFORMS[kind]]
    with pytest.raises(AudioError, match=EXTREME.get(kind, r"sample_rate is 1000.*expected a number from 100")):
        read_cut(deserialize_cut(made), 22050)


@pytest.mark.parametrize("kind", ["sparse", "folder"])
def test_non_regular_tar_members_are_not_read(kind, tmp_path):
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    path = tmp_path / "a.tar"
    path.write_bytes(HEADERS["sparse"] if kind == "sparse" else folder.tobuf())
    with bounded.open_tar(Path(path)) as tar, pytest.raises(NemoLfrError, match="not a regular file"):
        bounded.member_bytes(tar, next(iter(tar)))


def saved_rows(kind: str) -> tuple["pa.Table", int]:
    """Return a table for an Arrow stream, and how many times to write it."""
    if kind == "text that expands":
        return pa.table({"audio": ["a.wav"], "text": ["a" * (9 << 25)]}), 1
    if kind == "dictionary that expands":
        return pa.table({"audio": ["a.wav"], "text": pa.array(["a" * (9 << 25)]).dictionary_encode()}), 1
    return pa.table({"audio": pa.nulls(1 << 30)}), 2  # rows without any bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text that expands", "dictionary that expands", "rows of nulls"])
def test_an_arrow_stream_that_expands_is_refused_before_it_does(kind, tmp_path):
    path = tmp_path / "state.arrow"
    table, batches = saved_rows(kind)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
        for _ in range(batches):
            writer.write_table(table)
    assert path.stat().st_size < 1 << 17
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))
    with pytest.raises(ConfigError, match=r"state\.arrow: the file declares \d+ rows.*damaged or malicious"):
        SavedDataset(tmp_path)


# Number of batches that are kept, and the bytes that follow them.
CUTS = {
    "all rows, without the mark": (3, b"", "is truncated"),
    "half of the mark": (3, b"\xff" * 4, "damaged"),
    "one byte of the mark is missing": (3, b"\xff" * 4 + b"\0" * 3, "damaged|is truncated"),
    "after a batch": (2, b"", "is truncated"),
    "before the first batch": (0, b"", "is truncated"),
    "padding": (3, b"\xff" * 4 + b"\0" * 12, "other data follows"),
    "a mark in the middle": (1, b"\xff" * 4 + b"\0" * 4 + b"x" * 100, "other data follows"),
    "whole": (3, b"\xff" * 4 + b"\0" * 4, None),
}


@pytest.mark.parametrize("kind", CUTS)
def test_an_arrow_stream_without_its_end_mark_is_truncated(kind, tmp_path):
    batches, tail, problem = CUTS[kind]
    path = tmp_path / "a.arrow"
    # The last batch ends with the bytes of an end mark.
    table = pa.table({"x": pa.array([-1, 0] * 3, pa.int32())})
    stream = pa.BufferOutputStream()
    ends = []
    with pa.ipc.new_stream(stream, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            ends.append(stream.tell())
            writer.write_batch(batch)
        ends.append(stream.tell())
    path.write_bytes(stream.getvalue().to_pybytes()[: ends[batches]] + tail)
    if problem is None:
        return check_stream(path)
    with pytest.raises(NemoLfrError, match=rf"a\.arrow: .*{problem}"):
        check_stream(path)


def test_arrow_streams_of_old_versions_are_complete(tmp_path):
    options = pa.ipc.IpcWriteOptions(use_legacy_format=True)
    table = pa.table({"x": [1, 2]})
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema, options=options) as w,
    ):
        w.write_table(table)
    check_stream(tmp_path / "a.arrow")


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_a_damaged_arrow_stream_is_an_error_of_this_package(compression, tmp_path):
    path = tmp_path / "a.arrow"
    table = pa.table({"audio": [b"\0" * 5000, b"x"], "text": ["a", "b"]})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
        writer.write_table(table)
    whole = path.read_bytes()
    check_stream(path)
    refused = 0
    for position in range(0, min(len(whole), 1000), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            check_stream(path)
        except NemoLfrError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused
