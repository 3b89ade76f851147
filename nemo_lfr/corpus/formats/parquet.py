"""Output format `parquet`: one Parquet file for each shard, with a row for each clip.

The columns are `id`, `nano_layer_1` to `nano_layer_C`, `encoded_len` (number of frames), `num_samples`, `text`,
`speaker`, and `labels`, which contains all other labels as JSON. If context audio was tokenized, the columns
`context_layer_1` to `context_layer_C` follow `nano_layer_C`.
"""

import json
from collections.abc import Iterator
from itertools import count, takewhile
from typing import Any

import numpy as np

from nemo_lfr.corpus.formats import register_format
from nemo_lfr.corpus.formats.base import (
    Damage,
    FormatReader,
    FormatWriter,
    OutputFormat,
    Row,
    ShardFiles,
    num_entries,
    parse_json,
)
from nemo_lfr.corpus.sources.base import Clip
from nemo_lfr.io.parquet import open_parquet, read_footer
from nemo_lfr.io.shortage import require

ROWS = 64  # number of rows to read at a time


class ParquetWriter(FormatWriter):
    """Writer for a Parquet file with a row for each clip."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        require("pyarrow.parquet")
        self._rows: list[dict[str, Any]] = []

    def write(self, clip: Clip, tokens: np.ndarray, num_samples: int, context: np.ndarray | None) -> None:
        """Append a clip as a row."""
        row: dict[str, Any] = {f"nano_layer_{number}": layer for number, layer in enumerate(tokens, start=1)}
        if context is not None:
            row |= {f"context_layer_{number}": layer for number, layer in enumerate(context, start=1)}
        labels = dict(clip.labels)
        row |= {"id": clip.id, "encoded_len": tokens.shape[1], "num_samples": num_samples}
        for key in ("text", "speaker"):
            value = labels.pop(key, None)
            row[key] = None if value is None else str(value)
        row["labels"] = json.dumps(labels, ensure_ascii=False)
        self._rows.append(row)

    def close(self) -> None:
        """Write the Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        layer = pa.list_(pa.from_numpy_dtype(self.dtype))
        layers = range(1, self.codec.num_codebooks + 1)
        columns = [
            ("id", pa.string()),
            *((f"nano_layer_{number}", layer) for number in layers),
            *((f"context_layer_{number}", layer) for number in layers if self.context),
            ("encoded_len", pa.int32()),
            ("num_samples", pa.int64()),
            ("text", pa.string()),
            ("speaker", pa.string()),
            ("labels", pa.string()),
        ]
        table = pa.Table.from_pylist(self._rows, schema=pa.schema(columns))
        with (
            self._writing(f"data/{self.index:06d}.parquet") as path,
            pq.ParquetWriter(path, table.schema, compression="zstd") as file,
        ):
            if self._rows:  # datasets cannot read a row group without rows
                file.write_table(table)


class ParquetReader(FormatReader):
    """Reader for Parquet files."""

    def num_files(self) -> int:
        """Return the number of entries in the folder `data`, as an upper bound for the number of shards."""
        return num_entries(self.folder / "data")

    def count_shards(self) -> list[int]:
        """Return the number of rows in each shard."""
        return self._shard_counts(lambda files: read_footer(files.path(self._name(files.shard))).num_rows)

    def rows(self, files: ShardFiles, start: int, stop: int) -> Iterator[Row | Damage]:
        """Yield the utterances of a shard from `start` to its end, and messages about damage.

        `stop` has no effect.
        """
        path, damage = files.path_and_damage(self._name(files.shard))
        if damage:
            yield damage
        file, _ = open_parquet(path)
        with file:
            first = 0
            for batch in file.iter_batches(ROWS):
                for index in range(max(0, start - first), batch.num_rows):
                    yield Row(self._load, batch, index)
                first += batch.num_rows

    def _load(self, batch: Any, index: int) -> dict[str, Any]:
        row = batch.slice(index, 1).to_pylist()[0]
        labels = parse_json(row["labels"].encode())
        if isinstance(labels, dict):
            labels |= {key: row[key] for key in ("text", "speaker") if row[key] is not None}
        context = _layers(row, "context_layer") or None
        values = {
            "tokens": _layers(row, "nano_layer"),
            "num_samples": row["num_samples"],
            "context": context,
            "labels": labels,
        }
        return {"id": row["id"]} | values

    @staticmethod
    def _name(shard: int) -> str:
        return f"data/{shard:06d}.parquet"


def _layers(row: dict[str, Any], prefix: str) -> list[list[int]]:
    """Return the tokens in the columns `PREFIX_1`, `PREFIX_2` and so on of a row.

    A surplus column is included too, so that the caller can detect it.
    """
    names = (f"{prefix}_{number}" for number in count(1))
    return [row[name] for name in takewhile(lambda name: row.get(name) is not None, names)]


@register_format
class ParquetFormat(OutputFormat):
    """Output format `parquet`."""

    name = "parquet"
    writer = ParquetWriter
    reader = ParquetReader
