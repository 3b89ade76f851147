"""Tests of the rules for all commands: JSON, failure records, exit codes, messages and names of options."""

import gzip
import json
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import pytest
import soundfile

from nemo_lfr.bundled import bundled_quality
from nemo_lfr.cli import main as cli
from nemo_lfr.cli.command import Command, RenamedOption
from nemo_lfr.errors import Failure
from tests.cli.test_cli import run
from tests.corpora import write_tokens
from tests.models import ONE_STAGE, codec_config, export_smallest, speech_like, write_nemo
from tests.tiers import slow_after, slow_if

ROOT = Path(__file__).parents[2]


def all_commands(group: click.Group = cli.app, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Yield the words and the object of each command that is not a group."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(all_commands())
# `serve` runs until a signal, and `export web` needs an npm package; tests/serve and tests/web check their output.
OTHERS = {"serve", "export web"}
every_command = pytest.mark.parametrize("name", sorted(COMMANDS.keys() - OTHERS))


class Case(NamedTuple):
    """Arguments of a command that succeed, and arguments for which one input fails.

    {in} and {out} stand for the input and output folders.
    """

    success: str | None  # None for `export onnx`, which takes long; `export_smallest` runs it
    failure: str | None = None
    extras: tuple[str, ...] = ()


LFR = "--codec lfr:{in}/tiny.nemo --workers 1 --examples 0"
CASES = {
    "encode": Case("{in}/audio --out {out} --model {in}/tiny.nemo", "{in}/mixed --out {out} --model {in}/tiny.nemo"),
    "decode": Case("{in}/tokens --out {out} --model {in}/tiny.nemo", "{in}/cut --out {out} --model {in}/tiny.nemo"),
    "info": Case("{in}/audio/a.wav {in}/tokens/a.lfr {in}/tiny.nemo {in}/audio", "{in}/audio/a.wav {in}/cut/a.lfr"),
    "demo": Case("--out {out}"),
    "export golden": Case("--model {in}/tiny.nemo --out {out}/g.safetensors"),
    "export onnx": Case(None, extras=("onnx", "onnxruntime", "onnxscript")),
    "export safetensors": Case("--model {in}/tiny.nemo --out {out}"),
    "prepare": Case("folder {in}/audio --out {out}", "folder {in}/mixed --out {out} --no-check"),
    "tokenize": Case(
        "{in}/manifest.json --out {out} --model {in}/tiny.nemo --format lfr --workers 1 --device cpu",
        "{in}/mixed.json --out {out} --model {in}/tiny.nemo --format lfr --workers 1 --device cpu",
        ("lhotse", "pyarrow"),
    ),
    "detokenize": Case(
        "{in}/corpus --out {out} --model {in}/tiny.nemo",
        "{in}/damaged --out {out} --model {in}/tiny.nemo",
        ("lhotse",),
    ),
    "evaluate": Case(
        "{in}/manifest.json --out {out} " + LFR, "{in}/mixed.json --out {out} " + LFR, ("jinja2", "matplotlib")
    ),
    "entropy fit": Case(
        "{in}/tokens --out {out}/m.lfrm --epochs 0.1", "{in}/tokens {in}/cut --out {out}/m.lfrm --epochs 0.1"
    ),
}
SLOW = ("export onnx", "demo", "evaluate")
run_of_every_command = pytest.mark.parametrize("name", slow_if(sorted(CASES), SLOW))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write two clips, their tokens, a manifest and a tokenized corpus, and a version of each with a damaged part."""
    root = tmp_path_factory.mktemp("contract")
    for name in ("audio", "mixed", "tokens", "cut"):
        (root / name).mkdir()
    for number, name in enumerate("ab"):
        for place in ("audio", "mixed"):
            soundfile.write(root / place / f"{name}.wav", speech_like(20_000, seed=number).numpy(), 22050)
    (root / "mixed" / "c.wav").write_bytes(b"RIFF nonsense")
    for name, clips in (("manifest", ["a", "b"]), ("mixed", ["a", "b", "c"])):
        place = "mixed" if name == "mixed" else "audio"
        lines = [json.dumps({"audio_filepath": f"{place}/{clip}.wav", "duration": 0.9}) for clip in clips]
        (root / f"{name}.json").write_text("\n".join(lines))
    (root / "table.csv").write_text("audio_filepath,duration\naudio/a.wav,0.9\n")
    (root / "table.tsv.gz").write_bytes(gzip.compress(b"path\naudio/a.wav\n"))
    write_nemo(root / "tiny.nemo", codec_config(**ONE_STAGE))
    cli.main(["encode", str(root / "audio"), "--out", str(root / "tokens"), "--model", str(root / "tiny.nemo")])
    data = (root / "tokens" / "a.lfr").read_bytes()
    (root / "cut" / "a.lfr").write_bytes(data[: len(data) // 2])
    (root / "cut" / "b.lfr").write_bytes((root / "tokens" / "b.lfr").read_bytes())
    for name in ("corpus", "damaged"):
        write_tokens(root / name, "lfr", [2], root / "tiny.nemo")
    victim = sorted((root / "damaged").rglob("*.lfr"))[0]
    victim.write_bytes(victim.read_bytes()[:-30] + bytes(30))
    return root


def arguments_of(name: str, text: str, folder: Path, out: Path) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    return [*name.split(), *(word.replace("{in}", str(folder)).replace("{out}", str(out)) for word in text.split())]


def problems(value: Any, kind: Any, where: str = "$") -> list[str]:
    """Return the differences between a JSON value and a type (TypedDict, list, dict, union, Literal or plain type)."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            keys = sorted(value.keys() ^ hints.keys()) if isinstance(value, dict) else value
            return [f"{where}: {kind.__name__}: {keys}"]
        return [problem for key, inner in hints.items() for problem in problems(value[key], inner, f"{where}.{key}")]
    if origin is Literal:
        return [] if value in parts else [f"{where}: {value!r}"]
    if origin in (typing.Union, types.UnionType):
        found = [problems(value, part, where) for part in parts]
        return [] if [] in found else [f"{where}: {found}"]
    if origin is list:
        if not isinstance(value, list):
            return [f"{where}: {value!r}"]
        return [problem for item in value for problem in problems(item, parts[0], f"{where}[]")]
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{where}: {value!r}"]
        return [problem for key, item in value.items() for problem in problems(item, parts[1], f"{where}.{key}")]
    allowed = (int, float) if kind is float else (kind,)
    return [] if type(value) in allowed else [f"{where}: {value!r} is no {kind}"]


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def need(case: Case) -> None:
    for package in case.extras:
        pytest.importorskip(package)


def test_every_command_has_a_test_case_and_an_output_type():
    assert COMMANDS.keys() == CASES.keys() | OTHERS
    assert all(isinstance(command, Command) and typing.is_typeddict(command.result) for command in COMMANDS.values())


@run_of_every_command
def test_json_output_is_the_only_stdout_and_has_the_documented_type(name, folder, tmp_path, capsys, once):
    need(CASES[name])
    if name == "export onnx":
        out = (once("onnx-smallest", export_smallest) / "stdout.json").read_text()
    else:
        code, out, err = run(capsys, *arguments_of(name, CASES[name].success, folder, tmp_path / "out"), "--json")
        assert code == 0, err
    values = json.loads(out)
    assert problems(values, COMMANDS[name].result) == [] and values["failures"] == []
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in keys_of(values))


