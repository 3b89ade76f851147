"""Tests of pipes: results equal those of files and appear while input arrives, and broken pipes are reported."""

import io
import os
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import soundfile
import torch

from nemo_lfr.cli import interrupts
from nemo_lfr.cli import main as cli
from nemo_lfr.cli.stdio import check_pipe
from nemo_lfr.errors import AudioError
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.containers import WavSamples, read_wav_header
from nemo_lfr.io.token_file import Metadata, TokenReader, TokenStreamReader
from nemo_lfr.pretrained import load
from tests.io.test_containers import CUT, EMPTY, NOT_TAKEN_APART, SILENCE, WHOLE, by_name, shortened
from tests.models import codec_config, speech_like, synthesize, write_nemo
from tests.reference import assert_same_tokens
from tests.tiers import slow_after

RATE, FRAME = 22050, 1024


@dataclass
class Done:
    returncode: int
    stdout: bytes
    stderr: str


@pytest.fixture
def piped(monkeypatch):
    """Return a function that runs one command in this process, with pipes for stdin and stdout."""

    def run(*arguments, stdin=b"") -> Done:
        ends = [io.TextIOWrapper(io.BufferedRandom(io.BytesIO(data))) for data in (stdin, b"")]
        said = io.StringIO()
        code = 0
        with monkeypatch.context() as patch:
            for name, end in zip(("stdin", "stdout", "stderr"), [*ends, said], strict=True):
                patch.setattr(sys, name, end)
            try:
                cli.main([*map(str, arguments)])
            except SystemExit as stop:
                code = stop.code or 0
            sys.stdout.flush()
        ends[1].seek(0)
        return Done(code, ends[1].buffer.read(), said.getvalue())

    return run


