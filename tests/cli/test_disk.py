"""Tests of every command that writes: on a full disk, in an unwritable place, and after a killed run.

A limit on the file size simulates a full disk: writes beyond the limit also fail, but with a different error number.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

from nemo_lfr.cli.main import main
from nemo_lfr.corpus.formats import BUILT_IN
from tests.cli.test_cli import run
from tests.corpora import write_codec, write_tokens
from tests.crash import ROOT
from tests.models import ONE_STAGE, RATE, codec_config, synthesize, write_nemo
from tests.packages import require
from tests.tiers import slow_after

require("lhotse", "pyarrow", "matplotlib", "onnxscript", reason="pip install '.[corpus,evaluate,onnx]'")

# Journals from which an interrupted command resumes. Lines are appended, and an incomplete line is skipped.
JOURNALS = {".opened.jsonl", "sent.jsonl", "metrics.jsonl", "lock"}
COMMANDS = {
    "demo": "demo --out {out} --model {model}",
    "encode": "encode {audio}/b/1.wav --out {out} --model {model} --overwrite",
    "encode a batch": "encode {audio} --out {out} --model {model} --overwrite",
    "decode wav": "decode {tokens} --out {out} --model {model} --overwrite",
    "decode flac": "decode {tokens}/b/1.lfr --out {out} --model {model} --format flac --overwrite",
    **{
        f"tokenize {kind}": f"tokenize {{audio}} --out {{out}} --model {{model}} --format {kind} --workers 1"
        for kind in BUILT_IN
    },
    "detokenize": "detokenize {corpus} --out {out} --model {model}",
    "prepare": "prepare folder {audio} --out {out} --valid-share 0.5",
    "evaluate": "evaluate {audio}/manifest.json --codec lfr:{model} --out {out} --workers 1 --examples 1",
    "export": "export onnx --out {out} --model {small} --overwrite",
}
SEVERAL = {"encode a batch", "decode wav"}  # commands that report an error for each file
every_command = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "export")) for name in COMMANDS]
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    found = {name: root / name for name in ("audio", "tokens", "corpus")}
    found |= {"model": root / "tiny.nemo", "small": root / "small.nemo"}
    write_codec(found["model"])
    write_nemo(found["small"], codec_config(**ONE_STAGE))  # a conversion to ONNX takes time for each layer
    lines = []
    for number, folder in enumerate("ab"):
        (found["audio"] / folder).mkdir(parents=True)
        soundfile.write(found["audio"] / folder / f"{number}.wav", synthesize(0.4 + 0.2 * number, number), RATE)
        lines.append(json.dumps({"audio_filepath": f"{folder}/{number}.wav", "duration": 0.4 + 0.2 * number}))
    (found["audio"] / "manifest.json").write_text("\n".join(lines))
    main(["encode", str(found["audio"]), "--out", str(found["tokens"]), "--model", str(found["model"])])
    write_tokens(found["corpus"], "lfr", [2, 1], found["model"])
    return found


@pytest.fixture(scope="module")
def command(inputs) -> Callable[[str, Path], list[str]]:
    """Return the arguments of a command, by its name and --out."""
    return lambda name, out: [word.format(**inputs, out=out) for word in COMMANDS[name].split()]


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def results_of(out: Path) -> dict[str, bytes]:
    """Return the contents of the files with final names."""
    return {name: data for name, data in files_of(out).items() if Path(name).name not in JOURNALS}


def leftovers_of(out: Path) -> list[str]:
    aside = re.compile(r"\.part$|^\.writing-|staging/")
    return [str(path) for path in out.rglob("*") if aside.search(str(path.relative_to(out))) or path.suffix == ".part"]


@contextlib.contextmanager
def full_disk(free: int) -> Iterator[None]:
    """Limit files to `free` bytes, and ignore the signal that exceeding the limit raises."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def one_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert each network to ONNX once, because a conversion takes 5 s and its result does not depend on the disk."""
    import torch

    convert, converted = torch.onnx.export, {}

    def export(*arguments: Any, **options: Any) -> Any:
        key = tuple(options["input_names"])
        if key not in converted:
            converted[key] = convert(*arguments, **options)
        return converted[key]

    monkeypatch.setattr(torch.onnx, "export", export)


def complaints(err: str) -> list[str]:
    """Return the errors on stderr; other lines may only name the codec, skipped files or a summary."""
    lines = [line for line in err.splitlines() if re.match(r"nemo-lfr: (error|failed): ", line)]
    others = [line for line in err.splitlines() if line not in lines]
    usual = r"nemo-lfr: using the bundled codec|.* skipped: |nemo-lfr: \d+ of \d+ failed"
    assert all(re.match(usual, line) for line in others), others
    return lines


@pytest.mark.slow
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("one_conversion")
@every_command
def test_full_disk_names_the_file_in_one_line_and_leaves_no_partial_file(name, command, tmp_path, capsys):
    """Run with three limits (0, a quarter of the largest file, and slightly less than its size), then without one."""
    whole, out = tmp_path / "whole", tmp_path / "other"
    assert run(capsys, *command(name, whole))[0] == 0
    expected = results_of(whole)
    largest = max(len(data) for data in files_of(whole).values())
    for free in (
        0,
        largest // 4,
        largest - 99,
    ):  # the size of a report varies by a few bytes, with its figures of speed
        shutil.rmtree(out, ignore_errors=True)
        with full_disk(free):
            code, _, err = run(capsys, *command(name, out))
        lines = complaints(err)
        assert code in (1, 2) and lines and (len(lines) == 1 or name in SEVERAL), (free, err)
        for line in lines:
            match = re.fullmatch(r"nemo-lfr: (?:error|failed): (.+): File too large\.", line)
            assert match and Path(match[1]).is_relative_to(out), (free, line)
            named = Path(match[1])
            assert named.name in JOURNALS or str(named.relative_to(out)) in files_of(whole), (free, line)
        for path, data in results_of(out).items():
            same = len(data) == len(expected[path]) or data.replace(bytes(out), bytes(whole)) == expected[path]
            assert same, (free, path)  # the contents of float WAVs differ: they include the time
        assert leftovers_of(out) == []
    assert run(capsys, *command(name, out))[0] == 0
    assert results_of(out).keys() == expected.keys()


