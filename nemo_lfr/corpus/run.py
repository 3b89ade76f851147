"""Tokenize a corpus: plan the shards, compute them, and write the summary."""

import json
import platform
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_lfr._version import __version__
from nemo_lfr.codec.devices import choose_device
from nemo_lfr.corpus.claim import check_claim
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.executors import Executor, choose_executor
from nemo_lfr.corpus.plan import Plan, open_plan
from nemo_lfr.corpus.records import METADATA, ShardRecord
from nemo_lfr.corpus.sources.base import ShardSpec
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.journal import write_text


@dataclass
class Totals:
    """Counts over the shards that are complete so far."""

    shards: int
    sample_rate: int
    done: int = 0
    clips: int = 0
    samples: int = 0
    frames: int = 0
    computed_samples: int = 0  # in this run only
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, record: ShardRecord, computed: bool) -> None:
        """Add a shard, which this run computed or an earlier run completed."""
        self.done += 1
        self.clips += record.clips
        self.samples += record.samples
        self.frames += record.frames
        self.computed_samples += record.samples if computed else 0
        self.failures += record.failures


def tokenize(
    config: TokenizeConfig,
    *,
    workers: int | None = None,
    device: str | None = None,
    ray: str | None = None,
    verify: bool = False,
    retry_failed: bool = False,
    watch: Callable[[Totals], None] = lambda totals: None,
) -> dict[str, Any]:
    """Tokenize a corpus into `config.out`.

    Shards that an earlier run with the same options completed are kept. With `config.part`, only the shards of that
    part are computed. The part that completes the last shard writes the summary; so does a run without a part, which
    computes what is missing.

    Args:
        config: corpus, output and options.
        workers: number of processes or Ray actors; by default one for each GPU, or for each `config.threads` cores.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        ray: address of Ray: "local", "auto" or "HOST:PORT"; by default local processes are used.
        verify: compare the hashes of existing files, not only their sizes.
        retry_failed: compute shards with failed clips again.
        watch: called with the totals, once at the start and after every shard.

    Returns:
        The content of `tokens.json`: codec, layout, counts and hours. If shards of other parts are not complete, that
        file does not exist yet, and the result has the counts of this part and also "part" and "missing_shards".

    Raises:
        NemoLfrError: if the corpus or codec cannot be read, or the output contains the tokens of another run, or is
            being written by another run.
        AudioError: with `config.strict`, for the first clip that fails.
    """
    if ray is not None and config.part is not None:
        raise NemoLfrError("Ray distributes all shards to its machines; leave out either --ray or --shard-of.")
    on_cpu = ray is None and choose_device(device).type == "cpu"
    with open_plan(config, on_cpu) as plan:
        records = find_records(plan, verify, retry_failed)
        executor = choose_executor(plan.config, len(plan.indices) - len(records), workers, device, ray)
        return finish_part(plan, compute(plan, executor, records, watch))


def find_records(plan: Plan, verify: bool, retry_failed: bool) -> dict[int, ShardRecord]:
    """Return the records of the run's shards that need not be computed, by index."""
    records: dict[int, ShardRecord] = {}
    for index in plan.indices:
        record = ShardRecord.find(plan.out, index, verify)
        if record and not (retry_failed and record.failures):
            records[index] = record
    return records


def compute(
    plan: Plan, executor: Executor, complete: Mapping[int, ShardRecord], watch: Callable[[Totals], None]
) -> list[ShardRecord]:
    """Compute the shards of a plan, or of its part, that are not complete yet.

    Args:
        plan: the plan.
        executor: where shards are computed.
        complete: records of complete shards, by index.
        watch: called with the totals, once at the start and after every shard.

    Returns:
        The records of these shards in order.

    Raises:
        NemoLfrError: if an input or the output is changed meanwhile, or workers fail repeatedly.
    """
    records = dict(complete)
    totals = Totals(len(plan.indices), plan.spec["sample_rate"])
    for record in records.values():
        totals.add(record, computed=False)
    watch(totals)
    tasks = [(index, plan.shards[index]) for index in plan.indices if index not in records]
    computed = executor(plan, tasks) if tasks else iter(())
    for record in _check_inputs(plan, computed, dict(tasks)):
        if ShardRecord.find(plan.out, record.index) is None:
            check_claim(plan.config.state, plan.config.claim)
            raise NemoLfrError(
                f"{plan.out}: shard {record.index} was written by another machine and is not visible here; --out must "
                "be on a file system that all machines share."
            )
        records[record.index] = record
        totals.add(record, computed=True)
        watch(totals)
    return [records[index] for index in plan.indices]


