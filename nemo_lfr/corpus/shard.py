"""One shard: the clips of a part in, files of tokens out. A pure function of the part, the codec and the options.

A shard is computed in a folder of its own, its files are put on disk and renamed into place, and last comes its mark:
a JSON file with what the shard holds and the hash of every file. A shard whose mark is there is whole; without one it
is computed again, to the same bytes.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_lfr.codec.arrays import to_numpy
from nemo_lfr.codec.cpu.malloc import configure_malloc, trim_after_batch
from nemo_lfr.corpus.claim import check_claim
from nemo_lfr.corpus.inputs import Clip, Corpus, Part, Source, open_corpus
from nemo_lfr.corpus.inventory import digest
from nemo_lfr.corpus.sinks import SINKS, STATE
from nemo_lfr.errors import AudioError, NemoLfrError
from nemo_lfr.io.atomic import naming
from nemo_lfr.io.entropy.find import model_to_write
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.text import without_nonfinite
from nemo_lfr.io.token_file import Metadata

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec

# Audio that is encoded together, and held at a time.
BATCH_SECONDS = {"cpu": 60.0, "cuda": 600.0}
# Kernels that oneDNN keeps on a CPU, one for each layer and shape. By default it is 1,024, which the clips of a corpus
# fill within minutes with half a megabyte each; with fewer it is as fast (measured).
KERNELS = 384
PADS = ("encode", "magpie")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
# A clip with its samples, and its context's where there is one.
Loaded = tuple[Clip, list[np.ndarray]]


@dataclass(frozen=True)
class Job:
    """A corpus to tokenise: all that a worker on any machine needs to know.

    Attributes:
        source: the corpus, as `open_corpus` takes it.
        out: folder of the tokens; many machines must all see it.
        kind: of `SINKS`.
        model: checkpoint or Hub id; None for the bundled codec.
        precision: of the codec.
        pad: "encode" completes a last partial frame, as `AudioCodecModel.encode` does; "magpie" adds a whole frame of
            silence to clips that need none, as NeMo's Magpie datasets do where they encode audio themselves.
        context: tokenise contexts too.
        shard_size: clips of a shard.
        max_duration: seconds; longer clips are failures.
        audio_dir: of a manifest's or table's relative paths.
        allow_url: read audio that Lhotse's manifests place at an http(s) URL.
        dataset: name of the corpus.
        strict: stop at the first clip that fails.
        threads: of one worker on a CPU.
        readers: threads that decode and resample audio ahead of the codec.
        claim: what `claim` gave for the output; nothing is put into place where it is no longer that.
        compress: compress `.lfr` files without loss.
        entropy_model: path of the model to compress with; the codec's own inside the package if None.
    """

    source: str
    out: str
    kind: str
    model: str | None = None
    precision: str = "fp32"
    pad: str = "encode"
    context: bool = False
    shard_size: int = 256
    max_duration: float = 3600.0
    audio_dir: str | None = None
    dataset: str = "corpus"
    strict: bool = False
    threads: int = 1
    readers: int = 1
    allow_url: bool = False
    claim: str = ""
    compress: bool = False
    entropy_model: str | None = None

    @property
    def state(self) -> Path:
        return Path(self.out, STATE)

    def open(self, anew: bool = False) -> Corpus:
        """The corpus; `anew`, a folder's files are listed again, as the driver of a run does before it has workers."""
        audio_dir = None if self.audio_dir is None else Path(self.audio_dir)
        return open_corpus(Path(self.source), audio_dir, self.state / "folder.json", anew, self.allow_url)


