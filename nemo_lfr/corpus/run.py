"""A whole corpus: planned, claimed, computed by an engine, summed up; and gone on with when it was interrupted."""

import hashlib
import json
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nemo_lfr._version import __version__
from nemo_lfr.codec.devices import choose_device
from nemo_lfr.corpus.claim import check_claim, claim
from nemo_lfr.corpus.engine import run_here, run_processes, run_ray
from nemo_lfr.corpus.inputs import Corpus
from nemo_lfr.corpus.inventory import Watch
from nemo_lfr.corpus.shard import PADS, PRECISIONS, Job, Mark
from nemo_lfr.corpus.sinks import SINKS, STATE, finish
from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.io.atomic import sweep
from nemo_lfr.io.entropy.find import model_to_write
from nemo_lfr.io.entropy.model import SUFFIX, EntropyModel, write_model
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.regular import open_regular

METADATA = "tokens.json"
# What must be the same for the shards of one output; the rest of a job may change between runs.
FIXED = ("kind", "precision", "pad", "context", "shard_size", "max_duration", "dataset", "audio_dir")


@dataclass
class Totals:
    """What is there so far."""

    shards: int
    sample_rate: int
    done: int = 0
    clips: int = 0
    samples: int = 0
    frames: int = 0
    computed_samples: int = 0  # in this run
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, mark: Mark, computed: bool) -> None:
        self.done += 1
        self.clips += mark.clips
        self.samples += mark.samples
        self.frames += mark.frames
        self.computed_samples += mark.samples if computed else 0
        self.failures += mark.failures


def tokenize(
    job: Job,
    *,
    workers: int | None = None,
    device: str | None = None,
    ray: str | None = None,
    verify: bool = False,
    retry_failed: bool = False,
    watch: Callable[[Totals], None] = lambda totals: None,
) -> dict[str, Any]:
    """Tokenise a corpus into `job.out`; what is there already of the same job is kept.

    Args:
        job: corpus, output and options.
        workers: processes, or Ray actors; one for each GPU or for each `job.threads` cores if not given.
        device: "cpu", "cuda"; a GPU if there is one.
        ray: where Ray runs: "local", "auto" or an address; processes of this machine if not given.
        verify: compare the hashes of the files that are there, not only their sizes.
        retry_failed: compute those shards again in which a clip failed.
        watch: called after every shard.

    Returns:
        What `tokens.json` holds: the codec, the layout, counts and hours.

    Raises:
        NemoLfrError: for a corpus or a codec that cannot be had, or an output that holds another job's tokens.
        AudioError: with `job.strict`, for the first clip that fails.
    """
    known_values = ((job.kind, SINKS, "format"), (job.pad, PADS, "pad"), (job.precision, PRECISIONS, "precision"))
    for value, known, name in known_values:
        if value not in known:
            raise NemoLfrError(f"{name} {value!r} is unknown; use one of {list(known)}.")
    if job.context and job.kind == "lfr":
        raise NemoLfrError('format "lfr" has no place for contexts; use another, or leave --context out.')
    if (job.compress or job.entropy_model is not None) and job.kind != "lfr":
        raise NemoLfrError(f'format "{job.kind}" is not compressed, as trainers read it raw; use format "lfr".')
    job, out = _absolute(job), expand_home(job.out).resolve()
    if out.exists() and not (out / STATE).exists() and (others := [found.name for found in out.iterdir()]):
        raise NemoLfrError(
            f"{job.out}: holds other files ({others[0]}), and no run to go on with; choose another --out."
        )
    codec, model = _describe(job, on_cpu=ray is None and choose_device(device).type == "cpu")
    for path in (job.state, job.state / "lock", Mark.folder(out)):
        if path.is_symlink():
            raise NemoLfrError(f"{path}: is a link, which is not followed; remove it, or choose another --out.")
    job.state.mkdir(parents=True, exist_ok=True)
    with _alone(job.state / "lock"):
        _remove_leftovers(job, out)
        job = replace(job, claim=claim(job.state))
        corpus = job.open(anew=True)
        inputs = Watch(corpus.files)
        parts = _claim(job, corpus, codec, None if model is None else model.hash)
        if model is not None:  # the tokens can then be decoded wherever the folder goes
            write_model(model, out / f"{model.hash}{SUFFIX}", overwrite=True)
        totals = Totals(len(parts), codec["sample_rate"])
        marks: dict[int, Mark] = {}
        for index in range(len(parts)):
            mark = Mark.find(out, index, verify)
            if mark and not (retry_failed and mark.failures):
                marks[index] = mark
                totals.add(mark, computed=False)
        watch(totals)
        tasks = [(index, part) for index, part in enumerate(parts) if index not in marks]
        for mark in _unchanged(_compute(job, tasks, workers, device, ray), inputs, corpus, dict(tasks), out):
            if Mark.find(out, mark.index) is None:
                check_claim(job.state, job.claim)
                raise NemoLfrError(
                    f"{out}: shard {mark.index} was computed on another machine and cannot be seen here; --out must "
                    "be on a file system that all machines share."
                )
            marks[mark.index] = mark
            totals.add(mark, computed=True)
            watch(totals)
        check_claim(job.state, job.claim)
        if lost := [index for index in range(len(parts)) if Mark.find(out, index) is None]:
            raise NemoLfrError(
                f"{out}: files of {len(lost)} of {len(parts)} shards (the first is {lost[0]}) were removed or changed "
                "while this run was writing; the same command makes them again."
            )
        finish(job.kind, out, len(parts), job.context)
        return _sum_up(job, out, codec, [marks[index] for index in range(len(parts))])


