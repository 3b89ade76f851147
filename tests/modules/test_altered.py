"""Tests that hooks on the encoder and decoder run, and that modules replaced by the caller are used."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.modules.altered import is_altered
from tests.models import build_codec, same_parts, speech_like

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


CHANGES = [
    scaling_hook,
    hook_before,
    hook_on_convolution,
    pruned,
    old_spectral_norm,
    adapter,
    other_activation,
    patched_forward,
]


def encoded_by_calls(encoder: nn.Module, audio: torch.Tensor) -> torch.Tensor:
    """Call all layers of the encoder in order."""
    hidden = encoder.pre_conv(audio[:, None])
    for residual, activation, down in zip(
        encoder.res_layers, encoder.activations, encoder.down_sample_conv_layers, strict=True
    ):
        hidden = down(activation(residual(hidden)))
    return encoder.post_conv(encoder.post_activation(hidden))


@pytest.mark.parametrize("change", CHANGES)
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


@pytest.mark.parametrize("change", CHANGES)
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
    with pytest.raises(NemoLfrError, match="forward hooks or replaced layers"):
        encoder.push(AUDIO[0].numpy())
    with pytest.raises(NemoLfrError, match="forward hooks or replaced layers"):
        decoder.push(torch.zeros(8, 20, dtype=torch.int32).numpy())


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
