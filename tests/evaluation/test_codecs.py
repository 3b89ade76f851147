"""Tests of the codecs in evaluations, with the real programs and model implementations."""

import math
import shutil

import numpy as np
import pytest
import torch

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation.codecs import open_codec
from nemo_lfr.evaluation.codecs.base import RoundTrip, fit
from nemo_lfr.evaluation.codecs.opus import ogg_payload
from nemo_lfr.evaluation.metrics import Signal, measure
from nemo_lfr.pretrained import bundled_checkpoint, load
from tests.checkpoint.test_checkpoint import Payload, with_weights
from tests.models import RATE, synthesize
from tests.reference import assert_same_tokens

opus_tools = pytest.mark.skipif(not shutil.which("opusenc"), reason="needs Debian's opus-tools")
codec2 = pytest.mark.skipif(not shutil.which("c2enc"), reason="needs Debian's codec2")


@pytest.fixture(scope="module")
def speech():
    return synthesize(3.0, seed=3)


def check(trip: RoundTrip, length: int) -> None:
    assert trip.audio.shape == (length,) and trip.audio.dtype == np.float32
    assert np.isfinite(trip.audio).all() and np.abs(trip.audio).max() > 0.01
    assert trip.num_bytes > 0 and trip.encode_seconds > 0 and trip.decode_seconds > 0


@pytest.mark.slow
def test_lfr_returns_the_output_of_the_codec(speech):
    codec = load(device="cpu")
    trip = open_codec("lfr", "cpu").round_trip(speech, RATE)
    check(trip, len(speech))
    tokens, tokens_len = codec.encode(speech)
    assert np.array_equal(trip.tokens, tokens[0].numpy())
    output, _ = codec.decode(tokens, tokens_len, audio_len=[len(speech)])
    assert np.allclose(trip.audio, output[0].numpy(), atol=1e-6)
    assert trip.num_bytes * 8 == pytest.approx(8 * math.log2(2016) * tokens.shape[2])
    assert trip.num_bytes < trip.file_bytes < trip.num_bytes + 800


def test_stock_nemo_gets_no_checkpoint_that_calls_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # NeMo's reader would then run the call
    (tmp_path / "a.nemo").write_bytes(with_weights({"a": Payload()}))
    with pytest.raises(NemoLfrError, match=r"a\.nemo: .*posix\.system"):
        open_codec("nemo:a.nemo", "cpu")
    assert not (tmp_path / "escaped").exists()


@pytest.mark.nemo
def test_stock_nemo_agrees_with_lfr(speech):
    pytest.importorskip("nemo", reason="stock NeMo is a compared codec: pip install '.[nemo]'")
    path = bundled_checkpoint()
    stock, ours = (
        open_codec(f"nemo:{path}", "cpu").round_trip(speech, RATE),
        open_codec(str(path), "cpu").round_trip(speech, RATE),
    )
    check(stock, len(speech))
    codec = load(device="cpu")
    assert_same_tokens(codec, speech, torch.from_numpy(ours.tokens), torch.from_numpy(stock.tokens))
    tokens = torch.from_numpy(stock.tokens)[None]  # decode NeMo's tokens, since rounding ties may differ
    output, _ = codec.decode(tokens, [tokens.shape[2]], audio_len=[len(speech)])
    assert np.allclose(stock.audio, output[0].numpy(), atol=1e-5)


@pytest.mark.slow
def test_the_output_has_the_rate_of_the_recording():
    wave = synthesize(2.0, seed=1)[: 2 * 16000]
    check(open_codec("lfr", "cpu").round_trip(wave, 16000), 32000)


@pytest.mark.slow
@opus_tools
def test_opus_is_aligned_improves_with_bit_rate_and_is_counted_without_its_container(speech):
    distances = []
    for kilobits in (8, 24):
        codec = open_codec(f"opus:{kilobits}")
        trip = codec.round_trip(speech, RATE)
        check(trip, len(speech))
        assert 0.5 * kilobits < trip.num_bytes * 8 / 1000 / 3 < 1.5 * kilobits
        assert trip.num_bytes < trip.file_bytes < trip.num_bytes + 2000
        values = measure(Signal(speech, RATE), Signal(trip.audio, RATE), ("SI-SDR", "lag", "mel distance"))
        assert abs(values["lag"]) <= 1
        distances.append(values["mel distance"])
    assert distances[1] < distances[0]


@pytest.mark.slow
@codec2
@pytest.mark.parametrize(("mode", "bits"), [("3200", 3200), ("1300", 1300), ("700C", 700)])
def test_the_delay_of_codec2_is_compensated_and_its_bytes_are_counted(speech, mode, bits):
    codec = open_codec(f"codec2:{mode}")
    trip = codec.round_trip(speech, RATE)
    check(trip, len(speech))
    assert codec.delay > 0
    assert trip.num_bytes * 8 / 3 == pytest.approx(bits, rel=0.03)  # a 700C frame of 28 bits takes 4 bytes
    assert abs(measure(Signal(speech, RATE), Signal(trip.audio, RATE), ["lag"])["lag"]) <= 8