@run_of_every_command
def test_failed_input_gives_exit_code_1_and_a_failure_record(name, folder, tmp_path, capsys):
    case = CASES[name]
    need(case)
    if case.failure is None:
        pytest.skip("has no inputs that could fail alone")
    code, out, err = run(capsys, *arguments_of(name, case.failure, folder, tmp_path / "out"), "--json")
    assert code == 1, err
    values = json.loads(out)
    assert problems(values, COMMANDS[name].result) == []
    (record,) = values["failures"]
    assert record["type"].endswith("Error") and record["input"] and "\n" not in record["error"] and record["error"]
    for path in (tmp_path / "out").glob("failures.jsonl"):
        (line,) = map(json.loads, path.read_text().splitlines())
        assert {key: line[key] for key in Failure.__annotations__} == record
    assert "Traceback" not in err and err.strip()


@run_of_every_command
def test_quiet_prints_only_errors_and_the_result(name, folder, tmp_path, capsys):
    if name in SLOW:
        pytest.skip("is slow, and has no messages of its own")
    need(CASES[name])
    arguments = arguments_of(name, CASES[name].success, folder, tmp_path / "out")
    assert run(capsys, *arguments, "--quiet")[::2] == (0, "")


MISTAKES = {
    "unknown option": ("{name} --no-such-option", "No such option"),
    "both": ("{name} --quiet --verbose", "are mutually exclusive"),
}


