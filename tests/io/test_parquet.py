"""Tests of Parquet files from outside: damaged, malicious, empty, and those of other writers."""

import contextlib
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_lfr.corpus.sources.parquet import Parquet
from nemo_lfr.corpus.token_folder import TokenFolder, TokenizedUtterance
from nemo_lfr.errors import AudioError, ConfigError, NemoLfrError, TokenFileError
from nemo_lfr.io import parquet
from tests.corpora import write_tokens
from tests.crash import ROOT

pa = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
pq = pytest.importorskip("pyarrow.parquet", reason="pip install '.[corpus]'")


EXPANDING = {  # columns of a table of recordings, whose limits are a MiB and 65,536 values here
    "a cell of zeros": {"audio": [bytes(4 << 20)]},
    "a text of blanks": {"audio": [b"x"], "text": [" " * (4 << 20)]},
    "hours of silence": {"audio": [[0.0] * (1 << 17)] * 4},
    "rows without a value": {"audio": pa.array([None] * (1 << 20), pa.binary())},
}


@pytest.mark.parametrize("kind", EXPANDING)
def test_an_expanding_input_table_is_refused_or_skips_only_its_file(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "FREE_INPUT_VALUES", 1 << 16)
    monkeypatch.setattr(parquet, "FREE_INPUT_BYTES", 1 << 20)
    bad, good = tmp_path / "rows" / "bad.parquet", tmp_path / "rows" / "good.parquet"
    bad.parent.mkdir()
    pq.write_table(pa.table(EXPANDING[kind]), bad, compression="zstd")
    assert bad.stat().st_size < 1 << 14
    with pytest.raises(ConfigError, match=r"bad\.parquet: column '\w+.*' declares .* damaged or malicious"):
        Parquet(bad)
    pq.write_table(pa.table({"audio": [b"x"] * 3}), good)
    table = Parquet(bad.parent)
    clips = [clip for shard in table.shards(100) for clip in table.read(shard)]
    assert len(clips) == 4
    with pytest.raises(AudioError, match="damaged or malicious"):
        clips[0].audio(22050, 100)


def test_rows_that_share_a_large_value_are_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "FREE_INPUT_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), pa.array([bytes(1 << 19)]))
    pq.write_table(pa.table({"audio": shared}), path)
    footer = parquet.read_footer(path, is_input=True)
    assert [footer.rows_at_a_time([0], most) for most in (1, 2, 16)] == [1, 1, 1]
    table = Parquet(path)
    before = pa.total_allocated_bytes()
    count = 0
    for _ in table.read(table.shards(100)[0]):
        count += 1
        assert pa.total_allocated_bytes() - before < 8 << 20  # all rows at once are 20 MiB
    assert count == 40


def test_silence_is_not_mistaken_for_an_attack(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"audio": [[0.0] * 220500] * 8, "sampling_rate": [22050] * 8}), path)
    table = Parquet(path)
    assert parquet.read_footer(path, is_input=True).rows_at_a_time([0], 16) == 16
    assert {len(clip.audio(22050, 100)) for clip in table.read(table.shards(100)[0])} == {220500}


@pytest.mark.slow
def test_a_column_that_claims_more_values_than_its_bytes_hold_is_refused(tmp_path):
    write_tokens(tmp_path, "parquet", [1, 1])
    path = tmp_path / "data" / "000000.parquet"
    table = pq.read_table(path)
    count = 20_000_000
    values = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.int16)))
    for number in range(1, 9):
        table = table.set_column(table.column_names.index(f"nano_layer_{number}"), f"nano_layer_{number}", values)
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 1 << 20
    for record in (tmp_path / ".tokenize" / "done").iterdir():
        record.unlink()
    folder = TokenFolder(tmp_path)
    (result,) = folder.read(0)
    assert isinstance(result, TokenFileError) and "declares 20000000 values" in str(result)
    assert isinstance(next(folder.read(1)), TokenizedUtterance)


def test_no_row_of_a_damaged_parquet_file_is_lost_without_a_word(tmp_path):
    """Replace each row count and each value count in a Parquet file by another number."""
    path, rows = tmp_path / "a.parquet", 77
    table = pa.table({"audio": [b"RIFF"] * rows, "text": ["a"] * rows})
    pq.write_table(table, path, store_schema=False, write_statistics=False, use_dictionary=False, compression="none")
    whole, number = path.read_bytes(), b"\x9a\x01"  # the number 77 in Thrift's encoding
    places = [at for at in range(len(whole)) if whole.startswith(number, at)]
    assert len(places) >= 6  # of the file, its row group, two columns, and one page in each column
    for place in places:
        for other in (b"\x98\x01", b"\x9c\x01", b"\x80\x00"):
            path.write_bytes(whole[:place] + other + whole[place + 2 :])
            try:
                corpus = Parquet(path)
                clips = [clip for shard in corpus.shards(100) for clip in corpus.read(shard)]
            except NemoLfrError as error:
                assert str(error).endswith("the file is damaged.") or "Parquet file" in str(error)
            else:
                assert len(clips) == rows, (place, other)