@dataclass
class Mark:
    """What a finished shard holds."""

    index: int
    clips: int = 0
    samples: int = 0
    frames: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # path below the output -> SHA-256
    sizes: dict[str, int] = field(default_factory=dict)  # path below the output -> bytes

    @staticmethod
    def folder(out: Path) -> Path:
        return out / STATE / "done"

    @classmethod
    def path(cls, out: Path, index: int) -> Path:
        return cls.folder(out) / f"{index:06d}.json"

    @classmethod
    def read(cls, out: Path, index: int) -> "Mark | None":
        """The mark of a shard as it was written; None if there is none, or no whole one."""
        path = cls.path(out, index)
        try:
            with open_regular(path) as file:
                mark = cls(**json.load(file))
            whole = mark.index == index and all(
                type(count) is int and count >= 0 for count in (mark.clips, mark.samples, mark.frames)
            )
            whole = whole and all(isinstance(value, str) for pair in mark.files.items() for value in pair)
            whole = whole and all(type(size) is int for size in mark.sizes.values())
            whole = whole and all(isinstance(failure["error"], str) for failure in mark.failures)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return mark if whole else None

    @classmethod
    def find(cls, out: Path, index: int, verify: bool = False) -> "Mark | None":
        """The mark of a shard whose files are all there and have their sizes; with `verify`, their hashes too."""
        mark = cls.read(out, index)
        return mark if mark and not any(mark.damage(out, name, verify) for name in mark.files) else None

    def damage(self, out: Path, name: str, verify: bool = False) -> str | None:
        """What is wrong with one of the files; None if it is as it was written."""
        path = out / name
        if not path.is_file():
            return f"{path}: no such file"
        size = path.stat().st_size
        if size != self.sizes.get(name, size):
            return f"{path}: holds {size} bytes, but {self.sizes[name]} were written"
        if verify and digest(path) != self.files[name]:
            return f"{path}: is damaged: its SHA-256 is not that of what was written"
        return None

    def write(self, out: Path) -> None:
        self.path(out, self.index).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path(out, self.index), json.dumps(asdict(self), ensure_ascii=False))


def tokenize_shard(job: Job, codec: "Codec", corpus: Corpus, part: Part, index: int) -> Mark:
    """Compute a shard and put it in place.

    Raises:
        AudioError: with `job.strict`, for a clip that cannot be tokenised.
        NemoLfrError: if the output is no longer that of this run.
        OSError: if its files cannot be written.
    """
    out = Path(job.out).resolve()
    mark = Mark(index)
    check_claim(job.state, job.claim)
    staging = job.state / "staging" / f"{index:06d}.{uuid.uuid4().hex[:8]}"
    with naming(out, staging.parent):
        staging.mkdir(parents=True)
    try:
        model = model_to_write(codec, job.compress, job.entropy_model)
        sink = SINKS[job.kind](staging, out, index, Metadata.of(codec), job.dataset, job.context, model)
        for clip, tokens, num_samples, context in _tokenize(job, codec, corpus.read(part), mark):
            clip = replace(clip, labels=without_nonfinite(clip.labels), cut=without_nonfinite(clip.cut))
            sink.write(clip, tokens, num_samples, context)
            mark.clips += 1
            mark.samples += num_samples
            mark.frames += tokens.shape[1]
        sink.close()
        check_claim(job.state, job.claim)
        for path in sorted(file for file in staging.rglob("*") if file.is_file()):
            name = str(path.relative_to(staging))
            mark.files[name] = digest(path)
            mark.sizes[name] = path.stat().st_size
            with naming(out / name, staging):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, out / name)
        mark.write(out)
    except OSError:
        check_claim(job.state, job.claim)  # of files that are gone with the folder
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return mark


def _tokenize(
    job: Job, codec: "Codec", clips: Iterator[Clip], mark: Mark
) -> Iterator[tuple[Clip, np.ndarray, int, np.ndarray | None]]:
    """Clips with their tokens, in order; those that fail go to the mark instead."""
    limit = BATCH_SECONDS.get(str(codec.device).partition(":")[0], BATCH_SECONDS["cpu"]) * codec.sample_rate
    with ThreadPoolExecutor(job.readers) as readers:
        read = _whole(job, _ahead(readers, job, codec.sample_rate, clips), mark)
        for batch in _batches(read, limit):
            yield from _encode(job, codec, batch)


def _whole(job: Job, clips: Iterator[tuple[Clip, "Future[list[np.ndarray]]"]], mark: Mark) -> Iterator[Loaded]:
    """Clips that could be read."""
    for clip, waves in clips:
        try:
            yield clip, waves.result()
        except (NemoLfrError, OSError) as error:
            if job.strict:
                raise
            mark.failures.append({"id": clip.id, "input": clip.origin, "error": str(error)})


