"""Tokenized corpora for tests, in every format, with random tokens."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lfr.corpus.formats import get_format
from nemo_lfr.corpus.inventory import digest
from nemo_lfr.corpus.records import ShardRecord
from nemo_lfr.corpus.sources.base import Clip
from nemo_lfr.io.token_file import Metadata
from nemo_lfr.pretrained import load
from tests.models import codec_config, write_nemo


def silence(sample_rate: int, longest: float) -> np.ndarray:
    """Return one sample of silence, as the audio of a clip."""
    return np.zeros(1, np.float32)


def write_codec(path: Path, kind: str = "symmetric") -> Path:
    """Write the checkpoint of a tiny codec, by default in the released layout. "two_stages" is the fastest layout."""
    return write_nemo(path, codec_config(kind))


def codec_metadata(model: Path | None) -> Metadata:
    """Return the token metadata of a codec, by default one in the released layout."""
    if model is not None:
        return Metadata.of(load(str(model), "cpu"))
    return Metadata(22050, 1024, (8, 7, 6, 6), 8, "0123456789abcdef")


def write_tokens(
    out: Path, kind: str, counts: list[int], model: Path | None = None, context: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Write shards of random tokens in the same way as `tokenize`.

    Args:
        out: folder to write.
        kind: output format.
        counts: number of clips of each shard.
        model: checkpoint of the codec; by default one in the released layout.
        context: whether to write context tokens for every second clip.
        seed: seed of the tokens.

    Returns:
        Tokens [8, T] by clip id.
    """
    metadata = codec_metadata(model)
    output = get_format(kind)
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for shard, count in enumerate(counts):
        writer = output.writer(out, out, shard, metadata, "made", context)
        record = ShardRecord(shard, clips=count)
        before = set(out.rglob("*"))
        for _ in range(count):
            num_frames = int(rng.integers(1, 9))
            tokens = rng.integers(0, metadata.codebook_size, (8, num_frames))
            clip = Clip(f"s{shard}/clip{len(made)}", "", silence, labels={"text": "a"})
            other = tokens[:, :2] if context and len(made) % 2 == 0 else None
            writer.write(clip, tokens, metadata.samples_per_frame * num_frames - 7, other)
            made[clip.id] = tokens
        writer.close()
        for path in sorted({*out.rglob("*")} - before):
            if path.is_file():
                name = path.relative_to(out).as_posix()
                record.files[name], record.sizes[name] = digest(path), path.stat().st_size
        record.write(out)
    output.finish(out, len(counts), context)
    codec: dict[str, Any] = asdict(metadata) | {"model": "made"}
    summary = {"format": kind, "codec": codec, "context": context, "shards": len(counts), "clips": sum(counts)}
    (out / "tokens.json").write_text(json.dumps(summary | {"shard_clips": counts}))
    return made
