"""Corpora of three recordings, in formats that `tokenize` reads. This module needs the extra `corpus`."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

pa = pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")
pq = pytest.importorskip("pyarrow.parquet", reason="pip install '.[corpus]'")
pytest.importorskip("lhotse", reason="pip install '.[corpus]'")

RATE, SAMPLES = 22050, 4096


def write_audio(folder: Path, frequency: float) -> None:
    """Write three recordings of about 0.2 s, whose pitch depends on `frequency`."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate("abc", start=1):
        soundfile.write(folder / f"{name}.wav", 0.3 * np.sin(np.arange(SAMPLES) * frequency * number), RATE)


def cut(path: Path, **changes: object) -> dict:
    name, duration = path.stem, SAMPLES / RATE
    recording = {
        "id": name,
        "sources": [{"type": "file", "channels": [0], "source": str(path)}],
        "num_samples": SAMPLES,
    }
    recording |= {"sampling_rate": RATE, "duration": duration}
    supervision = {"id": name, "recording_id": name, "start": 0.0, "duration": duration, "channel": 0, "text": name}
    made = {"id": name, "start": 0.0, "duration": duration, "channel": 0, "type": "MonoCut", "recording": recording}
    return made | {"supervisions": [supervision]} | changes


def lines(path: Path, items: list) -> Path:
    text = "".join(json.dumps(item) + "\n" for item in items)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


def write_manifest(folder: Path, texts: str) -> Path:
    items = zip("abc", texts, strict=True)
    return lines(folder / "m.json", [{"audio_filepath": f"{name}.wav", "text": text} for name, text in items])


def write_recordings(folder: Path, texts: str) -> Path:
    cuts = [cut(folder / f"{name}.wav") for name in "abc"]
    supervisions = [item["supervisions"][0] | {"text": text} for item, text in zip(cuts, texts, strict=True)]
    lines(folder / "x_supervisions.jsonl", supervisions)
    return lines(folder / "x_recordings.jsonl", [item["recording"] for item in cuts])


def write_shar(folder: Path, texts: str) -> Path:
    """Write one Shar shard whose texts are a separate field, so that the texts can change without the cuts file."""
    shar = folder / "shar"
    shar.mkdir(exist_ok=True)
    lines(shar / "cuts.000000.jsonl.gz", [cut(folder / f"{name}.wav", supervisions=[]) for name in "abc"])
    lines(shar / "text.000000.jsonl", [{"cut_id": n, "text": t} for n, t in zip("abc", texts, strict=True)])
    return shar


def write_parquet(folder: Path, texts: str) -> Path:
    path = folder / "t.parquet"
    columns = {"audio": [f"{name}.wav" for name in "abc"], "text": list(texts)}
    pq.write_table(pa.table(columns), path, row_group_size=1, compression=None)
    return path
