"""Tests of runs that are divided among independent processes: `tokenize --shard-of I/N`."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.cli.main import main
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.executors import choose_executor
from nemo_lfr.corpus.formats import BUILT_IN
from nemo_lfr.corpus.part import Part, parse_part
from nemo_lfr.corpus.records import METADATA
from nemo_lfr.corpus.run import Totals, tokenize
from nemo_lfr.errors import NemoLfrError
from tests.corpora import write_codec
from tests.models import RATE, synthesize
from tests.tiers import slow_after

pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")

CLIPS = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_codec(tmp_path_factory.mktemp("model") / "tiny.nemo")


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("audio")
    lines = []
    for number in range(CLIPS):
        soundfile.write(root / f"{number}.wav", synthesize(0.2, seed=number), RATE)
        lines.append({"audio_filepath": f"{number}.wav", "duration": 0.2, "text": f"clip {number}"})
    lines.insert(3, {"audio_filepath": "missing.wav", "duration": 0.2, "text": "no clip"})
    (root / "manifest.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def job(audio: Path, out: Path, model: Path, kind: str = "lfr", **options) -> TokenizeConfig:
    return TokenizeConfig(str(audio), str(out), kind, model=str(model), shard_size=2, **options)


def run(config: TokenizeConfig, part: Part | None = None, **options) -> dict:
    return tokenize(replace(config, part=part), device="cpu", workers=1, **options)


def files_of(out: Path) -> dict[str, bytes]:
    """Return the contents of every file that a user reads, with the path `out` replaced by OUT."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file() and ".tokenize" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes().replace(str(out).encode(), b"OUT") for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_after(1, BUILT_IN))
def test_parts_in_any_order_write_the_bytes_of_one_run(kind, audio, model, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = run(job(audio / "manifest.json", whole, model, kind))
    config = job(audio / "manifest.json", out, model, kind)
    results = []
    for index in (2, 0, 1):
        assert not (out / METADATA).exists()
        results.append(run(config, Part(index, 3)))
    assert [result.get("missing_shards", 0) for result in results] == [3, 1, 0]
    assert [result["shards"] for result in results] == [1, 2, 4]  # the last of the 4 parts reports the whole run
    assert [result["clips"] for result in results] == [2, 4, 7]
    assert results[2] == expected | {"command": expected["command"].replace(str(whole), str(out))}
    assert files_of(out) == files_of(whole) and METADATA in files_of(out)


@pytest.mark.slow
def test_each_part_computes_its_own_shards_once(audio, model, tmp_path):
    config = job(audio / "manifest.json", tmp_path / "out", model)
    for part, shards in ((Part(0, 3), [0, 3]), (Part(1, 3), [1]), (Part(2, 3), [2]), (None, [])):
        before = set((tmp_path / "out/.tokenize/done").glob("*"))
        counts: list[Totals] = []
        run(config, part, watch=lambda totals, counts=counts: counts.append(replace(totals)))
        added = {path.stem for path in set((tmp_path / "out/.tokenize/done").glob("*")) - before}
        assert added == {f"{shard:06d}" for shard in shards}
        assert counts[-1].done == counts[-1].shards == (4 if part is None else len(shards))


def run_part(config: TokenizeConfig, index: int, count: int) -> None:
    """Tokenize a part in a separate process."""
    run(config, Part(index, count))


@pytest.mark.slow
def test_parts_that_run_at_the_same_time_write_the_bytes_of_one_run(audio, model, tmp_path):
    run(job(audio, tmp_path / "whole", model, "manifest"))
    config = job(audio, tmp_path / "out", model, "manifest")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_part, args=(config, index, 3)) for index in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


class Killed(Exception):
    """Exception that ends a run after its first shard."""


@pytest.mark.slow
@pytest.mark.parametrize("finisher", [Part(0, 2), None])
def test_a_part_that_was_killed_resumes(finisher, audio, model, tmp_path):
    """The run can be completed by the same part, and by the command without a part."""
    run(job(audio, tmp_path / "whole", model))
    config = job(audio, tmp_path / "out", model)
    state = tmp_path / "out" / ".tokenize"

    def die(totals: Totals) -> None:
        if totals.done:
            raise Killed

    with pytest.raises(Killed):
        run(config, Part(0, 2), watch=die)
    (state / "staging/000002.0123abcd").mkdir(parents=True)  # of this part
    run(config, Part(1, 2))
    (state / "staging/000001.0123abcd").mkdir()  # of the other part, which may be running again
    assert not (tmp_path / "out" / METADATA).exists()
    times = {path: path.stat().st_mtime_ns for path in (state / "done").iterdir()}
    assert len(times) == 3
    run(config, finisher)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [path.name for path in (state / "staging").glob("*")] == ([] if finisher is None else ["000001.0123abcd"])


