"""Tokenize a corpus: plan the shards, tokenize them, and write the summary."""

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
from nemo_lfr.corpus.formats import FORMAT
from nemo_lfr.corpus.main_program import check_main_program
from nemo_lfr.corpus.plan import Plan, open_plan
from nemo_lfr.corpus.records import METADATA, ShardRecord
from nemo_lfr.corpus.sources import READER
from nemo_lfr.corpus.sources.base import ShardSpec
from nemo_lfr.errors import NemoLfrError, counted
from nemo_lfr.io.journal import write_text
from nemo_lfr.plugins import naming_extension


@dataclass
class Totals:
    """Counts over the complete shards of a run. They are updated while the run is active."""

    shards: int  # number of shards of the run (or of its part), complete or not
    sample_rate: int
    done: int = 0  # number of complete shards
    clips: int = 0
    samples: int = 0
    frames: int = 0
    computed_samples: int = 0  # samples in the shards that this run tokenized
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, record: ShardRecord, computed: bool) -> None:
        """Add the record of a complete shard. `computed` is False if an earlier run tokenized the shard."""
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

    Shards that an earlier run with the same options completed are kept. With `config.part`, only the shards of this
    part are tokenized, and the process that finds all shards complete writes the summary.

    Args:
        config: corpus, output and options.
        workers: number of processes or Ray actors, at most one for each shard; by default one for each GPU, or for
            every `config.threads` CPU cores. With several processes, the calls in the main program must be under
            `if __name__ == "__main__":`.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        ray: address of Ray: "local", "auto" or "HOST:PORT"; by default local processes are used.
        verify: compare the hashes of existing files with the records, and not only their sizes.
        retry_failed: tokenize shards with failed clips again.
        watch: callback that receives the totals, at the start and after every shard.

    Returns:
        The content of `tokens.json`: format, codec, counts and hours. While shards of other parts are missing, the
        result contains the counts of this part, and the keys "part" and "missing_shards".

    Raises:
        NemoLfrError: if the run cannot start (see `open_plan`), the corpus or the output changes during the run, or
            workers die repeatedly.
        AudioError: with `config.strict`, for the first clip that fails.
        OSError: if a file cannot be written, or with `config.strict`, if an audio file cannot be read.
    """
    check_main_program()
    if ray is not None and config.part is not None:
        raise NemoLfrError(
            "--ray and --shard-of cannot be used together, because Ray distributes all shards; remove one of them."
        )
    on_cpu = ray is None and choose_device(device).type == "cpu"
    with open_plan(config, on_cpu) as plan:
        records = find_records(plan, verify, retry_failed)
        executor = choose_executor(plan.config, len(plan.indices) - len(records), workers, device, ray)
        return finish_part(plan, compute(plan, executor, records, watch))


def find_records(plan: Plan, verify: bool, retry_failed: bool) -> dict[int, ShardRecord]:
    """Return a dictionary from index to record for the shards that do not have to be tokenized.

    Args:
        plan: the plan of the run.
        verify: whether to compare the hashes of existing files with the records, and not only their sizes.
        retry_failed: whether to tokenize shards with failed clips again.
    """
    records: dict[int, ShardRecord] = {}
    for index in plan.indices:
        record = ShardRecord.find(plan.out, index, verify)
        if record and not (retry_failed and record.failures):
            records[index] = record
    return records


def compute(
    plan: Plan, executor: Executor, complete: Mapping[int, ShardRecord], watch: Callable[[Totals], None]
) -> list[ShardRecord]:
    """Tokenize the shards in `plan.indices` that are not complete yet.

    Args:
        plan: the plan.
        executor: function that tokenizes shards; see `choose_executor`.
        complete: dictionary from index to record for the complete shards.
        watch: callback that receives the totals, at the start and after every shard.

    Returns:
        The records of all shards in `plan.indices`, in order.

    Raises:
        NemoLfrError: if the corpus or the output changes during the run, or if workers die repeatedly.
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
                f"{plan.out}: the files of shard {record.index} are missing or changed right after they were written; "
                "run the same command again. If several machines run it, pass an --out that all of them can see."
            )
        records[record.index] = record
        totals.add(record, computed=True)
        watch(totals)
    return [records[index] for index in plan.indices]


def finish_part(plan: Plan, records: list[ShardRecord]) -> dict[str, Any]:
    """Write the summary if the shards of all parts are complete.

    Args:
        plan: the plan.
        records: records of the shards that belong to this process's part.

    Returns:
        The content of `tokens.json` if it was written. Otherwise, a dict with the counts of `records` (see `_counts`),
        "part" (such as "2/4") and "missing_shards" (the number of shards of the run that are not complete).

    Raises:
        NemoLfrError: if the output was removed or changed during the run.
    """
    part = plan.config.part
    if part is None:
        return finish(plan, records)
    everything = range(len(plan.shards))
    missing = sum(not ShardRecord.path(plan.out, index).exists() for index in everything)
    if not missing:  # otherwise the files need not be checked
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
        NemoLfrError: if the output folder was replaced, or files of a shard were removed or changed, during the run.
    """
    config, out = plan.config, plan.out
    check_claim(config.state, config.claim)
    if damaged := [index for index in range(len(records)) if ShardRecord.find(out, index) is None]:
        raise NemoLfrError(
            f"{out}: files of {len(damaged)} of {counted(len(records), 'shard')} (the first is shard {damaged[0]}) "
            "were removed or changed during the run; run the same command again to restore them."
        )
    with naming_extension(plan.output, FORMAT):
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
    """Return the content of `tokens.json` for completed shards, without the versions and the command."""
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
    """Return a `nemo-lfr tokenize` command line that produces the same tokens as `config`."""
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
    """Yield the records of completed shards, after checking that the files of the corpus have not changed.

    Raises:
        NemoLfrError: if a file has changed. First, the record files of all shards whose records were not yielded are
            deleted.
    """
    waiting = dict(tasks)
    for record in computed:
        with naming_extension(plan.corpus, READER):
            files = plan.corpus.files_of(waiting[record.index])
        if path := plan.inputs.changed(files):
            if isinstance(computed, Generator):
                computed.close()  # stops the workers
            check_claim(plan.config.state, plan.config.claim)  # raises an error if the output was removed
            for index in waiting:
                ShardRecord.path(plan.out, index).unlink(missing_ok=True)
            raise NemoLfrError(
                f"{path}: file was changed during the run; restore the file and run the same command again, "
                "or choose another --out."
            )
        del waiting[record.index]
        yield record


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