TABLES = [
    ({"audio": [b"RIFF"] * 20, "text": [f"a{row}" for row in range(20)]}, {"store_schema": False}),
    ({"id": ["a", "b"], "nano_layer_1": [[1, 2, 3], [4, 5]]}, {"compression": "zstd"}),
    ({"audio": [{"bytes": b"x", "path": "a"}] * 3, "rate": [1.5] * 3}, {"row_group_size": 2, "store_schema": False}),
]


def footer_start(data: bytes) -> int:
    return len(data) - 8 - int(struct.unpack("<I", data[-8:-4])[0])


def damaged_footers(data: bytes) -> Iterator[bytes]:
    """Yield a Parquet file with each byte of its footer changed, runs of bytes overwritten, and the end cut off."""
    start, end = footer_start(data), len(data)
    for position in range(start, end):
        for value in {data[position] ^ 1, data[position] ^ 0x80, 0, 0x7F, (data[position] + 2) & 255} - {
            data[position]
        }:
            yield data[:position] + bytes([value]) + data[position + 1 :]
    for position in range(start, end, 9):
        for fill in (b"\0", b"\xff"):
            yield (data[:position] + fill * 8 + data[position + 8 :])[:end]
        cut = data[start:position]
        yield data[:start] + cut + struct.pack("<I", len(cut)) + parquet.MAGIC
        yield data[:position]


def read_variants(folder: str) -> None:
    """Read all variants of all tables. Run this in a process of its own, which pyarrow may end."""
    path = Path(folder, "a.parquet")
    count = refused = 0
    for columns, options in TABLES:
        pq.write_table(pa.table(columns), path, **options)
        for variant in damaged_footers(path.read_bytes()):
            count += 1
            parquet._read_footer.cache_clear()
            with open(path, "r+b") as file:  # some file systems wait for the disk when a file is opened with "w"
                file.write(variant)
                file.truncate()
            try:
                table, _ = parquet.open_parquet(path, is_input=True)
            except NemoLfrError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                refused += 1
                continue
            with contextlib.suppress(*parquet.READ_ERRORS):
                for _ in table.iter_batches(16):
                    pass
    print(count, refused)


@pytest.mark.slow
def test_no_damage_to_a_footer_ends_the_process(tmp_path):
    """pyarrow calls abort() for some damaged footers, for example if a type does not fit the size statistics."""
    code = f"from tests.io.test_parquet import read_variants; read_variants({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    variants, refused = map(int, run.stdout.split())
    assert variants > 4000 and refused > variants // 4


def written(values: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(values), path, **options)


WRITERS = {
    "row groups": written({"audio": [b"x"] * 7}, row_group_size=2),
    "no rows": written({"audio": pa.array([], pa.binary())}),
    "no columns": written({}),
    "version 1": written({"audio": [b"x"] * 3}, version="1.0", compression="none", use_dictionary=False),
    "version 2 pages": written({"audio": [[1, 2], [], None]}, data_page_version="2.0", compression="gzip"),
    "nested": written({"audio": [{"array": [[0.5]], "meta": {"rate": 1}}, None], "m": [[{"k": 1}], []]}),
    "nulls": written({"audio": pa.nulls(5), "text": pa.array([None] * 5, pa.string())}),
    "page index": written({"audio": ["a"] * 4}, write_page_index=True, write_page_checksum=True),
    "bloom and sorting": written({"a": [1, 2]}, sorting_columns=[pq.SortingColumn(0)]),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_footer_is_read_as_pyarrow_reads_it(kind, tmp_path):
    path = tmp_path / "a.parquet"
    WRITERS[kind](path)
    file, footer = parquet.open_parquet(path, is_input=True)
    metadata = file.metadata  # of an intact file
    assert footer.num_rows == metadata.num_rows and len(footer.groups) == metadata.num_row_groups
    for index, group in enumerate(footer.groups):
        chunks = [metadata.row_group(index).column(column) for column in range(metadata.num_columns)]
        assert group.columns == [
            (chunk.path_in_schema, chunk.num_values, chunk.total_compressed_size, chunk.total_uncompressed_size)
            for chunk in chunks
        ]


@pytest.mark.parametrize("groups", [1, 40])
def test_a_small_file_with_an_enormous_number_of_rows_is_refused(groups, tmp_path):
    """Each row group alone would be plausible."""
    path = tmp_path / "a.parquet"
    table = pa.table({"audio": pa.nulls(1_000_000)})
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(groups):
            writer.write_table(table if groups > 1 else pa.table({"audio": pa.nulls(2_000_000)}))
    with pytest.raises(ConfigError, match=r"a\.parquet: the file declares \d+ rows, but has only \d+ bytes"):
        Parquet(path)