@every_command
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_usage_error_is_exit_code_2_one_line_and_names_the_help(name, mistake, capsys):
    text, message = MISTAKES[mistake]
    code, out, err = run(capsys, *text.format(name=name).split(), *(["--json"] if mistake == "both" else []))
    assert code == 2 and message in err and err.count("\n") == 1
    assert err.endswith(f"Try 'nemo-lfr {name} --help'.\n")
    if out:
        assert [record["type"] for record in json.loads(out)["failures"]] == ["UsageError"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encod"], "Did you mean 'encode'?"),
        (["frobnicate"], "Commands: decode, demo"),
        (["entropy", "fitt"], "Did you mean 'fit'?"),
        (["encode", "a.wav", "--ouput", "x"], "--out"),
        (["prepare", "folder", "x", "--worker", "2"], "--workers"),
    ],
)
def test_the_nearest_name_is_suggested(arguments, words, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and words in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["encode", "nowhere.wav"], 2),
        (["encode", "{in}/audio/a.wav", "--model", "nowhere.nemo"], 2),
        (["encode", "{in}/audio/a.wav", "--out", "{in}/tokens", "--model", "{in}/tiny.nemo"], 2),
        (["encode", "{in}/mixed/c.wav", "--out", "{out}", "--model", "{in}/tiny.nemo"], 1),
        (["decode", "{in}/cut/a.lfr", "--out", "{out}", "--model", "{in}/tiny.nemo"], 1),
        (["encode", "{in}/audio/a.wav", "-", "--json"], 2),
        (["info", "nowhere.lfr"], 2),
        (["info", "{in}/cut/a.lfr"], 1),
        (["info", "{in}/audio/a.wav", "nowhere.lfr"], 1),
        (["tokenize", "nowhere.json", "--out", "{out}"], 2),
        (["detokenize", "nowhere", "--out", "{out}"], 2),
        (["prepare", "folder", "nowhere", "--out", "{out}"], 2),
        (["evaluate", "nowhere.json", "--out", "{out}"], 2),
        (["entropy", "fit", "nowhere", "--out", "{out}/m.lfrm"], 2),
        (["entropy", "fit", "{in}/tokens", "--out", "{out}/m.txt"], 2),
        (["export", "onnx"], 2),
        (["export"], 2),
        ([], 2),
        (["-h"], 0),
        (["encode", "-h"], 0),
    ],
)
def test_exit_codes(arguments, code, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    values = [word.replace("{in}", str(folder)).replace("{out}", str(tmp_path)) for word in arguments]
    assert run(capsys, *values)[0] == code


# Each command with the place of one input or model, and the kinds of valid files that it accepts there.
ONE_INPUT = {
    "info {x}": ("audio", "tokens", "checkpoint", "manifest", "table"),
    "encode {x} --out {out}": ("audio",),
    "encode {x} -": ("audio",),
    "decode {x} --out {out}": ("tokens",),
    "decode {x} -": ("tokens",),
    "tokenize {x} --out {out} --model {in}/tiny.nemo": ("manifest", "table"),
    "detokenize {x} --out {out}": (),
    "prepare folder {x} --out {out}": (),
    "evaluate {x} --out {out}": ("manifest", "table"),
    "entropy fit {x} --out {out}/m.lfrm": ("tokens",),
    "encode {in}/audio/a.wav --out {out} --model {x}": ("checkpoint",),
    "export safetensors --out {out} --model {x}": ("checkpoint",),
    "encode {in}/audio/a.wav --out {out} --model {in}/tiny.nemo --compress --entropy-model {x}": (),
}
# These open the codec before the input.
OPENS_CODEC = [text for text in ONE_INPUT if "--model {in}" in text]
VALID = {
    "audio": "audio/a.wav",
    "tokens": "tokens/a.lfr",
    "checkpoint": "tiny.nemo",
    "manifest": "manifest.json",
    "table": "table.csv",
}


def write_junk(root: Path) -> list[Path]:
    """Return inputs that no command reads, some of which are written to a folder."""
    names = ["bytes", "bytes.bin", "text", "text.txt", "text.json", "empty", "empty.json", "empty.jsonl.gz"]
    names += ["bytes.wav", "text.mp3", "empty.flac", "bytes.lfr", "empty.lfr", "text.nemo", "bytes.nemo", "empty.nemo"]
    for name in names:
        content = {"bytes": bytes(range(128, 256)) * 4, "text": b"hello\n", "empty": b""}[name.partition(".")[0]]
        (root / name).write_bytes(content)
    (root / "folder").mkdir()
    (root / "link.wav").symlink_to("gone.wav")
    os.mkfifo(root / "pipe")
    missing = ("missing", "missing.wav", "missing.lfr", "missing.nemo", "missing.json", "text/missing.wav")
    return [root / name for name in (*names, "folder", "link.wav", "pipe", *missing)]


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize("text", slow_if(ONE_INPUT, OPENS_CODEC))
def test_an_input_that_the_command_does_not_read_is_a_usage_error(text, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kinds = [folder / name for kind, name in VALID.items() if kind not in ONE_INPUT[text]]
    for path in (*write_junk(tmp_path), *kinds):
        words = text.replace("{x}", str(path)).replace("{in}", str(folder)).replace("{out}", str(tmp_path / "out"))
        code, out, err = run(capsys, *words.split(), "--quiet")
        assert (code, out) == (2, ""), (path, err)
        assert err.startswith("nemo-lfr: error: ") and err.count("\n") == 1, (path, err)
        assert not [path for path in (tmp_path / "out").glob("*") if not path.name.startswith(".")]


@pytest.mark.parametrize(
    ("text", "suffix", "content"),
    [
        ("info {x}", ".wav", b"RIFF nonsense"),
        ("info {x}", ".lfr", b"LFRT"),
        ("info {x}", ".nemo", bytes(257) + b"ustar"),
        ("encode {x} --out {out}", ".wav", b"RIFF nonsense"),
        ("encode {x} --out {out}", ".txt", b"fLaC nonsense"),
        ("encode {x} -", ".mp3", b"ID3 nonsense"),
        ("decode {x} --out {out}", ".lfr", b"LFRT"),
        ("decode {x} --out {out}", ".wav", b"LFRT"),
        ("decode {x} -", ".lfr", b"LFRT"),
        ("entropy fit {x} --out {out}/m.lfrm", ".lfr", b"LFRT"),
    ],
)
def test_a_damaged_input_of_the_right_kind_is_a_failure_of_the_work(content, text, suffix, folder, tmp_path, capsys):
    (tmp_path / f"a{suffix}").write_bytes(content)
    words = text.replace("{x}", str(tmp_path / f"a{suffix}")).replace("{out}", str(tmp_path / "out")).split()
    model = ["--model", folder / "tiny.nemo"] if words[0] in ("encode", "decode") else []
    code, _, err = run(capsys, *words, *model, "--quiet")
    assert code == 1 and err.startswith("nemo-lfr: error: ") and err.count("\n") == 1, err


def test_exit_codes_are_documented():
    page = (ROOT / "docs" / "guides" / "command-line.md").read_text()
    for code, text in cli.EXIT_CODES.items():
        assert f"| {code} | {text} |" in page
        assert f"{code}  {text}" in cli.EPILOG and len(cli.EPILOG.split("\n")[code + 2]) < 78


@pytest.mark.slow
def test_a_model_for_metrics_that_cannot_be_loaded_is_a_failure(folder, tmp_path, capsys):
    pytest.importorskip("jinja2")
    arguments = arguments_of("evaluate", CASES["evaluate"].success, folder, tmp_path / "out")
    code, out, err = run(capsys, *arguments, "--asr", tmp_path, "--json")
    (record,) = json.loads(out)["failures"]
    assert code == 1 and record["input"] == str(tmp_path) and record["error"].startswith("asr: ")
    assert record["error"] in err and (tmp_path / "out" / "report.html").is_file()


def test_an_unexpected_error_is_one_line_with_a_traceback_only_on_request(folder, monkeypatch, capsys):
    def broken(text: str | None) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("nemo_lfr.cli.info.describe", broken)
    code, out, err = run(capsys, "info", folder / "tiny.nemo")
    assert (code, out, err.count("\n")) == (1, "", 1) and "unexpected KeyError: 'a bug'" in err and "--verbose" in err
    code, _, err = run(capsys, "info", folder / "tiny.nemo", "--verbose")
    assert code == 1 and "Traceback" in err and "in broken" in err


@pytest.mark.slow
def test_verbose_shows_the_log_and_the_traceback_of_a_failure(folder, tmp_path, capsys):
    code, _, err = run(
        capsys, "encode", folder / "mixed", "--out", tmp_path, "--model", folder / "tiny.nemo", "--verbose"
    )
    assert code == 1 and "nemo-lfr: debug: nemo_lfr: " in err and "Traceback" in err and "AudioError" in err
    assert "x real time" in err and "nemo-lfr: info: nemo_lfr.codec.backends: opened " in err


@pytest.mark.parametrize("name", ["table.csv", "table.tsv.gz"])
def test_info_says_which_commands_read_a_table(name, folder, capsys):
    code, out, _ = run(capsys, "info", folder / name)
    assert code == 0 and "a CSV or TSV table" in out and "to nemo-lfr tokenize, evaluate or prepare table" in out


@pytest.mark.parametrize("text", ["info {x}", "tokenize {x} --out {out}", "prepare table {x} --out {out}"])
def test_spreadsheets_are_refused_with_advice(text, tmp_path, capsys):
    path = tmp_path / "recordings.XLSX"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    words = text.replace("{x}", str(path)).replace("{out}", str(tmp_path / "out")).split()
    code, _, err = run(capsys, *words, "--quiet")
    assert code == 2 and err.count("\n") == 1 and "spreadsheet" in err and "save it as CSV (UTF-8)" in err
    assert not (tmp_path / "out").exists()


def test_info_of_one_file_has_its_keys_at_the_top_level(folder, capsys):
    wav = folder / "audio" / "a.wav"
    one, two = (json.loads(run(capsys, "info", *files, "--json")[1]) for files in ([wav], [wav, wav]))
    assert one == two["items"][0] | {"items": two["items"][:1], "failures": []}
    assert two.keys() == {"items", "failures"}


def test_common_options_are_accepted_before_the_command(folder, capsys):
    code, out, err = run(capsys, "--json", "--quiet", "info", folder / "audio" / "a.wav")
    assert (code, err) == (0, "") and json.loads(out)["items"][0]["kind"] == "audio"
    code, _, err = run(capsys, "--quiet", "info", "--verbose")
    assert code == 2 and "are mutually exclusive" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encode", "tokenize"])
def test_heartbeat_reports_progress_without_a_terminal(name, folder, tmp_path, capsys, monkeypatch):
    need(CASES[name])
    lines = []
    monkeypatch.setattr("nemo_lfr.cli.terminal.HEARTBEAT_S", 0.001)
    monkeypatch.setattr("nemo_lfr.cli.terminal.echo_stderr", lines.append)
    run(capsys, *arguments_of(name, CASES[name].success, folder, tmp_path / "out"))
    unit = {"encode": "files?", "tokenize": "shards?"}[name]
    assert any(re.match(rf"nemo-lfr: \d of \d {unit}.* done after \d+ s", line) for line in lines), lines


# Options that must have the same name and meaning in several commands, and those commands.
SHARED = {
    "--out": {
        "encode",
        "decode",
        "demo",
        "export golden",
        "export onnx",
        "export safetensors",
        "export web",
        "prepare",
        "tokenize",
        "detokenize",
        "evaluate",
        "entropy fit",
    },
    "--model": {
        "encode",
        "decode",
        "demo",
        "export golden",
        "export onnx",
        "export safetensors",
        "export web",
        "tokenize",
        "detokenize",
        "serve",
    },
    "--device": {"encode", "decode", "demo", "tokenize", "detokenize", "evaluate", "serve"},
    "--precision": {"encode", "decode", "demo", "tokenize", "detokenize", "serve"},
    "--workers": {"prepare", "tokenize", "evaluate"},
    "--audio-dir": {"tokenize", "evaluate"},
    "--overwrite": {
        "encode",
        "decode",
        "export golden",
        "export onnx",
        "export safetensors",
        "export web",
        "detokenize",
        "entropy fit",
        "prepare",
    },
    "--skip-existing": {"encode", "decode"},
    "--json": set(COMMANDS),
    "--quiet": set(COMMANDS),
    "--verbose": set(COMMANDS),
}


@pytest.mark.parametrize("option", SHARED)
def test_equal_options_have_equal_names_in_all_commands(option):
    having = {name: [p for p in command.params if option in p.opts] for name, command in COMMANDS.items()}
    assert {name for name, options in having.items() if options} == SHARED[option]
    kinds = {type(options[0].type) for options in having.values() if options}
    assert len(kinds) == 1


def test_renamed_option_accepts_its_earlier_name_without_showing_it(folder, tmp_path, capsys):
    renamed = [(name, p) for name, command in COMMANDS.items() for p in command.params if isinstance(p, RenamedOption)]
    assert {name for name, _ in renamed} == {"prepare", "evaluate"}
    for name, option in renamed:
        assert option.earlier not in run(capsys, *name.split(), "--help")[1]
    command = ["prepare", "folder", folder / "audio", "--overwrite", "--out", tmp_path]
    for words in (["--jobs", 1], ["--jobs=1"], ["--workers", 1]):
        assert run(capsys, *command, *words)[0] == 0
    code, _, err = run(capsys, *command, "--jobs", 0)
    assert code == 2 and "'--workers'" in err


@every_command
def test_help_fits_80_columns_and_describes_every_option(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, *name.split(), "--help")
    assert code == 0 and all(len(line) <= 80 for line in out.splitlines())
    for option in COMMANDS[name].params:
        if isinstance(option, click.Option):
            assert option.help and option.help[0].isupper() and option.help.endswith("."), option.name
            states_default = option.required or option.is_flag or option.show_default or "(default" in option.help
            assert states_default, option.name
    words = name.split()
    group = cli.app if len(words) == 1 else cli.app.commands[words[0]]
    _, listing, _ = run(capsys, *words[:-1], "--help")
    assert f"{words[-1]} " in listing and group.commands[words[-1]].short_help in listing  # on one line


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(3, sorted(SHARED["--model"])))
def test_the_default_codec_is_named_with_its_quality(name, folder, tmp_path, capsys):
    assert bundled_quality() in " ".join(run(capsys, *name.split(), "--help")[1].split())
    if name in SLOW or name in OTHERS:
        return
    text = CASES[name].success.replace("--model {in}/tiny.nemo", "")
    need(CASES[name])
    err = run(capsys, *arguments_of(name, text, folder, tmp_path / "out"))[2]
    assert err.count("using the bundled codec") == (name != "detokenize" or "using" in err)


def test_stated_quality_of_the_bundled_codec_equals_its_model_card():
    figures = dict(item.split(" ") for item in bundled_quality().split(", "))
    for name in ("docs/model-card.md", "README.md", "docs/performance/quality.md"):
        text = (ROOT / name).read_text()
        assert all(value in text for value in figures.values()), name
    card = (ROOT / "docs" / "model-card.md").read_text()
    for metric, value in figures.items():
        assert re.search(rf"\| {metric} \| {value} \(", card)


PATHS = {"inputs", "files", "corpus", "tokens", "source", "out", "model", "audio_dir", "entropy_model", "asr"}


@every_command
def test_paths_complete_in_the_shell(name):
    command = COMMANDS[name]
    with click.Context(command) as context:
        for param in command.params:
            if param.name in PATHS:
                (item,) = param.type.shell_complete(context, param, "a")
                assert item.type in ("file", "dir"), param.name


@pytest.mark.skipif(os.name == "nt", reason="bash")
def test_the_shell_completes_commands_options_and_paths(monkeypatch, capsys):
    monkeypatch.setenv("_NEMO_LFR_COMPLETE", "bash_complete")
    for words, expected in (
        (["nemo-lfr", "enc"], "plain,encode"),
        (["nemo-lfr", "encode", "--ov"], "plain,--overwrite"),
    ):
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        assert run(capsys)[1].splitlines() == [expected]


@pytest.mark.parametrize(
    "arguments",
    [
        ("entropy", "fit", "c", "--out", "m.lfrm", "--seed"),
        ("evaluate", "c", "--out", "o", "--limit"),
        ("encode", "a.wav", "--batch-size"),
    ],
    ids=" ".join,
)
def test_a_number_that_no_integer_type_holds_is_a_usage_error(capsys, arguments):
    code, _, err = run(capsys, *arguments, 2**64)
    assert code == 2 and f"Invalid value for '{arguments[-1]}': {2**64} is too large; pass a number below 2^63." in err