def _absolute(job: Job) -> Job:
    """The same job for a worker in another folder."""
    paths = {"source": job.source, "out": job.out, "audio_dir": job.audio_dir, "model": job.model}
    paths["entropy_model"] = job.entropy_model
    local: dict[str, Any] = {
        name: str(expand_home(path).resolve())
        for name, path in paths.items()
        if path is not None and (name != "model" or expand_home(path).exists())
    }
    return replace(job, **local)


def _remove_leftovers(job: Job, out: Path) -> None:
    """Remove what killed runs left: no other run writes here, as this one holds the lock. Links are not followed."""
    staging = job.state / "staging"
    if staging.is_symlink():
        staging.unlink()
    shutil.rmtree(staging, ignore_errors=True)
    for folder in (job.state, Mark.folder(out)):
        sweep(folder, None)
    sweep(out, (METADATA, "failures.jsonl", "manifest.json", "input_cfg.yaml"))


def _compute(
    job: Job, tasks: list[tuple[int, Any]], workers: int | None, device: str | None, ray: str | None
) -> Iterator[Mark]:
    if not tasks:
        return iter(())
    if ray is not None:
        return run_ray(job, tasks, ray, workers, device)
    chosen = choose_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        import torch

        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    else:
        devices = [str(chosen)]
    count = workers or (len(devices) if chosen.type == "cuda" else max(1, _cores() // job.threads))
    if min(count, len(tasks)) == 1:
        return run_here(job, tasks, devices[0])
    return run_processes(job, tasks, min(count, len(tasks)), devices)


def _unchanged(
    marks: Iterator[Mark], inputs: Watch, corpus: Corpus, tasks: dict[int, Any], out: Path
) -> Iterator[Mark]:
    """Yield the marks of shards whose inputs were not edited while they were computed.

    Raises:
        NemoLfrError: for one that was; what was computed from it since is not kept.
    """
    waiting = dict(tasks)
    for mark in marks:
        if path := inputs.changed(corpus.files_of(waiting[mark.index])):
            if isinstance(marks, Generator):
                marks.close()  # ends the workers
            for index in waiting:
                Mark.path(out, index).unlink(missing_ok=True)
            raise NemoLfrError(
                f"{path}: was changed while it was tokenized; restore it and run the same command again, or choose "
                "another --out for the changed one."
            )
        del waiting[mark.index]
        yield mark


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(job: Job, on_cpu: bool) -> tuple[dict[str, Any], EntropyModel | None]:
    """What the tokens are, and what compresses them; the precision is the workers' matter where they run elsewhere."""
    from nemo_lfr.io.token_file import Metadata
    from nemo_lfr.pretrained import load

    codec = load(job.model, "cpu", job.precision if on_cpu else "fp32")
    metadata = asdict(Metadata.of(codec))
    metadata.pop("written_by")
    model = model_to_write(codec, job.compress, job.entropy_model)
    return metadata | {"levels": list(metadata["levels"]), "precision": job.precision}, model


def _claim(job: Job, corpus: Corpus, codec: dict[str, Any], entropy: str | None) -> list[Any]:
    """The parts of the corpus: planned now, or by the run that is gone on with.

    Raises:
        NemoLfrError: if the output holds something else.
    """
    path = job.state / "job.json"
    given = asdict(job)
    mine = {key: given[key] for key in FIXED} | {"corpus": corpus.identity, "codec": codec, "entropy model": entropy}
    if path.exists():
        try:
            with open_regular(path) as file:
                known = json.load(file)
            parts = known["parts"]
            if not isinstance(known, dict) or not isinstance(parts, list):
                raise TypeError("expected a JSON object with a list of parts")
            if known.get("parts_digest") != _parts_digest(parts):
                raise ValueError("its list of parts is not what was written")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise NemoLfrError(
                f"{path}: is damaged ({shorten(error, 200)}), so that the run cannot go on; "
                f"remove {job.out}, or choose another --out."
            ) from error
        if differ := sorted(key for key in mine if known.get(key) != mine[key]):
            said = "; ".join(
                "another corpus, or it has changed"
                if key == "corpus"
                else f"{key} {known.get(key)!r}, now {mine[key]!r}"
                for key in differ
            )
            raise NemoLfrError(f"{job.out}: holds tokens of another job ({said}); choose another --out.")
        return parts
    parts = corpus.parts(job.shard_size)
    write_text(path, json.dumps(mine | {"parts": parts, "parts_digest": _parts_digest(parts)}))
    return parts


def _parts_digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise NemoLfrError(f"{path.parent.parent}: another run is writing there; wait for it, or stop it.") from error
    try:
        yield
    finally:
        lock.release()


def _sum_up(job: Job, out: Path, codec: dict[str, Any], marks: list[Mark]) -> dict[str, Any]:
    """Write what was failed on and what is there; the tokens are complete once `tokens.json` is."""
    failures = [failure for mark in marks for failure in mark.failures]
    lines = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
    write_text(out / "failures.jsonl", lines)
    samples = sum(mark.samples for mark in marks)
    summary = {
        "format": job.kind,
        "codec": codec | {"model": job.model or "the bundled codec"},
        "pad": job.pad,
        "context": job.context,
        "source": job.source,
        "shards": len(marks),
        "clips": sum(mark.clips for mark in marks),
        "shard_clips": [mark.clips for mark in marks],
        "failures": len(failures),
        "frames": sum(mark.frames for mark in marks),
        "hours": round(samples / codec["sample_rate"] / 3600, 4),
        "nemo_lfr": __version__,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "command": command(job),
    }
    write_text(out / METADATA, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def command(job: Job) -> str:
    """The command line that makes these tokens again."""
    words = ["nemo-lfr", "tokenize", job.source, "--out", job.out, "--format", job.kind, "--dataset", job.dataset]
    for name, value, default in (
        ("--audio-dir", job.audio_dir, None),
        ("--entropy-model", job.entropy_model, None),
        ("--model", job.model, None),
        ("--precision", job.precision, "fp32"),
        ("--pad", job.pad, "encode"),
        ("--shard-size", job.shard_size, Job.shard_size),
        ("--max-duration", job.max_duration, Job.max_duration),
    ):
        if value != default:
            words += [name, str(value)]
    switches = (("--context", job.context), ("--allow-url", job.allow_url), ("--compress", job.compress))
    return shlex.join([*words, *(name for name, is_set in switches if is_set)])


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
