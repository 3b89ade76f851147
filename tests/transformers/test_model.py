"""Tests of `nemo_lfr.transformers`.

They repeat assertions from the common model tests of transformers, which are not part of its wheel.
"""

import copy
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nemo_lfr
from nemo_lfr.checkpoint.folder import export_safetensors
from nemo_lfr.errors import ConfigError, NemoLfrError
from tests.models import KINDS, codec_config, speech_like, write_nemo
from tests.tiers import slow_after

RATE = 22050
FIRST, SECOND = speech_like(9000), speech_like(5000, seed=1)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _packages():
    """Import transformers for the first test: the import takes 3 s, which collecting other tests should not."""
    global transformers, ours
    transformers = pytest.importorskip("transformers", minversion="5.20", reason='pip install "transformers>=5.20"')
    ours = pytest.importorskip("nemo_lfr.transformers")


def export(path: Path, kind: str = "two_stages") -> Path:
    export_safetensors(write_nemo(path / "tiny.nemo", codec_config(kind)), path / "out")
    return path / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch(folder):
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    return extractor([FIRST.numpy(), SECOND.numpy()], sampling_rate=RATE, return_tensors="pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nano", "causal"])
def test_tokens_audio_and_fingerprint_equal_those_of_load(kind, tmp_path):
    folder = export(tmp_path, kind)
    codec = nemo_lfr.load(folder, "cpu")
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and not model.training
    tokens, _ = codec.encode(FIRST, sample_rate=RATE)
    codes = model.encode(FIRST[None, None]).audio_codes
    assert codes.dtype == torch.int64 and torch.equal(codes, tokens.long())
    assert torch.equal(model.decode(codes).audio_values[:, 0], codec.decode(tokens)[0])
    assert model.codec.fingerprint == codec.fingerprint
    assert model.config.num_codebooks == codec.num_codebooks and model.config.codebook_size == codec.codebook_size
    assert (model.config.sampling_rate, model.config.frame_rate) == (codec.sample_rate, codec.frame_rate)


@pytest.mark.slow
def test_every_auto_class_knows_the_codec(folder, model):
    assert type(model) is ours.NemoLfrModel and model.main_input_name == "input_values"
    assert type(transformers.AutoModelForAudioTokenization.from_pretrained(folder)) is ours.NemoLfrModel
    assert isinstance(model, transformers.modeling_utils.PreTrainedAudioTokenizerBase)
    assert type(transformers.AutoConfig.from_pretrained(folder)) is ours.NemoLfrConfig
    for auto in (transformers.AutoFeatureExtractor, transformers.AutoProcessor):
        assert type(auto.from_pretrained(folder)) is ours.NemoLfrFeatureExtractor


@pytest.mark.slow
def test_a_batch_with_a_padding_mask_equals_its_clips_alone(model, batch):
    assert batch["input_values"].shape == (2, 1, 9000) and batch["padding_mask"].sum(1).tolist() == [9000, 5000]
    encoded = model.encode(**batch)
    decoded = model.decode(encoded.audio_codes, batch["padding_mask"]).audio_values
    result = model(**batch)
    assert torch.equal(result.audio_codes, encoded.audio_codes) and torch.equal(result.audio_values, decoded)
    assert decoded.shape == batch["input_values"].shape
    for row, clip in enumerate((FIRST, SECOND)):
        codes = model.encode(clip[None, None]).audio_codes
        frames = codes.shape[2]
        assert torch.equal(encoded.audio_codes[row, :, :frames], codes[0])
        assert encoded.audio_codes_mask[row].sum() == frames and not encoded.audio_codes[row, :, frames:].any()
        alone = model.decode(codes).audio_values[0, :, : len(clip)]
        assert torch.equal(decoded[row, :, : len(clip)], alone) and not decoded[row, :, len(clip) :].any()
    by_codes = model.decode(encoded.audio_codes, audio_codes_mask=encoded.audio_codes_mask).audio_values
    assert torch.equal(by_codes[:, :, :5000], decoded[:, :, :5000])