def wav(wave, rate: int = RATE, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.slow
def test_a_bad_recording_on_a_pipe_that_stays_open_is_a_one_line_error_and_no_crash():
    """The thread that reads stdin must not hold a lock that Python needs at exit."""
    encoder = subprocess.Popen(
        [sys.executable, "-m", "nemo_lfr", "encode", "-", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, bufsize=0, text=False,
    )  # fmt: skip
    assert encoder.stdin is not None
    encoder.stdin.write(b"RIFF" + bytes(200_000))
    assert encoder.wait(60) == 2
    said = encoder.stderr.read().decode()
    encoder.stdin.close()
    assert "stdin: not an audio file" in said.splitlines()[-1] and "Fatal" not in said


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="has no such signals")
@pytest.mark.parametrize(
    ("command", "signals", "expected"),
    [
        ("encode", ["SIGTERM"], 143),
        ("encode", ["SIGINT", "SIGINT"], 130),
        ("encode", ["SIGINT"], 0),
        ("decode", ["SIGINT", "SIGINT"], 130),
        ("decode", ["SIGINT"], 0),
    ],
)
def test_command_that_waits_for_input_can_be_terminated(piped, command, signals, expected):
    """With exit code 0, it first processes input that arrives after the signal."""
    data = audio = wav(speech_like(40 * FRAME))
    if command == "decode":
        data = piped("encode", "-", stdin=audio).stdout
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_lfr", command, "-", "-", *(["--block", "1"] if command == "encode" else [])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, text=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores SIGINT
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    sent = len(data) * 3 // 4
    process.stdin.write(data[:sent])
    result = process.stdout.read(500)
    for name in signals:
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(getattr(signal, name))
    if expected == 0:
        time.sleep(0.5)
        process.stdin.write(data[sent:])
        process.stdin.close()
        result += b"".join(iter(lambda: process.stdout.read(65536), b""))
        count = len(samples_of(result)) if command == "decode" else tokens_of(result).shape[1] * FRAME
        assert count == 40 * FRAME
    assert process.wait(60) == expected
    process.stdin.close()


@pytest.mark.skipif(os.name == "nt", reason="signals are not watched on Windows")
@pytest.mark.parametrize(
    ("is_pipe", "events", "interrupted"),
    [
        (True, ["SIGINT"], False),
        (True, ["SIGINT", "SIGINT"], True),
        (True, ["end", "SIGINT"], True),
        (True, ["SIGINT", "end"], False),
        (False, ["SIGINT"], True),
    ],
)
def test_first_interrupt_lets_a_pipe_end(monkeypatch, capsys, tmp_path, is_pipe, events, interrupted):
    monkeypatch.setattr(interrupts, "PATIENCE_S", 0.01)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    (tmp_path / "file").touch()
    ends = os.pipe()
    raised = False
    try:
        with (
            open(ends[0] if is_pipe else tmp_path / "file", "rb") as source,
            interrupts.watch_signals(source) as watched,
        ):
            for event in events:
                time.sleep(0.3)
                if event == "end":
                    watched.end_input()
                else:
                    os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            assert not select.select([watched.stopped], [], [], 0)[0]
    except KeyboardInterrupt:
        raised = True
    finally:
        assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
        os.close(ends[1])
    assert raised == interrupted
    assert ("Press Ctrl-C again" in capsys.readouterr().err) == (events[0] == "SIGINT" and is_pipe)


def tokens_of(data: bytes) -> np.ndarray:
    reader = TokenStreamReader(io.BytesIO(data), "stdout")
    tokens = np.concatenate(list(reader.blocks()), axis=1)
    assert reader.num_samples is not None
    return tokens


def samples_of(data: bytes) -> np.ndarray:
    """Return the samples in a WAV file whose header does not state the length."""
    assert data[:4] == b"RIFF" and data[4:8] == data[40:44] == b"\xff" * 4
    return np.frombuffer(data[44:], "<i2").astype(int)


def said(done: Done) -> str:
    assert done.returncode in (1, 2)
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_pipes_give_the_same_results_as_files(piped, tmp_path):
    wave = speech_like(41_111).numpy()
    (tmp_path / "a.wav").write_bytes(wav(wave))
    codec = load(None, "cpu")
    codec.encode_file(tmp_path / "a.wav", tmp_path / "a.lfr")
    codec.decode_file(tmp_path / "a.lfr", tmp_path / "back.wav")
    encoded = piped("encode", "-", stdin=(tmp_path / "a.wav").read_bytes())
    assert encoded.returncode == 0, encoded.stderr
    with TokenReader(tmp_path / "a.lfr") as reader:
        got, expected = (torch.from_numpy(tokens) for tokens in (tokens_of(encoded.stdout), reader.read()))
    assert_same_tokens(codec, soundfile.read(tmp_path / "a.wav", dtype="float32")[0], got, expected)
    assert piped("encode", tmp_path / "a.wav", "-").stdout == encoded.stdout
    decoded = piped("decode", "-", "-", stdin=(tmp_path / "a.lfr").read_bytes())
    from_file, _ = soundfile.read(tmp_path / "back.wav", dtype="int16")
    # In another process, memory alignment may change the order of sums, and 16-bit samples by at most one step.
    assert np.abs(samples_of(decoded.stdout) - from_file).max() <= 1
    for options in (("--format", "flac"), ("--start", 1.0, "--duration", 0.5), ("--recover",)):
        whole = piped("decode", "-", *options, stdin=(tmp_path / "a.lfr").read_bytes())
        assert soundfile.read(io.BytesIO(whole.stdout))[0].shape == ((11025,) if "--start" in options else (41_111,))


def test_pipe_without_samples_is_reported(piped):
    done = piped("encode", "-", "-", stdin=wav(np.zeros(0), RATE, "WAV", "PCM_16"))
    assert done.returncode == 0 and "stdin: the input contains no samples" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "subtype", "kind"), [(16000, "FLOAT", "WAV"), (48000, "PCM_24", "WAVEX"), (22050, "PCM_16", "FLAC")]
)
def test_pipes_accept_other_formats_rates_and_stereo(piped, tmp_path, rate, subtype, kind):
    wave = synthesize(1.5 * rate / RATE, 3)
    data = wav(np.stack([wave, 0.5 * wave], axis=1), rate, kind, subtype)
    (tmp_path / "a.wav").write_bytes(data)
    codec = load(None, "cpu")
    codec.encode_file(tmp_path / "a.wav", tmp_path / "a.lfr")
    done = piped("encode", "-", "-", "--block", 3, stdin=data)
    assert "stdin: 2 channels mixed to mono" in done.stderr
    with TokenReader(tmp_path / "a.lfr") as reader:
        expected = reader.read()
    got = tokens_of(done.stdout)
    # Samples that are resampled in other pieces differ by rounding, which may change a rounding tie.
    assert got.shape == expected.shape and (got != expected).sum() <= 1