def tiny(kind: str, folder) -> None:
    """Save a small transformers codec with random weights in a folder."""
    import transformers

    torch.manual_seed(0)
    if kind == "encodec":
        config = transformers.EncodecConfig(
            num_filters=4,
            hidden_size=16,
            codebook_dim=16,
            codebook_size=64,
            num_lstm_layers=1,
            target_bandwidths=[1.5, 3.0],
        )
        transformers.EncodecModel(config).save_pretrained(folder)
    elif kind == "dac":
        config = transformers.DacConfig(
            encoder_hidden_size=8, decoder_hidden_size=32, n_codebooks=4, codebook_size=64, codebook_dim=4,
            downsampling_ratios=[2, 4], upsampling_ratios=[4, 2], sampling_rate=24000,
        )  # fmt: skip
        transformers.DacModel(config).save_pretrained(folder)
    else:
        config = transformers.MimiConfig(
            hidden_size=16, num_filters=4, codebook_size=64, codebook_dim=8, vector_quantization_hidden_dimension=8,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=32,
            upsample_groups=16, num_quantizers=8,
        )  # fmt: skip
        transformers.MimiModel(config).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "setting", "codebooks"), [("dac", "2", 2), ("encodec", "3", None), ("mimi", "4", 4)])
def test_codecs_of_transformers_run_from_a_folder(tmp_path, speech, kind, setting, codebooks):
    pytest.importorskip("transformers", reason="comes with NeMo")
    tiny(kind, tmp_path)
    codec = open_codec(f"{kind}:{setting}:{tmp_path}", "cpu")
    trip = codec.round_trip(speech, RATE)
    assert trip.audio.shape == speech.shape and np.isfinite(trip.audio).all()
    assert codebooks is None or len(trip.tokens) == codebooks
    assert trip.num_bytes == pytest.approx(trip.tokens.size * 6 / 8)
    assert codec.levels == (64,) and trip.tokens.max() < 64
    if kind == "encodec":
        with pytest.raises(NemoLfrError, match=r"encodec:5: not a bit rate of this model; use one of 1\.5, 3\.0"):
            open_codec(f"encodec:5:{tmp_path}", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nobody/none",
            "mimi: no weights of nobody/none in the Hub cache; .*: hf download nobody/none",
        ),
        ("none", r"none \(no such folder\); pass a folder with a complete copy"),
        ("empty", r"mimi: transformers cannot load a model from .*empty \(.*\); pass a folder with a complete copy"),
    ],
)
def test_missing_weights_are_named_and_not_downloaded(tmp_path, monkeypatch, name, message):
    pytest.importorskip("transformers", reason="comes with NeMo")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NemoLfrError, match=message):
        open_codec(f"mimi:8:{name if '/' in name else tmp_path / name}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mp3:64", "unknown codec; use one of codec2:BIT"),
        ("lfr:", r"--codec 'lfr:': there is nothing after the colon; use lfr \(the bundled codec\), lfr:FILE"),
        ("opus:", "--codec 'opus:': there is nothing after the colon; use opus:"),
        ("opus", "pass a number of kbit/s from 6 to 256"),
        ("opus:fast", "pass a number"),
        ("codec2:9600", "unknown bit rate; use one of codec2:3200"),
        ("original:x", "no options"),
        ("none.nemo", "no such file"),
        ("nemo:none.nemo", "no such file"),
    ],
)
def test_unknown_codecs_and_settings_are_rejected(text, words):
    with pytest.raises(NemoLfrError, match=words):
        open_codec(text, "cpu")


@pytest.mark.parametrize(
    ("program", "text", "package"), [("opusenc", "opus:8", "opus-tools"), ("c2enc", "codec2:3200", "codec2")]
)
def test_a_program_that_is_not_installed_is_named_with_its_package(monkeypatch, program, text, package):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(NemoLfrError, match=f"{program} is not installed.*apt install {package}"):
        open_codec(text)


def test_ogg_payload_excludes_page_headers():
    def page(*packets: int) -> bytes:
        lacing = b"".join(b"\xff" * (size // 255) + bytes([size % 255]) for size in packets)
        return b"OggS" + bytes(22) + bytes([len(lacing)]) + lacing + bytes(sum(packets))

    assert ogg_payload(page(19) + page(300) + page(10, 255, 600) + page(1)) == 866
    with pytest.raises(NemoLfrError, match="Ogg"):
        ogg_payload(page(19) + b"RIFF" + bytes(40))


def test_fit_trims_or_pads_to_a_length():
    assert fit(np.ones(5), 3).tolist() == [1, 1, 1]
    assert fit(np.ones(2), 4).tolist() == [1, 1, 0, 0]