@every_command
@pytest.mark.parametrize("place", slow_after(1, ["file/out", "file/deeper/out", "/dev/null/out"]))
def test_output_below_a_file_is_a_one_line_error(name, place, command, tmp_path, capsys):
    """A path below a file is also unwritable for root; a read-only folder would not be."""
    (tmp_path / "file").write_text("mine")
    out = tmp_path / place
    code, printed, err = run(capsys, *command(name, out))
    (line, *others) = complaints(err)
    assert code in (1, 2) and printed == "" and (not others or name in SEVERAL)
    reasons = (
        ": (Not a directory|File exists)",
        " cannot be written: .* is not a folder; choose another --out",
        " is a file, not a folder; choose another name",
    )
    places = "|".join(re.escape(str(path)) for path in (out.parent, tmp_path / "file"))
    assert re.fullmatch(rf"nemo-lfr: (error|failed): ({places})[^:]*({'|'.join(reasons)})\.", line)
    assert (tmp_path / "file").read_text() == "mine"


KILLED = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from nemo_lfr.cli.main import main
import nemo_lfr.io.audio, nemo_lfr.evaluation.run  # noqa: what writes no files of its own
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detokenize", "prepare", "evaluate", "encode a batch", "tokenize parquet"])
def test_next_run_finishes_a_killed_run(name, command, tmp_path, capsys):
    """The system kills the process when a file grows too large, so that no Python code runs afterward."""
    whole, out = tmp_path / "whole", tmp_path / "other"
    assert run(capsys, *command(name, whole))[0] == 0
    free = {"prepare": 40, "encode a batch": 200}.get(name, 2000)
    arguments = [sys.executable, "-c", KILLED, str(free), *command(name, out)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    if name != "prepare":  # `prepare` is killed while it writes its journal
        assert leftovers_of(out), files_of(out)
    assert run(capsys, *command(name, out))[0] == 0
    assert leftovers_of(out) == [] and results_of(out).keys() == results_of(whole).keys()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize(
    "name", ["demo", "encode", "decode flac", "tokenize manifest", "detokenize", "prepare", "evaluate"]
)
def test_leftovers_are_removed_and_never_opened_through_a_link(name, command, tmp_path, capsys):
    """Put leftovers of three killed runs beside every result: a file, a link and a pipe."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("precious")
    assert run(capsys, *command(name, out))[0] == 0
    for path in [out / result for result in results_of(out)]:
        if name.startswith("tokenize") and path.parent != out and path.parent.name != "done":
            continue  # these are renamed from a staging folder, which is removed as a whole
        file, link, pipe = (path.with_name(f"{path.name}.0123456{number}.part") for number in range(3))
        file.write_text("half")
        link.symlink_to(victim)
        os.mkfifo(pipe)
        if "." in path.name and name != "detokenize":
            path.unlink()  # was not finished
    assert run(capsys, *command(name, out))[0] == 0
    assert leftovers_of(out) == [] and victim.read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "evaluate"])
def test_a_journal_that_is_a_link_is_not_followed(name, command, tmp_path, capsys):
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("precious")
    assert run(capsys, *command(name, out))[0] == 0
    journal = next(out.rglob("sent.jsonl"), out / ".opened.jsonl")
    journal.unlink(missing_ok=True)
    journal.symlink_to(victim)
    code, _, err = run(capsys, *command(name, out))
    assert code == (2 if name == "prepare" else 1) and "is a link, and links are not followed" in complaints(err)[0]
    assert victim.read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])  # SIGHUP raises the exception of SIGTERM
def test_terminated_export_leaves_no_files_and_reports_it(name, command, tmp_path):
    out = tmp_path / "out"
    defaults = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"import signal, sys; {defaults}\nfrom nemo_lfr.cli.main import main; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", script, *command("export", out)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(out.glob(".writing-*")):
        assert process.poll() is None
        time.sleep(0.02)
    number = getattr(signal, name)
    process.send_signal(number)
    printed, err = process.communicate()
    assert process.returncode == 128 + number
    assert (
        printed == "" and err.lstrip() == f"nemo-lfr: {'interrupted' if name == 'SIGINT' else f'stopped by {name}'}.\n"
    )
    assert list(out.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("info --json --quiet >/dev/full", 1, "nemo-lfr: error: stdout: No space left on device.\n"),
        (
            "encode {audio}/b/1.wav - --model {model} >/dev/full",
            1,
            "nemo-lfr: error: stdout: No space left on device.\n",
        ),
        (
            "decode {tokens}/b/1.lfr - --model {model} >/dev/full",
            1,
            "nemo-lfr: error: stdout: No space left on device.\n",
        ),
        ("encode {audio}/b/1.wav --model {model} --out {out} 2>/dev/full", 0, ""),
        ("encode nowhere.wav 2>/dev/full", 2, ""),
    ],
)
def test_full_disk_behind_stdout_or_stderr_is_handled(line, code, said, inputs, tmp_path):
    shell = f"exec '{sys.executable}' -m nemo_lfr {line.format(**inputs, out=tmp_path / 'out')}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (code, said)
