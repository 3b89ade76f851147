"""Tests of the weights that `AutoModel.from_pretrained` reads: it accepts and refuses what `nemo_lfr.load` does."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import nemo_lfr
from nemo_lfr.checkpoint.folder import export_safetensors
from nemo_lfr.errors import CheckpointError, NemoLfrError
from tests.models import codec_config, speech_like, write_nemo
from tests.tiers import slow_after

CLIP = speech_like(9000)
BIAS, LEVELS, BASE = (
    "audio_encoder.pre_conv.conv.bias",
    "vector_quantizer.fsqs.0.num_levels",
    "vector_quantizer.fsqs.1.dim_base_index",
)


@pytest.fixture(scope="module", autouse=True)
def _packages():
    """Import transformers for the first test: the import takes 3 s, which collecting other tests should not."""
    global transformers
    transformers = pytest.importorskip("transformers", minversion="5.20", reason='pip install "transformers>=5.20"')
    pytest.importorskip("nemo_lfr.transformers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    export_safetensors(write_nemo(folder / "tiny.nemo", codec_config("two_stages")), folder / "out")
    return folder / "out"


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def rewrite(folder, edit):
    """Save the tensors after `edit(tensors)`, without the SHA-256 of the original in either file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, lambda config: config.pop("weights_sha256", None))


def change_weights(folder):
    """Put the weights of another codec of the same config into the folder, as this package writes them."""
    codec = nemo_lfr.load(folder, "cpu")
    codec.encoder.pre_conv.conv.bias.data.add_(1)
    codec.save_pretrained(folder.parent / "changed")
    shutil.copy(folder.parent / "changed" / "model.safetensors", folder)


