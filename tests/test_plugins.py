"""Tests of command-line extensions by installed packages, which need one file and one entry point each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.plugins import load_plugin, plugin_names
from tests.corpora import write_codec
from tests.crash import ROOT
from tests.models import RATE, synthesize
from tests.plugins import install

FORMAT = """
import json

from nemo_lfr.corpus.formats.base import FormatReader, FormatWriter, OutputFormat, Row


class Writer(FormatWriter):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lines = []

    def write(self, clip, tokens, num_samples, context):
        row = {"id": clip.id, "tokens": tokens.tolist(), "num_samples": num_samples, "labels": clip.labels}
        self.lines.append(json.dumps(row))

    def close(self):
        with self._writing(f"{self.index}.jsonl") as path:
            path.write_text("".join(line + "\\n" for line in self.lines))


class Reader(FormatReader):
    def rows(self, files, start, stop):
        for line in files.path(f"{files.shard}.jsonl").read_text().splitlines()[start:]:
            yield Row(json.loads, line)


class JsonLines(OutputFormat):
    name, writer, reader = "jsonl", Writer, Reader
    supports_context = False
"""

SOURCE = '''
from functools import partial
from pathlib import Path

from nemo_lfr.corpus.sources.base import Clip, CorpusReader
from nemo_lfr.io.reading import read_file


class PathList(CorpusReader):
    """A text file with the path of a recording on each line."""

    @classmethod
    def accepts(cls, path):
        return path.suffix == ".paths"

    @classmethod
    def open(cls, path, options):
        return cls(path)

    def __init__(self, path):
        self.path = path
        self.lines = path.read_text().splitlines()

    @property
    def files(self):
        return [self.path]

    def shards(self, size):
        return [{"start": start, "size": size} for start in range(0, len(self.lines), size)]

    def read(self, shard):
        for line in self.lines[shard["start"] : shard["start"] + shard["size"]]:
            recording = self.path.parent / line
            yield Clip(Path(line).stem, line, partial(read_file, recording, None, None), path=recording)
'''

COMMAND = """
import click


@click.command(short_help="Count the frames of a token file.")
@click.argument("path")
def count(path):
    from nemo_lfr.io.token_file import TokenReader

    with TokenReader(path) as reader:
        click.echo(reader.num_frames)
"""


CRASH = """
import click


@click.command()
def crash():
    1 / 0
"""


def run(folder: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line with a folder of installed packages."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nemo_lfr", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def path_list(tmp_path):
    """Return a list of three recordings."""
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", synthesize(0.3 + 0.1 * number), RATE)
    (tmp_path / "corpus.paths").write_text("0.wav\n1.wav\n2.wav\n")
    return tmp_path / "corpus.paths"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_tokenize_uses_a_format_and_a_source_of_installed_packages(path_list, tmp_path, workers):
    packages, out = tmp_path / "site", tmp_path / "out"
    install(packages, "format_of_a_test", FORMAT, {"nemo_lfr.formats:jsonl": "JsonLines"})
    install(packages, "source_of_a_test", SOURCE, {"nemo_lfr.sources:paths": "PathList"})
    model = ("--model", write_codec(tmp_path / "model.nemo"), "--device", "cpu")
    done = run(
        packages, "tokenize", path_list, "--out", out, "--format=jsonl", "--shard-size=2", "--workers", workers, *model
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for shard in (0, 1) for line in (out / f"{shard}.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2"]
    assert all(len(line["tokens"]) == 8 for line in lines)
    shutil.rmtree(out / ".tokenize", ignore_errors=True)  # read without the run's records
    done = run(packages, "detokenize", out, "--out", tmp_path / "audio", *model)
    assert done.returncode == 0, done.stderr
    for line in lines:
        assert soundfile.info(tmp_path / "audio" / f"{line['id']}.wav").frames == line["num_samples"]
    # Without the package, the folder and the option are refused by name.
    for arguments in (("detokenize", out, "--out", tmp_path / "again"), ("tokenize", path_list, "--format=jsonl")):
        done = run(tmp_path, *arguments)
        assert done.returncode == 2 and "jsonl" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_command_of_an_installed_package_runs(tmp_path):
    packages = install(tmp_path / "site", "command_of_a_test", COMMAND, {"nemo_lfr.commands:count": "count"})
    soundfile.write(tmp_path / "a.wav", synthesize(1.0), RATE)
    assert run(packages, "encode", tmp_path / "a.wav", "--out", tmp_path / "a.lfr").returncode == 0
    done = run(packages, "count", tmp_path / "a.lfr")
    assert (done.returncode, done.stdout) == (0, "22\n")
    assert "Count the frames of a token file." in run(packages, "--help").stdout
    done = run(packages, "count", tmp_path / "a.lfr", "--json")
    assert (done.returncode, json.loads(done.stdout), "22" in done.stderr) == (0, {"failures": []}, True)
    assert run(packages, "count", tmp_path / "missing.lfr", "--json").returncode == 2
    packages = install(tmp_path / "other", "crash_of_a_test", CRASH, {"nemo_lfr.commands:crash": "crash"})
    done = run(packages, "crash", "--json")
    message = "the command crash_of_a_test.crash of the package crash_of_a_test raised ZeroDivisionError (division by"
    assert done.returncode == 2 and message in json.loads(done.stdout)["failures"][0]["error"]
    assert "Traceback" not in done.stderr and "Traceback" in run(packages, "crash", "--verbose").stderr


BROKEN = {
    "nemo_lfr.commands:broken": (
        ["broken", "--option", "x"],
        "nemo_lfr.commands) of the package broken_of_a_test cannot be lo",
    ),
    "nemo_lfr.formats:broken": (
        ["tokenize", "LIST", "--out", "o", "--format", "broken"],
        "entry point 'broken' (group nemo_lfr.formats) of",
    ),
    "nemo_lfr.sources:broken": (
        ["tokenize", "LIST", "--out", "o"],
        "entry point 'broken' (group nemo_lfr.sources) of",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("entry_point", BROKEN)
def test_a_package_that_cannot_be_imported_is_named(entry_point, path_list, tmp_path):
    packages = install(tmp_path / "site", "broken_of_a_test", "import no_such_package", {entry_point: "thing"})
    arguments, message = BROKEN[entry_point]
    arguments = [str(path_list) if text == "LIST" else text for text in arguments]
    done = run(packages, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]  # a note about the bundled codec may precede it
    assert message in error and "No module named 'no_such_package'" in error
    assert "Traceback" not in done.stderr
    assert run(packages, "--help").returncode == 0


def test_entry_points_are_found_by_group_and_name(tmp_path, monkeypatch):
    install(
        tmp_path, "things_of_a_test", "thing = 3", {"nemo_lfr.things:three": "thing", "nemo_lfr.things:four": "no"}
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert plugin_names("nemo_lfr.things") == ["four", "three"]
    assert load_plugin("nemo_lfr.things", "three") == 3
    assert load_plugin("nemo_lfr.things", "five") is None
    with pytest.raises(
        NemoLfrError,
        match=r"entry point 'four' \(group nemo_lfr.things\) of the package things_of_a_test cannot be loaded",
    ):
        load_plugin("nemo_lfr.things", "four")


def test_a_module_that_exits_when_it_is_imported_is_named(tmp_path, monkeypatch):
    install(tmp_path, "script_of_a_test", "import sys\nsys.exit(0)", {"nemo_lfr.things:five": "thing"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NemoLfrError, match=r"package script_of_a_test cannot be loaded \(it exits with 0"):
        load_plugin("nemo_lfr.things", "five")
