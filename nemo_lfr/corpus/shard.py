"""Tokenize one shard.

The result depends only on the shard's clips, the codec and the options. The shard's record is written last, and marks
the shard as complete.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_lfr.codec.arrays import to_numpy
from nemo_lfr.codec.cpu.malloc import configure_malloc, trim_after_batch
from nemo_lfr.corpus.claim import check_claim, writing
from nemo_lfr.corpus.clip_checks import check_clip, load_samples, read_clips
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.formats import FORMAT, get_format, register_format
from nemo_lfr.corpus.formats.base import OutputFormat
from nemo_lfr.corpus.inventory import digest
from nemo_lfr.corpus.records import ShardRecord
from nemo_lfr.corpus.sources import register_source
from nemo_lfr.corpus.sources.base import AudioLoader, Clip, CorpusReader, ShardSpec
from nemo_lfr.errors import NemoLfrError, counted, failure, shorten
from nemo_lfr.io.atomic import naming, sync
from nemo_lfr.io.entropy.find import model_to_write
from nemo_lfr.io.locate import resolve
from nemo_lfr.io.regular import check_replaceable
from nemo_lfr.io.text import without_nonfinite
from nemo_lfr.io.token_file import Metadata
from nemo_lfr.plugins import naming_extension

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec

logger = logging.getLogger(__name__)

# Approximate number of seconds of audio in a batch, by type of device.
BATCH_SECONDS = {"cpu": 60.0, "cuda": 600.0}
# Number of entries in oneDNN's kernel cache, which has one entry for each layer and input shape. The clips of a corpus
# fill the default of 1,024 entries within minutes, and an entry takes half a megabyte. The smaller cache was measured
# to be as fast.
KERNELS = 384
# Number of shards that are queued for each worker, so that it need not wait for its next shard.
QUEUED = 2
# Index and specification of a shard.
Task = tuple[int, ShardSpec]
# A clip, and the samples that `_read` loaded for it.
LoadedClip = tuple[Clip, list[np.ndarray]]


def tokenize_shard(
    config: TokenizeConfig, codec: "Codec[Any]", corpus: CorpusReader, shard: ShardSpec, index: int
) -> ShardRecord:
    """Tokenize a shard and move its files into the output folder.

    Args:
        config: settings of the run.
        codec: codec that encodes the clips.
        corpus: the opened corpus.
        shard: description of the shard, from `corpus.shards`.
        index: index of the shard in the run.

    Returns:
        The record of the shard, which is also in the output folder. If an earlier run tokenized clips that can no
        longer be read, the tokens of that run are kept, and its record is returned.

    Raises:
        AudioError: with `config.strict`, for a clip that cannot be tokenized.
        NemoLfrError: if the output folder no longer belongs to this run, if a corpus reader or an output format of
            another package fails, or if token files of an earlier run are damaged and their clips can no longer be
            read.
        OSError: if files cannot be written, or with `config.strict`, if the file of a clip cannot be read.
    """
    out = resolve(config.out)
    record = ShardRecord(index)
    staging = config.state / "staging" / f"{index:06d}.{uuid.uuid4().hex[:8]}"
    with ExitStack() as cleanup, writing(config.state, config.claim):
        with naming(out, staging.parent):
            staging.mkdir(parents=True)
        cleanup.callback(shutil.rmtree, staging, ignore_errors=True)
        model = model_to_write(codec, config.compress, config.entropy_model)
        output = get_format(config.kind)
        with naming_extension(output, FORMAT):
            writer = output.writer(staging, out, index, Metadata.of(codec), config.dataset, config.context, model)
        clips = read_clips(corpus, shard)
        for clip, tokens, num_samples, context in _tokenize(config, codec, clips, record):
            clip = replace(clip, labels=without_nonfinite(clip.labels), cut=without_nonfinite(clip.cut))
            with naming_extension(output, FORMAT):
                writer.write(clip, tokens, num_samples, context)
            record.clips += 1
            record.samples += num_samples
            record.frames += tokens.shape[1]
        with naming_extension(output, FORMAT):
            writer.close()
        earlier = ShardRecord.read(out, index)
        if earlier is not None and (lost := record.lost_since(earlier)):
            return _kept(out, earlier, lost)
        check_claim(config.state, config.claim)
        _move_files(staging, out, record)
        record.write(out)
    return record


def _move_files(staging: Path, out: Path, record: ShardRecord) -> None:
    """Move the files of a shard into the output folder, and add their hashes and sizes to the record.

    Raises:
        OSError: if the folder `staging` was removed, or if a file cannot be moved.
    """
    staging.stat()  # files that are open while their folder is removed raise no error
    for path in sorted(file for file in staging.rglob("*") if file.is_file()):
        name = str(path.relative_to(staging))
        record.files[name] = digest(path)
        record.sizes[name] = path.stat().st_size
        with naming(out / name, staging):
            with open(path, "rb") as file:
                sync(file.fileno())
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            check_replaceable(out / name)
            os.replace(path, out / name)


def _kept(out: Path, earlier: ShardRecord, lost: list[dict[str, str]]) -> ShardRecord:
    """Return the record of an earlier run, and log why its tokens are kept.

    Args:
        out: the output folder.
        earlier: record of the earlier run.
        lost: failures of this run, for clips that the earlier run tokenized.

    Raises:
        NemoLfrError: if files of the shard are damaged.
    """
    reason = f"{counted(len(lost), 'clip')} that an earlier run tokenized can no longer be read ({lost[0]['error']})"
    if ShardRecord.find(out, earlier.index, verify=True) is None:
        raise NemoLfrError(
            f"{out}: the damaged shard {earlier.index} cannot be restored, because {reason}; make the audio "
            "available, and run the same command again."
        )
    logger.warning("%s: the tokens of shard %d are kept as they were, because %s.", out, earlier.index, reason)
    return earlier


def _tokenize(
    config: TokenizeConfig, codec: "Codec[Any]", clips: Iterator[Clip], record: ShardRecord
) -> Iterator[tuple[Clip, np.ndarray, int, np.ndarray | None]]:
    """Yield (clip, tokens [C, T], number of samples, tokens of the context audio or None) in order.

    Clips that cannot be read are added to the failures of the record.
    """
    limit = BATCH_SECONDS.get(str(codec.device).partition(":")[0], BATCH_SECONDS["cpu"]) * codec.sample_rate
    with ThreadPoolExecutor(config.readers) as readers:
        loaded = skip_failures(config, prefetch(readers, config, codec.sample_rate, clips), record)
        for batch in _batches(loaded, limit):
            yield from _encode(config, codec, batch)


def skip_failures(
    config: TokenizeConfig, clips: Iterator[tuple[Clip, "Future[list[np.ndarray]]"]], record: ShardRecord
) -> Iterator[LoadedClip]:
    """Yield the clips that can be read. The other clips are added to the failures of the record.

    Args:
        config: settings of the run.
        clips: clips with the futures of their audio, from `prefetch`.
        record: record of the shard.

    Raises:
        NemoLfrError: with `config.strict`, if a clip is invalid.
        OSError: with `config.strict`, if the file of a clip cannot be read.
    """
    for clip, waves in clips:
        try:
            yield clip, waves.result()
        except (NemoLfrError, OSError) as error:
            if config.strict:
                raise
            report = failure(clip.origin, error)
            fields = {"input": report["input"], "error": report["error"], "type": report["type"]}
            record.failures.append({"id": clip.id if isinstance(clip.id, str) else shorten(repr(clip.id))} | fields)


def _batches(clips: Iterator[LoadedClip], limit: float) -> Iterator[list[LoadedClip]]:
    """Yield batches whose clips have about `limit` samples in total.

    After padding to the longest clip, a batch of several clips has at most `2 * limit` samples.
    """
    batch: list[LoadedClip] = []
    lengths: list[int] = []
    for clip, waves in clips:
        new = [len(wave) for wave in waves]
        if batch and len(lengths + new) * max(lengths + new) > 2 * limit:
            yield batch
            batch, lengths = [], []
        batch.append((clip, waves))
        lengths += new
        if sum(lengths) >= limit:
            yield batch
            batch, lengths = [], []
    if batch:
        yield batch


def prefetch(
    readers: ThreadPoolExecutor, config: TokenizeConfig, sample_rate: int, clips: Iterator[Clip]
) -> Iterator[tuple[Clip, "Future[list[np.ndarray]]"]]:
    """Yield clips with their audio, which threads read in advance.

    Args:
        readers: threads that read the audio.
        config: settings of the run.
        sample_rate: sample rate of the audio in Hz.
        clips: clips to read. They are yielded in this order.

    Yields:
        Each clip, and a future with the return value of `_read`.
    """
    waiting: list[tuple[Clip, Future[list[np.ndarray]]]] = []
    for clip in clips:
        waiting.append((clip, readers.submit(_read, clip, config, sample_rate)))
        if len(waiting) > 4 * config.readers:
            yield waiting.pop(0)
    yield from waiting


def _read(clip: Clip, config: TokenizeConfig, sample_rate: int) -> list[np.ndarray]:
    """Load the audio of a clip.

    Returns:
        A list with the samples of the clip [T]. If context audio is tokenized and the clip has context audio, the
        samples of the context audio [T] are the second item.

    Raises:
        AudioError: if the audio cannot be decoded or is silent, or the id or a label of the clip cannot be written.
        OSError: if the audio file cannot be read.
    """
    loaders: list[AudioLoader] = [clip.audio]
    if config.context and clip.context is not None:
        loaders.append(clip.context)
    check_clip(clip)
    waves = []
    for loader, what in zip(loaders, ("audio", "context audio"), strict=False):
        waves.append(load_samples(loader, f"{clip.origin}: the {what}", sample_rate, config.max_duration))
    return waves


def _encode(
    config: TokenizeConfig, codec: "Codec[Any]", batch: list[LoadedClip]
) -> Iterator[tuple[Clip, np.ndarray, int, np.ndarray | None]]:
    waves = [wave for _, waves in batch for wave in waves]
    frame = codec.samples_per_frame
    lengths = [len(wave) + (frame if config.pad == "magpie" and len(wave) % frame == 0 else 0) for wave in waves]
    audio = _zeros(codec, len(waves), max(lengths))
    for row, wave in zip(audio, waves, strict=True):
        row[: len(wave)] = wave
    tokens, num_frames = codec.encode(audio, lengths, codec.sample_rate)
    trim_after_batch()
    rows = zip(to_numpy(tokens), num_frames.tolist(), lengths, strict=True)
    results = iter([(row[:, :total], length) for row, total, length in rows])
    for clip, (_, *context) in batch:
        row, num_samples = next(results)
        yield clip, row, num_samples, next(results)[0] if context else None


def _zeros(codec: "Codec[Any]", rows: int, columns: int) -> np.ndarray:
    """Return a float32 array of zeros [rows, columns], in pinned memory if the codec is on a GPU."""
    if getattr(codec.device, "type", None) != "cuda":  # the device of codecs without torch is a string
        return np.zeros((rows, columns), np.float32)
    import torch

    return torch.zeros(rows, columns, pin_memory=True).numpy()


class Worker:
    """Worker that tokenizes shards with one codec and one corpus reader.

    Args:
        config: options of the run.
        device: device of the codec.
        plugins: output format and corpus reader of the run. The worker registers them.
        codec: a codec on the CPU that is used if `device` is "cpu"; None to load one.
    """

    def __init__(
        self,
        config: TokenizeConfig,
        device: str | None = None,
        plugins: tuple[type, ...] = (),
        codec: "Codec[Any] | None" = None,
    ) -> None:
        for plugin in plugins:
            if issubclass(plugin, OutputFormat):
                register_format(plugin)
            elif issubclass(plugin, CorpusReader):
                register_source(plugin)
        # oneDNN reads this variable when it creates the first kernel.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
        import torch

        from nemo_lfr.pretrained import load

        configure_malloc()

        self.config = config
        if codec is None or device != "cpu":
            codec = load(config.model, device, config.precision)
        self.codec = codec
        if str(self.codec.device) == "cpu":
            # PyTorch crashes if it cannot start all threads, so use at most as many threads as there are cores.
            torch.set_num_threads(min(config.threads, os.cpu_count() or 1))
        self.corpus = config.open()

    def ready(self) -> None:
        """Do nothing. In Ray, the result of this call arrives when the worker is ready."""

    def run(self, index: int, shard: ShardSpec) -> dict[str, Any]:
        """Tokenize the shard `index`, and return its record as a JSON-compatible dictionary."""
        return asdict(tokenize_shard(self.config, self.codec, self.corpus, shard, index))
