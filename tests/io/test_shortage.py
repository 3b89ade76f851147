"""Tests that too little memory, missing shared memory and failing imports are reported in one line."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest
import soundfile
import torch

from nemo_lfr.cli.files import FileTask, run_tasks
from nemo_lfr.cli.main import main
from nemo_lfr.cli.session import Session
from nemo_lfr.codec.onnx.export import export_onnx
from nemo_lfr.errors import MissingExtraError, NemoLfrError
from nemo_lfr.evaluation.report import check_packages
from nemo_lfr.io.shortage import require, sharing, shortage_of
from tests.corpora import write_tokens
from tests.crash import ROOT
from tests.models import synthesize

SHORTAGES = {
    "numpy": (lambda: np.zeros(2**60, np.uint8), "not enough memory"),
    "torch": (lambda: torch.empty(2**60, dtype=torch.uint8), "not enough memory"),
    "python": (lambda: bytearray(2**62), "not enough memory"),
    "threads": (lambda: raising(RuntimeError("can't start new thread")), "no more threads"),
}


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", SHORTAGES)
def test_out_of_memory_fails_only_its_file(name, tmp_path, capsys):
    run_short, said = SHORTAGES[name]
    jobs = [FileTask(tmp_path / f"{number}.wav", tmp_path / f"{number}.lfr") for number in range(3)]

    def work(batch):
        for job in batch:
            if len(batch) > 1 or job is jobs[1]:  # memory is too small for the batch, and for one of its files
                run_short()
            yield {"input": str(job.source), "output": str(job.target)}

    session = Session()
    with click.Context(click.Command("encode"), obj=session):
        run_tasks(jobs, work, 8)
    out, err = capsys.readouterr()
    assert [record["input"] for record in session.failures] == [str(jobs[1].source)] and out.split() == [
        str(jobs[0].target),
        str(jobs[2].target),
    ]
    assert err.count(said) == 1 and f"{jobs[1].source}: {said}" in err


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not_reported_as_a_shortage(error):
    assert shortage_of(error) is None


BROKEN = {
    "raise KeyError('PATH')": r"whole is installed, but cannot be imported \(KeyError: 'PATH'\)",
    "raise ImportError('libx.so: undefined symbol')": r"cannot be imported \(ImportError: libx.so: undefined symbol\)",
    "raise OSError('no libsndfile')": r"cannot be imported \(OSError: no libsndfile\)",
    "raise MemoryError": "whole cannot be imported: not enough memory",
    "raise ImportError('libtorch.so: failed to map segment from shared object')": "not enough memory",
    "import no_such_package": "whole is not installed: pip install whole",
    None: "whole is not installed: pip install whole",
}


@pytest.mark.parametrize("line", BROKEN)
def test_failing_installed_package_is_not_reported_as_missing(line, tmp_path, monkeypatch):
    if line is not None:
        (tmp_path / "whole.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=BROKEN[line]):
        require("whole")
    monkeypatch.delitem(sys.modules, "whole", raising=False)


FIRST_AND_BROKEN = {
    "ONNX": ("onnx", "onnxscript", lambda folder: export_onnx(None, folder)),
    "report": ("jinja2", "matplotlib", lambda folder: check_packages()),
}


@pytest.mark.parametrize(("first", "broken", "work"), FIRST_AND_BROKEN.values(), ids=list(FIRST_AND_BROKEN))
def test_of_two_packages_the_broken_one_is_named(first, broken, work, tmp_path, monkeypatch):
    (tmp_path / f"{broken}.py").write_text("raise ImportError('libx.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, first, ModuleType(first))
    monkeypatch.delitem(sys.modules, broken, raising=False)
    with pytest.raises(MissingExtraError, match=rf"^{broken} is installed, but cannot be imported"):
        work(tmp_path)


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), RuntimeError("unable to open shared memory")])
def test_no_shared_memory_is_a_one_line_error(error):
    with pytest.raises(NemoLfrError, match="several --workers need shared memory"), sharing("several --workers"):
        raise error
    with pytest.raises(FileNotFoundError), sharing("several --workers"):
        raise FileNotFoundError(2, "No such file or directory", "/x")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files, and with them of shared memory")
def test_tokens_are_read_without_shared_memory(tmp_path):
    pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
    write_tokens(tmp_path, "lfr", [2])
    program = (
        "import resource\n"
        "from nemo_lfr.corpus.dataset import TokenDataset\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        f"print(len(list(TokenDataset({str(tmp_path)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "2\n"


@pytest.mark.skipif(os.name == "nt", reason="a current folder cannot be removed there")
@pytest.mark.parametrize(
    "arguments", [["encode", "a.wav"], ["tokenize", "/x", "--out", "/y"], ["info"], ["demo"]], ids=str
)
def test_removed_current_folder_is_a_one_line_error(arguments, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("nemo-lfr: error: the current folder cannot be used")


def test_an_environment_without_path_gets_the_default_path(monkeypatch, capsys):
    monkeypatch.delenv("PATH")
    main(["--version"])
    assert os.environ["PATH"] == os.defpath and Path(sys.executable).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_a_limit_on_address_space_that_is_too_low_is_a_one_line_error(tmp_path):
    """With some limits between 0.7 and 1 GB, oneDNN would end the process with a segmentation fault."""
    soundfile.write(tmp_path / "a.wav", synthesize(0.1), 22050)
    command = f"ulimit -v 740000; exec {shlex.quote(sys.executable)} -m nemo_lfr encode a.wav"
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and not (tmp_path / "a.lfr").exists()
    error = result.stderr.splitlines()[-1]
    assert (
        error.startswith("nemo-lfr: error: not enough memory: running PyTorch needs about ") and "ulimit -v" in error
    )