@pytest.mark.slow
def test_values_after_a_clip_have_no_effect(model, batch):
    loud = batch["input_values"].masked_fill(~batch["padding_mask"][:, None].bool(), 0.9)
    assert torch.equal(model.encode(loud, batch["padding_mask"]).audio_codes, model.encode(**batch).audio_codes)


@pytest.mark.slow
def test_tuples_equal_outputs(model, batch):
    for method, arguments in ((model.encode, dict(batch)), (model, dict(batch))):
        values = method(**arguments, return_dict=False)
        expected = method(**arguments).to_tuple()
        assert type(values) is tuple and all(torch.equal(*pair) for pair in zip(values, expected, strict=True))
    codes = model.encode(**batch).audio_codes
    assert torch.equal(model.decode(codes, return_dict=False)[0], model.decode(codes).audio_values)


@pytest.mark.slow
def test_fewer_codebooks_are_encoded_and_decoded(model):
    codes = model.encode(FIRST[None, None], num_codebooks=3).audio_codes
    assert codes.shape[1] == 3 and torch.equal(codes, model.encode(FIRST[None]).audio_codes[:, :3])
    assert model.decode(codes).audio_values.isfinite().all()


@pytest.mark.slow
def test_saved_models_and_extractors_are_loaded_again_by_both(model, folder, tmp_path):
    model.save_pretrained(tmp_path)
    transformers.AutoFeatureExtractor.from_pretrained(folder).save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    codes = model.encode(FIRST[None]).audio_codes
    assert torch.equal(again.encode(FIRST[None]).audio_codes, codes)
    codec = nemo_lfr.load(tmp_path, "cpu")
    assert torch.equal(codec.encode(FIRST, sample_rate=RATE)[0].long(), codes)
    assert codec.fingerprint == model.codec.fingerprint
    extractors = [transformers.AutoFeatureExtractor.from_pretrained(path).to_dict() for path in (folder, tmp_path)]
    assert extractors[0] == extractors[1]
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}


def test_the_config_of_a_nemo_checkpoint_is_read_without_its_other_keys(folder):
    text = (folder / "config.json").read_text()
    assert "discriminator" in json.loads(text) and json.loads(text)["model_type"] == "nemo_lfr"
    config = transformers.AutoConfig.from_pretrained(folder)
    assert "discriminator" not in config.to_dict()
    assert ours.NemoLfrConfig().codebook_size == 2016 and ours.NemoLfrConfig().hop_length == 1024


@pytest.mark.slow
def test_a_model_without_weights_is_initialized(model):
    torch.manual_seed(0)
    fresh = transformers.AutoModel.from_config(copy.deepcopy(model.config)).eval()
    assert all(value.isfinite().all() for value in fresh.state_dict().values())
    assert fresh.encode(FIRST[None]).audio_codes.shape == model.encode(FIRST[None]).audio_codes.shape


@pytest.mark.slow
def test_weights_stay_fp32_whatever_dtype_is_asked_for(folder, model):
    half = transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.float32}
    assert torch.equal(half.encode(FIRST[None]).audio_codes, model.encode(FIRST[None]).audio_codes)


def test_the_signatures_are_those_of_mimi():
    for name in ("encode", "decode", "forward"):
        names = list(inspect.signature(getattr(ours.NemoLfrModel, name)).parameters)
        mimi = list(inspect.signature(getattr(transformers.MimiModel, name)).parameters)
        assert names[:3] == mimi[:3] and "return_dict" in names


def both_masks(model):
    """Return codes, the mask of their samples, and a mask of fewer frames."""
    codes = model.encode(torch.zeros(1, 9000)).audio_codes
    mask = torch.ones(1, codes.shape[2])
    mask[:, -1] = 0
    return codes, torch.ones(1, 9000), mask


