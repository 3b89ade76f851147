"""Tests of the command line: exit codes, output, and the files that remain on disk."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import soundfile

from nemo_lfr.cli import main as cli
from nemo_lfr.cli.session import json_text
from nemo_lfr.codec.torch_backend import BATCHING
from nemo_lfr.io.token_file import TokenReader
from tests.models import speech_like
from tests.tiers import slow_after, slow_except


def run(capsys, *arguments):
    """Run one command in this process, and return its exit code, stdout and stderr."""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def folder(tmp_path):
    """Write speech/a.wav (22.05 kHz), speech/deep/b.flac (48 kHz stereo) and speech/notes.txt."""
    root = tmp_path / "speech"
    (root / "deep").mkdir(parents=True)
    soundfile.write(root / "a.wav", speech_like(12_345).numpy(), 22050)
    wave = speech_like(24_000, seed=1).numpy()
    soundfile.write(root / "deep" / "b.flac", np.stack([wave, -0.5 * wave], axis=1), 48000)
    (root / "notes.txt").write_text("not audio")
    return root


def test_folder_round_trip_keeps_subfolders_and_lengths(capsys, folder, tmp_path):
    tokens, audio = tmp_path / "tokens", tmp_path / "audio"
    code, out, err = run(capsys, "encode", folder, "--out", tokens)
    assert code == 0
    assert out.split() == [str(tokens / "a.lfr"), str(tokens / "deep" / "b.lfr")]
    assert "2 channels mixed to mono" in err
    assert "nemo-lfr: using the bundled codec (PESQ-WB 2.13" in err
    assert run(capsys, "decode", tokens, "--out", audio)[0] == 0
    assert soundfile.info(audio / "a.wav").frames == 12_345
    assert soundfile.info(audio / "deep" / "b.wav").frames == 11_025  # half a second at 22.05 kHz


@pytest.mark.slow
def test_file_without_samples_is_reported(capsys, tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 22050)
    code, _, err = run(capsys, "encode", tmp_path / "empty.wav", "--out", tmp_path / "empty.lfr")
    assert code == 0 and "empty.wav: the input, or the selected part, contains no samples" in err
    code, _, err = run(capsys, "decode", tmp_path / "empty.lfr", "--out", tmp_path / "back")
    assert code == 0 and "empty.lfr: the input, or the selected part, contains no samples" in err


RECOVERED = {
    "within its only block": (lambda data: data[:300], 1, "no intact block to recover"),
    "with an inserted byte": (lambda data: data[:-100] + b"\r" + data[-100:], 1, "no intact block to recover"),
    "without its end": (lambda data: data[:-3], 0, "its first 1.02 s are read"),
    "undamaged": (lambda data: data, 0, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", slow_except(RECOVERED, "without its end"))
def test_recovery_reports_what_is_read_of_a_file(capsys, tmp_path, damage):
    change, expected, message = RECOVERED[damage]
    soundfile.write(tmp_path / "a.wav", speech_like(22050).numpy(), 22050)
    run(capsys, "encode", tmp_path / "a.wav")
    (tmp_path / "cut.lfr").write_bytes(change((tmp_path / "a.lfr").read_bytes()))
    code, _, err = run(capsys, "decode", tmp_path / "cut.lfr", "--recover")
    assert code == expected and message in err
    assert ("cut.lfr: the file is damaged or incomplete" in err) == bool(message)
    assert (tmp_path / "cut.wav").exists() == (code == 0)


@pytest.mark.slow
def test_batched_files_have_the_same_bytes_as_single_files(capsys, folder, tmp_path):
    for size in (1, 8):
        run(capsys, "encode", folder, "--out", tmp_path / str(size), "--batch-size", size)
    for name in ("a.lfr", "deep/b.lfr"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "8" / name).read_bytes()


@pytest.mark.slow
def test_quoted_globs_reach_into_sub_folders(capsys, folder, tmp_path):
    code, out, _ = run(capsys, "encode", f"{folder}/**/*.flac", "--out", tmp_path / "tokens")
    assert code == 0
    assert out.strip() == str(tmp_path / "tokens" / "b.lfr")


@pytest.mark.slow
def test_default_output_is_beside_its_input(capsys, folder):
    assert run(capsys, "encode", folder / "a.wav")[0] == 0
    assert (folder / "a.lfr").is_file()


@pytest.mark.slow
def test_existing_results_are_refused_before_any_work_and_replaced_on_request(capsys, folder, tmp_path):
    out = tmp_path / "tokens"
    out.mkdir()
    (out / "a.lfr").write_bytes(b"old")
    code, _, err = run(capsys, "encode", folder, "--out", out)
    assert code == 2
    assert err.count("\n") == 1 and "a.lfr exists; pass --overwrite" in err
    assert not (out / "deep").exists()
    assert run(capsys, "encode", folder, "--out", out, "--overwrite")[0] == 0
    with TokenReader(out / "a.lfr") as reader:
        assert reader.num_samples == 12_345


@pytest.mark.slow
def test_a_bad_file_does_not_stop_the_others(capsys, folder, tmp_path):
    (folder / "broken.wav").write_bytes(b"RIFF nonsense")
    code, out, err = run(capsys, "encode", folder, "--out", tmp_path / "tokens", "--json")
    assert code == 1
    result = json.loads(out)
    assert [entry["samples"] for entry in result["files"]] == [12_345, 11_025]
    assert "broken.wav" in result["failures"][0]["error"]
    assert "1 of 3 failed" in err
    left = sorted(path.name for path in (tmp_path / "tokens").rglob("*") if path.is_file())
    assert left == ["a.lfr", "b.lfr"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs", [["speech"], ["speech/**/*.*"], ["speech/*/*.*", "speech/a.wav"], ["speech/closed", "speech"],
               ["speech/locked.wav", "speech"]]
)  # fmt: skip
def test_an_unreadable_folder_or_file_is_a_failure_while_the_others_are_encoded(
    inputs, capsys, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    bad = folder / ("locked.wav" if "speech/locked.wav" in inputs else "closed")
    bad.write_bytes(b"RIFF") if bad.suffix else bad.mkdir()
    (folder / "notes.txt").unlink()

    def closing(function):
        def checked(path, *arguments, **options):
            if os.path.abspath(path) == str(bad):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *arguments, **options)

        return checked

    for name in ("scandir", "open"):
        monkeypatch.setattr(os, name, closing(getattr(os, name)))
    code, out, err = run(capsys, "encode", *inputs, "--out", "tokens")
    assert code == 1 and sorted(Path(line).name for line in out.split()) == ["a.lfr", "b.lfr"]
    assert err.count(f"error: speech/{bad.name}: ") == 1 and "1 of 3 failed" in err


MP3 = io.BytesIO()
soundfile.write(MP3, np.zeros(22050), 22050, format="MP3")
# Files whose content is not what their suffix says, and an MP3 file without a tag, whose first bytes vary.
CONTENT = {
    "junk.wav": bytes(range(128, 256)) * 4,
    "tokens.wav": b"LFRT",
    "manifest.wav": b'{"audio_filepath": "a.wav"}',
    "tokens.lfr": b"LFRT",
    "frames.mp3": MP3.getvalue(),
}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["encode", "nowhere.wav"], "nowhere.wav: no such file or folder"),
        (["encode"], "Missing argument"),
        (["encode", ""], "'': no such file or folder"),
        (["encode", "{folder}/a.wav", "--out", "{folder}/a.wav"], "the result is a .lfr file"),
        (["encode", "{folder}/a.wav", "--out", "{folder}/notes.txt"], "notes.txt is a file"),
        (["encode", "{folder}", "--out", "{folder}/t.lfr"], "names one .lfr file, but the input is not a single file"),
        (["encode", "{folder}/a.wav", "{folder}/deep/b.flac", "--out", "t.lfr"], "the input is not a single file"),
        (["decode", "{folder}/a.wav"], "a.wav: this is an audio file, not a token file; nemo-lfr encode reads it"),
        (["decode", "{folder}/junk.wav"], "junk.wav: not a .lfr token file"),
        (
            ["decode", "x.lfr", "--out", "b.mp3"],
            "is a .wav or .flac file; pass a folder, or a name that ends in .wav or",
        ),
        (["decode", "x.lfr", "--out", "b.MP3", "--format", "flac"], "pass a folder, or a name that ends in .flac."),
        (["decode", "x.lfr", "--out", "{folder}/notes.txt"], "or a name that ends in .wav or .flac for one input"),
        (["encode", "{folder}/junk.wav"], "junk.wav: not an audio file that libsndfile reads"),
        (
            ["encode", "{folder}/tokens.wav"],
            "tokens.wav: this is a token file, not an audio file; nemo-lfr decode reads",
        ),
        (["encode", "{folder}/manifest.wav"], "manifest.wav: this is a manifest or other JSON, not an audio file"),
        (["decode", "{folder}/frames.mp3"], "frames.mp3: this is an audio file, not a token file"),
        (
            ["decode", "{folder}/tokens.lfr", "{folder}/frames.mp3"],
            "frames.mp3: this is an audio file, not a token file",
        ),
        (["decode", "{folder}/deep/b.flac"], "is an audio file, not a token file"),
        (["decode", "x.lfr", "--out", "b.wav", "--format", "flac"], "--format flac name different formats"),
        (["encode", "{folder}/a.wav", "--overwrite", "--skip-existing"], "are mutually exclusive"),
        (["info", "{folder}/none.lfr"], "none.lfr: no such file"),
        (["info", "/dev/zero"], "not a regular file but a device"),
        (["tokenize", "{folder}", "--out", "{folder}/a.wav"], "a.wav' is a file"),
        (["frobnicate"], "frobnicate"),
        (["encode", "{folder}/a.wav", "--precision", "int4"], "int4"),
        (["encode", "{folder}/a.wav", "--model", "nowhere.nemo"], "nowhere.nemo: no such file"),
        (["encode", "{folder}/a.wav", "--model", "{folder}/notes.txt"], "not a .nemo archive"),
        (
            ["encode", "{folder}/a.wav", "--model", "{folder}/a.wav"],
            "this is an audio file, not a checkpoint; nemo-lfr",
        ),
        (
            ["tokenize", "{folder}/a.wav", "--out", "{folder}/t"],
            "this is an audio file, not a manifest, a table, cuts",
        ),
        (
            ["evaluate", "{folder}/a.wav", "--out", "{folder}/t"],
            "this is an audio file, not a manifest or a table; nem",
        ),
        (["encode", "{folder}/a.wav", "--device", "abacus"], "abacus"),
        (["decode", "{folder}"], "no .lfr file in this folder (3 skipped: 1 .flac, 1 .txt, 1 .wav); nemo-lfr encode"),
        (["decode", "{folder}/a.wav", "--start", "soon"], "'soon' is not a valid float"),
        (["decode", "{folder}/a.wav", "--duration", "-1"], "-1"),
        (["encode", "-", "{folder}/a.wav"], "pass `-`, `- -` or `FILE -`"),
        (["encode", "-", "--out", "{folder}"], "without --out"),
        (["encode", "{folder}/a.wav", "--out", "-"], "- stands for stdin or stdout, and is only allowed"),
        (["decode", "{folder}/a.lfr", "--out", "-"], "- stands for stdin or stdout"),
        (["export", "safetensors", "--out", "-"], "- stands for stdin or stdout"),
        (["tokenize", "-", "--out", "{folder}/t"], "- stands for stdin or stdout"),
        (["info", "{folder}/notes.txt"], "not a token file, checkpoint, audio file or manifest"),
        (["encode", "{folder}/a.wav", "{folder}/deep/../a.wav", "--out", "{folder}/t"], "would both be written"),
    ],
)
def test_usage_error_is_a_one_line_error_with_exit_code_2(capsys, folder, monkeypatch, arguments, text):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in set(CONTENT) & {Path(argument).name for argument in arguments}:
        (folder / name).write_bytes(CONTENT[name])
    code, out, err = run(capsys, *[argument.format(folder=folder) for argument in arguments])
    assert code == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if not line.startswith("nemo-lfr: using the bundled codec")]
    assert line.startswith("nemo-lfr: error: ")
    assert text in line


@pytest.mark.parametrize("command", ["encode", "decode", "tokenize", "prepare folder"])
@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a-0.tar", "a-1.tar"], "(2 skipped: 2 .tar); unpack archives (such as the shards of WebDataset)"),
        (
            ["m.json", "notes"],
            "(2 skipped: 1 .json, 1 without a suffix); pass a manifest, a table or a file of cuts itself",
        ),
        (
            ["c-0.jsonl.gz", "c-1.jsonl.gz"],
            "(2 skipped: 2 .jsonl.gz); pass a manifest, a table or a file of cuts itself",
        ),
        (["x.txt"], "(1 skipped: 1 .txt)"),
        ([], "in this folder"),
    ],
)
def test_a_folder_without_files_for_the_command_is_described(command, names, text, capsys, tmp_path):
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_text("x")
    code, out, err = run(capsys, *command.split(), tmp_path / "in", "--out", tmp_path / "out", "--quiet")
    assert (code, out) == (2, "") and text in err and "in this folder" in err


@pytest.mark.slow
def test_info_describes_token_files_and_the_bundled_codec(capsys, folder):
    run(capsys, "encode", folder / "a.wav")
    code, out, _ = run(capsys, "info", folder / "a.lfr", "--json")
    (described,) = json.loads(out)["items"]
    assert code == 0
    assert (described["samples"], described["frames"], described["levels"]) == (12_345, 13, [8, 7, 6, 6])
    (described,) = json.loads(run(capsys, "info", "--json")[1])["items"]
    assert (described["num_codebooks"], described["codebook_size"], described["samples_per_frame"]) == (8, 2016, 1024)


@pytest.mark.slow
def test_info_identifies_files_and_names_the_command_for_them(capsys, folder):
    run(capsys, "encode", folder / "a.wav", "--out", folder / "B.LFR")
    assert "frames " in run(capsys, "info", folder / "B.LFR")[1]
    (folder / "m.json").write_text('{"audio_filepath": "a.wav"}\n')
    (folder / "golden.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "codec").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "codec" / name).write_text("{}")
    expected = {
        "codec/config.json": ("a part of a codec", f"pass its folder as --model: {folder / 'codec'}"),
        "codec/model.safetensors": ("a part of a codec", "pass its folder as --model"),
        "a.wav": ("kind         audio", "nemo-lfr encode reads it"),
        "golden.safetensors": ("a safetensors file with tensors only", "a folder that also contains config.json"),
        "m.json": ("a manifest", "nemo-lfr tokenize reads"),
        "": (
            "a folder of 2 audio files and 1 token file",
            "nemo-lfr encode, tokenize and prepare read the audio files",
        ),
    }
    for name, words in expected.items():
        code, out, err = run(capsys, "info", folder / name)
        assert code == 0, err
        for word in words:
            assert word in out
    described = json.loads(run(capsys, "info", folder, "--json")[1])
    assert (described["kind"], described["audio_files"], described["token_files"]) == ("files", 2, 1)
    code, _, err = run(capsys, "info", "~nobody-has-this-name/a")
    assert code == 2 and err.startswith("nemo-lfr: error: ~nobody-has-this-name/a: no such file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "source", "out"), slow_after(1, [("decode", "a.lfr", "b.flac"), ("encode", "a.wav", "T.lfr")])
)
def test_out_may_name_the_file_for_a_single_input(capsys, folder, command, source, out):
    run(capsys, "encode", folder / "a.wav")
    target = folder / "new" / out
    assert run(capsys, command, folder / source, "--out", target)[:2] == (0, f"{target}\n")
    assert target.is_file()
    assert target.suffix != ".flac" or soundfile.info(target).format == "FLAC"
    (folder / "t.lfr").mkdir()  # an existing folder is used as a folder
    assert run(capsys, "encode", folder / "a.wav", "--out", folder / "t.lfr")[0] == 0
    assert (folder / "t.lfr" / "a.lfr").is_file()


@pytest.mark.slow
def test_skip_existing_keeps_existing_results(capsys, folder, tmp_path):
    out = tmp_path / "tokens"
    run(capsys, "encode", folder / "a.wav", "--out", out)
    before = (out / "a.lfr").stat()
    code, printed, err = run(capsys, "encode", folder, "--out", out, "--skip-existing")
    assert code == 0 and printed.split() == [str(out / "deep" / "b.lfr")] and "1 of 2 results kept" in err
    assert (out / "a.lfr").stat() == before
    assert run(capsys, "encode", folder, "--out", out, "--skip-existing", "--json")[1].split() == [
        *["{", '"files":', "[],", '"failures":', "[]", "}"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected", "message", "is_kept"),
    [
        ([], 1, "was written by another program in the meantime, and is kept; pass --overwrite", True),
        (["--skip-existing"], 0, "was written by another process, and is kept", True),
        (["--overwrite"], 0, "", False),
    ],
)
@pytest.mark.parametrize("name", ["encode", "decode"])
def test_an_output_that_appears_in_the_meantime(
    name, options, expected, message, is_kept, capsys, folder, tmp_path, monkeypatch
):
    run(capsys, "encode", folder / "a.wav", "--out", tmp_path)
    source, suffix = (folder / "a.wav", ".lfr") if name == "encode" else (tmp_path / "a.lfr", ".wav")
    target = tmp_path / "out" / f"a{suffix}"
    original = os.fsync

    def fsync(descriptor):
        target.write_bytes(b"precious")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = run(capsys, name, source, "--out", tmp_path / "out", *options)
    assert code == expected and message in err
    assert (target.read_bytes() == b"precious") == is_kept and len(list(target.parent.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
@pytest.mark.parametrize("name", slow_after(1, ["encode", "decode"]))
def test_skip_existing_replaces_a_link_to_a_missing_file(name, capsys, folder, tmp_path):
    run(capsys, "encode", folder / "a.wav", "--out", tmp_path)
    source, suffix = (folder / "a.wav", ".lfr") if name == "encode" else (tmp_path / "a.lfr", ".wav")
    out = tmp_path / "out"
    out.mkdir()
    target = out / f"a{suffix}"
    target.symlink_to(tmp_path / "gone")
    assert run(capsys, name, source, "--out", out)[0] == 2 and target.is_symlink()
    assert run(capsys, name, source, "--out", out, "--skip-existing")[0] == 0
    assert target.is_file() and not target.is_symlink() and not (tmp_path / "gone").exists()


@pytest.mark.slow
def test_output_name_that_is_too_long_fails_only_its_file(capsys, folder, tmp_path):
    soundfile.write(folder / ("n" * 252 + ".au"), speech_like(2_000).numpy(), 22050)
    for options, expected in (([], 1), (["--overwrite"], 1), (["--skip-existing"], 1)):
        code, _, err = run(capsys, "encode", folder, "--out", tmp_path / "tokens", *options)
        assert code == expected and "File name too long" in err
        assert (tmp_path / "tokens" / "a.lfr").is_file() and (tmp_path / "tokens" / "deep" / "b.lfr").is_file()


@pytest.mark.parametrize("out", ["a.wav/x.lfr", "a.wav/deep/x.lfr", "a.wav/deep"])
def test_file_in_place_of_an_output_folder_is_refused_before_any_work(capsys, folder, out):
    code, printed, err = run(capsys, "encode", folder / "a.wav", "--out", folder / out)
    assert (code, printed) == (2, "") and "a.wav is not a folder" in err and "using the bundled codec" not in err


def test_an_empty_name_is_not_the_current_folder(capsys):
    assert run(capsys, "info", "")[0] == 2


@pytest.mark.slow
def test_the_demo_writes_four_files_and_prints_bit_rate_and_quality(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # as a user's settings, which need LaTeX
    code, out, err = run(capsys, "demo", "--out", tmp_path)
    assert code == 0 and err.splitlines()[-1].endswith("nemo-lfr serve")
    assert {path.name for path in tmp_path.iterdir()} == {
        "original.wav",
        "speech.lfr",
        "decoded.wav",
        "spectrograms.png",
    }
    for word in ("bit rate", "times real time", "ESTOI", "PESQ-WB", "SI-SDR"):
        assert word in out
    assert soundfile.info(tmp_path / "original.wav").frames == soundfile.info(tmp_path / "decoded.wav").frames


@pytest.mark.parametrize("command", sorted(cli.app.commands))
def test_each_command_has_a_short_help_and_names_its_help_in_usage_errors(capsys, command):
    assert cli.app.commands[command].short_help.endswith(".")
    code, out, err = run(capsys, command, "--no-such-option")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.endswith(f"Try 'nemo-lfr {command} --help'.\n")


def test_help_imports_nothing_heavy():
    script = (
        "import sys, nemo_lfr.cli.main as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'soundfile', 'rich', 'nemo', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_decoded_span_equals_slice_of_the_full_decoding(capsys, tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(80_000).numpy(), 22050)
    run(capsys, "encode", tmp_path / "a.wav")
    run(capsys, "decode", tmp_path / "a.lfr", "--out", tmp_path / "whole")
    run(capsys, "decode", tmp_path / "a.lfr", "--out", tmp_path / "part", "--start", 1.5, "--duration", 0.75)
    whole, part = (soundfile.read(tmp_path / name / "a.wav", dtype="int16")[0] for name in ("whole", "part"))
    # Windows of other lengths add in another order, which changes 16-bit samples by at most 1.
    assert len(part) == 16538
    assert np.abs(whole[33075:][:16538].astype(int) - part).max() <= 1
    code, _, err = run(capsys, "decode", tmp_path / "a.lfr", "--out", tmp_path / "none", "--start", 60)
    assert code == 1 and "from 0 to 3.628, the duration of the recording" in err and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_truncated_file_is_refused_with_a_hint_to_recover(capsys, tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(400_000).numpy(), 22050)
    run(capsys, "encode", tmp_path / "a.wav")
    cut = tmp_path / "cut.lfr"
    cut.write_bytes((tmp_path / "a.lfr").read_bytes()[:3000])
    code, _, err = run(capsys, "decode", cut)
    assert code == 1 and "cut.lfr: the data ends too early" in err and "--recover" in err
    assert run(capsys, "decode", cut, "--recover")[0] == 0
    assert soundfile.info(tmp_path / "cut.wav").frames == BATCHING["cpu"].chunk_frames * 1024  # the first block


@pytest.mark.slow
def test_finished_files_of_a_failed_batch_are_not_failures(capsys, tmp_path, monkeypatch):
    """Encode a.wav and c.wav in a batch with a damaged b.flac, which fails after a.lfr was written."""
    monkeypatch.setattr("nemo_lfr.cli.encode.BATCH_SECONDS", 1)
    folder = tmp_path / "speech"
    folder.mkdir()
    for name in ("a", "c"):
        soundfile.write(folder / f"{name}.wav", speech_like(12_000).numpy(), 22050)
    soundfile.write(folder / "b.flac", speech_like(100_000).numpy(), 22050)
    data = bytearray((folder / "b.flac").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    (folder / "b.flac").write_bytes(data)
    code, out, _ = run(capsys, "encode", folder, "--out", tmp_path / "tokens", "--json")
    assert code == 1
    result = json.loads(out)
    assert [entry["input"] for entry in result["failures"]] == [str(folder / "b.flac")]
    assert [entry["output"] for entry in result["files"]] == [str(tmp_path / "tokens" / f"{x}.lfr") for x in "ac"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"PYTHONUTF8": "1"}, b"a\xff"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"\xc3\xa4\xff"),
        ({"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}, b"\xc5\x82"),
    ],
)
def test_any_file_name_round_trips_and_is_printed_unchanged(folder, tmp_path, environment, name):
    odd = os.fsencode(folder) + b"/" + name + b".wav"
    os.rename(folder / "a.wav", odd)
    done = subprocess.run(
        [sys.executable, "-m", "nemo_lfr", "encode", odd, "--out", tmp_path],
        capture_output=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0
    assert done.stdout == os.fsencode(tmp_path) + b"/" + name + b".lfr\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("d\udcff/\udc80.wav", r"d\xff/\x80.wav"),
        ("\ud800a", r"\ud800a"),
        ("\U0001f600\u00e4", "\U0001f600\u00e4"),
        (r"\udcff \\", r"\udcff \\"),
    ],
)
def test_json_has_no_unpaired_surrogates(name, expected):
    text = json_text({"input": name, name: [1e300, None, True]})
    assert text.isascii() and json.loads(text) == {"input": expected, expected: [1e300, None, True]}
    json.dumps(json.loads(text), ensure_ascii=False).encode()  # raises an error for an unpaired surrogate


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_json_has_names_that_are_not_utf_8(tmp_path, capsys):
    (tmp_path / "a\udcff.wav").write_bytes(b"RIFF")
    code, out, _ = run(capsys, "encode", tmp_path / "a\udcff.wav", "--json")
    assert code == 1 and json.loads(out)["failures"][0]["input"] == str(tmp_path / r"a\xff.wav")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="descriptors are closed by a shell")
@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("encode - - <&-", 2, "-: stdin is closed"),
        ("decode {folder}/a.lfr - >&-", 2, "-: stdout is closed"),
        ("info {folder}/a.wav --json >&-", 1, "stdout is closed, so the result was not printed"),
        ("info {folder}/a.wav >&-", 1, "stdout is closed, so the result was not printed"),
        ("encode {folder}/a.wav --out {folder}/y >&-", 1, "stdout is closed, so the result was not printed"),
        ("encode {folder}/a.wav --out {folder}/x 2>&-", 0, ""),
        ("encode {folder}/nowhere.wav 2>&-", 2, ""),
    ],
)
def test_closed_descriptors_cause_no_traceback(folder, line, code, text):
    command = f"exec '{sys.executable}' -m nemo_lfr {line.format(folder=folder)}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == code
    assert text in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_terminated_command_leaves_no_partial_file(name, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(3600 * 8000, np.int16), 8000)  # an hour
    # Children inherit ignored signals from the program that runs the tests, so restore the defaults of a terminal.
    defaults = "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    script = f"import signal; {defaults}\nfrom nemo_lfr.cli.main import main; "
    command = [sys.executable, "-c", script + "main()", "encode", tmp_path / "a.wav", "--out", tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/*.part")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # after the imports, in which Python may lose an interrupt
    number = getattr(signal, name)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert list((tmp_path / "out").iterdir()) == []


def test_signal_handlers_are_restored(capsys):
    before = signal.getsignal(signal.SIGTERM)
    run(capsys, "--version")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_tilde_is_the_home_directory_in_quotes_and_after_an_equals_sign(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    name = folder.relative_to(tmp_path)
    assert run(capsys, "encode", f"~/{name}/a.wav", "--out=~/tokens")[0] == 0
    assert run(capsys, "decode", "~/tokens", "--out=~/audio")[0] == 0
    assert [*(tmp_path / "audio").rglob("*.wav")] and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["decode", "a.lfr", "--start", "nan"],
        ["decode", "a.lfr", "--duration", "nan"],
        ["prepare", "folder", ".", "--out", "out", "--valid-share", "nan"],
        ["tokenize", "m.json", "--out", "out", "--max-duration", "nan"],
        ["decode", "a.lfr", "--duration", "inf"],
        ["decode", "a.lfr", "--start", "inf"],
    ],
)
def test_nan_and_infinity_are_rejected_as_option_values(capsys, arguments):
    code, stdout, stderr = run(capsys, *arguments)
    assert (code, stdout) == (2, "") and f"{arguments[-1]} is not a valid number" in stderr


@pytest.mark.parametrize(
    "arguments",
    [["encodee", "--json"], ["--quiet", "info", "--verbose", "a.wav", "--json"], ["info", "--no-such", "--json"]],
)
def test_a_usage_error_is_also_printed_as_json(capsys, arguments):
    code, stdout, stderr = run(capsys, *arguments)
    assert code == 2 and json.loads(stdout)["failures"][0]["error"] in stderr
    assert run(capsys, "encodee", "--", "--json")[1] == ""


@pytest.mark.parametrize("command", ["tokenize", "evaluate"])
def test_audio_dir_that_is_not_a_folder_is_refused(capsys, command, tmp_path):
    (tmp_path / "m.json").write_text('{"audio_filepath": "a.wav", "duration": 1}\n')
    for folder in (tmp_path / "nowhere", tmp_path / "m.json"):
        options = ["--audio-dir", folder, "--out", tmp_path / "out"]
        code, stdout, stderr = run(capsys, command, tmp_path / "m.json", *options)
        assert (code, stdout) == (2, "") and folder.name in stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["tokenize", "evaluate", "prepare"])
def test_pipe_as_a_corpus_is_refused(capsys, command, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    kind = ["folder"] if command == "prepare" else []
    code, stdout, stderr = run(capsys, command, *kind, tmp_path / "pipe.json", "--out", tmp_path / "out")
    assert (code, stdout) == (2, "") and ("not a regular file but a pipe" in stderr or "not a folder" in stderr)


def test_info_describes_readable_files_despite_failures(capsys, tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(1000), 22050)
    (tmp_path / "b.lfr").write_bytes(b"LFRT")
    code, stdout, stderr = run(capsys, "info", tmp_path / "a.wav", tmp_path / "b.lfr", tmp_path / "c.wav", "--json")
    assert code == 1 and [entry["channels"] for entry in json.loads(stdout)["items"]] == [1]
    assert len(stderr.splitlines()) == 2 and "b.lfr" in stderr and "c.wav: no such file" in stderr


@pytest.mark.slow
def test_a_worker_has_no_more_threads_than_the_machine_has_cores(capsys, tmp_path):
    pytest.importorskip("pyarrow")
    soundfile.write(tmp_path / "a.wav", speech_like(5000), 22050)
    (tmp_path / "m.json").write_text('{"audio_filepath": "a.wav"}\n')
    options = ["--format", "lfr", "--threads", 1_000_000, "--workers", 1, "--device", "cpu"]
    code, _, stderr = run(capsys, "tokenize", tmp_path / "m.json", "--out", tmp_path / "out", *options)
    assert code == 0, stderr
