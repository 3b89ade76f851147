"""Tests of compression on the command line: files, pipes, corpora, and entropy models that are fitted to tokens."""

import io
import json
import math

import numpy as np
import pytest
import soundfile

import nemo_lfr
from nemo_lfr.cli.demo import demo_clip
from nemo_lfr.corpus.dataset import TokenDataset
from nemo_lfr.errors import EntropyModelError
from nemo_lfr.io.entropy.find import bundled_model
from nemo_lfr.io.entropy.fit import FitSettings, fit, measure
from nemo_lfr.io.entropy.model import EntropyModel, write_model
from nemo_lfr.io.token_file import Metadata, TokenReader, TokenStreamReader, TokenWriter
from tests.cli.test_cli import run
from tests.cli.test_pipes import piped  # noqa: F401  a fixture
from tests.io.test_entropy import random_model
from tests.models import codec_config, write_nemo

SMALL_FIT = FitSettings(past=2, averages=(2,), hidden=(16, 24), epochs=12, rounded_epochs=4, seed=1)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Return the bundled clip as WAV."""
    folder = tmp_path_factory.mktemp("speech")
    samples, rate = soundfile.read(demo_clip(), dtype="float32")
    soundfile.write(folder / "a.wav", samples, rate)
    return folder


def correlated_tokens(count, seed=0, num_codebooks=2):
    """Draw tokens of levels (4, 3) whose FSQ values depend on earlier values in this and the previous frame."""
    random = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        digits = np.zeros((60, num_codebooks, 2), int)
        for frame in range(1, 60):
            for codebook in range(num_codebooks):
                kept = random.random() < 0.8
                digits[frame, codebook, 0] = digits[frame - 1, codebook, 0] if kept else random.integers(4)
                digits[frame, codebook, 1] = (digits[frame, codebook, 0] + (random.random() < 0.1)) % 3
        result.append((digits[:, :, 0] + 4 * digits[:, :, 1]).T.astype(np.int32))
    return result


@pytest.mark.slow
def test_compressed_files_are_smaller_and_decode_to_the_same(capsys, speech, tmp_path):
    raw, small = tmp_path / "raw.lfr", tmp_path / "small.lfr"
    assert run(capsys, "encode", speech / "a.wav", "--out", raw)[0] == 0
    assert run(capsys, "encode", speech / "a.wav", "--out", small, "--compress")[0] == 0
    assert small.stat().st_size < 0.9 * raw.stat().st_size
    with TokenReader(raw) as one, TokenReader(small) as other:
        assert np.array_equal(one.read(), other.read())
        assert one.num_samples == other.num_samples
    for options in ([], ["--start", 0.5, "--duration", 0.7], ["--recover"]):
        waves = []
        for path in (raw, small):
            out = tmp_path / f"{path.stem}.wav"
            assert run(capsys, "decode", path, "--out", out, "--overwrite", *options)[0] == 0
            waves.append(out.read_bytes())
        assert waves[0] == waves[1]
    told = [json.loads(run(capsys, "info", path, "--json")[1])["items"][0] for path in (raw, small)]
    assert told[0]["payload_bits_per_frame"] == 88
    assert told[0]["entropy_model"] is None
    assert told[1]["entropy_model"] == bundled_model().hash
    assert told[1]["payload_bits_per_frame"] < 80
    assert told[1]["payload_bit_rate_bps"] < told[1]["bit_rate_bps"] < told[0]["bit_rate_bps"]


@pytest.mark.slow
def test_pipes_compress_block_by_block(piped, speech, tmp_path):  # noqa: F811
    wave = (speech / "a.wav").read_bytes()
    raw, small = (piped("encode", "-", "-", *options, stdin=wave) for options in ((), ("--compress", "--block", 32)))
    assert (raw.returncode, small.returncode) == (0, 0)
    assert len(small.stdout) < len(raw.stdout)
    assert small.stdout[8] == 1
    readers = [TokenStreamReader(io.BytesIO(done.stdout), "stdout") for done in (raw, small)]
    one, other = (np.concatenate(list(reader.blocks()), axis=1) for reader in readers)
    assert np.array_equal(one, other)
    audio = [piped("decode", "-", "-", stdin=done.stdout).stdout for done in (raw, small)]
    assert len(audio[0]) == len(audio[1])


@pytest.mark.slow
def test_a_codec_without_a_model_says_how_to_fit_one(capsys, speech, tmp_path):
    model = tmp_path / "other.nemo"
    write_nemo(model, codec_config())
    code, _, err = run(capsys, "encode", speech / "a.wav", "--out", tmp_path / "a.lfr", "--compress", "--model", model)
    assert code == 2
    assert "nemo-lfr entropy fit" in err
    assert not (tmp_path / "a.lfr").exists()
    (tmp_path / "bad.lfrm").write_bytes(b"LFRM")
    for path, text in ((tmp_path / "bad.lfrm", "too early"), (tmp_path / "gone.lfrm", "No such file")):
        code, _, err = run(capsys, "encode", speech / "a.wav", "--out", tmp_path / "a.lfr", "--entropy-model", path)
        assert code == 2
        assert str(path) in err and text in err and len(err.splitlines()) <= 2


@pytest.mark.slow
def test_a_model_is_fitted_and_used_from_the_command_line(capsys, tmp_path):
    metadata = Metadata(22050, 1024, (4, 3), 2, "feedfeedfeedfeed")
    for number, tokens in enumerate(correlated_tokens(12)):
        with TokenWriter(tmp_path / "tokens" / f"{number}.lfr", metadata) as writer:
            writer.write(tokens)
            writer.finish(60 * 1024)
    out = tmp_path / "m.lfrm"
    code, printed, err = run(capsys, "entropy", "fit", tmp_path / "tokens", "--out", out, "--epochs", 2, "--json")
    assert code == 0, err
    values = json.loads(printed)
    model = EntropyModel.read(out)
    assert values["entropy_model"] == model.hash
    assert model.spec.fingerprint == "feedfeedfeedfeed"
    assert values["bits_per_frame"] < values["uniform_bits_per_frame"] == round(2 * math.log2(12), 3)
    code, printed, _ = run(capsys, "info", out)
    assert code == 0 and model.hash in printed
    code, _, err = run(capsys, "entropy", "fit", tmp_path / "tokens", "--out", out)
    assert code == 2 and "--overwrite" in err


@pytest.mark.slow
def test_fitted_models_learn_the_dependencies_of_digits():
    """With the probabilities in `correlated_tokens`, a frame has an entropy of about 2 * (1.1 + 0.4) bits."""
    tokens = correlated_tokens(60)
    model, figures = fit(tokens, (4, 3), 2, settings=SMALL_FIT)
    again, _ = fit(tokens, (4, 3), 2, settings=SMALL_FIT)
    assert model.to_bytes() == again.to_bytes()
    assert figures["bits_per_frame"] < 4.2
    assert measure(model, correlated_tokens(5, seed=9)) < 4.2
    assert measure(model, correlated_tokens(5, seed=9), block_frames=1) > measure(model, correlated_tokens(5, seed=9))


REFUSED = {
    "nothing": ([], (4, 3), "at least 2"),
    "one utterance": (correlated_tokens(1), (4, 3), "at least 2"),
    "empty utterances": ([np.zeros((2, 0), np.int32)] * 5, (4, 3), "at least 2"),
    "too many levels": (correlated_tokens(2), (12, 100), "levels"),
}


@pytest.mark.parametrize(("tokens", "levels", "message"), REFUSED.values(), ids=REFUSED)
def test_tokens_that_no_model_can_be_fitted_to_are_refused(tokens, levels, message):
    with pytest.raises(EntropyModelError, match=message):
        fit(tokens, levels, 2, settings=SMALL_FIT)


def test_tokens_of_two_codecs_are_not_mixed(capsys, tmp_path):
    for name in ("a", "b"):
        with TokenWriter(tmp_path / f"{name}.lfr", Metadata(22050, 1024, (4, 3), 2, name * 16)) as writer:
            writer.write(correlated_tokens(1)[0])
            writer.finish(60 * 1024)
    code, _, err = run(capsys, "entropy", "fit", tmp_path / "a.lfr", tmp_path / "b.lfr", "--out", tmp_path / "m.lfrm")
    assert code == 2 and "fingerprint" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, "entropy", "fit", tmp_path / "empty", "--out", tmp_path / "m.lfrm")
    assert code == 2 and "no tokens" in err
    code, _, err = run(capsys, "entropy", "fit", tmp_path / "a.lfr", "--out", tmp_path / "m.bin")
    assert code == 2 and ".lfrm" in err


@pytest.mark.slow
@pytest.mark.parametrize(("subfolder", "is_bundled"), [(".", True), ("speaker/book", False)])
def test_a_corpus_of_compressed_files_carries_its_model(capsys, speech, tmp_path, subfolder, is_bundled):
    """Every command that reads token files finds the model, wherever the files are in the folder."""
    corpus, out = tmp_path / "corpus", tmp_path / "tokens"
    for name in ("a.wav", "b.wav"):
        (corpus / subfolder).mkdir(parents=True, exist_ok=True)
        (corpus / subfolder / name).write_bytes((speech / "a.wav").read_bytes())
    write_model(random_model(size=40), tmp_path / "m.lfrm")
    option = ["--compress"] if is_bundled else ["--entropy-model", tmp_path / "m.lfrm"]
    code, _, err = run(capsys, "tokenize", corpus, "--out", out, "--format", "lfr", *option, "--workers", 1)
    assert code == 0, err
    path = out / "tokens" / subfolder / "a.lfr"
    with TokenReader(path) as reader:
        assert (out / f"{reader.entropy_hash}.lfrm").is_file()
        assert (reader.entropy_hash == bundled_model().hash) == is_bundled
        tokens = reader.read()
    for utterance in TokenDataset(out):
        assert np.array_equal(utterance.tokens.numpy(), tokens)
    for command in (
        ["detokenize", out, "--out", tmp_path / "audio"],
        ["decode", out, "--out", tmp_path / "decoded"],
        ["decode", path, "--out", tmp_path / "a.wav"],
        ["decode", path, "--out", tmp_path / "recovered.wav", "--recover"],
        ["entropy", "fit", out, "--out", tmp_path / "fitted.lfrm", "--epochs", 0.1],
        ["info", out],
    ):
        code, _, err = run(capsys, *command)
        assert code == 0, (command, err)
    code, _, err = run(capsys, "tokenize", speech, "--out", out, "--format", "lfr", "--workers", 1)
    assert code == 2 and "entropy model" in err
    code, _, err = run(capsys, "tokenize", speech, "--out", tmp_path / "b", "--compress")
    assert code == 2 and 'format "shar" cannot be compressed' in err


@pytest.mark.slow
def test_a_model_of_another_codec_with_the_same_levels_still_loses_nothing(tmp_path):
    """Such a model only compresses less. Blocks that it would enlarge are packed instead."""
    model = random_model(size=40)
    write_model(model, tmp_path / "m.lfrm")
    codec = nemo_lfr.load(device="cpu")
    samples, _ = soundfile.read(demo_clip(), dtype="float32")
    soundfile.write(tmp_path / "a.wav", samples[:30_000], 22050)
    codec.encode_file(tmp_path / "a.wav", tmp_path / "a.lfr")
    codec.encode_file(tmp_path / "a.wav", tmp_path / "b.lfr", entropy_model=tmp_path / "m.lfrm")
    with TokenReader(tmp_path / "a.lfr") as one, TokenReader(tmp_path / "b.lfr", model=model) as other:
        assert np.array_equal(one.read(), other.read())
        assert other.payload_bytes <= one.payload_bytes
    codec.decode_file(tmp_path / "b.lfr", tmp_path / "b.wav", entropy_model=str(tmp_path / "m.lfrm"))
    assert io.BytesIO((tmp_path / "b.wav").read_bytes()).read(4) == b"RIFF"


@pytest.mark.slow
def test_an_evaluation_reports_both_rates_and_the_bits_of_a_frame(tmp_path):
    from nemo_lfr.evaluation.codecs.lfr import LFR
    from nemo_lfr.evaluation.results import Evaluation, Result
    from nemo_lfr.evaluation.tables import compression

    samples, rate = soundfile.read(demo_clip(), dtype="float32")
    trip = LFR(device="cpu").round_trip(samples[: 3 * rate], rate)
    assert trip.tokens is not None and trip.compressed_bytes is not None and trip.compressed_file_bytes is not None
    assert trip.compressed_bytes < 0.9 * trip.num_bytes
    assert trip.compressed_bytes < trip.compressed_file_bytes < trip.file_bytes
    entry = {
        "seconds": 3.0,
        "num_bytes": trip.num_bytes,
        "file_bytes": trip.file_bytes,
        "frames": trip.tokens.shape[1],
        "compressed_bytes": trip.compressed_bytes,
        "compressed_file_bytes": trip.compressed_file_bytes,
    }
    older = {name: entry[name] for name in ("seconds", "num_bytes", "file_bytes")}
    results = [
        Result(name, 0.0, (8, 7, 6, 6), tmp_path, {"a": values}) for name, values in (("new", entry), ("old", older))
    ]
    evaluation = Evaluation({}, rate, results, {}, {})
    table = compression(evaluation)
    assert table is not None
    (row,) = table.rows
    assert row[0] == "new" and row[-2] == "87.82"
    assert float(row[-1]) == round(8 * trip.compressed_bytes / trip.tokens.shape[1], 2)
