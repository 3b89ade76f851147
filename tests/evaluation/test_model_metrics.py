"""Tests of model metrics, with small random models and without models."""

import json

import numpy as np
import pytest
import torch

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation.metrics import METRICS, Signal, Undefined
from nemo_lfr.evaluation.model_metrics import all_metrics, open_model_metrics
from nemo_lfr.evaluation.model_metrics.recognition import ASRErrorRate
from nemo_lfr.evaluation.model_metrics.speaker import SpeakerSimilarity
from tests.models import RATE, synthesize
from tests.packages import require

require("transformers", reason="the models of --asr and --speaker-model use it; it comes with NeMo")


@pytest.fixture(scope="module")
def pair():
    speech = synthesize(2.0, seed=3)
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32)
    return Signal(speech, RATE), Signal(0.1 * noise, RATE)


@pytest.fixture(scope="module")
def wav2vec(tmp_path_factory):
    """Save a small wav2vec 2.0 ASR model with random weights, and return its folder."""
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder = tmp_path_factory.mktemp("wav2vec")
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<unk>", "|", *"abcdefgh"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), bos_token=None, eos_token=None, pad_token="<pad>", word_delimiter_token="|"
    )
    torch.manual_seed(1)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def xvector(tmp_path_factory):
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    folder = tmp_path_factory.mktemp("xvector")
    torch.manual_seed(2)
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7,
        num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=16, tdnn_dim=(16,) * 5, xvector_output_dim=8,
    )  # fmt: skip
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_error_rates_use_the_models_transcript(pair, wav2vec):
    import jiwer
    from transformers import pipeline
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    wave = pair[1].at_16k
    heard = pipeline("automatic-speech-recognition", model=wav2vec)({"raw": wave, "sampling_rate": 16000})["text"]
    assert heard.strip(), "the random recognizer must say something for this test"
    values = ASRErrorRate(wav2vec, "cpu").measure(*pair, {"text": "A bad, BAD face."})
    expected, heard = "a bad bad face", BasicTextNormalizer()(heard).strip()
    assert values == {"CER": 100 * jiwer.cer(expected, heard), "WER": 100 * jiwer.wer(expected, heard)}
    perfect = ASRErrorRate(wav2vec, "cpu").measure(*pair, {"text": heard.upper() + "!"})
    assert perfect == {"CER": 0, "WER": 0}


def test_a_recording_without_text_has_no_error_rate(pair, wav2vec):
    values = ASRErrorRate(wav2vec, "cpu").measure(*pair, {})
    assert set(values) == {"CER", "WER"} and all(isinstance(value, Undefined) for value in values.values())


def test_a_speaker_is_most_similar_to_itself(pair, xvector):
    metric = SpeakerSimilarity(xvector, "cpu")
    (same,) = metric.measure(pair[0], pair[0], {}).values()
    (other,) = metric.measure(*pair, {}).values()
    assert same == pytest.approx(1, abs=1e-5)
    assert other < same


@pytest.mark.slow
@pytest.mark.nemo
def test_missing_models_are_reported_and_do_not_stop_the_evaluation(tmp_path):
    sources = {"asr": str(tmp_path / "none"), "speaker": str(tmp_path / "none.nemo")}
    opened = open_model_metrics(sources, "cpu")
    assert not opened.models and set(opened.absent) == set(all_metrics()) - set(METRICS)
    assert all(reason.startswith("not measured: ") and len(reason) > 20 for reason in opened.absent.values())
    assert set(opened.failed) == {"asr", "speaker"}


def test_models_that_were_not_requested_are_reported_with_their_option():
    opened = open_model_metrics({}, "cpu")
    assert opened.absent["CER"] == "not measured: --asr was not passed"
    assert opened.absent["speaker similarity"] == "not measured: --speaker-model was not passed"
    assert not opened.failed


@pytest.mark.parametrize("kind", ["asr", "speaker"])
def test_a_kind_without_a_model_asks_for_one(kind):
    assert "pass one, for example --" in open_model_metrics({kind: ""}, "cpu").failed[kind]


def test_unknown_kinds_are_rejected():
    with pytest.raises(
        NemoLfrError, match=r"model metric 'none' is unknown; use one of \['squim', 'asr', 'speaker'\]"
    ):
        open_model_metrics({"none": ""}, "cpu")