def rewrite_weights(folder):
    """Change the weights with another tool, which does not change the config."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {BIAS: tensors[BIAS] + 1}, folder / "model.safetensors", metadata={"format": "pt"})


def save_with_transformers(folder):
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
    rewrite_weights(folder)


def flip(folder, place):
    contents = bytearray((folder / "model.safetensors").read_bytes())
    contents[place] ^= 1
    (folder / "model.safetensors").write_bytes(contents)


def cut(folder, size):
    contents = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(contents[:size])


def edit_config(folder, edit):
    values = json.loads((folder / "config.json").read_text())
    edit(values)
    (folder / "config.json").write_text(json.dumps(values))


def swap(folder):
    """Exchange the places of two tensors in the header."""
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = (f"audio_decoder.res_layers.0.res_blocks.{n}.res_blocks.0.input_conv.conv.bias" for n in (0, 1))
    header[first], header[second] = header[second], header[first]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


REFUSED = {
    "another sample rate": (lambda f: edit_config(f, lambda c: c.update(sample_rate=22051)), "do not belong together"),
    "another activation": (
        lambda f: edit_config(f, lambda c: c["audio_encoder"].update(activation="elu")),
        "do not belong together: audio_encoder is",
    ),
    "a missing key": (
        lambda f: edit_config(f, lambda c: c["audio_decoder"].pop("activation")),
        "do not belong together: audio_decoder is",
    ),
    "weights of another codec": (change_weights, "remove weights_sha256 from config.json"),
    "weights that another tool changed": (rewrite_weights, "do not belong together: weights_sha256 is"),
    "changed weights of transformers": (save_with_transformers, "do not belong together: weights_sha256 is"),
    "swapped tensors of one shape": (swap, "SHA-256 of its list of tensors"),
    "a flipped bit of a value": (lambda f: flip(f, -1000), "SHA-256"),
    "a flipped bit of the header": (lambda f: flip(f, 8), "safetensors"),
    "a file that was cut short": (lambda f: cut(f, -100), "safetensors"),
    "a file of a few bytes": (lambda f: cut(f, 5), "safetensors"),
    "a missing weight": (lambda f: rewrite(f, lambda t: t.pop(BIAS)), "audio_encoder lacks 1 of"),
    "a missing module": (
        lambda f: rewrite(f, lambda t: [t.pop(key) for key in list(t) if key.startswith("audio_decoder")]),
        "audio_decoder lacks",
    ),
    "a missing buffer": (lambda f: rewrite(f, lambda t: t.pop(BASE)), "vector_quantizer lacks 1 of"),
    "an extra weight": (
        lambda f: rewrite(f, lambda t: t.update({"audio_encoder.extra": torch.zeros(3)})),
        "audio_encoder has 1 weights",
    ),
    "another shape": (lambda f: rewrite(f, lambda t: t.update({BIAS: torch.zeros(3)})), r"has shape \[3\]"),
    "NaN": (lambda f: rewrite(f, lambda t: t[BIAS].fill_(torch.nan)), "NaN or infinite"),
    "another dim_base_index": (lambda f: rewrite(f, lambda t: t[BASE].add_(1)), "but the config requires"),
    "other levels": (lambda f: rewrite(f, lambda t: t[LEVELS].add_(1)), "but the config requires"),
    "float levels": (
        lambda f: rewrite(f, lambda t: t.update({LEVELS: t[LEVELS].float()})),
        "has dtype torch.float32, but the config requires torch.int32",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(2, REFUSED))
def test_a_damaged_folder_is_refused_as_by_load(name, folder):
    damage, message = REFUSED[name]
    damage(folder)
    # `nemo_lfr.load` validates values when a module is first used.
    for load in (
        lambda: nemo_lfr.load(folder, "cpu").encode(CLIP, sample_rate=22050),
        lambda: transformers.AutoModel.from_pretrained(folder),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            load()
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_after(1, [torch.float16, torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("asked", slow_after(1, [None, "auto", torch.float32, torch.float16, torch.bfloat16]))
def test_buffers_stay_int32_whatever_the_dtype_of_the_file_and_of_the_call(folder, tmp_path, dtype, asked):
    rewrite(
        folder, lambda t: t.update({key: value.to(dtype) for key, value in t.items() if value.is_floating_point()})
    )
    model = transformers.AutoModel.from_pretrained(folder, **({} if asked is None else {"dtype": asked}))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert {value.dtype for value in model.buffers()} == {torch.int32}
    model.save_pretrained(tmp_path / "saved")
    codec = nemo_lfr.load(tmp_path / "saved", "cpu")
    assert codec.fingerprint == nemo_lfr.load(folder, "cpu").fingerprint
    tokens = codec.encode(CLIP, sample_rate=22050)[0]
    assert torch.equal(model.encode(CLIP[None]).audio_codes, tokens.long())


DOORS = {
    "transformers": lambda path: transformers.AutoModel.from_pretrained(path),
    "load": lambda path: nemo_lfr.load(path, "cpu"),
}


@pytest.fixture(scope="module")
def saved_once(exported, tmp_path_factory):
    model, saved = transformers.AutoModel.from_pretrained(exported), tmp_path_factory.mktemp("sharded")
    model.save_pretrained(saved, max_shard_size="20KB")
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    return saved, model.codec.fingerprint


@pytest.fixture
def sharded(saved_once, tmp_path):
    """Return a folder with weights in several files, and the fingerprint of the codec."""
    saved, fingerprint = saved_once
    return shutil.copytree(saved, tmp_path / "saved"), fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_weights_in_several_files_are_validated(door, sharded):
    folder, fingerprint = sharded
    loaded = DOORS[door](folder)
    assert (loaded if door == "load" else loaded.codec).fingerprint == fingerprint
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors = load_file(file)
        if BASE in tensors:
            save_file(tensors | {BASE: tensors[BASE] + 1}, file, metadata={"format": "pt"})
            changed = file.name
    with pytest.raises(CheckpointError, match=f"{changed} do not belong together: weights_sha256 is '"):
        DOORS[door](folder)
    edit_config(folder, lambda config: config["weights_sha256"].pop(changed))
    with pytest.raises(CheckpointError, match=f"{changed} do not belong together: weights_sha256 is None"):
        DOORS[door](folder)
    edit_config(folder, lambda config: config.pop("weights_sha256"))
    with pytest.raises(CheckpointError, match="but the config requires"):
        DOORS[door](folder)


def swap_shards(index):
    shards = index["weight_map"]
    first, last = min(shards.values()), max(shards.values())
    index["weight_map"] = {key: {first: last, last: first}.get(name, name) for key, name in shards.items()}


def rename_shard(index, name):
    """Replace the name of the first shard, such as "../{}" to move it to the parent folder."""
    first = min(index["weight_map"].values())
    index["weight_map"] = {
        key: name.format(first) if value == first else value for key, value in index["weight_map"].items()
    }


OUTSIDE = "model-/../../model-1-of-2.safetensors"
# Change of the index, and the error
INDEXES = {
    "another folder": (lambda index: index["weight_map"].update({BIAS: OUTSIDE}), f"lists '{OUTSIDE}'"),
    "the parent folder": (lambda index: rename_shard(index, "../{}"), r"lists '\.\./model-00001"),
    "an absolute path": (lambda index: rename_shard(index, "/tmp/{}"), "lists '/tmp/model-00001"),
    "another name": (lambda index: index["weight_map"].update({BIAS: "weights.bin"}), "lists 'weights.bin'"),
    "a number": (lambda index: index["weight_map"].update({BIAS: 3}), "lists 3"),
    "no names": (lambda index: index.update(weight_map=[]), "not an index of safetensors files"),
    "a list": (lambda index: index.update(weight_map=[1]), "not an index of safetensors files"),
    "no map": (lambda index: index.pop("weight_map"), "not an index of safetensors files"),
    "no metadata": (lambda index: index.pop("metadata"), 'has no "metadata", which transformers requires'),
    "no files": (lambda index: index.update(weight_map={}), "lists 0 files"),
    "a missing file": (
        lambda index: index["weight_map"].update({BIAS: "model-9-of-9.safetensors"}),
        "model-9-of-9.safetensors: no such file, but .* lists it",
    ),
    "swapped files": (swap_shards, "should be in model-.*, but is in model-"),
    "a missing tensor": (lambda index: index["weight_map"].pop(BIAS), f"{BIAS} should be in no file, but is in "),
    "an unknown tensor": (
        lambda index: index["weight_map"].update(extra="model-00001-of-00001.safetensors"),
        "model-00001-of-00001.safetensors: no such file, but .* lists it",
    ),
}
DOORS_OF_INDEXES = {
    **DOORS,
    "a variant": lambda path: transformers.AutoModel.from_pretrained(path, variant="fp16"),
    "a subfolder": lambda path: transformers.AutoModel.from_pretrained(path.parent, subfolder=path.name),
    "a repository": lambda path: transformers.AutoModel.from_pretrained("me/one", local_files_only=True),
}


SERIOUS = ("the parent folder", "a list", "a missing tensor")
CASES = [(name, door) for name in INDEXES for door in DOORS_OF_INDEXES if door in DOORS or name in SERIOUS]
CASES.remove(("no metadata", "load"))  # only transformers needs the metadata


@pytest.mark.slow
@pytest.mark.parametrize(("name", "door"), slow_after(4, CASES, lambda case: case[1]))
def test_an_index_that_does_not_match_its_files_is_refused(name, door, sharded, monkeypatch):
    folder, _ = sharded
    change, message = INDEXES[name]
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for shard in folder.glob("model-*.safetensors"):  # a file outside of the folder is not read, even if it exists
        shutil.copy(shard, folder.parent)
    change(index)
    if door == "a variant":
        path = path.rename(folder / "model.safetensors.index.fp16.json")
        text = json.dumps(index).replace("model-", "model.fp16-")
        message = message.replace("model-", "model.fp16-")
        for shard in folder.glob("model-*.safetensors"):
            shard.rename(shard.with_name(shard.name.replace("model-", "model.fp16-")))
        path.write_text(text)
    else:
        path.write_text(json.dumps(index))
    if door == "a repository":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent / "cache"))
        repository = folder.parent / "cache" / "models--me--one"
        shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
    with pytest.raises(CheckpointError, match=message) as error:
        DOORS_OF_INDEXES[door](folder)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_state_dict_of_the_caller_is_used(folder):
    model = transformers.AutoModel.from_pretrained(folder)
    state = model.state_dict() | {BIAS: model.state_dict()[BIAS] + 1}
    other = type(model).from_pretrained(None, config=model.config, state_dict=state)
    assert torch.equal(other.state_dict()[BIAS], state[BIAS]) and other.vector_quantizer.num_codebooks == 8


@pytest.mark.slow
def test_changed_weights_are_used_after_the_checksum_is_removed(folder):
    rewrite_weights(folder)
    edit_config(folder, lambda config: config.pop("weights_sha256"))
    expected = load_file(folder / "model.safetensors")[BIAS]
    assert torch.equal(transformers.AutoModel.from_pretrained(folder).state_dict()[BIAS], expected)
    codec = nemo_lfr.load(folder, "cpu")
    assert torch.equal(codec.encoder.pre_conv.conv.bias, expected)
    codec.save_pretrained(folder)
    assert torch.equal(nemo_lfr.load(folder, "cpu").encoder.pre_conv.conv.bias, expected)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [("1GB", "20KB"), ("20KB", "1GB")])
def test_weights_of_an_earlier_save_are_not_left_in_the_folder(sizes, folder, tmp_path):
    model = transformers.AutoModel.from_pretrained(folder)
    for size in sizes:
        model.audio_encoder.pre_conv.conv.bias.data.add_(1)
        model.save_pretrained(tmp_path / "saved", max_shard_size=size)
        again = transformers.AutoModel.from_pretrained(tmp_path / "saved")
        assert torch.equal(again.state_dict()[BIAS], model.state_dict()[BIAS])
    assert not (tmp_path / "saved" / "model.safetensors").exists() or sizes[1] == "1GB"


def set_slopes(model):
    for module in model.modules():
        if isinstance(module, torch.nn.LeakyReLU):
            module.negative_slope = 0.3


UNSAVED = {
    "a hook": (
        lambda m: m.audio_encoder.register_forward_hook(lambda *_: None),
        "hooks, patched methods or replaced layers",
    ),
    "another slope": (set_slopes, "differs from the codec's config"),
    "converted weights": (lambda m: m.half(), "were converted to float16"),
    "converted weights of the decoder": (lambda m: m.audio_decoder.double(), "were converted to float64"),
}


def _out_of_space(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["an invalid argument", "an invalid state dict", "a full disk"])
def test_an_earlier_save_is_kept_if_saving_fails(failure, folder, tmp_path, monkeypatch):
    model = transformers.AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    options = {}
    if failure == "a full disk":
        monkeypatch.setattr("nemo_lfr.transformers.modeling.record_checksum", _out_of_space)
    else:
        options = {"max_shard_size": "5 apples"} if "argument" in failure else {"state_dict": {"a": 1}}
    with pytest.raises((ValueError, AttributeError, OSError)):
        model.save_pretrained(tmp_path / "saved", **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(1, UNSAVED))
def test_a_model_that_would_give_other_results_is_not_saved(name, folder, tmp_path):
    change, message = UNSAVED[name]
    model = transformers.AutoModel.from_pretrained(folder)
    change(model)
    for save in (model.save_pretrained, model.codec.save_pretrained):
        with pytest.raises(NemoLfrError, match=message):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_saved_model_is_uploaded_with_its_checksum(folder, monkeypatch):
    model = transformers.AutoModel.from_pretrained(folder)
    uploads = []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, repo_id, **kwargs: uploads.append((repo_id, kwargs)))
    model.save_pretrained(folder, push_to_hub=True, private=True)
    model.save_pretrained(folder, push_to_hub=True, repo_id="user/codec", is_main_process=False)
    assert uploads == [("copy", {"private": True})]