@pytest.mark.slow
def test_finishing_again_changes_nothing(audio, model, tmp_path):
    config = job(audio / "manifest.json", tmp_path / "out", model, "parquet")
    run(config, Part(0, 2))
    run(config, Part(1, 2))
    before = files_of(tmp_path / "out")
    for part in (Part(0, 2), Part(1, 2), None):
        (tmp_path / "out" / METADATA).unlink()
        run(config, part)
        assert files_of(tmp_path / "out") == before


@pytest.mark.slow
def test_failures_are_tried_again_by_the_part_that_has_them(audio, model, tmp_path):
    source = tmp_path / "audio"
    shutil.copytree(audio, source)
    config = job(source / "manifest.json", tmp_path / "out", model)
    assert run(config, Part(0, 2))["failures"] == 0
    assert run(config, Part(1, 2))["failures"] == 1
    shutil.copy(source / "0.wav", source / "missing.wav")
    assert run(config, Part(0, 2), retry_failed=True)["failures"] == 1
    assert run(config, Part(1, 2), retry_failed=True)["failures"] == 0
    assert not (tmp_path / "out" / "failures.jsonl").read_text()


@pytest.mark.slow
def test_a_part_that_finds_no_corpus_does_not_fix_the_number_of_parts(audio, model, tmp_path):
    config = job(audio / "manifest.json", tmp_path / "out", model)
    with pytest.raises(NemoLfrError, match="no such file"):
        run(replace(config, source=str(tmp_path / "none.json")), Part(0, 4))
    run(config, Part(0, 2))
    run(config, Part(1, 2))
    assert (tmp_path / "out" / METADATA).exists()


