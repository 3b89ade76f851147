"""Tests that hooks on the encoder and decoder run, and that modules replaced by the caller are used."""

import copy
import functools
from operator import itemgetter

import pytest
import soundfile
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm

import nemo_lfr
from nemo_lfr.codec.golden import export_golden
from nemo_lfr.codec.onnx.export import export_onnx
from nemo_lfr.codec.programs import export_programs
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.modules.altered import is_altered
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer
from nemo_lfr.modules.residual import ResidualBlock
from nemo_lfr.modules.weights import unchanged_networks, weights_version
from tests.models import build_codec, same_parts, speech_like, write_nemo
from tests.tiers import slow_after

AUDIO = torch.stack([speech_like(40 * 15), speech_like(40 * 15, 1)])
LENGTHS = [40 * 15, 21 * 15 + 4]


class Adapter(nn.Module):
    """Adapter that scales the output of a convolution, and that does not have a convolution's attributes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base(inputs) * self.scale


def conv(part: nn.Module) -> nn.Module:
    return part.pre_conv.conv


def scaling_hook(part):
    part.post_conv.register_forward_hook(lambda module, inputs, output: output * 0.5)


def hook_before(part):
    part.pre_conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))


def hook_on_convolution(part):
    conv(part).register_forward_hook(lambda module, inputs, output: output * 0.5)


def pruned(part):
    prune.l1_unstructured(conv(part), "weight", 0.5)
    conv(part).weight_orig.data.mul_(0.5)


def old_spectral_norm(part):
    spectral_norm(conv(part)).eval()


def adapter(part):
    part.pre_conv.conv = Adapter(conv(part))


def other_activation(part):
    part.activations[0] = nn.Tanh()


def patched_forward(part):
    original = conv(part).forward
    conv(part).forward = lambda inputs: original(inputs) * 0.5


@pytest.fixture(autouse=True)
def unpatched_convolutions(monkeypatch):
    monkeypatch.setattr(nn.Conv1d, "forward", nn.Conv1d.forward)  # restores it after `patched_class`


def patched_class(part):
    original = nn.Conv1d.forward
    nn.Conv1d.forward = lambda layer, inputs: original(layer, inputs) * 0.5


class Halving(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 0.5


class LouderBlock(ResidualBlock):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * 2


def other_residual_layer(part):
    part.res_layers[0] = Halving()


def other_residual_block(part):
    part.res_layers[0].res_blocks[0].res_blocks[0] = Halving()


def overridden_forward(part):
    part.res_layers[0].res_blocks[0].res_blocks[0].__class__ = LouderBlock


def activation_of_a_convolution(part):
    part.pre_conv.activation = nn.Tanh()


def other_dropout(part):
    part.res_layers[0].res_blocks[0].res_blocks[0].dropout = Halving()


def active_dropout(part):
    part.res_layers[0].res_blocks[0].res_blocks[0].dropout = nn.Dropout(0.5).train()


CHANGES = [
    scaling_hook,
    hook_before,
    hook_on_convolution,
    pruned,
    old_spectral_norm,
    adapter,
    other_activation,
    patched_forward,
    patched_class,
    other_residual_layer,
    other_residual_block,
    overridden_forward,
    activation_of_a_convolution,
    other_dropout,
]


def encoded_by_calls(encoder: nn.Module, audio: torch.Tensor) -> torch.Tensor:
    """Call all layers of the encoder in order."""
    hidden = encoder.pre_conv(audio[:, None])
    for residual, activation, down in zip(
        encoder.res_layers, encoder.activations, encoder.down_sample_conv_layers, strict=True
    ):
        hidden = down(activation(residual(hidden)))
    return encoder.post_conv(encoder.post_activation(hidden))


@pytest.mark.parametrize("change", slow_after(4, CHANGES))
@pytest.mark.parametrize("used_before", [False, True])
@torch.no_grad()
def test_a_changed_encoder_gives_what_its_modules_give(change, used_before):
    codec = build_codec("two_stages")
    before = codec.encode(AUDIO, LENGTHS)[0]
    codec = codec if used_before else copy.deepcopy(codec)
    change(codec.encoder)
    tokens, _ = codec.encode(AUDIO, LENGTHS)
    for row, length in enumerate(LENGTHS):
        frames = -(-length // 15)
        alone = nn.functional.pad(AUDIO[row : row + 1, :length], (0, frames * 15 - length))
        expected = codec.quantizer.encode(encoded_by_calls(codec.encoder, alone))[:, 0]
        assert torch.equal(tokens[row, :, :frames], expected)
        assert not tokens[row, :, frames:].any()
    assert not torch.equal(tokens, before)


@pytest.mark.parametrize("change", slow_after(3, CHANGES))
@torch.no_grad()
def test_a_changed_decoder_gives_what_its_modules_give(change):
    codec = build_codec("two_stages")
    tokens, tokens_len = codec.encode(AUDIO, LENGTHS)
    before = codec.decode(tokens, tokens_len)[0]
    change(codec.decoder)
    audio, audio_len = codec.decode(tokens, tokens_len)
    for row, (frames, samples) in enumerate(zip(tokens_len.tolist(), audio_len.tolist(), strict=True)):
        codes = codec.quantizer.decode(tokens[row : row + 1, :, :frames].transpose(0, 1))
        assert torch.allclose(audio[row, :samples], codec.decoder.decode_frames(codes)[0], atol=1e-6)
    assert not torch.allclose(audio, before, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES)
def test_stream_rejects_networks_with_hooks(change):
    codec = build_codec("two_stages")
    encoder, decoder = codec.stream_encoder(), codec.stream_decoder()
    change(codec.encoder)
    change(codec.decoder)
    with unchanged_networks():  # as in the server
        for _ in range(2):  # a check that failed is repeated
            with pytest.raises(NemoLfrError, match="forward hooks, patched methods or replaced layers"):
                encoder.push(AUDIO[0].numpy())
            with pytest.raises(NemoLfrError, match="forward hooks, patched methods or replaced layers"):
                decoder.push(torch.zeros(8, 20, dtype=torch.int32).numpy())


@pytest.mark.slow
def test_active_dropout_is_applied_and_refused_by_streams():
    codec = build_codec("two_stages")
    tokens, _ = codec.encode(AUDIO, LENGTHS)
    audio, _ = codec.decode(tokens)
    fingerprint = codec.fingerprint
    active_dropout(codec.encoder)
    active_dropout(codec.decoder)
    assert not torch.equal(codec.encode(AUDIO, LENGTHS)[0], tokens)
    assert not torch.equal(codec.decode(tokens)[0], audio)
    for push, data in (
        (codec.stream_encoder().push, AUDIO[0].numpy()),
        (codec.stream_decoder().push, tokens[0].numpy()),
    ):
        with pytest.raises(NemoLfrError, match="has dropout, which a stream does not apply"):
            push(data)
    codec.encoder.eval()
    codec.decoder.eval()
    assert torch.equal(codec.encode(AUDIO, LENGTHS)[0], tokens) and torch.equal(codec.decode(tokens)[0], audio)
    assert codec.fingerprint == fingerprint


def test_hooks_for_all_modules_are_called():
    codec = build_codec("two_stages")
    tokens, _ = codec.encode(AUDIO, LENGTHS)
    audio, _ = codec.decode(tokens)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        assert torch.equal(codec.encode(AUDIO, LENGTHS)[0], tokens)
        assert torch.allclose(codec.decode(tokens)[0], audio, atol=1e-6)
    finally:
        handle.remove()
    expected = codec.encoder.pre_conv.conv, codec.quantizer.fsqs[1], codec.decoder.post_conv
    assert set(map(id, expected)) <= set(map(id, seen))


def test_a_hook_is_called_and_leaves_when_it_is_removed():
    codec = build_codec("two_stages")
    expected = codec.encode(AUDIO, LENGTHS)[0]
    seen = []
    handle = codec.encoder.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    assert torch.equal(codec.encode(AUDIO, LENGTHS)[0], expected) and len(seen) == 2
    handle.remove()
    assert not is_altered(codec.encoder)
    assert torch.equal(codec.encode(AUDIO, LENGTHS)[0], expected) and len(seen) == 2


@pytest.mark.parametrize("kind", ["symmetric", "nano", "causal", "two_stages"])
def test_unchanged_networks_use_derived_forms(kind):
    codec = build_codec(kind)
    parametrize.register_parametrization(codec.encoder.pre_conv.conv, "weight", nn.Identity())
    for part in (codec.encoder, codec.decoder, same_parts(codec).encoder):
        assert not is_altered(part)


def hook_on_quantizer(codec):
    codec.quantizer.register_forward_hook(lambda module, inputs, outputs: outputs)


def patched_method(codec):
    codec.quantizer.fsqs[0].compress = lambda inputs: inputs


def slopes(codec):
    codec.decoder.activations[0].activation.negative_slope = 0.9


def tanh_in_an_activation(codec):
    codec.encoder.activations[0].activation = nn.Tanh()


def eps(codec):
    codec.quantizer.fsqs[0].eps = 0.2


def eps_of_one_group(codec):
    codec.quantizer.fsqs[1].eps = 0.2


class SteepReLU(nn.LeakyReLU):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden * 2)


def subclass_in_an_activation(codec):
    codec.encoder.activations[0].activation = SteepReLU()


def pad_mode(codec):
    codec.encoder.pre_conv.pad_mode = "replicate"


def levels(codec):
    codec.quantizer.fsqs[1].num_levels[0, 0, 0] = 4


def bases(codec):
    codec.quantizer.fsqs[1].dim_base_index += 1


def group_of_other_levels(codec):
    codec.quantizer.fsqs[1] = FiniteScalarQuantizer([9, 8, 7, 4])


def on_encoder(change):
    @functools.wraps(change)
    def changed(codec):
        change(codec.encoder)

    return changed


def replaced_group(codec):
    codec.quantizer.fsqs[1] = OtherGroup()


class OtherGroup(nn.Module):
    pass


def removed_group(codec):
    del codec.quantizer.fsqs[-1]


HOOKED = [*map(on_encoder, CHANGES), hook_on_quantizer, patched_method, replaced_group, removed_group]
# Settings that a fingerprint covers, but a saved config does not.
SETTINGS = [slopes, tanh_in_an_activation, subclass_in_an_activation, eps, eps_of_one_group, pad_mode]


def fingerprint(codec, folder):
    return codec.fingerprint


def encode_file(codec, folder):
    codec.encode_file(folder / "a.wav", folder / "out" / "a.lfr")


def save(codec, folder):
    codec.save_pretrained(folder / "out")


def programs(codec, folder):
    export_programs(codec)


def onnx(codec, folder):
    pytest.importorskip("onnxscript")
    export_onnx(codec, folder / "out")


def golden(codec, folder):
    export_golden(codec, folder / "out" / "a.safetensors")


@pytest.fixture
def loaded(tmp_path):
    soundfile.write(tmp_path / "a.wav", AUDIO[0].numpy(), 22050)
    return nemo_lfr.load(write_nemo(tmp_path / "tiny.nemo"), device="cpu")


@pytest.mark.parametrize(
    ("change", "door"),
    slow_after(
        1,
        [(change, door) for change in HOOKED for door in (fingerprint, save)]
        + [(hook, door) for hook in (HOOKED[2], hook_on_quantizer) for door in (encode_file, programs, onnx, golden)],
        itemgetter(1),
    ),
)
def test_doors_that_describe_or_save_a_codec_reject_hooks(loaded, change, door, tmp_path):
    change(loaded)
    with pytest.raises(
        NemoLfrError, match=r"the (encoder|quantizer) of .* has forward hooks, patched methods or replaced layers,"
    ):
        door(loaded, tmp_path)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("change", SETTINGS)
def test_changed_settings_change_the_fingerprint_and_are_not_saved(loaded, change, tmp_path):
    before = loaded.fingerprint
    change(loaded)
    assert loaded.fingerprint != before
    with pytest.raises(NemoLfrError, match=r"differs from the codec's config: .* instead of"):
        loaded.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [levels, bases, group_of_other_levels])
@pytest.mark.parametrize("door", [fingerprint, encode_file, save, programs, golden])
def test_changed_levels_are_refused(loaded, change, door, tmp_path):
    change(loaded)
    with pytest.raises(NemoLfrError, match=r"(num_levels|dim_base_index) are"):
        door(loaded, tmp_path)


@pytest.mark.parametrize("door", [programs, golden])
def test_different_eps_are_not_exported(loaded, door, tmp_path):
    eps_of_one_group(loaded)
    with pytest.raises(NemoLfrError, match=r"have the eps \[0.001, 0.2, .* set the same eps"):
        door(loaded, tmp_path)


def dilation(part):
    part.post_conv.conv.dilation = (2,)


def stride(part):
    part.post_conv.conv.stride = (2,)


def circular(part):
    part.pre_conv.pad_mode = "circular"


def circular_conv(part):
    conv(part).padding_mode = "circular"


def sparse(part):
    conv(part).weight = nn.Parameter(conv(part).weight.detach().to_sparse())


@pytest.mark.parametrize(
    ("change", "message"),
    [*((change, "settings") for change in (dilation, stride, circular, circular_conv)), (sparse, "sparse")],
)
def test_settings_that_do_not_fit_a_layer_are_refused_after_use(change, message):
    codec = build_codec("two_stages")
    tokens, _ = codec.encode(AUDIO, LENGTHS)
    codec.decode(tokens)
    change(codec.encoder)
    change(codec.decoder)
    doors = [
        lambda: codec.encode(AUDIO),
        lambda: codec.decode(tokens),
        lambda: codec.stream_encoder().push(AUDIO[0].numpy()),
        lambda: codec.stream_decoder().push(tokens[0].numpy()),
    ]
    for door in doors:
        with pytest.raises(NemoLfrError, match=message):
            door()


def slope_of_one_branch(part):
    part.res_layers[0].res_blocks[1].res_blocks[0].input_activation.activation.negative_slope = 0.9


def second_slope_of_one_branch(part):
    part.res_layers[0].res_blocks[1].res_blocks[0].skip_activation.activation.negative_slope = 0.9


def padding_of_one_branch(part):
    part.res_layers[0].res_blocks[1].res_blocks[0].input_conv.pad_mode = "constant"


def padding_mode_of_one_branch(part):
    part.res_layers[0].res_blocks[1].res_blocks[0].input_conv.conv.padding_mode = "zeros"


def subclass_in_one_branch(part):
    part.res_layers[0].res_blocks[1].res_blocks[0].skip_activation.activation = SteepReLU()


def tanh_in_one_branch(part):
    part.res_layers[0].res_blocks[1].res_blocks[0].skip_activation.activation = nn.Tanh()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        slope_of_one_branch,
        second_slope_of_one_branch,
        padding_of_one_branch,
        padding_mode_of_one_branch,
        tanh_in_one_branch,
        subclass_in_one_branch,
    ],
)
@torch.no_grad()
def test_settings_of_one_branch_are_used(change):
    """The branches of a residual layer share an input only if they have the same settings."""
    codec = build_codec("symmetric")
    clip = speech_like(12 * codec.samples_per_frame)
    before = codec.encode(clip)[0]
    change(codec.encoder)
    expected = codec.quantizer.encode(codec.encoder.encode_frames(clip[None])).transpose(0, 1)
    tokens, _ = codec.encode(clip)
    assert torch.equal(tokens, expected) and not torch.equal(tokens, before)


def test_settings_are_part_of_a_network_version():
    """Forms that copy settings, such as plans on CUDA, are built again."""
    codec = build_codec("two_stages")
    version = weights_version(codec.encoder)
    seen = [version()]
    for change in (slope_of_one_branch, padding_of_one_branch, dilation, stride):
        change(codec.encoder)
        assert version() not in seen
        seen.append(version())