def finish_part(plan: Plan, records: list[ShardRecord]) -> dict[str, Any]:
    """Write the summary if no shard of another part is missing; parts that end at the same time write the same bytes.

    Args:
        plan: the plan.
        records: records of the shards of this run.

    Returns:
        See `tokenize`.

    Raises:
        NemoLfrError: if files of a shard were removed or changed meanwhile.
    """
    part = plan.config.part
    if part is None:
        return finish(plan, records)
    everything = range(len(plan.shards))
    missing = sum(not ShardRecord.path(plan.out, index).exists() for index in everything)
    if not missing:  # else the files need not be looked at
        found = [ShardRecord.find(plan.out, index) for index in everything]
        complete = [record for record in found if record is not None]
        if len(complete) == len(found):
            return finish(plan, complete)
        missing = len(found) - len(complete)
    check_claim(plan.config.state, plan.config.claim)
    return _counts(plan, records) | {"part": str(part), "missing_shards": missing}


def finish(plan: Plan, records: list[ShardRecord]) -> dict[str, Any]:
    """Write the files that summarize all shards, `tokens.json` last.

    Returns:
        The content of `tokens.json`.

    Raises:
        NemoLfrError: if files of a shard were removed or changed meanwhile.
    """
    config, out = plan.config, plan.out
    check_claim(config.state, config.claim)
    if damaged := [index for index in range(len(records)) if ShardRecord.find(out, index) is None]:
        raise NemoLfrError(
            f"{out}: files of {len(damaged)} of {len(records)} shards (the first is {damaged[0]}) were removed or "
            "changed while this run was writing; run the same command again to recreate them."
        )
    plan.output.finish(out, len(records), config.context)
    failures = [failure for record in records for failure in record.failures]
    lines = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
    write_text(out / "failures.jsonl", lines)
    summary = _counts(plan, records) | {
        "nemo_lfr": __version__,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "command": command(config),
    }
    write_text(out / METADATA, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _counts(plan: Plan, records: list[ShardRecord]) -> dict[str, Any]:
    """Return the description of the tokens and the counts of some shards."""
    config = plan.config
    samples = sum(record.samples for record in records)
    return {
        "format": config.kind,
        "codec": plan.spec | {"model": config.model or "the bundled codec"},
        "pad": config.pad,
        "context": config.context,
        "source": config.source,
        "shards": len(records),
        "clips": sum(record.clips for record in records),
        "shard_clips": [record.clips for record in records],
        "failures": sum(len(record.failures) for record in records),
        "frames": sum(record.frames for record in records),
        "hours": round(samples / plan.spec["sample_rate"] / 3600, 4),
    }


def command(config: TokenizeConfig) -> str:
    """Return the command line that reproduces these tokens."""
    words = ["nemo-lfr", "tokenize", config.source, "--out", config.out]
    words += ["--format", config.kind, "--dataset", config.dataset]
    for name, value, default in (
        ("--audio-dir", config.audio_dir, None),
        ("--entropy-model", config.entropy_model, None),
        ("--model", config.model, None),
        ("--precision", config.precision, "fp32"),
        ("--pad", config.pad, "encode"),
        ("--shard-size", config.shard_size, TokenizeConfig.shard_size),
        ("--max-duration", config.max_duration, TokenizeConfig.max_duration),
    ):
        if value != default:
            words += [name, str(value)]
    switches = (("--context", config.context), ("--allow-url", config.allow_url), ("--compress", config.compress))
    return shlex.join([*words, *(name for name, is_set in switches if is_set)])


def _check_inputs(
    plan: Plan, computed: Iterator[ShardRecord], tasks: Mapping[int, ShardSpec]
) -> Iterator[ShardRecord]:
    """Yield the records of shards whose inputs did not change during computation.

    Raises:
        NemoLfrError: if an input was edited; the shards that were computed since are discarded.
    """
    waiting = dict(tasks)
    for record in computed:
        if path := plan.inputs.changed(plan.corpus.files_of(waiting[record.index])):
            if isinstance(computed, Generator):
                computed.close()  # stops the workers
            check_claim(plan.config.state, plan.config.claim)  # the whole output may have been removed
            for index in waiting:
                ShardRecord.path(plan.out, index).unlink(missing_ok=True)
            raise NemoLfrError(
                f"{path}: was changed while it was tokenized; restore it and run the same command again, or choose "
                "another --out."
            )
        del waiting[record.index]
        yield record


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