def _batches(clips: Iterator[Loaded], limit: float) -> Iterator[list[Loaded]]:
    """Clips of about `limit` samples together, and of no more than twice that as wide as their longest one."""
    batch: list[Loaded] = []
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


def _ahead(
    readers: ThreadPoolExecutor, job: Job, sample_rate: int, clips: Iterator[Clip]
) -> Iterator[tuple[Clip, "Future[list[np.ndarray]]"]]:
    """Clips whose audio is being read, a few ahead of the one that is asked for."""
    waiting: list[tuple[Clip, Future[list[np.ndarray]]]] = []
    for clip in clips:
        waiting.append((clip, readers.submit(_read, clip, job, sample_rate)))
        if len(waiting) > 4 * job.readers:
            yield waiting.pop(0)
    yield from waiting


def _read(clip: Clip, job: Job, sample_rate: int) -> list[np.ndarray]:
    """A clip's samples, and its context's where that is asked for and there."""
    sources: list[Source] = [clip.audio]
    if job.context and clip.context is not None:
        sources.append(clip.context)
    try:
        (clip.id + clip.origin).encode()
    except UnicodeEncodeError:
        raise AudioError(f"{clip.origin}: its name is not UTF-8, in which tokens are labelled; rename it.") from None
    try:
        json.dumps([clip.labels, clip.cut], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise AudioError(f"{clip.origin}: a label of it holds half a character, as text cut in UTF-16 does.") from None
    waves = []
    for source, what in zip(sources, ("", "its context "), strict=False):
        wave = source(sample_rate, job.max_duration)
        if not len(wave):
            raise AudioError(f"{clip.origin}: {what}holds no samples.")
        if not wave.any():
            raise AudioError(f"{clip.origin}: {what}is silent: every sample is zero.")
        waves.append(wave)
    return waves


def _encode(
    job: Job, codec: "Codec", batch: list[Loaded]
) -> Iterator[tuple[Clip, np.ndarray, int, np.ndarray | None]]:
    waves = [wave for _, waves in batch for wave in waves]
    frame = codec.samples_per_frame
    lengths = [len(wave) + (frame if job.pad == "magpie" and len(wave) % frame == 0 else 0) for wave in waves]
    audio = _zeros(codec, len(waves), max(lengths))
    for row, wave in zip(audio, waves, strict=True):
        row[: len(wave)] = wave
    tokens, num_frames = codec.encode(audio, lengths)
    trim_after_batch()
    rows = zip(to_numpy(tokens), num_frames.tolist(), lengths, strict=True)
    results = iter([(row[:, :total], length) for row, total, length in rows])
    for clip, (_, *context) in batch:
        row, num_samples = next(results)
        yield clip, row, num_samples, next(results)[0] if context else None


def _zeros(codec: "Codec", rows: int, columns: int) -> np.ndarray:
    """In memory that a GPU copies from by itself, without the processor's help, if the codec is on one."""
    if getattr(codec.device, "type", None) != "cuda":  # a string of codecs that run without torch
        return np.zeros((rows, columns), np.float32)
    import torch

    return torch.zeros(rows, columns, pin_memory=True).numpy()


class Worker:
    """A process that tokenises shards: one codec, and the corpus it reads.

    Args:
        job: what to do.
        device: where the codec runs.
    """

    def __init__(self, job: Job, device: str | None = None) -> None:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))  # read with the first kernel
        import torch

        from nemo_lfr.pretrained import load

        configure_malloc()

        self.job = job
        self.codec = load(job.model, device, job.precision)
        if str(self.codec.device) == "cpu":
            # PyTorch crashes where a process cannot have as many threads.
            torch.set_num_threads(min(job.threads, os.cpu_count() or 1))
        self.corpus = job.open()

    def ready(self) -> None:
        """Answers once the worker is there."""

    def run(self, index: int, part: Part) -> dict[str, Any]:
        """Compute a shard; what its mark says, as JSON."""
        return asdict(tokenize_shard(self.job, self.codec, self.corpus, part, index))