PADDED_LEFT = torch.cat([torch.zeros(1, 9), torch.ones(1, 91)], 1)
REFUSED = {
    "stereo": (lambda model: model.encode(torch.zeros(1, 2, 100)), r"input_values has shape \[1, 2, 100\]"),
    "one dimension": (lambda model: model.encode(torch.zeros(100)), r"input_values has shape \[100\]"),
    "left padding": (lambda model: model.encode(torch.zeros(1, 100), PADDED_LEFT), "padding_mask has ones after"),
    "a mask of another shape": (lambda model: model.encode(torch.zeros(1, 100), torch.ones(1, 99)), "padding_mask"),
    "an inverted mask": (lambda model: model.encode(torch.zeros(1, 100), torch.zeros(1, 100)), "no ones"),
    "half": (
        lambda model: model.encode(torch.zeros(1, 100), torch.full((1, 100), 0.5)),
        "padding_mask has the value 0.5",
    ),
    "a mask of NaN": (lambda model: model.encode(torch.zeros(1, 100), torch.full((1, 100), torch.nan)), "value nan"),
    "a mask of -1": (
        lambda model: model(torch.zeros(1, 100), -torch.ones(1, 100).int()),
        "padding_mask has the value -1",
    ),
    "a mask in numpy": (lambda model: model.encode(torch.zeros(1, 100), torch.ones(1, 100).numpy()), "is a ndarray"),
    "a mask of clips": (
        lambda model: model.encode(torch.zeros(1, 100), torch.ones(1)),
        r"shape \[1\]; expected \[1, 100\]",
    ),
    "a frame mask of halves": (
        lambda model: model.decode(torch.zeros(1, 8, 5).long(), audio_codes_mask=torch.full((1, 5), 0.5)),
        "audio_codes_mask has the value 0.5",
    ),
    "a frame mask without ones": (
        lambda model: model.decode(torch.zeros(1, 8, 5).long(), audio_codes_mask=torch.zeros(1, 5)),
        "audio_codes_mask has no ones",
    ),
    "samples as text": (lambda model: model.encode("a.wav"), "input_values is a str"),
    "features as one argument": (lambda model: model({"input_values": torch.zeros(1, 100)}), "input_values is a dict"),
    "NaN": (lambda model: model.encode(torch.full((1, 100), torch.nan)), "contains NaN"),
    "codes without a batch": (lambda model: model.decode(torch.zeros(8, 5).long()), r"shape \[8, 5\]"),
    "codes outside of the codebook": (lambda model: model.decode(torch.full((1, 8, 5), 2016)), "token 2016"),
    "a frame mask for a sample mask": (
        lambda model: model.decode(torch.zeros(1, 8, 5).long(), torch.ones(1, 5)),
        r"longest clip in padding_mask has 5 samples \(1 frame\), but audio_codes has 5 frames",
    ),
    "a frame mask for a sample mask, one frame": (
        lambda model: model.decode(torch.zeros(1, 8, 1).long(), torch.ones(1, 1)),
        "padding_mask has only one column, so it may be a mask of frames; .* audio_codes_mask=",
    ),
    "a tuple of encode": (
        lambda model: model.decode(*model.encode(torch.zeros(2, 9000), return_dict=False)),
        r"longest clip in padding_mask has 600 samples \(40 frames\), but audio_codes has 600 frames",
    ),
    "a mask of shorter clips": (
        lambda model: model.decode(torch.zeros(1, 8, 5).long(), torch.ones(1, 15)),
        "longest clip in padding_mask has 15 samples",
    ),
    "two masks that differ": (
        lambda model: model.decode(*both_masks(model)),
        r"clip 0 has 9000 samples \(600 frames\) in padding_mask, but 599 frames in audio_codes_mask",
    ),
    "left padding by the extractor": (
        lambda _: ours.NemoLfrFeatureExtractor(padding_side="left"),
        "padding_side is 'left', but",
    ),
    "a mask for other frames": (lambda model: model.decode(torch.zeros(1, 8, 5).long(), torch.ones(1, 9000)), "5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_in_one_line(model, name):
    call, message = REFUSED[name]
    with pytest.raises(NemoLfrError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("audio", "options", "message"),
    [
        (FIRST.numpy(), {"sampling_rate": 16000}, "sampling_rate is 16000, but the codec runs at 22050 Hz"),
        ([FIRST.numpy()[None].repeat(2, 0)], {"sampling_rate": RATE}, r"clip 0 has shape \[2, 9000\]"),
        ("a.wav", {}, "clip 0 is 'a.wav', but the extractor reads no files; pass an array of samples"),
        ([FIRST.numpy(), Path("b.wav")], {}, "clip 1 is b.wav, but the extractor reads no files"),
        (b"RIFF", {}, "clip 0 is b'RIFF'"),
        (
            {"array": [0.0], "sampling_rate": RATE},
            {},
            r"clip 0 is a dict with the keys \['array', 'sampling_rate'\]; pass",
        ),
        ([{"path": "a.wav"}], {}, r"clip 0 is a dict with the keys \['path'\]"),
        (None, {}, "clip 0 has type NoneType"),
        ([], {}, "raw_audio is an empty list; pass one clip or more"),
        ([["a", "b"]], {}, "clip 0 has type list and dtype <U1; pass an array of numbers"),
        ([[[0.0], [0.0, 1.0]]], {}, "clip 0 has type list; pass a numpy array"),
        (FIRST.numpy().astype(complex), {}, "clip 0 has dtype complex128"),
        ([FIRST.numpy(), SECOND.numpy() * float("nan")], {}, "clip 1 contains NaN or infinite samples"),
        (FIRST.numpy() * 32768, {}, "clip 0 reaches .* divide by 32768"),
    ],
)
def test_the_extractor_refuses_other_audio(folder, audio, options, message):
    with pytest.raises(NemoLfrError, match=message):
        transformers.AutoFeatureExtractor.from_pretrained(folder)(audio, **{"sampling_rate": RATE} | options)


CHANGES = {
    "sample_rate": (16000, "config.sample_rate is 16000, but the model was built for 22050; set"),
    "samples_per_frame": (512, "config.samples_per_frame is 512, but the model was built for"),
    "audio_encoder": ({"activation": "half_snake"}, "differs from the codec's config|cannot be built"),
    "vector_quantizer": ({"eps": 0.1}, "differs from the codec's config"),
}


@pytest.mark.slow
@pytest.mark.parametrize("is_used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("key", CHANGES)
def test_a_model_whose_config_was_changed_is_not_saved(key, is_used, folder, tmp_path):
    model = transformers.AutoModel.from_pretrained(folder)
    if is_used:
        model.encode(torch.zeros(1, 100))
    value, message = CHANGES[key]
    if isinstance(value, dict):
        getattr(model.config, key).update(value)
    else:
        setattr(model.config, key, value)
    for call in (lambda: model.save_pretrained(tmp_path / "changed"), lambda: pickle.dumps(model)):
        with pytest.raises(NemoLfrError, match=message):
            call()
    assert not (tmp_path / "changed").exists()


@pytest.mark.slow
def test_a_variant_is_named_by_load(folder, tmp_path):
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(NemoLfrError, match=r"model\.fp16\.safetensors, a variant that only transformers reads"):
        nemo_lfr.load(tmp_path)


@pytest.mark.parametrize("key", ["sampling_rate", "hop_length", "frame_rate", "num_codebooks", "codebook_size"])
def test_a_value_that_the_checkpoint_determines_cannot_be_set(folder, key):
    calls = (
        lambda: transformers.AutoModel.from_pretrained(folder, **{key: 7}),
        lambda: transformers.AutoConfig.from_pretrained(folder, **{key: 7}),
        lambda: transformers.AutoConfig.for_model("nemo_lfr", **{key: 7}),
    )
    for call in calls:
        with pytest.raises(
            ConfigError, match=f"^{key}=7: the checkpoint determines this value, .*; remove the argument"
        ):
            call()


def test_the_extractor_takes_one_clip_and_clips_without_padding(folder):
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    one = extractor(FIRST.numpy(), sampling_rate=RATE, return_tensors="np")
    assert one["input_values"].shape == (1, 1, 9000) and one["padding_mask"].shape == (1, 9000)
    two = extractor([FIRST.numpy(), SECOND.numpy()], padding=False, sampling_rate=RATE)
    assert [clip.shape for clip in two["input_values"]] == [(1, 9000), (1, 5000)] and "padding_mask" not in two
    cut = extractor([FIRST.tolist()], padding="max_length", max_length=999, truncation=True, sampling_rate=RATE)
    assert cut["input_values"][0].shape == (1, 999)
    scaled = extractor((FIRST * 32768).round().short(), sampling_rate=RATE, return_tensors="np")
    assert abs(scaled["input_values"] - one["input_values"]).max() <= 0.5 / 32768


COPIES = {
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_after(1, COPIES))
def test_copies_and_pickled_models_have_the_same_tokens_and_can_be_saved(folder, tmp_path, kind):
    model = transformers.AutoModel.from_pretrained(folder)
    model.audio_decoder.pre_conv.conv.bias.requires_grad_(False)
    again = COPIES[kind](model)
    codes = model.encode(FIRST[None]).audio_codes
    assert torch.equal(again.encode(FIRST[None]).audio_codes, codes) and again.codec is not model.codec
    assert not again.training and not again.audio_decoder.pre_conv.conv.bias.requires_grad
    assert again.codec.fingerprint == model.codec.fingerprint and again.config.to_dict() == model.config.to_dict()
    again.audio_encoder = copy.deepcopy(again.audio_encoder)
    again.audio_encoder.pre_conv.conv.bias.data.add_(1)
    assert torch.equal(model.encode(FIRST[None]).audio_codes, codes)
    again.save_pretrained(tmp_path)
    saved = transformers.AutoModel.from_pretrained(tmp_path).encode(FIRST[None]).audio_codes
    assert torch.equal(saved, again.encode(FIRST[None]).audio_codes) and not torch.equal(saved, codes)


UNPICKLABLE = {
    "patched methods or replaced layers, which are not pickled": lambda model: (
        model.audio_encoder.register_forward_hook(lambda *_: None)
    ),
    "the model has a forward hook": lambda model: model.register_forward_hook(lambda *_: None),
    "head is a Linear that": lambda model: model.add_module("head", torch.nn.Linear(3, 3)),
    "scale is a tensor that": lambda model: model.register_buffer("scale", torch.ones(1), persistent=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("message", UNPICKLABLE)
def test_a_model_is_not_pickled_without_a_part_of_it(folder, message):
    model = transformers.AutoModel.from_pretrained(folder)
    UNPICKLABLE[message](model)
    with pytest.raises(NemoLfrError, match=message):
        pickle.dumps(model)


@pytest.mark.slow
def test_rates_of_dropout_and_weights_without_weight_norm_are_pickled(folder):
    model = transformers.AutoModel.from_pretrained(folder)
    model.audio_encoder.remove_weight_norm()
    model.audio_encoder.requires_grad_(False)
    rates = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    rates[0].p = 0.3
    again, trained = pickle.loads(pickle.dumps((model, list(model.parameters()))))
    assert list(map(id, trained)) == list(map(id, again.parameters()))
    assert [module.p for module in again.modules() if isinstance(module, torch.nn.Dropout)] == [
        module.p for module in rates
    ]
    assert not any(value.requires_grad for value in again.audio_encoder.parameters())
    assert torch.equal(again.encode(FIRST[None]).audio_codes, model.encode(FIRST[None]).audio_codes)


@pytest.mark.slow
def test_without_transformers_the_error_names_the_package():
    code = "import sys; sys.modules['transformers'] = None; import nemo_lfr.transformers"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "transformers is not installed: pip install" in done.stderr.splitlines()[-1]


def test_all_kinds_of_codecs_have_a_valid_config():
    for kind in KINDS:
        config = ours.NemoLfrConfig.from_dict(codec_config(kind))
        assert config.codebook_size == 2016 and config.num_codebooks in (1, 4, 8, 13)


def test_a_model_on_the_hub_fails_at_the_first_request_without_network(monkeypatch):
    """The client of transformers would try again for half a minute."""

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    with pytest.raises(
        NemoLfrError, match=r"nobody/nothing: could not be downloaded .*\(no route to host\); check the"
    ):
        ours.NemoLfrModel.from_pretrained("nobody/nothing")