def test_pipe_with_more_samples_than_its_header_declares_is_reported(piped):
    done = piped("encode", "-", "-", stdin=WHOLE["data size of a quarter"])
    assert done.returncode == 0 and "stdin: its header declares" in done.stderr, done.stderr


@pytest.mark.slow
def test_wav_of_unknown_length_is_encoded_to_its_end(piped):
    data = bytearray(wav(speech_like(30_000)))
    struct.pack_into("<I", data, 4, 0xFFFFFFFF)
    struct.pack_into("<I", data, 40, 0xFFFFFFFF)
    assert tokens_of(piped("encode", "-", stdin=bytes(data)).stdout).shape == (8, 30)


@pytest.mark.slow
def test_results_are_written_before_the_input_ends():
    """Send half of a recording, and read the output of its complete frames before sending the rest."""
    process = [sys.executable, "-m", "nemo_lfr"]
    encoder = subprocess.Popen(
        [*process, "encode", "-", "-", "--block", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    decoder = subprocess.Popen([*process, "decode", "-", "-"], stdin=encoder.stdout, stdout=subprocess.PIPE, bufsize=0)
    data = wav(speech_like(80 * FRAME))
    half = 44 + 2 * 40 * FRAME
    encoder.stdin.write(data[:half])
    context = load(None, "cpu")
    delay = context.encoder.context.future + context.decoder.context.future
    early = b""
    deadline = time.monotonic() + 120
    # libsndfile returns a block of 1 frame only after the next one has arrived.
    while len(early) < 44 + 2 * FRAME * (40 - delay - 1):
        assert time.monotonic() < deadline and decoder.poll() is None
        early += os.read(decoder.stdout.fileno(), 65536)
    assert encoder.poll() is None
    encoder.stdin.write(data[half:])
    encoder.stdin.close()
    rest = decoder.stdout.read()
    assert len(samples_of(early + rest)) == 80 * FRAME
    assert encoder.wait() == decoder.wait() == 0


@pytest.mark.slow
def test_stdout_file_gets_its_length_and_appending_keeps_existing_data(piped, tmp_path):
    tokens = piped("encode", "-", stdin=wav(speech_like(10_000))).stdout
    decode = [sys.executable, "-m", "nemo_lfr", "decode", "-", "-"]
    with open(tmp_path / "a.wav", "wb") as file:
        subprocess.run(decode, input=tokens, stdout=file, check=True, stderr=subprocess.DEVNULL)
    assert soundfile.info(tmp_path / "a.wav").frames == 10_000
    assert (tmp_path / "a.wav").stat().st_size == 44 + 20_000
    (tmp_path / "b.wav").write_bytes(b"before")
    with open(tmp_path / "b.wav", "ab") as file:
        subprocess.run(decode, input=tokens, stdout=file, check=True, stderr=subprocess.DEVNULL)
    data = (tmp_path / "b.wav").read_bytes()
    assert data.startswith(b"before") and len(samples_of(data[6:])) == 10_000


@pytest.mark.slow
def test_causal_decoder_trims_the_last_frame(piped, tmp_path):
    model = write_nemo(tmp_path / "nano.nemo", codec_config("nano"))
    tokens = piped("encode", "-", "--model", model, stdin=wav(speech_like(9 * FRAME - 1000)))
    assert tokens.returncode == 0, tokens.stderr
    done = piped("decode", "-", "--model", model, stdin=tokens.stdout)
    assert len(samples_of(done.stdout)) == 9 * FRAME - 1000


@pytest.mark.slow
def test_shorter_lookahead_is_recorded_in_the_file(piped):
    data = wav(speech_like(30_000))
    done = piped("encode", "-", "--lookahead", 2, stdin=data)
    meta: Metadata = TokenStreamReader(io.BytesIO(done.stdout), "stdout").metadata
    assert meta.precision == "fp32, lookahead 2"
    assert piped("decode", "-", "--lookahead", 0, stdin=done.stdout).returncode == 0
    message = "--lookahead only works if the token file is written to stdout"
    assert message in said(piped("encode", "a.wav", "--lookahead", 2))


@pytest.mark.slow
def test_a_broken_pipe_is_a_one_line_error(piped):
    assert said(piped("encode", "-", stdin=b"not audio")).startswith("nemo-lfr: error: stdin: not an audio file")
    assert said(piped("encode", "-", stdin=b"RIFF, but not audio")).startswith("nemo-lfr: error: stdin: not an audio")
    for command in ("encode", "decode"):
        assert said(piped(command, "-", stdin=b"")).startswith("nemo-lfr: error: stdin: the input is empty")
    data = wav(speech_like(40_000))
    done = piped("encode", "-", stdin=data[: len(data) // 2])
    assert "stdin: the audio was truncated" in said(done)
    with pytest.raises(Exception, match="truncated"):
        tokens_of(done.stdout)
    tokens = piped("encode", "-", stdin=data).stdout
    assert "stdin: the data ends too early; the file is damaged or truncated" in said(
        piped("decode", "-", stdin=tokens[:-20])
    )
    flipped = bytearray(tokens)
    flipped[-40] ^= 1
    assert "stdin: the checksum" in said(piped("decode", "-", stdin=bytes(flipped)))
    nan = wav(np.full(30_000, np.nan, np.float32), subtype="FLOAT")
    assert "NaN" in said(piped("encode", "-", stdin=nan))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "damage", "expected"),
    [
        (["encode"], lambda audio, tokens: b"", 2),
        (["encode"], lambda audio, tokens: tokens, 2),
        (["encode"], lambda audio, tokens: audio[:-100], 1),
        (["decode"], lambda audio, tokens: b"", 2),
        (["decode"], lambda audio, tokens: audio, 2),
        (["decode"], lambda audio, tokens: tokens[:-3], 1),
        (["decode", "--start", 0], lambda audio, tokens: audio, 2),
        (["decode", "--start", 0], lambda audio, tokens: tokens[:-3], 1),
    ],
)
def test_only_input_of_another_kind_is_a_usage_error_as_for_files(
    piped, tmp_path, monkeypatch, arguments, damage, expected
):
    monkeypatch.chdir(tmp_path)
    audio = wav(speech_like(3000))
    data = damage(audio, piped("encode", "-", stdin=audio).stdout)
    (tmp_path / "input").write_bytes(data)
    assert piped(*arguments, "input", "--out", "out").returncode == expected
    done = piped(*arguments, "-", "-", stdin=data)
    assert done.returncode == expected and "stdin: " in said(done)


@pytest.mark.slow
def test_empty_recording_passes_through_pipes(piped):
    tokens = piped("encode", "-", stdin=wav(np.zeros(0)))
    assert tokens.returncode == 0, tokens.stderr
    assert len(samples_of(piped("decode", "-", stdin=tokens.stdout).stdout)) == 0


@pytest.mark.slow
def test_tokens_of_another_codec_are_refused_in_pipes(piped, tmp_path):
    model = write_nemo(tmp_path / "tiny.nemo", codec_config())
    tokens = piped("encode", "-", stdin=wav(speech_like(9000))).stdout
    assert "stdin: the tokens were made by a codec with fingerprint" in said(
        piped("decode", "-", "--model", model, stdin=tokens)
    )


PIPED = {
    **{name: data for name, data in WHOLE.items() if data[:4] in (b"RIFF", b"RF64")},
    **{f"cut {name}": data for name, data in CUT.items() if name.startswith("WAV")},
    **{f"empty {name}": data for name, data in EMPTY.items()},
    "silence after a data size of 0": SILENCE,
    "letters after a data size of 0": SILENCE[:44] + b"RMS " * 1000,
    **{f"joined {name}": data for name, data in NOT_TAKEN_APART.items() if name.endswith("after WAV")},
    "zeros, then more": WHOLE["data size of a quarter"][: 44 + 8000] + bytes(3000) + WHOLE["plain"][44:],
}


@pytest.mark.parametrize("name", PIPED)
@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
def test_pipe_and_file_give_the_same_samples_and_warnings(caplog, name, piece):
    """The sizes of the pieces that arrive must not matter."""
    data = PIPED[name]
    source = io.BytesIO(data)
    header, head = read_wav_header(source.read)
    if header is None:
        pytest.skip("its odd chunk is not found without looking ahead")
    filtered = WavSamples(header, len(head))
    rest = source.read()
    if piece < 7:
        rest, before = rest[-3000:], filtered.push(rest[:-3000])
    else:
        before = b""
    samples = before + b"".join(filtered.push(rest[at : at + piece]) for at in range(0, len(rest), piece))
    samples += filtered.finish()
    try:
        with AudioReader("a.wav", RATE, data=data) as reader:
            expected = np.concatenate([np.zeros(0, np.float32), *reader.blocks()])
    except AudioError:
        assert filtered.problem and filtered.problem.startswith(
            ("the audio was truncated", "the audio contains several")
        )
        return
    assert filtered.problem is None
    wave = np.frombuffer(samples[: len(samples) // 2 * 2], "<i2") / np.float32(32768)
    assert np.array_equal(wave, expected)
    warnings = [record.getMessage() for record in caplog.records if "header declares" in record.getMessage()]
    assert warnings == ([f"a.wav: {filtered.note}."] if filtered.note else [])


def test_ambiguous_data_after_the_samples_of_a_pipe_is_reported(monkeypatch):
    monkeypatch.setattr("nemo_lfr.io.containers.wav.MAX_HELD", 1 << 15)
    source = io.BytesIO(SILENCE[:44] + b"RMS " * 16000)
    header, head = read_wav_header(source.read)
    filtered = WavSamples(header, len(head))
    assert filtered.push(source.read()) + filtered.finish() == b""
    assert "may be samples or other data; write it to a file" in filtered.problem


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", slow_after(2, ["data size 0", "cut WAV", "ADPCM", "data size of a quarter", "list after"])
)
def test_pipe_gives_the_tokens_of_the_file_or_its_error(piped, tmp_path, name):
    data = PIPED[name] if name in PIPED else shortened(by_name("WAV", "MS_ADPCM"), "WAV", 100)
    (tmp_path / "a.wav").write_bytes(data)
    result = piped("encode", "-", "-", stdin=data)
    if name == "cut WAV":
        assert result.returncode == 1 and "stdin: the audio was truncated" in result.stderr
        return
    load().encode_file(tmp_path / "a.wav", tmp_path / "a.lfr")
    with TokenReader(tmp_path / "a.lfr") as reader:
        expected, num_samples = reader.read(), reader.num_samples
    reader = TokenStreamReader(io.BytesIO(result.stdout), "stdin")
    tokens = np.concatenate(list(reader.blocks()), axis=1)
    assert reader.num_samples == num_samples and np.array_equal(tokens, expected)


@pytest.mark.slow
def test_non_audio_input_is_refused_before_it_is_spooled():
    """A writer that never ends is refused after its first kilobytes."""
    writer = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    command = [sys.executable, "-m", "nemo_lfr", "encode", "-", "-"]
    encoder = subprocess.run(command, stdin=writer.stdout, capture_output=True, timeout=300)
    writer.kill()
    writer.wait()
    assert encoder.returncode == 2 and b"stdin: not an audio file" in encoder.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes on Windows cannot be set to non-blocking mode")
def test_stdin_and_stdout_are_set_to_blocking_mode(monkeypatch):
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    with open(ends[0], "rb") as stdin, open(ends[1], "wb") as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        check_pipe(["-", "-"], None)
        assert all(os.get_blocking(end) for end in ends)
        monkeypatch.undo()
