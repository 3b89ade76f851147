"""Every command that writes: on a full disk, where nothing may be written, and after a run that was killed.

A limit on the size of files stands for the full disk: a write beyond it fails in the same way, with another number.
"""

import contextlib
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile

from nemo_lfr.cli import main
from nemo_lfr.corpus.sinks import SINKS
from tests.corpora import write_codec, write_tokens
from tests.models import RATE, synthesize
from tests.test_cli import run

for module, extra in (("lhotse", "corpus"), ("pyarrow", "corpus"), ("matplotlib", "evaluate"), ("onnxscript", "onnx")):
    pytest.importorskip(module, reason=f"pip install 'nemo-lfr[{extra}]'")

# What a command that is cut off goes on with: lines are added, and one that was cut is passed over.
JOURNALS = {".opened.jsonl", "sent.jsonl", "metrics.jsonl", "lock"}
COMMANDS = {
    "demo": "demo --out {out} --model {model}",
    "encode": "encode {audio}/b/1.wav --out {out} --model {model} --overwrite",
    "encode a batch": "encode {audio} --out {out} --model {model} --overwrite",
    "decode wav": "decode {tokens} --out {out} --model {model} --overwrite",
    "decode flac": "decode {tokens}/b/1.lfr --out {out} --model {model} --format flac --overwrite",
    **{
        f"tokenize {kind}": f"tokenize {{audio}} --out {{out}} --model {{model}} --format {kind} --workers 1"
        for kind in SINKS
    },
    "detokenize": "detokenize {corpus} --out {out} --model {model}",
    "prepare": "prepare folder {audio} --out {out} --valid-share 0.5",
    "evaluate": "evaluate {audio}/manifest.json --codec lfr:{model} --out {out} --jobs 1 --examples 1",
    "export": "export onnx --out {out} --model {model} --overwrite",
}
SEVERAL = {"encode a batch", "decode wav"}  # files, each of which fails by itself
every_command = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "export")) for name in COMMANDS]
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    found = {name: root / name for name in ("audio", "tokens", "corpus")} | {"model": root / "tiny.nemo"}
    write_codec(found["model"])
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
    """(name, --out) -> arguments."""
    return lambda name, out: [word.format(**inputs, out=out) for word in COMMANDS[name].split()]


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def results_of(out: Path) -> dict[str, bytes]:
    """Files under their final names."""
    return {name: data for name, data in files_of(out).items() if Path(name).name not in JOURNALS}


def leftovers_of(out: Path) -> list[str]:
    aside = re.compile(r"\.part$|^\.writing-|staging/")
    return [str(path) for path in out.rglob("*") if aside.search(str(path.relative_to(out))) or path.suffix == ".part"]


@contextlib.contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file grows beyond `free` bytes; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def complaints(err: str) -> list[str]:
    """Errors on stderr, beside lines that say which codec is used, what is passed over and what was done."""
    lines = [line for line in err.splitlines() if re.match(r"nemo-lfr: (error|failed): ", line)]
    others = [line for line in err.splitlines() if line not in lines]
    usual = (
        r"using the small codec|.* passed over: |.* x real time$|.*\dx real time$|nemo-lfr: \d+ of \d+ files failed"
    )
    assert all(re.match(usual, line) for line in others), others
    return lines


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@every_command
def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_no_cut_one(name, command, tmp_path, capsys):
    """Nothing fits; something does; all but the end of the largest file does; then there is room, and all is done."""
    whole, out = tmp_path / "whole", tmp_path / "other"
    assert run(capsys, *command(name, whole))[0] == 0
    expected = results_of(whole)
    largest = max(len(data) for data in files_of(whole).values())
    for free in (0, largest // 4, largest - 1):
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
            assert same, (free, path)  # their length alone, as libsndfile writes the time into a WAV of floats
        assert leftovers_of(out) == []
    assert run(capsys, *command(name, out))[0] == 0
    assert results_of(out).keys() == expected.keys()


@every_command
@pytest.mark.parametrize("place", ["file/out", "file/deeper/out", "/dev/null/out"])
def test_an_output_below_a_file_is_one_line(name, place, command, tmp_path, capsys):
    """Stands for all places where nothing may be written, and holds for root too."""
    (tmp_path / "file").write_text("mine")
    out = tmp_path / place
    code, printed, err = run(capsys, *command(name, out))
    (line, *others) = complaints(err)
    assert code in (1, 2) and printed == "" and (not others or name in SEVERAL)
    assert re.fullmatch(
        rf"nemo-lfr: (error|failed): {re.escape(str(out.parent))}.*: (Not a directory|File exists)\.", line
    )
    assert (tmp_path / "file").read_text() == "mine"