REFUSED = {
    "another number of parts": (lambda config: run(config, Part(0, 3)), "started with 2 parts, not 3"),
    "other options": (
        lambda config: run(replace(config, pad="magpie"), Part(1, 2)),
        "contains the tokens of another run .--pad was 'encode', but is now 'magpie'",
    ),
    "another corpus": (
        lambda config: run(replace(config, source=str(Path(config.source).parent)), Part(1, 2)),
        "the corpus was .*, but is now ",
    ),
    "another format": (
        lambda config: run(replace(config, kind="parquet"), Part(1, 2)),
        "--format was 'lfr', but is now 'parquet'",
    ),
    "Ray": (
        lambda config: tokenize(replace(config, part=Part(1, 2)), ray="local"),
        "--ray and --shard-of cannot be used",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(1, REFUSED))
def test_a_part_that_does_not_belong_to_the_run_is_refused(name, audio, model, tmp_path):
    config = job(audio / "manifest.json", tmp_path / "out", model)
    run(config, Part(0, 2))
    before = files_of(tmp_path / "out")
    call, message = REFUSED[name]
    with pytest.raises(NemoLfrError, match=message):
        call(config)
    assert files_of(tmp_path / "out") == before
    run(config, Part(1, 2))  # the other parts are not disturbed
    assert (tmp_path / "out" / METADATA).exists()


@pytest.mark.slow
def test_a_folder_that_grew_is_refused_and_does_not_disturb_the_running_parts(audio, model, tmp_path):
    shutil.copytree(audio, tmp_path / "audio")
    config = job(tmp_path / "audio", tmp_path / "out", model)
    messages = []

    def grow(totals: Totals) -> None:
        if totals.done == 1 and not messages:
            shutil.copy(audio / "0.wav", tmp_path / "audio" / "a.wav")
            with pytest.raises(NemoLfrError) as error:
                run(config, Part(1, 2))
            messages.append(str(error.value))

    assert run(config, Part(0, 2), watch=grow)["shards"] == 2
    assert "was changed after the run was started" in messages[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("running", "other", "message"),
    slow_after(
        1,
        [
            (Part(0, 2), Part(0, 2), "part 0/2 is being tokenized by another process"),
            (Part(0, 2), None, "another run is writing to this folder"),
            (None, Part(0, 2), "another run is writing to this folder"),
        ],
    ),
)
def test_no_shard_is_computed_twice_at_the_same_time(running, other, message, audio, model, tmp_path):
    config = job(audio / "manifest.json", tmp_path / "out", model)
    messages = []

    def start_other(totals: Totals) -> None:
        if not messages:
            with pytest.raises(NemoLfrError) as error:
                run(config, other)
            messages.append(str(error.value))

    run(config, running, watch=start_other)
    assert message in messages[0]


@pytest.mark.slow
def test_a_part_on_another_machine_is_detected_without_shared_folder_locks(audio, model, tmp_path):
    config = job(audio / "manifest.json", tmp_path / "out", model)
    run(config, Part(0, 2))
    lock_file = tmp_path / "out/.tokenize/parts/1-of-2.lock"
    script = f"import fcntl, os, sys; file = open({str(lock_file)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); print()"
    script += "; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(NemoLfrError, match="part 1/2 is being tokenized"):
            run(config)
        holder.communicate(timeout=60)
    assert run(config)["clips"] == CLIPS


SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "6"}
ARRAY |= {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "1"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
STEPS = {"SLURM_ARRAY_TASK_ID": "10", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "10"}
STEPS |= {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_STEP": "5"}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("0/1", {}, Part(0, 1)),
        ("3/4", SLURM, Part(3, 4)),
        ("auto", TORCHRUN, Part(5, 8, 1, 4)),
        ("auto", TORCHRUN | SLURM, Part(5, 8, 1, 4)),  # torchrun in a Slurm job
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, Part(1, 2)),
        ("auto", SLURM, Part(2, 4)),
        ("auto", ARRAY, Part(2, 4)),
        ("auto", ARRAY | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Part(2, 4)),
        ("auto", ARRAY | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Part(5, 8)),
        ("auto", STEPS, Part(2, 3)),
    ],
)
def test_the_part_comes_from_the_option_or_the_environment(text, environment, expected):
    assert parse_part(text, environment) == expected


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_the_tasks_of_a_job_array_cover_each_part_once(tasks):
    parts = [
        parse_part("auto", ARRAY | {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_PROCID": str(p), "SLURM_NTASKS": str(tasks)})
        for i in range(3, 7)
        for p in range(tasks)
    ]
    assert parts == [Part(index, 4 * tasks) for index in range(4 * tasks)]


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("4/4", {}, "part 4/4: pass I/N with I from 0 to N - 1"),
        ("0/0", {}, "part 0/0: pass I/N"),
        *(
            (text, {}, "expected I/N or auto")
            for text in ("", "1", "-1/4", "1/4/5", "1 / 4", "\u0661/\u0664", "a/b", "1/1e3")
        ),
        ("auto", {}, "found neither the variables RANK and WORLD_SIZE"),
        ("auto", {"RANK": "1"}, "variable WORLD_SIZE is not set"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ("auto", SLURM | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many', not a number"),
        ("auto", {"SLURM_PROCID": "0"}, "variable SLURM_NTASKS is not set"),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_COUNT": "3"}, "has 3 tasks from 3 to 6 in unequal steps"),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_ID": "7"}, "unequal steps"),
        ("auto", STEPS | {"SLURM_ARRAY_TASK_STEP": "0"}, "unequal steps"),
    ],
)
def test_an_invalid_part_is_a_one_line_error(text, environment, message):
    with pytest.raises(NemoLfrError, match=message):
        parse_part(text, environment)


@pytest.mark.parametrize("arguments", [(1, 1), (-1, 2), (0, 0), (0.0, 1), ("0", 1), (True, 2), (0, 1, 2, 2)])
def test_an_invalid_part_of_the_api_is_refused(arguments):
    with pytest.raises(NemoLfrError, match=r"^part "):
        Part(*arguments)


def test_processes_of_torchrun_share_the_cores_of_a_machine(audio, model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    config = job(audio, tmp_path / "out", model, threads=2)
    names = []
    for part in (None, Part(0, 8, 1, 4), Part(0, 8, 1, 8)):
        executor = choose_executor(replace(config, part=part), 10, None, "cpu", None)
        names.append(executor.__name__)
    assert names == ["run", "<lambda>", "<lambda>"]  # 4 processes; 1, which is this one


@pytest.mark.slow
def test_the_command_line_reports_each_part(audio, model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["tokenize", audio / "manifest.json", "--out", out, "--model", model, "--format", "lfr", "--json"]
    command += ["--shard-size", 2, "--workers", 1, "--device", "cpu", "--shard-of"]
    printed = []
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for value, code in (("auto", 1), ("0/2", 1)):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, command), value])
        captured = capsys.readouterr()
        printed.append(json.loads(captured.out))
        assert ended.value.code == code, captured.err
    assert (printed[0]["metadata"], printed[0]["missing_shards"], printed[0]["clips"]) == (None, 2, 3)
    assert (printed[1]["metadata"], printed[1]["missing_shards"], printed[1]["clips"]) == (str(out / METADATA), 0, 7)
    assert [len(result["failures"]) for result in printed] == [1, 1]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, command), "0/3"])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and "started with 2 parts, not 3" in captured.err
